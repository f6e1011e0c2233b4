"""The one shape of everything that a training step minimises."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efficientvlm.families.network import Record
from efficientvlm.objectives.terms import Term
from efficientvlm.settings.common import Train
from efficientvlm.training.loop import Optimizer, Trainable, adamw


class Pass(NamedTuple):
    """What one network makes of a batch: scalar losses by name, what it was asked to record, and what was drawn at random on the way."""

    losses: dict[str, Tensor]
    record: Record
    drawn: Any = None


class Objective(Trainable):
    """Losses of a network on a batch.

    `model` is the network that learns, the only part that is deployed; whatever else an objective holds (projections, gates, averaged
    copies) lies in the training state. `terms` says what a teacher can be compared on; `outputs` names what is recorded besides, for
    methods that have terms of their own. A subclass implements :meth:`passes`; one that wraps another objective implements :meth:`forward`
    instead. The other methods are for what more an objective does while it is trained.
    """

    model: Any
    terms: tuple[Term, ...] = ()
    outputs: frozenset[str] = frozenset()
    loss_weights: Mapping[str, float] = MappingProxyType({})
    """Of losses by name, where they are not 1."""

    def begin_step(self, step: int) -> None:
        """What precedes the passes of a training step, such as an update of averaged weights; called by whatever makes the passes."""

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `losses`."""
        return sum((self.loss_weights.get(name, 1.0) * value for name, value in losses.items()), torch.zeros(()))

    def aligned(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch` as all processes together read it."""
        return batch

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Losses of `model`, which may be a teacher, on an aligned batch, and the taps in `want`.

        `drawn` is what another network's pass drew; by default it is drawn anew. A teacher makes no pass in which nothing is wanted.
        """
        raise NotImplementedError

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The losses of `model`, and as `loss` their weighted sum."""
        self.begin_step(step)
        losses = self.passes(self.model, self.aligned(batch), step).losses
        return {"loss": self.total(losses), **losses}

    def optimizers(self, options: Train, new: Collection[str]) -> list[Optimizer]:
        """What changes the parameters; `new` names tensors of the model that play a new part, and learn faster."""
        return [adamw(self.parameters(), options, fast=self.named(new), biases=self.biases())]

    def biases(self) -> list[nn.Parameter]:
        """Biases of the model, tables of them included (Swin); by their names, as the published optimizer finds them."""
        return [parameter for name, parameter in self.model.named_parameters() if "bias" in name]

    def named(self, names: Collection[str]) -> list[nn.Parameter]:
        """Parameters of the model by name."""
        return [parameter for name, parameter in self.model.named_parameters() if name in names]
