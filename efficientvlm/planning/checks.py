"""Problems of a stage's inputs: collected instead of raised, so that all are reported at once. Loads neither torch nor a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from efficientvlm.checkpoints.files import expanded, is_hub_id, resolve
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.errors import BadInput, EvlmError, TargetMissed
from efficientvlm.recipe import Step

CHECKPOINTS = ("model", "teacher", "from_gates", "models")
DATA = ("data", "val")
PATHS = ("vision_from", "text_from", "tokenizer", "answers", "vectors", "ids", "table")
RESULTS = ("evals", "bench")


@dataclass(frozen=True)
class Problem:
    """A stage (its name in a recipe) and what keeps it from running."""

    stage: str
    error: EvlmError

    def as_dict(self) -> dict[str, Any]:
        error = self.error
        return {"stage": self.stage, "what": error.what, "why": error.why, "fix": error.fix, "exit_code": error.exit_code}


@dataclass
class Problems:
    """Every problem found so far; the same one is kept once."""

    found: list[Problem] = field(default_factory=list)

    def add(self, stage: str, error: EvlmError) -> None:
        if str(error) not in (str(problem.error) for problem in self.found):
            self.found.append(Problem(stage, error))

    def of_stage(self, stage: str) -> list[Problem]:
        return [problem for problem in self.found if problem.stage == stage]

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Collect the error the block raises, if it is one that a user can act on."""
        try:
            yield
        except EvlmError as error:
            self.add(stage, error)

    @property
    def exit_code(self) -> int:
        """0, 4 if targets out of reach are all that is wrong, else 3."""
        if not self.found:
            return 0
        return 4 if all(isinstance(problem.error, TargetMissed) for problem in self.found) else 3

    def raise_all(self, what: str) -> None:
        """Raise what was found, if anything: a single problem as it is, several in one error about `what`.

        Raises:
            BadInput, TargetMissed: as :attr:`exit_code` says.
        """
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0].error
        kind = TargetMissed if self.exit_code == 4 else BadInput
        raise kind(f"{what} has {len(self.found)} problems", "\n  " + "\n  ".join(map(_line, self.found)), "correct them; nothing was run")


def _line(problem: Problem) -> str:
    error = problem.error
    text = ": ".join(" ".join(part.split()) for part in (problem.stage, error.what, error.why) if part)
    return f"{text} ({error.fix})" if error.fix else text


def place(spec: Any) -> str:
    """One name for a path, however it is written."""
    return os.path.abspath(os.path.expanduser(str(spec)))  # the home of nobody is found missing where the path is looked at


def preflight(steps: Sequence[Step]) -> Problems:
    """Paths that are not there, checkpoints that are unfinished or have files of another size: what can be seen without a model.

    What an earlier step writes need not be there yet.
    """
    problems = Problems()
    written: set[str] = set()
    for step in steps:
        for error in path_problems(step, written):
            problems.add(step.name, error)
        if out := getattr(step.config, "out", None):
            written.add(place(out))
    return problems


def path_problems(step: Step, written: set[str]) -> Iterator[EvlmError]:
    """Every path of `step` that cannot be used; those in `written` are written by earlier steps."""
    values = step.config.model_dump()
    for key in (*CHECKPOINTS, *DATA, *PATHS, *RESULTS):
        for spec in _texts(values.get(key)):
            if key == "tokenizer" and spec == "train" and step.stage == "init":
                continue
            if place(spec) not in written and (error := _problem(step.stage, key, spec)):
                yield error


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for text in value.values() if isinstance(text, str)]
    return [text for text in (value if isinstance(value, list) else [value]) if text and isinstance(text, str)]


def _problem(stage: str, key: str, spec: str) -> EvlmError | None:
    try:
        if key in DATA:
            from efficientvlm.data.opening import check_spec

            check_spec(spec)
        elif key in CHECKPOINTS and stage == "import":
            importable(spec)
        elif key in CHECKPOINTS:
            require_complete(spec)
        elif key in RESULTS and not expanded(spec).is_file():
            raise BadInput(f"there is no result {spec}", "no earlier stage writes it", "name the stage that does, as @stage")
        elif key == "answers":
            from efficientvlm.data.answer_list import read_answers

            read_answers(resolve(spec))
        else:
            resolve(spec)
    except EvlmError as error:
        return error
    return None


def importable(spec: str) -> None:
    """:class:`BadInput` unless `spec` is something that import reads."""
    if not is_hub_id(spec) and not resolve(spec).is_file() and not (resolve(spec) / "config.json").is_file():
        why = "it is neither a file nor a folder with a config.json"
        raise BadInput(f"--model {spec} cannot be imported", why, "give a published .th, .pth or .safetensors file, or a model folder")
