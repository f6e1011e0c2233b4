"""Configurations of dual encoders whose images are read by a backbone of transformers, and whose texts are those of a CLIP or SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from transformers import VisionTextDualEncoderConfig

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import HEAD, groups_of
from efficientvlm.families.clip.config import ClipTexts, SiglipTexts, TwoTowers
from efficientvlm.families.dual.backbones import BACKBONES, CLS, POOLER, Backbone
from efficientvlm.families.structure import Layered, Sizes

STOCK = ("vision-text-dual-encoder", "VisionTextDualEncoderModel")


@dataclass(kw_only=True)
class Dual(TwoTowers):
    """What dual encoders with texts of either kind answer about their images."""

    image_pooling: str = CLS
    """What stands for an image, of `backbones.POOLED`."""
    initializer_factor: float = 1.0
    stock: ClassVar[tuple[str, str]] = STOCK
    opens: ClassVar[str]
    """Why transformers opens no network with such texts; empty where it does."""
    vision_config: Any
    text_config: Any

    @property
    def initializer_range(self) -> float:
        """Spread of fresh weights of the backbone, and of what is not drawn as CLIP or SigLIP draw theirs."""
        return float(self.vision_config.initializer_range)

    @property
    def backbone(self) -> Backbone:
        return BACKBONES[self.vision_config.model_type]

    @property
    def foreign(self) -> str:
        if self.opens:
            return self.opens
        if self.image_pooling != self.backbone.pooling:
            return f"transformers' {STOCK[1]} pools a {self.vision_config.model_type} by a layer of its own, which this one does not have"
        return self.backbone.foreign(self.vision_config)

    @property
    def opened_by(self) -> tuple[str, str] | None:
        return None if self.foreign else super().opened_by

    def layers(self) -> dict[str, int]:
        return {"vision": self.backbone.depth(self.vision_config), "text": self.text_config.num_hidden_layers}

    def layered(self, tower: str, layer: int) -> Layered:
        return self.backbone.layered(self.vision_config, layer) if tower == "vision" else super().layered(tower, layer)

    def pooled_by(self) -> tuple[str, ...] | None:
        return groups_of(self.layers(), HEAD, "vision") if self.image_pooling in (CLS, POOLER) else None

    def sizes(self) -> Sizes:
        return super().sizes()._replace(window=getattr(self.vision_config, "window_size", None))

    def choose(self, tower: str, count: int | None = None) -> list[int]:
        if tower != "vision":
            return super().choose(tower, count)
        return self.backbone.choose(self.vision_config, count)

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        chosen = self.of_layers(layers)
        chosen.text_config.num_hidden_layers = len(layers["text"])
        if self.layers()["vision"]:
            chosen.vision_config = self.backbone.with_layers(self.vision_config, layers["vision"])
        return chosen

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        changed = super().with_sizes({tower: size for tower, size in sizes.items() if tower != "vision"}, fusion_layers)
        if "vision" in sizes:
            changed.vision_config = self.backbone.with_size(self.vision_config, sizes["vision"])
        return changed

    def with_depth(self, depth: Mapping[str, int]) -> Self:
        changed = super().with_depth({tower: count for tower, count in depth.items() if tower != "vision"})
        if "vision" in depth:
            if self.sizes().window:
                raise BadInput("a Swin keeps its depth", "its layers stand in stages", "ask for layers that it has")
            changed.vision_config = self.backbone.with_layers(self.vision_config, range(depth["vision"]))
        return changed

    def with_images(self, image_size: int | None, patch_size: int | None) -> Self:
        before = self.vision_config
        return self.copy(vision_config=self.backbone.with_images(before, image_size or before.image_size, patch_size or before.patch_size))

    def stock_config(self, neurons: Mapping[str, int]) -> Self:
        what, fix = "this dual encoder does not fit transformers' own class", "use --format onnx or --format padded"
        if self.foreign:
            raise BadInput(what, self.foreign, fix)
        chosen = self.copy(kept=None)
        chosen.text_config.intermediate_size = neurons.get("text", chosen.text_config.intermediate_size)
        if "vision" in neurons:
            size = self.layered("vision", 0)._replace(neurons=neurons["vision"])
            chosen.vision_config = self.backbone.with_size(self.vision_config, size)
        return chosen


class DualConfig(Dual, ClipTexts, VisionTextDualEncoderConfig):
    model_type = "evlm_dual"
    opens = ""


class DualSiglipConfig(Dual, SiglipTexts, VisionTextDualEncoderConfig):
    model_type = "evlm_dual_siglip"
    opens = f"transformers' {STOCK[1]} takes no texts of a SigLIP"
    processor = "CLIPImageProcessor"
