"""X-VLM: CLIP-style vision transformer, BERT-style text and fusion layers, answer decoder. One class for teacher, student and pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from efficientvlm.families.towers.attention import Cache, Context
from efficientvlm.families.towers.bert import Bert, Embeddings, LanguageHead
from efficientvlm.families.towers.layers import PostNormLayer, PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork
from efficientvlm.families.towers.parts import NOTHING, Encoded, activation, normalise
from efficientvlm.families.towers.vit import Vit
from efficientvlm.families.xvlm_config import XVLMConfig

Kept = dict[str, list[int]]


def _vision(config: XVLMConfig, kept: Kept) -> Vit:
    sizes = (Size.of(kept, f"vision.{i}", config.vision_width, config.vision_heads) for i in range(config.vision_layers))
    layers = [PreNormLayer(size, config.vision_eps, activation(config.vision_activation), {}) for size in sizes]
    shape = (config.vision_width, config.image_size, config.patch_size, config.vision_eps)
    return Vit(layers, *shape, {}, pre_norm=config.vision_pre_norm, local_layers=config.local_attention_depth)


def _texts(config: XVLMConfig, kept: Kept, tower: str, context_width: int = 0, *, embeddings: bool) -> Bert:
    dropout = {"dropout": config.dropout, "attention_dropout": config.dropout}
    names = (f"{tower}.{i}" for i in range(config.layers()[tower]))
    sizes = (Size.of(kept, name, config.text_width, config.text_heads, context_width) for name in names)
    table = None
    if embeddings:
        shape = (config.vocab_size, config.max_positions, config.text_width, config.text_eps, config.dropout)
        table = Embeddings(*shape, type_vocab_size=config.type_vocab_size)
    return Bert([PostNormLayer(size, config.text_eps, F.gelu, {}, **dropout) for size in sizes], table)


def _says(config: XVLMConfig) -> LanguageHead:
    return LanguageHead(config.text_width, config.vocab_size, config.text_eps, names={"dense": "transform"})


def mlp_head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


class XVLMModel(TowerNetwork):
    """X-VLM with the heads named in `config.heads` and, when `config.decoder_layers` > 0, an answer decoder."""

    config_class = XVLMConfig
    main_input_name = "pixels"
    places = {tower: f"{tower}.layers" for tower in ("vision", "text", "fusion", "decoder")}
    owners = {**{tower: tower for tower in places}, "decoder_head": "decoder"}

    def __init__(self, config: XVLMConfig) -> None:
        super().__init__(config)
        kept = config.kept_indices()
        self.vision = _vision(config, kept)
        self.text = _texts(config, kept, "text", embeddings=True)
        self.fusion = _texts(config, kept, "fusion", config.vision_width, embeddings=False)
        if config.decoder_layers:
            self.decoder = _texts(config, kept, "decoder", config.text_width, embeddings=True)
            self.decoder_head = _says(config)
        if "itc" in config.heads:
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_width, config.embed_dim)
            self.temp = nn.Parameter(torch.tensor(config.temperature_init))
        if "itm" in config.heads:
            self.itm_head = mlp_head(config.text_width, 2)
        if "box" in config.heads:
            self.box_head = mlp_head(config.text_width, 4)
        if "mlm" in config.heads:
            self.mlm_head = _says(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Vit):
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding, std=std)
        elif module is self and hasattr(self, "temp"):
            init.constant_(self.temp, self.config.temperature_init)

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        return ".embeddings." in parameter and ".norm." not in parameter

    def encode_image(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None = None, keep: frozenset[str] = NOTHING) -> Encoded:
        """Images [I, 3, H, W] (uint8, or normalised floats) to states [I, 1 + patches, W].

        With `regions` = (row → image [R], visible patches [R, 1 + patches]) the last `local_attention_depth` layers run on the regions and
        on the whole images, and the states are [R + I, ...], regions first (X-VLM, multi-grained encoding).
        """
        pixels = normalise(pixels, self.config.image_mean, self.config.image_std, self.vision.dtype)
        out: Encoded = self.vision(pixels, regions, keep)
        out.states = self.vision.post_norm(out.states)
        return out

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = NOTHING) -> Encoded:
        """Token ids and mask [B, L] (1 = token) to states [B, L, W]."""
        return self.text.read(ids, mask, keep=keep)

    def fuse(self, states: Tensor, mask: Tensor, context: Context, keep: frozenset[str] = NOTHING) -> Encoded:
        """Text states [B, L, W] through the fusion layers, attending to image states projected by `fusion.context`."""
        out: Encoded = self.fusion(states, mask.bool()[:, None, None], context, keep=keep)
        return out

    def decode(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        """Answer tokens [B, L] to next-token logits [B, L, V], causal; with a `cache`, `ids` are the tokens that follow those in it."""
        out = self.decoder.follow(ids, mask, context, cache, keep)
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
        logits: Tensor = self.mlm_head(picked, self.text.embeddings)
        return logits
