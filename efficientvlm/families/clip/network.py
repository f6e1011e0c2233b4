"""CLIP and SigLIP, with layers that may have lost heads and neurons, under the names of transformers' files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import Unit
from efficientvlm.families.clip.config import LEGACY_END, TOWERS, SlicedCLIPConfig, SlicedSiglipConfig, TwoTowers
from efficientvlm.families.clip.graphs import clip_graphs
from efficientvlm.families.clip.names import IMAGES, LAYER, TEXTS
from efficientvlm.families.clip.start import draw_clip, draw_lecun, draw_siglip
from efficientvlm.families.network import Graph, Record, check_taps, kinds_of
from efficientvlm.families.towers.attention import causal
from efficientvlm.families.towers.layers import PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork, asked
from efficientvlm.families.towers.parts import (
    HIDDEN,
    NOTHING,
    SELF_ATTENTION,
    Encoded,
    activation,
    resize_patches,
    resize_positions,
    tap,
)
from efficientvlm.families.towers.text import Text
from efficientvlm.families.towers.vit import Pooling, Vit

MOST_SCALE = math.log(100)


@dataclass
class Compared(ModelOutput):
    """What transformers' classes give, by the same names."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None


class Comparing(TowerNetwork):
    """What CLIP and SigLIP have in common: a tower of images and one of texts."""

    places = {tower: f"{tower}_model.encoder.layers" for tower in TOWERS}
    owners = {f"{tower}_model": tower for tower in TOWERS}
    renamed = {r"^(vision|text)_model\.(vision|text)_model\.": r"\1_model."}
    main_input_name = "input_ids"
    ends_normalised = False
    taps = frozenset(f"{tower}.{kind}" for tower in TOWERS for kind in (HIDDEN, SELF_ATTENTION))
    vision_model: Vit
    text_model: Text

    def _layers(self, tower: str) -> list[PreNormLayer]:
        part, kept = self.config.part(tower), self.config.kept_indices()
        sizes = Size.of_tower(kept, tower, part.num_hidden_layers, part.hidden_size, part.num_attention_heads)
        return [
            PreNormLayer(size, part.layer_norm_eps, activation(part.hidden_act), LAYER, dropout=part.attention_dropout) for size in sizes
        ]

    def _images(self, **kind: bool) -> Vit:
        part = self.config.vision_config
        return Vit(self._layers("vision"), part.hidden_size, part.image_size, part.patch_size, part.layer_norm_eps, IMAGES, **kind)

    def _texts(self, outputs: int | None = None) -> Text:
        part = self.config.text_config
        shape = (part.vocab_size, part.max_position_embeddings, part.hidden_size, part.layer_norm_eps)
        return Text(self._layers("text"), *shape, TEXTS, outputs)

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        return parameter.endswith(("token_embedding.weight", "position_embedding.weight"))

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.token_embedding

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = NOTHING) -> tuple[Tensor, Encoded]:
        """Token ids and mask [B, L] (1 = token) as the network reads them, and the states of the last layer."""
        raise NotImplementedError

    def pool_image(self, states: Tensor) -> Tensor:
        """States [B, T, W] to one vector each [B, E]."""
        raise NotImplementedError

    def pool_text(self, states: Tensor, ids: Tensor) -> Tensor:
        """States [B, L, W] of the token ids [B, L] to one vector each [B, E]."""
        raise NotImplementedError

    def image_feature(self, states: Tensor) -> Tensor:
        return F.normalize(self.pool_image(states), dim=-1)

    def text_feature(self, states: Tensor, ids: Tensor) -> Tensor:
        """States [B, L, W] of the token ids [B, L] to unit vectors [B, E]."""
        return F.normalize(self.pool_text(states, ids), dim=-1)

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits [I, T] of unit vectors [I, E] and [T, E]."""
        raise NotImplementedError

    def loss(self, logits: Tensor, same: Tensor | None = None) -> Tensor:
        """What the family is trained with, of the logits [B, B] of pairs; `same` [B, B] is True where image and text belong together, by
        default those of one pair."""
        raise NotImplementedError

    def limit_scale(self) -> None:
        """Keep the factor of similarities where training keeps it, behind an update."""

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Compared:
        """As transformers' own class is called, and what it gives."""
        keep = asked(self.config, output_attentions, output_hidden_states)
        image = self.encode_image(pixel_values, keep=keep)
        ids, text = self.encode_text(input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask, keep)
        features = self.image_feature(image.states), self.text_feature(text.states, ids)
        logits = self.similarity(*features)
        return Compared(
            loss=self.loss(logits) if return_loss else None,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=features[1],
            image_embeds=features[0],
            text_model_output=_output(text, self.text_model.post_norm(text.states), self.pool_text(text.states, ids)),
            vision_model_output=_output(image, self._seen(image.states), self.pool_image(image.states)),
        )

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """Images and texts: `image_features` [I, E] and `text_features` [T, E], unit vectors, and their `logits` [I, T]."""
        wanted = check_taps(self, want)
        record = Record()
        image = self.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        ids, text = self.encode_text(batch["text_ids"], batch["text_mask"], kinds_of(wanted, "text"))
        for tower, out in (("vision", image), ("text", text)):
            tap(record, tower, out, kinds_of(wanted, tower))
        record["image_features"] = self.image_feature(image.states)
        record["text_features"] = self.text_feature(text.states, ids)
        record["logits"] = self.similarity(record["image_features"], record["text_features"])
        return record

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ids, out = self.encode_text(ids, mask)
        return out.states, self.text_feature(out.states, ids)

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        size, end = self.config.vision_config.image_size, self.config.end
        ids = torch.full((batch_size, text_length), 0 if end else 1, device=device)
        ids[:, -1] = end
        return {
            "pixels": torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device),
            "text_ids": ids,
            "text_mask": torch.ones_like(ids),
        }

    def for_images(self, image_size: int | None, patch_size: int | None) -> Comparing:
        """This network for images, and patches, of so many pixels on a side, its tables resampled; None: as before.

        Raises:
            BadInput: patches do not fill such images.
        """
        config = self.config.with_images(image_size, patch_size)
        new, old = config.vision_config, self.config.vision_config
        if (new.image_size, new.patch_size) == (old.image_size, old.patch_size):
            return self
        changed: Comparing = self.reshaped(config, lambda state: self._tables(state, new.image_size // new.patch_size, new.patch_size))
        return changed

    def _tables(self, state: dict[str, Tensor], grid: int, patch_size: int) -> dict[str, Tensor]:
        tower = self.vision_model
        positions, patches = (f"vision_model.{tower.name_of(role)}" for role in ("position_embedding", "patch_embedding"))
        return {
            positions: resize_positions(state[positions], grid, tower.class_token),
            f"{patches}.weight": resize_patches(state[f"{patches}.weight"], patch_size),
        }

    def resized(self, image_size: int) -> Comparing:
        return self.for_images(image_size, None)

    def graphs(self) -> list[Graph]:
        return clip_graphs(self)

    def stock_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": batch["pixels"], "input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}

    def _seen(self, states: Tensor) -> Tensor:
        """The states of an image as transformers' class gives them."""
        return states


def _output(out: Encoded, states: Tensor, pooled: Tensor) -> BaseModelOutputWithPooling:
    hidden, maps = tuple(out.hidden) or None, tuple(out.self_attention) or None
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=hidden, attentions=maps)


