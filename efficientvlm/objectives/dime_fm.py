"""The method of DIME-FM (Sun et al. 2023): a small image tower lands in its teacher's space, from images and sentences without pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.embedding import EMBEDDED, Embedded, EmbeddingTeacher, first_of, learnt_by_texts, width_of
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.terms import Pairing, Term
from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows


class Compared(NamedTuple):
    """Unit vectors of images [I, E] and sentences [T, E]; `images` and `texts` are their places among those of all processes, or of this
    one as if there were no other. `text` is None where no sentence is compared; `reads` says whether the sentences are what a network
    itself says of them, and learns."""

    image: Tensor
    text: Tensor | None
    images: Rows
    texts: Rows
    reads: bool

    def first(self, width: int) -> Compared:
        """The first `width` numbers of every vector, as unit vectors again."""
        return self._replace(image=first_of(self.image, width), text=None if self.text is None else first_of(self.text, width))

    def similarities(self, scale: float) -> tuple[Tensor, Tensor]:
        """Of this process's images with all sentences, and of its sentences with all images, multiplied by `scale`."""
        assert self.text is not None
        return scale * self.image @ self.texts.gather(self.text).T, scale * self.text @ self.images.gather(self.image).T


Formula = Callable[[Compared, Compared, Compared, float], Tensor]
"""Of the student's vectors, the teacher's of equal width, the teacher's of full width, and what cosines are multiplied by."""


def kl(ours: Tensor, theirs: Tensor, rows: Rows) -> Tensor:
    """KL(theirs ‖ ours) of the distributions over the last axis of logits [N, C], a mean over the rows of all processes, or of this one."""
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True) / _share(rows, len(ours))


def _share(rows: Rows, count: int) -> float | Tensor:
    """What a sum over `count` rows of this process is divided by."""
    share: float | Tensor = max(1, count) if len(rows.counts) == 1 else ranks.share_of(count)
    return share


