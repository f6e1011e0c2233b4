"""prune: learn (or score) which heads and neurons to keep under one budget, train on with the final structure, slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficientvlm.checkpoint import require_complete
from efficientvlm.compression.accounting import count_sparsity
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.snapping import snap, snap_scores
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.config import Prune
from efficientvlm.control import Control
from efficientvlm.data.collate import Texts
from efficientvlm.data.plan import IndexPlan
from efficientvlm.manifest import Manifest
from efficientvlm.objectives.gated import Gated
from efficientvlm.objectives.task import VQA
from efficientvlm.progress import say
from efficientvlm.stages.answering import Answerer, answer_list, evaluate_on, load_for_task, open_task, task_feed
from efficientvlm.stages.common import making, open_output, settings_of, write
from efficientvlm.training import Optimizer, accelerator, adamw, train

DENSE, GATES = "dense.safetensors", "gates.safetensors"


def scope_of(config: Any, family: Any, model: Any) -> Scope:
    """What `config` allows to be pruned of `model`, checked to be reachable.

    Raises:
        TargetMissed: floors, kinds or towers make the sparsity unreachable.
    """
    whole = {tower: part["initial"] for tower, part in count_sparsity(family, model)["by_tower"].items()}
    limits = settings_of(config, "kinds", "towers", "tower_sparsity", "min_heads", "min_neurons", "round_to")
    scope = Scope.of(Anatomy.of(family, model), config.sparsity, whole=whole, **limits)
    scope.check_feasible()
    return scope


def run(config: Prune, control: Control) -> Manifest:
    """Gates with task loss and KD, structure frozen at `freeze_at` of the steps, then a really smaller checkpoint.

    The output keeps `gates.safetensors` (L0 only) and `dense.safetensors` (weights at the end of the gate phase) for re-cutting.
    """
    if config.from_gates:
        from efficientvlm.stages.recut import run as recut

        return recut(config, control)
    student, teacher, new = load_for_task(config)
    sources = {split: open_task(config, split, student.model.config.image_size) for split in ("train", "val")}
    scope = scope_of(config, student.family, student.model)
    inputs = {"model": config.model, "teacher": config.teacher, "data": f"sha256:{sources['train'].fingerprint}"}
    output = open_output(config, "prune", control, inputs)
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        hardware = accelerator(config.device)
        torch.manual_seed(config.seed)
        texts = Texts(student.tokenizer, config.max_tokens)
        student.model.config.answers, student.model.config.rank_top = answer_list(config, sources["train"]), config.rank_top
        plan = IndexPlan(len(sources["train"]), config.batch_size, config.seed, hardware.num_processes, hardware.process_index)
        steps = config.max_steps or max(1, round(config.epochs * plan.batches_per_epoch))
        freeze = max(1, round(config.freeze_at * steps)) if config.method == "l0" else 0

        tutor = teacher.model.to(hardware.device) if teacher else None
        kd = settings_of(config, "kd", "weights", "quirks", "temperature")
        inner = VQA(student.family, student.model, tutor, **kd, scale=config.scale_by_temperature)
        start = settings_of(config.gates, "head_init", "neuron_init", "init_std")
        gates, budget = Gates(scope.units, seed=config.seed, **start), Budget(scope)
        objective = Gated(
            inner,
            gates,
            budget,
            scope,
            seed=config.seed,
            warmup_steps=round(config.sparsity_warmup * freeze),
            epoch=plan.batches_per_epoch,
            quirks=config.quirks,
        )
        feed = task_feed(config, sources["train"], texts, plan)
        active = torch.from_numpy(scope.active)

        def settle(keep: Tensor) -> None:
            objective.freeze(keep[active])
            if config.keep_dense:
                save_tensors(student.model.state_dict(), output.state_dir / DENSE)

        def after_step(step: int) -> None:
            gates.clamp_()
            if step + 1 == freeze:
                settle(snap(gates.p_open().detach().cpu(), scope))

        if config.method != "l0":  # before a state is restored: a resumed run scores the same weights again
            from efficientvlm.compression.importance import importance_scores  # Torch-Pruning takes seconds to import

            if config.method == "taylor":
                accumulate_gradients(config, inner, feed)
            settle(snap_scores(importance_scores(config.method, student.model, scope.units, seed=config.seed), scope))
            student.model.zero_grad(set_to_none=True)
        spent = train(
            objective,
            feed,
            optimizers(config, objective, new),
            steps=steps,
            options=config,
            output=output,
            hardware=hardware,
            title="prune",
            quiet=control.quiet,
            after_step=after_step,
            describe=objective.describe if config.method == "l0" else lambda step: {},
        )
        keep = torch.ones(len(scope.active), dtype=torch.bool)
        keep[active] = objective.keep.cpu()
        if config.quirks.unfrozen_structure and config.method == "l0":
            keep[active] = gates.deterministic_published().cpu().bool()
        objective.hooks.remove()
        extra: dict[str, Any] = {
            "budget": budget_report(scope, keep, gates if config.method == "l0" else None),
            "dense_kept": student.model.config.kept,
        }
        student.model = slice_model(student.family, student.model.cpu(), keep)
        for name, part in extra["budget"].items():
            values = ", ".join(f"{key} {value:.4f}" for key, value in part.items())
            say(f"prune: sparsity of {name}: {values}", quiet=control.quiet)
        if config.method == "l0":
            save_tensors(gates.to_tensors(), output.staging / GATES)
        if config.keep_dense:
            save_tensors(load_file(output.state_dir / DENSE), output.staging / DENSE)
        answer = Answerer(student, twice=config.quirks.first_token_twice)
        val = evaluate_on(answer, sources["val"], limit=config.eval_limit, title="validate", quiet=control.quiet)
        metrics = {"train": spent.last, "val": val}
        return write(
            output,
            student.family,
            student.model,
            student.tokenizer,
            control=control,
            spent=spent,
            sources=sources,
            metrics=metrics,
            extra=extra,
        )


def optimizers(config: Prune, objective: Gated, new: list[str]) -> list[Optimizer]:
    """AdamW on the weights; constant-rate AdamW on log α; the same, ascending, on the multipliers (EfficientVLM)."""
    skip = () if config.quirks.gates_in_main_optimizer else ("gates.", "budget.")
    main = adamw(objective, config, new=new, skip=skip)
    if config.method != "l0":
        return [main]
    rates: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0}
    alpha = torch.optim.AdamW(objective.gates.parameters(), lr=config.gates.lr, **rates)
    multipliers = torch.optim.AdamW(objective.budget.parameters(), lr=config.gates.multiplier_lr, maximize=True, **rates)
    return [main, Optimizer(alpha, scheduled=False, clipped=False), Optimizer(multipliers, scheduled=False, clipped=False)]


def accumulate_gradients(config: Prune, inner: VQA, feed: Any) -> None:
    """Gradients of the task loss over the first `calibration_batches` batches, for the Taylor criterion."""
    model = inner.model.eval()
    device = next(model.parameters()).device
    for step in range(config.calibration_batches):
        for batch in feed(step):
            losses = inner({name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}, step)
            (losses["task"] / config.calibration_batches).backward()


def budget_report(scope: Scope, keep: Tensor, gates: Gates | None) -> dict[str, dict[str, float]]:
    """Target, expected (of the gates, L0 only) and achieved sparsity of every budget."""
    report = {target.name: {"target": target.sparsity, "achieved": scope.achieved(keep)[target.name]} for target in scope.targets}
    if gates is not None:
        expected = Budget(scope).expected(gates.p_open().detach().cpu()).tolist()
        for name, value in zip(report, expected, strict=True):
            report[name]["expected"] = value
    return report


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(path)
