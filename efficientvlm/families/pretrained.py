"""What it takes to begin a network with towers of Hugging Face: their folders, the choice of layers, BERT, filling the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertConfig

from efficientvlm.data.tokenizer import load_tokenizer
from efficientvlm.errors import BadInput, number_of, shorten
from efficientvlm.families.checks import CORRECT, MOST_LAYERS
from efficientvlm.families.loading import open_config, read_json, say_once
from efficientvlm.families.towers.names import bert_name
from efficientvlm.families.weights import floats, read_folder

MOST_PADDING = 128  # embeddings are padded to a multiple of 8, 64 or 128
AGAIN = "save or download the model again"
WORDS, PLACES, TYPES = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
BIAS = "cls.predictions.bias"
LAYER = "encoder.layer."


def kind_of(folder: Path, wanted: tuple[str, ...], what: str) -> str:
    """The `model_type` of a model folder; :class:`BadInput` unless it is one of `wanted`, in words `what`."""
    if not (folder / "config.json").exists():
        why = "it has no config.json"
        raise BadInput(f"{folder} is not a model folder", why, "give the folder of a model in transformers' format")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in wanted:
        raise BadInput(f"{folder} is not {what}", f"its model_type is {shorten(kind)}", f"give a folder of {what}")
    return str(kind)


def read_config(kind: Any, folder: Path) -> Any:
    """The configuration of a model folder as one of transformers' class `kind`; :class:`BadInput` if it is none."""
    file = folder / "config.json"
    return open_config(kind, read_json(file), file)


def check_layers(folder: Path, config: Any) -> None:
    """:class:`BadInput` unless a configuration has a number of layers that a network can have."""
    count = config.num_hidden_layers
    if not isinstance(count, int) or not 1 <= count <= MOST_LAYERS:
        raise BadInput(f"{folder}: {shorten(count)} layers", f"there can be 1 to {MOST_LAYERS}", CORRECT)


