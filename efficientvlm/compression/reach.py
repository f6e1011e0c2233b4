"""Which inputs still reach which outputs of a network when only some of its layers' heads are left, and which towers then reach nothing.

Everything here is ours and follows from the flows of a family: a layer that has lost all its heads reads nothing through them any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from efficientvlm.families.anatomy import Flow


class Pair(NamedTuple):
    """An input and an output."""

    input: str
    output: str

    def __str__(self) -> str:
        return f"{self.input} to {self.output}"


class Reach:
    """The flows of one network; `open` is always the groups of which at least one unit is there."""

    def __init__(self, flows: Sequence[Flow]) -> None:
        self.flows = tuple(flows)
        sources, targets = (list(dict.fromkeys(nodes)) for nodes in ((f.source for f in flows), (f.target for f in flows)))
        self.inputs = [node for node in sources if node not in targets]
        self.outputs = [node for node in targets if node not in sources]
        self.towers = list(dict.fromkeys(_tower(node) for node in targets if node in sources))

    @property
    def groups(self) -> list[str]:
        """Every group that something flows through."""
        return list(dict.fromkeys(group for flow in self.flows for group in flow.through or ()))

    def pairs(self, open: Collection[str]) -> frozenset[Pair]:
        """Which input gets to which output."""
        return frozenset(Pair(name, output) for name in self.inputs for output in self._after([name], open) & set(self.outputs))

    def closed(self, open: Collection[str]) -> frozenset[str]:
        """The groups that are all that something could flow through, where none of them is left."""
        return frozenset(group for flow in self.flows if not _carries(flow, open) for group in flow.through or ())

    def dead_towers(self, open: Collection[str]) -> list[str]:
        """Towers of which nothing gets to an output; none where the network has no output."""
        if not self.outputs:
            return []
        alive = self._after(self.outputs, open, backward=True)
        inner = {flow.target for flow in self.flows} - set(self.outputs)
        return [tower for tower in self.towers if not any(_tower(node) == tower for node in alive & inner)]

    def narrowest(self, wanted: Collection[Pair], ranking: Iterable[str], always: Collection[str]) -> frozenset[str]:
        """The fewest groups beside `always` that let all of `wanted` through, those that come first in `ranking` preferred.

        Groups are added in order until all gets through, and then taken away again from the last on where nothing is lost by it.
        """
        chosen: list[str] = []
        for group in ranking:
            if self.pairs({*always, *chosen}) >= set(wanted):
                break
            chosen.append(group)
        for group in reversed(chosen.copy()):
            rest = [other for other in chosen if other != group]
            if self.pairs({*always, *rest}) >= set(wanted):
                chosen = rest
        return frozenset(chosen)

    def _after(self, start: Iterable[str], open: Collection[str], backward: bool = False) -> set[str]:
        """`start` and every node that it flows into, or that flows into it."""
        found, todo = set(start), list(start)
        ends = [(flow.target, flow.source) if backward else (flow.source, flow.target) for flow in self.flows if _carries(flow, open)]
        while todo:
            node = todo.pop()
            for source, target in ends:
                if source == node and target not in found:
                    found.add(target)
                    todo.append(target)
        return found


def _carries(flow: Flow, open: Collection[str]) -> bool:
    return flow.through is None or any(group in open for group in flow.through)


def _tower(node: str) -> str:
    return node.partition(".")[0]


def of_config(config: Any) -> dict[str, Any]:
    """What inputs reach in a network of `config`, JSON-ready, from its structure alone.

    `reaches` and `cut_off`: input → outputs, of the latter those that were reached before anything was removed; `dead_towers`.
    """
    reach, open = Reach(config.flows()), standing(config.kept_indices())
    now, before = reach.pairs(open), reach.pairs(config.original_counts())
    return {
        "reaches": {name: sorted(pair.output for pair in now if pair.input == name) for name in reach.inputs},
        "cut_off": {name: lost for name in reach.inputs if (lost := sorted(pair.output for pair in before - now if pair.input == name))},
        "dead_towers": reach.dead_towers(open),
    }


def standing(kept: Mapping[str, Collection[Any]]) -> set[str]:
    """The groups of `kept` (group → units) of which something is left."""
    return {group for group, units in kept.items() if units}
