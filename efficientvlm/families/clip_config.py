"""Configurations of CLIP and SigLIP: transformers' own fields, and which heads and neurons of each layer are still there."""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig, SiglipConfig

from efficientvlm.data.preprocessing import HALVES
from efficientvlm.data.tokenizer import ends_of
from efficientvlm.errors import BadInput
from efficientvlm.families.base import HEAD, NEURON
from efficientvlm.families.structure import Cuttable

TOWERS = ("vision", "text")
LEGACY_END = 2  # `eos_token_id` of old files, which was not the end token's; transformers then takes the highest id of a text


class Structure(Cuttable):
    """What the configurations of both kinds answer about their layers."""

    vision_config: Any
    text_config: Any
    stock: tuple[str, str]
    """`model_type` and class of transformers that open a model of which nothing was removed."""
    processor = "CLIPImageProcessor"
    """Class of transformers that reads a `preprocessor_config.json` which names none."""

    @property
    def end(self) -> int:
        """A token for the end of example texts."""
        raise NotImplementedError

    def tower(self, name: str) -> Any:
        """transformers' configuration of a tower."""
        return getattr(self, f"{name}_config")

    def layers(self) -> dict[str, int]:
        return {name: self.tower(name).num_hidden_layers for name in TOWERS}

    def original_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name in TOWERS:
            for layer in range(self.tower(name).num_hidden_layers):
                counts[f"{name}.{layer}.{HEAD}"] = self.tower(name).num_attention_heads
                counts[f"{name}.{layer}.{NEURON}"] = self.tower(name).intermediate_size
        return counts


class SlicedCLIPConfig(Structure, CLIPConfig):
    model_type = "evlm_clip"
    stock = ("clip", "CLIPModel")

    def adopt(self, tokenizer: Any) -> list[str]:
        """The end token, whose state stands for a text; old files leave it to the highest id."""
        before, (_, end) = self.text_config.eos_token_id, ends_of(tokenizer)
        if before == end or (before == LEGACY_END and end == max(tokenizer.get_vocab().values())):
            return []
        if end == LEGACY_END:
            why = f"transformers takes the id {LEGACY_END} for a CLIP whose texts end in their highest id"
            raise BadInput(f"the tokenizer ends texts with the id {end}", why, "give the tokenizer the model was trained with")
        self.text_config.eos_token_id = end
        return [f"end of text {end} (config.json: {before})"]

    @property
    def end(self) -> int:
        """A token that ends a text."""
        end: int = self.text_config.eos_token_id
        return self.text_config.vocab_size - 1 if end == LEGACY_END else end


class SlicedSiglipConfig(Structure, SiglipConfig):
    model_type = "evlm_siglip"
    stock = ("siglip", "SiglipModel")
    processor = "SiglipImageProcessor"

    image_mean: list[float] | tuple[float, ...] = HALVES
    image_std: list[float] | tuple[float, ...] = HALVES

    def adopt(self, tokenizer: Any) -> list[str]:
        """The token that fills a text up to all positions."""
        before, self.text_config.pad_token_id = self.text_config.pad_token_id, tokenizer.pad_token_id
        return [f"padding {tokenizer.pad_token_id} (config.json: {before})"] if before != tokenizer.pad_token_id else []

    @property
    def end(self) -> int:
        """Any token, as the last position is what is pooled."""
        return 0
