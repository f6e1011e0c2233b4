"""Checkpoints in the shapes of transformers' own classes: zeros where units were removed, or really smaller where a class can say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm import families
from efficientvlm.checkpoints.card import short
from efficientvlm.compression.accounting import count_macs, count_parameters
from efficientvlm.compression.surgery import pad_model
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.families.anatomy import NEURON
from efficientvlm.families.loading import open_model
from efficientvlm.families.towers.parts import normalise

TOLERANCE = 1e-4  # rounding of float32 alone reached 2e-5 on some processors
"""How far outputs may be from those of another class, relative to the largest if above 1."""
INSTEAD = "use --format onnx, which keeps every saving, or --format padded, which fills the gaps with zeros"


def padded(model: Any) -> Any:
    """The network of the original shapes that computes what `model` does; zeros stand for what was removed, and for cross-attention that
    single layers never had, where that can be."""
    return pad_model(model).completed().eval()


def uniform(model: Any, name: str) -> Any:
    """The same tensors under :func:`uniform_config`."""
    copy = type(model)(uniform_config(model.config, name))
    copy.load_state_dict(model.state_dict(), strict=True)
    return copy.eval()


def uniform_config(config: Any, name: str) -> Any:
    """A configuration that says nothing about single layers, for the network of `config`.

    Raises:
        BadInput: naming the first head, neuron count or depth that transformers' configurations cannot express.
    """
    if not hasattr(config, "stock_config") or _untuned(config):
        raise no_class(name, config)
    return config.stock_config(_neurons(config, name))


def _neurons(config: Any, name: str) -> dict[str, int]:
    """Neurons of a layer of each tower, the same in all its layers."""
    kept, counts = config.kept_indices(), config.original_counts()
    found: dict[str, tuple[int, int]] = {}
    for group, indices in kept.items():
        tower, layer, kind = group.split(".")
        what = f"{tower} layer {layer}"
        if kind != NEURON:
            if len(indices) < counts[group]:
                raise _obstacle(
                    name, f"{what} has {len(indices)} of {counts[group]} {kind.replace('_', '-')}s, and their width is fixed there"
                )
            continue
        count, first = found.setdefault(tower, (len(indices), int(layer)))
        if len(indices) != count:
            raise _obstacle(
                name, f"{what} has {len(indices)} neurons and layer {first} has {count}, where one number stands for all layers"
            )
        if not indices:
            raise _obstacle(name, f"{what} has no neurons left")
    return {tower: count for tower, (count, _) in found.items()}


def _obstacle(name: str, why: str) -> BadInput:
    return BadInput(f"{name} does not fit transformers' own classes", why, INSTEAD)


def no_class(name: str, config: Any) -> BadInput:
    """What to say where transformers has no class for this network at all."""
    problem = _obstacle(name, config.foreign or f"transformers has no class for this {config.model_type} network")
    return BadInput(problem.what, problem.why, "finetune it for a task first") if _untuned(config) else problem


def _untuned(config: Any) -> bool:
    """Whether transformers has a class for what the network becomes."""
    return bool(config.foreign) and "pretrain" in config.abilities()


def class_of(folder: Path, config: Any) -> str | None:
    """The transformers class that `config.json` in `folder` names; None if it is one of ours."""
    values = json.loads((folder / "config.json").read_text("utf-8"))
    return None if values["model_type"] == config.model_type else str(values["architectures"][0])


@torch.no_grad()
def difference(model: Any, folder: Path, stock_class: str | None) -> float:
    """Largest absolute difference between `model` and what opens from `folder`, relative to the outputs' scale (at least 1).

    With a `stock_class` transformers' own class opens it and runs its own forward pass.
    """
    batch = _random_batch(model)
    if stock_class is None:
        records = [network.run(batch) for network in (model, families.of_folder(folder).load(folder))]
        output = "logits" if "logits" in records[0] else "states"  # a network before its task predicts nothing
        return _largest(*([record[output]] for record in records))
    import transformers

    kind = getattr(transformers, stock_class)
    opened = open_model(kind, folder, kind.config_class.from_pretrained(folder, local_files_only=True))
    inputs = model.stock_inputs(batch)
    return _largest(_tensors(model(**inputs)), _tensors(opened(**inputs)))


def opening(family: Any, model: Any, folder: Path) -> str:
    """Which class opens a checkpoint of `model`, in words; one of transformers' is compared with `model` by way of `folder`.

    Raises:
        TargetMissed: transformers' class computes something else.
    """
    if model.config.opened_by is None:
        return f"it opens with this package only: {model.config.foreign or 'transformers has no such class'}"
    model = model.eval()
    family.save(model, folder)
    name = class_of(folder, model.config)
    off = difference(model, folder, name)
    if not off <= TOLERANCE:
        why = f"outputs are off by {off:.2e}, {TOLERANCE:.1e} is allowed"
        raise TargetMissed(f"transformers' {name} does not compute what the network does", why, "nothing was written")
    return f"it opens with transformers' {name}, which differs by {off:.1e} at most"


def _random_batch(model: Any) -> dict[str, Any]:
    """An example batch of three with random normalised pixels and tokens."""
    sizes = model.config.sizes()
    draw = torch.Generator().manual_seed(0)
    batch = model.example(3, sizes.usual_text)
    for name, value in batch.items():
        if name.endswith("_ids") and value.dim() == 2:
            batch[name] = torch.randint(sizes.vocab_size, value.shape, generator=draw)
        elif value.dim() == 4:
            pixels = torch.randint(256, value.shape, generator=draw, dtype=torch.uint8)
            batch[name] = normalise(pixels, sizes.image_mean, sizes.image_std, torch.float32)
    return batch


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in output.to_tuple() if isinstance(value, Tensor)]


def _largest(wanted: list[Tensor], got: list[Tensor]) -> float:
    pairs = list(zip(wanted, got, strict=True))
    return max(float((a - b).abs().nan_to_num(nan=float("inf")).max()) / max(1.0, float(a.abs().max())) for a, b in pairs)


def cost(before: Any, after: Any) -> dict[str, dict[str, int]]:
    """Parameters and multiply-adds of the checkpoint and of the exported network."""
    parameters = {name: count_parameters(model)["total"] for name, model in (("before", before), ("after", after))}
    macs = {
        name: count_macs(model, text_length=model.config.sizes().usual_text)["total"]
        for name, model in (("before", before), ("after", after))
    }
    return {"parameters": parameters, "macs": macs}


def sentence(cost: dict[str, dict[str, int]]) -> str:
    """What the form costs, for people."""
    parts = []
    for name, pair in cost.items():
        more = pair["after"] / pair["before"] - 1 if pair["before"] else 0.0
        parts.append(f"{short(pair['before'])} → {short(pair['after'])} {name} ({more:+.0%})")
    return "export: " + ", ".join(parts)
