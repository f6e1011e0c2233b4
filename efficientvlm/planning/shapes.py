"""Which students of other width have given shares of a network's parameters and multiply-adds, and by which rule shares are counted.

What a network has grows as a polynomial with its widths, neurons and layers. It is found by counting a few shallow networks, so that every
shape can be judged; those that are named are counted themselves. Source: ours, with the rules by which figures of DLIP are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from efficientvlm.compression.accounting import count_macs_of, count_parameters
from efficientvlm.errors import BadInput
from efficientvlm.families.network import ABILITIES
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.shrink import wanted

NETWORK, ENCODERS = "network", "encoders"
SHALLOW = 2
"""Layers at most of the networks that are counted to find the polynomials."""
EXACT, INDEPENDENT = 1e-9, 1e-6
"""How far, as a part, a network may be from what is expected of it; what of a row of terms has to be new, for its network to be counted."""


class Pass(NamedTuple):
    """Parts of a pass, what it is in words, and the abilities of networks that make it."""

    parts: tuple[str, ...]
    said: str
    abilities: tuple[str, ...]


PASSES = {
    "reranked": Pass(("image", "text", "match"), "an image, a text by itself, and the text with the image", ("match",)),
    "dual": Pass(("image", "text"), "an image, and a text by itself", ("embed",)),
    "fused": Pass(("image", "match"), "an image, and a text with the image", ("match",)),
    "caption": Pass(("caption",), "an image, and its text as the decoder reads it", ("caption",)),
    "answer": Pass(("answer",), "an image, a question with the image, and one token of an answer", ("answer",)),
    "all": Pass(
        ("image", "text", "match", "caption"),
        "an image, a text by itself, with the image, and as the decoder reads it",
        ("match", "caption"),
    ),
}
"""Passes whose multiply-adds are counted; the first one that a network can make is what it is judged by, unless another is asked for."""


@dataclass(frozen=True)
class Rule:
    """How shares are counted.

    `of` is `network`, where a network's own parameters are compared, `encoders`, where those of its image and text encoders are, or a
    number of parameters with which the student's encoders are compared. `image_size` is the side of an image in pixels.
    """

    pass_name: str
    image_size: int
    text_length: int
    of: str | float = NETWORK

    def said(self, whole: Counts) -> dict[str, str]:
        """In words, for parameters and for multiply-adds, each with what stands for 100 %."""
        part = "all of the network" if self.of == NETWORK else "of image and text encoder"
        told = "the teacher's" if isinstance(self.of, str) else "a given number,"
        size = f"{self.image_size} px and {self.text_length} tokens"
        return {
            "parameters": f"{part}, each tensor once, of {told} {self.all_parameters(whole.parameters):,.0f}",
            "macs": f"pass {self.pass_name} ({PASSES[self.pass_name].said}) at {size}, batch 1, in the towers, of {whole.macs:,}",
        }

    def all_parameters(self, of_teacher: int) -> float:
        """What stands for 100 %."""
        return of_teacher if isinstance(self.of, str) else self.of


class Counts(NamedTuple):
    """Parameters and multiply-adds of a network, by a rule."""

    parameters: int
    macs: int


class Found(NamedTuple):
    """A student: the settings of `evlm shrink` that make it, what it has, its shares, and whether transformers' class builds it."""

    settings: dict[str, Any]
    counts: Counts
    parameters: float
    macs: float
    stock: bool


def rule_for(model: Any, pass_name: str | None = None, text_length: int | None = None, of: str | float = NETWORK) -> Rule:
    """The rule for `model`, at the size of its own images; tokens are 30 by default, or as many as it has positions for.

    Raises:
        BadInput: it does not make such a pass, has no encoders of its own, or has no place for such texts.
    """
    able, sizes = model.config.abilities(), model.config.sizes()
    there = [name for name, row in PASSES.items() if {*row.abilities} <= able]
    if not there or (pass_name is not None and pass_name not in there):
        asked = f"no pass {pass_name}" if pass_name else "no pass whose multiply-adds are counted"
        fix = f"use {' or '.join(there)}" if there else f"use a model that can {ABILITIES['match'][0]}"
        raise BadInput(f"{asked} in this network", f"it is a {model.config.model_type}, which makes {', '.join(there) or 'none'}", fix)
    if text_length is not None and text_length > sizes.max_positions:
        why = f"it has {sizes.max_positions} positions for tokens"
        raise BadInput(f"texts of {text_length} tokens", why, f"use at most {sizes.max_positions}")
    if of != NETWORK and not model.config.layers().get("text"):
        why = f"it has {', '.join(tower for tower, count in model.config.layers().items() if count)}"
        raise BadInput("parameters of encoders in a network without a text encoder", why, f"count of {NETWORK}")
    return Rule(pass_name or there[0], sizes.image_size, text_length or min(30, sizes.max_positions), of)


def count(model: Any, rule: Rule) -> Counts:
    """What `model`, on the meta device or not, has by `rule`."""
    return Counts(parameters_of(model, rule), macs_of(model, rule))


