"""Embeddings of images and of sentences that are no pairs, as student and teacher make them of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.network import Record
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.teachers import StoredTeacher
from efficientvlm.runtime.exchange import Rows

EMBEDDED = "embedded"


class Embedded(NamedTuple):
    """Unit vectors of the images [I, E] and of the sentences [T, E] of this process; `images` and `texts` are their places among those of
    all processes. Of sentences a student whose tower of texts is the teacher's, and stays so, says nothing (None), and neither does a
    teacher where none is compared."""

    image: Tensor
    text: Tensor | None
    images: Rows
    texts: Rows


class Unpaired(Objective):
    """No losses of its own: it has a student embed images and, where `learn_texts`, sentences, for a method to compare with a teacher's.

    Use it with `objectives.dime_fm.distilled`. Images and sentences are drawn independently of one another, and may differ in number.

    Inputs of `forward`: pixels [I, 3, H, W]; text_ids and text_mask [T, L] where a network reads sentences; `image_ids` and `sentence_ids`,
    lists of strings. Recorded is `embedded`, an :class:`Embedded`.

    Source: DIME-FM (Sun et al. 2023).

    Example: `Unpaired(student).passes(student, batch, step=0).record["embedded"].image`
    """

    outputs = frozenset({EMBEDDED})

    def __init__(self, model: Any, *, learn_texts: bool = False) -> None:
        super().__init__()
        self.model, self.learn_texts = model, learn_texts

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """What is `drawn` are the places of images and sentences among those of all processes."""
        places = drawn or (Rows(len(batch["image_ids"])), Rows(len(batch["sentence_ids"])))
        image = model.embed_images(batch["pixels"])[1]
        text = model.embed_texts(batch["text_ids"], batch["text_mask"])[1] if self.learn_texts else None
        return Pass({}, Record({EMBEDDED: Embedded(image, text, *places)}), places)


class EmbeddingTeacher:
    """What a teacher says of the images and the sentences of a batch: a network that looks at what the student is shown.

    Pictures that it reads at another size are resized as the student's view of them is; texts have the student's tokens. What is `stored`
    is looked up instead, and then of the whole picture, whatever the student is shown of it.
    """

    def __init__(self, model: Any, stored: StoredTeacher | None = None, *, reads: bool = True) -> None:
        """`model` may be None where images and sentences are both `stored`; `reads`: whether it says anything of a batch's sentences."""
        self.reads = reads
        self.model, self.stored = model and model.eval().requires_grad_(False), stored or StoredTeacher()

    def images(self, batch: dict[str, Any]) -> Tensor:
        """Unit vectors [I, E]."""
        if (known := self.stored.look_up(batch, "image_ids", batch["pixels"].device)) is not None:
            return known
        vectors: Tensor = self.model.embed_images(seen_at(batch["pixels"], self.model.config.sizes().image_size))[1]
        return vectors

    def sentences(self, batch: dict[str, Any]) -> Tensor:
        """Unit vectors [T, E]."""
        if (known := self.stored.look_up(batch, "sentence_ids", batch["text_ids"].device)) is not None:
            return known
        vectors: Tensor = self.model.embed_texts(batch["text_ids"], batch["text_mask"])[1]
        return vectors

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        return Record({EMBEDDED: Embedded(self.images(batch), self.sentences(batch) if self.reads else None, *drawn)})


def seen_at(pixels: Tensor, side: int) -> Tensor:
    """Images [I, 3, H, W] of whole numbers at `side` pixels."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    larger = F.interpolate(pixels.float(), (side, side), mode="bicubic", align_corners=False, antialias=True)
    return larger.round().clamp(0, 255).to(pixels.dtype)


def first_of(vectors: Tensor, width: int) -> Tensor:
    """The first `width` numbers of every vector, as unit vectors again."""
    return vectors if width == vectors.shape[-1] else F.normalize(vectors[..., :width], dim=-1)


def width_of(model: Any) -> int:
    """How long the vectors of a network are, here of shapes."""
    with torch.no_grad():
        batch = model.example(1, 3, device=model.device)
        return int(model.embed_images(batch["pixels"])[1].shape[-1])


def learnt_by_images(model: Any) -> frozenset[str]:
    """Names of the parameters on which the vectors of images depend, found by a pass on shapes."""
    return _depending(model, lambda batch: model.embed_images(batch["pixels"])[1])


def learnt_by_texts(model: Any) -> frozenset[str]:
    """Names of the parameters on which the vectors of texts depend, found likewise."""
    return _depending(model, lambda batch: model.embed_texts(*_texts_of(batch))[1])


def _texts_of(example: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and mask of the texts of an example, which are questions where a network may answer too."""
    kind = "text" if "text_ids" in example else "question"
    return example[f"{kind}_ids"], example[f"{kind}_mask"]


def _depending(model: Any, embed: Any) -> frozenset[str]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        vectors = embed(model.example(2, 3, device=model.device))
        found = torch.autograd.grad(vectors.sum(), list(named.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(named, found, strict=True) if gradient is not None)
