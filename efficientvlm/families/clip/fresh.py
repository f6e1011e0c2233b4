"""New CLIPs of named sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.families.checks import MOST_LAYERS, Colours, Many, Pixels
from efficientvlm.families.clip.config import SlicedCLIPConfig
from efficientvlm.families.family import SMALLER
from efficientvlm.settings.base import Strict, parse

Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Real = Annotated[float, Field(ge=0)]


class Sizes(Strict):
    """What can be set; the defaults are those of CLIP ViT-B/32 as published."""

    image_size: Pixels = 224
    patch_size: Pixels = 32
    image_mean: Colours = list(CLIP_MEAN)
    image_std: Colours = list(CLIP_STD)
    vision_width: Many = 768
    vision_layers: Layers = 12
    vision_heads: Many = 12
    vision_intermediate: Many = 3072
    text_width: Many = 512
    text_layers: Layers = 12
    text_heads: Many = 8
    text_intermediate: Many = 2048
    vocab_size: Many = 49408
    max_positions: Many = 77
    embed_dim: Many = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of attention")
    initializer_range: Real = Field(0.02, description="of positions and patches of images; all else follows from widths and depths")


def fresh_config(size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> SlicedCLIPConfig:
    """Configuration of a new CLIP, whose texts end in [SEP].

    Args:
        size: tiny, small or base.
        changes: fields of :class:`Sizes` that a user set.
        vocab: token → id; or just a number of tokens, where nothing will be read.

    Raises:
        BadInput: an unknown field or a wrong value.
    """
    number = vocab if isinstance(vocab, int) else len(vocab)
    ids: Mapping[str, int] = {} if isinstance(vocab, int) else vocab
    given = parse(Sizes, {**SMALLER[size], "vocab_size": number, **changes}, "settings")

    def tower(name: str, **more: Any) -> dict[str, Any]:
        sizes = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads", "intermediate_size": "intermediate"}
        found = {field: getattr(given, f"{name}_{ours}") for field, ours in sizes.items()}
        return {**found, "attention_dropout": given.dropout, "projection_dim": given.embed_dim, **more}

    vision = {"image_size": given.image_size, "patch_size": given.patch_size, "initializer_range": given.initializer_range}
    text = {"vocab_size": given.vocab_size, "max_position_embeddings": given.max_positions}
    text |= {"bos_token_id": ids.get("[CLS]", 0), "eos_token_id": ids.get("[SEP]", number - 1), "pad_token_id": ids.get("[PAD]", 0)}
    return SlicedCLIPConfig(
        vision_config=tower("vision", **vision),
        text_config=tower("text", **text),
        projection_dim=given.embed_dim,
        image_mean=given.image_mean,
        image_std=given.image_std,
    )
