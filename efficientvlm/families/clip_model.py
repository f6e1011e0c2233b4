"""CLIP and SigLIP whose layers may have lost heads and neurons: transformers' own classes with other attention and MLP modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipMLP

from efficientvlm.data.preprocessing import HALVES
from efficientvlm.data.tokenizer import ends_of
from efficientvlm.errors import BadInput
from efficientvlm.families.base import HEAD, NEURON
from efficientvlm.families.blocks import HIDDEN, SELF_ATTENTION, Bias, Encoded, attend, no_maps, normalise
from efficientvlm.families.structure import Cuttable

TOWERS = ("vision", "text")
LEGACY_END = 2  # `eos_token_id` of old files, which was not the end token's; transformers then takes the highest id of a text


class Structure(Cuttable):
    """What the configurations of both kinds answer about their layers."""

    vision_config: Any
    text_config: Any
    stock: tuple[str, str]
    """`model_type` and class of transformers that open a model of which nothing was removed."""
    processor = "CLIPImageProcessor"
    """Class of transformers that reads a `preprocessor_config.json` which names none."""

    @property
    def end(self) -> int:
        """A token for the end of example texts."""
        raise NotImplementedError

    def tower(self, name: str) -> Any:
        """transformers' configuration of a tower."""
        return getattr(self, f"{name}_config")

    def layers(self) -> dict[str, int]:
        return {name: self.tower(name).num_hidden_layers for name in TOWERS}

    def original_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name in TOWERS:
            for layer in range(self.tower(name).num_hidden_layers):
                counts[f"{name}.{layer}.{HEAD}"] = self.tower(name).num_attention_heads
                counts[f"{name}.{layer}.{NEURON}"] = self.tower(name).intermediate_size
        return counts


class SlicedCLIPConfig(Structure, CLIPConfig):
    model_type = "evlm_clip"
    stock = ("clip", "CLIPModel")

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


class SlicedSiglipConfig(Structure, SiglipConfig):
    model_type = "evlm_siglip"
    stock = ("siglip", "SiglipModel")
    processor = "SiglipImageProcessor"

    image_mean: list[float] | tuple[float, ...] = HALVES
    image_std: list[float] | tuple[float, ...] = HALVES

    def adopt(self, tokenizer: Any) -> list[str]:
        """The token that fills a text up to all positions."""
        before, self.text_config.pad_token_id = self.text_config.pad_token_id, tokenizer.pad_token_id
        return [f"padding {tokenizer.pad_token_id} (config.json: {before})"] if before != tokenizer.pad_token_id else []

    @property
    def end(self) -> int:
        """Any token, as the last position is what is pooled."""
        return 0


class AnyHeads:
    """In front of a stock attention class: `heads` of its heads, one code path for SDPA and for maps."""

    def __init__(self, config: Any, heads: int) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        self.config, self.num_heads, self.embed_dim = config, heads, config.hidden_size
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale, self.dropout, self.is_causal = self.head_dim**-0.5, config.attention_dropout, False
        inner = heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.out_proj = nn.Linear(inner, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_causal: bool = False,
        maps: list[Tensor] | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock forward; maps are appended to `maps`, and returned where attentions are asked of the network."""
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        if returned := maps is None and asked:
            maps = []
        split = (self.num_heads, self.head_dim)
        q, k, v = (part(hidden_states).unflatten(-1, split).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        mask = visible(attention_mask, is_causal, hidden_states)
        out = attend(q, k, v, mask, self.dropout if self.training else 0.0, maps)  # type: ignore[attr-defined]
        return self.out_proj(out.transpose(1, 2).flatten(2)), maps[0] if returned and maps else None


class CLIPHeads(AnyHeads, CLIPAttention):
    pass


class SiglipHeads(AnyHeads, SiglipAttention):
    pass


class NoHeads(nn.Module):
    """An attention of which only the output bias is left."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.out_proj = Bias(config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, maps: list[Tensor] | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        no_maps(hidden_states, None, maps)
        return self.out_proj(hidden_states), None


class AnyNeurons:
    """In front of a stock MLP class: `neurons` of its neurons."""

    def __init__(self, config: Any, neurons: int) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        self.config, self.activation_fn = config, ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, neurons)
        self.fc2 = nn.Linear(neurons, config.hidden_size)


class CLIPNeurons(AnyNeurons, CLIPMLP):
    pass


class SiglipNeurons(AnyNeurons, SiglipMLP):
    pass


class NoNeurons(nn.Module):
    """An MLP of which only the output bias is left."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc2 = Bias(config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.fc2(hidden_states)
        return out


def visible(mask: Tensor | None, is_causal: bool, x: Tensor) -> Tensor | None:
    """Where attention may go, as booleans, from what transformers hands to its attention: booleans, added floats, or a flag."""
    if mask is None:
        return causal(x) if is_causal else None
    return mask if mask.dtype == torch.bool else mask >= 0


def causal(x: Tensor) -> Tensor:
    """bool [T, T] for states [B, T, W]: each position sees itself and what is before it."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


