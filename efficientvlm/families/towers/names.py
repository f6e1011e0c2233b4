"""Names of tensors in files of CLIP, DINOv2, ViT and BERT, and the roles that they have in our towers."""

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
VIT_ATTENTION = {
    **{f"attention.attention.{theirs}": f"attention.{theirs[0]}" for theirs in ("query", "key", "value")},
    "attention.output.dense": "attention.out",
    **{f"attention.{part}_proj": f"attention.{'out' if part == 'o' else part}" for part in "qkvo"},
}
DINOV2_LAYER = VIT_ATTENTION | {
    "norm1": "attention_norm",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
}
VIT_LAYER = VIT_ATTENTION | {
    "layernorm_before": "attention_norm",
    "layernorm_after": "ffn_norm",
    **dict.fromkeys(("intermediate.dense", "mlp.fc1"), "ffn.fc1"),
    **dict.fromkeys(("output.dense", "mlp.fc2"), "ffn.fc2"),
}
VIT = {
    "embeddings.patch_embeddings.projection.weight": "patch_embedding.weight",
    **{f"layernorm.{kind}": f"post_norm.{kind}" for kind in BOTH},
}
LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d{1,3})\.(.+)\.(weight|bias)$")


def clip_name(name: str) -> str | None:
    """Role of a tensor of a CLIP vision tower; None for any other."""
    return CLIP.get(name) or _in_layer(name, CLIP_LAYER)


def dinov2_name(name: str) -> str | None:
    """Role of a tensor of a DINOv2, older and newer names alike; None for any other and for what has to be folded or reshaped."""
    return VIT.get(name) or _in_layer(name, DINOV2_LAYER)


def vit_name(name: str) -> str | None:
    """Role of a tensor of a ViT, older and newer names alike; None for any other and for what has to be reshaped."""
    return VIT.get(name) or _in_layer(name, VIT_LAYER)


def bert_name(name: str) -> str | None:
    """`embeddings.*`, `layers.N.*` or, of the prediction head, `head.*`, for a tensor of a BERT without prefix; None for any other."""
    return BERT.get(name) or _in_layer(name, BERT_LAYER)


def _in_layer(name: str, parts: Mapping[str, str]) -> str | None:
    found = LAYER.match(name)
    return f"layers.{found[1]}.{parts[found[2]]}.{found[3]}" if found and found[2] in parts else None
