"""How long each layer of a network works while it answers a request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn


class Probe:
    """Seconds of the layers of `model`, by group, within what runs in the `with` block; ours.

    A layer is timed where it stands: the clock is read before and after each module that holds its weights, at every call (of all beams and
    steps of a decoder). What lies between two modules of one layer is the layer's, as attention between the values and the output, or the
    activation of neurons; what follows its output is not. Outside of a request the same layer takes another time: its operands would lie in
    the caches of the processor. A difference of two whole requests would hold that too, but drowns a layer of a hundredth in the noise
    of all the others.

    Args:
        model: the network, from which units may have been removed.
        synchronise: waits for the device.
        clock: seconds.

    Attributes:
        seconds: by group, of layers that have a unit left.
    """

    def __init__(
        self, model: Any, *, synchronise: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronise, self._clock = synchronise, clock
        self._layers, self._outputs = _modules_of(model)
        self.seconds: dict[str, float] = {}
        self._handles: list[Any] = []
        self._began = self._left = 0.0
        self._open: frozenset[str] = frozenset()

    def __enter__(self) -> Probe:
        self.seconds = {group: 0.0 for groups in self._layers.values() for group in sorted(groups)}
        self._open = frozenset()
        for module in self._layers:
            self._handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def now(self) -> float:
        self._synchronise()
        return self._clock()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self._began = self.now()
        if between := self._open & self._layers[module]:
            self._add(between, self._began - self._left)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._left = self.now()
        groups = self._layers[module]
        self._add(groups, self._left - self._began)
        self._open = frozenset() if module in self._outputs else groups

    def _add(self, groups: frozenset[str], seconds: float) -> None:
        for group in groups:
            self.seconds[group] += seconds / len(groups)


def _modules_of(model: Any) -> tuple[dict[nn.Module, frozenset[str]], set[nn.Module]]:
    """Modules that hold weights of units → the groups of these, and the modules that are the last of a layer."""
    tensors, units = model.state_dict(keep_vars=True), model.units()
    users: dict[int, set[str]] = {}
    for unit in units:
        for site in unit.sites:
            users.setdefault(id(tensors[site.tensor]), set()).add(unit.group)
    layers: dict[nn.Module, frozenset[str]] = {}
    for module in model.modules():
        own = [users.get(id(tensor), set()) for tensor in module._parameters.values() if tensor is not None]
        if (groups := frozenset().union(*own)) and not any(True for _ in module.children()):
            layers[module] = groups
    return layers, {model.get_submodule(gate.module) for unit in units for gate in unit.gates}