def vision_language(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """L_vl: the similarities of every image with every sentence, as a distribution over sentences and as one over images, summed."""
    sides = zip(ours.similarities(scale), theirs.similarities(scale), (ours.images, ours.texts), strict=True)
    return torch.stack([kl(a, b, rows) for a, b, rows in sides]).sum()


def pseudo_vision_language(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """L_p-vl: the teacher's images in the place of sentences, itself included; twice, as L_vl has two directions."""
    among = scale * theirs.image @ theirs.images.gather(theirs.image).T
    return 2 * kl(scale * ours.image @ alike.images.gather(alike.image).T, among, ours.images)


def image_distances(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """L_udist: the similarities of images with images, within each network; twice, as L_vl has two directions."""
    among = scale * theirs.image @ theirs.images.gather(theirs.image).T
    return 2 * kl(scale * ours.image @ ours.images.gather(ours.image).T, among, ours.images)


def feature_mse(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """Squared error of unit vectors, a mean over their numbers, of images and, where sentences are learnt, of these (CLIP-KD's FD)."""
    return torch.stack([_mean((a - b).square(), rows) for a, b, rows in _sides(ours, alike)]).sum()


def cosines(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """1 - cosine with the teacher's vector, a mean over images and, where sentences are learnt, over these, summed."""
    return torch.stack([_mean(1 - (a * b).sum(-1), rows) for a, b, rows in _sides(ours, alike)]).sum()


def interactive_contrast(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """Cross-entropy of finding among the teacher's vectors that of the same sample, a mean over images and, where learnt, sentences.

    CLIP-KD's ICL contrasts a student's image with the teacher's texts and the other way round, by pairs, which there are none of here. So
    an image is contrasted with the teacher's images, a sentence with its sentences (ours); the scale is fixed.
    """
    losses = []
    for a, b, rows in _sides(ours, alike):
        right = torch.arange(len(a), device=a.device) + rows.start
        losses.append(F.cross_entropy(scale * a @ rows.gather(b).T, right, reduction="sum") / _share(rows, len(a)))
    return torch.stack(losses).mean()


def affinity_mimicking(ours: Compared, alike: Compared, theirs: Compared, scale: float) -> Tensor:
    """Cross-entropy of the teacher's similarities and the student's, the mean of both directions (TinyCLIP)."""
    sides = zip(ours.similarities(scale), theirs.similarities(scale), (ours.images, ours.texts), strict=True)
    each = [-(b.softmax(-1) * a.log_softmax(-1)).sum() / _share(rows, len(a)) for a, b, rows in sides]
    return torch.stack(each).mean()


def _sides(ours: Compared, theirs: Compared) -> list[tuple[Tensor, Tensor, Rows]]:
    """What is learnt, the teacher's of the same samples, and their places: images, and sentences that the student reads itself."""
    images = [(ours.image, theirs.image, ours.images)]
    if not ours.reads:
        return images
    assert ours.text is not None and theirs.text is not None
    return [*images, (ours.text, theirs.text, ours.texts)]


def _mean(values: Tensor, rows: Rows) -> Tensor:
    return values.sum() / _share(rows, values.numel())


FORMULAS: dict[str, Formula] = {
    "vl": vision_language,
    "pvl": pseudo_vision_language,
    "udist": image_distances,
    "feature_mse": feature_mse,
    "cosine": cosines,
    "interactive": interactive_contrast,
    "affinity": affinity_mimicking,
}
"""Weight → its term."""


def needs(student: Loaded, teacher: Loaded, settings: Any) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot teach `student` as `settings` say.

    Layers, widths, patches, image sizes and families may differ. Vectors are as long, or the student's are among the `widths`; both read
    the same tokens; and where texts are not learnt, the student has the teacher's tower of texts.
    """
    if "embed" not in student.abilities & teacher.abilities:
        return  # the task says so
    ours, theirs = width_of(student.model), width_of(teacher.model)
    yield from unfit(ours, theirs, f"teacher {teacher.path}", settings)
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        fix = "make the student with the teacher's tower of texts"
        yield BadInput("teacher and student have different tokenizers", f"{teacher.path} and {student.path}", fix)
    elif not settings.learn_texts:
        mine, other = (_shapes_of_texts(loaded.model) for loaded in (student, teacher))
        if ours == theirs and sorted(mine.values()) != sorted(other.values()):
            why = f"{student.path} has a tower of texts of its own, which is not learnt"
            fix = "shrink vision alone (layers, width, ... of vision), or learn texts too: --set learn_texts=true"
            yield BadInput("the student does not read sentences as its teacher does", why, fix)


def unfit(ours: int, theirs: int, whose: str, settings: Any) -> Iterator[BadInput]:
    """Where vectors of `ours` numbers cannot be compared with those of `theirs`, which are those of `whose`."""
    lengths = f"vectors of {whose} have {theirs} numbers, those of the student {ours}"
    if ours > theirs or (ours < theirs and ours not in settings.widths):
        more = f", or compare the first of them: --set widths=[{ours}]" if ours < theirs else ""
        yield BadInput("teacher and student embed in different spaces", lengths, f"use a student with {theirs}{more}")
    elif wide := [width for width in settings.widths if width > ours]:
        yield BadInput(f"widths {', '.join(map(str, wide))}", lengths, f"use at most {ours}")


def _shapes_of_texts(model: Any) -> dict[str, tuple[int, ...]]:
    learnt = learnt_by_texts(model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in learnt}


def distilled(hard: Any, teacher: Any, settings: Any) -> Objective:
    """The terms of DIME-FM, of a task that has images and sentences embedded: L = Σ weight · term.

    Use it to make a small image tower for a large CLIP's space of images and texts, of pictures and sentences that are no pairs.

    Args:
        hard: `objectives.embedding.Unpaired` of the student.
        teacher: a network that embeds, or an `EmbeddingTeacher`, which may look up what it says in stores.
        settings: weights, temperatures, scale, widths, quirks.

    Inputs and outputs are those of `objectives.distillation.Distilled`: every term is reported, weighed, as `kd_` and its name.

    Sources: DIME-FM (Sun et al. 2023) and its published code for L_vl, L_p-vl and L_udist; there each process compares its own part of a
    batch alone (`quirks.own_batch`), here the batch of all processes is one. CLIP-KD (Yang et al. 2024) for `feature_mse` and, changed for
    want of pairs, `interactive`; TinyCLIP (Wu et al. 2023) for `affinity`; Matryoshka (Kusupati et al. 2022) for `widths`.

    Example: `distilled(Unpaired(student), teacher, settings)(batch, step=0)["loss"].backward()`
    """
    common: dict[str, Any] = {"weights": dict(settings.weights), "maps": {}, "hard_weight": 0.0, "each": True}
    says = teacher if isinstance(teacher, EmbeddingTeacher) else EmbeddingTeacher(teacher)
    return Distilled(hard, says, rows_of(settings), kd=1.0, **common)


def rows_of(settings: Any) -> tuple[Term, ...]:
    """The terms as rows: all compare what student and teacher record as `embedded`."""
    scales = {name: settings.scale / temperature for name, temperature in settings.temperatures}
    common: dict[str, Any] = {"widths": tuple(settings.widths), "own": settings.quirks.own_batch}
    return tuple(
        Term(name, EMBEDDED, partial(at_widths, formula=formula, scale=scales.get(name, settings.scale), **common))
        for name, formula in FORMULAS.items()
    )


def at_widths(
    ours: Embedded, theirs: Embedded, term: Term, pairing: Pairing, *, formula: Formula, scale: float, widths: Sequence[int], own: bool
) -> Tensor:
    """`formula` of whole vectors and of their first `widths` numbers, a mean over all of these widths.

    Where whole vectors of the student are shorter than the teacher's, they are compared with the first of the teacher's numbers. What is a
    distribution is always compared with that of the teacher's whole vectors, which know most (ours). With `own` each process compares its
    own samples alone.
    """
    with torch.autocast(ours.image.device.type, enabled=False):  # in bfloat16 close similarities would be equal
        whole = _compared(theirs.image, theirs.text, theirs, own, reads=True)
        text = whole.text if ours.text is None else ours.text
        mine = _compared(ours.image, text, ours, own, reads=ours.text is not None)
        each = [formula(mine.first(n), whole.first(n), whole, scale) for n in sorted({ours.image.shape[-1], *widths})]
    return torch.stack(each).mean()


def _compared(image: Tensor, text: Tensor | None, places: Embedded, own: bool, *, reads: bool) -> Compared:
    images, texts = (Rows.of_one(rows.counts[rows.me]) for rows in (places.images, places.texts)) if own else (places.images, places.texts)
    return Compared(_exact(image), None if text is None else _exact(text), images, texts, reads)


def _exact(rows: Tensor) -> Tensor:
    """In float32; those of a teacher, which had no gradients, as a copy that may be part of a graph."""
    return rows.float() if rows.requires_grad else rows.float().clone()
