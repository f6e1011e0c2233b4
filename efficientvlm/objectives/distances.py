"""What is said of last layers and of features, compared: cosines, alignment by contrast, divergences of predictions and of attention maps.

Distances as `terms.Distance`, computed in float32; over several processes a mean is one over all their items.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.anatomy import CROSS_HEAD, HEAD
from efficientvlm.objectives.losses import Contrast
from efficientvlm.objectives.terms import Pairing, Term, logits
from efficientvlm.runtime import ranks

LEAST = 1e-12


def first_token(hidden: list[Tensor]) -> Tensor:
    """States [B, W] of the first token behind the last layer."""
    return hidden[-1][:, 0]


def last_layer(hidden: list[Tensor]) -> Tensor:
    """States [B, L, W] behind the last layer."""
    return hidden[-1]


def cosine(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """1 - cosine of vectors [B, W], a mean over them."""
    return ranks.mean(_apart(ours, theirs))


def of_words(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """1 - cosine of states [C, L, W], a mean over the tokens that were said and are followed by one."""
    words = _words(pairing.mask)
    return (_apart(ours, theirs) * words).sum() / ranks.share_of(words.sum())


def of_last_word(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """1 - cosine of states [C, L, W] at the last token that was said and is followed by one, a mean over texts that have one."""
    words = _words(pairing.mask)
    last = words & (words.flip(1).cumsum(1).flip(1) == 1)
    return (_apart(ours, theirs) * last).sum() / ranks.share_of(last.sum())


def _words(predicts: Tensor | None) -> Tensor:
    """[C, L] True at tokens that were said and predict another one; `predicts` [C, L] has what predicts, the end of a prompt included."""
    assert predicts is not None
    return predicts.bool() & F.pad(predicts.bool()[:, :-1], (1, 0))


def _apart(ours: Tensor, theirs: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(ours.float(), theirs.float().clone(), dim=-1)


def alignment(ours: Contrast, theirs: Contrast, term: Term, pairing: Pairing, *, alpha: float, queued_first: bool = False) -> Tensor:
    """Cross-entropy of the student's features with the teacher's of the batch and the student's keys of queues, both directions averaged.

    The target is alpha times what the teacher's feature makes of the same keys, divided by the student's temperature as published, and
    1 - alpha times the pairs that belong together, which share it. With `queued_first` the queues already hold the batch's own keys, which
    count as wrong partners (published).
    """
    assert ours.same is not None
    with torch.no_grad():
        images, texts = (ours.rows.gather(feature.float().clone()) for feature in (theirs.image, theirs.text))
        same, count = ours.same, len(images)
        if ours.queues is not None:
            image_queue, text_queue = ours.queues.image, ours.queues.text
            if queued_first:
                image_queue, text_queue, left = ours.queues.renewed()
                wrong = same.new_zeros(len(same), len(image_queue) - int(left.sum()))
                same = torch.cat([same[:, :count], wrong, same[:, count:][:, left]], 1)
            images, texts = torch.cat([images, image_queue.float()]), torch.cat([texts, text_queue.float()])
        hard = same / same.sum(1, keepdim=True)
    total = torch.zeros((), device=hard.device)
    with torch.autocast(hard.device.type, enabled=False):  # in bfloat16 close keys would be equal
        for feature, taught, keys in ((ours.image, theirs.image, texts), (ours.text, theirs.text, images)):
            with torch.no_grad():
                target = alpha * (taught.float() @ keys.T / ours.temperature).softmax(1) + (1 - alpha) * hard
            total = total - (target * (feature.float() @ keys.T / ours.temperature).log_softmax(1)).sum() / 2
    return total / ranks.share_of(len(hard))


def all_logits(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
    """KL divergence at every position but the last, padding included (published)."""
    return logits(ours[:, :-1], theirs[:, :-1], term, pairing)


def maps_divergence(
    ours: list[Tensor], theirs: list[Tensor], term: Term, pairing: Pairing, *, temperature: float, mean: bool, shrunk: bool
) -> Tensor:
    """KL(teacher ‖ student) of attention maps [B, H, T, S] of the last layers, a mean over heads and rows.

    Args:
        temperature: a softmax of the probabilities divided by it is compared (published: 0.05); 0: the probabilities themselves.
        mean: averages over all heads are compared. They differ less than single heads, about as averages of independent maps do; so the
            divergence is multiplied by the harmonic mean of both numbers of heads, unless `shrunk`.
    """
    kind = CROSS_HEAD if ".cross_attention" in term.tap else HEAD
    student, teacher = pairing.layers.attention[-1 if kind == CROSS_HEAD else 0]
    mine, same = pairing.layers.heads[kind][student]
    a, b, factor = ours[student].float(), theirs[teacher].float(), 1.0
    if not a.shape[1] or not b.shape[1] or not (mine or mean):
        return a.sum() * 0
    if mean:
        factor = 1.0 if shrunk else 2 / (1 / a.shape[1] + 1 / b.shape[1])
        a, b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    else:
        a, b = a[:, mine], b[:, same]
    if a.shape[-1] != b.shape[-1]:
        side = math.isqrt(min(a.shape[-1], b.shape[-1]) - 1)
        a, b = _coarser(a, side), _coarser(b, side)
    rows = pairing.mask
    keys = None if rows is None or kind == CROSS_HEAD else rows.bool()[:, None, None]
    each = divergence(a, b, temperature, keys).mean(1) * factor
    return ranks.mean(each) if rows is None else (each * rows).sum() / ranks.share_of(rows.sum())


def divergence(ours: Tensor, theirs: Tensor, temperature: float, keys: Tensor | None = None) -> Tensor:
    """KL(theirs ‖ ours) of the rows [B, H, T] of maps [B, H, T, S]; `keys` [B, 1, 1, S] is True for columns that count."""
    if not temperature:
        p, q = (maps + LEAST for maps in (theirs, ours))
        return (theirs * (p.log() - q.log())).sum(-1)
    scores = [maps / temperature for maps in (ours, theirs)]
    if keys is not None:
        scores = [score.masked_fill(~keys, torch.finfo(score.dtype).min) for score in scores]
    log_q, log_p = (score.log_softmax(-1) for score in scores)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _coarser(maps: Tensor, side: int) -> Tensor:
    """Maps [B, H, T, 1 + n²] over a first token and a grid of patches, with a grid of `side`²: a patch has the sum of what it covers."""
    grid = math.isqrt(maps.shape[-1] - 1)
    if grid == side:
        return maps
    patches = maps[..., 1:].flatten(0, 2).reshape(-1, 1, grid, grid)
    covered = F.interpolate(patches, size=(side, side), mode="area").flatten(1)
    covered = covered * (patches.sum((1, 2, 3)) / covered.sum(1).clamp(min=LEAST))[:, None]  # of cells that do not divide evenly
    return torch.cat([maps[..., :1], covered.reshape(*maps.shape[:-1], side**2)], -1)
