"""An X-VLM that reads two images at a time, made of one that reads one (X-VLM, NLVR2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efficientvlm.families.network import refusal

IMAGES = 2


def of_two_images(model: Any, head: str) -> tuple[Any, list[str]]:
    """`model` with `head` (compare, assign) alone, and the names of its tensors that are new.

    Every fusion layer becomes two, one for each image, with common keys and values; what was removed of it is missing in both. The heads
    of other tasks are left behind, and so are the temperature and an answer decoder: who answers what is in an image has learnt what
    statements ask for. `assign` keeps the projection of images, by which it draws others that are alike. A network that reads two images
    already keeps its layers.

    Raises:
        BadInput: a network without fusion layers.
    """
    config = model.config
    if not config.fusion_layers:
        raise refusal(config, head, why="without fusion layers it reads texts blind", fix="shrink to at least one")
    if list(config.heads) == [head]:
        return model, []
    changed = config.copy(heads=[head], **_without_decoder(config))
    if config.fusion_images == 1:
        changed = changed.copy(fusion_images=IMAGES, fusion_layers=IMAGES * config.fusion_layers, **_doubled(changed))
    new = type(model)(changed)
    old, state = model.state_dict(), new.state_dict()
    sources = {name: _source(name, IMAGES // config.fusion_images) for name in state}
    new.load_state_dict({name: old.get(sources[name], tensor) for name, tensor in state.items()})
    return new, [name for name, source in sources.items() if source not in old]


def _without_decoder(config: Any) -> dict[str, Any]:
    """What the configuration says of an answer decoder and its answers, taken away."""
    if not config.decoder_layers:
        return {}
    found: dict[str, Any] = {"decoder_layers": 0, "answers": None}
    if config.kept:
        found["kept"] = {name: ranges for name, ranges in config.kept.items() if not name.startswith("decoder.")}
    if config.layer_source:
        for name in ("layer_source", "layer_source_of"):
            found[name] = {tower: source for tower, source in getattr(config, name).items() if tower != "decoder"}
    return found


def _doubled(config: Any) -> dict[str, Any]:
    """What the configuration says of single fusion layers, of two each."""
    found: dict[str, Any] = {}
    if config.kept:
        found["kept"] = {group: ranges for name, ranges in config.kept.items() for group in _groups(name)}
    if config.layer_source and "fusion" in config.layer_source:
        layers = [IMAGES * layer + image for layer in config.layer_source["fusion"] for image in range(IMAGES)]
        found["layer_source"] = {**config.layer_source, "fusion": layers}
        found["layer_source_of"] = {**config.layer_source_of, "fusion": IMAGES * config.layer_source_of["fusion"]}
    return found


def _groups(name: str) -> list[str]:
    tower, number, kind = name.split(".")
    return [f"fusion.{IMAGES * int(number) + image}.{kind}" for image in range(IMAGES)] if tower == "fusion" else [name]


def _source(name: str, times: int) -> str:
    """The tensor of the network of one image that `name` is a copy of; a layer of it became `times` layers."""
    place, layered, rest = name.partition("fusion.layers.")
    number, _, tail = rest.partition(".")
    return f"fusion.layers.{int(number) // times}.{tail}" if layered and not place else name


def second_copies(state: Mapping[str, Any]) -> list[str]:
    """Names of a `state` with keys and values in every fusion layer that are the second copy of those of the layer before."""
    return [name for name in state if first_copy(name) != name]


def first_copy(name: str) -> str:
    """Where the keys and values lie that the tensor `name` of a fusion layer is a copy of: in the first layer of its pair."""
    place, layered, rest = name.partition("fusion.layers.")
    number, _, tail = rest.partition(".")
    shared = layered and not place and tail.startswith(("cross_attention.k.", "cross_attention.v."))
    return f"{layered}{int(number) // IMAGES * IMAGES}.{tail}" if shared else name
