"""Where the parts of a BLIP lie in transformers' files."""

from __future__ import annotations

IMAGES = {
    **{role: f"embeddings.{role}" for role in ("class_embedding", "patch_embedding", "position_embedding")},
    "layers": "encoder.layers",
    "post_norm": "post_layernorm",
}
POSITIONS = "vision_model.embeddings.position_embedding"
IMAGE_LAYER = {
    **{"attention": "self_attn", ":qkv": "qkv", ":out": "projection", "attention_norm": "layer_norm1"},
    **{"fc1": "mlp.fc1", "fc2": "mlp.fc2", "ffn_norm": "layer_norm2"},
}
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "norm": "LayerNorm"}
TEXT_LAYER = {
    **{":q": "self.query", ":k": "self.key", ":v": "self.value", ":out": "output.dense"},
    **{"attention_norm": "attention.output.LayerNorm"},
    **{"cross_attention": "crossattention", "cross_attention_norm": "crossattention.output.LayerNorm"},
    **{"fc1": "intermediate.dense", "fc2": "output.dense", "ffn_norm": "output.LayerNorm"},
}
HEAD = {"dense": "transform.dense", "norm": "transform.LayerNorm", "output_weight": "decoder.weight", "output_bias": "decoder.bias"}
LAYERS = {"vision": "vision_model.encoder.layers", "text": "text_encoder.encoder.layer", "decoder": "text_decoder.bert.encoder.layer"}
PREDICTIONS = "text_decoder.cls.predictions"
