"""Vision transformers of Hugging Face that a new network may begin with: a CLIP's, a DINOv2 and a ViT, as tensors by their roles.

What those networks have and ours lack is folded into the weights, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig, Dinov2Config, ViTConfig

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.errors import BadInput
from efficientvlm.families.loading import image_statistics
from efficientvlm.families.pretrained import AGAIN, beyond, check_layers, checked, kind_of, no_strangers, read_config, renumbered
from efficientvlm.families.towers.names import clip_name, dinov2_name, vit_name
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.weights import read_folder

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as DINOv2 was trained
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # as ViT was
SCALED = {"1": "attention.out", "2": "ffn.fc2"}
PATCH_BIAS, TOKEN, POSITIONS = "embeddings.patch_embeddings.projection.bias", "embeddings.cls_token", "embeddings.position_embeddings"
RESHAPED = (PATCH_BIAS, TOKEN, POSITIONS, "embeddings.mask_token")


class Kind(NamedTuple):
    """A kind of network; `statistics` are mean and deviation of its pictures where its folder does not say them."""

    called: str
    config: type[Any]
    prefix: str
    role: Callable[[str], str | None]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    processor: str
    pre_norm: bool = False


CLIP = Kind("CLIP", CLIPVisionConfig, "vision_model.", clip_name, (CLIP_MEAN, CLIP_STD), "CLIPImageProcessor", pre_norm=True)
KINDS = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": Kind("DINOv2", Dinov2Config, "dinov2.", dinov2_name, IMAGENET, "BitImageProcessor"),
    "vit": Kind("ViT", ViTConfig, "vit.", vit_name, HALF, "ViTImageProcessor"),
}


class VitFiles(NamedTuple):
    """A folder with such a network, and its configuration; no weights."""

    folder: Path
    kind: Kind
    config: Any

    @property
    def neurons(self) -> int:
        """Those of a layer."""
        return int(self.config.hidden_size * self.config.mlp_ratio) if self.kind.config is Dinov2Config else self.config.intermediate_size

    def statistics(self) -> dict[str, list[float]]:
        """Mean and deviation of pictures, from the folder where it says them."""
        return image_statistics(self.folder, {}, self.kind.statistics, self.kind.processor)

    def state(self, chosen: Mapping[int, int], image_size: int) -> dict[str, Tensor]:
        """Its tensors by role, with only the `chosen` layers (old number → new number), positions resized to images of `image_size`.

        The class token is [W], positions are [1 + patches, W], and the bias of the patches is `patch_embedding.bias` where there is one.

        Raises:
            BadInput: unreadable weights; a tensor of unknown meaning; one that is to be folded is missing or of another width.
        """
        tensors = read_folder(self.folder)
        prefix = self.kind.prefix if any(name.startswith(self.kind.prefix) for name in tensors) else ""
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        roles, config = {name: role for name in own if (role := self.kind.role(name))}, self.config
        state = {role: checked(self.folder, name, own[name], self._shape(role)) for name, role in roles.items() if self._has(role)}
        used = {name for name, role in roles.items() if self._has(role)}
        if self.kind is not CLIP:
            used |= {*RESHAPED, *self._fold(own, state)}
        no_strangers(self.folder, [n for n in own if n.startswith(("embeddings.", "encoder.", "layers.")) and n not in used])
        if "position_embedding" in state and config.image_size != image_size:
            state["position_embedding"] = resize_positions(state["position_embedding"], image_size // config.patch_size)
        return renumbered(state, "layers.", chosen)

    def _has(self, role: str) -> bool:
        """Whether config.json knows of the layer of this tensor."""
        return not beyond(role, "layers.", self.config.num_hidden_layers)

    def _shape(self, role: str) -> tuple[int, ...]:
        """What shape the tensor of this role has by config.json."""
        width, patch, part = self.config.hidden_size, self.config.patch_size, role.rpartition(".")[0].rpartition(".")[2]
        if role == "position_embedding":
            return self._positions, width
        if role == "patch_embedding.weight":
            return width, 3, patch, patch
        rows = self.neurons if part == "fc1" else width
        if role.endswith(".bias") or part.endswith("norm") or role == "class_embedding":
            return (rows,)
        return rows, self.neurons if part == "fc2" else width

    @property
    def _positions(self) -> int:
        """A class token and the patches."""
        return int(1 + (self.config.image_size // self.config.patch_size) ** 2)

    def _fold(self, own: Mapping[str, Tensor], state: dict[str, Tensor]) -> list[str]:
        """Add to the `state` of a DINOv2 or a ViT what has no role as it is; the names of the scales of layers.

        LayerScale multiplies what attention and FFN add to the residual, so that it goes into the rows of their output projections,
        weights and biases. Attention without biases gets zeros.
        """
        config, layers = self.config, range(self.config.num_hidden_layers)
        there = layers if self.kind.config is Dinov2Config else ()
        scales = {f"encoder.layer.{layer}.layer_scale{which}.lambda1": (layer, which) for layer in there for which in "12"}
        if lost := [name for name in (PATCH_BIAS, *scales) if name not in own]:
            raise BadInput(f"{self.kind.called} in {self.folder}", f"{lost[0]} is missing", AGAIN)
        for name, (layer, which) in scales.items():
            scale = checked(self.folder, name, own[name], (config.hidden_size,))
            for kind in ("weight", "bias"):
                at = f"layers.{layer}.{SCALED[which]}.{kind}"
                if at in state:  # what is missing is found when the model is filled
                    state[at] = state[at] * scale.view(-1, *[1] * (state[at].ndim - 1))
        if not config.qkv_bias:
            state |= {f"layers.{i}.attention.{p}.bias": torch.zeros(config.hidden_size) for i in layers for p in "qkv"}
        width = config.hidden_size
        shapes = {PATCH_BIAS: (width,), TOKEN: (1, 1, width), POSITIONS: (1, self._positions, width)}
        named = {PATCH_BIAS: "patch_embedding.bias", TOKEN: "class_embedding", POSITIONS: "position_embedding"}
        for name, role in named.items():
            if name in own:
                found = checked(self.folder, name, own[name], shapes[name])
                state[role] = found[0] if name == POSITIONS else found.flatten()
        return list(scales)


def vit_files(folder: Path, kinds: tuple[str, ...], what: str, activations: tuple[str, ...], family: str) -> VitFiles:
    """What `folder` holds, one of `kinds` (keys of :data:`KINDS`, `what` in words), and fit for images of three channels.

    Raises:
        BadInput: no such folder; a network of another kind, with other `activations` than the `family` has, or gated layers.
    """
    found = kind_of(folder, kinds, what)
    kind = KINDS[found]
    config = read_config(CLIPConfig, folder).vision_config if found == "clip" else read_config(kind.config, folder)
    named = f"{kind.called} in {folder}"
    if kind.config is Dinov2Config and config.use_swiglu_ffn:
        plain = "use a DINOv2 of size S, B or L without registers"
        raise BadInput(named, "its feed-forward layers are gated (SwiGLU, as in the giant size)", plain)
    if config.hidden_act not in activations or config.num_channels != 3:
        why = f"its activation is {config.hidden_act}, on {config.num_channels} channels; {family} has {' or '.join(activations)}, on 3"
        raise BadInput(named, why, "use another one")
    check_layers(folder, config)
    for name in ("image_size", "patch_size"):
        sides = getattr(config, name)
        if isinstance(sides, list | tuple) and len({*sides}) == 1:
            setattr(config, name, sides[0])
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise BadInput(named, f"its images or patches are not square ({config.image_size}, {config.patch_size})", "use another one")
    return VitFiles(folder, kind, config)


def add_patch_bias(positions: Tensor, bias: Tensor) -> Tensor:
    """Position embedding [1 + patches, W] with the patches' bias [W] in it; the first row, of the class token, stays."""
    return torch.cat([positions[:1], positions[1:] + bias])
