"""What each stage would make of the shapes it reads, and what it would cost: the stage's own job, and what only a plan asks of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import singledispatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from efficientvlm.checkpoints.folder import check_place
from efficientvlm.compression.anatomy import Groups
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.data.opening import origin
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, read_as
from efficientvlm.planning import costs, selecting, storing
from efficientvlm.planning.chain import Blocked, Chain, Look, Planned
from efficientvlm.planning.checks import importable, path_problems, place
from efficientvlm.planning.expected import stand_in
from efficientvlm.planning.parts import Forecast, book, folder, result_file, training
from efficientvlm.planning.stores import Foreseen
from efficientvlm.recipe import FILES, Step
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.settings.common import Learning as Learns
from efficientvlm.settings.stages import Prune
from efficientvlm.stages.bench import Timing
from efficientvlm.stages.budgeting import timing_device
from efficientvlm.stages.embed import Embedding
from efficientvlm.stages.evaluate import Evaluation
from efficientvlm.stages.learning import Learning
from efficientvlm.stages.prune import Pruning, Untrained
from efficientvlm.stages.recut import Recut, dense_kept
from efficientvlm.stages.run import module_of
from efficientvlm.stages.select_sentences import Selecting
from efficientvlm.stages.shrink import Shrinking
from efficientvlm.stages.tabling import PARTS
from efficientvlm.stages.workspace import Beginning, Job
from efficientvlm.tasks.known import TASKS

REPLACED = {*FILES, "report"}
"""Stages that write no checkpoint."""


def forecast(chain: Chain, step: Step) -> Forecast:
    """Plan `step` after all before it; its problems go to `chain.problems`."""
    config: Any = step.config
    found = Forecast(step.name, step.stage, getattr(config, "out", None))
    problems = chain.problems
    before = len(problems.found)
    for error in path_problems(step, set(chain.outputs)) if stand_in(config) is None else ():
        problems.add(step.name, error)
    if found.out and step.stage not in REPLACED:
        with problems.of(step.name):
            check_place(found.out)
    with problems.of(step.name):
        pick_device(getattr(config, "device", "auto"))
    if isinstance(config, Prune) and config.budget == "latency" and not config.table:
        with problems.of(step.name):
            timing_device(config)
    with problems.of(step.name):
        try:
            look_at(chain, step, found)
        except Blocked as blocked:
            found.notes.append(str(blocked))
    found.notes += [*chain.notes.pop(step.name, []), *step.notes]
    if found.out and place(found.out) not in chain.outputs:
        if found.status != "up to date":
            chain.stale.add(place(found.out))
        chain.outputs[place(found.out)] = None
    if len(problems.found) > before and found.status != "up to date":
        found.status = "cannot run"
    return found


def look_at(chain: Chain, step: Step, found: Forecast) -> None:
    """Have the stage prepare, and note what it is about to make and what that costs.

    Raises:
        Blocked: it reads what cannot be planned. What is wrong with the data of a stage that trains is noted all the same.
    """
    config, look = step.config, Look(chain, step.name)
    if step.stage == "report":
        return picture(found)
    if expected := stand_in(config):
        return weigh(expected, chain, step, found)
    if step.stage == "import":
        importable(config.model)  # type: ignore[attr-defined]
    try:
        job: Job = module_of(step.stage).prepare(config, look)
    except Blocked:
        learns = isinstance(config, Learns) and config.task in TASKS and not getattr(config, "from_gates", None)
        for split in ("train", "val") if learns else ():
            with suppress(Blocked):
                look.data(config, TASKS[config.task].kind, split, None)  # type: ignore[attr-defined]
        raise
    if not isinstance(job, Beginning) and (spec := job.inputs.get("model")):
        found.before = chain.summary(chain.open(spec, step.name))
    weigh(job, chain, step, found)


def picture(found: Forecast) -> None:
    if find_spec("matplotlib") is None:
        raise BadInput("the package matplotlib is not installed", "", "pip install matplotlib")
    found.status = "new"


@singledispatch
def weigh(job: Job, chain: Chain, step: Step, found: Forecast) -> None:
    """Note what `job` makes and costs, and what is at its output. A job that says no more writes its network in another form."""
    found.memory = costs.memory(chain.open(str(job.inputs["model"]), step.name).model)
    if getattr(step.config, "format", "") == "onnx":
        chain.graphs.add(place(str(found.out)))
    folder(chain, step, found, job)


@weigh.register
def _(job: Beginning, chain: Chain, step: Step, found: Forecast) -> None:
    family, model, tokenizer, remarks = job.shapes()
    found.memory = costs.memory(model)
    found.notes += remarks
    folder(chain, step, found, job)
    later: Any = None  # its manifest follows when it is booked
    book(chain, step, found, job, Planned(Path(str(found.out)), family, model, tokenizer, later, job.image_settings))


@weigh.register
def _(job: Shrinking, chain: Chain, step: Step, found: Forecast) -> None:
    with torch.device("meta"):
        model, origin = job.student(job.teacher.model)
    found.notes += [str(origin)] if origin else []
    found.memory = costs.memory(model, job.teacher.model)
    found.notes += [f"{tower} keeps layers {', '.join(map(str, kept)) or 'none'}" for tower, kept in job.layers.items() if kept]
    folder(chain, step, found, job)
    of = job.teacher
    book(chain, step, found, job, Planned(of.path, job.family, model, of.tokenizer, of.manifest, job.image_settings(model)))


@weigh.register
def _(job: Learning, chain: Chain, step: Step, found: Forecast) -> None:
    look_at_texts(job, chain, step, found)
    training(chain, step, found, job)


@weigh.register
def _(job: Pruning, chain: Chain, step: Step, found: Forecast) -> None:
    counted(job.config, job.scope, found)
    look_at_texts(job, chain, step, found)
    found.structure = "uniform cut: the real structure is learnt"
    result, extra = cut(job.student, uniform_cut(job.scope)), {"dense_kept": job.student.model.config.kept}
    gates = len(job.scope.units) if job.config.method == "l0" else 0
    training(chain, step, found, job, result=result, extra=extra, gates=gates, dense=job.config.keep_dense)


def counted(config: Prune, scope: Scope, found: Forecast) -> None:
    """Note what a budget counts, where it is not the weights, or where the size of the whole model is asked for."""
    if config.budget != scope.cost.budget:
        standing_in = any(target.sparsity for target in scope.targets)
        stands = "multiply-adds stand in for it" if standing_in else "sizes are those of the whole network"
        found.notes.append(f"what layers take is measured when the stage runs, or read from its table; here {stands}")
        return
    cost, to = scope.cost, next((target.to for target in scope.targets), None)
    if cost.budget != "parameters" or to is not None:
        asked = "" if to is None else f", {cost.said(to)} asked"
        found.notes.append(f"{cost.said(cost.now)} before{asked}; {cost.said(cost.rest)} are of what no cut removes")


def look_at_texts(job: Learning, chain: Chain, step: Step, found: Forecast) -> None:
    """Note what the task adds to the student, and what the tokenizer makes of the texts."""
    if found.before and (added := costs.elements(job.student.model) - found.before["parameters"]["total"]):
        found.notes.append(job.task.changes(added))
    job.task.configure(job.config, job.student, job.sources["train"])
    with chain.problems.of(step.name):
        found.notes += job.task.reading(job.config, job.student, job.sources).remarks


@weigh.register
def _(job: Untrained, chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    counted(config, job.scope, found)
    found.structure = "uniform cut: the real structure follows from the weights"
    found.memory = costs.memory(job.pruned.model)
    folder(chain, step, found, job)
    book(chain, step, found, job, cut(job.pruned, uniform_cut(job.scope)))


@weigh.register
def _(job: Recut, chain: Chain, step: Step, found: Forecast) -> None:
    counted(job.config, job.scope, found)
    measured_later = job.config.budget != job.scope.cost.budget
    exact = "multiply-adds stand in for milliseconds" if measured_later else "exact"
    found.structure = exact if job.keep is not None else "uniform cut: the gates are not learnt yet"
    result = cut(job.whole, uniform_cut(job.scope) if job.keep is None else job.keep)
    found.memory = costs.memory(job.whole.model)
    step = step._replace(config=job.config)
    folder(chain, step, found, job)
    sizes: dict[str, Any] = {"trained": job.whole.model, "gates": len(job.scope.units), "dense": job.dense, "recut": True}
    book(chain, step, found, job, result, extra={"dense_kept": dense_kept(job.pruned)}, **sizes)


def cut(loaded: Loaded, keep: torch.Tensor) -> Loaded:
    """`loaded` with the units `keep` (bool [units]), as shapes."""
    with torch.device("meta"):
        return replace(loaded, model=slice_model(loaded.model, keep))


def uniform_cut(scope: Scope) -> torch.Tensor:
    """bool [units]: a structure that meets the budgets of `scope` and keeps about the same part of every layer (ours)."""
    values = torch.ones(len(scope.anatomy.units), dtype=torch.float64, device="cpu")
    active = torch.from_numpy(scope.active)
    for target in scope.targets:
        chosen = torch.from_numpy(scope.active & scope._of(target))
        most = scope.cost.removed(chosen, target.towers)
        values[chosen] = 1 - min(1.0, target.need / most) if most else 1.0
    places = [(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in Groups(scope.units).sizes]
    tilt = torch.cat(places) if places else values[active]  # snapping then takes from all layers in turns, not from one to the end
    return snap(values[active] + 1e-6 * (0.5 - tilt), scope)


@weigh.register
def _(job: Evaluation, chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    loaded, source = job.loaded, job.data["data"]
    found.memory = costs.memory(loaded.model)
    found.schedule = {"images": len(source), "batch_size": config.batch_size}
    if job.able:
        found.notes += job.task.reading_of_measuring(config, loaded, source).remarks
        costs.add(found.memory, activations=job.task.bytes_of_measuring(config, loaded, source))
    result_file(chain, step, found, job)


@weigh.register
def _(job: Timing, chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    found.memory = {"weights": 0}
    networks = 1 + len(PARTS) if config.table else 1  # as if nothing were cut from those that are
    weights = sum(costs.FLOAT * costs.elements(chain.open(spec, step.name).model) for spec in config.models)
    costs.add(found.memory, weights=networks * weights)
    able = [loaded for loaded in job.models if job.task and job.task.able(loaded)]
    if job.task and able:
        costs.add(found.memory, activations=max(job.task.bytes_of_timing(loaded, config) for loaded in able))
    found.schedule = {"models": len(job.models), "rounds": config.rounds + config.warmup_rounds, "batch_sizes": config.batch_sizes}
    result_file(chain, step, found, job)


@weigh.register
def _(job: Embedding, chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    count = job.file.count if job.file else len(job.data["data"])
    found.schedule = {config.side: count, "batch_size": config.batch_size}
    found.memory = costs.memory(job.teacher.model) if job.teacher else {"weights": 0}
    costs.add(found.memory, **storing.memory(job.teacher, config, count, job.width))
    folder(chain, step, found, job)
    if found.status == "up to date":
        chain.outputs[place(config.out)] = None  # it is no network
        return
    found.disk = storing.disk(count, job.width)
    teacher = Look(chain, step.name).digest(config.model) if config.model else None
    form = read_as(job.teacher, config.side, config.max_tokens) if job.teacher and not job.file else ""
    will_be: dict[str, Any] = {"side": config.side, "width": job.width, "count": count, "teacher": teacher, "preprocessing": form}
    chain.stores[place(config.out)] = Foreseen(config.out, origin=origin(job.data["data"]), **will_be)
    with chain.problems.of(step.name):
        chain.disks.add(config.out, found.disk["output"], found.disk["peak"])


@weigh.register
def _(job: Selecting, chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    images, sentences, width = len(job.images.ids), job.pile.about(), job.images.width
    found.schedule = {"images": images, "sentences": sentences, "batch_size": config.batch_size}
    found.memory = {"weights": 0}
    macs = 0
    if job.loaded:
        found.memory, summary = costs.memory(job.loaded.model), chain.summary(job.loaded)
        macs = int((summary["macs"].get("by_tower") or {}).get("text", 0))
    costs.add(found.memory, **selecting.memory(job.rules, images, sentences, width, config.batch_size, job.approximate))
    found.disk = selecting.disk(job.rules, images, sentences, width, job.approximate)
    found.time = selecting.seconds(sentences, images, width, job.approximate, config.probes, macs, config.device)
    found.notes.append(f"{sentences:,} sentences, searched {'approximately' if job.approximate else 'exactly'} among {images:,} images")
    folder(chain, step, found, job)
    if found.status != "up to date":
        chain.piles[place(config.out)] = {"data": config.sentences, "columns": config.columns}
    with chain.problems.of(step.name):
        chain.disks.add(str(found.out), found.disk["output"], found.disk["peak"])
