"""run: the stages of a recipe one after the other. What is finished is passed over by the stages themselves, what is unfinished resumes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from efficientvlm.checkpoints.files import expanded
from efficientvlm.checkpoints.manifest import MANIFEST, Manifest
from efficientvlm.control import Control
from efficientvlm.recipe import Step
from efficientvlm.runtime import ranks
from efficientvlm.runtime.memory import uncollected
from efficientvlm.runtime.progress import say
from efficientvlm.settings.base import Strict

MODULES = {
    "import": "import_",
    "eval": "evaluate",
    "select-sentences": "select_sentences",
    **dict.fromkeys(("pretrain", "distill", "finetune"), "learning"),
}
TOGETHER = ("pretrain", "distill", "prune", "finetune", "embed")


def module_of(stage: str) -> ModuleType:
    """The module whose `run(config, control)` is the stage."""
    with uncollected():
        return import_module(f"efficientvlm.stages.{MODULES.get(stage, stage)}")


def run_stage(stage: str, config: Strict, control: Control) -> Any:
    """What `run(config, control)` of the stage returns. Of several processes all train and embed; anything else is done by the main one."""
    run = module_of(stage).run
    return run(config, control) if stage in TOGETHER else ranks.on_main(lambda: run(config, control))


def run_recipe(steps: Sequence[Step], control: Control) -> dict[str, Any]:
    """Run every stage in order.

    Returns:
        `stages`: name, stage, out, seconds and up_to_date of each; `result`: what the last stage returned (its manifest, for a checkpoint).

    Raises:
        EvlmError: whatever a stage raises, :class:`Interrupted` included; the same call goes on from there.
    """
    check_data(steps)
    stages: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for number, step in enumerate(steps, 1):
        out = expanded(str(getattr(step.config, "out", None)))
        say("\n  ".join([f"[{number}/{len(steps)}] {step.stage} → {out}", *step.notes]), quiet=control.quiet)
        before, began = _identity(out), time.monotonic()
        outcome = run_stage(step.stage, step.config, control)
        seconds = round(time.monotonic() - began, 2)
        unchanged = before is not None and before == _identity(out)
        stages.append({"name": step.name, "stage": step.stage, "out": str(out), "seconds": seconds, "up_to_date": unchanged})
        result = outcome.model_dump(mode="json") if isinstance(outcome, Manifest) else outcome
    return {"stages": stages, "result": result}


def check_data(steps: Sequence[Step]) -> None:
    """:class:`BadInput` for generated data that cannot be meant, before the first stage has run for nothing."""
    from efficientvlm.data import shapes  # numpy, which a recipe that is only looked at does without

    for step in steps:
        for spec in (getattr(step.config, name, None) for name in ("data", "val")):
            if isinstance(spec, str) and spec.partition(":")[0] == "shapes":
                shapes.parse(spec)


def _identity(out: Path) -> tuple[int, int] | None:
    """Changes whenever a stage writes its output anew: manifests and results are replaced as whole files, last."""
    try:
        status = (out / MANIFEST if out.is_dir() else out).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
