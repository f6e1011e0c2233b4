"""Milliseconds of heads and neurons: a table by tower, shape of layer and kind, measured inside a request, and what units cost by it.

Milliseconds are no sum over units: a layer with half of its heads takes more than half of its time, and one with none of them none. What is
known is therefore, for each layer and kind, the time at several counts of units; between two of them it is taken to be linear.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from efficientvlm.compression.anatomy import Anatomy, Groups, as_mask
from efficientvlm.compression.costs import Cost, Towers
from efficientvlm.compression.surgery import whole
from efficientvlm.errors import BadInput

NANOSECONDS = 10**6
"""In a millisecond. Costs are whole nanoseconds, so that they add up exactly."""

DOUBTFUL = 0.25
"""By what part of itself a prediction may be missed before that is said."""

Time = Annotated[float, Field(ge=0, le=1e9)]
"""Milliseconds, at most those of eleven days: sums of nanoseconds stay whole numbers of 64 bits."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Curve(_Closed):
    """What a layer takes of a request: `ms[i]` with `counts[i]` of its units, from none to all of them. `layers` are those it holds for."""

    tower: str
    kind: str
    layers: list[int] = Field(min_length=1)
    counts: list[int] = Field(min_length=2)
    ms: list[Time]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.ms) != len(self.counts) or self.counts[0] != 0 or any(a >= b for a, b in pairwise(self.counts)):
            raise ValueError("counts rise from 0, and each has its milliseconds")
        if self.ms[0] != 0 or any(a > b for a, b in pairwise(self.ms)):
            raise ValueError("no units take no time, and more take no less")
        if self.ms[-1] == 0:
            raise ValueError("all units together take some time")
        return self

    def at_every_count(self, step: int = 1) -> NDArray[np.int64]:
        """int64 [units + 1]: nanoseconds by count; where a layer keeps multiples of `step`, straight between those."""
        every = np.arange(self.counts[-1] + 1)
        reached = np.union1d(every[::step], every[-1:])
        at = np.interp(reached, self.counts, np.array(self.ms) * NANOSECONDS)
        return np.maximum.accumulate(np.rint(np.interp(every, reached, at)).astype(np.int64))


class Check(_Closed):
    """A request to the network with about `part` of the units of every layer: as it was measured, and by the table."""

    part: float
    measured_ms: Time
    predicted_ms: Time


class LatencyTable(_Closed):
    """What layers take of one request, and what it holds for.

    Attributes:
        timed: the request, in words.
        shapes: digest of the network before anything is removed, see :func:`digest_of`.
        model: that of the checkpoint it was measured on.
        whole_ms: the request to the network before anything is removed; `rest_ms` of it no cut removes.
        scale: what times inside of the request were multiplied by, so that they and the rest add up to `whole_ms`.
    """

    timed: str
    model: str
    shapes: str
    machine: dict[str, Any]
    precision: Literal["fp32", "bf16"]
    batch: int = Field(ge=1)
    text_length: int = Field(ge=1)
    image_size: int = Field(ge=1)
    answers: int = Field(ge=0)
    rounds: int = Field(ge=1)
    whole_ms: Time
    rest_ms: Time
    scale: float = Field(gt=0)
    curves: list[Curve]
    checks: list[Check] = Field(default_factory=list)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if lacking := [key for key in ("device", "name", "threads", "torch") if key not in self.machine]:
            raise ValueError(f"machine says nothing of {', '.join(lacking)}")
        if len(self.by_group()) != sum(len(curve.layers) for curve in self.curves):
            raise ValueError("a layer has two curves of a kind")
        parts = self.rest_ms + sum(len(curve.layers) * curve.ms[-1] for curve in self.curves)
        if abs(parts - self.whole_ms) > 1e-3 * max(parts, self.whole_ms):
            raise ValueError(f"layers and rest take {parts:.3f} ms together, and whole_ms is {self.whole_ms:.3f}")
        return self

    def doubts(self) -> list[str]:
        """Requests that took another time than the table says of them, in words; the noise of the machine while it was measured."""
        return [
            f"with {check.part:.2f} of the units a request took {check.measured_ms:.2f} ms, by the table {check.predicted_ms:.2f} ms"
            for check in self.checks
            if abs(check.measured_ms - check.predicted_ms) > DOUBTFUL * check.predicted_ms
        ]

    def by_group(self) -> dict[str, Curve]:
        return {f"{curve.tower}.{layer}.{curve.kind}": curve for curve in self.curves for layer in curve.layers}

    def described(self) -> str:
        """What it holds for, in words."""
        asked = f"batch {self.batch}, {self.precision}, texts of {self.text_length} tokens, {self.image_size} pixels"
        return f"{asked}, {machine_in_words(self.machine)}"


