"""Losses and what they need: contrast, matching and its negatives, boxes, sequences of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows

Negatives = tuple[Tensor, Tensor]


class Queues(NamedTuple):
    """Keys of earlier steps, `image` and `text` [Q, E], as a step finds them.

    The step will put `new_image` and `new_text` [N, E] into the places `replaced` [N]; those from Q on are still free.
    """

    image: Tensor
    text: Tensor
    new_image: Tensor
    new_text: Tensor
    replaced: Tensor

    def renewed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of images and of texts once the step has put its own, those first, and which [Q] of the earlier ones are still there."""
        left = torch.ones(len(self.image), dtype=torch.bool, device=self.image.device)
        left[self.replaced[self.replaced < len(left)]] = False
        return torch.cat([self.new_image, self.image[left]]), torch.cat([self.new_text, self.text[left]]), left


class Contrast(NamedTuple):
    """What the features of this process's pairs are compared by.

    `image` and `text` [B, E] are unit vectors; `temperature` divides their products. `rows` says whose pairs they meet: the K of all
    processes or of this one. `same` [B, K + Q] is True where image and text, or text and image, belong together; a teacher need not say.
    """

    image: Tensor
    text: Tensor
    temperature: Tensor
    rows: Rows
    same: Tensor | None = None
    queues: Queues | None = None


