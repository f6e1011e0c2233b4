"""eval: the metrics of a checkpoint on a split of some data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from efficientvlm.checkpoints.files import expanded
from efficientvlm.control import Control
from efficientvlm.data.ahead import how_many
from efficientvlm.data.opening import record
from efficientvlm.loaded import Loaded, check_precision, keep_length, load
from efficientvlm.runtime.hardware import autocast, pick_device
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.runtime.progress import say
from efficientvlm.settings.common import Measuring
from efficientvlm.stages.common import say_notes, say_skipped
from efficientvlm.stages.results import ResultFile, digests_of
from efficientvlm.stages.workspace import Job, Workspace
from efficientvlm.tasks.influence import tell
from efficientvlm.tasks.known import TASKS
from efficientvlm.tasks.task import Task


@dataclass(frozen=True)
class Evaluation(Job):
    """The shapes of the network that is measured, and whether it can be, as the settings say."""

    task: Task
    loaded: Loaded
    able: bool


def prepare(config: Measuring, workspace: Workspace) -> Evaluation:
    """What is measured, and on what.

    Raises:
        BadInput: a checkpoint that does not do the task, no list of answers.
    """
    task, able = TASKS[config.task], False
    loaded = workspace.checkpoint(config.model, exported=True)
    with workspace.checking():
        check_precision(loaded, config.precision)
        keep_length(loaded, config.max_tokens)
        task.check(config, loaded)
        able = True
    data = {"data": workspace.data(config, task.kind, config.split, loaded.preprocessing)}
    for role, other in task.reads(config).items():
        data[role] = workspace.data(other, task.kind, other.split, loaded.preprocessing)
    return Evaluation(task, loaded, able, inputs={"model": config.model, **task.files(config)}, data=data)


def run(config: Measuring, control: Control) -> dict[str, Any]:
    """Measure the task's metrics on the split; nothing is trained.

    With `config.out`, a finished result of the same checkpoint, data and settings is returned as it is, unless forced.

    Raises:
        BadInput: as :func:`prepare`; nothing to measure on, an `out` of another measurement.
    """
    job = prepare(config, Workspace(control.quiet))
    task, source = job.task, job.data["data"]
    others = {role: other for role, other in job.data.items() if other is not source}
    file = ResultFile.open(config, "eval", digests_of(job), force=control.force)
    if file.finished and all(expanded(path).is_file() for path in task.also_writes(config)):
        say("\n  ".join([f"eval: {file.path} is up to date", *file.differing]), quiet=control.quiet)
        return file.finished
    loaded = load(config.model, exported=True)
    keep_length(loaded, config.max_tokens)
    for title, read in ((config.split, source), *others.items()):
        say_notes(read, title, control.quiet)
    device = pick_device(config.device)
    loaded.model.to(device)
    for read in job.data.values():
        read.workers = how_many(config.workers, device)
    began = time.monotonic()
    with enough_memory("evaluation", f"lower batch_size (now {config.batch_size})"), autocast(device, config.precision):
        more = {"others": others} if others else {}
        found = task.evaluate(config, loaded, source, title=f"eval {config.split}", quiet=control.quiet, **more)
    tell("eval", found["influence"], control.quiet)
    for title, read in ((config.split, source), *others.items()):
        say_skipped(read, title, control.quiet)
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
