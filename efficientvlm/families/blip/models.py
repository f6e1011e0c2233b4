"""BLIP's three networks, to be called as transformers' classes are (`forward`, `generate`).

So called they compute what those do, but padding of a question is never attended to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import (
    BlipAnswerConfig,
    BlipCaptionConfig,
    BlipComparisonConfig,
    BlipPretrainingConfig,
    BlipRetrievalConfig,
    SlicedBlipConfig,
)
from efficientvlm.families.blip.gain import gained
from efficientvlm.families.blip.heads import tuned, tuned_config
from efficientvlm.families.blip.names import PREDICTIONS
from efficientvlm.families.blip.network import Blip, starting
from efficientvlm.families.towers.attention import Context
from efficientvlm.families.towers.decoding import Rules, continued, stepping
from efficientvlm.families.towers.network import asked


@dataclass
class Called(ModelOutput):
    """What transformers' classes give, by the same names; `hidden_states` and `attentions` are those of the vision tower."""

    itm_score: Tensor | None = None
    loss: Tensor | None = None
    logits: Tensor | None = None
    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    vision_pooler_output: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None
    question_embeds: Tensor | None = None


class StockInterface(Blip):
    """What calls as of transformers' classes have in common, and how one of these networks becomes another."""

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[Any, list[str]]:
        """As the base says, with the parts of the network that has the ability: :func:`families.blip.gain.gained`."""
        kind = next((kind for kind in MODELS if ability in kind.able and not kind.shares), None)
        if kind is None or ability in self.config.abilities():
            return super().gain(ability, donor, decoder_init)
        return gained(self, MODELS[kind], donor, decoder_init)

    def _called(self, pixels: Tensor, attentions: bool | None, hidden: bool | None) -> tuple[Tensor, dict[str, Any]]:
        """States of images, and what is given of the vision tower."""
        image = self.encode_image(pixels, keep=asked(self.config, attentions, hidden))
        kept = {"hidden_states": tuple(image.hidden) or None, "attentions": tuple(image.self_attention) or None}
        return image.states, {"last_hidden_state": image.states, **kept}

    def _loss(self, logits: Tensor, labels: Tensor | None) -> Tensor | None:
        """Mean cross-entropy of the tokens after the first; -100 is not counted."""
        if labels is None:
            return None
        smoothing = self.config.text_config.label_smoothing
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)

    def _written(self, ids: Tensor, context: Context, max_length: int, max_new_tokens: int | None) -> Tensor:
        text, most = self.config.text_config, max_length - ids.shape[1] if max_new_tokens is None else max_new_tokens
        written = continued(stepping(self, context), ids, Rules(text.sep_token_id, text.pad_token_id, most))
        return torch.cat([ids, written], 1)


class SlicedBlipForQuestionAnswering(StockInterface):
    config_class = BlipAnswerConfig
    _tied_weights_keys = {
        f"{PREDICTIONS}.decoder.bias": f"{PREDICTIONS}.bias",
        f"{PREDICTIONS}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Called:
        """As transformers' own class is called, and what it gives; answers are `labels` unless `decoder_input_ids` are given."""
        answers = labels if decoder_input_ids is None else decoder_input_ids
        if answers is None:
            raise ValueError("give labels or decoder_input_ids, or call generate")
        states, given = self._called(pixel_values, output_attentions, output_hidden_states)
        logits, _ = self.text_decoder(answers, decoder_attention_mask, self._asked(input_ids, attention_mask, states))
        return Called(loss=self._loss(logits, labels), image_embeds=states, **given)

    def _asked(self, ids: Tensor, mask: Tensor | None, images: Tensor) -> Context:
        """What answers to the questions `ids` [B, L] about `images` [B, T, W] attend to."""
        mask = torch.ones_like(ids) if mask is None else mask
        return self.text_decoder.bert.context(self.text_encoder.read(ids, mask, self.text_encoder.context(images)).states, mask)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        max_length: int = 20,
        max_new_tokens: int | None = None,
    ) -> Tensor:
        """Greedy answers [B, L] to questions [B, Q], their first token included, padded behind the separator."""
        context = self._asked(input_ids, attention_mask, self.encode_image(pixel_values).states)
        return self._written(input_ids.new_full((len(input_ids), 1), self.config.decoder_start), context, max_length, max_new_tokens)


class SlicedBlipForConditionalGeneration(StockInterface):
    config_class = BlipCaptionConfig
    _tied_weights_keys = SlicedBlipForQuestionAnswering._tied_weights_keys

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Called:
        """As transformers' own class is called, and what it gives."""
        states, given = self._called(pixel_values, output_attentions, output_hidden_states)
        logits, _ = self.text_decoder(input_ids, attention_mask, self.text_decoder.bert.context(states))
        return Called(loss=self._loss(logits, labels), logits=logits, image_embeds=states, **given)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_length: int = 20,
        max_new_tokens: int | None = None,
    ) -> Tensor:
        """Greedy captions [B, L] that go on with a prompt, without its last token, which ends it; padded behind the separator.

        Raises:
            BadInput: prompts of different length.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            why = "the next token stands behind the last one, and there is padding"
            raise BadInput("captions cannot go on from prompts of different length", why, "give those of one length at a time")
        first = torch.full((len(pixel_values), 1), self.config.decoder_start, device=pixel_values.device)
        ids = first if input_ids is None else starting(input_ids[:, :-1], self.config.decoder_start)
        context = self.text_decoder.bert.context(self.encode_image(pixel_values).states)
        return self._written(ids, context, max_length, max_new_tokens)


class SlicedBlipForImageTextRetrieval(StockInterface):
    config_class = BlipRetrievalConfig

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        use_itm_head: bool = True,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Called:
        """As transformers' own class is called, and what it gives: matching logits [B, 2], or the similarities [I, B] of features."""
        states, given = self._called(pixel_values, output_attentions, output_hidden_states)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        context = self.text_encoder.context(states) if use_itm_head else None
        read = self.text_encoder.read(input_ids, mask, context).states
        if use_itm_head:
            score = self.itm_head(read[:, 0])
        else:
            score = self.image_feature(states) @ F.normalize(self.text_proj(read[:, 0]), dim=-1).T
        return Called(itm_score=score, question_embeds=read, **given)


class SlicedBlipForPretraining(Blip):
    """Of which transformers has no class; it is not called as those are."""

    config_class = BlipPretrainingConfig

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[Any, list[str]]:
        """As the base says: to match, caption or answer it becomes the network of transformers' layout that does that alone; an answer
        decoder begins with its own, or with the donor's where `decoder_init` is `teacher`. To compare it begins with what matches."""
        kind = next((kind for kind in MODELS if ability in kind.able and not kind.shares), None)
        if kind is None:
            return super().gain(ability, donor, decoder_init)
        if ability == "compare" or (ability == "answer" and decoder_init == "teacher"):
            network: tuple[Any, list[str]] = self.gain("match")[0].gain(ability, donor, decoder_init)
            return network
        return tuned(self, MODELS[kind](tuned_config(self.config, kind)))


class BlipForComparison(Blip):
    """Of two images and a text; transformers has no class of it, so that it is not called as those are."""

    config_class = BlipComparisonConfig


MODELS: dict[type[SlicedBlipConfig], type[Any]] = {
    BlipAnswerConfig: SlicedBlipForQuestionAnswering,
    BlipCaptionConfig: SlicedBlipForConditionalGeneration,
    BlipRetrievalConfig: SlicedBlipForImageTextRetrieval,
    BlipPretrainingConfig: SlicedBlipForPretraining,
    BlipComparisonConfig: BlipForComparison,
}
