"""How a stage was asked to behave, apart from what it computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """Run-time switches of a stage; none of them changes its result, so none is part of the configuration."""

    force: bool = False
    resume: bool = True
    quiet: bool = False
    json: bool = False
