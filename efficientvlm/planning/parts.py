"""What every forecast is made of: sizes, data and schedule, cost, and what is at the output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.folder import examine, fingerprint
from efficientvlm.checkpoints.manifest import FileRecord, Manifest
from efficientvlm.data.opening import BUILT_IN
from efficientvlm.data.plan import plan_for
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, load
from efficientvlm.planning import costs
from efficientvlm.planning.chain import Chain, Planned
from efficientvlm.planning.checks import place
from efficientvlm.recipe import Step
from efficientvlm.runtime import ranks
from efficientvlm.stages.cutting import DENSE, GATES
from efficientvlm.stages.learning import Learning
from efficientvlm.stages.results import MACHINE, ResultFile
from efficientvlm.stages.workspace import Job

ENDLESS = 1 << 60  # batches an epoch of a stream


@dataclass
class Forecast:
    """What is known about one stage; parts that do not apply stay None."""

    name: str
    stage: str
    out: str | None
    status: str = "not planned"
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    structure: str | None = None
    schedule: dict[str, Any] | None = None
    memory: dict[str, int] | None = None
    disk: dict[str, int] | None = None
    time: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    run: Learning | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "run"}


def digests(chain: Chain, job: Job) -> dict[str, str]:
    """Role → `sha256:HEX` of data where it is known at once, or everything is to be hashed; else nothing."""
    at_once = {role: chain.verify or source.name.partition(":")[0] == BUILT_IN[1] for role, source in job.data.items()}
    return {role: f"sha256:{source.fingerprint}" if at_once[role] else "" for role, source in job.data.items()}


def folder(chain: Chain, step: Step, found: Forecast, job: Job) -> None:
    """Look at the folder of the stage: it is `new`, `up to date`, or the stage `resumes` or `replaces` what is there.

    Data without a digest are taken to be what they were. What speaks against writing is noted; the stage `cannot run` then.
    """
    config: Any = step.config
    known, found.status = digests(chain, job), "cannot run"
    read = {role: spec for role, spec in job.inputs.items() if spec}
    with chain.problems.of(step.name):
        if itself := next((role for role, spec in read.items() if place(spec) == place(config.out)), None):
            raise BadInput(f"{config.out} cannot be written", f"it is the {itself} this stage reads", "use another --out")
        found.status = examine(
            config.out,
            stage=step.stage,
            inputs={role: chain.now(spec) for role, spec in read.items()} | known,
            config=config.model_dump(),
            force=chain.control.force,
            resume=chain.control.resume,
            unread=[role for role, digest in known.items() if not digest],
        )


def result_file(chain: Chain, step: Step, found: Forecast, job: Job) -> None:
    """Look at the result file of the stage, as :func:`folder`; it may have been measured on any machine."""
    read = {role: fingerprint(chain.now(spec)) for role, spec in job.inputs.items() if spec}
    read |= {role: digest.removeprefix("sha256:") for role, digest in digests(chain, job).items()}
    given, found.status = {role: digest for role, digest in read.items() if digest}, "cannot run"
    with chain.problems.of(step.name):
        unread = [MACHINE, *(read.keys() - given.keys())]
        file = ResultFile.examine(step.config, step.stage, given, force=chain.control.force, unread=unread)
        there = file.path and file.path.exists()
        found.status = "up to date" if file.finished else "replaces" if there else "new"


def book(chain: Chain, step: Step, found: Forecast, job: Job, result: Loaded, extra: dict[str, Any] | None = None, **sizes: Any) -> None:
    """Book that the stage writes `result`, and `extra` into its manifest; `sizes` as for :func:`costs.disk`. What is up to date stays."""
    out = str(found.out)
    if found.status == "up to date":
        found.structure, written = "as it is there", load(out, weights=False)
    else:
        found.structure = found.structure or "exact"
        if found.structure == "exact" and place(job.inputs.get("model")) in chain.assumed:
            found.structure = "uniform cut: that of its input, which is assumed"
        if found.structure != "exact":
            chain.assumed.add(place(out))
        chain.stale.add(place(out))
        draft = drafted(step, result, extra or {}, beside(sizes))
        written = Planned(Path(out), result.family, result.model, result.tokenizer, draft, result.image_processor)
    chain.outputs[place(out)] = written
    found.after = chain.summary(written)
    if found.status != "up to date":
        found.disk = costs.disk(result.model, **sizes)
        with chain.problems.of(step.name):
            chain.disks.add(out, found.disk["output"], found.disk["peak"])


def beside(sizes: dict[str, Any]) -> list[str]:
    """The files that a stage of these `sizes`, see :func:`costs.disk`, writes beside its network and that later stages read."""
    return [name for name, written in ((GATES, sizes.get("gates")), (DENSE, sizes.get("dense"))) if written]


def drafted(step: Step, result: Loaded, extra: dict[str, Any], names: list[str]) -> Manifest:
    """The manifest that `step` will write, as far as later stages ask for it; of the files `names` it says that they will be there."""
    config, created = step.config.model_dump(mode="json"), manifest.now()
    more, files = {"new": [], **extra}, dict.fromkeys(names, FileRecord(sha256="0" * 64, bytes=0))
    return Manifest(
        stage=step.stage, family=result.family.name, config=config, code=manifest.code(), created=created, files=files, extra=more
    )


def schedule(config: Any, source: Any) -> dict[str, Any]:
    """Steps, images and save points.

    Raises:
        BadInput: no images, or a batch that the processes cannot share equally.
    """
    world = ranks.launched()
    plan = plan_for(source, config.batch_size, config.seed, world, 0)
    per_epoch = plan.batches_per_epoch
    steps = config.steps(per_epoch)
    endless = per_epoch >= ENDLESS
    batch = config.batch_size if endless else min(config.batch_size, len(source))
    return {
        "images": None if endless else len(source),
        "batch_size": config.batch_size,
        "processes": world,
        "steps_per_epoch": None if endless else per_epoch,
        "steps": steps,
        "epochs": None if endless else round(steps / per_epoch, 4),
        "images_seen": steps * batch,
        "save_every": config.save_every,
        "saves": -(-steps // config.save_every),
    }


def training(
    chain: Chain,
    step: Step,
    found: Forecast,
    run: Learning,
    *,
    result: Loaded | None = None,
    extra: dict[str, Any] | None = None,
    **sizes: Any,
) -> None:
    """What all stages that train cost; `result` is what is written, by default the student as it is trained."""
    with torch.device("meta"):  # the student that is trained is one of its own: what is frozen there learns in later stages
        trained = replace(run.student, model=run.student.family.build(run.student.model.config))
    if not chain.problems.of_stage(step.name):  # it may lack the towers
        run.task.freeze(run.config, trained)
    result, run = result or run.student, replace(run, student=trained)
    config, student, teacher = run.config, run.student, run.teacher
    found.structure = found.structure or "exact"
    if teacher is not None:
        found.teacher = {"path": str(teacher.path), **chain.summary(chain.open(str(run.inputs["teacher"]), step.name))}
    found.schedule = schedule(config, run.sources["train"])
    processes = found.schedule["processes"]
    taught = teacher.model if teacher else None
    spread = config.parallel == "fsdp" and processes > 1
    held = {"gates": sizes.get("gates", 0), "processes": processes, "spread": spread}
    found.memory = costs.memory(student.model, taught, training=True, **held)
    averages = 0 if chain.problems.of_stage(step.name) else run.task.elements_beside(config, student, run.sources["train"])
    if averages:
        costs.add(found.memory, averages=costs.FLOAT * averages)
    folder(chain, step, found, run)
    if teacher is not None and config.keeps_teacher and not chain.problems.of_stage(step.name):
        kept = run.task.bytes_of_cached_teacher(config, teacher, run.sources["train"], found.schedule["images_seen"])
        costs.add(found.memory, **{"teacher cache": kept})
        if found.status != "up to date" and (problem := costs.too_much(config.keeps_teacher, kept)):
            chain.problems.add(step.name, problem)
    found.run = None if found.status == "up to date" else run
    book(chain, step, found, run, result, extra, trained=student.model, averages=averages, **sizes)
