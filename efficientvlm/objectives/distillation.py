"""Distillation: any losses, mixed with distances from what a teacher says of the same batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm.errors import BadInput
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.teachers import Teacher
from efficientvlm.objectives.terms import Term, TowerMap, compared, has_layers, of_student, of_teacher
from efficientvlm.runtime.stopwatch import TEACHER
from efficientvlm.settings.common import Train
from efficientvlm.training.loop import Optimizer, adamw


class Distilled(Objective):
    """L = (1 - kd) * L_hard + kd * L_KD, where L_KD is the sum of weighted terms.

    Use it around the losses of any task, where there is a teacher that is better than what the student reaches alone. Every row of `terms`
    whose weight is not 0 is compared, unless its tower is missing from `maps` because one of the networks has no layers there, or the
    step makes nothing of the kind (a single pair has no negatives).

    Args:
        hard: losses of the student, with the table of what can be compared.
        teacher: whatever answers a batch. It is not part of the module's parameters.
        terms: rows of `hard.terms`, as a method changes them.
        weights: weight of each row, by its name.
        maps: tower → which layers and heads meet.
        alike: whether the teacher sees what the student drew at random, or draws its own.
        projections: tap → what the student's tensors go through where the teacher's have another width; they learn (as fast as other
            new tensors), lie in the training state, and are not deployed.
        temperature, scale: of logits; `scale` multiplies their terms by its square.
        hard_weight: of the losses of the student, by default 1 - kd.
        each: whether every term is reported beside their sum, as `kd_` and the name of its weight.

    Raises:
        BadInput: no row is left to compare.

    Inputs of `forward`: those of `hard`. Returns the losses of `hard`, `kd`, and the mixture as `loss`, all scalars.

    Source: Hinton et al. 2015 (logits); EfficientVLM, section 3 (hidden states, attention maps, and their sum).

    Example::

        hard = Generation(student)
        weights = {term.weight: 1.0 for term in hard.terms}
        maps = tower_maps(student.config, teacher.config)
        Distilled(hard, LiveTeacher(hard, teacher), hard.terms, kd=0.4, weights=weights, maps=maps)(batch, step=0)["loss"].backward()
    """

    def __init__(
        self,
        hard: Objective,
        teacher: Teacher,
        terms: Iterable[Term],
        *,
        kd: float,
        weights: Mapping[str, float],
        maps: Mapping[str, TowerMap],
        alike: bool = True,
        projections: Mapping[str, nn.Module] | None = None,
        temperature: float = 1.0,
        scale: bool = False,
        hard_weight: float | None = None,
        each: bool = False,
    ) -> None:
        super().__init__()
        self.hard, self.teacher, self.kd, self.maps, self.alike = hard, teacher, kd, dict(maps), alike
        self.hard_weight, self.each = 1 - kd if hard_weight is None else hard_weight, each
        self.softened: dict[str, Any] = {"temperature": temperature, "scale": scale}
        weighed = [term for term in terms if weights[term.weight]]
        self.terms = tuple(term for term in weighed if has_layers(term, self.maps))
        if weighed and not self.terms:
            why = f"one of the networks has nothing to compare as {', '.join(dict.fromkeys(term.tap for term in weighed))}"
            raise BadInput("the student has nothing to learn from its teacher", why, "give a weight to another term, or use kd 0")
        self.weights = {term.weight: weights[term.weight] for term in self.terms}
        self.places = {tap: str(number) for number, tap in enumerate(projections or {})}  # names of modules have no dots
        self.projections = nn.ModuleDict({self.places[tap]: module for tap, module in (projections or {}).items()})
        self.want, self.asked = of_student(self.terms, self.maps), of_teacher(self.terms, self.maps)

    @property
    def model(self) -> Any:
        """The student."""
        return self.hard.model

    def optimizers(self, options: Train, new: Collection[str]) -> list[Optimizer]:
        """Projections are new, whatever is."""
        fast = [*self.named(new), *self.projections.parameters()]
        return [adamw(self.parameters(), options, fast=fast, biases=self.biases())]

    def after_step(self, step: int) -> None:
        self.hard.after_step(step)

    def describe(self, step: int) -> dict[str, float]:
        return self.hard.describe(step)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        self.hard.begin_step(step)
        batch = self.hard.aligned(batch)
        losses, ours, drawn = self.hard.passes(self.model, batch, step, self.want)
        with torch.inference_mode(), TEACHER:
            theirs = self.teacher(batch, step, self.asked, drawn if self.alike else None)
        found: dict[str, Tensor] = {}
        for term in self.terms:
            if term.tap in ours:
                projection = self.projections[self.places[term.tap]] if term.tap in self.places else None
                value = self.weights[term.weight] * compared(term, ours, theirs, self.maps, projection=projection, **self.softened)
                found[f"kd_{term.weight}"] = found.get(f"kd_{term.weight}", torch.zeros(())) + value
        kd = sum(found.values(), torch.zeros(()))
        hard = self.hard.total(losses)
        return {"loss": self.hard_weight * hard + self.kd * kd, **losses, "kd": kd, **(found if self.each else {})}
