"""An X-VLM for images of another size: the positions of a ViT, or the bias tables of a Swin, are resized as in the published code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.towers.swin import resize_bias_table
from efficientvlm.families.xvlm.config import XVLMConfig, check_sizes

LEAST_WINDOW = 3
"""Tokens on a side of the smallest windows whose bias tables can be resized: a spline needs four offsets."""


def config_at(config: XVLMConfig, image_size: int) -> XVLMConfig:
    """`config` for images of `image_size` pixels on a side; the last stage of a Swin is one window, as published.

    Raises:
        BadInput: patches or windows do not fill such images, or bias tables cannot be resized to them.
    """
    if image_size == config.image_size:
        return config
    changes = {"image_size": image_size}
    if config.vision_depths:
        changes["vision_window"] = max(1, image_size // config.stride)
        if min(config.vision_window, changes["vision_window"]) < LEAST_WINDOW:
            why = f"its windows would have {changes['vision_window']} tokens on a side instead of {config.vision_window}"
            raise BadInput(f"image_size is {image_size}", why, f"{LEAST_WINDOW * config.stride} pixels or more can be resized to")
    return check_sizes(config.copy(**changes))


def tables_at(state: Mapping[str, Tensor], config: XVLMConfig) -> dict[str, Tensor]:
    """The tables of positions in `state`, for the images of `config`."""
    if config.vision_depths:
        tables = {name: table for name, table in state.items() if name.endswith(".bias_table")}
        return {name: resize_bias_table(table, 2 * config.vision_window - 1) for name, table in tables.items()}
    return {"vision.position_embedding": resize_positions(state["vision.position_embedding"], config.image_size // config.patch_size)}


def resized(model: Any, image_size: int) -> Any:
    """`model` for images of `image_size` pixels on a side, on its device; :class:`BadInput` as :func:`config_at`."""
    config = config_at(model.config, image_size)
    if config is model.config:
        return model
    return model.reshaped(config, lambda state: tables_at(state, config))