def parameters_of(model: Any, rule: Rule) -> int:
    """Parameters of the whole network or of its encoders, each tensor once."""
    parameters = count_parameters(model)
    if rule.of == NETWORK:
        return int(parameters["total"])
    return sum(number for tower, number in parameters["by_tower"].items() if tower in ("vision", "text", "fusion"))


def macs_of(model: Any, rule: Rule) -> int:
    """Multiply-adds of the pass of `rule`, of matrix products and convolutions in the towers; projections and small heads do not count."""
    device, side, length = next(model.parameters()).device, model.config.sizes().image_size, rule.text_length
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    ids, rows = torch.ones(1, length, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)

    mask, states = torch.ones_like(ids), dict[str, torch.Tensor]()

    def image() -> None:
        states["image"] = model.embed_images(pixels)[0]

    def text() -> None:
        states["text"] = model.embed_texts(ids, mask)[0]

    acts: dict[str, Callable[[], object]] = {
        "image": image,
        "text": text,
        "match": lambda: model.match(states["image"], rows, states["text"], mask),
        "caption": lambda: model.decode(model.look(pixels), ids, mask),
        "answer": lambda: model.run(model.example(1, length, device)),
    }
    parts = list(PASSES[rule.pass_name].parts)
    if "match" in parts and "text" not in parts:
        with torch.no_grad():
            text()
        if states["text"].is_floating_point():  # matched are states of the text, for which it is read by itself
            parts.insert(1, "text")
    total = 0
    for part in parts:
        left_out = ("heads", "vision") if part == "caption" and "image" in parts else ("heads",)
        total += sum(macs for tower, macs in count_macs_of(model, acts[part]).items() if tower not in left_out)
    return total


def shares(teacher: Any, student: Any, rule: Rule) -> tuple[Counts, float, float]:
    """What `student` has by `rule`, and its shares of the teacher's parameters and multiply-adds."""
    whole, own = count(teacher, rule), count(student, rule)
    return own, own.parameters / rule.all_parameters(whole.parameters), own.macs / whole.macs


def search(
    teacher: Any, rule: Rule, parameters: float, macs: float, tolerance: float = 0.005, top: int = 20, *, equal: bool = False
) -> tuple[int, list[Found], Counts]:
    """Students of `teacher` with shares of `parameters` and `macs` within `tolerance`: how many there are, and the `top` nearest ones.

    Widths are whole numbers of the teacher's heads, images have its ratio of neurons to columns, texts that, half or twice of it. With
    `equal` images are as wide as texts. The nearest shape of all is given where none is within the tolerance. Last what the teacher has.

    Raises:
        BadInput: the family has no students of other width.
    """
    space = Space.of(teacher.config, equal)
    whole = count(teacher, rule)
    exact = {place: space.count(teacher, space.grid[place], rule) for place in space.samples()}
    guess = [_carried(space.grid, {place: found[kind] for place, found in exact.items()}) for kind in range(2)]
    share = np.stack([guess[0] / rule.all_parameters(whole.parameters), guess[1] / whole.macs])
    away = np.abs(share - np.array([[parameters], [macs]])).max(axis=0)
    order = np.argsort(away, kind="stable")
    within = int((away <= tolerance).sum())
    found = [space.found(teacher, place, rule, whole, guess) for place in order[: min(top, within) if within else 1]]
    return within, found, whole


