"""BLIP's three networks with any number of heads and neurons a layer, under the names of transformers' files.

Called as transformers' classes are (`forward`, `generate`), they compute what those do; but padding of a question is never attended to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput

from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig, SlicedBlipConfig
from efficientvlm.families.blip.graphs import blip_graphs
from efficientvlm.families.network import Graph, Record, check_taps, kinds_of, require
from efficientvlm.families.towers.attention import Cache, Context, Sharing
from efficientvlm.families.towers.bert import Bert, Embeddings, LanguageHead
from efficientvlm.families.towers.decoding import greedy
from efficientvlm.families.towers.layers import PostNormLayer, PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork, asked
from efficientvlm.families.towers.parts import CROSS_ATTENTION, HIDDEN, NOTHING, SELF_ATTENTION, Encoded, activation, normalise, tap
from efficientvlm.families.towers.vit import Vit

IMAGES = {
    **{role: f"embeddings.{role}" for role in ("class_embedding", "patch_embedding", "position_embedding")},
    "layers": "encoder.layers",
    "post_norm": "post_layernorm",
}
IMAGE_LAYER = {
    **{"attention": "self_attn", ":qkv": "qkv", ":out": "projection", "attention_norm": "layer_norm1"},
    **{"fc1": "mlp.fc1", "fc2": "mlp.fc2", "ffn_norm": "layer_norm2"},
}
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "norm": "LayerNorm"}
TEXT_LAYER = {
    **{":q": "self.query", ":k": "self.key", ":v": "self.value", ":out": "output.dense"},
    **{"attention_norm": "attention.output.LayerNorm"},
    **{"cross_attention": "crossattention", "cross_attention_norm": "crossattention.output.LayerNorm"},
    **{"fc1": "intermediate.dense", "fc2": "output.dense", "ffn_norm": "output.LayerNorm"},
}
HEAD = {"dense": "transform.dense", "norm": "transform.LayerNorm", "tied_weight": "decoder.weight", "tied_bias": "decoder.bias"}
LAYERS = {"vision": "vision_model.encoder.layers", "text": "text_encoder.encoder.layer", "decoder": "text_decoder.bert.encoder.layer"}
FEATURES = "features"
PREDICTIONS = "text_decoder.cls.predictions"


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


class Decoder(nn.Module):
    """The text tower that writes, and its prediction head."""

    def __init__(self, bert: Bert, head: LanguageHead) -> None:
        super().__init__()
        self.bert, self.cls = bert, nn.Module()
        self.cls.predictions = head

    def forward(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        """Tokens [B, L] to next-token logits [B, L, V]; with a `cache`, `ids` are the tokens that follow those in it."""
        out = self.bert.follow(ids, mask, context, cache, keep)
        head = cast(LanguageHead, self.cls.predictions)
        return head(out.states, self.bert.embeddings), out


class Blip(TowerNetwork):
    """What the three networks have in common."""

    places = LAYERS
    owners = {"vision_model": "vision", "text_encoder": "text", "text_decoder": "decoder"}
    main_input_name = "pixel_values"
    config: SlicedBlipConfig

    @property
    def taps(self) -> frozenset[str]:
        """Of the towers that there are; features only where they are compared."""
        towers = self.config.towers
        found = {f"{tower}.{kind}" for tower in towers for kind in (HIDDEN, SELF_ATTENTION)}
        found |= {f"{tower}.{CROSS_ATTENTION}" for tower in towers if tower != "vision"}
        return frozenset(found | {f"{tower}.{FEATURES}" for tower in towers if "decoder" not in towers})

    def __init__(self, config: SlicedBlipConfig) -> None:
        super().__init__(config)
        self.vision_model = self._images()
        if "text" in config.towers:
            self.text_encoder = self._texts("text")
        if "decoder" in config.towers:
            bert, text = self._texts("decoder"), config.text_config
            shape = (text.hidden_size, text.vocab_size, text.layer_norm_eps, activation(text.hidden_act))
            self.text_decoder = Decoder(bert, LanguageHead(*shape, HEAD, tied=bert.embeddings.word))

    def _images(self) -> Vit:
        part, kept = self.config.vision_config, self.config.kept_indices()
        sizes = (Size.of(kept, f"vision.{i}", part.hidden_size, part.num_attention_heads) for i in range(part.num_hidden_layers))
        kind: dict[str, Any] = {"dropout": part.attention_dropout, "fused": True}
        layers = [PreNormLayer(size, part.layer_norm_eps, activation(part.hidden_act), IMAGE_LAYER, **kind) for size in sizes]
        shape = (part.hidden_size, part.image_size, part.patch_size, part.layer_norm_eps)
        return Vit(layers, *shape, IMAGES, patch_bias=True, batch_axis=True)

    def _texts(self, tower: str) -> Bert:
        part, kept, context = self.config.text_config, self.config.kept_indices(), self.config.context_width(tower)
        names = (f"{tower}.{i}" for i in range(self.config.layers()[tower]))
        sizes = (Size.of(kept, name, part.hidden_size, part.num_attention_heads, context) for name in names)
        dropout = {"dropout": part.hidden_dropout_prob, "attention_dropout": part.attention_probs_dropout_prob}
        layers = [PostNormLayer(size, part.layer_norm_eps, activation(part.hidden_act), TEXT_LAYER, **dropout) for size in sizes]
        shape = (part.vocab_size, part.max_position_embeddings, part.hidden_size, part.layer_norm_eps, part.hidden_dropout_prob)
        return Bert(layers, Embeddings(*shape, padding=part.pad_token_id, names=EMBEDDINGS), {"layers": "encoder.layer"})

    def _init_weights(self, module: nn.Module) -> None:
        """Every tower by its own `initializer_range`, what is behind them by the common one."""
        vision, text = self.config.vision_config.initializer_range, self.config.text_config.initializer_range
        if isinstance(module, Vit):
            _draw(module, vision)
            init.trunc_normal_(module.class_embedding, std=vision)
            init.trunc_normal_(module.position_embedding, std=vision)
        elif isinstance(module, Bert | LanguageHead):
            _draw(module, text)
        elif module is self:
            for part in self.children():
                if isinstance(part, nn.Linear):
                    _draw(part, self.config.initializer_range)

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        table = parameter.rpartition(".embeddings.")[2]
        return table.startswith(("word_embeddings.", "position_embeddings.")) or table == "position_embedding"

    def get_input_embeddings(self) -> nn.Module:
        bert: Bert = self.text_encoder if "text" in self.config.towers else self.text_decoder.bert
        return bert.embeddings.word

    def encode_image(self, pixels: Tensor, keep: frozenset[str] = NOTHING) -> Encoded:
        """Images [I, 3, H, W] (uint8, or normalised floats) to states [I, 1 + patches, W]."""
        pixels = normalise(pixels, self.config.image_mean, self.config.image_std, self.vision_model.dtype)
        out: Encoded = self.vision_model(pixels, keep=keep)
        out.states = self.vision_model.post_norm(out.states)
        return out

    def image_feature(self, states: Tensor) -> Tensor:
        """Image states [I, T, W] to unit vectors [I, E]; only of the network that matches."""
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def text_feature(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts [B, L], read without an image, to unit vectors [B, E]; only of the network that matches."""
        return F.normalize(self.text_proj(self.text_encoder.read(ids, mask).states[:, 0]), dim=-1)

    def read(self, ids: Tensor, mask: Tensor, context: Context, keep: frozenset[str] = NOTHING) -> Encoded:
        """Texts [B, L] that are read with an image, whose first token becomes `question_start_id`, to states [B, L, W]."""
        return self.text_encoder.read(starting(ids, self.config.question_start_id), mask, context, keep)

    def follow(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        """Tokens [B, L] to next-token logits [B, L, V], causal; the first token of a text becomes the decoder's own."""
        ids = starting(ids, self.config.decoder_start, cache.length if cache else 0)
        logits, out = self.text_decoder(ids, mask, context, cache, keep)
        return logits, out

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """Next-token `logits` [A, L, V] of answers or captions, or the matching `logits` [B, 2] (no, yes) of image and text.

        The taps `vision.features` and `text.features` of a matching network are unit vectors [I, E] and [B, E]; for them texts are read
        once more, without the image.
        """
        wanted = check_taps(self, want)
        if "text" not in self.config.towers:
            return self._caption(batch, wanted)
        if "decoder" not in self.config.towers:
            return self._match(batch, wanted)
        record, answers = self.encode(batch, wanted)
        if "answer_ids" in batch:
            rows = batch["answer_index"]
            keep = kinds_of(wanted, "decoder")
            sharing = Sharing.of(rows, len(batch["question_ids"]))
            seen = Context(answers.kv, None if answers.mask is None else answers.mask[rows], rows, sharing)
            record["logits"], out = self.follow(batch["answer_ids"], batch["answer_mask"], seen, keep=keep)
            tap(record, "decoder", out, keep)
        return record

    def encode(self, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, Context]:
        require(self, "answer")
        wanted = check_taps(self, want)
        record, states = self._read_with_image(batch, batch["question_ids"], batch["question_mask"], wanted)
        return record, self.text_decoder.bert.context(states, batch["question_mask"])

    def decode(self, context: Context, ids: Tensor, mask: Tensor | None, rows: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.follow(ids, mask, context if rows is None else context.of(rows), cache)[0]

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encode_image(pixels).states
        return states, self.image_feature(states)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The states are the ids themselves: to match, a text is read once more from its first layer, with the image."""
        return ids, self.text_feature(ids, mask)

    def match(self, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.itm_head(self.read(texts, mask, self.text_encoder.context(images, rows=rows)).states[:, 0])
        return logits

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        side = self.config.vision_config.image_size
        ones = torch.ones(batch_size, text_length, dtype=torch.long, device=device)
        rows = torch.arange(batch_size, device=device)
        batch: dict[str, Any] = {"pixels": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8, device=device), "image_index": rows}
        if not {"text", "decoder"} <= {*self.config.towers}:
            return batch | {"text_ids": ones, "text_mask": ones}
        answer = {"answer_ids": ones[:, :1], "answer_mask": ones[:, :1], "answer_index": rows}
        return batch | {"question_ids": ones, "question_mask": ones, **answer}

    def graphs(self) -> list[Graph]:
        return blip_graphs(self)

    def stock_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Captioning and matching take the same; a network that answers is given its questions as answers too."""
        if "text_ids" in batch:
            return {"pixel_values": batch["pixels"], "input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}
        ids, mask = batch["question_ids"], batch["question_mask"]
        return {"pixel_values": batch["pixels"], "input_ids": ids, "attention_mask": mask, "labels": ids}

    def _read_with_image(self, batch: dict[str, Any], ids: Tensor, mask: Tensor, wanted: frozenset[str]) -> tuple[Record, Tensor]:
        """Record of vision and text, with text `states` [B, L, W] after cross-attention."""
        image = self.encode_image(batch["pixels"], kinds_of(wanted, "vision"))
        seen = self.text_encoder.context(image.states, rows=batch.get("image_index"))
        text = self.read(ids, mask, seen, kinds_of(wanted, "text"))
        record = Record(states=text.states, image_states=image.states)
        for tower, out in (("vision", image), ("text", text)):
            tap(record, tower, out, kinds_of(wanted, tower) - {FEATURES})
        return record, text.states

    def _match(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        ids, mask = batch["text_ids"], batch["text_mask"]
        record, states = self._read_with_image(batch, ids, mask, wanted)
        record["logits"] = self.itm_head(states[:, 0])
        if f"vision.{FEATURES}" in wanted:
            record[f"vision.{FEATURES}"] = self.image_feature(record["image_states"])
        if f"text.{FEATURES}" in wanted:
            record[f"text.{FEATURES}"] = self.text_feature(ids, mask)
        return record

    def _caption(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        record = Record()
        image = self.encode_image(batch["pixels"], kinds_of(wanted, "vision"))
        seen = self.text_decoder.bert.context(image.states, rows=batch.get("image_index"))
        record["logits"], out = self.follow(batch["text_ids"], batch["text_mask"], seen, keep=kinds_of(wanted, "decoder"))
        for tower, encoded in (("vision", image), ("decoder", out)):
            tap(record, tower, encoded, kinds_of(wanted, tower))
        return record

    def _called(self, pixels: Tensor, attentions: bool | None, hidden: bool | None) -> tuple[Tensor, dict[str, Any]]:
        """States of images, and what is given of the vision tower."""
        image = self.encode_image(pixels, asked(self.config, attentions, hidden))
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
        cache = self.new_cache()
        written = greedy(lambda last: self.text_decoder(last, None, context, cache)[0], ids, text.sep_token_id, text.pad_token_id, most)
        return torch.cat([ids, written], 1)


class SlicedBlipForQuestionAnswering(Blip):
    config_class = BlipAnswerConfig
    _tied_weights_keys = {
        f"{PREDICTIONS}.decoder.bias": f"{PREDICTIONS}.bias",
        f"{PREDICTIONS}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: BlipAnswerConfig) -> None:
        super().__init__(config)
        self.post_init()

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


class SlicedBlipForConditionalGeneration(Blip):
    config_class = BlipCaptionConfig
    _tied_weights_keys = SlicedBlipForQuestionAnswering._tied_weights_keys

    def __init__(self, config: BlipCaptionConfig) -> None:
        super().__init__(config)
        self.post_init()

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


class SlicedBlipForImageTextRetrieval(Blip):
    config_class = BlipRetrievalConfig

    def __init__(self, config: BlipRetrievalConfig) -> None:
        super().__init__(config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.post_init()

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


MODELS: dict[type[SlicedBlipConfig], type[Any]] = {
    BlipAnswerConfig: SlicedBlipForQuestionAnswering,
    BlipCaptionConfig: SlicedBlipForConditionalGeneration,
    BlipRetrievalConfig: SlicedBlipForImageTextRetrieval,
}


def starting(ids: Tensor, first: int | None, offset: int = 0) -> Tensor:
    """`ids` [B, L], tokens from number `offset` on, with `first` as token 0; None leaves them."""
    if first is None:
        return ids
    return torch.where(torch.arange(offset, offset + ids.shape[1], device=ids.device) == 0, first, ids)


def _draw(module: nn.Module, std: float) -> None:
    """Fresh weights for all linear maps and tables in `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear | nn.Conv2d | nn.LayerNorm) and part.bias is not None:
            init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            init.ones_(part.weight)
        elif isinstance(part, nn.Embedding) and part.padding_idx is not None and not getattr(part.weight, "_is_hf_initialized", False):
            with torch.no_grad():
                part.weight[part.padding_idx] = 0
