"""Tensor names of CLIP, DINOv2, BERT and the published X-VLM code, in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
LAYER = re.compile(r"encoder\.layers?\.(\d+)\.(.+)\.(weight|bias)$")
CROSS = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")


def clip_name(name: str) -> str | None:
    """Our name, below `vision.`, of a tensor of a CLIP vision tower; None for any other."""
    return CLIP.get(name) or _in_layer(name, CLIP_LAYER)


def dinov2_name(name: str) -> str | None:
    """Our name, below `vision.`, of a tensor of a DINOv2, older and newer names alike; None for any other and for what has to be folded."""
    return DINOV2.get(name) or _in_layer(name, DINOV2_LAYER)


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


def published_name(name: str, first_fusion: int) -> str | None:
    """Our name of a tensor of a published X-VLM or EfficientVLM file (pre-training, retrieval, VQA); None for any other."""
    tower, _, rest = name.partition(".")
    if tower == "vision_encoder":
        return f"vision.{found}" if (found := clip_name(rest)) else None
    if tower == "text_encoder":
        return stack_name(found, first_fusion) if (found := bert_name(rest.removeprefix("bert."))) else None
    if tower == "text_decoder":
        found = bert_name(rest.removeprefix("bert."))
        return None if found is None else f"decoder_{found}" if found.startswith("head.") else f"decoder.{found}"
    if tower in ("vision_proj", "text_proj", "temp", "itm_head"):
        return name
    return f"box_head.{rest}" if tower == "bbox_head" else None


def first_fusion_layer(names: Mapping[str, object]) -> int | None:
    """Number of the first text layer with cross-attention in a published file."""
    return min((int(found[1]) for found in map(CROSS.match, names) if found), default=None)


def _in_layer(name: str, parts: Mapping[str, str]) -> str | None:
    found = LAYER.match(name)
    return f"layers.{found[1]}.{parts[found[2]]}.{found[3]}" if found and found[2] in parts else None
