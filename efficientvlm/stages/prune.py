"""prune: learn (or score) which heads and neurons to keep under one budget, train on with the final structure, slice."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm import ranks
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.snapping import snap, snap_scores
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.manifest import Manifest
from efficientvlm.objectives.gated import Gated
from efficientvlm.progress import telling
from efficientvlm.settings.stages import Prune
from efficientvlm.stages import recut, untrained
from efficientvlm.stages.common import finished, learning, making, open_output, settings_of
from efficientvlm.stages.cutting import DENSE, GATES, cut_report, save_tensors, say_cut, scope_of
from efficientvlm.stages.tuning import Tuning
from efficientvlm.training import Optimizer, adamw


def run(config: Prune, control: Control) -> Manifest:
    """Gates with task loss and KD, structure frozen at `freeze_at` of the steps, then a really smaller checkpoint.

    Without a task the units are only scored and cut. With one the output keeps `gates.safetensors` (L0 only) and `dense.safetensors`
    (weights at the end of the gate phase) for re-cutting.
    """
    if config.from_gates:
        return ranks.on_main(lambda: recut.run(config, control), Manifest.model_validate)
    if config.task == "none":
        return ranks.on_main(lambda: untrained.run(config, control), Manifest.model_validate)
    check(config)
    tuning = Tuning.open(config, quiet=control.quiet)
    student = tuning.student
    scope = scope_of(config, student.family, student.model)
    output = open_output(config, "prune", control, tuning.inputs)
    if output.up_to_date:
        return finished(output)
    with making(output):
        learnt, freeze = config.method == "l0", gate_steps(config, tuning.steps)
        objective = gated(config, tuning, scope)
        gates, active = objective.gates, torch.from_numpy(scope.active)

        def settle(keep: Tensor) -> None:
            objective.freeze(keep[active])
            if config.keep_dense:
                ranks.on_main(lambda: save_tensors(student.model.state_dict(), output.state_dir / DENSE))

        def after_step(step: int) -> None:
            gates.clamp_()
            if step + 1 == freeze:
                settle(snap(gates.p_open().detach().cpu(), scope))

        if not learnt:  # before a state is restored: a resumed run scores the same weights again
            with learning(config, output), telling(f"scoring heads and neurons by {config.method}", quiet=control.quiet):
                settle(snap_scores(scores(config, tuning, scope), scope))
        hooks: dict[str, Any] = {"after_step": after_step, "describe": objective.describe} if learnt else {}
        spent = tuning.train(objective, optimizers(config, objective, tuning.new), output, control, **hooks)

        keep = torch.ones(len(scope.active), dtype=torch.bool)
        keep[active] = objective.keep.cpu()
        if config.quirks.unfrozen_structure and learnt:
            keep[active] = gates.deterministic_published().cpu().bool()
        objective.hooks.remove()
        extra = {**cut_report(scope, keep, gates if learnt else None), "dense_kept": student.model.config.kept}
        student.model = slice_model(student.family, student.model.cpu(), keep).to(tuning.hardware.device)
        say_cut(extra, control.quiet)

        def finish() -> Manifest:
            if learnt:
                save_tensors(gates.to_tensors(), output.staging / GATES)
            if config.keep_dense:
                save_tensors(load_file(output.state_dir / DENSE), output.staging / DENSE)
            return tuning.finish(output, control, spent, extra=extra)

        return ranks.on_main(finish, Manifest.model_validate)


def check(config: Prune) -> None:
    """:class:`BadInput` for settings of a pruning run that do not belong together."""
    if config.parallel == "fsdp":
        raise BadInput("prune cannot run with parallel=fsdp", "gates cut whole weights", "use parallel=ddp")


def gate_steps(config: Prune, steps: int) -> int:
    """Steps of the gate phase, out of `steps`."""
    return max(1, round(config.freeze_at * steps)) if config.method == "l0" else 0


def gated(config: Prune, tuning: Tuning, scope: Scope) -> Gated:
    """The task's objective under fresh gates on the units of `scope`."""
    inner = tuning.objective()
    gates = Gates(scope.units, seed=config.seed, **settings_of(config.gates, "head_init", "neuron_init", "init_std"))
    warmup = round(config.sparsity_warmup * gate_steps(config, tuning.steps))
    schedule = {"warmup_steps": warmup, "epoch": tuning.plan.batches_per_epoch}
    return Gated(inner, gates, Budget(scope), scope, seed=config.seed, quirks=config.quirks, **schedule)


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


def scores(config: Prune, tuning: Tuning, scope: Scope) -> Tensor:
    """Importance of every unit of `scope`; Taylor's gradients are of the task loss over the first `calibration_batches` batches."""
    from efficientvlm.compression.importance import importance_scores  # Torch-Pruning takes seconds to import

    assert config.method != "l0"
    model = tuning.student.model
    if config.method == "taylor":
        model.eval()
        task = tuning.objective(distil=False)
        device = next(model.parameters()).device
        for step in range(config.calibration_batches):
            for batch in tuning.feed(step):
                losses = task({name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}, step)
                (losses["loss"] / config.calibration_batches).backward()
        ranks.average_gradients(model.parameters())
    values = importance_scores(config.method, model, scope.units, seed=config.seed)
    model.zero_grad(set_to_none=True)
    return values
