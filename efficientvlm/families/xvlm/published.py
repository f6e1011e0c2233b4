"""Published X-VLM and EfficientVLM files: configuration from the shapes, and an account of every entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.towers.swin import resize_bias_table
from efficientvlm.families.weights import AGAIN, finite, read_file, renewed
from efficientvlm.families.xvlm.config import PRETRAIN_HEADS, XVLMConfig, check_sizes, checked_settings
from efficientvlm.families.xvlm.names import first_fusion_layer, published_name, swin_depths
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.settings.stages import LAYOUTS

HEAD_WIDTH = 64
MOST_STAGES = 8
LEAST_WINDOW = 3
"""Tokens on a side of the smallest windows whose bias tables can be resized: a spline needs four offsets."""
MADE_ANEW = ("position_ids", ".relative_position_index", ".attn_mask")
OTHER_TASKS = {"cls_head": "NLVR2", "ta_head": "NLVR2 pre-training"}
TIED = "cls.predictions.decoder."
FIX = "give a published X-VLM or EfficientVLM file: pre-training, retrieval or VQA"
HEADS = {"itc": ("vision_proj.", "text_proj.", "temp"), "itm": ("itm_head.",), "mlm": ("mlm_head.",), "box": ("box_head.",)}
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
    path: Path, layout: str = "auto", settings: Mapping[str, Any] | None = None, *, values: bool = True
) -> tuple[XVLMConfig, dict[str, Tensor], Report]:
    """Configuration and complete float32 state of a published X-VLM file with a CLIP ViT or a Swin, and what became of its entries.

    Widths, layers and vocabulary follow from the shapes. `settings` says what shapes do not: heads (64 columns each by default),
    `local_attention_depth` (a third of the vision layers), norm constants. Of a Swin, the heads follow too, and the image size
    from its windows, of which the last stage has one. Another `image_size` resizes the position embedding, or a Swin's bias tables.

    Args:
        path: `.safetensors`, or a PyTorch file of {'model': tensors, ...} or of the bare tensors.
        layout: pretrain, retrieval or vqa to insist on it; `auto` takes what is there.
        values: False leaves the values in the file: the state is on the meta device.

    Raises:
        BadInput: a file that is damaged, holds objects, has an unsupported layout, an entry of unknown meaning or
            too few of them; a setting that is unknown or that the file decides.
    """
    given = checked_settings(settings or {}, FREE, "follows from the file")
    report = Report()
    tensors = _entries(path, report, values)
    report.layout = _layout(path, tensors, layout)
    state = _translate(path, tensors, report)
    native, config = _config_of(path, state, swin_depths(tensors), given, report)
    _require_complete(path, state, native)
    if config.image_size != native.image_size:
        state |= _resized(state, config)
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


def _layout(path: Path, tensors: Mapping[str, Any], wanted: str) -> str:
    first = {name.partition(".")[0] for name in tensors}
    for head, task in OTHER_TASKS.items():
        if head in first:
            raise BadInput(f"{path} cannot be imported", f"{head} belongs to the {task} layout, which is not supported for now", FIX)
    if "text_decoder" in first and "text_encoder" not in first:
        raise BadInput(f"{path} cannot be imported", "it has only a text decoder: captioning is not supported for now", FIX)
    if not {"vision_encoder", "text_encoder"} <= first:
        raise BadInput(f"{path} is no X-VLM file", f"its names begin with {', '.join(sorted(first)[:8])}", FIX)
    found = next(called for part, called in LAYOUTS.items() if any(name.startswith(part) for name in tensors))
    if wanted not in ("auto", found):
        raise BadInput(f"{path} is not of the {wanted} layout", f"its names are those of {found}", "leave --layout out")
    return found


def _translate(path: Path, tensors: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """The state under our names; every entry is mapped, or ignored and reported."""
    first_fusion = first_fusion_layer(tensors)
    if first_fusion is None:
        raise BadInput(f"{path} is no X-VLM file", "none of its text layers has cross-attention", FIX)
    depths = swin_depths(tensors)
    if len(depths) == 1 or len(depths) > MOST_STAGES or 0 in depths:
        raise BadInput(f"{path} cannot be imported", f"its Swin has stages of {depths} layers", FIX)
    state: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if reason := _reason(path, name, tensors):
            report.ignore(reason, name)
        elif (ours := published_name(name, first_fusion, depths)) is None:
            unknown.append(name)
        elif ours in state:
            raise BadInput(f"{path} is ambiguous", f"it holds {name} with and without a prefix", "remove one of them from the file")
        elif not (tensor.is_floating_point() and finite(tensor)):
            raise BadInput(f"{path} is damaged", f"{name} is not all finite floats", AGAIN)
        else:
            state[ours] = tensor.detach().to(torch.float32).contiguous()
    if unknown:
        raise BadInput(f"{path} has {len(unknown)} entries of unknown meaning", _listed(unknown), FIX)
    return state


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
    if twin not in tensors:
        raise BadInput(f"{path} is incomplete", f"{name} is there, but not {twin}", AGAIN)
    if not tensors[name].is_meta and not torch.equal(tensors[name], tensors[twin]):
        raise BadInput(
            f"{path} cannot be imported", f"{name} differs from {twin}, and here the two are one tensor", "give a model that ties them"
        )
    return "second copy of a tied tensor, found equal"


def _config_of(
    path: Path, state: Mapping[str, Tensor], depths: list[int], given: Mapping[str, Any], report: Report
) -> tuple[XVLMConfig, XVLMConfig]:
    """The configuration of the network in the file, and that of what is made of it."""

    def shape(name: str, dims: int = 2) -> torch.Size:
        if name not in state or state[name].dim() != dims:
            raise BadInput(f"{path} is incomplete", f"no {dims}-dimensional tensor for {name}", FIX)
        return state[name].shape

    def layers(tower: str) -> int:
        return 1 + max((int(name.split(".")[2]) for name in state if name.startswith(f"{tower}.layers.")), default=-1)

    vocab_size, text_width = shape("text.embeddings.word.weight")
    known: dict[str, Any] = {
        **(_swin_of(path, shape, depths) if depths else _vit_of(path, shape)),
        "vocab_size": vocab_size,
        "max_positions": shape("text.embeddings.position.weight")[0],
        "type_vocab_size": shape("text.embeddings.token_type.weight")[0],
        "text_width": text_width,
        "text_intermediate": shape("fusion.layers.0.ffn.fc1.weight")[0],
        "heads": [head for head in PRETRAIN_HEADS if any(name.startswith(HEADS[head]) for name in state)],
        **{f"{tower}_layers": layers(tower) for tower in ("vision", "text", "fusion", "decoder")},
    }
    if "itc" in known["heads"]:
        known["embed_dim"] = shape("vision_proj.weight")[0]
    guesses = {"text_heads": text_width // HEAD_WIDTH}
    if not depths:
        if "vision_drop_path" in given:
            raise BadInput("settings.vision_drop_path cannot be set", "it is of Swin towers, and the file has another", "leave it out")
        guesses |= {"vision_heads": known["vision_width"] // HEAD_WIDTH, "local_attention_depth": max(1, known["vision_layers"] // 3)}
    elif fixed := sorted({"vision_heads", "local_attention_depth"} & set(given)):
        raise BadInput(f"settings.{fixed[0]} cannot be set", "the file has a Swin tower, whose shapes decide", "leave it out")
    report.assumed = {name: guess for name, guess in guesses.items() if name not in given}
    for tower in ("vision", "text"):
        width, name = known[f"{tower}_width"], f"{tower}_heads"
        if name in report.assumed and (not width or width % HEAD_WIDTH):
            why = f"{width} columns are no multiple of {HEAD_WIDTH}, and the file does not say how many heads share them"
            raise BadInput(f"{path}: how many {tower} heads?", why, f"give --set settings.{name}=N")
    native = XVLMConfig(**{**guesses, **known, **given, "image_size": known["image_size"]})
    wanted = {name: given[name] for name in ("image_size",) if name in given}
    if wanted and depths:
        wanted["vision_window"] = max(1, wanted["image_size"] // native.stride)
        if min(native.vision_window, wanted["vision_window"]) < LEAST_WINDOW and wanted["image_size"] != native.image_size:
            why = f"its windows would have {wanted['vision_window']} tokens on a side instead of {native.vision_window}"
            raise BadInput(f"image_size is {wanted['image_size']}", why, f"{LEAST_WINDOW * native.stride} pixels or more can be resized to")
    return check_sizes(native), check_sizes(native.copy(**wanted))


def _vit_of(path: Path, shape: Callable[..., torch.Size]) -> dict[str, Any]:
    """What the shapes of a CLIP ViT say."""
    patches = shape("vision.position_embedding")[0] - 1
    grid = math.isqrt(max(patches, 0))
    if not grid or grid * grid != patches:
        raise BadInput(f"{path} cannot be imported", f"its {patches} patches make no square", "give a model of square images")
    width, _, patch_size, _ = shape("vision.patch_embedding.weight", 4)
    neurons = shape("vision.layers.0.ffn.fc1.weight")[0]
    return {"image_size": grid * patch_size, "patch_size": patch_size, "vision_width": width, "vision_intermediate": neurons}


def _swin_of(path: Path, shape: Callable[..., torch.Size], depths: list[int]) -> dict[str, Any]:
    """What the shapes of a Swin say; the last stage is one window, as in the published configurations."""
    width, _, patch_size, _ = shape("vision.patch_embedding.weight", 4)
    last = f"vision.layers.{sum(depths) - 1}"
    offsets, heads = shape(f"{last}.attention.bias_table")
    side, stages = math.isqrt(offsets), len(depths)
    if side**2 != offsets or side % 2 == 0:
        raise BadInput(f"{path} cannot be imported", f"a bias table of {offsets} rows is of no square window", AGAIN)
    window = (side + 1) // 2
    return {
        "image_size": window * patch_size << (stages - 1),
        "patch_size": patch_size,
        "vision_width": width << (stages - 1),
        "vision_heads": heads,
        "vision_intermediate": shape(f"{last}.ffn.fc1.weight")[0],
        "vision_depths": depths,
        "vision_window": window,
        "vision_activation": "gelu",
    }


def _resized(state: Mapping[str, Tensor], config: XVLMConfig) -> dict[str, Tensor]:
    """The tables of positions for the image size of `config`."""
    if config.vision_depths:
        tables = {name: table for name, table in state.items() if name.endswith(".bias_table")}
        return {name: resize_bias_table(table, 2 * config.vision_window - 1) for name, table in tables.items()}
    return {"vision.position_embedding": resize_positions(state["vision.position_embedding"], config.image_size // config.patch_size)}


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
