"""How a BLIP that is tuned for one task begins another: its towers take the parts that read, or are read, in the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, SECOND_CROSS_HEAD
from efficientvlm.families.blip.config import SlicedBlipConfig
from efficientvlm.families.blip.names import EMBEDDINGS, LAYERS, PREDICTIONS, TEXT_LAYER
from efficientvlm.families.structure import odd_layers

TEXTS = {"text": "text_encoder.", "decoder": "text_decoder.bert."}
CROSS, DECODER = f".{TEXT_LAYER['cross_attention']}.", "text_decoder."
OUTPUT = f"{PREDICTIONS}.decoder.weight", f"{TEXTS['decoder']}embeddings.{EMBEDDINGS['word']}.weight"
"""The output matrix, and the word embedding that it usually is."""
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "max_position_embeddings")


class Parts(NamedTuple):
    """Towers of the old network that a tower of the new one begins with: its layers, and their cross-attention; None: that is fresh."""

    layers: str
    cross: str | None


class Lent(NamedTuple):
    """An answer decoder of another network: the configuration of that with the layers that are taken, and the tensors."""

    config: SlicedBlipConfig
    tensors: Mapping[str, Tensor]


def gained(model: Any, made: type[Any], donor: Any = None, decoder_init: str = "auto") -> tuple[Any, list[str]]:
    """A network of the class `made` with the weights of `model`, and the names of its tensors that are new or play a new part.

    A tower is taken as it is where there is one of its kind. Else a text encoder begins with the decoder, and a decoder with the text
    encoder. What attends to images goes on with what did, and with what attends to questions only where nothing else fits, or the other way
    round. What fits nowhere is fresh, random from torch's generator, and so are heads. Where two images are compared, both are attended to
    as one was, and what was removed of that is missing in both; what makes one of what both give is fresh (BLIP, NLVR2).

    Args:
        donor: a network that answers, or None.
        decoder_init: where a missing answer decoder comes from: `teacher` is the donor, `fusion` the network itself, `auto` the donor if it
            fits, of whose layers as many are taken as there are of text.

    Raises:
        BadInput: `decoder_init` asks for a donor, and there is none that fits.

    Source: ours; the published code tunes every task from pre-training alone.
    """
    old, kind = model.config, made.config_class
    lent = _lent(old, kind, donor, decoder_init)
    plan = {tower: _parts(old, kind, tower) for tower in TEXTS if tower in kind.towers and not (tower == "decoder" and lent)}
    network = made(_config(old, kind, plan, lent))
    given, state, new = model.state_dict(), network.state_dict(), []
    for name, tensor in state.items():
        if lent and name.startswith(DECODER):
            state[name] = lent.tensors[name]
            continue
        own = OUTPUT[1] if name == OUTPUT[0] and network.config.ties else name
        own = _of_one_image(own)
        source = _source(own, plan)
        found = given.get(source)
        fits = found is not None and found.shape == tensor.shape
        if fits:
            state[name] = found
        if not fits or source != own:
            new.append(name)
    network.load_state_dict(state)
    return network.to(model.device).train(model.training), sorted(new)


def _parts(old: SlicedBlipConfig, kind: type[SlicedBlipConfig], tower: str) -> Parts:
    """Where a tower of texts of the new network comes from."""
    there = [other for other in TEXTS if other in old.towers]
    layers = tower if tower in there else there[0]
    of_questions = tower == "decoder" and "text" in kind.towers
    width = old.text_config.hidden_size if of_questions else old.vision_config.hidden_size
    fits = [other for other in there if old.layers()[other] == old.layers()[layers] and old.context_width(other) == width]
    alike = [other for other in fits if (other == "decoder" and "text" in old.towers) == of_questions]
    return Parts(layers, next(iter([*alike, *(other for other in fits if other == layers)]), None))


def _config(old: SlicedBlipConfig, kind: type[SlicedBlipConfig], plan: Mapping[str, Parts], lent: Lent | None) -> SlicedBlipConfig:
    """The configuration of the new network: what was removed stays removed where its layer goes."""
    values = {name: value for name, value in old.to_dict().items() if name not in ("architectures", "model_type", "transformers_version")}
    of_layers = ("kept", "cross_layers", "decoder_layers", "layer_source", "layer_source_of", "head_source")
    of_the_task = ("answers", "prompt", "caption_tokens", "max_tokens")
    config = kind(**{**values, **dict.fromkeys(of_layers + of_the_task)})
    depth = {tower: old.layers()[parts.layers] for tower, parts in plan.items()}
    crossing = {
        tower: [layer for layer in range(depth[tower]) if old.crosses(parts.cross or parts.layers, layer)] for tower, parts in plan.items()
    }
    if lent:
        depth["decoder"] = lent.config.layers()["decoder"]
        crossing["decoder"] = [layer for layer in range(depth["decoder"]) if lent.config.crosses("decoder", layer)]
    config.text_config.num_hidden_layers = depth["text"] if "text" in depth else depth["decoder"]
    if depth.keys() == TEXTS.keys() and depth["decoder"] != depth["text"]:
        config.decoder_layers = depth["decoder"]
    config.cross_layers = {tower: layers for tower, layers in crossing.items() if len(layers) < depth[tower]} or None
    origins = {"vision": "vision", **{tower: parts.layers for tower, parts in plan.items()}}
    for name in ("layer_source", "layer_source_of"):
        known = getattr(old, name) or {}
        setattr(config, name, {tower: known[origin] for tower, origin in origins.items() if origin in known} or None)
    config.head_source = dict(_moved(old.head_source or {}, kind, plan)) or None
    of_lent = {group: units for group, units in lent.config.kept_indices().items() if group.startswith("decoder.")} if lent else {}
    return config.with_kept({**dict(_moved(old.kept_indices(), kind, plan)), **of_lent})


def _moved(groups: Mapping[str, list[int]], kind: type[SlicedBlipConfig], plan: Mapping[str, Parts]) -> Iterator[tuple[str, list[int]]]:
    """What is known of groups of the old network, for those of the new one that come from them."""
    for group, known in groups.items():
        tower, layer, unit = group.split(".")
        if tower == "vision":
            yield group, known
        for new, parts in plan.items():
            if tower == (parts.cross if unit == CROSS_HEAD else parts.layers):
                yield f"{new}.{layer}.{unit}", known
                if unit == CROSS_HEAD and "compare" in kind.able:
                    yield f"{new}.{layer}.{SECOND_CROSS_HEAD}", known


def _of_one_image(name: str) -> str:
    """What tensor `name` of cross-attention to two images is called in that to one, which both begin with."""
    return name.replace(f"{CROSS}first.", CROSS).replace(f"{CROSS}second.", CROSS)


def _source(name: str, plan: Mapping[str, Parts]) -> str:
    """Name in the old network of what tensor `name` of the new one begins with; empty where that is fresh."""
    for tower, parts in plan.items():
        if name.startswith(TEXTS[tower]):
            of = parts.cross if name.startswith(LAYERS[tower]) and CROSS in name else parts.layers
            return "" if of is None else TEXTS[of] + name.removeprefix(TEXTS[tower])
    return name


def _lent(old: SlicedBlipConfig, kind: type[SlicedBlipConfig], donor: Any, decoder_init: str) -> Lent | None:
    """The answer decoder that a donor lends, if one is to."""
    if {*TEXTS} - {*kind.towers} or "decoder" in old.towers:
        return None
    if decoder_init == "teacher" and donor is None:
        raise BadInput("decoder_init is teacher", "there is no --teacher", "give one, or decoder_init=fusion")
    fits = donor is not None and donor.config.ties == old.ties
    fits = fits and all(getattr(donor.config.text_config, size) == getattr(old.text_config, size) for size in SIZES)
    if decoder_init == "teacher" and not fits:
        why = "its answer decoder has another width, or other heads, neurons, positions or words"
        raise BadInput("decoder_init is teacher", why, "use decoder_init=fusion")
    if not fits or decoder_init == "fusion":
        return None
    total = donor.config.layers()
    chosen = {tower: [*range(count)] for tower, count in total.items()}
    chosen["decoder"] = odd_layers(total["decoder"], min(total["decoder"], old.layers()["text"]))
    tensors, place = {}, f"{LAYERS['decoder']}."
    for name, tensor in donor.state_dict().items():
        number, _, tail = name.removeprefix(place).partition(".")
        if not name.startswith(place):
            tensors[name] = tensor
        elif int(number) in chosen["decoder"]:
            tensors[f"{place}{chosen['decoder'].index(int(number))}.{tail}"] = tensor
    return Lent(donor.config.with_layers(chosen), tensors)
