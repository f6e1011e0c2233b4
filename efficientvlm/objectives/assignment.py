"""Text assignment: which of two images a text belongs to, or to neither; pre-training for statements about two images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.data.draw import seed_of
from efficientvlm.families.network import Record
from efficientvlm.objectives.losses import choice_loss, even_texts, positives
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows

TEMPERATURE = 0.07
OURS, NEITHER = 0, 2
LEFT_OUT = -1
LEAST = 1e-20


class Drawn(NamedTuple):
    """For every pair of the whole batch [B]: whether its text belongs to the first (0), the second (1) or neither image (2), and which
    these are. A label below 0: it is left out, for no image is another than its own."""

    labels: Tensor
    first: Tensor
    second: Tensor


class TextAssignment(Objective):
    """Cross-entropy of a text's place among two images: its own is the first, the second, or missing, each as likely (X-VLM).

    Use it on image-text pairs, before a network that reads two images is tuned on statements about them.

    The other images are drawn from the batch of all processes, those that look alike more often: by the softmax of the similarity of their
    features, divided by 0.07. An image with the same id, or with the same text, is never drawn; in the published code a second copy of an
    image can be, and makes a wrong label.

    Inputs of `forward`: a batch of `data.kinds.pairs.pair_batch`, of which are read: pixels [B, 3, H, W]; text_ids and text_mask [B, L];
    image_ids [B]. The step seeds what is drawn.
    Returns `task`, and the same as `loss`.

    Source: X-VLM (Zeng et al. 2022), the pre-training before NLVR2.

    Example: `TextAssignment(model, seed=0)(batch, step=0)["loss"].backward()`
    """

    def __init__(self, model: Any, *, seed: int) -> None:
        super().__init__()
        self.model, self.seed = model, seed

    def aligned(self, batch: dict[str, Any]) -> dict[str, Any]:
        return even_texts(batch)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Drawn | None = None) -> Pass:
        """Recorded are `logits` [B, 3] and `labels` [B] of the pairs of this process, below 0 where one is left out."""
        mask = batch["text_mask"]
        everyone = Rows(len(mask))
        states = model.encode_image(batch["pixels"]).states
        if drawn is None:
            with torch.no_grad():
                features = everyone.gather(model.image_feature(states))
            generator = torch.Generator().manual_seed(seed_of(self.seed, step, "distractors"))
            drawn = Drawn(*map(ranks.agreed, draw(features, positives(batch, everyone), generator)))
        images, first = everyone.reach(states, drawn.first)
        images, second = everyone.reach(images, drawn.second)
        text = model.encode_text(batch["text_ids"], mask)
        context = model.fusion.context(torch.cat([images[first], images[second]]))
        fused = model.fuse(text.states, mask, context)
        own = slice(everyone.start, everyone.start + len(mask))
        record = Record(logits=model.verdict(fused.states, mask), labels=drawn.labels[own])
        return Pass({"task": choice_loss(record["logits"], record["labels"])}, record, drawn)


def weights_of(features: Tensor, same: Tensor) -> Tensor:
    """Weights [B, B] by which image j is drawn for text i, from `features` [B, E]; 0 where they belong together, as `same` [B, B] says."""
    return (features @ features.T / TEMPERATURE).softmax(1).masked_fill(same, 0)


@torch.no_grad()
def draw(features: Tensor, same: Tensor, generator: torch.Generator) -> Drawn:
    """The places of all texts; `same` [B, B] is True where image i and text j belong together.

    A text with one other image is never without its own, and one with no other image is left out.
    """
    weights = weights_of(features.float(), same | same.T).cpu()
    rows, others = torch.arange(len(weights)), (weights > 0).sum(1)
    labels = torch.randint(3, rows.shape, generator=generator)
    labels = torch.where(others == 1, labels % 2, labels).masked_fill(others == 0, LEFT_OUT)
    least = (others < 2)[:, None] * LEAST  # two are drawn of every row, used or not
    beside = F.pad(weights + least, (0, max(0, 2 - len(weights))), value=LEAST)
    chosen = torch.multinomial(beside, 2, generator=generator).clamp(max=len(weights) - 1)
    first = torch.where(labels == OURS, rows, chosen[:, 0])
    second = torch.where(labels == NEITHER, chosen[:, 1], torch.where(labels == OURS, chosen[:, 0], rows))
    return Drawn(labels.to(features.device), first.to(features.device), second.to(features.device))