def checked(folder: Path, name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of a tower as float32; :class:`BadInput` unless it has the `shape` that its config.json says, and finite floats."""
    if tuple(tensor.shape) != tuple(shape):
        why = f"{name} has shape {list(tensor.shape)}, {list(shape)} is needed"
        raise BadInput(f"{folder} does not fit its config.json", why, AGAIN)
    if (found := floats(tensor)) is None:
        raise BadInput(f"the weights in {folder} are damaged", f"{name} is not all finite floats", "fetch them again")
    return found


def bert_config(folder: Path, family: str) -> Any:
    """The configuration of the BERT in `folder`; :class:`BadInput` if there is none, or with another activation than the `family` has."""
    kind_of(folder, ("bert",), "a BERT")
    config = read_config(BertConfig, folder)
    if config.hidden_act != "gelu":
        raise BadInput(f"BERT in {folder}", f"its activation is {config.hidden_act}, {family}'s is gelu", "use a BERT with gelu")
    check_layers(folder, config)
    if not isinstance(dropped := config.hidden_dropout_prob, int | float) or not 0 <= dropped < 1:
        raise BadInput(f"{folder}: hidden_dropout_prob is {shorten(dropped)}", "it is a part: from 0, and below 1", CORRECT)
    return config


def bert_tensors(folder: Path, config: Any) -> dict[str, Tensor]:
    """Tensors of a BERT by its own names, without prefix, cross-attention or pooler; of the prediction head too where it has one.

    Those of the embeddings and the last bias are float32, in the shapes that its `config` says.

    Raises:
        BadInput: unreadable weights, a tensor of unknown meaning in embeddings or layers, or one of these that does not fit.
    """
    tensors = {name.removeprefix("bert."): tensor for name, tensor in read_folder(folder).items()}
    if "cls.predictions.bias" not in tensors and "cls.predictions.decoder.bias" in tensors:
        tensors["cls.predictions.bias"] = tensors["cls.predictions.decoder.bias"]
    plain = {name: tensor for name, tensor in tensors.items() if (role := bert_name(name)) and "cross_attention" not in role}
    unknown = [name for name in tensors if name.startswith(("embeddings.", "encoder.")) and name not in plain]
    no_strangers(folder, [*unknown, *(name for name in plain if beyond(name, LAYER, config.num_hidden_layers))])
    width = config.hidden_size
    shapes = {WORDS: config.vocab_size, PLACES: config.max_position_embeddings, TYPES: config.type_vocab_size}
    known = {**{name: (rows, width) for name, rows in shapes.items()}, BIAS: (config.vocab_size,)}
    return plain | {name: checked(folder, name, plain[name], shape) for name, shape in known.items() if name in plain}


def beyond(name: str, place: str, layers: int) -> bool:
    """Whether tensor `name` is of a layer, called `place`N, that a network of so many `layers` does not have."""
    return name.startswith(place) and int(name.removeprefix(place).partition(".")[0]) >= layers


def check_vocabulary(folder: Path, embedded: int, tokens: int) -> None:
    """Say how many of the `embedded` tokens of the BERT in `folder` a tokenizer of `tokens` never gives.

    Raises:
        BadInput: the tokenizer has more, or so many fewer that it is another one, than BERT's own.
    """
    padding = embedded - tokens
    if padding < 0 or (padding and padding >= MOST_PADDING and len(own_vocabulary(folder) or ()) != tokens):
        why = f"BERT in {folder} embeds {embedded}, and its embeddings mean nothing for other tokens"
        raise BadInput(f"the tokenizer has {tokens} tokens", why, f"use BERT's own: --tokenizer {folder}")
    if padding:
        say_once(f"init: BERT embeds {number_of(padding, 'more token')} than its tokenizer has; they are padding, and stay")


def own_vocabulary(folder: Path) -> Mapping[str, int] | None:
    """Token → id of the tokenizer in BERT's own folder, if there is one."""
    try:
        found: Mapping[str, int] = load_tokenizer(folder, bert=True).get_vocab()
    except BadInput:
        return None
    return found


def chosen_layers(folder: Path, available: int, wanted: int) -> dict[int, int]:
    """Layer of the tower → layer of ours that it becomes, at equal distance, the last included; of 12 for 6: 1, 3, 5, 7, 9, 11.

    Raises:
        BadInput: none wanted, or more than there are.
    """
    if not 0 < wanted <= available:
        raise BadInput(f"{wanted} layers from {folder}", f"it has {available}", f"ask for 1 to {available} in all")
    return {(i + 1) * available // wanted - 1: i for i in range(wanted)}


def renumbered(state: Mapping[str, Tensor], place: str, chosen: Mapping[int, int]) -> dict[str, Tensor]:
    """`state` with only the chosen ones of the layers named `place`N., under their new numbers."""
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        number, _, tail = name.removeprefix(place).partition(".")
        if not name.startswith(place):
            kept[name] = tensor
        elif int(number) in chosen:
            kept[f"{place}{chosen[int(number)]}.{tail}"] = tensor
    return kept


def no_strangers(folder: Path, names: Iterable[str]) -> None:
    """:class:`BadInput` if there are `names`, of tensors without a meaning here."""
    names = sorted(name for name in names if not name.endswith("position_ids"))
    if names:
        what = f"{folder} has {number_of(len(names), 'tensor')} that there is no place for"
        raise BadInput(what, ", ".join(names[:5]), "use a plain CLIP, DINOv2, ViT or BERT")


def fill(model: Any, state: Mapping[str, Tensor], sources: str, may_be_fresh: Callable[[str], bool]) -> list[str]:
    """Copy `state` into `model`; the names of the tensors that it does not hold, which are fresh.

    Args:
        sources: where the state comes from, in words.
        may_be_fresh: whether no tower has the tensor of this name.

    Raises:
        BadInput: another tensor is missing; one has another shape, or values that are no finite floats.
    """
    own = model.state_dict()
    held = {own[name].data_ptr() for name in state if name in own}
    new = sorted(name for name in set(own) - set(state) if own[name].data_ptr() not in held)  # one tensor may have two names
    if missing := [name for name in new if not may_be_fresh(name)]:
        raise BadInput(f"{sources} lack {number_of(len(missing), 'tensor')}", ", ".join(missing[:5]), "fetch them again")
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            needed = list(own[name].shape) if name in own else "nothing"
            raise BadInput("a tower does not fit its config.json", f"{name} has shape {list(tensor.shape)}, {needed} is needed", AGAIN)
        if (found := floats(tensor)) is None:
            raise BadInput("the weights of a tower are damaged", f"{name} is not all finite floats", "fetch them again")
        own[name].copy_(found)
    return new