def machine_in_words(machine: dict[str, Any]) -> str:
    """Name, instructions, threads and torch of a machine that something was timed on."""
    name, threads, version = map(machine.get, ("name", "threads", "torch"))
    kind = f" with {machine['instructions']}" if "instructions" in machine else ""
    return f"{name}{kind}, {threads} thread{'s' * (threads != 1)}, torch {version}"


class Milliseconds(Cost):
    """Time of a request by a table, in nanoseconds.

    Args:
        round_to: neurons a layer keeps are a multiple of this.

    Raises:
        BadInput: the table is of another network.
    """

    budget = "latency"

    def __init__(self, model: Any, table: LatencyTable, *, round_to: int = 1) -> None:
        check_shapes(model, table)
        units = model.units()
        self.table, self._groups = table, Groups(units)
        curves = table.by_group()
        every = {name: curve.at_every_count(round_to if curve.kind == "neuron" else 1) for name, curve in curves.items()}
        self._towers = np.array([unit.tower for unit in units])
        self._tables = [every[name] for name in self._groups.names]
        self._starts = np.cumsum([0, *map(len, self._tables)])[:-1].astype(np.int64)
        self._flat = np.concatenate([*self._tables, np.empty(0, dtype=np.int64)])
        self._present = np.array(self._groups.sizes, dtype=np.int64)
        self.whole = {tower: 0 for tower in dict.fromkeys(curve.tower for curve in table.curves)}
        for name, curve in curves.items():
            self.whole[curve.tower] += int(every[name][-1])
        self.totals = dict.fromkeys(self.whole, 0)
        for name, times, count in zip(self._groups.names, self._tables, self._present, strict=True):
            self.totals[curves[name].tower] += int(times[count])
        self.costs = torch.from_numpy(
            np.concatenate([_shared(int(t[n]), int(n)) for t, n in zip(self._tables, self._present, strict=True)])
        )
        self.rest = round(table.rest_ms * NANOSECONDS)

    def removed(self, removed: Any, towers: Towers = None) -> int:
        return int(self.path(removed, np.empty(0, dtype=np.int64), towers)[0])

    def path(self, removed: Any, order: NDArray[np.int64], towers: Towers = None) -> NDArray[np.int64]:
        mask, counted = as_mask(removed, len(self._towers)), self._of(towers)
        left = self._left(mask)
        gone = np.bincount(self._groups.of_unit, counted, minlength=len(left)).astype(bool)
        first = int((self._at(self._present) - self._at(left))[gone].sum())
        going = np.flatnonzero(~mask[order] & counted[order])
        group = self._groups.of_unit[order[going]]
        by_group = np.argsort(group, kind="stable")
        sizes = np.bincount(group, minlength=len(left))
        rank = np.empty(len(group), dtype=np.int64)
        rank[by_group] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        after = self._starts[group] + left[group] - rank - 1
        steps = np.zeros(len(order) + 1, dtype=np.int64)
        steps[0], steps[going + 1] = first, self._flat[after + 1] - self._flat[after]
        path: NDArray[np.int64] = np.cumsum(steps)
        return path

    def opening(self, removed: Any, towers: Towers = None) -> NDArray[np.float64]:
        mask = as_mask(removed, len(self._towers))
        left = self._left(mask)
        more = self._at(np.minimum(left + 1, self._present)) - self._at(left)
        return np.where(mask & self._of(towers), more[self._groups.of_unit], 0).astype(np.float64)

    def kept(self, active: Any, counted: Any) -> nn.Module:
        """The time at the expected counts of units, by which snapping counts too; not the mean over what gates may draw."""
        return _AtCounts(self, as_mask(active, len(self._towers)), as_mask(counted, len(self._towers)))

    def said(self, amount: int, what: str = "") -> str:
        return f"{-(-amount // 1000) / 1000:,.3f} {what} ms" if what else f"{-(-amount // 1000) / 1000:,.3f} ms"

    def facts(self) -> dict[str, Any]:
        of_the_table = ("timed", "model", "machine", "precision", "batch", "text_length", "image_size", "answers", "scale")
        return {"unit": "ns", "table": {name: getattr(self.table, name) for name in of_the_table}}

    def _of(self, towers: Towers) -> NDArray[np.bool_]:
        return np.ones(len(self._towers), dtype=bool) if towers is None else np.isin(self._towers, list(towers))

    def _left(self, removed: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(self._groups.of_unit[~removed], minlength=len(self._present)).astype(np.int64)

    def _at(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._flat[self._starts + counts]


class _AtCounts(nn.Module):
    """Time of the layers of `counted` units when the `active` ones are open with given probabilities."""

    times: torch.Tensor
    starts: torch.Tensor
    most: torch.Tensor

    def __init__(self, cost: Milliseconds, active: NDArray[np.bool_], counted: NDArray[np.bool_]) -> None:
        super().__init__()
        self._sizes: list[int] = []
        self._chosen: list[int] = []
        starts, most, fixed = [], [], 0
        for number, part in enumerate(cost._groups.slices.values()):
            gated = active[part].any()
            if counted[part].any() and not gated:
                fixed += int(cost._tables[number][cost._present[number]])
            elif counted[part].any():
                self._chosen.append(len(self._sizes))
                starts.append(int(cost._starts[number]))
                most.append(part.stop - part.start)
            if gated:
                self._sizes.append(part.stop - part.start)
        self.fixed = float(fixed)
        self.register_buffer("times", torch.from_numpy(cost._flat).float(), persistent=False)
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.long), persistent=False)
        self.register_buffer("most", torch.tensor(most, dtype=torch.long), persistent=False)

    def forward(self, p_open: torch.Tensor) -> torch.Tensor:
        """Scalar, nanoseconds; `p_open` is [gates]."""
        if not self._chosen:
            return p_open.sum() * 0 + self.fixed
        parts = p_open.split(self._sizes)
        counts = torch.stack([parts[number].sum() for number in self._chosen])
        below = torch.minimum(counts.detach().long(), self.most - 1)
        low, high = self.times[self.starts + below], self.times[self.starts + below + 1]
        return (low + (counts - below) * (high - low)).sum() + self.fixed


