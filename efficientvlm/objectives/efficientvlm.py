"""The method of EfficientVLM (Wang et al. 2022): distillation by layers with a teacher of the same family, then gates under one budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.terms import Term, hidden, tower_maps
from efficientvlm.settings.methods import Distillation, DistillationQuirks


def distilled(hard: Any, teacher: Any, settings: Distillation) -> Objective:
    """`hard` mixed with L_KD as `settings` say: every layer of the student imitates one of the teacher; `hard` alone where `kd` is 0."""
    if not settings.kd:
        return hard
    return Distilled(
        hard,
        hard.cached(teacher) if settings.cache_teacher else LiveTeacher(hard, teacher),
        released(hard.terms, settings.quirks),
        kd=settings.kd,
        weights=dict(settings.weights),
        maps=tower_maps(hard.family, hard.model.config, teacher.config),
        alike=not settings.quirks.independent_negatives,
        temperature=settings.temperature,
        scale=settings.scale_by_temperature,
    )


def released(terms: Iterable[Term], quirks: DistillationQuirks) -> tuple[Term, ...]:
    """`terms` with what the published release does instead, where `quirks` ask for it: it compares padding too, and leaves out the last
    hidden state of vision."""
    rows = []
    for term in terms:
        if quirks.unmasked_padding:
            term = term._replace(mask="")
        if quirks.skip_last_hidden and term.tower == "vision" and term.distance is hidden:
            term = term._replace(last=-1)
        rows.append(term)
    return tuple(rows)
