"""Tensor names of CLIP, DINOv2, BERT and the published X-VLM code, in ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

BOTH = ("weight", "bias")
BERT_ATTENTION = {"self.query": ".q", "self.key": ".k", "self.value": ".v", "output.dense": ".out", "output.LayerNorm": "_norm"}
BERT_LAYER = {
    **{f"attention.{theirs}": f"attention{ours}" for theirs, ours in BERT_ATTENTION.items()},
    **{f"crossattention.{theirs}": f"cross_attention{ours}" for theirs, ours in BERT_ATTENTION.items()},
    "intermediate.dense": "ffn.fc1",
    "output.dense": "ffn.fc2",
    "output.LayerNorm": "ffn_norm",
}
BERT = {
    "embeddings.word_embeddings.weight": "embeddings.word.weight",
    "embeddings.position_embeddings.weight": "embeddings.position.weight",
    "embeddings.token_type_embeddings.weight": "embeddings.token_type.weight",
    **{f"embeddings.LayerNorm.{kind}": f"embeddings.norm.{kind}" for kind in BOTH},
    **{f"cls.predictions.transform.dense.{kind}": f"head.transform.{kind}" for kind in BOTH},
    **{f"cls.predictions.transform.LayerNorm.{kind}": f"head.norm.{kind}" for kind in BOTH},
    "cls.predictions.bias": "head.bias",
}
CLIP_LAYER = {
    **{f"self_attn.{part}_proj": f"attention.{part}" for part in ("q", "k", "v", "out")},
    "layer_norm1": "attention_norm",
    "layer_norm2": "ffn_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
CLIP = {
    **dict.fromkeys(("class_embedding", "embeddings.class_embedding"), "class_embedding"),
    **dict.fromkeys(("patch_embed.weight", "embeddings.patch_embedding.weight"), "patch_embedding.weight"),
    **dict.fromkeys(("pos_embed.weight", "embeddings.position_embedding.weight"), "position_embedding"),
    **{f"pre_layrnorm.{kind}": f"pre_norm.{kind}" for kind in BOTH},
    **{f"post_layernorm.{kind}": f"post_norm.{kind}" for kind in BOTH},
}
DINOV2_LAYER = {
    **{f"attention.attention.{theirs}": f"attention.{theirs[0]}" for theirs in ("query", "key", "value")},
    "attention.output.dense": "attention.out",
    **{f"attention.{part}_proj": f"attention.{'out' if part == 'o' else part}" for part in "qkvo"},
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
DINOV2 = {
    "embeddings.patch_embeddings.projection.weight": "patch_embedding.weight",
    **{f"layernorm.{kind}": f"post_norm.{kind}" for kind in BOTH},
}
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
LAYER = re.compile(r"encoder\.layers?\.(\d{1,3})\.(.+)\.(weight|bias)$")
CROSS = re.compile(r"(text_encoder|text_decoder)\.(?:bert\.)?encoder\.layer\.(\d{1,3})\.crossattention\.")


def clip_name(name: str) -> str | None:
    """Our name, below `vision.`, of a tensor of a CLIP vision tower; None for any other."""
    return CLIP.get(name) or _in_layer(name, CLIP_LAYER)


def dinov2_name(name: str) -> str | None:
    """Our name, below `vision.`, of a tensor of a DINOv2, older and newer names alike; None for any other and for what has to be folded."""
    return DINOV2.get(name) or _in_layer(name, DINOV2_LAYER)


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


def bert_name(name: str) -> str | None:
    """`embeddings.*`, `layers.N.*` or, of the prediction head, `head.*`, for a tensor of a BERT without prefix; None for any other."""
    return BERT.get(name) or _in_layer(name, BERT_LAYER)


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


def _in_layer(name: str, parts: Mapping[str, str]) -> str | None:
    found = LAYER.match(name)
    return f"layers.{found[1]}.{parts[found[2]]}.{found[3]}" if found and found[2] in parts else None
