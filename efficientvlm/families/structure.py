"""How a configuration records which heads and neurons are still there: `kept`, group (`vision.3.neuron`) → ranges of original indices."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, TypeVar

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, NEURON, Flow

T = TypeVar("T")
DAMAGED = "restore config.json, or make the folder again"
USUAL_TEXT = 12


class Sizes(NamedTuple):
    """What batches must fit, and what a teacher and its student must share.

    `widths` are the columns of a tower's states by layer: of the input of each, and last of the output. `heads` are by tower and layer, and
    count what a layer had before anything was removed.
    """

    image_size: int
    patch_size: int
    max_positions: int
    vocab_size: int
    widths: dict[str, tuple[int, ...]]
    heads: dict[str, tuple[int, ...]]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    window: int | None = None
    """Tokens on a side of the windows that images are attended to in; None: every token sees all."""

    @property
    def usual_text(self) -> int:
        """Tokens of a text by which networks are counted and compared where nothing else is said; no more than are read."""
        return min(USUAL_TEXT, self.max_positions)

    def shapes(self, tower: str) -> dict[str, list[int]]:
        """The different widths and numbers of heads of `tower`, in their order: of most towers one each."""
        parts = {"width": self.widths[tower], "heads": self.heads[tower]}
        return {name: list(dict.fromkeys(values)) for name, values in parts.items()}


class Described(Protocol):
    """What the configuration of everything that can be asked answers, exported graphs too."""

    answers: list[str] | None
    rank_top: int
    max_tokens: int | None
    prompt: str | None
    caption_tokens: list[int] | None

    @property
    def rerank_by(self) -> str: ...
    @property
    def model_type(self) -> str: ...
    def abilities(self) -> frozenset[str]: ...
    def layers(self) -> dict[str, int]: ...
    def sizes(self) -> Sizes: ...


@dataclass(kw_only=True)
class Structure:
    """In front of a configuration class of transformers: what every family's configuration has besides its sizes.

    `kept` maps a group (`vision.3.neuron`) to the original indices still present, as ranges (`0-3,7`); groups not named are whole.
    `layer_source` maps a tower to the layers of the network this one was shrunk from, which had `layer_source_of` layers there.
    `head_source` maps a group to the heads of that network that its heads were cut out of, where it had more of them.
    `answers` is a closed list of answers, `rank_top` how many of them are ranked by their whole text. `max_tokens` is the length of texts
    that it was tuned with, by default that of the published method (`usual_tokens`), or all positions. `prompt` is what captions begin
    with, `caption_tokens` are the fewest and the most tokens of those that it writes, by default as in the published method.
    """

    image_mean: list[float] | tuple[float, ...] = CLIP_MEAN
    image_std: list[float] | tuple[float, ...] = CLIP_STD
    kept: dict[str, str] | None = None
    layer_source: dict[str, list[int]] | None = None
    layer_source_of: dict[str, int] | None = None
    head_source: dict[str, list[int]] | None = None
    answers: list[str] | None = None
    rank_top: int = 128
    max_tokens: int | None = None
    prompt: str | None = None
    caption_tokens: list[int] | None = None
    gains: ClassVar[frozenset[str]] = frozenset()
    """Abilities to which a network of another task comes by learning theirs."""
    processor: ClassVar[str] = "CLIPImageProcessor"
    """Class of transformers that reads a `preprocessor_config.json` which names none."""
    rerank_by: ClassVar[str] = "matching"
    """What orders the best candidates anew: the matching logit, or its `sum` with the cosine of the features."""
    together: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Towers whose layers are of one size."""
    usual_momentum: ClassVar[float] = 0.0
    """What the averages of a weight keep of themselves in a step, with which the family learns contrast as published; 0: it has none."""
    usual_losses: ClassVar[tuple[str, ...]] = ()
    """With which the family is pre-trained as published."""

    if TYPE_CHECKING:  # the class behind this one takes its own fields too
        model_type: ClassVar[str]

        def __init__(self, **fields: Any) -> None: ...

    def layers(self) -> dict[str, int]:
        """Layers of each tower."""
        raise NotImplementedError

    def learns(self) -> frozenset[str]:
        """The losses of pre-training that a network of this configuration has heads for."""
        return frozenset()

    @property
    def feature_width(self) -> int:
        """Columns of the features by which images and texts are compared; only of networks that do."""
        raise NotImplementedError

    def original_counts(self) -> dict[str, int]:
        """Units of every group (`tower.layer.kind`) before anything was removed, ordered by tower, layer, kind."""
        raise NotImplementedError

    def sizes(self) -> Sizes:
        """Sizes of the network."""
        raise NotImplementedError

    def flows(self) -> list[Flow]:
        """How every input gets to every output; what nothing flows into is an input, what flows into nothing an output."""
        raise NotImplementedError

    def abilities(self) -> frozenset[str]:
        """What a network of this configuration can do; see `network.ABILITIES`."""
        raise NotImplementedError

    def choose(self, tower: str, count: int | None = None) -> list[int]:
        """Which `count` layers of a tower a shallower network takes, half of them by default (one at least).

        Raises:
            BadInput: so many cannot be taken of it.
        """
        total = self.layers()[tower]
        return odd_layers(total, max(total // 2, min(total, 1)) if count is None else count)

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        """A copy that keeps the given layers of each tower, their structure included."""
        raise NotImplementedError

    def of_layers(self, layers: Mapping[str, list[int]], **changes: Any) -> Self:
        """What every family does in :meth:`with_layers`: what is left goes with its layer, and where that was is noted."""
        source = {tower: list(chosen) for tower, chosen in layers.items()}
        moved: dict[str, Any] = {"kept": kept_of_layers(self.kept, layers), "head_source": kept_of_layers(self.head_source, layers)}
        return self.copy(layer_source=source, layer_source_of=self.layers(), **moved, **changes)

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        """A copy whose towers have `sizes`, from which nothing was removed; of `fusion_layers` the last so many look across.

        Raises:
            BadInput: the family cannot be built so.
        """
        raise BadInput("this network keeps its width", f"no narrower {self.model_type} is made", "ask for fewer layers, or prune it")

    def with_depth(self, depth: Mapping[str, int]) -> Self:
        """A copy whose towers have `depth` layers, of which none is another network's.

        Raises:
            BadInput: the family cannot be built so.
        """
        if not depth:
            return self
        raise BadInput("this network keeps its depth", f"no deeper {self.model_type} is made", "ask for layers that its teacher has")

    def with_images(self, image_size: int | None, patch_size: int | None) -> Self:
        """A copy for images, and patches, of so many pixels on a side; None: as before.

        Raises:
            BadInput: the family cannot be built so, or patches do not fill such images.
        """
        if (image_size, patch_size) == (None, None):
            return self
        raise BadInput("this network keeps its images", f"no other patches are made for a {self.model_type}", "leave their sizes out")

    def layered(self, tower: str, layer: int) -> Layered:
        """What a layer of `tower` has; the states behind the last one are as wide as those in front of it."""
        raise NotImplementedError

    @property
    def stock_start(self) -> int | None:
        """Token in front of texts that transformers' class is given, which exchanges none; None: as the tokenizer has it."""
        return None

    @property
    def foreign(self) -> str:
        """What of this network transformers has no word for, other than what was removed; empty where nothing is known to be."""
        return ""

    @property
    def opened_by(self) -> tuple[str, str] | None:
        """`model_type` and class of transformers that builds this very network, where there is one."""
        return None

    def kept_indices(self) -> dict[str, list[int]]:
        """Original indices still present, for every group.

        Raises:
            BadInput: `kept` names a group or index that the sizes do not have.
        """
        return kept_indices(self.original_counts(), self.kept)

    def borrowed(self) -> dict[str, str]:
        """Group that a layer has no units of its own for → the group whose units it uses there."""
        return {}

    def with_kept(self, kept: Mapping[str, list[int]]) -> Self:
        """A copy whose groups hold exactly `kept`; groups not named stay as they are."""
        return self.copy(kept=kept_ranges(self.original_counts(), {**self.kept_indices(), **kept}))

    @property
    def usual_tokens(self) -> int | None:
        """Longest text of the published method, with its first and last token; None: as many as there are positions."""
        return None

    def adopt(self, tokenizer: Any) -> list[str]:
        """Take the token ids that the network looks for from its tokenizer; those that were others, with what they were.

        Here none: a family whose configuration decides.
        """
        return []

    def note_smoothing(self, smoothing: float) -> None:
        """Take down which part of a target all tokens share in the loss of texts. Here nothing: settings of stages say it."""

    def copy(self, **changes: Any) -> Self:
        """This configuration with some fields changed."""
        changed = copy.deepcopy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed


class Layered(NamedTuple):
    """What the layers of a tower have: columns, and heads and neurons before anything was removed."""

    width: int
    heads: int
    neurons: int


class Layerwise(Structure):
    """A configuration that says of each layer what it has."""

    crossing: ClassVar[tuple[str, ...]] = ()
    """Towers with cross-attention."""

    def crosses(self, tower: str, layer: int) -> bool:
        """Whether a layer of `tower` has cross-attention: all of a tower have it or none, unless a family has something else."""
        return tower in self.crossing

    def reads(self) -> tuple[int, int, int, int]:
        """Side of an image and of a patch in pixels, positions for tokens, tokens of the vocabulary."""
        raise NotImplementedError

    def original_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for tower, layers in self.layers().items():
            for layer in range(layers):
                _, heads, neurons = self.layered(tower, layer)
                counts[f"{tower}.{layer}.{HEAD}"] = heads
                if self.crosses(tower, layer):
                    counts[f"{tower}.{layer}.{CROSS_HEAD}"] = heads
                counts[f"{tower}.{layer}.{NEURON}"] = neurons
        return counts

    def sizes(self) -> Sizes:
        widths, heads = {}, {}
        for tower, layers in self.layers().items():
            each = [self.layered(tower, layer) for layer in range(max(layers, 1))]
            widths[tower] = tuple(one.width for one in each[:layers] + each[-1:])
            heads[tower] = tuple(one.heads for one in each[:layers])
        return Sizes(*self.reads(), widths, heads, tuple(self.image_mean), tuple(self.image_std))


class TwoParts(Layerwise):
    """In front of a configuration of transformers that has one for images and one for texts inside."""

    vision_config: Any
    text_config: Any

    def part(self, tower: str) -> Any:
        """transformers' configuration of `tower`: every tower but vision is of texts."""
        return self.vision_config if tower == "vision" else self.text_config

    def layered(self, tower: str, layer: int) -> Layered:
        part = self.part(tower)
        return Layered(part.hidden_size, part.num_attention_heads, part.intermediate_size)

    def reads(self) -> tuple[int, int, int, int]:
        vision, text = self.vision_config, self.text_config
        return vision.image_size, vision.patch_size, text.max_position_embeddings, text.vocab_size


def odd_layers(total: int, count: int) -> list[int]:
    """0-based source layers, the last of each of `count` blocks: 12 → 6 gives 1, 3, 5, 7, 9, 11 (EfficientVLM's layer choice)."""
    return [(i + 1) * total // count - 1 for i in range(count)]


def kept_indices(counts: Mapping[str, int], named: Mapping[str, str] | None) -> dict[str, list[int]]:
    """Original indices still present of every group of `counts`; groups that `named` leaves out are whole.

    Raises:
        BadInput: `named` has a group or index that the sizes do not have.
    """
    given = {} if named is None else named
    if not isinstance(given, Mapping):
        raise BadInput("config.json: kept is not a mapping of groups to ranges", repr(given)[:80], DAMAGED)
    if unknown := sorted(map(str, set(given) - set(counts))):
        raise BadInput("config.json: kept structure names unknown groups", ", ".join(unknown[:5]), DAMAGED)
    return {group: parse_ranges(given[group], count, group) if group in given else list(range(count)) for group, count in counts.items()}


def kept_ranges(counts: Mapping[str, int], kept: Mapping[str, list[int]]) -> dict[str, str] | None:
    """The `kept` entry of a configuration: groups that lost something, or None."""
    return {group: format_ranges(indices) for group, indices in kept.items() if len(indices) < counts[group]} or None


def kept_of_layers(named: Mapping[str, T] | None, layers: Mapping[str, list[int]]) -> dict[str, T] | None:
    """`kept`, or anything by group, of the network that has only `layers` (tower → old numbers in their new order)."""
    moved = {}
    for group, ranges in (named or {}).items():
        tower, number, kind = group.split(".")
        if int(number) in layers.get(tower, ()):
            moved[f"{tower}.{layers[tower].index(int(number))}.{kind}"] = ranges
    return moved or None


def parse_ranges(text: str, count: int, group: str) -> list[int]:
    """`"0-3,7"` as ascending indices below `count`; :class:`BadInput` if it is anything else."""
    indices: list[int] = []
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            if not 0 <= int(first) <= int(last or first) < count:  # before it is counted out
                raise BadInput(f"config.json: kept.{group} is not ascending within 0-{count - 1}", repr(text)[:80], DAMAGED)
            indices.extend(range(int(first), int(last or first) + 1))
    except (ValueError, AttributeError):
        raise BadInput(f"config.json: kept.{group} is not a list of ranges", repr(text)[:80], "write it as 0-3,7") from None
    if indices != sorted(set(indices)):
        raise BadInput(f"config.json: kept.{group} is not ascending within 0-{count - 1}", repr(text)[:80], DAMAGED)
    return indices


def format_ranges(indices: list[int]) -> str:
    """Ascending indices as `"0-3,7"`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