class Sliced:
    """In front of a stock model class: layers of the sizes in `config.kept`, and encoders that record what they are asked for."""

    config: Any
    vision_model: Any
    text_model: Any
    attention: type
    mlp: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        kept = config.kept_indices()
        for name in TOWERS:
            part = config.tower(name)
            for number, layer in enumerate(self.encoder(name).encoder.layers):
                heads, neurons = (len(kept[f"{name}.{number}.{kind}"]) for kind in (HEAD, NEURON))
                layer.self_attn = self.attention(layer.self_attn.config, heads) if heads else NoHeads(part)
                layer.mlp = self.mlp(part, neurons) if neurons else NoNeurons(part)
        self.init_weights()  # type: ignore[attr-defined]  # the new modules; the others are marked as done

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, though this class is outside transformers: what is not its own it initialises by module class only where this is False."""
        return False

    def encoder(self, name: str) -> Any:
        return getattr(self, f"{name}_model")

    def encode_image(self, pixels: Tensor, keep: frozenset[str] = frozenset()) -> Encoded:
        """Images [B, 3, H, W] (uint8, or normalised floats) to the states of the last layer [B, T, W]."""
        tower = self.vision_model
        x = normalise(pixels, self.config.image_mean, self.config.image_std, tower.embeddings.patch_embedding.weight.dtype)
        x = tower.embeddings(x)
        return run(tower.encoder.layers, tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x, None, keep)

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = frozenset()) -> tuple[Tensor, Encoded]:
        """Token ids and mask [B, L] (1 = token) as the network reads them, and the states of the last layer."""
        raise NotImplementedError

    def image_feature(self, states: Tensor) -> Tensor:
        """States [B, T, W] to unit vectors [B, E]."""
        raise NotImplementedError

    def text_feature(self, states: Tensor, ids: Tensor) -> Tensor:
        """States [B, L, W] of the token ids [B, L] to unit vectors [B, E]."""
        raise NotImplementedError

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits [I, T] of unit vectors [I, E] and [T, E]."""
        raise NotImplementedError


def run(layers: Iterable[Any], x: Tensor, mask: Tensor | None, keep: frozenset[str]) -> Encoded:
    """States through the layers of a tower; `mask` is True where attention may go."""
    out = Encoded(x)
    for i, layer in enumerate(layers):
        if HIDDEN in keep:
            out.hidden.append(x)
        x = layer(x, mask, maps=out.maps(SELF_ATTENTION, keep, i))
    if HIDDEN in keep:
        out.hidden.append(x)
    out.states = x
    return out


class SlicedCLIPModel(Sliced, CLIPModel):
    config_class = SlicedCLIPConfig
    attention, mlp = CLIPHeads, CLIPNeurons
    _supports_flash_attn = _supports_flex_attn = False

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = frozenset()) -> tuple[Tensor, Encoded]:
        x = self.text_model.embeddings(ids)
        return ids, run(self.text_model.encoder.layers, x, causal(x) & mask.bool()[:, None, None], keep)

    def image_feature(self, states: Tensor) -> Tensor:
        return F.normalize(self.visual_projection(self.vision_model.post_layernorm(states[:, 0])), dim=-1)

    def text_feature(self, states: Tensor, ids: Tensor) -> Tensor:
        """Of the end token: the first with its id, in old files the highest id."""
        end = self.config.text_config.eos_token_id
        at = ids.argmax(-1) if end == LEGACY_END else (ids == end).int().argmax(-1)
        picked = states[torch.arange(states.shape[0], device=states.device), at]
        return F.normalize(self.text_projection(self.text_model.final_layer_norm(picked)), dim=-1)

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logit_scale.exp() * image @ text.T


class SlicedSiglipModel(Sliced, SiglipModel):
    """The pooling of the image (`vision_model.head`: a probe, its attention and MLP) is part of the vision tower and is never pruned."""

    config_class = SlicedSiglipConfig
    attention, mlp = SiglipHeads, SiglipNeurons
    _supports_flash_attn = _supports_flex_attn = False

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = frozenset()) -> tuple[Tensor, Encoded]:
        """Texts are filled up to every position and nothing is masked, as SigLIP was trained: the last position is what is pooled."""
        part = self.config.text_config
        if ids.shape[1] > part.max_position_embeddings:
            raise BadInput(f"a text of {ids.shape[1]} tokens", f"this SigLIP reads {part.max_position_embeddings}", "cut it first")
        ids = ids.masked_fill(mask == 0, part.pad_token_id)
        ids = F.pad(ids, (0, part.max_position_embeddings - ids.shape[1]), value=part.pad_token_id)
        return ids, run(self.text_model.encoder.layers, self.text_model.embeddings(ids), None, keep)

    def image_feature(self, states: Tensor) -> Tensor:
        return F.normalize(self.vision_model.head(self.vision_model.post_layernorm(states)), dim=-1)

    def text_feature(self, states: Tensor, ids: Tensor) -> Tensor:
        return F.normalize(self.text_model.head(self.text_model.final_layer_norm(states[:, -1])), dim=-1)

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        return self.logit_scale.exp() * image @ text.T + self.logit_bias
