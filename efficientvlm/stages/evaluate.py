"""eval: the metrics of a checkpoint on a split of some data."""

from __future__ import annotations

import time
from typing import Any

from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.control import Control
from efficientvlm.data.answer_list import as_input
from efficientvlm.data.configured import open_split
from efficientvlm.data.opening import record
from efficientvlm.families.onnx.description import is_exported
from efficientvlm.loaded import check_precision, keep_length, load
from efficientvlm.runtime.hardware import autocast, pick_device
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.runtime.progress import say
from efficientvlm.stages.common import say_notes, say_skipped
from efficientvlm.stages.results import ResultFile
from efficientvlm.tasks.influence import tell
from efficientvlm.tasks.known import TASKS


def run(config: Any, control: Control) -> dict[str, Any]:
    """Measure the task's metrics on the split; nothing is trained.

    With `config.out`, a finished result of the same checkpoint, data and settings is returned as it is, unless forced.

    Raises:
        BadInput: a checkpoint that does not do the task, no list of answers, nothing to measure on, an `out` of another measurement.
    """
    task = TASKS[config.task]
    loaded = load(config.model, weights=is_exported(resolve(config.model, checkpoint=True)), exported=True)
    check_precision(loaded, config.precision)
    keep_length(loaded, config.max_tokens)
    task.check(config, loaded)
    source = open_split(config, task.kind, config.split, loaded.preprocessing)
    inputs = {"model": fingerprint(config.model), "data": source.fingerprint}
    if getattr(config, "answers", None):
        inputs["answers"] = fingerprint(as_input(config.answers) or "")
    file = ResultFile.open(config, "eval", inputs, force=control.force)
    if file.finished:
        say("\n  ".join([f"eval: {file.path} is up to date", *file.differing]), quiet=control.quiet)
        return file.finished
    if not is_exported(loaded.path):
        loaded = load(config.model)
        keep_length(loaded, config.max_tokens)
    say_notes(source, config.split, control.quiet)
    device = pick_device(config.device)
    loaded.model.to(device)
    began = time.monotonic()
    with enough_memory("evaluation", f"lower batch_size (now {config.batch_size})"), autocast(device, config.precision):
        found = task.evaluate(config, loaded, source, title=f"eval {config.split}", quiet=control.quiet)
    tell("eval", found["influence"], control.quiet)
    say_skipped(source, config.split, control.quiet)
    result: dict[str, Any] = {
        "task": config.task,
        "model": config.model,
        "data": record(source, config.split),
        **{key: value for key, value in found.items() if key != "metrics"},
        "device": device.type,
        "precision": getattr(loaded.model.config, "precision", config.precision),
        "seconds": round(time.monotonic() - began, 3),
        "metrics": found["metrics"],
    }
    return file.write(result)