def digest_of(model: Any) -> str:
    """That of the shapes of `model` before anything was removed of it, which its cuts have in common."""
    with torch.device("meta"):
        dense = type(model)(model.config.with_kept(whole(model.config)))
    shapes = sorted((name, list(tensor.shape)) for name, tensor in dense.state_dict().items())
    return hashlib.sha256(json.dumps([shapes, whole(model.config)], sort_keys=True).encode()).hexdigest()


def check_shapes(model: Any, table: LatencyTable) -> None:
    """:class:`BadInput` for a table of another network than `model`, or than it was cut from."""
    counts = model.config.original_counts()
    listed = {name: curve.counts[-1] for name, curve in table.by_group().items()}
    if table.shapes != digest_of(model) or listed != {name: count for name, count in counts.items() if count}:
        why = "layers, widths, heads, neurons or vocabulary are not those of the network that is pruned"
        fix = "measure one of this network, once it is one of its task: evlm bench --table"
        raise BadInput("the latency table is of another network", why, fix)


def curves_of(anatomy: Anatomy, shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    """The groups of a network that share a curve: of a tower and kind, with as many units, in tensors of the same shapes."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, part in anatomy.groups.slices.items():
        unit = anatomy.units[part.start]
        sites = tuple(sorted((shapes[site.tensor], site.dim, site.stop - site.start) for site in unit.sites))
        alike.setdefault((unit.tower, unit.kind, part.stop - part.start, sites), []).append(name)
    return list(alike.values())


def rising(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest values (least squares) that never fall; pool adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (mean * size + before * count) / (size + count), size + count
        blocks.append((mean, size))
    return np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])


def _shared(amount: int, parts: int) -> NDArray[np.int64]:
    """`amount` in `parts` whole parts that differ by one at most."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * amount // max(parts, 1))
