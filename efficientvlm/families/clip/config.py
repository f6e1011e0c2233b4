"""Configurations of CLIP and SigLIP: transformers' own fields, and which heads and neurons of each layer are still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from transformers import CLIPConfig, SiglipConfig

from efficientvlm.data.preprocessing import HALVES
from efficientvlm.data.tokenizer import ends_of
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import HEAD, Flow, groups_of
from efficientvlm.families.structure import Layered, TwoParts

TOWERS = ("vision", "text")
LEGACY_END = 2  # `eos_token_id` of old files, which was not the end token's; transformers then takes the highest id of a text


class TwoTowers(TwoParts):
    """What the configurations of both kinds answer about their layers."""

    stock: ClassVar[tuple[str, str]]
    """`model_type` and class of transformers that open a model of which nothing was removed."""
    pools_by_probe: ClassVar[bool] = False
    """Whether a probe that attends to all states pools an image (SigLIP); it is never pruned."""

    @property
    def end(self) -> int:
        """A token for the end of example texts."""
        raise NotImplementedError

    @property
    def opened_by(self) -> tuple[str, str] | None:
        return self.stock if self.kept is None else None

    def layers(self) -> dict[str, int]:
        return {name: self.part(name).num_hidden_layers for name in TOWERS}

    def abilities(self) -> frozenset[str]:
        return frozenset({"embed", "align"})

    def pooled_by(self) -> tuple[str, ...] | None:
        """The groups by which what stands for an image sees it; None: it always does."""
        return None if self.pools_by_probe else groups_of(self.layers(), HEAD, "vision")

    def flows(self) -> list[Flow]:
        """The pooled position of a tower sees the others by self-attention alone; SigLIP's pooling of the image is never pruned."""
        pooled = self.pooled_by()
        flows = [Flow("image", "vision.patches"), Flow("vision.patches", "vision.pooled", pooled), Flow("vision.pooled", "itc")]
        mixing = groups_of(self.layers(), HEAD, "text")
        return [*flows, Flow("text", "text.tokens"), Flow("text.tokens", "text.pooled", mixing), Flow("text.pooled", "itc")]

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        chosen = self.of_layers(layers)
        for tower, numbers in layers.items():
            chosen.part(tower).num_hidden_layers = len(numbers)
        return chosen

    @property
    def feature_width(self) -> int:
        """Columns of the features, of images as of texts."""
        raise NotImplementedError

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        """Features keep their width, so that a student is compared with what its teacher says."""
        if fusion_layers is not None:
            raise BadInput("fusion_layers is not for this network", "neither of its towers looks at the other", "leave it out")
        changed = self.copy(kept=None)
        for tower, size in sizes.items():
            part = changed.part(tower)
            part.hidden_size, part.num_attention_heads, part.intermediate_size = size
        return changed

    def with_depth(self, depth: Mapping[str, int]) -> Self:
        sources = ("layer_source", "layer_source_of")
        known = {name: {t: v for t, v in (getattr(self, name) or {}).items() if t not in depth} or None for name in sources}
        changed = self.copy(**known)
        for tower, count in depth.items():
            changed.part(tower).num_hidden_layers = count
        return changed

    def with_images(self, image_size: int | None, patch_size: int | None) -> Self:
        changed, before = self.copy(), self.vision_config
        side, patch = image_size or before.image_size, patch_size or before.patch_size
        if side % patch and (side, patch) != (before.image_size, before.patch_size):
            raise BadInput(f"image_size is {side}", f"it is no multiple of the patch size {patch}", "use a multiple of it")
        changed.vision_config.image_size, changed.vision_config.patch_size = side, patch
        return changed

    def stock_config(self, neurons: Mapping[str, int]) -> Self:
        """Depth and one number of neurons a tower are fields of transformers' configurations; SigLIP's pooling head shares vision's."""
        chosen = self.copy(kept=None)
        for tower, count in neurons.items():
            before = self.part(tower).intermediate_size
            if tower == "vision" and count != before and self.pools_by_probe:
                why = f"vision layers have {count} neurons and the pooling head {before}, where one number stands for both"
                raise BadInput("this SigLIP does not fit transformers' own class", why, "use --format onnx or --format padded")
            chosen.part(tower).intermediate_size = count
        return chosen


class ClipTexts(TwoTowers):
    """Texts of a CLIP: an end token's state stands for one."""

    projection_dim: Any

    @property
    def feature_width(self) -> int:
        width: int = self.projection_dim
        return width

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


class SiglipTexts(TwoTowers):
    """Texts of a SigLIP: filled up to all positions, of which the last one's state stands for one."""

    processor = "SiglipImageProcessor"

    @property
    def feature_width(self) -> int:
        width: int = self.text_config.projection_size
        return width

    def adopt(self, tokenizer: Any) -> list[str]:
        """The token that fills a text up to all positions."""
        before, self.text_config.pad_token_id = self.text_config.pad_token_id, tokenizer.pad_token_id
        return [f"padding {tokenizer.pad_token_id} (config.json: {before})"] if before != tokenizer.pad_token_id else []

    @property
    def end(self) -> int:
        """Any token, as the last position is what is pooled."""
        return 0


class SlicedCLIPConfig(ClipTexts, CLIPConfig):
    model_type = "evlm_clip"
    stock = ("clip", "CLIPModel")


class SlicedSiglipConfig(SiglipTexts, SiglipConfig):
    model_type = "evlm_siglip"
    stock = ("siglip", "SiglipModel")
    pools_by_probe = True

    image_mean: list[float] | tuple[float, ...] = HALVES
    image_std: list[float] | tuple[float, ...] = HALVES
    image_projection: bool = False
    """Whether a Linear behind the pooling makes the features of images: those of a student whose images are of another width."""

    @property
    def opened_by(self) -> tuple[str, str] | None:
        return None if self.image_projection else super().opened_by

    @property
    def foreign(self) -> str:
        return "transformers has no SigLIP whose features of images are projected to another width" if self.image_projection else ""

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        """Another width of images takes a projection behind the pooling, which a SigLIP does not have."""
        changed = super().with_sizes(sizes, fusion_layers)
        changed.image_projection = self.image_projection or changed.vision_config.hidden_size != self.feature_width
        return changed

    def stock_config(self, neurons: Mapping[str, int]) -> Self:
        if self.image_projection:
            raise BadInput("this SigLIP does not fit transformers' own class", self.foreign, "use --format onnx or --format padded")
        return super().stock_config(neurons)
