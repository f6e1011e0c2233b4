"""What networks tell the rest of the toolkit, and what each can do beyond that, each ability a protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import Unit
from efficientvlm.families.structure import Described, Structure

LAYER = re.compile(r"(?<=attention)\.\d+$")


class Record(dict[str, Any]):
    """What a forward pass was asked to keep, by tap name `tower.kind` or `tower.kind@pass`."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(f"the forward pass recorded no {key!r}; it has {sorted(self)}")


class Graph(NamedTuple):
    """A part of a network that runs by itself, for export.

    `module` takes a mapping of input names to tensors and returns a tuple of tensors, called `outputs`. `example` makes inputs for given
    sizes of the dynamic `axes` (input or output → dimension → axis name); `sizes` are those to export with, first, and those to check with.
    """

    name: str
    module: Any
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    sizes: tuple[dict[str, int], ...]
    example: Callable[[Mapping[str, int]], dict[str, Any]]


class Askable(Protocol):
    """What answers a batch: a network, or exported graphs.

    What it can do beyond that says `config.abilities()`, each ability of a protocol below.
    """

    @property
    def config(self) -> Described: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def taps(self) -> frozenset[str]:
        """What a pass can keep, as `tower.kind`."""

    def to(self, device: Any) -> Self: ...
    def eval(self) -> Self: ...

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """A task's batch; the record holds `logits`-like outputs and every tap in `want`."""

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        """A task's batch of the stated size for counting and timing (text tokens are never padding)."""

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[Any, list[str]]:
        """This network made able to do `ability`, and the names of its tensors that are new.

        Args:
            donor: a network that is able, or None.
            decoder_init: `auto`, `teacher` or `fusion`, where a new answer decoder comes from.

        Raises:
            BadInput: it cannot be made able.
        """


class Network(Askable, Protocol):
    """What every network answers; a family's are in its folder, and are modules of torch as well."""

    @property
    def config(self) -> Structure: ...

    def units(self) -> list[Unit]:
        """Every removable unit that is present, ordered by tower, layer, kind, index."""

    def tower_of(self, parameter: str) -> str:
        """The tower a state-dict name is counted under, or `heads`."""

    def is_embedding(self, parameter: str) -> bool:
        """Whether a state-dict name is a token, position or type embedding table."""

    def source_name(self, parameter: str, layers: dict[str, list[int]]) -> str:
        """Name in the larger network of the tensor that initialises `parameter` of the network with `layers`."""


class Resizes(Protocol):
    """What is trained with images of another size than it read before."""

    def resized(self, image_size: int) -> Self:
        """This network for images of `image_size` pixels on a side; :class:`BadInput` where that cannot be."""


class Exports(Protocol):
    """Whose parts can be written as graphs."""

    def graphs(self) -> list[Graph]:
        """The few graphs that the network's task needs, in the order in which they run.

        Raises:
            BadInput: nothing is made of a network of this kind.
        """


class Embeds(Askable, Protocol):
    """`embed`: images and texts are compared by their features."""

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] to states [B, T, W] and unit vectors [B, E]. What of the states is projected says `pooled_image`, of networks
        whose states are at hand."""

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, L] to states [B, L, W] and unit vectors [B, E]."""


