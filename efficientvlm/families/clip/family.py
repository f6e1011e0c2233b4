"""CLIP and SigLIP: two towers, compared by their features. Anatomy, layer choice, taps, folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientvlm.errors import BadInput
from efficientvlm.families.checks import check_config, check_id
from efficientvlm.families.clip.fresh import fresh_config
from efficientvlm.families.clip.network import MODELS
from efficientvlm.families.family import Family
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import image_statistics, open_config, read_json

CONFIGS: dict[str, Any] = {name: kind for kind in MODELS for name in (kind.stock[0], kind.model_type)}


class CLIP(Family):
    name = "clip"
    model_types = tuple(CONFIGS)
    models = MODELS

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> Any:
        config = fresh_config(size, changes, vocab)
        check_config(config, "settings")
        return config

    def read_config(self, path: Path) -> Any:
        """Stock configurations too; `image_mean` and `image_std` are then those of the folder's image processor."""
        file = path / "config.json"
        values = read_json(file)
        kind = CONFIGS.get(str(values.get("model_type")))
        if kind is None:
            raise BadInput(
                f"{path} holds a model of type {values.get('model_type')!r}",
                f"this family opens {', '.join(CONFIGS)}",
                "give a model of one of these types",
            )
        config = open_config(kind, {**values, **image_statistics(path, values, (kind.image_mean, kind.image_std), kind.processor)}, file)
        check_config(config, str(file))
        if values["model_type"] == kind.model_type or not isinstance(config.end, int):  # a stock one takes it from its tokenizer
            check_id("the id that ends a text", config.end, config.text_config.vocab_size, str(file))
        if not getattr(config.vision_config, "vision_use_head", True):
            raise BadInput(
                f"{file}: vision_use_head is false",
                "without its pooling head a SigLIP cannot compare images with texts",
                "give a SigLIP that has one",
            )
        check_shapes(self, config, path)
        return config
