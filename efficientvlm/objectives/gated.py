"""Any objective under gates: sampled while they learn, 0/1 once the structure is final."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from efficientvlm.compression.gates import Gates, attach
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.objectives.objective import Objective
from efficientvlm.settings.methods import GateQuirks
from efficientvlm.training import Optimizer, adamw


class Gated(Objective):
    """`inner`'s loss under gates, plus the Lagrangian of the budget while they learn (EfficientVLM; L0 after Louizos et al. 2018).

    One module holds model, gates and multipliers, so that under DDP all their gradients are reduced. `keep` [gates] is the final structure;
    while `frozen` is False every step samples one vector of gates from (seed, step), shared by the batch and by all ranks. After
    `gate_steps` steps it is snapped from the gates; with none the structure comes from elsewhere, by :meth:`settle`. `settled` is called
    then, while the weights are still whole. `reads` [gates] is the gate that each unit is multiplied by, its own by default.

    Adds to the losses of `inner`: `lagrangian`. Reference: EfficientVLM section 3 (modal-adaptive pruning), one budget over all towers.
    """

    keep: Tensor
    frozen: Tensor

    def __init__(
        self,
        inner: Objective,
        gates: Gates,
        budget: Budget,
        scope: Scope,
        *,
        seed: int,
        gate_steps: int,
        warmup_steps: int,
        epoch: int,
        quirks: GateQuirks,
        reads: Tensor | None = None,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.inner, self.gates, self.budget, self.scope, self.settled = inner, gates, budget, scope, settled
        self.seed, self.gate_steps, self.warmup_steps, self.epoch, self.quirks = seed, gate_steps, max(1, warmup_steps), epoch, quirks
        self.register_buffer("keep", torch.ones(len(scope.units), dtype=torch.bool))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.learning = True  # not `frozen`, known without asking a GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._note())
        self.hooks = attach(inner.model, scope.units)
        self.reads = reads

    @property
    def model(self) -> Any:
        """The network under gates."""
        return self.inner.model

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

    def optimizers(self, options: Any, new: Collection[str]) -> list[Optimizer]:
        """Those of `inner`; while gates learn, AdamW of constant rate on log α, and an ascending one on the multipliers (EfficientVLM)."""
        if self.quirks.gates_in_main_optimizer:
            main = [adamw(self.parameters(), options, fast=self.named(new))]
        else:
            main = self.inner.optimizers(options, new)
        if not self.gate_steps:
            return main
        rates: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0}
        alpha = torch.optim.AdamW(self.gates.parameters(), lr=options.gates.lr, **rates)
        multipliers = torch.optim.AdamW(self.budget.parameters(), lr=options.gates.multiplier_lr, maximize=True, **rates)
        return [*main, Optimizer(alpha, scheduled=False, clipped=False), Optimizer(multipliers, scheduled=False, clipped=False)]

    def after_step(self, step: int) -> None:
        """Gates stay where they can still move; after the last step of the gate phase the structure is final."""
        self.inner.after_step(step)
        if self.gate_steps:
            self.gates.clamp_()
        if step + 1 == self.gate_steps:
            self.settle(snap(self.gates.p_open().detach().cpu(), self.scope))

    def settle(self, keep: Tensor) -> None:
        """Make `keep` [units of the network] final."""
        self.freeze(keep[torch.from_numpy(self.scope.active)])
        self.settled()

    def structure(self) -> Tensor:
        """bool [units of the network]: those that stay."""
        keep = torch.ones(len(self.scope.active), dtype=torch.bool)
        moving = self.quirks.unfrozen_structure and self.gate_steps
        keep[torch.from_numpy(self.scope.active)] = (self.gates.deterministic_published() if moving else self.keep).cpu().bool()
        return keep

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
        """Expected and target sparsity, while gates learn."""
        if not self.gate_steps:
            return self.inner.describe(step)
        names = [""] if len(self.budget.names) == 1 else [f"_{name}" for name in self.budget.names]
        expected, target = self.budget.expected(self.gates.p_open()).tolist(), self.target(step).tolist()
        line = {f"expected_sparsity{name}": value for name, value in zip(names, expected, strict=True)}
        line |= self.inner.describe(step)
        return line | {f"target_sparsity{name}": value for name, value in zip(names, target, strict=True)}
