"""Files of published projects: which layout one has, what is made of it, and an account of every entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm import families
from efficientvlm.errors import BadInput, number_of
from efficientvlm.families.weights import AGAIN, counting, floats, read_file, renewed
from efficientvlm.settings.layouts import LAYOUTS, Layout

FIX = f"give a published X-VLM, EfficientVLM or BLIP file: {', '.join(sorted({layout.name for layout in LAYOUTS}))}"
HEAD_WIDTH = 64
TIED = "second copy of a tied tensor, found equal"


@dataclass
class Report:
    """What became of the entries of a published file: how many were mapped, and which were ignored, by reason.

    `assumed` are configuration fields that the file cannot tell and nobody gave. `family` is that of the network in it, `added` are tokens
    of it that the tokenizer lacked, `remarks` what else has to be said of the file.
    """

    layout: str = ""
    family: str = ""
    mapped: int = 0
    ignored: dict[str, list[str]] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def ignore(self, reason: str, name: str) -> None:
        self.ignored.setdefault(reason, []).append(name)


Vocabulary = Callable[[Any, Report], Mapping[str, int] | None]


@dataclass
class Published:
    """A published file that is being translated.

    `tensors` are its entries by their published names, `settings` what was given beside it, `vocab` maps tokens to ids where there is a
    tokenizer.
    """

    path: Path
    tensors: dict[str, Tensor]
    layout: Layout
    report: Report
    settings: Mapping[str, Any]
    vocab: Mapping[str, int] | None = None

    def translated(self, reason: Callable[[str], str | None], renamed: Callable[[str], str | None]) -> dict[str, str]:
        """Our names → published ones; every entry is mapped, or ignored and reported.

        Args:
            reason: why an entry is left out; None if it is not.
            renamed: our name of one that is not; None for one of unknown meaning.

        Raises:
            BadInput: entries of unknown meaning, two of one meaning, or one that is not all finite floats.
        """
        called: dict[str, str] = {}
        unknown = []
        for name, tensor in self.tensors.items():
            if why := reason(name):
                self.report.ignore(why, name)
            elif (ours := renamed(name)) is None:
                unknown.append(name)
            elif ours in called:
                raise BadInput(
                    f"{self.path} is ambiguous", f"it holds {name} with and without a prefix", "remove one of them from the file"
                )
            elif floats(tensor) is None:
                raise BadInput(f"{self.path} is damaged", f"{name} is not all finite floats", AGAIN)
            else:
                called[ours] = name
        if unknown:
            raise BadInput(f"{self.path} has {number_of(len(unknown), 'entry', 'entries')} of unknown meaning", listed(unknown), FIX)
        return called

    def require_counting(self, name: str) -> None:
        """:class:`BadInput` unless the numbers of positions in `name`, which are made anew, count from 0, as far as they are known."""
        if not counting(self.tensors[name]):
            why = f"{name} does not count from 0, and here positions always do"
            raise BadInput(f"{self.path} cannot be imported", why, "order the rows of its position embedding by it, and leave it out")

    def require_equal(self, name: str, twin: str, fix: str) -> None:
        """:class:`BadInput` unless `name` and `twin`, which are one tensor here, are there and equal, as far as values are known."""
        if twin not in self.tensors:
            raise BadInput(f"{self.path} is incomplete", f"{name} is there, but not its twin{twin and f' {twin}'}", AGAIN)
        ours, theirs = self.tensors[name], self.tensors[twin]
        if ours.shape != theirs.shape or not (ours.is_meta or torch.equal(ours, theirs)):
            why = f"{name} differs from {twin}, and here the two are one tensor"
            raise BadInput(f"{self.path} cannot be imported", why, f"give {fix}")

    def require_complete(self, state: Mapping[str, Tensor], config: Any) -> None:
        """:class:`BadInput` unless `state` has the tensors of the network that `config` describes, and no others."""
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in families.get(self.layout.family).build(config).state_dict().items()}
        if missing := sorted(set(expected) - set(state)):
            raise BadInput(f"{self.path} lacks {number_of(len(missing), 'tensor')}", f"{listed(missing)}, as they are called here", AGAIN)
        if surplus := sorted(set(state) - set(expected)):
            raise BadInput(f"{self.path} has {number_of(len(surplus), 'tensor')} without a place", listed(surplus), FIX)
        wrong = [f"{name} {[*state[name].shape]} instead of {[*shape]}" for name, shape in expected.items() if state[name].shape != shape]
        if wrong:
            raise BadInput(
                f"{self.path} has {number_of(len(wrong), 'tensor')} of another shape", f"{listed(wrong)}, as they are called here", FIX
            )

    def value(self, name: str) -> Tensor:
        """The entry `name` as a float32 tensor."""
        return self.tensors[name].detach().to(torch.float32).contiguous()


def read_published(
    path: Path,
    layout: str = "auto",
    settings: Mapping[str, Any] | None = None,
    *,
    vocabulary: Vocabulary = lambda config, report: None,
    values: bool = True,
) -> tuple[Any, dict[str, Tensor], Report]:
    """Configuration and complete float32 state of the network in a published file, and what became of its entries.

    Widths, layers and vocabulary follow from the shapes. `settings` says what shapes do not: heads (64 columns each by default), norm
    constants, and what else the family knows. Another `image_size` resizes the tables of positions. Names and shapes are looked at before
    any value is read.

    Args:
        path: `.safetensors`, or a PyTorch file of {'model': tensors, ...} or of the bare tensors.
        layout: one of `settings.layouts` to insist on it; `auto` takes what is there.
        vocabulary: token → id for a configuration, of the tokenizer that comes with the file; it may refuse the configuration, before
            values are read. Without it, special tokens have ids that mean nothing.
        values: False leaves the values in the file: the state is on the meta device.

    Raises:
        BadInput: a file that is damaged, holds objects, has an unsupported layout, an entry of unknown meaning or
            too few of them; a setting that is unknown or that the file decides.
    """
    given = settings or {}
    config, _, report = _read(path, layout, given, None, values=False)
    return _read(path, layout, given, vocabulary(config, report), values=values)


def _read(
    path: Path, layout: str, settings: Mapping[str, Any], vocab: Mapping[str, int] | None, *, values: bool
) -> tuple[Any, dict[str, Tensor], Report]:
    report = Report()
    tensors = _entries(path, report, values)
    found = _layout(path, tensors, layout)
    report.layout, report.family = found.name, found.family
    config, state = families.get(found.family).translate(Published(path, tensors, found, report, settings, vocab))
    report.mapped = len(state)
    return config, state, report


def grid_of(path: Path, positions: int) -> int:
    """Patches on a side of a ViT with so many positions, the first of which is no patch; :class:`BadInput` if they make no square."""
    patches = positions - 1
    grid = math.isqrt(max(patches, 0))
    if not grid or grid * grid != patches:
        raise BadInput(f"{path} cannot be imported", f"its {patches} patches make no square", "give a model of square images")
    return grid


def require_usual_heads(path: Path, tower: str, width: int) -> None:
    """:class:`BadInput` unless the columns of `tower` can be shared by heads of the usual width."""
    if not width or width % HEAD_WIDTH:
        why = f"{width} columns are no multiple of {HEAD_WIDTH}, and the file does not say how many heads share them"
        raise BadInput(f"{path}: how many {tower} heads?", why, f"give --set settings.{tower}_heads=N")


def listed(names: list[str], limit: int = 8) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _entries(path: Path, report: Report, values: bool) -> dict[str, Tensor]:
    """The tensors of a file by their published names, prefixes of wrappers removed and old LayerNorm names renewed."""
    content = read_file(path, values=values)
    if isinstance(content.get("model"), Mapping):
        for name in content:
            if name != "model":
                report.ignore("training state, not weights", str(name))
        content = dict(content["model"])
    names = [str(name) for name in content]
    if not content:
        raise BadInput(f"{path} holds no model", "it is empty", FIX)
    if all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    tensors: dict[str, Tensor] = {}
    for name, value in zip(map(renewed, names), content.values(), strict=True):
        if not isinstance(value, Tensor):
            raise BadInput(f"{path} holds no model", f"its entry {name} is a {type(value).__name__}, not a tensor", FIX)
        if value.layout is not torch.strided or (values and value.is_meta):
            raise BadInput(
                f"{path} holds no model", f"its entry {name} is sparse, or has a shape but no values", "save it as a dense tensor"
            )
        if name in tensors:
            raise BadInput(f"{path} is ambiguous", f"it holds {name} under an old and a new name", "remove one of them from the file")
        tensors[name] = value
    return tensors


def _layout(path: Path, tensors: Mapping[str, Any], wanted: str) -> Layout:
    """The layout of a file, by what the names of its entries begin with."""
    found = next((layout for layout in LAYOUTS if all(any(name.startswith(begin) for name in tensors) for begin in layout.begins)), None)
    if found is None:
        first = sorted({name.partition(".")[0] for name in tensors})
        raise BadInput(f"{path} is no X-VLM file, nor a BLIP's", f"its names begin with {', '.join(first[:8])}", FIX)
    if wanted not in ("auto", found.name):
        raise BadInput(f"{path} is not of the {wanted} layout", f"its names are those of {found.name}", "leave --layout out")
    return found
