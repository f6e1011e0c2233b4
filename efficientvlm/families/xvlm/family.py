"""The X-VLM family: anatomy, layer choice, taps, loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from efficientvlm.families.checks import check_config
from efficientvlm.families.family import Family
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import open_config, read_json
from efficientvlm.families.published import Published
from efficientvlm.families.xvlm.config import SIZES, XVLMConfig, check_fields, check_sizes, checked_settings
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.families.xvlm.published import translate
from efficientvlm.families.xvlm.start import as_texts_are, check_kept, from_towers, towers_config


class XVLM(Family):
    name = "xvlm"
    model_types = ("xvlm",)
    models = {XVLMConfig: XVLMModel}

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> XVLMConfig:
        number = vocab if isinstance(vocab, int) else len(vocab)
        given = checked_settings(changes)
        if depths := given.get("vision_depths"):
            given = {"vision_layers": sum(depths), "vision_activation": "gelu", "local_attention_depth": 0, **given}
        config = check_sizes(XVLMConfig(**{**SIZES[size], "vocab_size": number, **given}))
        check_config(config, "settings")
        return config

    def towers_config(self, vision: Path, text: Path, vocab: Mapping[str, int], changes: Mapping[str, Any], keep_texts: bool) -> XVLMConfig:
        config = towers_config(vision, text, len(vocab), changes)
        check_config(config, "settings")
        if keep_texts:
            check_kept(config)
        return config

    def from_towers(
        self, vision: Path, text: Path, vocab: Mapping[str, int], changes: Mapping[str, Any], keep_texts: bool
    ) -> tuple[XVLMModel, list[str]]:
        model, new = from_towers(vision, text, len(vocab), changes)
        if keep_texts:
            kept = as_texts_are(model)
            new = [name for name in new if name not in kept]
        return model, new

    def read_config(self, path: Path) -> XVLMConfig:
        file = path / "config.json"
        values = read_json(file)
        check_fields(values, str(file))
        config: XVLMConfig = open_config(XVLMConfig, values, file)
        check_config(config, str(file))
        check_sizes(config)
        check_shapes(self, config, path)
        return config

    def translate(self, file: Published) -> tuple[XVLMConfig, dict[str, Tensor]]:
        return translate(file)
