"""X-VLM's vision tower from a DINOv2: what that network has and ours lacks is folded into the weights, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.weights import read_folder
from efficientvlm.families.xvlm.names import dinov2_name

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained
SCALED = {"1": "attention.out", "2": "ffn.fc2"}
PATCH_BIAS = "embeddings.patch_embeddings.projection.bias"
ELSEWHERE = (PATCH_BIAS, "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token")


def check_dinov2(folder: Path, config: Any) -> None:
    """:class:`BadInput` unless X-VLM's vision tower can compute what this `Dinov2Config` says."""
    plain = "use a DINOv2 of size S, B or L without registers"
    if config.use_swiglu_ffn:
        raise BadInput(f"DINOv2 in {folder}", "its feed-forward layers are gated (SwiGLU, as in the giant size)", plain)
    if config.hidden_act != "gelu" or config.num_channels != 3:
        raise BadInput(f"DINOv2 in {folder}", f"its activation is {config.hidden_act}, on {config.num_channels} channels", plain)
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise BadInput(f"DINOv2 in {folder}", f"its images or patches are not square ({config.image_size}, {config.patch_size})", plain)


def dinov2_values(config: Any) -> dict[str, Any]:
    """The fields of our configuration in which a DINOv2 differs from a CLIP."""
    return {"vision_intermediate": int(config.hidden_size * config.mlp_ratio), "vision_pre_norm": False, "vision_activation": "gelu"}


def dinov2_state(folder: Path, config: Any) -> tuple[dict[str, Tensor], Tensor, list[str]]:
    """Our tensors, named below `vision.`, of those of a `Dinov2Model` with this `Dinov2Config`.

    LayerScale multiplies what attention and FFN add to the residual, so that it goes into the rows of their output projections, weights
    and biases. Attention without biases gets zeros. The bias of the patch embedding is given apart: it is to be added to the positions
    of the patches, once they have been resized (:func:`add_patch_bias`).

    Returns:
        The state, the bias of the patches [W], and the names of tensors that X-VLM has no place for.

    Raises:
        BadInput: unreadable weights; a tensor that is to be folded is missing or of another width.
    """
    tensors = read_folder(folder)
    prefix = "dinov2." if any(name.startswith("dinov2.") for name in tensors) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state = {ours: tensor.float() for name, tensor in own.items() if (ours := dinov2_name(name))}
    scales = {
        f"encoder.layer.{layer}.layer_scale{which}.lambda1": (layer, which) for layer in range(config.num_hidden_layers) for which in "12"
    }
    for name in (PATCH_BIAS, *scales):
        if name not in own or own[name].shape != (config.hidden_size,):
            found = f"has shape {list(own[name].shape)}" if name in own else "is missing"
            raise BadInput(f"DINOv2 in {folder}", f"{name} {found}, [{config.hidden_size}] is needed", "save or download the model again")
    for name, (layer, which) in scales.items():
        for kind in ("weight", "bias"):
            at = f"layers.{layer}.{SCALED[which]}.{kind}"
            if at in state and len(state[at]) == config.hidden_size:  # what is wrong there is found when the model is filled
                state[at] = state[at] * own[name].float().view(-1, *[1] * (state[at].ndim - 1))
    if not config.qkv_bias:
        state |= {f"layers.{i}.attention.{p}.bias": torch.zeros(config.hidden_size) for i in range(config.num_hidden_layers) for p in "qkv"}
    if (token := own.get("embeddings.cls_token")) is not None:
        state["class_embedding"] = token.float().flatten()
    if (positions := own.get("embeddings.position_embeddings")) is not None:
        state["position_embedding"] = positions.float().flatten(0, -2)
    strangers = [n for n in own if n.startswith(("embeddings.", "encoder.")) and n not in (*ELSEWHERE, *scales) and not dinov2_name(n)]
    return {f"vision.{name}": tensor for name, tensor in state.items()}, own[PATCH_BIAS].float(), strangers


def add_patch_bias(positions: Tensor, bias: Tensor) -> Tensor:
    """Position embedding [1 + patches, W] with the patches' bias [W] in it; the first row, of the class token, stays."""
    return torch.cat([positions[:1], positions[1:] + bias])
