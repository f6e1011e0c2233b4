"""What a stage reads while it prepares, and what it then is about to do: checkpoints as shapes, data by name. No weight file is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.checkpoints.store import Store
from efficientvlm.data.configured import open_split
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, load
from efficientvlm.runtime.progress import say, telling


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage is about to do, as its `prepare(config, workspace)` finds it out; its `run` does it, and a plan says what that costs.

    `inputs`: role → checkpoint or file that is read; `data`: role → samples that are.
    """

    inputs: dict[str, str | None] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Beginning(Job):
    """What begins a chain. `shapes` gives its family, its network on the meta device, its tokenizer, and remarks on them.

    `image_settings` are those it comes with; None: pictures are resized to a square.
    """

    shapes: Callable[[], tuple[Any, Any, Any, list[str]]]
    image_settings: dict[str, Any] | None = None


def inputs_of(job: Job) -> dict[str, str]:
    """Role → what `job` reads: a checkpoint, a file, or `sha256:HEX` of data."""
    given = {role: spec for role, spec in job.inputs.items() if spec}
    return given | {role: f"sha256:{source.fingerprint}" for role, source in job.data.items()}


class Workspace:
    """Checkpoints and data as they lie there; the first thing that is wrong is raised.

    A plan has a workspace of its own (`planning.chain.Look`), which knows what earlier stages will write, and notes all that is wrong.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def checkpoint(self, spec: str, *, exported: bool = False) -> Loaded:
        """The shapes of a checkpoint, which may be one of ONNX graphs if `exported`."""
        return load(spec, weights=False, exported=exported)

    def store(self, spec: str) -> Any:
        """A folder of embeddings: a `checkpoints.store.Store`, or what stands for one."""
        return Store.open(spec)

    def digest(self, spec: str) -> str:
        """That by which others know the checkpoint `spec`."""
        return fingerprint(spec)

    def note(self, text: str) -> None:
        """Say what somebody should know."""
        say(text, quiet=self.quiet)

    def is_made(self, spec: str) -> bool:
        """Whether the checkpoint is there, with its values."""
        return True

    def data(self, config: Any, kind: Kind[Any, Any], split: str, form: Preprocessing | None) -> Any:
        """The samples of `split` that `config` names, their pictures in the given form."""
        with telling(f"opening the data {config.data}", quiet=self.quiet):
            return open_split(config, kind, split, form)

    def checking(self) -> AbstractContextManager[None]:
        """What is wrong inside does not keep from looking on, where all is noted."""
        return nullcontext()

    def check(self, problems: Iterable[BadInput]) -> None:
        """Raise or note `problems`."""
        for problem in problems:
            with self.checking():
                raise problem
