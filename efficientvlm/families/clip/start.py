"""Fresh weights of CLIP and SigLIP, as those who trained them first drew them."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import initialization as init

from efficientvlm.families.towers.text import Text
from efficientvlm.families.towers.vit import Pooling, Vit


def draw_clip(model: Any, module: Any) -> None:
    """What `module` of `model` begins with beside what transformers draws: by the width and depth of a tower (OpenAI's CLIP)."""
    factor = model.config.initializer_factor
    if isinstance(module, Vit | Text):
        part = model.config.part("vision" if isinstance(module, Vit) else "text")
        width, factor, std = part.hidden_size, part.initializer_factor, part.initializer_range if isinstance(module, Vit) else 0.02
        init.normal_(module.position_embedding, std=std * factor)
        if isinstance(module, Vit):
            init.normal_(module.class_embedding, std=width**-0.5 * factor)
            init.normal_(module.patch_embedding.weight, std=std * factor)
        else:
            init.normal_(module.token_embedding.weight, std=std * factor)
        deep = (2 * part.num_hidden_layers) ** -0.5
        for layer in module.layers:
            for name, values in layer.named_parameters():
                if values.dim() == 2:
                    inner = 2**-0.5 if ".fc1." in name else 1.0 if ".out_proj." in name else deep
                    init.normal_(values, std=width**-0.5 * inner * factor)
    elif module is model:
        for projection in (model.visual_projection, model.text_projection):
            init.normal_(projection.weight, std=projection.in_features**-0.5 * factor)
        init.constant_(model.logit_scale, model.config.logit_scale_init_value)


def draw_siglip(model: Any, module: Any) -> None:
    """What `module` of `model` begins with beside what transformers draws: Xavier in layers (big_vision's SigLIP)."""
    if isinstance(module, Vit | Text):
        for layer in module.layers:
            _xavier(layer)
        if isinstance(module, Vit):
            init.normal_(module.position_embedding, std=1 / math.sqrt(module.position_embedding.shape[-1]))
        else:
            init.default_flax_embed_init_(module.token_embedding.weight)
            init.default_flax_embed_init_(module.position_embedding)
    elif isinstance(module, Pooling):
        _xavier(module.fc1)
        _xavier(module.fc2)
        init.xavier_uniform_(module.probe)
        init.xavier_uniform_(module.attention.in_proj_weight)
        init.zeros_(module.attention.in_proj_bias)
    elif module is model:
        init.zeros_(model.logit_scale)
        init.zeros_(model.logit_bias)


def draw_lecun(module: nn.Linear | nn.Conv2d) -> None:
    """A fresh Linear or convolution outside of layers (big_vision's SigLIP)."""
    init.lecun_normal_(module.weight)
    if module.bias is not None:
        init.zeros_(module.bias)


def _xavier(module: nn.Module) -> None:
    """Fresh matrices by Xavier; biases stay 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init.xavier_uniform_(part.weight)
