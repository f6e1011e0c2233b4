"""Published X-VLM and EfficientVLM files: configuration from the shapes, and an account of every entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.weights import AGAIN, finite, read_file, renewed
from efficientvlm.families.xvlm.config import XVLMConfig, checked_settings
from efficientvlm.families.xvlm.names import first_fusion_layer, published_name, swin_depths
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.families.xvlm.pairs import first_copy, second_copies
from efficientvlm.families.xvlm.resize import tables_at
from efficientvlm.families.xvlm.shapes import FIX, config_of
from efficientvlm.settings.layouts import LAYOUTS, Layout

MOST_STAGES = 8
MADE_ANEW = ("position_ids", ".relative_position_index", ".attn_mask")
TIED = "cls.predictions.decoder."
FREE = (
    *("vision_heads", "text_heads", "local_attention_depth", "image_size", "image_mean", "image_std", "vision_eps", "text_eps", "dropout"),
    *("answers", "rank_top", "vision_drop_path"),
)


@dataclass
class Report:
    """What became of the entries of a published file: how many were mapped, and which were ignored, by reason.

    `assumed` are configuration fields that the file cannot tell and nobody gave.
    """

    layout: str = ""
    mapped: int = 0
    ignored: dict[str, list[str]] = field(default_factory=dict)
    assumed: dict[str, int] = field(default_factory=dict)

    def ignore(self, reason: str, name: str) -> None:
        self.ignored.setdefault(reason, []).append(name)


def read_published(
    path: Path,
    layout: str = "auto",
    settings: Mapping[str, Any] | None = None,
    *,
    values: bool = True,
    check: Callable[[XVLMConfig], None] = lambda config: None,
) -> tuple[XVLMConfig, dict[str, Tensor], Report]:
    """Configuration and complete float32 state of a published X-VLM file with a CLIP ViT or a Swin, and what became of its entries.

    Widths, layers and vocabulary follow from the shapes. `settings` says what shapes do not: heads (64 columns each by default),
    `local_attention_depth` (a third of the vision layers), norm constants. Of a Swin, the heads follow too, and the image size
    from its windows, of which the last stage has one. Another `image_size` resizes the position embedding, or a Swin's bias tables.
    Names and shapes are looked at before any value is read.

    Args:
        path: `.safetensors`, or a PyTorch file of {'model': tensors, ...} or of the bare tensors.
        layout: one of `settings.layouts` to insist on it; `auto` takes what is there.
        values: False leaves the values in the file: the state is on the meta device.
        check: may refuse the configuration, before values are read.

    Raises:
        BadInput: a file that is damaged, holds objects, has an unsupported layout, an entry of unknown meaning or
            too few of them; a setting that is unknown or that the file decides.
    """
    given = checked_settings(settings or {}, FREE, "follows from the file")
    config, state, report = _read(path, layout, given, values=False)
    check(config)
    return _read(path, layout, given, values=True) if values else (config, state, report)


def _read(path: Path, layout: str, given: Mapping[str, Any], *, values: bool) -> tuple[XVLMConfig, dict[str, Tensor], Report]:
    report = Report()
    tensors = _entries(path, report, values)
    found = _layout(path, tensors, layout)
    report.layout = found.name
    state = _translate(path, tensors, found, report)
    native, config, report.assumed = config_of(path, state, swin_depths(tensors), given, found.images)
    _require_complete(path, state, native)
    if config.image_size != native.image_size:
        state |= tables_at(state, config)
    report.mapped = len(state)
    return config, state, report


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
        if name in tensors:
            raise BadInput(f"{path} is ambiguous", f"it holds {name} under an old and a new name", "remove one of them from the file")
        tensors[name] = value
    return tensors


def _layout(path: Path, tensors: Mapping[str, Any], wanted: str) -> Layout:
    """The layout of a file, by what the names of its entries begin with."""
    first = sorted({name.partition(".")[0] for name in tensors})
    found = next((layout for layout in LAYOUTS if all(any(name.startswith(begin) for name in tensors) for begin in layout.begins)), None)
    if found is None or "vision_encoder" not in first:
        raise BadInput(f"{path} is no X-VLM file", f"its names begin with {', '.join(first[:8])}", FIX)
    if wanted not in ("auto", found.name):
        raise BadInput(f"{path} is not of the {wanted} layout", f"its names are those of {found.name}", "leave --layout out")
    return found


def _translate(path: Path, tensors: Mapping[str, Tensor], layout: Layout, report: Report) -> dict[str, Tensor]:
    """The state under our names; every entry is mapped, or ignored and reported."""
    first_fusion = first_fusion_layer(tensors, layout.stack)
    if first_fusion is None:
        raise BadInput(f"{path} is no X-VLM file", "none of its text layers has cross-attention", FIX)
    depths = swin_depths(tensors)
    if len(depths) == 1 or len(depths) > MOST_STAGES or 0 in depths:
        raise BadInput(f"{path} cannot be imported", f"its Swin has stages of {depths} layers", FIX)
    state: dict[str, Tensor] = {}
    called: dict[str, str] = {}
    unknown = []
    for name, tensor in tensors.items():
        if reason := _reason(path, name, tensors):
            report.ignore(reason, name)
        elif (ours := published_name(name, first_fusion, depths, layout.stack)) is None:
            unknown.append(name)
        elif ours in state:
            raise BadInput(f"{path} is ambiguous", f"it holds {name} with and without a prefix", "remove one of them from the file")
        elif not (tensor.is_floating_point() and finite(tensor)):
            raise BadInput(f"{path} is damaged", f"{name} is not all finite floats", AGAIN)
        else:
            state[ours], called[ours] = tensor.detach().to(torch.float32).contiguous(), name
    if unknown:
        raise BadInput(f"{path} has {len(unknown)} entries of unknown meaning", _listed(unknown), FIX)
    for copy in second_copies(state) if layout.images > 1 else ():
        _require_equal(path, tensors, called[copy], called.get(first_copy(copy), ""), "a model whose pairs of layers share them")
        report.ignore("second copy of keys or values that two layers have in common, found equal", called[copy])
        del state[copy]
    return state


def _require_equal(path: Path, tensors: Mapping[str, Tensor], name: str, twin: str, fix: str) -> None:
    """:class:`BadInput` unless `name` and `twin`, which are one tensor here, are there and equal, as far as their values are known."""
    if twin not in tensors:
        raise BadInput(f"{path} is incomplete", f"{name} is there, but not its twin{twin and f' {twin}'}", AGAIN)
    ours, theirs = tensors[name], tensors[twin]
    if ours.shape != theirs.shape or not (ours.is_meta or torch.equal(ours, theirs)):
        raise BadInput(f"{path} cannot be imported", f"{name} differs from {twin}, and here the two are one tensor", f"give {fix}")


def _reason(path: Path, name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Why an entry is left out; None if it is not."""
    if name.endswith(MADE_ANEW):
        return "numbers of positions and windows, made anew"
    if name.startswith("l0_module."):
        return "gates of the published pruning; the weights are dense and stay so"
    if ".pooler." in name:
        return "BERT's pooler, unused in X-VLM"
    tower, tied, kind = name.partition(TIED)
    if not tied:
        return None
    twins = [f"{tower}bert.embeddings.word_embeddings.weight", f"{tower}embeddings.word_embeddings.weight"]
    twin = f"{tower}cls.predictions.bias" if kind == "bias" else next((twin for twin in twins if twin in tensors), twins[0])
    _require_equal(path, tensors, name, twin, "a model that ties them")
    return "second copy of a tied tensor, found equal"


def _require_complete(path: Path, state: Mapping[str, Tensor], config: XVLMConfig) -> None:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in XVLMModel(config).state_dict().items()}
    if missing := sorted(set(expected) - set(state)):
        raise BadInput(f"{path} lacks {len(missing)} tensors", _listed(missing), AGAIN)
    if surplus := sorted(set(state) - set(expected)):
        raise BadInput(f"{path} has {len(surplus)} tensors without a place", _listed(surplus), FIX)
    wrong = [f"{name} {list(state[name].shape)} instead of {list(shape)}" for name, shape in expected.items() if state[name].shape != shape]
    if wrong:
        raise BadInput(f"{path} has {len(wrong)} tensors of another shape", _listed(wrong), FIX)


def _listed(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