def even_texts(batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with texts as long as the longest of all processes, and with the same token for padding everywhere."""
    if ranks.world() == 1:
        return batch
    more, mask = ranks.longest(batch["text_ids"].shape[1]) - batch["text_ids"].shape[1], batch["text_mask"]
    return {**batch, **{name: F.pad(batch[name] * mask, (0, more)) for name in ("text_ids", "text_mask", "masked_ids") if name in batch}}


def positives(batch: dict[str, Any], everyone: Rows | None = None) -> Tensor:
    """[B, B] True where image i and text j belong together: the same image, or captions that are token for token equal.

    B counts the pairs of `everyone`, or of this batch alone.
    """
    everyone = everyone or Rows.of_one(len(batch["text_ids"]))
    ids = everyone.gather(batch["text_ids"])
    same = (ids[:, None] == ids[None]).all(-1)
    if "image_ids" in batch and "image_mask" not in batch:
        image = everyone.gather(batch["image_ids"])
        same = same | (image[:, None] == image[None])
    return same


def itc_loss(logits: Tensor, same: Tensor | None = None) -> Tensor:
    """Mean of image→text and text→image cross-entropy of similarities [B, B] divided by the temperature.

    Several positives of a row, True in `same`, share its probability mass; by default they are those of the diagonal.
    """
    targets = torch.eye(len(logits), device=logits.device) if same is None else same.float()
    forward = -(logits.log_softmax(1) * (targets / targets.sum(1, keepdim=True))).sum(1).mean()
    targets = targets.T
    backward = -(logits.T.log_softmax(1) * (targets / targets.sum(1, keepdim=True))).sum(1).mean()
    return (forward + backward) / 2


def contrast_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` [B, K] and the distributions `targets` [B, K], over the rows of all processes."""
    return -(logits.log_softmax(1) * targets).sum() / ranks.share_of(len(logits))


@torch.no_grad()
def negative_weights(
    image: Tensor, text: Tensor, temperature: Tensor, same: Tensor, *, offset: float = 1e-5, keys: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [B, B] a hard negative is drawn with: (image for each text, text for each image); softmax + `offset`, positives 0.

    `keys` are the features of images and texts that those of texts and images are compared with, by default the same. X-VLM adds 1e-5, and
    BLIP 1e-4, which compares with momentum features then, or in fine-tuning on retrieval nothing.
    """
    of_images = image @ (keys[1] if keys else text).T / temperature
    of_texts = text @ keys[0].T / temperature if keys else of_images.T
    for_text = (of_texts.softmax(1) + offset).masked_fill(same.T, 0)
    for_image = (of_images.softmax(1) + offset).masked_fill(same, 0)
    return for_text, for_image


@torch.no_grad()
def draw_negatives(image: Tensor, text: Tensor, temperature: Tensor, same: Tensor, generator: torch.Generator, **how: Any) -> Negatives:
    """One image for each text and one text for each image, [B] each; weights are those of :func:`negative_weights`, which takes `how`.

    A row whose partners are all positives has no negative and is given one of those: :func:`are_negatives` tells it, and its pair is
    no part of the matching loss. The published code cannot draw there at all. Where all weights of a row are too small for a number, any
    negative is as likely.
    """
    drawn = []
    for weights in negative_weights(image, text, temperature, same, **how):
        weights, others = weights.float().cpu(), (~same).float().cpu()
        others = torch.where(others.sum(1, keepdim=True) > 0, others, 1 - torch.eye(len(weights)))
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, others)
        drawn.append(torch.multinomial(weights, 1, generator=generator)[:, 0].to(image.device))
    return drawn[0], drawn[1]


def are_negatives(negatives: Negatives, same: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the drawn image of each text, and the drawn text of each image, is a wrong one, [B] each; `same` as :func:`positives`."""
    rows = torch.arange(len(same), device=same.device)
    return ~same[negatives[0], rows], ~same[rows, negatives[1]]


def visible_patches(mask: Tensor, count: int) -> Tensor:
    """Visible patches [count, S] of a region step's image states: `mask` [R, S] of regions, then whole images, which show everything."""
    return torch.cat([mask.bool(), torch.ones(count - len(mask), mask.shape[1], dtype=torch.bool, device=mask.device)])


def box_losses(predicted: Tensor, target: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU of boxes (cx, cy, w, h) [R, 4], averaged over those that are not the whole image (X-VLM); in float32."""
    predicted, target, keep = predicted.float(), target.float(), 1 - whole.float()
    boxes = ranks.share_of(keep.sum())
    l1 = ((predicted - target).abs().sum(-1) * keep).sum() / boxes
    return l1, ((1 - giou(predicted, target)) * keep).sum() / boxes


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union [R] of boxes (cx, cy, w, h); sigmoid outputs and true boxes are never inverted."""
    a_low, a_high = a[:, :2] - a[:, 2:] / 2, a[:, :2] + a[:, 2:] / 2
    b_low, b_high = b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = a[:, 2:].prod(-1) + b[:, 2:].prod(-1) - overlap
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    return overlap / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def masked_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` [B, M, V] at the masked places; `labels` [B, M] are -100 where there is none."""
    labels = labels.flatten()
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")
    return total / ranks.share_of((labels != -100).sum())


def matching_loss(logits: Tensor, matched: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of matching `logits` [P, 2] (no, yes); `matched` [P] is True for pairs that belong together.

    Pairs that are False in `known` [P] are left out.
    """
    if known is None:
        return F.cross_entropy(logits.float(), matched.long(), reduction="sum") / ranks.share_of(len(logits))
    each = F.cross_entropy(logits.float(), matched.long(), reduction="none")
    return (each * known).sum() / ranks.share_of(known.sum())


def choice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` [N, C] and `labels` [N], over all processes; those with a label below 0 are left out."""
    total = F.cross_entropy(logits.float(), labels.clamp(min=-1), ignore_index=-1, reduction="sum")
    return total / ranks.share_of((labels >= 0).sum())


def answer_loss(logits: Tensor, ids: Tensor, mask: Tensor, weights: Tensor, questions: int | Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum of weight times sequence NLL over the number of questions (X-VLM, VQA; with `smoothing` BLIP).

    `logits` [A, L, V] predict `ids` [A, L] shifted by one; `mask` [A, L] leaves padding out; `weights` [A].
    """
    return (sequence_nll(logits, ids, mask, smoothing) * weights).sum() / questions


def caption_loss(logits: Tensor, ids: Tensor, target: Tensor, smoothing: float = 0.0, *, published: bool = False) -> Tensor:
    """Mean cross-entropy of the tokens of `ids` [C, L] that `target` [C, L] marks, each predicted by the `logits` [C, L, V] before it.

    With `smoothing` e, of K tokens each has e / K of the target, and the true one 1 - e besides (PyTorch's); `published` (X-VLM): it has
    1 - e alone, so that a target sums to 1 - e / K. The mean is one over the tokens of all captions.
    """
    wanted = target[:, 1:].bool()
    scores, true = logits[:, :-1][wanted].float(), ids[:, 1:][wanted]
    whole = scores.logsumexp(-1)
    wrong = whole - scores.gather(-1, true[:, None])[:, 0]
    own = 1 - smoothing - smoothing / scores.shape[-1] * published
    return (own * wrong + smoothing * (whole - scores.mean(-1))).sum() / ranks.share_of(len(true))


def predicting(target: Tensor) -> Tensor:
    """[C, L] True where the token behind is one of those to be said, which `target` [C, L] marks."""
    return F.pad(target[:, 1:].bool(), (0, 1))


def sequence_nll(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float = 0.0) -> Tensor:
    """Negative log likelihood [A] of each token sequence after its first token; `logits` [A, >= L - 1, V].

    All tokens of the vocabulary share the part `smoothing` of a target.
    """
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    how: dict[str, Any] = {"ignore_index": -100, "reduction": "none", "label_smoothing": smoothing}
    loss = F.cross_entropy(logits[:, : targets.shape[1]].float().flatten(0, 1), targets.flatten(), **how)
    return loss.view(targets.shape).sum(1)
