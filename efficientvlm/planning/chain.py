"""The checkpoints of a chain as shapes on the meta device: those that are there, and those that earlier stages will write."""

from __future__ import annotations

import copy
import hashlib
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from efficientvlm.checkpoints import lineage
from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.control import Control
from efficientvlm.data.configured import open_split
from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.families.onnx.description import is_exported
from efficientvlm.loaded import Loaded, load
from efficientvlm.planning.checks import Problems, place
from efficientvlm.planning.costs import Disks
from efficientvlm.planning.stores import Foreseen, Known
from efficientvlm.stages.common import accounted
from efficientvlm.stages.workspace import Workspace

DATA = ("data", "columns", "val", "val_fraction", "limit", "max_bad", "seed", "shuffle_buffer")  # settings that say which samples there are
PLANNED = "sha256:" + "0" * 64  # in the place of the digest of what is not written yet


class Blocked(Exception):
    """A stage cannot be planned, and why: mostly because of a problem that is known already."""


@dataclass
class Planned(Loaded):
    """A checkpoint that a stage will write, as shapes, with the image settings that will be in its folder."""

    image_settings: dict[str, Any] | None = None

    @property
    def image_processor(self) -> dict[str, Any] | None:
        return self.image_settings


@dataclass
class Chain:
    """What is known while the stages of a chain are planned in their order.

    `outputs` is what they write, by place: a checkpoint as shapes, or None for a result file or where planning failed. `stale` are the
    places that would be written anew, `assumed` those whose structure is only assumed, `graphs` those of ONNX graphs; `sources` are the
    data that were opened, None where that failed; `stores` are embeddings that they write; `piles` settings that read what sentences are
    selected from, by the place of those that will be; `notes` what is said of a stage, by its name.
    """

    control: Control = field(default_factory=Control)
    verify: bool = False
    problems: Problems = field(default_factory=Problems)
    disks: Disks = field(default_factory=Disks)
    outputs: dict[str, Loaded | None] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    assumed: set[str] = field(default_factory=set)
    graphs: set[str] = field(default_factory=set)
    sources: dict[str, Any] = field(default_factory=dict)
    stores: dict[str, Foreseen] = field(default_factory=dict)
    piles: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    _opened: dict[str, Loaded | None] = field(default_factory=dict)
    _accounts: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)

    def open(self, spec: str, stage: str, *, exported: bool = False) -> Loaded:
        """The shapes of checkpoint `spec`: of an earlier stage's output, or read from its folder.

        Raises:
            Blocked: it cannot be opened, and the problem has been noted; or it is of ONNX graphs, which are not planned (`exported`).
        """
        key = place(spec)
        if key in self.graphs and not exported:
            why = "they can be asked, evaluated and timed, not changed"
            self.problems.add(stage, BadInput(f"{spec} will hold ONNX graphs", why, "give the checkpoint they are exported from"))
        known = self.outputs if key in self.outputs else self._opened
        if key not in known:
            with self.problems.of(stage):
                if exported and is_exported(resolve(spec, checkpoint=True)):
                    raise Blocked("ONNX graphs are not planned")
                known[key] = None
                known[key] = load(spec, weights=False)
                for problem in lineage.verify(spec) if self.verify else ():
                    self.problems.add(stage, BadInput(f"{spec} is not as it was made", problem, "restore what has changed"))
        found = known.get(key)
        if found is None:
            raise Blocked("it reads what cannot be planned")
        return replace(found)

    def now(self, spec: str) -> str:
        """`spec`, or a digest that is none yet in the place of what will be written anew."""
        return PLANNED if place(spec) in self.stale else spec

    def summary(self, loaded: Loaded) -> dict[str, Any]:
        """Parameters, MACs and sparsity of a model, JSON-ready; counted once."""
        counted = next((known for model, known in self._accounts if model is loaded.model), None)
        if counted is None:
            counted = accounted(loaded.model)
            self._accounts.append((loaded.model, counted))
        return {"parameters": counted["parameters"], "macs": counted["macs"], "sparsity": counted["sparsity"]["achieved"]}


class Look(Workspace):
    """What the stage `stage` of a chain reads: what earlier stages will write included. All that is wrong is noted."""

    def __init__(self, chain: Chain, stage: str) -> None:
        super().__init__(quiet=True)
        self.chain, self.stage = chain, stage

    def checkpoint(self, spec: str, *, exported: bool = False) -> Loaded:
        """Its configuration is its own: what is noted there is not in what the next stage reads."""
        loaded = self.chain.open(spec, self.stage, exported=exported)
        model = copy.copy(loaded.model)
        model.config = model.config.copy()
        return replace(loaded, model=model)

    def store(self, spec: str) -> Any:
        if (key := place(spec)) in self.chain.stores:
            return self.chain.stores[key]
        if key in self.chain.stale:
            raise Blocked("it reads what cannot be planned")
        return Known.open(spec)

    def digest(self, spec: str) -> str:
        """Of what is to be written anew a digest that no other place has."""
        return hashlib.sha256(place(spec).encode("utf-8", "surrogateescape")).hexdigest() if not self.is_made(spec) else fingerprint(spec)

    def note(self, text: str) -> None:
        self.chain.notes.setdefault(self.stage, []).append(text)

    def is_made(self, spec: str) -> bool:
        return place(spec) not in self.chain.stale

    def data(self, config: Any, kind: Kind[Any, Any], split: str, form: Preprocessing | None) -> Any:
        """The same data are opened once for all stages that prepare pictures in the same form.

        In the place of sentences that will be selected stand all those that they are selected from; a selection reads more kinds of files
        than other stages do.
        """
        if pile := self.chain.piles.get(place(config.data)):
            self.note(f"planned as if all sentences of {pile['data']} were selected")
            config = config.model_copy(update=pile)
        key = repr([kind.name, split, form, *(getattr(config, name, None) for name in DATA)])
        opened = self.chain.sources
        if key not in opened:
            opened[key] = None
            with suppress(BadInput) if pile else self.checking():
                opened[key] = open_split(config, kind, split, form)
        if opened[key] is None:
            raise Blocked(f"it reads what will be selected of {pile['data']}" if pile else "its data cannot be opened")
        return opened[key]

    def checking(self) -> AbstractContextManager[None]:
        return self.chain.problems.of(self.stage)
