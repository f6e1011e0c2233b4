"""Tiny networks every compression test runs on; a new family is one more line."""

from __future__ import annotations

from typing import Any

import torch
from toy_family import ToyConfig, ToyModel
from transformers import CLIPTextConfig, Dinov2Config, SiglipTextConfig, SwinConfig, ViTConfig

from efficientvlm import families
from efficientvlm.examples.cross_encoder import CrossEncoderConfig, CrossEncoders
from efficientvlm.families.blip.config import (
    BlipAnswerConfig,
    BlipCaptionConfig,
    BlipComparisonConfig,
    BlipPretrainingConfig,
    BlipRetrievalConfig,
)
from efficientvlm.families.clip.config import SlicedCLIPConfig, SlicedSiglipConfig
from efficientvlm.families.dual.config import DualConfig
from efficientvlm.families.structure import Layered
from efficientvlm.families.xvlm.config import XVLMConfig


def tiny_xvlm(**changes: Any) -> XVLMConfig:
    sizes: dict[str, Any] = dict(
        image_size=16,
        patch_size=8,
        vision_width=16,
        vision_layers=2,
        vision_heads=4,
        vision_intermediate=6,
        text_width=24,
        text_layers=2,
        fusion_layers=2,
        decoder_layers=1,
        text_heads=3,
        text_intermediate=7,
        vocab_size=20,
        max_positions=16,
        heads=[],
        local_attention_depth=1,
        dropout=0.0,
        initializer_range=0.3,
    )
    return XVLMConfig(**sizes | changes)


def tiny_swin(**changes: Any) -> XVLMConfig:
    """Windows of four by four tokens: four of them in the first stage, every second layer shifted, and one in the last."""
    sizes = dict(image_size=32, patch_size=4, vision_layers=6, vision_depths=[4, 2], vision_window=4, vision_activation="gelu")
    return tiny_xvlm(**sizes | changes)


def tiny_pairs(**changes: Any) -> XVLMConfig:
    """Two images at a time: fusion layers in pairs, whose keys and values are common."""
    return tiny_xvlm(**{"fusion_images": 2, "fusion_layers": 4, "decoder_layers": 0, "heads": ["compare"]} | changes)


VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=6, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, initializer_factor=3.0
)
TEXT: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=7, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=12, vocab_size=20,
    bos_token_id=3, eos_token_id=1, pad_token_id=0, initializer_factor=3.0,
)  # fmt: skip


def tiny_clip(**changes: Any) -> SlicedCLIPConfig:
    text, vision = {**TEXT, "projection_dim": 8}, {**VISION, "projection_dim": 8}
    return SlicedCLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=3.0, **changes)


def tiny_siglip(**changes: Any) -> SlicedSiglipConfig:
    text, vision = ({k: v for k, v in part.items() if k != "initializer_factor"} for part in (TEXT, VISION))
    return SlicedSiglipConfig(text_config=text | {"projection_size": 16}, vision_config=vision, **changes)


def tiny_blip(kind: Any, **changes: Any) -> Any:
    """Towers of different width, as transformers' own class cannot have them where it answers questions."""
    vision = {k: v for k, v in VISION.items() if k != "initializer_factor"} | {"initializer_range": 0.3}
    text = {k: v for k, v in TEXT.items() if k != "initializer_factor"} | {"initializer_range": 0.3, "sep_token_id": 2}
    return kind(vision_config=vision, text_config=text, image_text_hidden_size=8, **changes)


BACKBONE: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
SWIN: dict[str, Any] = dict(embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=2, image_size=16, patch_size=2, mlp_ratio=0.5)
CONVNEXT: dict[str, Any] = dict(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=16, layer_scale_init_value=0.5)


def tiny_dual(backbone: Any, kind: Any = DualConfig, **changes: Any) -> Any:
    text = {**TEXT, "projection_dim": 8} if kind is DualConfig else {k: v for k, v in TEXT.items() if k != "initializer_factor"}
    text |= {} if kind is DualConfig else {"projection_size": 8}
    parts = {"text_config": (CLIPTextConfig if kind is DualConfig else SiglipTextConfig)(**text), "vision_config": backbone}
    config = kind(**parts, projection_dim=8, initializer_factor=3.0, **changes)
    config.vision_config = config.backbone.check(backbone, "the test")
    return config


CONFIGS: dict[str, Any] = {
    "toy": ToyConfig(),
    "cross_encoder": CrossEncoderConfig(image_size=16, patch_size=8, width=16, neurons=6, vocab_size=20, initializer_range=0.3),
    "xvlm": tiny_xvlm(),
    "xvlm-swin": tiny_swin(),
    "xvlm-caption": tiny_xvlm(decoder_layers=0, heads=["lm"]),
    "xvlm-two-images": tiny_pairs(),
    "xvlm-grounding": tiny_xvlm(decoder_layers=0, heads=["box"]),
    "clip": tiny_clip(),
    "siglip": tiny_siglip(),
    "siglip-projected": tiny_siglip().with_sizes({"vision": Layered(8, 2, 5)}),
    "dual-vit": tiny_dual(ViTConfig(**BACKBONE, intermediate_size=6, initializer_range=0.3), image_pooling="pooler"),
    "dual-dinov2": tiny_dual(Dinov2Config(**BACKBONE, mlp_ratio=1, initializer_range=0.3)),
    "dual-swin": tiny_dual(SwinConfig(**SWIN, initializer_range=0.3), image_pooling="mean"),
    "blip-qa": tiny_blip(BlipAnswerConfig),
    "blip-qa-crossing-once": tiny_blip(BlipAnswerConfig, cross_layers={"text": [1], "decoder": [1]}),
    "blip-caption": tiny_blip(BlipCaptionConfig),
    "blip-retrieval": tiny_blip(BlipRetrievalConfig),
    "blip-pretraining": tiny_blip(BlipPretrainingConfig),
    "blip-two-images": tiny_blip(BlipComparisonConfig),
}


FAMILIES = [CrossEncoders(), *map(families.get, families.FAMILIES)]
NETWORKS: dict[type, type] = {ToyConfig: ToyModel, **{kind: model for known in FAMILIES for kind, model in known.models.items()}}


def network(config: Any) -> Any:
    """A network of `config` with fresh weights."""
    return NETWORKS[type(config)](config).eval()


def family(name: str) -> Any:
    """The family that the network called `name` is of."""
    called = {"siglip": "clip"}.get(name.partition("-")[0], name.partition("-")[0])
    return next(known for known in FAMILIES if known.name == called)


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A network with random weights (biases too, so that a lost bias shows) and a batch of two."""
    torch.manual_seed(0)
    model = network(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    batch = model.example(2, 5)
    for key, value in batch.items():
        if value.dim() == 4:
            batch[key] = torch.randn(value.shape)
    return model, batch


def output(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    record = model.run(batch)
    return torch.cat([record[name].flatten(1) for name in ("logits", "lm_logits") if name in record], 1)
