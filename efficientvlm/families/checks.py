"""What the configuration of every family must be like before a network is built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.structure import Structure

CORRECT = "correct it there"
HUGE = 1e30  # less than the largest float32; a comparison takes any integer, and NaN fails it
# a damaged number is not to be counted out
MOST = 10_000_000  # of anything: tokens, positions, columns
MOST_LAYERS = 1000
MOST_PIXELS = 16_384  # a side
LONGEST_PROMPT = 1000
MOST_UNITS = 4_000_000  # heads and neurons of a network

Many = Annotated[int, Field(ge=1, le=MOST)]
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]


def check_config(config: Structure, where: str) -> None:
    """Refuse sizes, channel statistics or counts of `config` that no network can have; `where` names their file.

    Raises:
        BadInput: the first thing that is wrong.
    """
    for name in ("image_mean", "image_std"):
        check_channels(name, getattr(config, name), where)
    answers = config.answers
    if answers is not None and not (isinstance(answers, list) and answers and all(isinstance(text, str) and text for text in answers)):
        raise BadInput(f"{where}: answers are {shorten(answers)}", "they are a list of texts", CORRECT)
    if not isinstance(config.prompt, str | None) or len(config.prompt or "") > LONGEST_PROMPT:
        raise BadInput(f"{where}: prompt is {shorten(config.prompt)}", f"it is a text of {LONGEST_PROMPT} letters at most", CORRECT)
    lengths = config.caption_tokens
    if lengths is not None and not (isinstance(lengths, list) and len(lengths) == 2 and all(_whole(length, 0) for length in lengths)):
        raise BadInput(f"{where}: caption_tokens is {shorten(lengths)}", "they are two whole numbers, the fewest and the most", CORRECT)
    for tower, count in config.layers().items():
        if not _whole(count, 0, MOST_LAYERS):
            raise BadInput(f"{where}: {shorten(count)} {tower} layers", f"there can be 0 to {MOST_LAYERS}", CORRECT)
    sizes = config.sizes()
    for name in ("image_size", "patch_size"):
        if not _whole(getattr(sizes, name), 1, MOST_PIXELS):
            why = f"images and patches are square: one number, 1 to {MOST_PIXELS}"
            raise BadInput(f"{where}: {name} is {shorten(getattr(sizes, name))}", why, CORRECT)
    if sizes.patch_size > sizes.image_size:
        raise BadInput(f"{where}: patches of {sizes.patch_size} px", f"images have {sizes.image_size} px", CORRECT)
    for tower, heads in sizes.heads.items():
        for width, number in zip(sizes.widths[tower], heads, strict=False):  # the last width is that of the output
            if not _whole(width, 1) or not _whole(number, 1) or width % number:
                why = f"{shorten(width)} columns cannot be shared evenly by so many heads"
                raise BadInput(f"{where}: {shorten(number)} {tower} heads", why, CORRECT)
    _check_sources(config, where)
    counts = {"positions for tokens": sizes.max_positions, "tokens in the vocabulary": sizes.vocab_size}
    counts |= {f"units in {group}": count for group, count in config.original_counts().items()}
    counts |= {"tokens of a text (max_tokens)": config.max_tokens} if config.max_tokens is not None else {}
    for what, count in {**counts, "answers to rank (rank_top)": config.rank_top}.items():
        if not _whole(count, 1):
            raise BadInput(f"{where}: {shorten(count)} {what}", f"it must be a whole number, 1 to {MOST:,}", CORRECT)
    if (units := sum(config.original_counts().values())) > MOST_UNITS:
        raise BadInput(f"{where}: {units:,} heads and neurons", f"no network of more than {MOST_UNITS:,} is opened", CORRECT)


def _check_sources(config: Structure, where: str) -> None:
    """Refuse a record of the layers that a network was shrunk from which is none."""
    of = {} if config.layer_source_of is None else config.layer_source_of
    source = {} if config.layer_source is None else config.layer_source
    towers = config.layers()
    fine = isinstance(of, Mapping) and isinstance(source, Mapping) and {*of} <= {*source} <= {*towers}
    for tower in source if fine else ():
        layers, count = source[tower], of.get(tower, MOST_LAYERS)
        fine = fine and _whole(count, 0, MOST_LAYERS) and isinstance(layers, list) and all(_whole(layer, 0, count - 1) for layer in layers)
        fine = fine and layers == sorted(set(layers))
    if not fine:
        why = "they name the layers of the teacher that each tower has, and how many the teacher had"
        raise BadInput(f"{where}: layer_source is {shorten(source)} of {shorten(of)}", why, CORRECT)
    heads = {} if config.head_source is None else config.head_source
    lists = isinstance(heads, Mapping) and all(isinstance(found, list) for found in heads.values())
    if not lists or not all(_whole(head, 0) for found in heads.values() for head in found):
        why = "it names the heads of the teacher that those of a layer were cut out of, in lists"
        raise BadInput(f"{where}: head_source is {shorten(heads)}", why, CORRECT)


def check_channels(name: str, values: Any, where: str) -> None:
    """Refuse anything but three finite numbers; deviations (`image_std`) must be above 0."""
    three = isinstance(values, Sequence) and len(values) == 3 and all(isinstance(value, int | float) for value in values)
    if not three or not all(abs(value) < HUGE and (value > 0 or name == "image_mean") for value in values):
        kind = "numbers above 0" if name == "image_std" else "finite numbers"
        raise BadInput(f"{where}: {name} is {shorten(values)}", f"there must be three {kind}, one a colour", CORRECT)


def check_id(name: str, value: Any, vocabulary: int, where: str) -> None:
    """Refuse a token id outside the vocabulary."""
    if not _whole(value, 0) or value >= vocabulary:
        raise BadInput(f"{where}: {name} is {shorten(value)}", f"the vocabulary has the ids 0 to {vocabulary - 1}", CORRECT)


def _whole(value: Any, least: int, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
