"""New BLIPs of named sizes, and the fresh weights of any BLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import initialization as init

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import CROSSING, KINDS, SlicedBlipConfig, crossing_last
from efficientvlm.families.checks import MOST_LAYERS, Colours, Many, Pixels
from efficientvlm.families.family import SMALLER
from efficientvlm.families.towers.bert import Bert, LanguageHead
from efficientvlm.families.towers.vit import Vit
from efficientvlm.settings.base import Strict, parse

DECODE, ENCODE = "[DEC]", "[ENC]"

TEMPERATURE = 0.07
"""The first temperature of contrast."""

Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Real = Annotated[float, Field(ge=0)]


class Sizes(Strict):
    """What can be set; the defaults are BLIP-base as published (12 heads, not transformers' 8; norms of vision with 1e-6)."""

    network: Literal["answer", "caption", "match", "pretrain", "compare"] = Field("answer", description="what it is for")
    image_size: Pixels = 384
    patch_size: Pixels = 16
    image_mean: Colours = list(CLIP_MEAN)
    image_std: Colours = list(CLIP_STD)
    vision_width: Many = 768
    vision_layers: Layers = 12
    vision_heads: Many = 12
    vision_intermediate: Many = 3072
    vision_eps: Real = 1e-6
    text_width: Many = 768
    text_layers: Layers = 12
    decoder_layers: Layers | None = Field(None, description="those of the text tower by default")
    fusion_layers: Layers | None = Field(None, description="so many of the last layers have cross-attention; all by default")
    text_heads: Many = 12
    text_intermediate: Many = 3072
    text_eps: Real = 1e-12
    vocab_size: Many = 30524
    max_positions: Many = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    embed_dim: Many = 256
    initializer_range: Real = 0.02


SIZES: dict[str, dict[str, Any]] = SMALLER | {"small": SMALLER["small"] | {"text_layers": 6}}


def fresh_config(size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> SlicedBlipConfig:
    """Configuration of a new BLIP, by default for questions, which it reads after [ENC], and writes answers after [DEC] (BLIP).

    Args:
        size: tiny, small or base.
        changes: fields of :class:`Sizes` that a user set.
        vocab: token → id with [DEC] and [ENC] in it; or just a number of tokens, where nothing will be read.

    Raises:
        BadInput: an unknown field or a wrong value.
    """
    number = vocab if isinstance(vocab, int) else len(vocab)
    ids: Mapping[str, int] = {} if isinstance(vocab, int) else vocab
    given = parse(Sizes, {**SIZES[size], "vocab_size": number, **changes}, "settings")
    vision = {
        "hidden_size": given.vision_width,
        "num_hidden_layers": given.vision_layers,
        "num_attention_heads": given.vision_heads,
        "intermediate_size": given.vision_intermediate,
        "layer_norm_eps": given.vision_eps,
        "image_size": given.image_size,
        "patch_size": given.patch_size,
        "initializer_range": given.initializer_range,
    }
    text = {
        "hidden_size": given.text_width,
        "num_hidden_layers": given.text_layers,
        "num_attention_heads": given.text_heads,
        "intermediate_size": given.text_intermediate,
        "layer_norm_eps": given.text_eps,
        "vocab_size": given.vocab_size,
        "max_position_embeddings": given.max_positions,
        "hidden_dropout_prob": given.dropout,
        "attention_probs_dropout_prob": given.dropout,
        "initializer_range": given.initializer_range,
        "bos_token_id": ids.get(DECODE, number - 2),
        "sep_token_id": ids.get("[SEP]", 0),
        "eos_token_id": ids.get("[SEP]", 0),
        "pad_token_id": ids.get("[PAD]", 0),
    }
    kind = next(kind for kind in KINDS if given.network in kind.able)
    both = {*CROSSING} <= {*kind.towers} and not kind.shares
    if given.decoder_layers not in (None, given.text_layers) and not both:
        why = f"a network that is to {given.network} has one depth for all texts"
        raise BadInput(f"settings: decoder_layers is {given.decoder_layers}", why, "leave it out, and set text_layers")
    depth = {tower: given.text_layers for tower in CROSSING if tower in kind.towers and not (kind.shares and tower == "decoder")}
    depth |= {"decoder": given.decoder_layers} if both and given.decoder_layers else {}
    return kind(
        cross_layers=crossing_last(depth, given.fusion_layers),
        vision_config=vision,
        text_config=text,
        image_text_hidden_size=given.embed_dim,
        initializer_range=given.initializer_range,
        image_mean=given.image_mean,
        image_std=given.image_std,
        decoder_layers=depth["decoder"] if both and depth["decoder"] != given.text_layers else None,
        question_start_id=ids.get(ENCODE, number - 1),
    )


def draw_blip(model: Any, module: Any) -> None:
    """What `module` of `model` begins with: every tower by its own `initializer_range`, what is behind them by the common one."""
    vision, text = model.config.vision_config.initializer_range, model.config.text_config.initializer_range
    if isinstance(module, Vit):
        _draw(module, vision)
        init.trunc_normal_(module.class_embedding, std=vision)
        init.trunc_normal_(module.position_embedding, std=vision)
    elif isinstance(module, Bert | LanguageHead):
        _draw(module, text)
    elif module is model:
        if hasattr(model, "temp"):
            init.constant_(model.temp, TEMPERATURE)
        for part in model.children():
            if isinstance(part, nn.Linear | nn.Sequential):
                _draw(part, model.config.initializer_range)


def _draw(module: nn.Module, std: float) -> None:
    """Fresh weights for all linear maps and tables in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear | nn.Conv2d | nn.LayerNorm) and part.bias is not None:
            init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            init.ones_(part.weight)
        elif isinstance(part, nn.Embedding) and part.padding_idx is not None and not getattr(part.weight, "_is_hf_initialized", False):
            with torch.no_grad():
                part.weight[part.padding_idx] = 0
