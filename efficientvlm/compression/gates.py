"""Hard-concrete gates on heads and neurons (Louizos et al. 2018, with EfficientVLM's constants), and the hooks that apply them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from efficientvlm.compression.anatomy import Groups
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import NEURON, Unit

BETA, GAMMA, ZETA, EPSILON = 2 / 3, -0.1, 1.1, 1e-6
LIMIT = math.log(100)
PREFIX = "log_alpha."


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z ≠ 0) of each gate: 1 − clip(σ(β·ln(−γ/ζ) − log α), ε, 1 − ε)."""
    return 1 - torch.sigmoid(BETA * math.log(-GAMMA / ZETA) - log_alpha).clamp(EPSILON, 1 - EPSILON)


def sample_gates(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Stretched and clipped concrete sample in [0, 1] for noise `uniform` in (0, 1) of the same shape."""
    soft = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) / BETA)
    return (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def published_gates(log_alpha: torch.Tensor) -> torch.Tensor:
    """0/1 gates of one layer row [units] by the published rule: the round(size − Σ P(z ≠ 0)) lowest log α are 0, the others exactly 1."""
    zeros = int(torch.round(log_alpha.numel() - open_probability(log_alpha).sum()))
    gates = torch.ones_like(log_alpha)
    gates[torch.argsort(log_alpha, stable=True)[:zeros]] = 0
    return gates


def gate_noise(size: int, seed: int, step: int) -> torch.Tensor:
    """float32 [size] uniform noise in (ε, 1 − ε) that depends on (seed, step) only: equal on every rank and on recomputation."""
    digest = hashlib.blake2b(f"gates:{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(size, generator=generator).clamp(EPSILON, 1 - EPSILON)


class Gates(nn.Module):
    """One `log_alpha` [units] for all gates, ordered like `units`.

    Args:
        units: the units that are gated (`Scope.units`).
        seed: of the initial values: N(`head_init`, `init_std`) for heads, N(`neuron_init`, `init_std`) for neurons.
    """

    def __init__(
        self, units: Sequence[Unit], *, seed: int = 0, head_init: float = 10.0, neuron_init: float = 0.0, init_std: float = 0.01
    ) -> None:
        super().__init__()
        self.groups = Groups(units)
        mean = torch.tensor([neuron_init if unit.kind == NEURON else head_init for unit in units])
        self.log_alpha = nn.Parameter(mean + init_std * torch.randn(len(units), generator=torch.Generator().manual_seed(seed)))

    def p_open(self) -> torch.Tensor:
        """[units] probability that a gate is not 0."""
        return open_probability(self.log_alpha)

    def sample(self, uniform: torch.Tensor) -> torch.Tensor:
        """[units] gates for the noise `uniform` [units]."""
        return sample_gates(self.log_alpha, uniform)

    def draw(self, seed: int, step: int) -> torch.Tensor:
        """[units] the gates of training step `step`; one draw a step, shared by the batch, all ranks and micro-batches."""
        return self.sample(gate_noise(self.log_alpha.numel(), seed, step).to(self.log_alpha.device))

    def deterministic_published(self) -> torch.Tensor:
        """[units] 0/1 gates, layer by layer, by the published rule; they need not meet the target (snapping does)."""
        with torch.no_grad():
            return torch.cat([published_gates(row) for row in self.groups.split(self.log_alpha).values()])

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep log α within ±ln 100; called after every optimizer step (EfficientVLM)."""
        self.log_alpha.clamp_(-LIMIT, LIMIT)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`log_alpha.{tower}.{layer}.{kind}` → float32 [units of the group], as stored in gates.safetensors."""
        return {PREFIX + name: row.detach().cpu().clone() for name, row in self.groups.split(self.log_alpha).items()}

    @classmethod
    def from_tensors(cls, units: Sequence[Unit], tensors: Mapping[str, torch.Tensor]) -> Gates:
        """Gates on `units` with the values that :meth:`to_tensors` gave.

        Raises:
            BadInput: the groups or their sizes are not those of `units`.
        """
        gates = cls(units, init_std=0)
        expected = dict(zip(gates.groups.names, gates.groups.sizes, strict=True))
        found = {name.removeprefix(PREFIX): tensor.numel() for name, tensor in tensors.items() if name.startswith(PREFIX)}
        if found != expected:
            differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise BadInput(
                "the stored gates do not belong to this model",
                f"they differ in {', '.join(differ[:5])}",
                "give the prune output they were written with",
            )
        with torch.no_grad():
            gates.log_alpha.copy_(torch.cat([torch.empty(0)] + [tensors[PREFIX + name].float().flatten() for name in expected]))
        return gates


class GateHooks:
    """Gates on the inputs of the Linears of `model` that the gate points of `units` name; see :func:`attach`.

    A Linear gets a `forward` of its own, which multiplies its input, or where that is less work the columns of its weight.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._count = len(units)
        self._vectors: dict[str, torch.Tensor] = {}
        by_module: dict[str, list[tuple[int, int, int]]] = {}
        for number, unit in enumerate(units):
            for point in unit.gates:
                by_module.setdefault(point.module, []).append((point.start, point.stop, number))
        self._widths: dict[str, int] = {}
        self._gated: dict[str, nn.Linear] = {}
        columns = []
        for name, points in by_module.items():
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear):
                raise TypeError(f"gate point {name} is a {type(module).__name__}, not a Linear")
            if "forward" in vars(module):
                raise ValueError(f"gate point {name} has gates already")
            which = torch.full((module.in_features,), self._count)  # one past the end: no gate
            for start, stop, number in points:
                if not 0 <= start < stop <= module.in_features:
                    raise ValueError(f"gate point {name}[{start}:{stop}] lies outside its {module.in_features} inputs")
                which[start:stop] = number
            columns.append(which)
            self._widths[name] = module.in_features
            self._gated[name] = module
        self._columns = torch.cat(columns) if columns else torch.empty(0, dtype=torch.long)
        for name, module in self._gated.items():
            module.forward = self._forward(name, module)  # type: ignore[method-assign]

    def _forward(self, name: str, module: nn.Linear) -> Any:
        plain = module.forward

        def gated(x: torch.Tensor) -> torch.Tensor:
            if name not in self._vectors:
                return plain(x)
            gates = self._vectors[name]
            if x.numel() <= x.shape[-1] * module.out_features:
                return plain(x * gates.to(x.dtype))
            return F.linear(x, module.weight * gates.to(module.weight.dtype), module.bias)  # the same, on fewer numbers

        return gated

    def set(self, gates: torch.Tensor | None) -> None:
        """Apply `gates` [units] from the next forward pass on; None applies none. Gradients reach `gates`.

        All vectors are made here, once, so that a checkpointed block sees the same ones when it is recomputed.
        """
        self._vectors = {}
        if gates is None:
            return
        if gates.shape != (self._count,):
            raise ValueError(f"expected {self._count} gates, got {tuple(gates.shape)}")
        self._columns = self._columns.to(gates.device)
        spread = torch.cat([gates, gates.new_ones(1)]).index_select(0, self._columns)
        self._vectors = dict(zip(self._widths, spread.split(list(self._widths.values())), strict=True))

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._vectors = {}
        for module in self._gated.values():
            vars(module).pop("forward", None)

    def __enter__(self) -> GateHooks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def attach(model: nn.Module, units: Sequence[Unit]) -> GateHooks:
    """Gates that multiply the gate points of `units`; nothing changes until :meth:`GateHooks.set` is called.

    Only inputs of Linears are touched, so stock models work; call `set` inside the forward of the module that DDP wraps, with gates that
    are its parameters. Usable as a context manager.

    Raises:
        TypeError, ValueError: a gate point that is no Linear, lies outside its inputs, or has gates already.
    """
    return GateHooks(model, units)
