"""prune --from-gates: another sparsity from gates that were learnt before, in seconds and without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.accounting import count_sparsity
from efficientvlm.compression.budgets import cost_of
from efficientvlm.compression.gates import PREFIX, Gates
from efficientvlm.compression.latency import LatencyTable
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.structure import kept_indices
from efficientvlm.families.weights import require_finite
from efficientvlm.loaded import Loaded, keep_length, load, shapes
from efficientvlm.settings.base import Strict
from efficientvlm.settings.compose import stage_settings, tasks_of
from efficientvlm.settings.methods import METHODS
from efficientvlm.settings.stages import Prune
from efficientvlm.stages.budgeting import fitting, keep_table, reads, settle
from efficientvlm.stages.common import making, observed, open_output, validated, write
from efficientvlm.stages.cutting import DENSE, GATES, cut_report, save_tensors, say_cut, scope_of
from efficientvlm.stages.workspace import Job, Workspace, inputs_of
from efficientvlm.tasks.known import TASKS, learnt_by
from efficientvlm.tasks.task import Learnt

LIMITS = ("kinds", "towers", "min_heads", "min_neurons", "round_to")
"""What may be removed in the first cut, and so in another one."""


@dataclass(frozen=True)
class Recut(Job):
    """Another cut of `pruned`, as `config` says with what that run says besides.

    `whole` is what is cut, as shapes: with `dense` the network before slicing. `keep` (bool [units]) is None where the gates are not
    learnt yet.
    """

    config: Prune
    task: Learnt
    pruned: Loaded
    whole: Loaded
    dense: bool
    scope: Scope
    keep: Tensor | None


def prepare(config: Prune, workspace: Workspace) -> Recut:
    """What a re-cut is about to do; nothing is written, and networks are shapes.

    Raises:
        BadInput: no gates in the folder, another task than theirs, texts longer than it reads, or a lower sparsity than it has without the
            dense weights.
        TargetMissed: the sparsity cannot be reached.
    """
    start = str(config.from_gates)
    pruned, learnt = workspace.checkpoint(start), workspace.is_made(start)
    if GATES not in pruned.manifest.files:
        raise lacking(pruned, GATES)
    tensors = read_tensors(pruned, GATES) if learnt else {}
    config = settled(config, pruned.manifest)
    if (own := pruned.manifest.config.get("tower_sparsity")) and not config.tower_sparsity:
        towers = ", ".join(f"{tower} {value:g}" for tower, value in own.items())
        workspace.note(f"the budgets of single towers ({towers}) were those of that run alone: here one holds over all towers")
    task = learnt_by(config)
    check_task(config, pruned)
    keep_length(pruned, config.max_tokens)
    source = workspace.data(config, task.kind, "val", pruned.preprocessing)
    beside = {role: workspace.data(other.config, other.kind, "train", None) for role, other in task.beside(config).items()}
    teacher = config.teacher if not task.own_losses and config.eval_limit != 0 else None
    if teacher:
        workspace.check(task.teacher_problems(config, workspace.checkpoint(teacher)))
    dense = DENSE in pruned.manifest.files
    table = fitting(config, pruned, workspace)
    if not dense:
        check_sparsity(config, pruned, table, learnt=learnt)
    whole = replace(pruned, model=shapes(pruned.family, dense_config(pruned))) if dense else pruned
    scope, keep = choose(config, whole, tensors, table, dense=dense) if learnt else (scope_of(config, whole.model, table), None)
    stores = task.files(config) if not task.own_losses and config.eval_limit != 0 and not teacher else {}
    inputs = {"model": start, "teacher": teacher, **stores, **reads(config)}
    read: dict[str, Any] = {"inputs": inputs, "data": {"data": source, **beside}}
    return Recut(config, task, pruned, whole, dense, scope, keep, **read)


def run(config: Prune, control: Control) -> Manifest:
    """Snap the stored gates to `config.sparsity` and slice the weights from the end of the gate phase.

    Without those weights (`keep_dense=false`) the pruned model itself is cut further, so the sparsity can only rise.

    Raises:
        BadInput, TargetMissed: as :func:`prepare`.
    """
    job = prepare(config, Workspace(control.quiet))
    config, task, pruned, scope, keep = job.config, job.task, job.pruned, job.scope, job.keep
    sources = {"val" if role == "data" else role: source for role, source in job.data.items()}
    assert keep is not None
    output = open_output(config, "prune", control, inputs_of(job))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        gates = read_tensors(pruned, GATES)
        pruned.model = dense_model(pruned) if job.dense else load(str(config.from_gates)).model
        if config.budget == "latency":
            table = settle(config, pruned, output, control.quiet)
            keep_table(output)
            if not job.dense:
                check_sparsity(config, pruned, table, learnt=True)
            scope, keep = choose(config, pruned, gates, table, dense=job.dense)
        extra: dict[str, Any] = {**cut_report(scope, keep, None), "dense_kept": dense_kept(pruned)}
        say_cut(extra, control.quiet)
        if job.dense:
            save_tensors(pruned.model.state_dict(), output.staging / DENSE)
        save_tensors(load_file(pruned.path / GATES), output.staging / GATES)
        pruned.model = slice_model(pruned.model, keep)
        keep_length(pruned, config.max_tokens)
        teacher = load(spec) if (spec := job.inputs["teacher"]) else None
        val = validated(config, lambda: task.validate_on(config, pruned, teacher, sources, control.quiet), control.quiet)
        extra["influence"] = observed("prune", config, lambda: task.influence(config, pruned, sources["val"]), control.quiet)
        return write(
            output,
            pruned.family,
            pruned.model,
            pruned.tokenizer,
            control=control,
            image_processor=pruned.image_processor,
            sources=sources,
            metrics={"val": val},
            extra=extra,
        )


def settled(config: Prune, earlier: Manifest) -> Prune:
    """`config` with what it leaves out of model, task, data and limits taken from the run that is cut again, whose manifest is `earlier`.

    So are the settings that only the task has: it may measure by them; and the teacher, or what stands for it, where it measures by that.

    Raises:
        BadInput: it names another model, or its settings do not belong to that task.
    """
    start = str(config.from_gates)
    if config.model not in ("", start) and resolve(config.model).resolve() != resolve(start).resolve():
        raise BadInput("model and from_gates differ", "a re-cut starts from the run the gates are of", "leave the model out")
    given = {name: getattr(config, name) for name in config.model_fields_set}
    given = {name: value.model_dump(exclude_unset=True) if isinstance(value, Strict) else value for name, value in given.items()}
    of_the_data = () if config.data else ("data", "columns", "val", "val_fraction", "limit")
    inherited = ("task", "budget", "text_length", "requests", *of_the_data)
    known = {name: earlier.config[name] for name in inherited if earlier.config.get(name) and not given.get(name)}
    known |= {name: earlier.config[name] for name in LIMITS if earlier.config.get(name) is not None and name not in given}
    if requests := given.get("requests"):  # those that are not given stay
        given["requests"] = {**earlier.config.get("requests", {}), **requests}
    if own := tasks_of("prune").get(given.get("task") or known.get("task", "")):
        names = {"quirks", *own.model_fields} - (Prune.model_fields.keys() - {"quirks"})
        known |= {name: earlier.config[name] for name in names if name in earlier.config and name not in given}
    task = TASKS.get(str(given.get("task") or known.get("task")))
    if isinstance(task, Learnt) and not task.own_losses:
        method = METHODS.get(str(earlier.config.get("distillation")), {}).get(task.name, Prune)
        told = {"teacher", "distillation"} | (method.model_fields.keys() - Prune.model_fields.keys())
        known |= {name: earlier.config[name] for name in told if earlier.config.get(name) and name not in given}
    whole: Prune = stage_settings("prune", {**given, **known, "model": start}, f"the re-cut of {start}")
    return whole


def check_task(config: Prune, pruned: Loaded) -> None:
    """:class:`BadInput` for gates that were learnt on another task than `config` measures, or where no data are known to measure on."""
    if not TASKS[config.task].able(pruned):
        does = " and ".join(name for name, task in TASKS.items() if task.final and task.able(pruned)) or "no task"
        raise BadInput(f"{pruned.path} is not of task {config.task}", f"it was pruned for {does}", "give --task as that run did")
    if not config.data:
        raise BadInput(f"no data to measure the re-cut of {pruned.path} on", "the run it is cut from names none", "give --data")


def check_sparsity(config: Prune, pruned: Loaded, table: LatencyTable | None, *, learnt: bool) -> None:
    """:class:`BadInput` for less than is gone of `pruned`, or where its gates are not `learnt` yet than will be gone at least.

    By a latency budget that is not known before there is a `table`.
    """
    if config.budget == "latency" and table is None:
        return
    if config.to is not None:  # what the network costs now is known from its shapes
        return
    gone: float | None
    if learnt and config.budget != "parameters":
        cost = cost_of(pruned.model, config.budget, text_length=config.text_length, table=table, round_to=config.round_to)
        gone = 1 - sum(cost.totals.values()) / max(sum(cost.whole.values()), 1)
    elif learnt:
        gone = (pruned.manifest.accounting.get("sparsity") or {}).get("achieved")
    else:
        asked, own = (pruned.manifest.config[name] for name in ("sparsity", "tower_sparsity"))
        if any(pruned.manifest.config.get(name, usual) != usual for name, usual in (("to", None), ("budget", config.budget))):
            return  # how much will be gone by this budget is not known before
        whole = {tower: part["initial"] for tower, part in count_sparsity(pruned.model)["by_tower"].items()}
        gone = round(sum(size * own.get(tower, asked) for tower, size in whole.items()) / sum(whole.values()), 9)
    if gone is None:
        raise BadInput(f"{pruned.path} does not say how much of it was removed", "its manifest holds no sparsity", "prune again")
    if config.sparsity < gone:
        raise BadInput(
            f"sparsity {config.sparsity} is below the {gone:.4f} of {pruned.path}",
            "the weights that were removed were not kept (keep_dense=false)",
            "ask for more, or prune again with dense weights kept",
        )


def choose(config: Prune, pruned: Loaded, tensors: dict[str, Tensor], table: LatencyTable | None, *, dense: bool) -> tuple[Scope, Tensor]:
    """The budget of `config`, and the units that stay (bool [units]) by the gates in `tensors`.

    Args:
        pruned: the run that is cut again; with `dense` its model is the one before slicing. The values of its weights do not matter.
        table: what a latency budget counts by; see :func:`scope_of`.

    Raises:
        BadInput: no gates for what `config` allows to be removed.
    """
    if not dense:
        kept = pruned.model.config.kept_indices()
        gated = dense_config(pruned).kept_indices()
        for name in list(tensors):
            group = name.removeprefix(PREFIX)
            rows = [gated[group].index(index) for index in kept[group]]
            tensors[name] = tensors[name][rows]
        tensors = {name: rows for name, rows in tensors.items() if len(rows)}
    learnt = {name.removeprefix(PREFIX) for name in tensors}
    scope = scope_of(config, pruned.model, table)
    gates = Gates.from_tensors([unit for unit in scope.anatomy.units if unit.group in learnt], tensors)
    by_unit = {
        (unit.group, unit.index): p for unit, p in zip((u for u in scope.anatomy.units if u.group in learnt), gates.p_open(), strict=True)
    }
    if missing := sorted({unit.group for unit in scope.units} - learnt):
        raise BadInput(f"{pruned.path} has no gates for {', '.join(missing[:5])}", "", "leave their kinds or towers out")
    probabilities = torch.stack([by_unit[unit.group, unit.index] for unit in scope.units]).detach()
    return scope, snap(probabilities, scope)


def dense_kept(pruned: Loaded) -> dict[str, str] | None:
    """What was kept before this prune, as in a configuration."""
    kept: dict[str, str] | None = pruned.manifest.noted("dense_kept", dict[str, str] | None, None)
    return kept


def dense_config(pruned: Loaded) -> Any:
    """The configuration the gates were learnt on: what was kept before this prune."""
    config = pruned.model.config
    return config.with_kept(kept_indices(config.original_counts(), dense_kept(pruned)))


def dense_model(pruned: Loaded) -> Any:
    """The network as it was at the end of the gate phase, before slicing."""
    model = pruned.family.build(dense_config(pruned)).eval()
    try:
        model.load_state_dict(read_tensors(pruned, DENSE))
    except RuntimeError as error:
        raise BadInput(f"{pruned.path / DENSE} does not fit", str(error).splitlines()[0], "check the folder with `evlm verify`") from None
    return model


def lacking(pruned: Loaded, name: str) -> BadInput:
    return BadInput(f"{pruned.path} has no {name}", "it was not written by prune with --method l0", "give the folder of such a run")


def read_tensors(pruned: Loaded, name: str) -> dict[str, Tensor]:
    """A safetensors file of the folder; :class:`BadInput` if it is missing, damaged or not finite."""
    path = pruned.path / name
    if not path.is_file():
        raise lacking(pruned, name)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"cannot read {path}", str(error).splitlines()[0], "check the folder with `evlm verify`") from None
    require_finite(tensors, path)
    return tensors
