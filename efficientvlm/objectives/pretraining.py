"""X-VLM pre-training: image-text contrast, matching, masked language modelling, box regression."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm import ranks
from efficientvlm.data.draw import seed_of
from efficientvlm.exchange import Rows
from efficientvlm.families.base import Record, check_taps, kinds_of
from efficientvlm.families.blocks import Encoded, take

Negatives = tuple[Tensor, Tensor]


class Pretraining(nn.Module):
    """The hard losses of X-VLM, all of weight 1.

    Use it to pre-train a network without a teacher; `efficientvlm_kd.Distillation` adds one.

    Inputs of `forward`: a batch of `data.collate.pair_batch` or `region_batch`, and the step, which seeds the negatives.
    Returns the scalar losses `itc`, `itm`, `mlm`, `box`, `giou` that apply, and their sum `loss`. Over several processes contrast and
    negatives span the pairs of all, and each loss is such that its mean over the processes is that of one process with the whole batch.
    Reference: X-VLM (Zeng et al. 2022); EfficientVLM, L_hard of the general distillation stage.
    """

    def __init__(self, family: Any, model: nn.Module, *, losses: Iterable[str], seed: int, hard_negatives: bool = True) -> None:
        super().__init__()
        self.family, self.model, self.losses, self.seed = family, model, frozenset(losses), seed
        self.hard_negatives = hard_negatives

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        losses, _, _ = self.passes(self.model, even_texts(batch), step)
        return {"loss": sum(losses.values(), torch.zeros(())), **losses}

    def passes(
        self,
        model: Any,
        batch: dict[str, Any],
        step: int,
        want: Iterable[str] = (),
        negatives: Negatives | None = None,
        draw: str = "negatives",
        runs: Iterable[str] | None = None,
    ) -> tuple[dict[str, Tensor], Record, Negatives | None]:
        """Every pass of one step: the losses, the taps in `want`, and the negatives that were drawn (or given), of all processes' pairs.

        Passes are named `vision`, `text`, `fusion@itm_positive`, `fusion@itm_negative`, `text@mlm`, `fusion@mlm`. All texts go through the
        text tower in one batch and all pairs through fusion in another, with image keys and values projected once an image. `runs`
        names the losses whose passes are made, by default all of `losses`.
        """
        wanted, runs = check_taps(self.family, want), self.losses if runs is None else frozenset(runs)
        record = Record()
        if hasattr(model, "temp"):
            with torch.no_grad():
                model.temp.clamp_(0.001, 0.5)
        ids, mask = batch["text_ids"], batch["text_mask"]
        rows, count = torch.arange(len(ids), device=ids.device), len(ids)
        everyone = Rows(count)
        mlm = "mlm" in runs
        regions = (batch["image_index"], batch["image_mask"]) if "image_mask" in batch else None

        image = model.encode_image(batch["pixels"], regions, keep=kinds_of(wanted, "vision"))
        both = torch.cat([ids, batch["masked_ids"]]) if mlm else ids
        text = model.encode_text(both, torch.cat([mask, mask]) if mlm else mask, keep=kinds_of(wanted, "text"))
        _tap(record, "vision", image)
        _tap(record, "text", text, slice(0, count))
        if mlm:
            _tap(record, "text", text, slice(count, 2 * count), "mlm")

        losses: dict[str, Tensor] = {}
        itm = "itm" in runs and everyone.total > 1  # a single pair has no negatives
        if "itc" in runs or (itm and negatives is None):
            image_feature = everyone.gather(model.image_feature(image.states[:count]))
            text_feature = everyone.gather(model.text_feature(text.states[:count], mask))
            record |= {"image_feature": image_feature, "text_feature": text_feature, "temp": model.temp}
            same = positives(batch, everyone)
            if "itc" in runs:
                losses["itc"] = itc_loss(image_feature, text_feature, model.temp, same)
            if itm and negatives is None:
                generator = torch.Generator().manual_seed(seed_of(self.seed, step, draw))
                temp = model.temp if self.hard_negatives else torch.full_like(model.temp, torch.inf)  # every other pair is as likely
                drawn = draw_negatives(image_feature, text_feature, temp, same, generator)
                negatives = ranks.agreed(drawn[0]), ranks.agreed(drawn[1])

        # rows of the one fusion batch: matched pairs, true text + drawn image, drawn text + true image, masked text + its image, boxes
        plan: list[tuple[str, Tensor, Tensor]] = []
        images, texts, masks = image.states, text.states, torch.cat([mask, mask]) if mlm else mask
        visible = None if regions is None else visible_patches(batch["image_mask"], len(images))
        if itm:
            assert negatives is not None
            images, image_negative = everyone.reach(images, negatives[0])
            texts, text_negative = everyone.reach(texts, negatives[1])
            masks, _ = everyone.reach(masks, negatives[1])
            visible = None if visible is None else everyone.reach(visible, negatives[0])[0]
            plan += [("itm_positive", rows, rows)]
            plan += [("itm_negative", torch.cat([rows, text_negative]), torch.cat([image_negative, rows]))]
        if mlm:
            plan += [("mlm", rows + count, rows)]
        box = "box" in runs and regions is not None
        if box:
            plan += [("box", rows, count + batch["image_index"])]
        if not plan:
            return losses, record, negatives
        text_rows, image_rows = torch.cat([p[1] for p in plan]), torch.cat([p[2] for p in plan])
        context = model.fusion.context(images, None if visible is None else visible[image_rows], image_rows)
        masks = masks[text_rows]
        fused = model.fuse(take(texts, text_rows), masks, context, keep=kinds_of(wanted, "fusion"))

        start = 0
        first = model.pooled(fused.states, masks)
        for name, text_of, _ in plan:
            part = slice(start, start + len(text_of))
            _tap(record, "fusion", fused, part, name)
            record[f"text_mask@{name}"] = masks[part]
            if name == "mlm":
                logits = model.mlm_logits(fused.states[part], batch["masked_positions"])
                record["mlm_logits"] = logits
                labels = batch["masked_labels"].flatten()
                total = F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=-100, reduction="sum")
                losses["mlm"] = total / ranks.share_of((labels != -100).sum())
            elif name == "box":
                losses["box"], losses["giou"] = box_losses(model.box_head(first[part]).sigmoid(), batch["boxes"], batch["is_whole_image"])
            start = part.stop
        if itm:
            logits = model.itm_head(first[: 3 * count])
            record["itm_logits"] = logits
            matched = (torch.arange(3 * count, device=ids.device) < count).long()
            losses["itm"] = F.cross_entropy(logits.float(), matched, reduction="sum") / ranks.share_of(3 * count)
        return losses, record, negatives


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


def itc_loss(image: Tensor, text: Tensor, temperature: Tensor, same: Tensor | None = None) -> Tensor:
    """Mean of image→text and text→image cross-entropy of unit features [B, E]; several positives of a row share its probability mass."""
    logits = image @ text.T / temperature
    targets = torch.eye(len(logits), device=logits.device) if same is None else same.float()
    forward = -(logits.log_softmax(1) * (targets / targets.sum(1, keepdim=True))).sum(1).mean()
    targets = targets.T
    backward = -(logits.T.log_softmax(1) * (targets / targets.sum(1, keepdim=True))).sum(1).mean()
    return (forward + backward) / 2


@torch.no_grad()
def negative_weights(image: Tensor, text: Tensor, temperature: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, B] a hard negative is drawn with: (image for each text, text for each image); softmax + 1e-5, positives 0 (X-VLM)."""
    similarity = image @ text.T / temperature
    for_text = (similarity.T.softmax(1) + 1e-5).masked_fill(same.T, 0)
    for_image = (similarity.softmax(1) + 1e-5).masked_fill(same, 0)
    return for_text, for_image


@torch.no_grad()
def draw_negatives(image: Tensor, text: Tensor, temperature: Tensor, same: Tensor, generator: torch.Generator) -> Negatives:
    """One image for each text and one text for each image, [B] each; a row whose partners are all positives takes any other row."""
    drawn = []
    for weights in negative_weights(image, text, temperature, same):
        weights = weights.float().cpu()
        others = 1 - torch.eye(len(weights))
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, others)
        drawn.append(torch.multinomial(weights, 1, generator=generator)[:, 0].to(image.device))
    return drawn[0], drawn[1]


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


def _tap(record: Record, tower: str, out: Encoded, part: slice = slice(None), run: str = "") -> None:
    for kind in ("hidden", "self_attention", "cross_attention"):
        if kept := getattr(out, kind):
            record[f"{tower}.{kind}" + (f"@{run}" if run else "")] = [tensor[part] for tensor in kept]
