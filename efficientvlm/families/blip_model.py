"""BLIP's three networks with any number of heads and neurons a layer: subclasses of transformers' own, with its parameter names.

Called as transformers' classes are (`forward`, `generate`), they compute what those do, eagerly. :func:`see` and :func:`read` are the
passes of this package: fused attention, images projected once for several texts, and what is asked for kept on the way.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
    EncoderDecoderCache,
)
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer, BlipMLP, BlipVisionModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextIntermediate,
    BlipTextLayer,
    BlipTextModel,
    BlipTextOutput,
    BlipTextSelfAttention,
    BlipTextSelfOutput,
)

from efficientvlm.families.base import CROSS_HEAD, HEAD, NEURON
from efficientvlm.families.blip_config import BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig, SlicedBlipConfig
from efficientvlm.families.blocks import (
    CROSS_ATTENTION,
    HIDDEN,
    SELF_ATTENTION,
    Bias,
    Cache,
    Context,
    Encoded,
    KeyValue,
    attend,
    no_maps,
    normalise,
    take,
)

Maps = list[Tensor] | None


def projection(inputs: int, width: int) -> nn.Module:
    """An output projection; with no inputs, what is left of it."""
    return nn.Linear(inputs, width) if inputs else Bias(width)


class VisionAttention(BlipAttention):
    """Self-attention with one Linear for queries, keys and values of any number of heads, none included."""

    def __init__(self, config: BlipVisionConfig, heads: int) -> None:
        nn.Module.__init__(self)
        self.config, self.embed_dim, self.num_heads = config, config.hidden_size, heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_dropout)
        if heads:
            self.qkv = nn.Linear(self.embed_dim, 3 * heads * self.head_dim)
        self.projection = projection(heads * self.head_dim, self.embed_dim)

    def forward(self, hidden_states: Tensor, fused: bool = False, maps: Maps = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        """States [B, T, W] to (states, map [B, H, T, T]); `fused` gives no map, but appends it to `maps`."""
        seen: Maps = maps if fused else []
        if self.num_heads:
            q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
            x = attend(q, k, v, dropout=self.dropout.p if self.training else 0.0, maps=seen).transpose(1, 2).flatten(2)
        else:
            no_maps(hidden_states, None, seen)
            x = hidden_states
        return self.projection(x), None if fused or not seen else seen[-1]


class VisionLayer(BlipEncoderLayer):
    def __init__(self, config: BlipVisionConfig, heads: int, neurons: int) -> None:
        nn.Module.__init__(self)
        self.embed_dim = config.hidden_size
        self.self_attn = VisionAttention(config, heads)
        self.layer_norm1 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)
        self.mlp = BlipMLP(_sized(config, neurons))
        if not neurons:
            self.mlp.fc1 = self.mlp.activation_fn = nn.Identity()
            self.mlp.fc2 = Bias(self.embed_dim)
        self.layer_norm2 = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_eps)


class TextHeads(BlipTextSelfAttention):
    """Queries, keys and values of any number of heads; without heads it hands on what it is given, for the bias behind it."""

    def __init__(self, config: BlipTextConfig, heads: int, context_width: int, index: int) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_idx, self.num_attention_heads = config, index, heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = heads * self.attention_head_size
        if heads:
            self.query = nn.Linear(config.hidden_size, self.all_head_size)
            self.key = nn.Linear(context_width, self.all_head_size)
            self.value = nn.Linear(context_width, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def project(self, states: Tensor) -> KeyValue | None:
        """Keys and values [B, H, S, D] of `states` [B, S, W]; None where no head is left."""
        return (self._split(self.key(states)), self._split(self.value(states))) if self.num_attention_heads else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        context: Context | None = None,
        maps: Maps = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(heads' outputs [B, T, H * D], map): as transformers calls it, or attending to the only entry of `context.kv`, without a map."""
        if context is not None:
            (kv,) = context.kv
            if kv is not None and context.rows is not None:
                kv = take(kv[0], context.rows), take(kv[1], context.rows)
            return self._attend(hidden_states, kv, context.mask, maps), None
        kv = self._remembered(hidden_states, encoder_hidden_states, cache_of(named))
        mask = None if attention_mask is None else visible(attention_mask)
        found: list[Tensor] = []
        return self._attend(hidden_states, kv, mask, found), found[-1]

    def _attend(self, x: Tensor, kv: KeyValue | None, mask: Tensor | None, maps: Maps) -> Tensor:
        if kv is None:
            no_maps(x, mask, maps)
            return x
        dropout = self.dropout.p if self.training else 0.0
        return attend(self._split(self.query(x)), *kv, mask, dropout, maps).transpose(1, 2).flatten(2)

    def _remembered(self, x: Tensor, images: Tensor | None, cache: Any) -> KeyValue | None:
        """Keys and values of `x`, after those in `cache`, or of `images`, which a cache for both holds after the first step."""
        if images is None:
            if cache is None:
                return self.project(x)
            own = getattr(cache, "self_attention_cache", cache)
            if (kv := self.project(x)) is not None:
                return cast(KeyValue, own.update(*kv, self.layer_idx))
            empty = x.new_zeros(len(x), 1, x.shape[1], 1)  # transformers reads the length of a cache off its first layer
            own.update(empty, empty, self.layer_idx)
            return None
        both = isinstance(cache, EncoderDecoderCache)
        if both and cache.is_updated.get(self.layer_idx):
            held = cache.cross_attention_cache.layers[self.layer_idx]
            return held.keys, held.values
        if (kv := self.project(images)) is not None and both:
            cache.is_updated[self.layer_idx] = True
            cache.cross_attention_cache.update(*kv, self.layer_idx)
        return kv

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)


