"""From command-line options to a running stage: one path for all stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from efficientvlm.cli import output
from efficientvlm.control import Control
from efficientvlm.errors import BadInput

if TYPE_CHECKING:
    from efficientvlm.config import Strict

CONTROL = {"resume", "force", "json", "quiet", "dry_run", "assignments", "column"}
KEYS = {"eval": ("metrics",), "bench": ("latency",)}
CHECKPOINTS = ("model", "teacher", "from_gates")
PATHS = ("vision_from", "text_from", "tokenizer", "answers")


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """`key=value` texts as a mapping; anything else is a usage error."""
    found = {}
    for text in texts or []:
        key, sign, value = text.partition("=")
        if not sign or not key or not value:
            raise typer.BadParameter(f"{text!r} is not of the form key=value", param_hint=option)
        found[key] = value
    return found


def stage(name: str, options: dict[str, Any]) -> None:
    """Run a stage with the options of its command: `options` are the command's own local variables.

    Options that were not given stay out of the configuration, so that its defaults rule; `--set` is applied last.
    """
    from efficientvlm import config as configs

    given = {key: value for key, value in options.items() if key not in CONTROL and value not in (None, {}, [])}
    if columns := pairs(options.get("column"), "--column"):
        given["columns"] = columns
    model = configs.STAGES[name]
    values = configs.merge(given, options.get("assignments") or [])
    for key, field in model.model_fields.items():
        if field.is_required() and key not in values:
            option = {"models": "model"}.get(key, key).replace("_", "-")
            raise typer.BadParameter("it is needed and was not given", param_hint=f"--{option}")
    config = configs.parse(model, values, f"evlm {name}")
    preflight(name, config)
    if options["dry_run"]:
        output.emit({"stage": name, "config": config.model_dump(mode="json")})
        return
    from efficientvlm.stages.run import module_of

    control = Control(force=options["force"], resume=options["resume"], quiet=options["quiet"] or options["json"], json=options["json"])
    result = module_of(name).run(config, control)
    out = getattr(config, "out", None)
    if isinstance(result, dict):
        output.mapping_result(result, out, as_json=control.json, keys=KEYS.get(name, ()))
    else:
        output.checkpoint_result(Path(str(out)), as_json=control.json, quiet=control.quiet)


def preflight(name: str, config: Strict) -> None:
    """Whatever can be known to be wrong without loading a model: paths that are not there, checkpoints that are not finished.

    Raises:
        BadInput: naming the option.
    """
    from efficientvlm.checkpoint import require_complete
    from efficientvlm.files import resolve

    values = config.model_dump()
    for key in CHECKPOINTS:
        if value := values.get(key):
            if name == "import":
                if not resolve(value).is_file():
                    raise BadInput(
                        f"--model {value} cannot be imported", "it is not a file", "give a published .th, .pth or .safetensors file"
                    )
            else:
                require_complete(value)
    for value in values.get("models", []):
        require_complete(value)
    for key in ("data", "val"):
        if value := values.get(key):
            from efficientvlm.data.sources import check_spec

            check_spec(value)
    for key in PATHS:
        if (value := values.get(key)) and (key, value) != ("tokenizer", "train"):
            resolve(value)
