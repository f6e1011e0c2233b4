"""The BLIP family: question answering, captioning, matching; anatomy, layer choice, taps, loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import (
    KINDS,
    SlicedBlipConfig,
    check_sizes,
)
from efficientvlm.families.blip.models import MODELS
from efficientvlm.families.blip.published import translate
from efficientvlm.families.blip.start import DECODE, ENCODE, fresh_config
from efficientvlm.families.blip.towers import from_towers, towers_config
from efficientvlm.families.checks import check_config
from efficientvlm.families.family import Family
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import image_statistics, open_config, read_json
from efficientvlm.families.published import Published


class BLIP(Family):
    """Batches are those of `data.kinds`: `question_*` and `answer_*` to answer, `text_ids` and `text_mask` to caption or match.

    Texts that are decoded start with the configuration's `decoder_start`, those read with an image with its `question_start_id`, whatever
    their first token was.
    """

    name = "blip"
    model_types = ("blip", *(kind.model_type for kind in KINDS))
    models = MODELS
    extra_tokens = (DECODE, ENCODE)

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> SlicedBlipConfig:
        return self._checked(fresh_config(size, changes, vocab), "settings")

    def towers_config(
        self, vision: Path, text: Path, vocab: Mapping[str, int], changes: Mapping[str, Any], keep_texts: bool
    ) -> SlicedBlipConfig:
        if keep_texts:
            why = "a BLIP projects the first token of a text to as many numbers as it compares, and is trained to"
            raise BadInput("text_projection is identity", why, "leave it out")
        return self._checked(towers_config(vision, text, vocab, changes), "settings")

    def from_towers(
        self, vision: Path, text: Path, vocab: Mapping[str, int], changes: Mapping[str, Any], keep_texts: bool
    ) -> tuple[Any, list[str]]:
        return from_towers(vision, text, vocab, changes)

    def read_config(self, path: Path) -> SlicedBlipConfig:
        """Of a folder of ours or of transformers; which of the three networks it is, `architectures` says there.

        Raises:
            BadInput: another network than these three, or sizes that do not fit together.
        """
        file = path / "config.json"
        values = read_json(file)
        named = next(iter(values.get("architectures") or []), None)
        kind = next((kind for kind in KINDS if values.get("model_type") == kind.model_type or named == kind.stock), None)
        if kind is None:
            raise BadInput(
                f"{file}: architectures is {named}",
                f"opened are {', '.join(kind.stock for kind in KINDS if kind.stock)}",
                "give a model of one of these classes",
            )
        values |= image_statistics(path, values, (CLIP_MEAN, CLIP_STD), kind.processor)
        config = self._checked(open_config(kind, values, file), str(file))
        check_shapes(self, config, path)
        return config

    def translate(self, file: Published) -> tuple[SlicedBlipConfig, dict[str, Tensor]]:
        return translate(file, self._checked)

    def _checked(self, config: SlicedBlipConfig, where: str) -> SlicedBlipConfig:
        check_config(config, where)
        config.tie_word_embeddings = config.ties
        return check_sizes(config, where)
