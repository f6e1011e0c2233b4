"""The method of DIME-FM (Sun et al. 2023): a small image tower lands in its teacher's space, from images and sentences without pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.objectives.terms import Distance, Pairing, Term
from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows
from efficientvlm.settings.dime_fm import DimeFm


class Embedded(NamedTuple):
    """Unit vectors of the images [I, E] and of the sentences [T, E] of this process; `images` and `texts` are their places among those of
    all processes, or of this one as if there were no other. `reads` says whether the sentences are what the network itself says of them,
    and so may be learnt."""

    image: Tensor
    text: Tensor
    images: Rows
    texts: Rows
    reads: bool = True

    def first(self, width: int) -> Embedded:
        """The first `width` numbers of every vector, as unit vectors again."""
        if width == self.image.shape[-1] == self.text.shape[-1]:
            return self
        image, text = (F.normalize(vectors[..., :width], dim=-1) for vectors in (self.image, self.text))
        return self._replace(image=image, text=text)

    def similarities(self, scale: float) -> tuple[Tensor, Tensor]:
        """Of this process's images with all sentences, and of its sentences with all images, multiplied by `scale`."""
        return scale * self.image @ self.texts.gather(self.text).T, scale * self.text @ self.images.gather(self.image).T


Formula = Callable[[Embedded, Embedded, Embedded, float], Tensor]
"""Of the student's vectors, the teacher's of equal width, the teacher's of full width, and what cosines are multiplied by."""


def kl(ours: Tensor, theirs: Tensor, rows: Rows) -> Tensor:
    """KL(theirs ‖ ours) of the distributions over the last axis of logits [N, C], a mean over the rows of all processes, or of this one."""
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True) / _share(rows, len(ours))


def _share(rows: Rows, count: int) -> float | Tensor:
    """What a sum over `count` rows of this process is divided by."""
    share: float | Tensor = max(1, count) if len(rows.counts) == 1 else ranks.share_of(count)
    return share


def vision_language(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """L_vl: the similarities of every image with every sentence, as a distribution over sentences and as one over images, summed."""
    sides = zip(ours.similarities(scale), theirs.similarities(scale), (ours.images, ours.texts), strict=True)
    return torch.stack([kl(a, b, rows) for a, b, rows in sides]).sum()


def pseudo_vision_language(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """L_p-vl: the teacher's images in the place of sentences, itself included; twice, as L_vl has two directions."""
    among = scale * theirs.image @ theirs.images.gather(theirs.image).T
    return 2 * kl(scale * ours.image @ alike.images.gather(alike.image).T, among, ours.images)


def image_distances(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """L_udist: the similarities of images with images, within each network; twice, as L_vl has two directions."""
    among = scale * theirs.image @ theirs.images.gather(theirs.image).T
    return 2 * kl(scale * ours.image @ ours.images.gather(ours.image).T, among, ours.images)


def feature_mse(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """Squared error of unit vectors, a mean over their numbers, of images and, where sentences are learnt, of these (CLIP-KD's FD)."""
    return torch.stack([_mean((a - b).square(), rows) for a, b, rows in _sides(ours, alike)]).sum()


def cosines(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """1 - cosine with the teacher's vector, a mean over images and, where sentences are learnt, over these, summed."""
    return torch.stack([_mean(1 - (a * b).sum(-1), rows) for a, b, rows in _sides(ours, alike)]).sum()


def interactive_contrast(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """Cross-entropy of finding among the teacher's vectors that of the same sample, a mean over images and, where learnt, sentences.

    CLIP-KD's ICL contrasts a student's image with the teacher's texts and the other way round, by pairs, which there are none of here. So
    an image is contrasted with the teacher's images, a sentence with its sentences (ours); the scale is fixed.
    """
    losses = []
    for a, b, rows in _sides(ours, alike):
        right = torch.arange(len(a), device=a.device) + rows.start
        losses.append(F.cross_entropy(scale * a @ rows.gather(b).T, right, reduction="sum") / _share(rows, len(a)))
    return torch.stack(losses).mean()


def affinity_mimicking(ours: Embedded, alike: Embedded, theirs: Embedded, scale: float) -> Tensor:
    """Cross-entropy of the teacher's similarities and the student's, the mean of both directions (TinyCLIP)."""
    sides = zip(ours.similarities(scale), theirs.similarities(scale), (ours.images, ours.texts), strict=True)
    each = [-(b.softmax(-1) * a.log_softmax(-1)).sum() / _share(rows, len(a)) for a, b, rows in sides]
    return torch.stack(each).mean()


def _sides(ours: Embedded, theirs: Embedded) -> list[tuple[Tensor, Tensor, Rows]]:
    """What is learnt, the teacher's of the same samples, and their places: images, and sentences that the student reads itself."""
    images = [(ours.image, theirs.image, ours.images)]
    return images + ([(ours.text, theirs.text, ours.texts)] if ours.reads else [])


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


def rows_of(settings: DimeFm) -> tuple[Term, ...]:
    """The terms as rows: all compare what the networks record as `embedded`, an :class:`Embedded` each."""
    scales = {name: settings.scale / temperature for name, temperature in settings.temperatures}
    named = FORMULAS.items()
    return tuple(Term(name, "embedded", at_widths(formula, scales.get(name, settings.scale), settings.widths)) for name, formula in named)


def at_widths(formula: Formula, scale: float, widths: Sequence[int]) -> Distance:
    """`formula` of whole vectors and of their first `widths` numbers, a mean over all of these widths.

    Where whole vectors of the student are shorter than the teacher's, they are compared with the first of the teacher's numbers. What is a
    distribution is always compared with that of the teacher's whole vectors, which know most (Matryoshka, Kusupati et al. 2022; ours).
    """
    return partial(_at_widths, formula=formula, scale=scale, widths=tuple(widths))


def _at_widths(
    ours: Embedded, theirs: Embedded, term: Term, pairing: Pairing, *, formula: Formula, scale: float, widths: tuple[int, ...]
) -> Tensor:
    theirs = theirs._replace(image=theirs.image.float().clone(), text=theirs.text.float().clone())  # they were made without gradients
    with torch.autocast(ours.image.device.type, enabled=False):  # in bfloat16 close similarities would be equal
        ours = ours._replace(image=ours.image.float(), text=ours.text.float().clone())
        whole = ours.image.shape[-1]
        each = [formula(ours.first(n), theirs.first(n), theirs, scale) for n in sorted({whole, *widths})]
    return torch.stack(each).mean()
