"""Learnt gates on a network under a budget, for any training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from efficientvlm.compression.budgets import cost_of, reachable
from efficientvlm.compression.gates import Gates, attach
from efficientvlm.compression.latency import LatencyTable
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Budget, Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import BadInput
from efficientvlm.settings.methods import GateQuirks


def rise(steps: int, hold: float, warmup: float) -> dict[str, Any]:
    """`hold_steps` and `warmup_steps` of a gate phase of `steps`, of which both are fractions; together no longer than it."""
    held = round(hold * steps)
    return {"hold_steps": held, "warmup_steps": round((hold + warmup) * steps) - held}


def rates(steps: int) -> tuple[float, float]:
    """Rates of gates and of multipliers that suit a gate phase of `steps`, never below the published 0.01 of both.

    A gate could cross the whole range of its log α (2 · ln 100) about four times. A multiplier has to outgrow what the task says of a unit
    before the phase ends, or the gates are far from their target when the structure is made final, and order alone chooses the rest.

    Source: ours, measured in benchmarks/gates.py.
    """
    return min(0.1, max(0.01, 36 / max(1, steps))), min(1.0, max(0.01, 144 / max(1, steps)))


class Pruner(nn.Module):
    """Removes attention heads and neurons while the network is trained (EfficientVLM; L0 after Louizos et al. 2018).

    In every step: :meth:`begin_step`, the network's forward pass, the loss plus :meth:`penalty`, the backward pass, the optimizers of the
    network and of :meth:`optimizers`, and :meth:`end_step`. In the first `steps` steps the gates learn; then the structure is final and
    meets the budget exactly, and training goes on under it. :meth:`finish` gives the smaller network.

    Use it in a loop of your own; the command `prune` uses it too (`objectives.gated.Gated`). All values that decide what is done are
    parameters and buffers, so that a state dict resumes a run.

    Args:
        model: the network. Its Linears get a forward pass of their own until :meth:`finish` or :meth:`remove`.
        scope: what may be removed of `model`, and how much.
        steps: length of the gate phase; 0 where the structure comes from elsewhere, by :meth:`settle`.
        hold_steps: steps in which no more sparsity is asked for than fresh gates give, so that the task is learnt before units go.
        warmup_steps: steps after these until the whole sparsity is asked for.
        seed: of the gates' first values and of what is drawn in each step.
        settled: called when the structure has become final, while the weights are still whole.
        reads: int [gates], the gate that each unit is multiplied by; its own by default.
        epoch: steps of an epoch, for `quirks.epoch_step`.

    Example:
        pruner = Pruner.of(model, sparsity=0.5, steps=600)
        optimizers = [torch.optim.AdamW(model.parameters()), *pruner.optimizers()]
        for step, batch in enumerate(batches):
            pruner.begin_step(step)
            (loss_of(model, batch) + pruner.penalty(step)).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            pruner.end_step(step)
        small = pruner.finish()
    """

    keep: Tensor
    frozen: Tensor
    begin: Tensor

    def __init__(
        self,
        model: nn.Module,
        scope: Scope,
        gates: Gates,
        *,
        steps: int,
        warmup_steps: int,
        hold_steps: int = 0,
        seed: int = 0,
        settled: Callable[[], None] = lambda: None,
        reads: Tensor | None = None,
        epoch: int = 1,
        quirks: GateQuirks | None = None,
    ) -> None:
        super().__init__()
        self._model = (model,)  # not a part of this module
        self.scope, self.gates, self.budget, self.settled = scope, gates, Budget(scope), settled
        self.steps, self.hold_steps, self.warmup_steps, self.seed, self.epoch = steps, hold_steps, max(1, warmup_steps), seed, epoch
        self.quirks = quirks or GateQuirks()
        self.register_buffer("keep", torch.ones(len(scope.units), dtype=torch.bool))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.learning = True  # not `frozen`, known without asking a GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._note())
        self.hooks, self.reads = attach(model, scope.units), reads
        fresh = self.budget.expected(gates.p_open().detach()).minimum(self.budget.final)
        self.register_buffer("begin", fresh if hold_steps else torch.zeros_like(fresh), persistent=False)

    @classmethod
    def of(
        cls,
        model: Any,
        *,
        sparsity: float | None = None,
        steps: int,
        budget: str = "parameters",
        text_length: int | None = None,
        table: LatencyTable | None = None,
        hold: float = 0.3,
        warmup: float = 0.5,
        seed: int = 0,
        head_init: float = 10.0,
        neuron_init: float = 0.0,
        **limits: Any,
    ) -> Self:
        """Fresh gates on `model`.

        Args:
            sparsity: part of what can be removed that is removed, 0 to 1, what earlier cuts removed among it; or `to`, what the whole
                network may cost instead.
            budget: what is counted: `parameters`; `macs`, those of one image and one text of `text_length` tokens, by default 12 or as many
                as are read; or `latency`, in nanoseconds by `table`, which `stages.budgeting.read_table` reads.
            hold: part of `steps` before more is asked for than fresh gates give; 0: none, as published.
            warmup: part of `steps` after that until all of it is asked for.
            head_init, neuron_init: log α at the start; heads that start at 10 move only in long runs (EfficientVLM), at 2 in short ones.
            limits: as of :meth:`Scope.of`: kinds, towers, tower_sparsity, min_heads, min_neurons, round_to, allow_blind, to.

        Raises:
            BadInput: an unknown tower or kind, or neither a sparsity nor `to`.
            TargetMissed: the target cannot be reached within the limits.
        """
        if (sparsity is None) == (limits.get("to") is None):
            raise BadInput("how much is to go is not said once", "sparsity is a part of it, to what may be left", "give one of the two")
        cost = cost_of(model, budget, text_length=text_length, table=table, round_to=limits.get("round_to", 1))
        scope = reachable(model, sparsity or 0.0, cost, **limits)
        gates = Gates(scope.units, seed=seed, head_init=head_init, neuron_init=neuron_init)
        return cls(model, scope, gates, steps=steps, seed=seed, **rise(steps, hold, warmup)).to(next(model.parameters()).device)

    @property
    def model(self) -> Any:
        """The network under gates."""
        return self._model[0]

    @property
    def moving(self) -> bool:
        """Whether the gates still learn."""
        return self.learning or self.quirks.unfrozen_structure

    def begin_step(self, step: int) -> None:
        """Put the gates of step number `step` on the network: drawn from (seed, step) while they learn, 0 or 1 afterwards."""
        if self.learning:
            z = self.gates.draw(self.seed, step)
        elif self.quirks.unfrozen_structure:
            z = self.gates.deterministic_published()
        else:
            z = self.keep.float()
        self.hooks.set(z if self.reads is None else z[self.reads.to(z.device)])

    def penalty(self, step: int) -> Tensor:
        """The Lagrangian of the budget, a scalar to add to the loss; 0 once the structure is final."""
        return self.budget(self.gates.p_open(), self.target(step)) if self.moving else torch.zeros((), device=self.keep.device)

    def target(self, step: int) -> Tensor:
        """[budgets] sparsity asked for at `step`: that of fresh gates until it rises linearly over the warm-up, then constant.

        Without steps that hold it back it rises from 0 (EfficientVLM, published schedule).
        """
        own = step % self.epoch if self.quirks.epoch_step else step
        return self.budget.target(max(0, own - self.hold_steps), self.warmup_steps, self.begin)

    def rates(self, lr: float | None = None, multiplier_lr: float | None = None) -> tuple[float, float]:
        """Rates of gates and of multipliers, those given or else what suits the gate phase (:func:`rates`)."""
        of_gates, of_multipliers = rates(self.steps)
        return of_gates if lr is None else lr, of_multipliers if multiplier_lr is None else multiplier_lr

    def optimizers(self, *, lr: float | None = None, multiplier_lr: float | None = None) -> list[torch.optim.Optimizer]:
        """AdamW of constant rate on log α, and an ascending one on the multipliers (EfficientVLM), by default as :func:`rates`; once."""
        of_gates, of_multipliers = self.rates(lr, multiplier_lr)
        common: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0}
        alpha = torch.optim.AdamW(self.gates.parameters(), lr=of_gates, **common)
        return [alpha, torch.optim.AdamW(self.budget.parameters(), lr=of_multipliers, maximize=True, **common)]

    def end_step(self, step: int) -> None:
        """After the update of step number `step`: gates stay where they can still move, and at the end of their phase are snapped.

        Raises:
            Diverged: a gate is no number.
        """
        if self.steps:
            self.gates.clamp_()
        if step + 1 == self.steps:
            self.settle(snap(self.gates.p_open().detach().cpu(), self.scope))

    @torch.no_grad()
    def settle(self, keep: Tensor) -> None:
        """Make `keep`, bool [units of the network], the structure for the rest of the run."""
        self.keep.copy_(keep[torch.from_numpy(self.scope.active)])
        self.frozen.fill_(True)
        self._note()
        self.settled()

    def structure(self) -> Tensor:
        """bool [units of the network]: those that stay."""
        keep = torch.ones(len(self.scope.active), dtype=torch.bool)
        moving = self.quirks.unfrozen_structure and self.steps
        keep[torch.from_numpy(self.scope.active)] = (self.gates.deterministic_published() if moving else self.keep).cpu().bool()
        return keep

    @torch.no_grad()
    def describe(self, step: int) -> dict[str, float]:
        """Expected and target sparsity, by budget, while gates learn."""
        if not self.steps:
            return {}
        names = [""] if len(self.budget.names) == 1 else [f"_{name}" for name in self.budget.names]
        expected, target = self.budget.expected(self.gates.p_open()).tolist(), self.target(step).tolist()
        line = {f"expected_sparsity{name}": value for name, value in zip(names, expected, strict=True)}
        return line | {f"target_sparsity{name}": value for name, value in zip(names, target, strict=True)}

    def remove(self) -> None:
        """Take the gates off the network."""
        self.hooks.remove()

    def finish(self) -> Any:
        """The network without what was removed: really smaller, with equal outputs. `model` itself stays whole, without gates.

        Raises:
            RuntimeError: the structure is not final yet.
        """
        if self.learning:
            raise RuntimeError(f"the structure is final after {self.steps} steps; finish then")
        self.remove()
        return slice_model(self.model, self.structure())

    def _note(self) -> None:
        self.learning = not self.frozen
