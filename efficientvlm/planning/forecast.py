"""What each stage would make of the shapes it reads, and what it would cost. One function a stage; the checks are the stages' own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from efficientvlm.checkpoints.folder import check_place, fingerprint
from efficientvlm.compression.anatomy import Groups
from efficientvlm.compression.layers import shrink_model
from efficientvlm.compression.surgery import slice_model
from efficientvlm.data.answer_list import as_input
from efficientvlm.errors import BadInput
from efficientvlm.loaded import shapes
from efficientvlm.planning import costs
from efficientvlm.planning.chain import Blocked, Chain, Look, on_meta
from efficientvlm.planning.checks import importable, path_problems, place
from efficientvlm.planning.parts import Forecast, digest, finish, known, made, measured, summary, training
from efficientvlm.recipe import Step
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.stages import bench, export, import_, import_folder, init, learning, prune, recut, shrink
from efficientvlm.stages.cutting import DENSE, GATES, scope_of
from efficientvlm.stages.learning import Learning, inputs_of
from efficientvlm.tasks.known import TASKS, learnt_by


def forecast(chain: Chain, step: Step) -> Forecast:
    """Plan `step` after all before it; its problems go to `chain.problems`."""
    config: Any = step.config
    found = Forecast(step.name, step.stage, getattr(config, "out", None))
    problems = chain.problems
    before = len(problems.found)
    for error in path_problems(step, set(chain.made)):
        problems.add(step.name, error)
    if found.out and step.stage in FOLDERS:
        with problems.of(step.name):
            check_place(found.out)
    with problems.of(step.name):
        pick_device(getattr(config, "device", "auto"))
    with problems.of(step.name):
        try:
            STAGES[step.stage](chain, step, found)
        except Blocked as blocked:
            found.notes.append(str(blocked))
    if found.out and place(found.out) not in chain.made:
        chain.stale.add(place(found.out))
        chain.made[place(found.out)] = None
    if len(problems.found) > before and found.status != "up to date":
        found.status = "cannot run"
    return found


def plan_init(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    init.check(config)
    source = init.text_source(config)
    key = ("tokenizer", config.family, config.tokenizer, config.data, config.columns, config.vocab_size)
    tokenizer = chain.source(lambda: init.tokenizer_of(config, source), *key)
    family, values = init.blueprint(config, tokenizer.get_vocab())
    inputs = {"vision_from": config.vision_from, "text_from": config.text_from}
    if source is None:
        inputs["tokenizer"] = config.tokenizer
    model = shapes(family, values)
    status = chain.status(step, inputs, {"data": digest(chain, source)} if source is not None else {})
    found.structure, found.memory = "exact", costs.memory(model)
    finish(chain, step, found, made(Path(config.out), family, model, tokenizer), status)


def plan_import(chain: Chain, step: Step, found: Forecast) -> None:
    from efficientvlm import families

    config: Any = step.config
    importable(config.model)
    if import_folder.is_folder(config.model):
        path = import_folder.fetch(config.model, weights=False)
        family, model, tokenizer, _ = import_folder.read(config, path, weights=False)
        found.structure, found.memory = "exact", costs.memory(model)
        status = chain.status(step, import_folder.inputs(config, path), {})
        return finish(chain, step, found, made(Path(config.out), family, model, tokenizer), status)
    tokenizer, values, _, report = import_.read(config, weights=False)
    model = shapes(families.get("xvlm"), values)
    found.structure, found.memory = "exact", costs.memory(model)
    found.notes.append(f"{report.layout} layout, {report.mapped} tensors; values are not looked at before the import")
    status = chain.status(step, {"model": config.model, "tokenizer": config.tokenizer}, {})
    finish(chain, step, found, made(Path(config.out), families.get("xvlm"), model, tokenizer), status)


def plan_shrink(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    teacher, layers = shrink.prepare(config, Look(chain, step.name))
    found.before = summary(chain, teacher)
    with on_meta():
        model = shrink_model(teacher.model, layers)
    found.structure, found.memory = "exact", costs.memory(model, teacher.model)
    found.notes += [f"{tower} keeps layers {', '.join(map(str, kept)) or 'none'}" for tower, kept in layers.items() if kept]
    finish(chain, step, found, replace(teacher, model=model), chain.status(step, {"model": config.model}, {}))


def plan_learning(chain: Chain, step: Step, found: Forecast) -> None:
    job = learnt(chain, step, found)
    training(chain, step, found, job, inputs_of(job.config))


def learnt(chain: Chain, step: Step, found: Forecast) -> Learning:
    """What a stage that trains is about to do."""
    config: Any = step.config
    look = Look(chain, step.name)
    try:
        job = learning.prepare(config, look)
    except Blocked:
        student = chain.attempt(config.model, step.name)
        for split in ("train", "val"):
            with suppress(Blocked):  # what is wrong with the data is said as well
                look.data(config, learnt_by(config).kind, split, student.preprocessing if student else None)
        raise
    found.before = summary(chain, chain.open(config.model, step.name))
    if added := costs.elements(job.student.model) - found.before["parameters"]["total"]:
        found.notes.append(job.task.changes(added))
    job.task.configure(config, job.student, job.sources["train"])
    with chain.problems.of(step.name):
        found.notes += job.task.reading(config, job.student, job.sources).remarks
    return job


def plan_prune(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    if config.from_gates:
        return plan_recut(chain, step, found)
    if config.task == "none":
        return plan_untrained(chain, step, found)
    if config.method != "l0" and find_spec("torch_pruning") is None:
        chain.problems.add(step.name, BadInput("the package torch-pruning is not installed", "", "pip install torch-pruning"))
    with chain.problems.of(step.name):
        prune.check(config)
    job = learnt(chain, step, found)
    student = job.student
    scope = scope_of(config, student.model)
    found.structure = "uniform cut: the real structure is learnt"
    keep = uniform_cut(scope)
    with on_meta():
        model = slice_model(student.model, keep)
    gates = len(scope.units) if config.method == "l0" else 0
    sizes = {"gates": gates, "dense": config.keep_dense}
    training(chain, step, found, job, inputs_of(config), result=replace(student, model=model), **sizes)
    chain.dense[place(config.out)] = student.model


def plan_untrained(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    loaded = chain.open(config.model, step.name)
    found.before = summary(chain, loaded)
    found.structure, found.memory = "uniform cut: the real structure follows from the weights", costs.memory(loaded.model)
    keep = uniform_cut(scope_of(config, loaded.model))
    with on_meta():
        model = slice_model(loaded.model, keep)
    finish(chain, step, found, replace(loaded, model=model), chain.status(step, {"model": config.model}, {}))


def uniform_cut(scope: Any) -> torch.Tensor:
    """bool [units]: a structure that meets the budgets of `scope` and keeps about the same part of every layer (ours)."""
    from efficientvlm.compression.snapping import snap

    values = torch.ones(len(scope.anatomy.units), dtype=torch.float64, device="cpu")
    active = torch.from_numpy(scope.active)
    for target in scope.targets:
        chosen = torch.from_numpy(scope.active & scope._of(target))
        most = scope.anatomy.removed_elements(chosen, target.towers)
        values[chosen] = 1 - min(1.0, target.need / most) if most else 1.0
    places = [(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in Groups(scope.units).sizes]
    tilt = torch.cat(places) if places else values[active]  # snapping then takes from all layers in turns, not from one to the end
    return snap(values[active] + 1e-6 * (0.5 - tilt), scope)


def plan_recut(chain: Chain, step: Step, found: Forecast) -> None:
    pruned = chain.open(step.config.from_gates, step.name)  # type: ignore[attr-defined]
    found.before = summary(chain, pruned)
    config: Any = recut.settled(step.config, pruned.manifest)  # type: ignore[arg-type]
    step = step._replace(config=config)
    recut.check_task(config, pruned)
    inputs = {"model": config.from_gates}
    task = learnt_by(config)
    val = Look(chain, step.name).data(config, task.kind, "val", pruned.preprocessing)
    if place(config.from_gates) in chain.stale:
        source = chain.dense[place(config.from_gates)]
        scope = scope_of(config, source)
        keep, found.structure, dense = uniform_cut(scope), "uniform cut: the gates are not learnt yet", True
    else:
        tensors = recut.read_tensors(pruned, GATES)
        dense = (pruned.path / DENSE).is_file()
        source = shapes(pruned.family, recut.dense_config(pruned)) if dense else pruned.model
        scope, keep = recut.choose(config, replace(pruned, model=source), tensors, dense=dense)
        found.structure = "exact"
    with on_meta():
        model = slice_model(source, keep)
    model.config.answers = pruned.model.config.answers
    found.memory = costs.memory(source)
    status = chain.status(step, inputs, {"data": digest(chain, val)})
    finish(chain, step, found, replace(pruned, model=model), status, trained=source, gates=len(scope.units), dense=dense, recut=True)


def plan_eval(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    loaded = chain.open(config.model, step.name)
    found.before, found.memory = summary(chain, loaded), costs.memory(loaded.model)
    task, side, able = TASKS[config.task], loaded.preprocessing, False
    with chain.problems.of(step.name):
        task.check(config, loaded)
        able = True
    source = Look(chain, step.name).data(config, task.kind, config.split, side)
    found.schedule = {"images": len(source), "batch_size": config.batch_size}
    if able:
        found.notes += task.reading_of_measuring(config, loaded, source).remarks
        costs.add(found.memory, activations=task.bytes_of_measuring(config, loaded, source))
    inputs = {"model": known(chain, config.model), "data": digest(chain, source).removeprefix("sha256:")}
    if getattr(config, "answers", None):
        inputs["answers"] = fingerprint(as_input(config.answers) or "")
    measured(chain, step, found, inputs)


def plan_bench(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    models = [chain.open(spec, step.name) for spec in config.models]
    found.memory = {"weights": sum(costs.FLOAT * costs.elements(loaded.model) for loaded in models)}
    found.memory["total"] = found.memory["weights"]
    task = bench.timed_of(models)
    for loaded in models:
        with chain.problems.of(step.name):
            bench.check_length(loaded, config.text_length)
            if task:
                with on_meta():
                    task.make_able(loaded)
                held = task.bytes_of_timing(loaded, config)
                costs.add(found.memory, activations=max(held, found.memory.get("activations", 0)))
    found.schedule = {"models": len(models), "rounds": config.rounds + config.warmup_rounds, "batch_sizes": config.batch_sizes}
    inputs = {f"models.{number}": known(chain, spec) for number, spec in enumerate(config.models)}
    measured(chain, step, found, {**inputs, "machine": ""})


def plan_report(chain: Chain, step: Step, found: Forecast) -> None:
    if find_spec("matplotlib") is None:
        raise BadInput("the package matplotlib is not installed", "", "pip install matplotlib")
    found.status = "new"


def plan_export(chain: Chain, step: Step, found: Forecast) -> None:
    config: Any = step.config
    loaded = chain.open(config.model, step.name)
    found.before, found.memory = summary(chain, loaded), costs.memory(loaded.model)
    with chain.problems.of(step.name):
        export.check(config)
    with chain.problems.of(step.name):
        export.check_model(config, loaded)
    digests = {}
    if config.data:
        key = (config.data, config.columns, config.val_fraction, config.limit, config.max_bad)
        source = chain.source(lambda: export.open_data(config, loaded), "export", config.split, loaded.preprocessing, *key)
        digests["data"] = digest(chain, source)
    found.status = chain.status(step, {"model": config.model}, digests)


FOLDERS = frozenset({"init", "import", "pretrain", "distill", "shrink", "prune", "finetune", "export"})
STAGES: dict[str, Callable[[Chain, Step, Forecast], None]] = {
    "init": plan_init,
    "import": plan_import,
    "pretrain": plan_learning,
    "distill": plan_learning,
    "shrink": plan_shrink,
    "prune": plan_prune,
    "finetune": plan_learning,
    "eval": plan_eval,
    "bench": plan_bench,
    "export": plan_export,
    "report": plan_report,
}
