"""The X-VLM family: anatomy, layer choice, taps, loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficientvlm.families.checks import check_config
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import open_config, open_model, read_json
from efficientvlm.families.xvlm.config import SIZES, XVLMConfig, check_fields, check_sizes, checked_settings
from efficientvlm.families.xvlm.network import XVLMModel


class XVLM:
    name = "xvlm"
    model_types: tuple[str, ...] = ("xvlm",)
    auto_classes: tuple[tuple[type, type], ...] = ((XVLMConfig, XVLMModel),)
    extra_tokens: tuple[str, ...] = ()

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> XVLMConfig:
        number = vocab if isinstance(vocab, int) else len(vocab)
        config = check_sizes(XVLMConfig(**{**SIZES[size], "vocab_size": number, **checked_settings(changes)}))
        check_config(config, "settings")
        return config

    def build(self, config: XVLMConfig) -> XVLMModel:
        return XVLMModel(config)

    def read_config(self, path: Path) -> XVLMConfig:
        file = path / "config.json"
        values = read_json(file)
        check_fields(values, str(file))
        config: XVLMConfig = open_config(XVLMConfig, values, file)
        check_config(config, str(file))
        check_sizes(config)
        check_shapes(self, config, path)
        return config

    def save(self, model: XVLMModel, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, path: Path) -> XVLMModel:
        """Float32 model of a checkpoint folder, evaluation mode.

        Raises:
            BadInput: weights that are missing, surplus or of another shape than `config.json` says, or not readable.
        """
        model: XVLMModel = open_model(XVLMModel, path, self.read_config(path))
        return model
