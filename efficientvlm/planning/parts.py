"""What every forecast is made of: sizes, data and schedule, cost, and what is at the output."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.data.opening import BUILT_IN
from efficientvlm.data.plan import plan_for
from efficientvlm.loaded import Loaded
from efficientvlm.planning import costs
from efficientvlm.planning.chain import PLANNED, Chain, on_meta
from efficientvlm.planning.checks import place
from efficientvlm.recipe import Step
from efficientvlm.runtime import ranks
from efficientvlm.stages.learning import Learning, freeze

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


def finish(chain: Chain, step: Step, found: Forecast, loaded: Loaded, status: str, **sizes: Any) -> None:
    """Book what the stage writes."""
    found.status = status
    read = [place(spec) for name in ("model", "from_gates") if (spec := getattr(step.config, name, None))]
    if status != "up to date" and (found.structure != "exact" or chain.assumed.intersection(read)):
        chain.assumed.add(place(found.out))
        if found.structure == "exact":
            found.structure = "uniform cut: that of its input, which is assumed"
    chain.write(step, status, loaded)
    written = chain.open(str(found.out), step.name)
    found.after = summary(chain, written)
    if status == "up to date":
        found.structure = "as it is there"
        return
    found.disk = costs.disk(loaded.model, **sizes)
    with chain.problems.of(step.name):
        chain.disks.add(str(found.out), found.disk["output"], found.disk["peak"])


def summary(chain: Chain, loaded: Loaded) -> dict[str, Any]:
    """Parameters, MACs and sparsity of a model, JSON-ready."""
    counted = chain.account(loaded)
    return {"parameters": counted["parameters"], "macs": counted["macs"], "sparsity": counted["sparsity"]["achieved"]}


def digest(chain: Chain, source: Any) -> str:
    """`sha256:HEX` of a source where it is known at once, or everything is to be hashed; else nothing."""
    built_in = source.name.partition(":")[0] == BUILT_IN[1]
    return f"sha256:{source.fingerprint}" if built_in or chain.verify else ""


def digests(chain: Chain, config: Any, sources: dict[str, Any]) -> dict[str, str]:
    """Those of training data, and of validation data of its own."""
    return {"data": digest(chain, sources["train"]), **({"val": digest(chain, sources["val"])} if config.val else {})}


def schedule(config: Any, source: Any) -> dict[str, Any]:
    """Steps, images and save points.

    Raises:
        BadInput: no images, or a batch that the processes cannot share equally.
    """
    world = ranks.launched()
    plan = plan_for(source, config.batch_size, config.seed, world, 0)
    per_epoch = plan.batches_per_epoch
    steps = config.max_steps or max(1, round(config.epochs * per_epoch))
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


def made(path: Path, family: Any, model: Any, tokenizer: Any) -> Loaded:
    """A checkpoint that begins a chain; its manifest follows when it is booked."""
    return Loaded(path, family, model, tokenizer, None)  # type: ignore[arg-type]


def training(
    chain: Chain, step: Step, found: Forecast, run: Learning, inputs: dict[str, str | None], *, result: Loaded | None = None, **sizes: Any
) -> None:
    """What all stages that train cost; `result` is what is written, by default the student as it is trained."""
    with on_meta():  # the student that is trained is one of its own: what is frozen there learns in later stages
        trained = replace(run.student, model=run.student.family.build(run.student.model.config))
    if not chain.problems.of_stage(step.name):  # it may lack the towers
        freeze(trained, run.config.freeze)
    result, run = result or run.student, replace(run, student=trained)
    student, teacher = run.student, run.teacher
    if teacher is not None:
        found.teacher = {"path": str(teacher.path), **summary(chain, teacher)}
    found.structure = found.structure or "exact"
    gates = sizes.get("gates", 0)
    found.schedule = schedule(run.config, run.sources["train"])
    processes = found.schedule["processes"]
    taught = teacher.model if teacher else None
    spread = run.config.parallel == "fsdp" and processes > 1
    found.memory = costs.memory(student.model, taught, gates=gates, training=True, processes=processes, spread=spread)
    status = chain.status(step, inputs, digests(chain, run.config, run.sources))
    sound = not any(problem.stage == step.name for problem in chain.problems.found)
    if teacher is not None and sound and getattr(run.config, "cache_teacher", False) and run.config.kd:
        kept = run.task.bytes_of_cached_teacher(run.config, teacher, run.sources["train"], found.schedule["images_seen"])
        costs.add(found.memory, **{"teacher cache": kept})
        if status != "up to date" and (problem := costs.too_much(kept)):
            chain.problems.add(step.name, problem)
    found.run = None if status == "up to date" else run
    finish(chain, step, found, result, status, trained=student.model, **sizes)


def known(chain: Chain, spec: str) -> str:
    """Digest of a checkpoint, or that of what is not written yet."""
    return fingerprint(PLANNED if place(spec) in chain.stale else spec)


def measured(chain: Chain, step: Step, found: Forecast, inputs: dict[str, str]) -> None:
    """Look at the result file; inputs without a digest are taken to be what they were."""
    given = {role: value for role, value in inputs.items() if value}
    found.status = chain.result_status(step, given, [role for role in inputs if role not in given])
