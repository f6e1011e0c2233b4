"""Errors a user can act on: what went wrong, why, and what to do about it."""

from __future__ import annotations


class EvlmError(Exception):
    """Base of every error the command line prints as three short lines."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(": ".join(part for part in (what, why) if part))
        self.what, self.why, self.fix = what, why, fix


class BadInput(EvlmError):
    """A path, file, option or data set that cannot be used."""

    exit_code = 3


class TargetMissed(EvlmError):
    """A sparsity or accuracy target that cannot be met."""

    exit_code = 4


class Interrupted(EvlmError):
    """Stopped on request after a resumable state was written."""

    exit_code = 75
