"""Configurations of BLIP: transformers' own fields, and which heads and neurons of each layer are still there."""

from __future__ import annotations

import copy
from typing import ClassVar

from transformers import BlipConfig, BlipTextConfig

from efficientvlm.errors import BadInput
from efficientvlm.families.base import CROSS_HEAD, HEAD, NEURON
from efficientvlm.families.checks import check_id
from efficientvlm.families.structure import Cuttable


class SlicedBlipConfig(Cuttable, BlipConfig):
    """What the three networks share; `towers` says which of vision, text, decoder one of them has.

    `decoder_layers` is the depth of a decoder that has another
    one than the question encoder (transformers knows one depth for both). `question_start_id` takes the place of the first token of a text
    that is read together with an image (BLIP: [ENC]); None leaves it, as transformers does. `answer_start_id` does so for a text that the
    decoder goes on with (BLIP: [DEC]), by default the text configuration's `bos_token_id`.
    """

    model_type = "evlm_blip"
    stock: ClassVar[str] = ""
    processor: ClassVar[str] = "BlipImageProcessor"
    towers: ClassVar[tuple[str, ...]] = ()

    decoder_layers: int | None = None
    question_start_id: int | None = None
    answer_start_id: int | None = None

    @property
    def usual_tokens(self) -> int:
        return 40 if "text" not in self.towers else 35  # of captions; of questions and texts to match

    @property
    def decoder_start(self) -> int:
        """First token of an answer or caption."""
        return self.text_config.bos_token_id if self.answer_start_id is None else self.answer_start_id

    def layers(self) -> dict[str, int]:
        """Layers of each tower, 0 of those that this network does not have."""
        depth = {"vision": self.vision_config.num_hidden_layers, **dict.fromkeys(("text", "decoder"), self.text_config.num_hidden_layers)}
        if self.decoder_layers is not None:
            depth["decoder"] = self.decoder_layers
        return {tower: count if tower in self.towers else 0 for tower, count in depth.items()}

    def context_width(self, tower: str) -> int:
        """Columns of what `tower` cross-attends to: images, or in a decoder that answers questions the states of the question."""
        of_text = tower == "decoder" and "text" in self.towers
        return int(self.text_config.hidden_size if of_text else self.vision_config.hidden_size)

    def text_tower(self, tower: str) -> BlipTextConfig:
        """The text configuration as it is for `tower`."""
        config = copy.deepcopy(self.text_config)
        config.num_hidden_layers, config.encoder_hidden_size = self.layers()[tower], self.context_width(tower)
        return config

    def original_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for tower, layers in self.layers().items():
            part = self.vision_config if tower == "vision" else self.text_config
            for layer in range(layers):
                counts[f"{tower}.{layer}.{HEAD}"] = part.num_attention_heads
                if tower != "vision":
                    counts[f"{tower}.{layer}.{CROSS_HEAD}"] = part.num_attention_heads
                counts[f"{tower}.{layer}.{NEURON}"] = part.intermediate_size
        return counts

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own class builds this very network."""
        same_depth = len({self.layers()[tower] for tower in self.towers if tower != "vision"}) == 1
        stock_width = all(self.context_width(tower) == self.vision_config.hidden_size for tower in self.towers)
        return not self.kept and same_depth and stock_width and self.decoder_layers in (None, self.text_config.num_hidden_layers)


class BlipAnswerConfig(SlicedBlipConfig):
    model_type = "evlm_blip_vqa"
    stock = "BlipForQuestionAnswering"
    towers = ("vision", "text", "decoder")


class BlipCaptionConfig(SlicedBlipConfig):
    model_type = "evlm_blip_caption"
    stock = "BlipForConditionalGeneration"
    towers = ("vision", "decoder")


class BlipRetrievalConfig(SlicedBlipConfig):
    model_type = "evlm_blip_retrieval"
    stock = "BlipForImageTextRetrieval"
    towers = ("vision", "text")


KINDS: tuple[type[SlicedBlipConfig], ...] = (BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig)


def check_sizes(config: SlicedBlipConfig, where: str) -> SlicedBlipConfig:
    """`config` if it is a BLIP's, beyond what `checks.check_config` asks of all; :class:`BadInput` says what is wrong."""
    vision, text = config.vision_config, config.text_config
    if not text.is_decoder:
        raise BadInput(f"{where}: text_config.is_decoder is false", "then no layer looks at the image", "use a BLIP with cross-attention")
    if vision.image_size % vision.patch_size:
        raise BadInput(
            f"{where}: images of {vision.image_size} px",
            f"they are no multiple of the patch size {vision.patch_size}",
            "correct image_size",
        )
    if "text" in config.towers and config.question_start_id is not None:
        check_id("question_start_id", config.question_start_id, text.vocab_size, where)
    if "decoder" in config.towers:
        check_id("the first token of answers", config.decoder_start, text.vocab_size, where)
    config.kept_indices()
    return config
