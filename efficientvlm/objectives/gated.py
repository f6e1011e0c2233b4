"""Any objective under gates: sampled while they learn, 0/1 once the structure is final."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm.compression.gates import Gates, attach
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.families.base import CROSS_HEAD, HEAD, NEURON
from efficientvlm.settings.methods import Quirks


class Gated(nn.Module):
    """`inner`'s loss under gates, plus the Lagrangian of the budget while they learn (EfficientVLM; L0 after Louizos et al. 2018).

    One module holds model, gates and multipliers, so that under DDP all their gradients are reduced. `keep` [gates] is the final structure;
    while `frozen` is False every step samples one vector of gates from (seed, step), shared by the batch and by all ranks.

    Adds to the losses of `inner`: `lagrangian`. Reference: EfficientVLM section 3 (modal-adaptive pruning), one budget over all towers.
    """

    keep: Tensor
    frozen: Tensor

    def __init__(
        self, inner: Any, gates: Gates, budget: Budget, scope: Scope, *, seed: int, warmup_steps: int, epoch: int, quirks: Quirks
    ) -> None:
        super().__init__()
        self.inner, self.gates, self.budget = inner, gates, budget
        self.seed, self.warmup_steps, self.epoch, self.quirks = seed, max(1, warmup_steps), epoch, quirks
        self.register_buffer("keep", torch.ones(len(scope.units), dtype=torch.bool))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.learning = True  # not `frozen`, known without asking a GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._note())
        self.hooks = attach(inner.model, scope.units)
        self.reads = _released_rows(scope) if quirks.mask_offsets else None

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        moving = self.learning or self.quirks.unfrozen_structure
        if self.learning:
            z = self.gates.draw(self.seed, step)
        elif self.quirks.unfrozen_structure:
            z = self.gates.deterministic_published()
        else:
            z = self.keep.float()
        self.hooks.set(z if self.reads is None else z[self.reads.to(z.device)])
        losses: dict[str, Tensor] = self.inner(batch, step)
        if not moving:
            return losses
        term = self.budget(self.gates.p_open(), self.target(step))
        return {**losses, "loss": losses["loss"] + term, "lagrangian": term}

    def target(self, step: int) -> Tensor:
        """[budgets] sparsity asked for at `step`: linear from 0 over the warm-up, then constant."""
        at = step % self.epoch if self.quirks.epoch_step else step
        return self.budget.target(at, self.warmup_steps)

    @torch.no_grad()
    def freeze(self, keep: Tensor) -> None:
        """Make `keep` [gates] the structure for the rest of the run."""
        self.keep.copy_(keep)
        self.frozen.fill_(True)
        self._note()

    def _note(self) -> None:
        self.learning = not self.frozen

    @torch.no_grad()
    def describe(self, step: int) -> dict[str, float]:
        """Expected and target sparsity for the metrics line."""
        names = [""] if len(self.budget.names) == 1 else [f"_{name}" for name in self.budget.names]
        expected, target = self.budget.expected(self.gates.p_open()).tolist(), self.target(step).tolist()
        line = {f"expected_sparsity{name}": value for name, value in zip(names, expected, strict=True)}
        return line | {f"target_sparsity{name}": value for name, value in zip(names, target, strict=True)}


def _released_rows(scope: Scope) -> Tensor:
    """Index of the gate that the published release applies to each unit in full-stack tasks.

    There text and fusion masks are concatenated, but fusion layers read them from row 0: a fusion layer is governed by rows that belong to
    the text tower, or to an earlier fusion layer, and the last rows govern nothing.
    """
    place = {(unit.group, unit.index): at for at, unit in enumerate(scope.units)}
    layers = {tower: sorted({u.layer for u in scope.units if u.tower == tower}) for tower in ("text", "fusion")}
    fusion_rows = [f"fusion.{layer}.{kind}" for layer in layers["fusion"] for kind in (HEAD, CROSS_HEAD)]
    head_rows = [f"text.{layer}.{HEAD}" for layer in layers["text"]] + fusion_rows
    neuron_rows = [f"{tower}.{layer}.{NEURON}" for tower in ("text", "fusion") for layer in layers[tower]]
    reads = dict(zip(fusion_rows, head_rows, strict=False))
    reads |= dict(zip((f"fusion.{layer}.{NEURON}" for layer in layers["fusion"]), neuron_rows, strict=False))
    return torch.tensor([place.get((reads.get(unit.group, unit.group), unit.index), at) for at, unit in enumerate(scope.units)])
