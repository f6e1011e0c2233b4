"""Attention as one operator of ONNX Runtime, instead of the products, transpositions and softmax that it is in standard ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"


class FusedAttention(TorchFunctionMode):
    """Inside the block, :func:`F.scaled_dot_product_attention` without a mask is traced as ONNX Runtime's operator.

    Its kernel never holds the whole map of a head. With a mask (text, decoder: short sequences) it would, so that those stay as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and _plain(*args[3:], **kwargs):
            query, key, value = args[:3]
            return _attention(query, key, value, kwargs.get("scale"))
        return func(*args, **kwargs)


def _plain(
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    return attn_mask is None and not (dropout_p or is_causal or enable_gqa)


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """As torch's, of [B, H, T, D]. The operator takes and gives [B, T, H·D]: its transpositions cancel with those around it."""
    heads, width = query.shape[1], query.shape[3]
    packed = [tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value)]
    settings: dict[str, Any] = {"num_heads": int(heads), "scale": 1 / math.sqrt(width) if scale is None else float(scale)}
    shape = (*packed[0].shape[:2], packed[2].shape[2])
    out: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{OPERATOR}", packed, settings, dtype=query.dtype, shape=shape, version=1)
    return out.unflatten(-1, (heads, value.shape[3])).transpose(1, 2)
