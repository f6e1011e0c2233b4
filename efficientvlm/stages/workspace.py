"""What a stage reads while it prepares: checkpoints as shapes, data by name. No weight file is opened for that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from efficientvlm.data.configured import open_split
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, load
from efficientvlm.runtime.progress import telling


class Workspace:
    """Checkpoints and data as they lie there; the first thing that is wrong is raised.

    A plan has a workspace of its own (`planning.chain.Look`), which knows what earlier stages will write, and notes all that is wrong.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def checkpoint(self, spec: str) -> Loaded:
        """The shapes of a checkpoint."""
        return load(spec, weights=False)

    def data(self, config: Any, kind: Kind[Any, Any], split: str, form: Preprocessing | None) -> Any:
        """The samples of `split` that `config` names, their pictures in the given form."""
        with telling(f"opening the data {config.data}", quiet=self.quiet):
            return open_split(config, kind, split, form)

    def check(self, problems: Iterable[BadInput]) -> None:
        """Raise the first of `problems`."""
        for problem in problems:
            raise problem
