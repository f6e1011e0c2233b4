"""Parts that every tower is built from: named places, what is left of a layer, activations, what a pass keeps for distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Self, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.network import Record

HIDDEN, SELF_ATTENTION, CROSS_ATTENTION = "hidden", "self_attention", "cross_attention"
NOTHING: frozenset[str] = frozenset()
QUICK = 1.702
P = TypeVar("P", bound="nn.Module | nn.Parameter")
Activation = Callable[[Tensor], Tensor]


class Part(Generic[P]):
    """A part of a :class:`Named` module, read as an attribute, wherever the files of a family have it."""

    def __set_name__(self, owner: type, role: str) -> None:
        self.role = role

    @overload
    def __get__(self, module: None, owner: type) -> Self: ...
    @overload
    def __get__(self, module: Named, owner: type) -> P: ...

    def __get__(self, module: Named | None, owner: type) -> Any:
        if module is None:
            return self
        found: Any = module
        for name in module.paths.get(self.role, (self.role,)):
            held = found._modules.get(name)
            found = found._parameters.get(name) if held is None else held
            if found is None:
                raise AttributeError(self.role)
        return found


class Named(nn.Module):
    """A module whose parts lie under the names that the files of a family give them.

    `names` maps a role (`fc1`) to a name, of several modules where it has dots (`intermediate.dense`); a part that it leaves out is called
    as its role. A :class:`Part` of the class reads it again.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.called = dict(names or {})
        self.paths = {role: tuple(name.split(".")) for role, name in self.called.items()}

    def put(self, **parts: nn.Module | nn.Parameter) -> None:
        """Add `parts`, by role."""
        for role, part in parts.items():
            *above, last = self.paths.get(role, (role,))
            place: Named = self
            for name in above:
                hidden = isinstance(getattr(type(place), name, None), Part) and (name,) != place.paths.get(name, (name,))
                assert not hidden, f"{name} is a role of another part, under which this module could not be found"
                if name not in place._modules:
                    place.add_module(name, nn.Module())
                place = cast(Named, place._modules[name])
            setattr(place, last, part)

    def name_of(self, role: str) -> str:
        return self.called.get(role, role)


@dataclass
class Encoded:
    """States of one pass and what was asked to be kept.

    `hidden[i]` is the input of layer i (the last is the output), [B, T, W]; maps are softmax probabilities before dropout, [B, H, T, S], or
    an empty tensor for a layer of which none is wanted.
    """

    states: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    self_attention: list[Tensor] = field(default_factory=list)
    cross_attention: list[Tensor] = field(default_factory=list)

    def maps(self, kind: str, keep: frozenset[str], layer: int) -> list[Tensor] | None:
        """Where `layer` puts its maps of `kind`: nowhere unless `keep` has `kind` (of all layers) or `kind.layer`."""
        found: list[Tensor] = getattr(self, kind)
        if kind in keep or f"{kind}.{layer}" in keep:
            return found
        if any(wanted.startswith(kind) for wanted in keep):
            found.append(self.states.new_empty(0))
        return None

    def spread(self, rows: Tensor) -> Encoded:
        """Row `rows[i]` of everything as row i."""
        kept = (
            [take(tensor, rows) if len(tensor) else tensor for tensor in tensors]
            for tensors in (self.hidden, self.self_attention, self.cross_attention)
        )
        return Encoded(take(self.states, rows), *kept)


def tap(record: Record, tower: str, out: Encoded, keep: frozenset[str]) -> None:
    """Put what `out` kept into `record` as `tower.kind`."""
    for kind in {name.partition(".")[0] for name in keep}:
        record[f"{tower}.{kind}"] = getattr(out, kind)


class Bias(nn.Module):
    """What is left of an output projection whose inputs are all gone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand_as(x)


def projection(inputs: int, width: int) -> nn.Linear:
    """An output projection; with no inputs, what is left of it."""
    return nn.Linear(inputs, width) if inputs else Bias(width)  # type: ignore[return-value]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_add_(0, rows, grad.contiguous()), None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Row `rows[i]` of `x` as row i; its gradient is added up by whole rows, where `index_select` scatters number by number."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Take.apply(x, rows)
    return x.index_select(0, rows)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * QUICK
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / QUICK)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702·x) of any shape; its backward pass is one kernel and keeps one tensor."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _QuickGELU.apply(x)
    return x * torch.sigmoid(QUICK * x)


_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), _TANH),
    "relu": F.relu,
    **dict.fromkeys(("silu", "swish"), F.silu),
}
"""By the names that configurations of transformers give them."""


def activation(name: Any) -> Activation:
    """The activation called `name` in a configuration; :class:`BadInput` lists those that are known."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise BadInput(f"unknown activation {shorten(name)}", f"known are {', '.join(ACTIVATIONS)}", "use a model with one of these")
    return ACTIVATIONS[name]


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, H, W] to normalised floats of `dtype`; floats are taken as normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    centre = pixels.new_tensor(mean, dtype=torch.float32)[:, None, None]
    spread = pixels.new_tensor(std, dtype=torch.float32)[:, None, None]
    return ((pixels.float() / 255 - centre) / spread).to(dtype)


def resize_positions(table: Tensor, grid: int, class_token: bool = True) -> Tensor:
    """Position embedding [1 + old², W] for `grid` x `grid` patches (bicubic, as X-VLM does for fine-tuning); the CLS row, if any, stays."""
    first, rest = table[: int(class_token)], table[int(class_token) :]
    old = math.isqrt(len(rest))
    if old == grid:
        return table
    patches = rest.unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)[0]
    return torch.cat([first, resized.flatten(1).T])


def resize_patches(weight: Tensor, size: int) -> Tensor:
    """Patch embedding [W, C, old, old] for patches of `size` pixels on a side, which says of a resized patch what it says of the patch.

    That holds exactly for larger patches, and as nearly as can be for smaller ones: the least squares solution for the linear map that
    resizes a patch bilinearly (FlexiViT, Beyer et al. 2023).
    """
    old = weight.shape[-1]
    if old == size:
        return weight
    pixels = torch.eye(old * old, dtype=torch.float64, device=weight.device).view(-1, 1, old, old)
    resizing = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False).flatten(1)  # row i: what pixel i becomes
    solved = torch.linalg.pinv(resizing) @ weight.double().flatten(2).flatten(0, 1).T
    return solved.T.reshape(*weight.shape[:2], size, size).to(weight.dtype)
