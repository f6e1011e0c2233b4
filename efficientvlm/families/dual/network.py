"""Dual encoders of a backbone of transformers and the texts of a CLIP or SigLIP, compared by features of the teacher's width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from efficientvlm.families.clip.network import ClipTexts, Comparing, SiglipTexts
from efficientvlm.families.clip.start import draw_clip, draw_siglip
from efficientvlm.families.dual.backbones import POOLED, POOLER
from efficientvlm.families.dual.config import Dual, DualConfig, DualSiglipConfig
from efficientvlm.families.towers.parts import NOTHING, Encoded, normalise
from efficientvlm.families.towers.swin import Swin
from efficientvlm.families.towers.vit import Vit

TOWER = "vision_model."


class ByBackbone(Comparing):
    """In front of one of the kinds of texts: images by a backbone, whose layers are called as in our towers."""

    places = {"vision": "vision_model.layers", "text": "text_model.encoder.layers"}

    def _add_images(self) -> None:
        config: Dual = self.config
        self.vision_model = config.backbone.tower(config.vision_config, config.kept_indices())
        width = config.backbone.width(config.vision_config)
        if config.image_pooling == POOLER:
            self.vision_model.add_module("pooler", nn.Linear(width, width))
        self.visual_projection = nn.Linear(width, config.feature_width, bias=False)
        if not config.layers()["vision"]:
            self.taps = frozenset(tap for tap in self.taps if not tap.startswith("vision."))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Vit):
            init.normal_(module.position_embedding, std=self.config.initializer_range)
            init.normal_(module.class_embedding, std=self.config.initializer_range)

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        return parameter.endswith("position_embedding") or super().is_embedding(parameter)

    def encode_image(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None = None, keep: frozenset[str] = NOTHING) -> Encoded:
        tower: Any = self.vision_model
        if isinstance(tower, Vit | Swin):
            return super().encode_image(pixels, regions, keep)
        seen = tower.encoder(tower.embeddings(normalise(pixels, self.config.image_mean, self.config.image_std, tower.dtype)))
        return Encoded(seen.last_hidden_state.flatten(2).transpose(1, 2))

    def pooled_image(self, states: Tensor) -> Tensor:
        return POOLED[self.config.image_pooling](self.vision_model, states)

    def pool_image(self, states: Tensor) -> Tensor:
        return self.visual_projection(self.pooled_image(states))

    def _tables(self, state: dict[str, Tensor], grid: int, patch_size: int) -> dict[str, Tensor]:
        own = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
        part = self.config.backbone.with_images(self.config.vision_config, grid * patch_size, patch_size)
        return {f"{TOWER}{name}": tensor for name, tensor in self.config.backbone.tables(own, part).items()}


class DualModel(ByBackbone, ClipTexts):
    config_class = DualConfig

    def __init__(self, config: DualConfig) -> None:
        super().__init__(config)
        self._add_images()
        self.text_model = self._texts()
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.feature_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, Vit):
            draw_clip(self, module)


class DualSiglipModel(ByBackbone, SiglipTexts):
    config_class = DualSiglipConfig

    def __init__(self, config: DualSiglipConfig) -> None:
        super().__init__(config)
        self._add_images()
        self.text_model = self._texts(config.text_config.projection_size)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, Vit):
            draw_siglip(self, module)


MODELS: dict[type[Dual], type[ByBackbone]] = {DualConfig: DualModel, DualSiglipConfig: DualSiglipModel}
