"""prune: learn (or score) which heads and neurons to keep under one budget, train on with the final structure, slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm.checkpoints.folder import Output, require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.latency import LatencyTable
from efficientvlm.compression.pruner import Pruner, rise
from efficientvlm.compression.snapping import snap_scores
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.data.batch import on_device
from efficientvlm.errors import BadInput, number_of
from efficientvlm.loaded import Loaded, load
from efficientvlm.objectives.efficientvlm import released_rows
from efficientvlm.objectives.gated import Gated
from efficientvlm.runtime import ranks
from efficientvlm.runtime.progress import say, telling
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.stages import Prune
from efficientvlm.stages import learning as training
from efficientvlm.stages import recut
from efficientvlm.stages.budgeting import fitting, keep_table, reads, settle
from efficientvlm.stages.common import finished, learning, making, open_output, write
from efficientvlm.stages.cutting import DENSE, GATES, cut_report, save_tensors, say_cut, say_lag, scope_of
from efficientvlm.stages.learning import Learning
from efficientvlm.stages.workspace import Job, Workspace, inputs_of
from efficientvlm.tasks.influence import of_anything, tell


def run(config: Prune, control: Control) -> Manifest:
    """Gates with task loss and KD, structure frozen at `freeze_at` of the steps, then a really smaller checkpoint.

    Without a task the units are only scored and cut. With one the output keeps `gates.safetensors` (L0 only) and `dense.safetensors`
    (weights at the end of the gate phase) for re-cutting.
    """
    if config.from_gates:
        return ranks.on_main(lambda: recut.run(config, control), Manifest.model_validate)
    if config.task == "none":
        return ranks.on_main(lambda: untrained(config, control), Manifest.model_validate)
    job = prepare(config, Workspace(control.quiet))
    assert isinstance(job, Pruning)
    output = open_output(config, "prune", control, inputs_of(job))
    if output.up_to_date:
        return finished(output)
    with making(output):
        run = job.loaded(control.quiet)
        run = run.counted_by(run.table(output, control.quiet))
        student, scope, learnt = run.student, run.scope, config.method == "l0"

        def keep_dense() -> None:
            ranks.on_main(lambda: save_tensors(student.model.state_dict(), output.state_dir / DENSE))

        objective = run.gated(keep_dense if config.keep_dense else lambda: None)
        pruner = objective.pruner
        if not learnt:  # before a state is restored: a resumed run scores the same weights again
            with (
                learning(config, output, run.task.grows),
                telling(f"scoring heads and neurons by {config.method}", quiet=control.quiet),
            ):
                pruner.settle(snap_scores(run.scores(), scope))
        lr, multiplier_lr = pruner.rates(config.gates.lr, config.gates.multiplier_lr)
        if learnt:
            said = f"gates learn in {number_of(pruner.steps, 'step')}, at a rate of {lr:g}, and their multipliers at {multiplier_lr:g}"
            say(f"prune: {said}", quiet=control.quiet)
        spent = run.train(objective, output, control)
        keep = pruner.structure()
        extra = {**cut_report(scope, keep, pruner.gates if learnt else None), "dense_kept": student.model.config.kept}
        extra |= {"gate_rates": {"lr": lr, "multiplier_lr": multiplier_lr}} if learnt else {}
        student.model.cpu()
        student.model = pruner.finish().to(run.hardware.device)
        say_cut(extra, control.quiet)
        if learnt:
            say_lag(extra, control.quiet)

        def finish() -> Manifest:
            keep_table(output)
            if learnt:
                save_tensors(pruner.gates.to_tensors(), output.staging / GATES)
            if config.keep_dense:
                save_tensors(load_file(output.state_dir / DENSE), output.staging / DENSE)
            return run.finish(output, control, spent, extra=extra)

        return ranks.on_main(finish, Manifest.model_validate)


def prepare(config: Prune, workspace: Workspace) -> Job:
    """What a pruning run is about to do; nothing is written, and networks are shapes.

    Raises:
        BadInput: checkpoints, data or settings that cannot be used together.
        TargetMissed: the sparsity cannot be reached.
    """
    if config.from_gates:
        return recut.prepare(config, workspace)
    if config.task == "none":
        loaded = workspace.checkpoint(config.model)
        return Untrained(
            loaded, scope_of(config, loaded.model, fitting(config, loaded, workspace)), inputs={"model": config.model, **reads(config)}
        )
    workspace.check(problems(config))
    job = training.prepare(config, workspace)
    fields = {**vars(job), "inputs": job.inputs | reads(config)}
    pruning = Pruning(**fields, scope=scope_of(config, job.student.model, fitting(config, job.student, workspace)))
    workspace.check(pruning.problems())
    return pruning


def problems(config: Prune) -> Iterator[BadInput]:
    """Settings of a pruning run that do not belong together, or a package that is missing."""
    if config.method != "l0" and find_spec("torch_pruning") is None:
        yield BadInput("the package torch-pruning is not installed", "", "pip install torch-pruning")
    if config.parallel == "fsdp":
        yield BadInput("prune cannot run with parallel=fsdp", "gates cut whole weights", "use parallel=ddp")
    if config.quirks.unfrozen_structure and not config.allow_blind:
        why = "a structure that moves to the end may cut an input off from the output"
        yield BadInput("quirks.unfrozen_structure", why, "leave it out, or add --allow-blind")


@dataclass(frozen=True)
class Pruning(Learning):
    """One run on a task, at whose end the units of `scope` that its gates close are gone."""

    config: Prune
    scope: Scope = field(kw_only=True)

    def problems(self) -> Iterator[BadInput]:
        """Settings that say nothing about this network."""
        rows = self.released
        if rows is not None and torch.equal(rows, torch.arange(len(rows))):
            why = "of this network no gates of a fusion tower stand behind those of a text tower, whose rows the release reads"
            yield BadInput("quirks.mask_offsets changes nothing here", why, "leave it out")

    @property
    def released(self) -> Tensor | None:
        """The gate that each unit reads where the release's offsets are asked for."""
        return released_rows(self.scope) if getattr(self.config.quirks, "mask_offsets", False) else None

    def table(self, output: Output, quiet: bool) -> LatencyTable | None:
        """The latency table that this run counts by, with weights loaded; None where something else is counted."""
        if self.config.budget != "latency":
            return None
        self.task.configure(self.config, self.student, self.sources["train"])
        found = ranks.on_main(lambda: settle(self.config, self.student, output, quiet), LatencyTable.model_validate)
        return found

    def counted_by(self, table: LatencyTable | None) -> Self:
        """The same by `table`; :class:`TargetMissed` where its budget cannot be reached."""
        return self if table is None else replace(self, scope=scope_of(self.config, self.student.model, table))

    def gated(self, settled: Callable[[], None] = lambda: None) -> Gated:
        """The task's objective under fresh gates; `settled` is called once the structure is final."""
        config, inner = self.config, self.objective()
        gates = Gates(self.scope.units, seed=config.seed, **settings_of(config.gates, "head_init", "neuron_init", "init_std"))
        steps = max(1, round(config.freeze_at * self.steps)) if config.method == "l0" else 0
        common: dict[str, Any] = {"seed": config.seed, "quirks": config.quirks, "reads": self.released, "settled": settled}
        common |= rise(steps, config.sparsity_hold, config.sparsity_warmup)
        return Gated(inner, Pruner(inner.model, self.scope, gates, steps=steps, epoch=self.plan.batches_per_epoch, **common))

    def trial(self) -> Gated:
        objective = self.gated()
        if self.config.method != "l0":  # any structure will do
            objective.pruner.settle(torch.ones(len(self.scope.active), dtype=torch.bool))
        return objective

    def scores(self) -> Tensor:
        """Importance of every unit; Taylor's gradients are of the task loss over the first `calibration_batches` batches, or of what the
        teacher says where the task has none."""
        from efficientvlm.compression.importance import importance_scores  # Torch-Pruning takes seconds to import

        config, model = self.config, self.student.model
        assert config.method != "l0"
        if config.method == "taylor":
            model.eval()
            task = self.objective(distil=not self.task.own_losses)
            device = next(model.parameters()).device
            for step in range(config.calibration_batches):
                for batch in self.feed(step):
                    losses = task(on_device(batch, device), step)
                    (losses["loss"] / config.calibration_batches).backward()
            ranks.average_gradients(model.parameters())
        values = importance_scores(config.method, model, self.scope.units, seed=config.seed)
        model.zero_grad(set_to_none=True)
        return values


