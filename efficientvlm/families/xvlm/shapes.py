"""What the shapes in a published X-VLM file say of its network, and what has to be guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.published import FIX, HEAD_WIDTH, grid_of, require_usual_heads
from efficientvlm.families.weights import AGAIN
from efficientvlm.families.xvlm.config import CAPTION_HEAD, XVLMConfig, check_sizes
from efficientvlm.families.xvlm.resize import config_at

HEADS = {
    "itc": ("vision_proj.", "text_proj.", "temp"),
    "itm": ("itm_head.",),
    "mlm": ("mlm_head.",),
    "box": ("box_head.",),
    CAPTION_HEAD: ("lm_head.",),
}
HEADS_OF_TWO = {"compare": ("compare_head.",), "assign": ("assign_head.",)}
"""Head → what names of its tensors begin with. The second are of networks that read two images at a time."""


class Described(NamedTuple):
    """`native` is the configuration of the network in the file, `wanted` that of what is made of it; `assumed` was guessed."""

    native: XVLMConfig
    wanted: XVLMConfig
    assumed: dict[str, int]


def config_of(path: Path, state: Mapping[str, Tensor], depths: list[int], given: Mapping[str, Any], images: int = 1) -> Described:
    """The network that the `state` of a file, under our names, is of; a Swin's stages have `depths` layers.

    Args:
        given: settings that the file does not decide.
        images: how many the network reads at a time.

    Raises:
        BadInput: shapes of no network, or a setting that they decide.
    """

    def shape(name: str, dims: int = 2) -> torch.Size:
        if name not in state or state[name].dim() != dims:
            raise BadInput(f"{path} is incomplete", f"no {dims}-dimensional tensor for {name}", FIX)
        return state[name].shape

    def layers(tower: str) -> int:
        return 1 + max((int(name.split(".")[2]) for name in state if name.startswith(f"{tower}.layers.")), default=-1)

    heads = HEADS if images == 1 else HEADS_OF_TWO
    vocab_size, text_width = shape("text.embeddings.word.weight")
    known: dict[str, Any] = {
        **(_swin_of(path, shape, depths) if depths else _vit_of(path, shape)),
        "vocab_size": vocab_size,
        "max_positions": shape("text.embeddings.position.weight")[0],
        "type_vocab_size": shape("text.embeddings.token_type.weight")[0],
        "text_width": text_width,
        "text_intermediate": shape("fusion.layers.0.ffn.fc1.weight")[0],
        "heads": [head for head, begins in heads.items() if any(name.startswith(begins) for name in state)],
        "fusion_images": images,
        **{f"{tower}_layers": layers(tower) for tower in ("vision", "text", "fusion", "decoder")},
    }
    if "vision_proj.weight" in state:
        known["embed_dim"] = shape("vision_proj.weight")[0]
    guesses = {"text_heads": text_width // HEAD_WIDTH}
    if not depths:
        if "vision_drop_path" in given:
            raise BadInput("settings.vision_drop_path cannot be set", "it is of Swin towers, and the file has another", "leave it out")
        guesses |= {"vision_heads": known["vision_width"] // HEAD_WIDTH, "local_attention_depth": max(1, known["vision_layers"] // 3)}
    elif fixed := sorted({"vision_heads", "local_attention_depth"} & set(given)):
        raise BadInput(f"settings.{fixed[0]} cannot be set", "the file has a Swin tower, whose shapes decide", "leave it out")
    assumed = {name: guess for name, guess in guesses.items() if name not in given}
    for tower in ("vision", "text"):
        if f"{tower}_heads" in assumed:
            require_usual_heads(path, tower, known[f"{tower}_width"])
    native = XVLMConfig(**{**guesses, **known, **given, "image_size": known["image_size"]})
    check_sizes(native)
    return Described(native, config_at(native, given.get("image_size", native.image_size)), assumed)


def _vit_of(path: Path, shape: Callable[..., torch.Size]) -> dict[str, Any]:
    """What the shapes of a CLIP ViT say."""
    grid = grid_of(path, shape("vision.position_embedding")[0])
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
