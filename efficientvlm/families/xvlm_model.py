"""X-VLM: CLIP-style vision transformer, BERT-style text and fusion layers, answer decoder. One class for teacher, student and pruned."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from efficientvlm.families.base import CROSS_HEAD, HEAD, NEURON
from efficientvlm.families.blocks import (
    CROSS_ATTENTION,
    HIDDEN,
    SELF_ATTENTION,
    Bias,
    Cache,
    Context,
    Encoded,
    KeyValue,
    Sharing,
    attend,
    no_maps,
    normalise,
    quick_gelu,
    take,
)
from efficientvlm.families.xvlm_config import XVLMConfig


class Attention(nn.Module):
    """Multi-head attention with any number of heads, none included."""

    def __init__(self, width: int, context_width: int, heads: int, head_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, head_dim, dropout
        if heads:
            self.q = nn.Linear(width, heads * head_dim)
            self.k = nn.Linear(context_width, heads * head_dim)
            self.v = nn.Linear(context_width, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width) if heads else Bias(width)

    def project(self, context: Tensor) -> KeyValue | None:
        """Keys and values [B, H, S, D] of `context` [B, S, W]; None where no head is left."""
        return (self._split(self.k(context)), self._split(self.v(context))) if self.heads else None

    def forward(
        self,
        x: Tensor,
        kv: KeyValue | None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        maps: list[Tensor] | None = None,
        sharing: Sharing | None = None,
    ) -> Tensor:
        """`x` [B, T, W] attends to `kv`; `rows` [B] picks the entry of `kv` for each row; `mask` is True where attention may go.

        With `sharing`, which says the same as `rows`, `kv` is not copied; `mask` is then [B, 1, 1, S].
        """
        if kv is None:
            no_maps(x, mask, maps)
            return self.out(x)
        q, dropout = self.q(x), self.dropout if self.training else 0.0
        if sharing is not None:
            return self.out(sharing.apart(self._share(q, kv, mask, dropout, maps, sharing)))
        k, v = kv if rows is None else (take(kv[0], rows), take(kv[1], rows))
        return self.out(attend(self._split(q), k, v, mask, dropout, maps).transpose(1, 2).flatten(2))

    def _share(self, q: Tensor, kv: KeyValue, mask: Tensor | None, dropout: float, maps: list[Tensor] | None, sharing: Sharing) -> Tensor:
        seen = None if mask is None else sharing.together(mask[:, 0].expand(-1, q.shape[1], -1), True)[:, None]
        found: list[Tensor] | None = None if maps is None else []
        out = attend(self._split(sharing.together(q)), *kv, seen, dropout, found).transpose(1, 2).flatten(2)
        if maps is not None and found:
            maps.append(sharing.apart(found[0].transpose(1, 2)).transpose(1, 2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with any number of neurons between them, none included."""

    def __init__(self, width: int, neurons: int, quick: bool) -> None:
        super().__init__()
        self.neurons, self.quick = neurons, quick
        if neurons:
            self.fc1 = nn.Linear(width, neurons)
        self.fc2 = nn.Linear(neurons, width) if neurons else Bias(width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.neurons:
            return self.fc2(x)
        h = self.fc1(x)
        return self.fc2(quick_gelu(h) if self.quick else F.gelu(h))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with the activation that `config.vision_activation` names."""

    def __init__(self, config: XVLMConfig, heads: int, neurons: int) -> None:
        super().__init__()
        width = config.vision_width
        self.attention_norm = nn.LayerNorm(width, config.vision_eps)
        self.attention = Attention(width, width, heads, width // config.vision_heads)
        self.ffn_norm = nn.LayerNorm(width, config.vision_eps)
        self.ffn = FeedForward(width, neurons, quick=config.vision_activation == "quick_gelu")

    def forward(self, x: Tensor, mask: Tensor | None, maps: list[Tensor] | None) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, self.attention.project(h), mask, maps=maps)
        return x + self.ffn(self.ffn_norm(x))


class TextLayer(nn.Module):
    """Post-norm BERT layer, with cross-attention in the fusion and decoder towers."""

    def __init__(self, config: XVLMConfig, heads: int, neurons: int, cross_heads: int | None, context_width: int) -> None:
        super().__init__()
        width, head_dim = config.text_width, config.text_width // config.text_heads
        self.attention = Attention(width, width, heads, head_dim, config.dropout)
        self.attention_norm = nn.LayerNorm(width, config.text_eps)
        self.cross_attention = None
        if cross_heads is not None:
            self.cross_attention = Attention(width, context_width, cross_heads, head_dim, config.dropout)
            self.cross_attention_norm = nn.LayerNorm(width, config.text_eps)
        self.ffn = FeedForward(width, neurons, quick=False)
        self.ffn_norm = nn.LayerNorm(width, config.text_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        context: Context | None = None,
        layer: int = 0,
        cache: Cache | None = None,
        maps: tuple[list[Tensor] | None, list[Tensor] | None] = (None, None),
    ) -> Tensor:
        kv = self.attention.project(x)
        if cache is not None:
            kv = cache.extend(layer, kv)
        x = self.attention_norm(x + self.dropout(self.attention(x, kv, mask, maps=maps[0])))
        if self.cross_attention is not None:
            assert context is not None
            h = self.cross_attention(x, context.kv[layer], context.mask, context.rows, maps[1], context.sharing)
            x = self.cross_attention_norm(x + self.dropout(h))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Vision(nn.Module):
    def __init__(self, config: XVLMConfig, kept: dict[str, list[int]]) -> None:
        super().__init__()
        self.config = config
        width = config.vision_width
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(config.patches + 1, width))
        self.pre_norm = nn.LayerNorm(width, config.vision_eps) if config.vision_pre_norm else nn.Identity()
        self.layers = nn.ModuleList(
            VisionLayer(config, len(kept[f"vision.{i}.{HEAD}"]), len(kept[f"vision.{i}.{NEURON}"])) for i in range(config.vision_layers)
        )
        self.post_norm = nn.LayerNorm(width, config.vision_eps)

    def forward(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None, keep: frozenset[str]) -> Encoded:
        pixels = normalise(pixels, self.config.image_mean, self.config.image_std, self.class_embedding.dtype)
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1) + self.position_embedding
        x, out, mask = self.pre_norm(x), Encoded(x), None
        for depth in range(len(self.layers) + 1):
            if regions is not None and len(self.layers) - depth == self.config.local_attention_depth:
                rows, visible = regions
                mask = torch.cat([visible.bool(), visible.new_ones(x.shape[:2]).bool()])[:, None, None]
                x = torch.cat([x[rows], x])
            if HIDDEN in keep:
                out.hidden.append(x)
            if depth < len(self.layers):
                x = self.layers[depth](x, mask, out.maps(SELF_ATTENTION, keep, depth))
        out.states = self.post_norm(x)
        return out


class Embeddings(nn.Module):
    def __init__(self, config: XVLMConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.text_width)
        self.position = nn.Embedding(config.max_positions, config.text_width)
        self.token_type = nn.Embedding(config.type_vocab_size, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, config.text_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, offset: int = 0) -> Tensor:
        x = self.word(ids) + self.token_type.weight[0] + self.position.weight[offset : offset + ids.shape[1]]
        return self.dropout(self.norm(x))


class Stack(nn.Module):
    """The layers of the text, fusion or decoder tower."""

    def __init__(self, config: XVLMConfig, kept: dict[str, list[int]], tower: str, context_width: int | None, embeddings: bool) -> None:
        super().__init__()
        if embeddings:
            self.embeddings = Embeddings(config)

        def build(i: int) -> TextLayer:
            cross = len(kept[f"{tower}.{i}.{CROSS_HEAD}"]) if context_width else None
            return TextLayer(config, len(kept[f"{tower}.{i}.{HEAD}"]), len(kept[f"{tower}.{i}.{NEURON}"]), cross, context_width or 0)

        self.layers = nn.ModuleList(build(i) for i in range(config.layers()[tower]))

    def context(self, states: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Context:
        """Project `states` [C, S, W] for every layer; `mask` [B, S] (rows already applied), 1 = token."""
        kv = [cast(Attention, layer.cross_attention).project(states) for layer in self.layers]
        sharing = None if rows is None else Sharing.of(rows, states.shape[0])
        return Context(kv, None if mask is None else mask.bool()[:, None, None], rows, sharing)

    def forward(
        self, x: Tensor, mask: Tensor | None, context: Context | None = None, cache: Cache | None = None, keep: frozenset[str] = frozenset()
    ) -> Encoded:
        out = Encoded(x)
        for i, layer in enumerate(self.layers):
            if HIDDEN in keep:
                out.hidden.append(x)
            x = layer(x, mask, context, i, cache, (out.maps(SELF_ATTENTION, keep, i), out.maps(CROSS_ATTENTION, keep, i)))
        if HIDDEN in keep:
            out.hidden.append(x)
        out.states = x
        return out


class LanguageHead(nn.Module):
    """BERT's prediction head; the output matrix is the word embedding it is called with."""

    def __init__(self, config: XVLMConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.text_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width, config.text_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, embeddings: Embeddings) -> Tensor:
        return F.linear(self.norm(F.gelu(self.transform(states))), embeddings.word.weight, self.bias)


def mlp_head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


class XVLMModel(PreTrainedModel):
    """X-VLM with the heads named in `config.heads` and, when `config.decoder_layers` > 0, an answer decoder."""

    config_class = XVLMConfig
    base_model_prefix = ""
    main_input_name = "pixels"

    def __init__(self, config: XVLMConfig) -> None:
        super().__init__(config)
        kept = config.kept_indices()
        self.vision = Vision(config, kept)
        self.text = Stack(config, kept, "text", None, embeddings=True)
        self.fusion = Stack(config, kept, "fusion", config.vision_width, embeddings=False)
        if config.decoder_layers:
            self.decoder = Stack(config, kept, "decoder", config.text_width, embeddings=True)
            self.decoder_head = LanguageHead(config)
        if "itc" in config.heads:
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_width, config.embed_dim)
            self.temp = nn.Parameter(torch.tensor(config.temperature_init))
        if "itm" in config.heads:
            self.itm_head = mlp_head(config.text_width, 2)
        if "box" in config.heads:
            self.box_head = mlp_head(config.text_width, 4)
        if "mlm" in config.heads:
            self.mlm_head = LanguageHead(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Vision):
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, XVLMModel) and hasattr(module, "temp"):
            init.constant_(module.temp, self.config.temperature_init)

    def encode_image(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None = None, keep: frozenset[str] = frozenset()) -> Encoded:
        """Images [I, 3, H, W] (uint8, or normalised floats) to states [I, 1 + patches, W].

        With `regions` = (row → image [R], visible patches [R, 1 + patches]) the last `local_attention_depth` layers run on the regions and
        on the whole images, and the states are [R + I, ...], regions first (X-VLM, multi-grained encoding).
        """
        return self.vision(pixels, regions, keep)

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = frozenset()) -> Encoded:
        """Token ids and mask [B, L] (1 = token) to states [B, L, W]."""
        return self.text(self.text.embeddings(ids), mask.bool()[:, None, None], keep=keep)

    def fuse(self, states: Tensor, mask: Tensor, context: Context, keep: frozenset[str] = frozenset()) -> Encoded:
        """Text states [B, L, W] through the fusion layers, attending to image states projected by `fusion.context`."""
        return self.fusion(states, mask.bool()[:, None, None], context, keep=keep)

    def decode(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = frozenset()
    ) -> tuple[Tensor, Encoded]:
        """Answer tokens [B, L] to next-token logits [B, L, V], causal; with a `cache`, `ids` are the tokens that follow those in it."""
        offset, length = cache.length if cache else 0, ids.shape[1]
        causal = torch.ones(length, offset + length, dtype=torch.bool, device=ids.device).tril(offset)
        visible = causal if mask is None else causal & mask.bool()[:, None, None]
        out = self.decoder(self.decoder.embeddings(ids, offset), visible, context, cache, keep)
        if cache is not None:
            cache.length += length
        return self.decoder_head(out.states, self.decoder.embeddings), out

    def image_feature(self, states: Tensor) -> Tensor:
        """Image states [B, T, W] to unit vectors [B, E]."""
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Text or fused states [B, L, W] with mask [B, L] to one state each [B, W]: the first token's, or the mean over the tokens."""
        if self.config.text_pooling == "cls":
            return states[:, 0]
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def text_feature(self, states: Tensor, mask: Tensor) -> Tensor:
        """Text states [B, L, W] with mask [B, L] to unit vectors [B, E]."""
        return F.normalize(self.text_proj(self.pooled(states, mask)), dim=-1)

    def mlm_logits(self, states: Tensor, positions: Tensor) -> Tensor:
        """Fused states [B, L, W] and masked positions [B, M] to vocabulary logits [B, M, V]."""
        picked = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        return self.mlm_head(picked, self.text.embeddings)
