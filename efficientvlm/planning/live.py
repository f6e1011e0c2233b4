"""Bytes that a training step holds at its fullest: the step itself, on tensors that have shapes and a device but no values (ours)."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficientvlm.loaded import Loaded
from efficientvlm.runtime.hardware import autocast

aten = torch.ops.aten
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Live(TorchDispatchMode):
    """Counts the storages of the tensors that operations make while they exist: `now` and, at most, `peak` bytes.

    What was there before, such as weights, does not count, and neither do views of it.

    Tensors with values are computed with. What follows from a fake tensor is fake, but for a draw, which becomes one of even chances, so
    that indices always have values; a number read from a fake tensor is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1
        if func is aten.multinomial.default and isinstance(args[0], FakeTensor):
            *rows, columns = args[0].shape
            return torch.randint(columns, (*rows, args[1]))
        if func in INDEXED:
            args = (args[0], [each for index in args[1] for each in places(index)], *args[2:])
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._pass_over(tensor.untyped_storage())
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return outputs

    def _pass_over(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known and key not in self._given:
            self._given.add(key)
            weakref.finalize(storage, self._given.discard, key)

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or key in self._given:
            return
        count = storage.nbytes()
        self._known.add(key)
        self.now += count
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, count)

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def places(index: Tensor | None) -> Sequence[Tensor | None]:
    """A mask that is an index as the positions of its entries that are true; another index as it is."""
    return index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]


def valueless(loaded: Loaded, device: torch.device, fake: FakeTensorMode) -> Loaded:
    """The network of `loaded`, shapes alone, with fake tensors of `device`."""
    model, done = copy.deepcopy(loaded.model), dict[int, Tensor]()  # tied tensors stay one

    def emptied(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            with fake:
                empty = torch.empty_like(tensor, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            done[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
        return done[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: emptied(tensor) for name, tensor in tensors.items() if tensor is not None})
    return replace(loaded, model=model)


def fullest(objective: nn.Module, batches: Sequence[dict[str, Any]], fake: FakeTensorMode, *, device: torch.device, precision: str) -> int:
    """Most bytes of activations and gradients together that a step of `objective` on one of `batches` holds, beside its weights.

    The networks of `objective` are :func:`valueless` under `fake`; the batches are those of a real step, with their pictures as shapes.
    """
    objective.train()
    most = 0
    for batch in batches:
        pictures = {name: fake.from_tensor(value) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim >= 4}
        with torch.random.fork_rng(devices=[]), Live() as live:
            moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in (batch | pictures).items()}
            with autocast(device, precision):
                losses = objective(moved, 0)
            losses["loss"].backward()
        objective.zero_grad(set_to_none=True)
        most = max(most, live.peak)
    return most
