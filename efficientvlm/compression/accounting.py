"""What a model costs: parameters, multiply-accumulates, kept units, sparsity. All counted, nothing estimated.

Works on the meta device as well, where it allocates nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from efficientvlm.compression.anatomy import Anatomy, tied
from efficientvlm.compression.reach import of_config
from efficientvlm.compression.surgery import whole


def account(model: Any, *, text_length: int = 12) -> dict[str, Any]:
    """The `accounting` part of a manifest, JSON-ready: `parameters`, `macs`, `units`, `sparsity`, `reach`.

    Args:
        text_length: tokens of the example question the MACs are counted for, at the image size of the model's config.
    """
    parameters, macs = count_parameters(model), count_macs(model, text_length=text_length)
    reach = of_config(model.config)
    return {
        "parameters": parameters,
        "macs": macs,
        "units": count_units(model.config),
        "sparsity": count_sparsity(model),
        "reach": {**reach, "wasted": wasted(reach["dead_towers"], parameters, macs)},
    }


def wasted(dead_towers: Iterable[str], parameters: dict[str, Any], macs: dict[str, Any]) -> dict[str, float]:
    """The parts of all parameters and multiply-accumulates that influence no output, since nothing of their towers reaches one."""
    counts = {"parameters": parameters, "macs": macs}
    return {name: sum(count["by_tower"].get(tower, 0) for tower in dead_towers) / max(count["total"], 1) for name, count in counts.items()}


def count_parameters(model: Any) -> dict[str, Any]:
    """Elements of the state dict. Tied tensors count once, under their first name, and as embedding if one of their names is."""
    tensors = model.state_dict(keep_vars=True)
    aliases = tied(tensors)
    embeddings = {aliases.get(name, name) for name in tensors if model.is_embedding(name)}
    by_tower: Counter[str] = Counter()
    without = 0
    for name, tensor in tensors.items():
        if name not in aliases:
            by_tower[model.tower_of(name)] += tensor.numel()
            without += 0 if name in embeddings else tensor.numel()
    return {"total": by_tower.total(), "without_embeddings": without, "by_tower": dict(by_tower)}


def count_units(config: Any) -> dict[str, dict[str, int]]:
    """`tower.layer.kind` → units kept and units before anything was removed."""
    kept = config.kept_indices()
    return {group: {"kept": len(kept[group]), "of": count} for group, count in config.original_counts().items()}


def count_sparsity(model: Any) -> dict[str, Any]:
    """1 − kept / initial elements of the prunable weights, in all and by tower; initial is the same network with every unit in place."""
    present = Anatomy.of(model).totals
    initial, everything = present, whole(model.config)
    if model.config.kept_indices() != everything:
        with torch.device("meta"):
            dense = type(model)(model.config.with_kept(everything))
        initial = Anatomy.of(dense).totals
    by_tower = {tower: _sparsity(count, present.get(tower, 0)) for tower, count in initial.items()}
    return {**_sparsity(sum(initial.values()), sum(present.values())), "by_tower": by_tower}


def _sparsity(initial: int, kept: int) -> dict[str, Any]:
    return {"initial": initial, "kept": kept, "achieved": 1 - kept / initial if initial else 0.0}


def count_macs(model: Any, *, text_length: int = 12) -> dict[str, Any]:
    """Multiply-accumulates of matrix products and convolutions for one image and one question of `text_length` tokens, by tower.

    Operations outside every module with parameters of one tower count as `heads`.
    """
    batch = example_of(model, text_length)
    by_tower = count_macs_of(model, lambda: model.run(batch))
    total = sum(by_tower.values())
    return {"total": total, "by_tower": by_tower, "image_size": image_size_of(batch), "text_length": text_length}


def example_of(model: Any, text_length: int) -> dict[str, Any]:
    """What work is counted for: one image and one text of `text_length` tokens."""
    with torch.random.fork_rng(devices=[]):
        batch: dict[str, Any] = model.example(1, text_length, next(model.parameters()).device)
    return batch


def image_size_of(batch: dict[str, Any]) -> int:
    """Pixels on a side of the images of `batch`; 0 without any."""
    return next((value.shape[-1] for value in batch.values() if isinstance(value, torch.Tensor) and value.dim() == 4), 0)


def count_macs_of(model: Any, act: Callable[[], object]) -> dict[str, int]:
    """Multiply-accumulates of what `act` computes with `model`, by tower, as :func:`count_macs` counts them."""
    with counting(model) as counter, _Ledger(model, counter) as ledger:
        act()
    return {tower: flops // 2 for tower, flops in ledger.flops.items() if flops}


@contextmanager
def counting(model: nn.Module) -> Iterator[FlopCounterMode]:
    """A counter of the operations of `model` inside the block, two for each multiply-accumulate, attention as matrix products."""
    counter = FlopCounterMode(display=False)
    with _frozen(model), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Not `no_grad`: the counter's module hooks fail there on views of a parameter (an empty layer)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


class _Ledger:
    """Books the operations counted so far on the tower of the innermost module that is running."""

    def __init__(self, model: Any, counter: FlopCounterMode) -> None:
        self.flops: Counter[str] = Counter()
        self._counter, self._seen = counter, 0
        self._running = ["heads"]
        names = list(model.state_dict())
        self._handles = []
        for name, module in model.named_modules():
            towers = {model.tower_of(parameter) for parameter in names if parameter.startswith(name + ".")}
            if len(towers) == 1:
                self._handles.append(module.register_forward_pre_hook(self._enter(towers.pop())))
                self._handles.append(module.register_forward_hook(self._leave))

    def _book(self) -> None:
        total = self._counter.get_total_flops()
        self.flops[self._running[-1]] += total - self._seen
        self._seen = total

    def _enter(self, tower: str) -> Any:
        def enter(*_: Any) -> None:
            self._book()
            self._running.append(tower)

        return enter

    def _leave(self, *_: Any) -> None:
        self._book()
        self._running.pop()

    def __enter__(self) -> _Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._book()
        for handle in self._handles:
            handle.remove()
