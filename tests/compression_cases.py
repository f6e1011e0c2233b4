"""Tiny networks every compression test runs on; a new family is one more line."""

from __future__ import annotations

from typing import Any

import torch
from toy_family import ToyConfig, ToyFamily

from efficientvlm.families.xvlm import XVLM
from efficientvlm.families.xvlm_config import XVLMConfig


def tiny_xvlm() -> XVLMConfig:
    return XVLMConfig(
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


FAMILIES: dict[str, tuple[Any, Any]] = {"toy": (ToyFamily(), ToyConfig()), "xvlm": (XVLM(), tiny_xvlm())}


def build(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Family, model with random weights (biases too, so that a lost bias shows) and a batch of two."""
    family, config = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    batch = family.example_batch(config, 2, 5)
    for key, value in batch.items():
        if value.dim() == 4:
            batch[key] = torch.randn(value.shape)
    return family, model, batch


def output(family: Any, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return family.forward(model, batch)["logits"]
