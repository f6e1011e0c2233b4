"""Tensor names of the published X-VLM code, in ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from efficientvlm.families.towers.names import BOTH, bert_name, clip_name

SWIN_LAYER = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "attn.relative_position_bias": "attention.bias",
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
SWIN = {
    **{f"patch_embed.proj.{kind}": f"patch_embedding.{kind}" for kind in BOTH},
    **{f"patch_embed.norm.{kind}": f"patch_norm.{kind}" for kind in BOTH},
    **{f"norm.{kind}": f"post_norm.{kind}" for kind in BOTH},
}
STAGE = re.compile(r"(?:vision_encoder\.)?layers\.(\d{1,3})\.(?:blocks\.(\d{1,3})\.(.+)(\.weight|\.bias|_table)|downsample\.(.+))$")
CROSS = re.compile(r"(text_encoder|text_decoder)\.(?:bert\.)?encoder\.layer\.(\d{1,3})\.crossattention\.")


def swin_name(name: str, depths: Sequence[int]) -> str | None:
    """Our name, below `vision.`, of a tensor of a Swin whose stages have `depths` layers; None for any other."""
    found = STAGE.match(name)
    if found is None:
        return SWIN.get(name)
    if found[5]:
        return f"merges.{found[1]}.{found[5]}"
    ours = SWIN_LAYER.get(found[3])
    return f"layers.{sum(depths[: int(found[1])]) + int(found[2])}.{ours}{found[4]}" if ours else None


def swin_depths(names: Iterable[str]) -> list[int]:
    """Layers in each stage of the Swin in a published file; none if its vision tower is another."""
    blocks: dict[int, int] = {}
    for found in map(STAGE.match, names):
        if found and found[2]:
            stage = int(found[1])
            blocks[stage] = max(blocks.get(stage, 0), int(found[2]) + 1)
    return [blocks.get(stage, 0) for stage in range(max(blocks, default=-1) + 1)]


def stack_name(found: str, first_fusion: int) -> str:
    """What :func:`bert_name` gives, put into the text tower or, from layer `first_fusion` on, into the fusion tower."""
    part, _, tail = found.partition(".")
    if part == "layers":
        number, _, tail = tail.partition(".")
        layer = int(number)
        return f"text.layers.{layer}.{tail}" if layer < first_fusion else f"fusion.layers.{layer - first_fusion}.{tail}"
    return f"mlm_head.{tail}" if part == "head" else f"text.{found}"


def published_name(name: str, first_fusion: int, depths: Sequence[int] = (), stack: str = "text_encoder") -> str | None:
    """Our name of a tensor of a published X-VLM or EfficientVLM file, whose `stack` has the text and fusion layers; None for any other."""
    tower, _, rest = name.partition(".")
    if tower == "vision_encoder":
        found = swin_name(rest, depths) if depths else clip_name(rest)
        return f"vision.{found}" if found else None
    if tower == stack:
        ours = stack_name(found, first_fusion) if (found := bert_name(rest.removeprefix("bert."))) else None
        return ours.replace("mlm_head.", "lm_head.") if ours and stack == "text_decoder" else ours  # it says the next token
    if tower == "text_decoder":
        found = bert_name(rest.removeprefix("bert."))
        return None if found is None else f"decoder_{found}" if found.startswith("head.") else f"decoder.{found}"
    if tower in ("vision_proj", "text_proj", "temp", "itm_head"):
        return name
    ours = {"bbox_head": "box_head", "cls_head": "compare_head", "ta_head": "assign_head"}.get(tower)
    return f"{ours}.{rest}" if ours else None


def first_fusion_layer(names: Mapping[str, object], stack: str = "text_encoder") -> int | None:
    """Number of the first layer with cross-attention in the `stack` of a published file."""
    return min((int(found[2]) for found in map(CROSS.match, names) if found and found[1] == stack), default=None)
