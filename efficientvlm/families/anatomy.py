"""What is removable in a network: a list of :class:`Unit`, each an attention head or a neuron, the tensor slices that belong to it, and the
places where a gate multiplies it; and how what goes into a network gets through them.

Shrinking, gates, accounting, surgery and reports are written against this file only; see `docs/add-a-family.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

HEAD, CROSS_HEAD, NEURON = "head", "cross_head", "neuron"
SECOND_CROSS_HEAD = "second_cross_head"
"""A head that attends to the second of two images, in a layer whose `CROSS_HEAD` attend to the first."""
KINDS = (HEAD, CROSS_HEAD, SECOND_CROSS_HEAD, NEURON)


class Site(NamedTuple):
    """`stop - start` consecutive entries of `tensor` (a state-dict name) along `dim`."""

    tensor: str
    dim: int
    start: int
    stop: int


class GatePoint(NamedTuple):
    """Columns `start:stop` of the input of the Linear called `module`, which a gate multiplies."""

    module: str
    start: int
    stop: int


class Unit(NamedTuple):
    """One removable head or neuron.

    `index` counts in the *original* layer, before anything was removed; `sites` and `gates` are positions in the present tensors. One that
    works in several places, as a head of two attentions with common keys and values, has a gate point in each.
    """

    tower: str
    layer: int
    kind: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    sites: tuple[Site, ...]
    gates: tuple[GatePoint, ...]

    @property
    def group(self) -> str:
        """Name of the layer and kind this unit belongs to, e.g. `vision.3.neuron`."""
        return f"{self.tower}.{self.layer}.{self.kind}"


class Flow(NamedTuple):
    """That what `source` knows gets into `target`.

    A node is an input or an output (`image`, `answer`), or the states of some positions of a tower: `text`, `vision.patches`. What is there
    once stays there through the residual stream, so that layers need no nodes of their own. `through` are the groups of which any one unit
    carries it; None: it always gets there; empty: nothing could carry it.
    """

    source: str
    target: str
    through: tuple[str, ...] | None = None


def groups_of(layers: Mapping[str, int], kind: str, *towers: str) -> tuple[str, ...]:
    """The groups of `kind` in all layers of `towers`; `layers` is by tower."""
    return tuple(f"{tower}.{layer}.{kind}" for tower in towers for layer in range(layers[tower]))
