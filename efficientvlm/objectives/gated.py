"""Any objective under gates: sampled while they learn, 0/1 once the structure is final."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from efficientvlm.compression.pruner import Pruner
from efficientvlm.objectives.objective import Objective
from efficientvlm.training.loop import Optimizer, adamw


class Gated(Objective):
    """`inner`'s loss under the gates of `pruner`, plus the Lagrangian of its budget while they learn.

    Use it around the objective of any task, with a teacher or without, to prune while the task is learnt; a training loop of your own needs
    the `Pruner` alone. One module holds model, gates and multipliers, so that under DDP all their gradients are reduced; every step
    draws one vector of gates, shared by the batch and by all ranks.

    Inputs of `forward`: those of `inner`. Returns the losses of `inner` and, while the gates learn, `lagrangian`, which is part of `loss`.

    Source: Louizos et al. 2018 (hard concrete gates); EfficientVLM, section 3 (modal-adaptive pruning, one budget over all towers).

    Example::

        pruner = Pruner.of(model, sparsity=0.4, steps=600)
        Gated(Generation(model), pruner)(batch, step=0)["loss"].backward()
    """

    def __init__(self, inner: Objective, pruner: Pruner) -> None:
        super().__init__()
        self.inner, self.pruner = inner, pruner

    @property
    def model(self) -> Any:
        """The network under gates."""
        return self.inner.model

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        self.pruner.begin_step(step)
        losses: dict[str, Tensor] = self.inner(batch, step)
        if not self.pruner.moving:
            return losses
        term = self.pruner.penalty(step)
        return {**losses, "loss": losses["loss"] + term, "lagrangian": term}

    def optimizers(self, options: Any, new: Collection[str]) -> list[Optimizer]:
        """Those of `inner`; while gates learn, also those of gates and multipliers, which keep their own rates and are not clipped."""
        if self.pruner.quirks.gates_in_main_optimizer:
            main = [adamw(self.parameters(), options, fast=self.named(new), biases=self.biases())]
        else:
            main = self.inner.optimizers(options, new)
        if not self.pruner.steps:
            return main
        own = self.pruner.optimizers(lr=options.gates.lr, multiplier_lr=options.gates.multiplier_lr)
        return [*main, *(Optimizer(optimizer, scheduled=False, clipped=False) for optimizer in own)]

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)
        self.pruner.end_step(step)

    def describe(self, step: int) -> dict[str, float]:
        return self.inner.describe(step) | self.pruner.describe(step)