class Aligns(Embeds, Protocol):
    """`align`: trained by contrast alone, of the features of pairs."""

    def similarity(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits [I, T] of unit vectors [I, E] and [T, E]."""

    def loss(self, logits: Tensor, same: Tensor | None = None) -> Tensor:
        """Of logits [B, B]; `same` [B, B] is True where image and text belong together, by default those of one pair."""

    def limit_scale(self) -> None:
        """Keep the factor of similarities where training keeps it, behind an update."""


class Averages(Embeds, Protocol):
    """Whose features are learnt, and compared with those of its averaged weights."""

    def feature_parameters(self) -> frozenset[str]:
        """Names of the parameters on which the features of images and texts depend."""


class Matches(Embeds, Protocol):
    """`match`: whether a text belongs to an image."""

    def match(self, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        """Matching logits [P, 2] (no, yes) of text states [P, L, W] with image states [I, T, W]; `rows` [P] names the image of each."""


class Compares(Askable, Protocol):
    """`compare`: whether a text about two images is true.

    :meth:`run` takes a `data.kinds.statements.statement_batch` and records `logits` [S, 2] of false and true. `assign`, of which of two
    images a text is, is learnt for its sake.
    """


class Writes(Askable, Protocol):
    """What writes a text, token by token."""

    def decode(self, context: Any, ids: Tensor, mask: Tensor | None, rows: Tensor | None = None, cache: Any | None = None) -> Tensor:
        """Next-token logits [B, L, V] of the beginnings `ids` [B, L] of texts; with a `cache`, `ids` are what follows the tokens in it.

        `rows` [B] names the entry of the context that each belongs to, in order by default. Token ids start with the tokenizer's [CLS]
        whatever the family; one that starts its texts otherwise exchanges it here.
        """

    def new_cache(self) -> Any:
        """An empty key/value cache for :meth:`decode`, with `select(rows)` and `length`."""


class Generates(Writes, Protocol):
    """`answer`: a text is written about an image and a question."""

    def encode(self, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, Any]:
        """Images and questions of a `vqa_batch`; the context has one entry a question. Questions start as :meth:`decode` says of texts."""


class Describes(Writes, Protocol):
    """`caption`: a text is written about an image."""

    def look(self, pixels: Tensor) -> Any:
        """Images [I, 3, H, W] to the context of their captions, one entry an image."""


class Grounds(Askable, Protocol):
    """`ground`: where in an image lies what a phrase means."""

    def ground(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """`boxes` [Q, 4] (centre, width, height as fractions of the image) and every tap in `want`.

        `batch` has pixels [I, 3, H, W], question_ids and question_mask [Q, L], and as image_index [Q] the image of each phrase.
        """


def kinds_of(wanted: frozenset[str], tower: str) -> frozenset[str]:
    """What `wanted` asks of `tower`, in any pass: hidden, self_attention, cross_attention, or one layer's as `self_attention.3`."""
    return frozenset(tap.partition("@")[0].partition(".")[2] for tap in wanted if tap.startswith(tower + "."))


ABILITIES = {
    "embed": ("compare images with texts by their features", "an X-VLM, CLIP, SigLIP, dual encoder or BLIP"),
    "align": ("be trained on pairs by contrast alone", "a CLIP, SigLIP or dual encoder"),
    "match": ("match images with texts", "an X-VLM or BLIP"),
    "answer": ("answer questions", "an X-VLM or BLIP"),
    "caption": ("describe images", "an X-VLM or BLIP"),
    "compare": ("compare two images with a text", "an X-VLM or BLIP"),
    "assign": ("say which of two images a text belongs to", "an X-VLM"),
    "ground": ("find what a phrase means", "an X-VLM"),
    "pretrain": ("be pre-trained", "an X-VLM or BLIP"),
    "contrast": ("be trained with BLIP's losses", "a BLIP"),
}
"""What a network may be able to do, and which families have networks that are."""


def refusal(config: Described, ability: str, who: str = "this model", why: str = "", fix: str = "") -> BadInput:
    """What to say of a network of `config` that lacks `ability`: by default what it can do instead, and which families are able."""
    what, families = ABILITIES[ability]
    able = ", ".join(said for name, (said, _) in ABILITIES.items() if name in config.abilities())
    instead = f"it can {able}" if able else "nothing that it is for is known"
    return BadInput(f"{who} cannot {what}", why or f"{instead} ({config.model_type})", fix or f"use {families}, in a form that can")


def require(network: Askable, ability: str) -> None:
    """:func:`refusal` is raised unless `network` has `ability`."""
    if ability not in network.config.abilities():
        raise refusal(network.config, ability)


def check_taps(network: Askable, want: Iterable[str]) -> frozenset[str]:
    """`want` as a set, or :class:`BadInput` naming the taps that `network` does not have.

    A map is asked for by its tap, of all layers, or by layer: `vision.self_attention.3`.
    """
    wanted = frozenset(want)
    unknown = sorted(tap for tap in wanted if LAYER.sub("", tap.partition("@")[0]) not in network.taps)
    if unknown:
        why = f"this network has {', '.join(sorted(network.taps))}" if network.taps else "it keeps nothing for distillation"
        raise BadInput(f"no such tap: {', '.join(unknown)}", why, "use one of these" if network.taps else "use the checkpoint itself")
    return wanted
