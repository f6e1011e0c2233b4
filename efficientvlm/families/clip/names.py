"""Where the parts of a CLIP and a SigLIP lie in transformers' files."""

from __future__ import annotations

TOWER = {"position_embedding": "embeddings.position_embedding.weight", "layers": "encoder.layers"}
IMAGES = TOWER | {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
TEXTS = TOWER | {"token_embedding": "embeddings.token_embedding", "post_norm": "final_layer_norm"}
LAYER = {
    "attention": "self_attn",
    **{f":{role}": f"{role}_proj" for role in ("q", "k", "v", "out")},
    "attention_norm": "layer_norm1",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "ffn_norm": "layer_norm2",
}
