"""What a pre-trained BLIP becomes for a task: a network of one of transformers' layouts, with the weights that it has for it."""

from __future__ import annotations

from typing import Any

from efficientvlm.families.blip.config import SlicedBlipConfig
from efficientvlm.families.blip.names import PREDICTIONS

DECODER = "text_decoder.bert."


def tuned_config(config: SlicedBlipConfig, kind: type[SlicedBlipConfig]) -> SlicedBlipConfig:
    """The configuration `kind` of the network that a pre-training one of `config` becomes: a decoder of its own lacks what both lacked."""
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    made: SlicedBlipConfig = kind.from_dict(values)
    kept = dict(config.kept or {})
    shared = {group.replace("text.", "decoder.", 1): ranges for group, ranges in kept.items() if not group.endswith(".head")}
    kept |= {group: ranges for group, ranges in shared.items() if group.startswith("decoder.")}
    counts, crossing = made.original_counts(), (config.cross_layers or {}).get("text")
    made.kept = {group: ranges for group, ranges in kept.items() if group in counts} or None
    made.cross_layers = None if crossing is None else {tower: crossing for tower in made.crossing if tower in made.towers}
    made.max_tokens = None  # the task has a length of its own
    return made


def tuned(model: Any, network: Any) -> tuple[Any, list[str]]:
    """`network`, of a :func:`tuned_config`, with the weights of the pre-training network `model`, and the names of its new tensors.

    New are keys and values of a decoder that attends to questions, where these are not as wide as images.
    """
    own, state, new = model.state_dict(), network.state_dict(), []
    for name, tensor in state.items():
        there = source(name, own)
        if there in own and own[there].shape == tensor.shape:
            state[name] = own[there]
        else:
            new.append(name)
    network.load_state_dict(state)
    if not model.temp.is_meta:
        network.config.contrast_temperature = round(float(model.temp.detach()), 6)
    return network.to(device=model.device, dtype=model.dtype).train(model.training), new


def source(name: str, own: Any) -> str:
    """Where the tensor `name` of a tuned network lies among the tensors `own` of the pre-training one."""
    if name in own:
        return name
    if name == f"{PREDICTIONS}.decoder.bias":
        return f"{PREDICTIONS}.bias"
    if name == f"{PREDICTIONS}.decoder.weight":
        return "text_encoder.embeddings.word_embeddings.weight"
    return name.replace(DECODER, "text_encoder.", 1)