class ClipTexts(Comparing):
    """Texts as CLIP reads them, and features as it compares them."""

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = NOTHING) -> tuple[Tensor, Encoded]:
        return ids, self.text_model(ids, causal(ids.shape[1], 0, ids.device) & mask.bool()[:, None, None], keep)

    def pool_text(self, states: Tensor, ids: Tensor) -> Tensor:
        """Of the end token: the first with its id, in old files the highest id."""
        end = self.config.text_config.eos_token_id
        at = ids.argmax(-1) if end == LEGACY_END else (ids == end).int().argmax(-1)
        picked = states[torch.arange(states.shape[0], device=states.device), at]
        return self.text_projection(self.text_model.post_norm(picked))

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logit_scale.exp() * image @ text.T

    def loss(self, logits: Tensor, same: Tensor | None = None) -> Tensor:
        """Mean of the cross-entropies over texts and over images; partners of one image or text share its target."""
        right = torch.eye(len(logits), device=logits.device) if same is None else same.float()
        by_image, by_text = (F.cross_entropy(of, to / to.sum(1, keepdim=True)) for of, to in ((logits, right), (logits.T, right.T)))
        return (by_image + by_text) / 2

    @torch.no_grad()
    def limit_scale(self) -> None:
        """To 100 at most, as published."""
        self.logit_scale.clamp_(max=MOST_SCALE)