class TextAttention(BlipTextAttention):
    def __init__(self, config: BlipTextConfig, heads: int, context_width: int, index: int) -> None:
        nn.Module.__init__(self)
        self.self = TextHeads(config, heads, context_width, index)
        self.output = BlipTextSelfOutput(config)
        self.output.dense = projection(self.self.all_head_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """What :class:`TextHeads` gives, through the output projection and norm."""
        heads, seen = self.self(hidden_states, *given, **named)
        return self.output(heads, hidden_states), seen


class TextLayer(BlipTextLayer):
    def __init__(self, config: BlipTextConfig, index: int, heads: int, cross_heads: int, neurons: int) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_num = config, index
        self.chunk_size_feed_forward, self.seq_len_dim = config.chunk_size_feed_forward, 1
        self.attention = TextAttention(config, heads, config.hidden_size, index)
        self.crossattention = TextAttention(config, cross_heads, config.encoder_hidden_size, index)
        self.intermediate = BlipTextIntermediate(_sized(config, neurons)) if neurons else nn.Identity()
        self.output = BlipTextOutput(_sized(config, neurons))
        if not neurons:
            self.output.dense = Bias(config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """As transformers calls a layer of BLIP, which itself drops the mask of what is cross-attended to."""
        x, cache = hidden_states, cache_of(named)
        x = self.attention(x, attention_mask, cache=cache)[0]
        if encoder_hidden_states is not None:
            x = self.crossattention(x, encoder_attention_mask, encoder_hidden_states, cache=cache)[0]
        return self.feed(x)

    def feed(self, x: Tensor) -> Tensor:
        """`x` [B, T, W] through the feed-forward network."""
        return self.output(self.intermediate(x), x)


def cache_of(named: dict[str, Any]) -> Any:
    """The key/value cache among keyword arguments of transformers, under its name of 5.24 or the one before."""
    return named.get("cache", named.get("past_key_values"))


def visible(mask: Tensor) -> Tensor:
    """Where attention may go, as booleans, from a mask that transformers adds to the scores."""
    return mask if mask.dtype == torch.bool else mask >= 0


def _sized(config: Any, neurons: int) -> Any:
    """`config` for a feed-forward network of `neurons`; without any, its Linears are replaced, and made small."""
    sized = copy.copy(config)
    sized.intermediate_size = max(neurons, 1)
    return sized


def _without_layers(config: SlicedBlipConfig) -> SlicedBlipConfig:
    """`config` for transformers' constructor, which then builds all but the layers."""
    bare = config.copy()
    bare.vision_config.num_hidden_layers = bare.text_config.num_hidden_layers = 0
    return bare


def _add_layers(model: Any, config: SlicedBlipConfig) -> None:
    """Give a network built :func:`_without_layers` those that are left of them, and fresh weights to these."""
    kept = {group: len(indices) for group, indices in config.kept_indices().items()}
    parts = ("vision_config", "text_config")
    for part in parts:  # of the configuration that the network has, which knows how it attends
        getattr(model.config, part).num_hidden_layers = getattr(config, part).num_hidden_layers
    config = model.config
    vision = config.vision_config
    model.vision_model.config = model.vision_model.encoder.config = vision
    for i in range(config.layers()["vision"]):
        model.vision_model.encoder.layers.append(VisionLayer(vision, kept[f"vision.{i}.{HEAD}"], kept[f"vision.{i}.{NEURON}"]))
    for tower in set(config.towers) - {"vision"}:
        part = config.text_tower(tower)
        bert = text_model(model, tower)
        bert.config = bert.encoder.config = part
        if tower == "decoder":
            model.text_decoder.config = part
        for i in range(config.layers()[tower]):
            counts = (kept[f"{tower}.{i}.{kind}"] for kind in (HEAD, CROSS_HEAD, NEURON))
            bert.encoder.layer.append(TextLayer(part, i, *counts))
    model.post_init()


def text_model(model: Any, tower: str) -> BlipTextModel:
    """The network of tower `text` or `decoder`."""
    return cast(BlipTextModel, model.text_encoder if tower == "text" else model.text_decoder.bert)


class SlicedBlipForQuestionAnswering(BlipForQuestionAnswering):
    config_class = BlipAnswerConfig

    def __init__(self, config: BlipAnswerConfig) -> None:
        super().__init__(_without_layers(config))
        _add_layers(self, config)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Answers [B, L] to questions [B, Q], as transformers' `generate` with the same `options`, which here attend to no padding."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = torch.arange(len(input_ids), device=input_ids.device)
        seen = context(self.text_encoder, see(self, pixel_values, frozenset()).states, rows=rows)
        question = read(self.text_encoder, input_ids, mask.bool()[:, None, None], seen, frozenset()).states
        text = self.config.text_config
        answer: Tensor = self.text_decoder.generate(
            input_ids=input_ids.new_full((len(input_ids), 1), text.bos_token_id),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=question,
            encoder_attention_mask=mask,
            **options,
        )
        return answer


class SlicedBlipForConditionalGeneration(BlipForConditionalGeneration):
    config_class = BlipCaptionConfig

    def __init__(self, config: BlipCaptionConfig) -> None:
        super().__init__(_without_layers(config))
        _add_layers(self, config)


class SlicedBlipForImageTextRetrieval(BlipForImageTextRetrieval):
    config_class = BlipRetrievalConfig

    def __init__(self, config: BlipRetrievalConfig) -> None:
        super().__init__(_without_layers(config))
        _add_layers(self, config)


MODELS: dict[type[SlicedBlipConfig], type[Any]] = {
    BlipAnswerConfig: SlicedBlipForQuestionAnswering,
    BlipCaptionConfig: SlicedBlipForConditionalGeneration,
    BlipRetrievalConfig: SlicedBlipForImageTextRetrieval,
}


def see(model: Any, pixels: Tensor, keep: frozenset[str]) -> Encoded:
    """Images [I, 3, H, W] (uint8, or normalised floats) to states [I, 1 + patches, W]."""
    vision: BlipVisionModel = model.vision_model
    x = normalise(pixels, model.config.image_mean, model.config.image_std, vision.post_layernorm.weight.dtype)
    x = vision.embeddings(x)
    out = Encoded(x)
    for i, layer in enumerate(vision.encoder.layers):
        if HIDDEN in keep:
            out.hidden.append(x)
        x = x + layer.self_attn(layer.layer_norm1(x), fused=True, maps=out.maps(SELF_ATTENTION, keep, i))[0]
        x = x + layer.mlp(layer.layer_norm2(x))
    if HIDDEN in keep:
        out.hidden.append(x)
    out.states = vision.post_layernorm(x)
    return out


def context(bert: BlipTextModel, states: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Context:
    """`states` [C, S, W] projected for every layer of `bert`; `mask` [B, S] (rows already applied), 1 = token."""
    kv = [layer.crossattention.self.project(states) for layer in bert.encoder.layer]
    return Context(kv, None if mask is None else mask.bool()[:, None, None], rows)


def embed(bert: BlipTextModel, ids: Tensor, offset: int) -> Tensor:
    """Tokens [B, L], from position `offset` on, to states [B, L, W]."""
    table = bert.embeddings
    x = table.word_embeddings(ids) + table.position_embeddings.weight[offset : offset + ids.shape[1]]
    return table.dropout(table.LayerNorm(x))


def read(
    bert: BlipTextModel, ids: Tensor, mask: Tensor | None, seen: Context | None, keep: frozenset[str], cache: Cache | None = None
) -> Encoded:
    """Tokens [B, L] to states [B, L, W], attending to `seen`, or to themselves alone without it.

    `mask` is True where attention may go, broadcast to [B, H, L, L]; with a `cache`, `ids` are the tokens that follow those in it.
    """
    x = embed(bert, ids, cache.length if cache else 0)
    out = Encoded(x)
    for i, layer in enumerate(bert.encoder.layer):
        if HIDDEN in keep:
            out.hidden.append(x)
        kv = layer.attention.self.project(x)
        if cache is not None:
            kv = cache.extend(i, kv)
        own_maps, cross_maps = (out.maps(kind, keep, i) for kind in (SELF_ATTENTION, CROSS_ATTENTION))
        x = layer.attention.output(layer.attention.self(x, context=Context([kv], mask), maps=own_maps)[0], x)
        if seen is not None:
            one = Context([seen.kv[i]], seen.mask, seen.rows)
            x = layer.crossattention.output(layer.crossattention.self(x, context=one, maps=cross_maps)[0], x)
        x = layer.feed(x)
    if HIDDEN in keep:
        out.hidden.append(x)
    out.states = x
    return out


def decode(
    model: Any, ids: Tensor, mask: Tensor | None, seen: Context, keep: frozenset[str] = frozenset(), cache: Cache | None = None
) -> tuple[Tensor, Encoded]:
    """Tokens [B, L] to next-token logits [B, L, V], causal; the first token of a text becomes the decoder's own."""
    offset, length = cache.length if cache else 0, ids.shape[1]
    ids = starting(ids, model.config.decoder_start, offset)
    causal = torch.ones(length, offset + length, dtype=torch.bool, device=ids.device).tril(offset)
    visible = causal if mask is None else causal & mask.bool()[:, None, None]
    out = read(model.text_decoder.bert, ids, visible, seen, keep, cache)
    if cache is not None:
        cache.length += length
    return model.text_decoder.cls(out.states), out


def starting(ids: Tensor, first: int | None, offset: int = 0) -> Tensor:
    """`ids` [B, L], tokens from number `offset` on, with `first` as token 0; None leaves them."""
    if first is None:
        return ids
    return torch.where(torch.arange(offset, offset + ids.shape[1], device=ids.device) == 0, first, ids)
