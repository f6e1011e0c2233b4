"""From command-line options to a running stage: one path for all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from efficientvlm.cli import output, plan
from efficientvlm.control import Control
from efficientvlm.errors import BadInput

CONTROL = ("dry_run", "resume", "force", "json", "quiet")
KEYS = {"eval": ("metrics",), "bench": ("latency",)}


def launch(name: str, options: dict[str, Any]) -> None:
    """Run a stage with the options of its command: those of `CONTROL`, `set`, and settings by their names.

    Settings that were not given (None) stay out of the configuration, so that its defaults rule; `set` is applied last.
    """
    from efficientvlm.planning.checks import preflight
    from efficientvlm.recipe import Step
    from efficientvlm.runtime.progress import say
    from efficientvlm.settings import idle
    from efficientvlm.settings.base import merge, parse
    from efficientvlm.settings.compose import of

    given = {key: value for key, value in options.items() if key not in (*CONTROL, "set") and value is not None}
    values = merge(given, options["set"] or [])
    model = of(name, values)
    for key in model.lacking(values):
        option = {"models": "model"}.get(key, key).replace("_", "-")
        raise typer.BadParameter("it is needed and was not given", param_hint=f"--{option}")
    config = parse(model, values, f"evlm {name}")
    if wrong := idle.refused(config, values):
        raise BadInput(f"evlm {name} has {len(wrong)} idle setting{'s' * (len(wrong) > 1)}", "\n  " + "\n  ".join(wrong), "leave them out")
    steps = [Step(name, name, config, idle.said(config, values))]
    control = Control(force=options["force"], resume=options["resume"], quiet=options["quiet"] or options["json"], json=options["json"])
    if options["dry_run"]:
        plan.dry_run(f"evlm {name}", steps, control, recipe=False)
        return
    preflight(steps).raise_all(f"evlm {name}")
    for note in steps[0].notes:
        say(f"{name}: {note}", quiet=control.quiet)
    from efficientvlm.runtime import ranks
    from efficientvlm.stages.run import run_stage

    result = run_stage(name, config, control)
    if not ranks.is_main():
        return
    out = getattr(config, "out", None)
    if isinstance(result, dict):
        output.mapping_result(result, out, as_json=control.json, keys=KEYS.get(name, ()))
    else:
        output.checkpoint_result(Path(str(out)), as_json=control.json, quiet=control.quiet)