class SiglipTexts(Comparing):
    """Texts as SigLIP reads them, and features as it compares them."""

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = NOTHING) -> tuple[Tensor, Encoded]:
        """Texts are filled up to every position and nothing is masked, as SigLIP was trained: the last position is what is pooled."""
        part = self.config.text_config
        if ids.shape[1] > part.max_position_embeddings:
            raise BadInput(f"a text of {ids.shape[1]} tokens", f"this SigLIP reads {part.max_position_embeddings}", "cut it first")
        ids = ids.masked_fill(mask == 0, part.pad_token_id)
        ids = F.pad(ids, (0, part.max_position_embeddings - ids.shape[1]), value=part.pad_token_id)
        return ids, self.text_model(ids, None, keep)

    def pool_text(self, states: Tensor, ids: Tensor) -> Tensor:
        return self.text_model.head(self.text_model.post_norm(states[:, -1]))

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logit_scale.exp() * image @ text.T + self.logit_bias

    def loss(self, logits: Tensor, same: Tensor | None = None) -> Tensor:
        """Of every pair by itself: does it belong together?"""
        belongs = 2 * (torch.eye(len(logits), device=logits.device) if same is None else same.float()) - 1
        return -F.logsigmoid(belongs * logits).sum(-1).mean()


class SlicedCLIPModel(ClipTexts):
    config_class = SlicedCLIPConfig

    def __init__(self, config: SlicedCLIPConfig) -> None:
        super().__init__(config)
        self.text_model = self._texts()
        self.vision_model = self._images(pre_norm=True)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        draw_clip(self, module)

    def pooled_image(self, states: Tensor) -> Tensor:
        return self.vision_model.post_norm(states[:, 0])

    def pool_image(self, states: Tensor) -> Tensor:
        return self.visual_projection(self.pooled_image(states))


class SlicedSiglipModel(SiglipTexts):
    """Of both versions. The pooling of the image is part of the vision tower and is never pruned."""

    config_class = SlicedSiglipConfig

    def __init__(self, config: SlicedSiglipConfig) -> None:
        super().__init__(config)
        self.text_model = self._texts(config.text_config.projection_size)
        self.vision_model = self._images(class_token=False, patch_bias=True)
        part = config.vision_config
        shape = (part.hidden_size, part.num_attention_heads, part.intermediate_size, part.layer_norm_eps)
        self.vision_model.add_module("head", Pooling(*shape, activation(part.hidden_act)))
        if config.image_projection:
            self.visual_projection = nn.Linear(part.hidden_size, config.feature_width, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            draw_lecun(module)
        else:
            super()._init_weights(module)
            draw_siglip(self, module)

    def pooled_image(self, states: Tensor) -> Tensor:
        pooled: Tensor = self.get_submodule("vision_model.head")(self._seen(states))
        return pooled

    def pool_image(self, states: Tensor) -> Tensor:
        pooled = self.pooled_image(states)
        return self.visual_projection(pooled) if self.config.image_projection else pooled

    def whole_units(self) -> list[Unit]:
        head = self.get_submodule("vision_model.head")
        assert isinstance(head, Pooling)
        return head.units("vision_model.head", "vision", self.config.vision_config.num_hidden_layers)

    def _seen(self, states: Tensor) -> Tensor:
        return self.vision_model.post_norm(states)


MODELS: dict[type[TwoTowers], type[Comparing]] = {SlicedCLIPConfig: SlicedCLIPModel, SlicedSiglipConfig: SlicedSiglipModel}
