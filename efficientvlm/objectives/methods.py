"""The methods of distillation by name: each is a module with these two functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from efficientvlm.errors import BadInput
from efficientvlm.objectives import dime_fm, dlip, efficientvlm
from efficientvlm.objectives.objective import Objective


class Method(Protocol):
    """How a teacher teaches."""

    def needs(self, student: Any, teacher: Any, settings: Any) -> Iterator[BadInput]:
        """Every reason why the network `teacher` (a `loaded.Loaded`) cannot teach `student` as `settings` say."""

    def distilled(self, hard: Any, teacher: Any, settings: Any) -> Objective:
        """The losses `hard` of the student, mixed with what `teacher` says, as `settings` ask: a network, or what asks it in its place
        (`tasks.task.Learnt.taught_by`)."""


METHODS: dict[str, Method] = {"efficientvlm": efficientvlm, "dlip": dlip, "dime-fm": dime_fm}