@dataclass(frozen=True)
class Space:
    """All shapes: a row of `grid` is width, layers and neurons of images, the same of texts, and layers that fuse.

    `fusing` is `tower` where the layers that fuse are a tower of their own, `layers` where they are some of the text's, empty without.
    """

    config: Any
    grid: np.ndarray
    fusing: str

    @classmethod
    def of(cls, config: Any, equal: bool) -> Space:
        """:class:`BadInput` where the family's width is fixed."""
        depth = {tower: layers for tower, layers in config.layers().items() if layers}
        if config.kept:
            why = "what it has left differs from layer to layer, so that not every shape can be cut out of it"
            raise BadInput("shapes of a network that was pruned", why, "use the one that it was pruned from")
        config.with_sizes({})  # refuses a family that keeps its width
        first = next(tower for tower in ("text", "decoder", "fusion") if tower in depth)
        text, ratio = config.layered(first, 0), config.layered(first, 0).neurons / config.layered(first, 0).width
        fusing = "tower" if "fusion" in depth else "layers" if any(config.crosses(first, layer) for layer in range(depth[first])) else ""
        most = depth.get("fusion", 0)
        texts = [
            (width, layers, neurons, fusion)
            for width in _multiples(text.width, text.width // text.heads)
            for neurons in sorted({int(width * ratio * part) for part in (0.5, 1, 2)})
            if 1 <= neurons <= text.neurons
            for layers in range(1, depth[first] + 1)
            for fusion in range(1, (most if fusing == "tower" else layers) + 1)
            if fusing or fusion == 1
        ]
        images = list(_images(config, depth["vision"]))
        rows = [(*image, *words) for image, words in product(images, texts) if not equal or image[0] == words[0]]
        if not rows:
            raise BadInput("no width that images and texts share", "their heads differ in size", "leave out --equal-widths")
        return cls(config, np.array(rows, dtype=np.int64), fusing)

    def samples(self) -> list[int]:
        """Places of shallow networks, which are quickly counted, from whose numbers those of all others follow; the same ones each time."""
        shallow = np.flatnonzero((self.grid[:, [1, 4, 6]] <= SHALLOW).all(axis=1))
        left = np.stack([*_terms(self.grid[shallow])], axis=1)
        left /= np.abs(left).max(axis=0)
        chosen = []
        for _ in range(left.shape[1]):
            lengths = np.linalg.norm(left, axis=1)
            furthest = int(lengths.argmax())
            if lengths[furthest] < INDEPENDENT:
                break
            chosen.append(int(shallow[furthest]))
            direction = left[furthest] / lengths[furthest]
            left -= np.outer(left @ direction, direction)
        return sorted(chosen)

    def settings(self, row: np.ndarray) -> dict[str, Any]:
        """Those of `evlm shrink` for a row of the grid."""
        width, layers, neurons, text_width, text_layers, text_neurons, fusion = map(int, row)
        chosen: dict[str, dict[str, int]] = {"layers": {}, "width": {}, "neurons": {}}
        for tower, depth in self.config.layers().items():
            if not depth:
                continue
            images = tower == "vision"
            own = self.fusing == "tower" and tower in ("fusion", "decoder")
            chosen["layers"][tower] = layers if images else min(depth, fusion if own else text_layers)
            chosen["width"][tower], chosen["neurons"][tower] = (width, neurons) if images else (text_width, text_neurons)
        if _fixed(self.config):
            del chosen["width"]["vision"], chosen["neurons"]["vision"]
            chosen["layers"]["vision"] = self.config.layers()["vision"]
        return {**chosen, **({"fusion_layers": fusion} if self.fusing == "layers" else {})}

    def student(self, teacher: Any, row: np.ndarray) -> Any:
        """The network of a row, on the meta device."""
        layers, sizes, fusion, depth = wanted(Shrink(model="-", out="-", **self.settings(row)), self.config)
        with torch.device("meta"):
            return type(teacher)(self.config.with_layers(layers).with_sizes(sizes, fusion).with_depth(depth)).eval()

    def count(self, teacher: Any, row: np.ndarray, rule: Rule) -> Counts:
        return count(self.student(teacher, row), rule)

    def found(self, teacher: Any, place: int, rule: Rule, whole: Counts, guess: list[np.ndarray]) -> Found:
        """The student at `place`, counted; what was expected of it is compared with that."""
        student = self.student(teacher, self.grid[place])
        own = count(student, rule)
        for number, expected in zip(own, (float(values[place]) for values in guess), strict=True):
            if abs(number - expected) > max(10.0, EXACT * number):
                why = "its parameters or multiply-adds do not grow as its widths, neurons and layers do"
                raise BadInput("students of this network cannot be searched", why, "try sizes with evlm shrink --dry-run")
        stock = student.config.opened_by is not None
        share = own.parameters / rule.all_parameters(whole.parameters)
        return Found(self.settings(self.grid[place]), own, share, own.macs / whole.macs, stock)


def _multiples(most: int, step: int) -> range:
    return range(step, most + 1, step)


def _fixed(config: Any) -> bool:
    """Whether the layers of images differ in width, so that nothing of them is changed."""
    return len({config.layered("vision", layer) for layer in range(config.layers()["vision"])}) > 1


def _images(config: Any, depth: int) -> Iterator[tuple[int, int, int]]:
    size = config.layered("vision", 0)
    if _fixed(config):
        yield size.width, depth, size.neurons
        return
    for width in _multiples(size.width, size.width // size.heads):
        for layers in range(1, depth + 1):
            yield width, layers, size.neurons * width // size.width


def _terms(grid: np.ndarray) -> Iterator[np.ndarray]:
    """What parameters and multiply-adds are sums of, times constants: products of widths and neurons, each by layers too."""
    a, images, f, b, texts, g, fusing = grid.astype(np.float64).T
    yield from (np.ones_like(a), a, a * a, b, b * b, a * b, g, b * g)
    yield from (images * term for term in (a, a * a, f, a * f))
    yield from (texts * term for term in (b, b * b, g, b * g))
    yield from (fusing * term for term in (a, b, b * b, a * b, g, b * g))


def _carried(grid: np.ndarray, exact: Mapping[int, int]) -> np.ndarray:
    """What every row of `grid` has, from the numbers of some of its rows."""
    places = list(exact)
    known = np.stack([*_terms(grid[places])], axis=1)
    scale = np.abs(known).max(axis=0)
    factors, *_ = np.linalg.lstsq(known / scale, np.array([float(exact[place]) for place in places]), rcond=None)
    total = np.zeros(len(grid))
    for term, factor in zip(_terms(grid), factors / scale, strict=True):
        total += factor * term
    return total
