"""The checkpoints of a chain as shapes on the meta device: those that are there, and those that earlier stages will write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from efficientvlm.checkpoints import lineage, manifest
from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import examine
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.accounting import account
from efficientvlm.control import Control
from efficientvlm.data.configured import open_split
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.families.onnx.description import is_exported
from efficientvlm.loaded import Loaded, load
from efficientvlm.planning.checks import Problems, place
from efficientvlm.planning.costs import Disks
from efficientvlm.recipe import Step
from efficientvlm.stages.common import TEXT_LENGTH
from efficientvlm.stages.results import ResultFile
from efficientvlm.stages.workspace import Workspace

DATA = ("data", "columns", "val", "val_fraction", "limit", "max_bad", "seed", "shuffle_buffer")  # settings that say which samples there are
PLANNED = "sha256:" + "0" * 64  # in the place of the digest of what is not written yet


class Blocked(Exception):
    """A stage cannot be planned, and why: mostly because of a problem that is known already."""


@dataclass
class Chain:
    """What is known while the stages of a chain are planned in their order.

    `made` is what they write, by place: a checkpoint as shapes, or None for a result file or where planning failed. `stale` are the places
    that would be written anew, `dense` the shapes before a cut that is not made yet,
    `assumed` the places whose structure is only assumed.
    """

    control: Control = field(default_factory=Control)
    verify: bool = False
    problems: Problems = field(default_factory=Problems)
    disks: Disks = field(default_factory=Disks)
    made: dict[str, Loaded | None] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    dense: dict[str, Any] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)
    _opened: dict[str, Loaded | None] = field(default_factory=dict)
    _sources: dict[str, Any] = field(default_factory=dict)
    _accounts: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def open(self, spec: str, stage: str) -> Loaded:
        """The shapes of checkpoint `spec`: of an earlier stage's output, or read from its folder.

        Raises:
            Blocked: it cannot be opened; the problem has been noted.
        """
        key = place(spec)
        known = self.made if key in self.made else self._opened
        if key not in known:
            known[key] = None
            with self.problems.of(stage):
                if is_exported(resolve(spec, checkpoint=True)):
                    raise Blocked("ONNX graphs are not planned")
                known[key] = load(spec, weights=False)
                for problem in lineage.verify(spec) if self.verify else ():
                    self.problems.add(stage, BadInput(f"{spec} is not as it was made", problem, "restore what has changed"))
        found = known[key]
        if found is None:
            raise Blocked("it reads what cannot be planned")
        return replace(found)

    def attempt(self, spec: str, stage: str) -> Loaded | None:
        """As :meth:`open`, but None where it cannot be opened: what does not depend on it is looked at too."""
        try:
            return self.open(spec, stage)
        except Blocked:
            return None

    def source(self, opened: Any, *key: Any) -> Any:
        """What `opened()` returns, the same for the same `key`; `Blocked` where that failed before."""
        name = repr(key)
        if name not in self._sources:
            self._sources[name] = None
            self._sources[name] = opened()
        if self._sources[name] is None:
            raise Blocked("its data cannot be opened")
        return self._sources[name]

    def account(self, loaded: Loaded) -> dict[str, Any]:
        """Parameters, MACs and sparsity of the model, by tower."""
        for model, known in self._accounts:
            if model is loaded.model:
                return known
        counted = account(loaded.model, text_length=TEXT_LENGTH)
        self._accounts.append((loaded.model, counted))
        return counted

    def status(self, step: Step, inputs: dict[str, str | None], digests: dict[str, str]) -> str:
        """What is at the output: `new`, `up to date`, `resumes` or `replaces`.

        Args:
            inputs: role → checkpoint or file.
            digests: role → `sha256:HEX` of the data; a role without value is taken to be what it was.

        What speaks against writing it is noted; the answer is `cannot run` then.
        """
        with self.problems.of(step.name):
            return self._examined(step, inputs, digests)
        return "cannot run"

    def _examined(self, step: Step, inputs: dict[str, str | None], digests: dict[str, str]) -> str:
        config: Any = step.config
        roles = {role: PLANNED if place(spec) in self.stale else spec for role, spec in inputs.items() if spec}
        for role, spec in inputs.items():
            if spec and place(spec) == place(config.out):
                raise BadInput(f"{config.out} cannot be written", f"it is the {role} this stage reads", "use another --out")
        return examine(
            config.out,
            stage=step.stage,
            inputs={**roles, **digests},
            config=config.model_dump(),
            force=self.control.force,
            resume=self.control.resume,
            unread=[role for role, digest in digests.items() if not digest],
        )

    def result_status(self, step: Step, inputs: dict[str, str], unread: list[str]) -> str:
        """As :meth:`status`, for a stage that writes a JSON result."""
        with self.problems.of(step.name):
            file = ResultFile.examine(step.config, step.stage, inputs, force=self.control.force, unread=unread)
            if file.finished:
                return "up to date"
            return "replaces" if file.path and file.path.exists() else "new"
        return "cannot run"

    def write(self, step: Step, status: str, loaded: Loaded | None) -> None:
        """Note that `step` writes `loaded`; a finished folder counts as it is."""
        config: Any = step.config
        key = place(config.out)
        if status == "up to date" and loaded is not None:
            self.made[key] = load(config.out, weights=False)
            return
        self.stale.add(key)
        self.made[key] = loaded and replace(loaded, path=Path(config.out), manifest=drafted(step, loaded))


def drafted(step: Step, loaded: Loaded) -> Manifest:
    """The manifest that `step` will write, as far as later stages ask for it."""
    return Manifest(
        stage=step.stage,
        family=loaded.family.name,
        config=step.config.model_dump(mode="json"),
        code=manifest.code(),
        created=manifest.now(),
        extra={"new": []},
    )


@contextmanager
def on_meta() -> Iterator[None]:
    """New tensors have shapes and no values."""
    with torch.device("meta"):
        yield


class Look(Workspace):
    """What the stage `stage` of a chain reads: what earlier stages will write included. All that is wrong is noted."""

    def __init__(self, chain: Chain, stage: str) -> None:
        super().__init__(quiet=True)
        self.chain, self.stage = chain, stage

    def checkpoint(self, spec: str) -> Loaded:
        return self.chain.open(spec, self.stage)

    def data(self, config: Any, kind: Kind[Any, Any], split: str, form: Preprocessing | None) -> Any:
        """The same data are opened once for all stages that prepare pictures in the same form."""
        key = [getattr(config, name, None) for name in DATA]
        with self.chain.problems.of(self.stage):
            return self.chain.source(lambda: open_split(config, kind, split, form), kind.name, split, form, *key)
        raise Blocked("its data cannot be opened")

    def check(self, problems: Iterable[BadInput]) -> None:
        for problem in problems:
            self.chain.problems.add(self.stage, problem)