@dataclass(frozen=True)
class Untrained(Job):
    """A cut by the weights alone of a network, here as shapes."""

    pruned: Loaded
    scope: Scope


def untrained(config: Prune, control: Control) -> Manifest:
    """Remove the units that `config.method` scores lowest until the budget is met, without data and without training.

    Raises:
        TargetMissed: the sparsity cannot be reached.
    """
    job = prepare(config, Workspace(control.quiet))
    assert isinstance(job, Untrained)
    output = open_output(config, "prune", control, inputs_of(job))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        from efficientvlm.compression.importance import importance_scores  # Torch-Pruning takes seconds to import

        assert config.method != "l0"
        loaded, scope = load(config.model), job.scope
        model = loaded.model
        if config.budget == "latency":
            scope = scope_of(config, model, settle(config, loaded, output, control.quiet))
            keep_table(output)
        keep = snap_scores(importance_scores(config.method, model, scope.units, seed=config.seed), scope)
        extra = {**cut_report(scope, keep, None), "dense_kept": model.config.kept}
        say_cut(extra, control.quiet)
        loaded.model = slice_model(model, keep)
        extra["influence"] = of_anything(loaded)
        tell("prune", extra["influence"], control.quiet)
        common: dict[str, Any] = {"control": control, "image_processor": loaded.image_processor, "extra": extra}
        return write(output, loaded.family, loaded.model, loaded.tokenizer, **common)
