"""X-VLM pre-training: image-text contrast, matching, masked language modelling, box regression."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from efficientvlm.data.draw import seed_of
from efficientvlm.data.kinds.pairs import patches_of
from efficientvlm.families.network import Record, check_taps, kinds_of
from efficientvlm.families.towers.parts import Encoded, take
from efficientvlm.objectives.losses import (
    Contrast,
    Negatives,
    are_negatives,
    box_losses,
    draw_negatives,
    even_texts,
    itc_loss,
    masked_token_loss,
    matching_loss,
    positives,
    visible_patches,
)
from efficientvlm.objectives.momentum import FEATURES, Contrasting, MomentumContrast
from efficientvlm.objectives.objective import Pass
from efficientvlm.objectives.teachers import CachedFeatures
from efficientvlm.objectives.terms import Term, attention, contrast, hidden, logits
from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows
from efficientvlm.runtime.progress import say

RUNS = {"itm_positive": "itm", "itm_negative": "itm", "mlm": "mlm"}
"""Passes through fusion that a teacher can be compared on, and the loss that makes them."""
LOSS_OF = {**RUNS, **{f"{loss}_logits": loss for loss in ("itc", "itm", "mlm")}, **dict.fromkeys(FEATURES, "itc")}
"""The same of everything that only one loss makes, by what follows the `@` of a tap, or by the name of an output."""


def _fusion(run: str, loss: str) -> list[Term]:
    common: dict[str, Any] = {"mask": f"text_mask@{run}", "loss": loss}
    return [
        Term("fusion_hidden", f"fusion.hidden@{run}", hidden, first=int(run == "mlm"), **common),
        Term("fusion_self_attention", f"fusion.self_attention@{run}", attention, **common),
        Term("fusion_cross_attention", f"fusion.cross_attention@{run}", attention, **common),
    ]


class XvlmPretraining(Contrasting):
    """The hard losses of X-VLM, all of weight 1.

    Use it to pre-train a network without a teacher, and as the loss of retrieval, which is contrast and matching alone;
    `distillation.Distilled` adds a teacher.

    Inputs of `forward`: a batch of `data.kinds.pairs.pair_batch` or `region_batch`, of which are read: pixels [I, 3, H, W]; text_ids and
    text_mask [B, L]; image_ids [B]; for `mlm` masked_ids [B, L], masked_positions and masked_labels [B, M]; of regions image_index [B],
    image_mask [B, 1 + patches], boxes [B, 4] and is_whole_image [B]. The step seeds the negatives. Returns the scalar losses `itc`,
    `itm`, `mlm`, `box`, `giou` that apply, and their sum `loss`. Over several processes contrast and negatives span the pairs of all, and
    each loss is such that its mean over the processes is that of one process with the whole batch. Pairs of one image, and equal captions,
    are no negatives of one another; a pair for which the batch has none is left out of that part of matching. The temperature is kept
    within 0.001 and 0.5, which the published code does in pre-training alone.

    Args:
        losses: which of itc, itm, mlm, box.
        seed: of the negatives.
        hard_negatives: whether these are drawn by similarity; else any are.
        contrast: averaged encoders and a queue for itc, which X-VLM does not have; not for batches of regions.
        weights: of losses by name, where they are not 1.

    Source: X-VLM (Zeng et al. 2022); EfficientVLM, L_hard of the general distillation stage.

    Example: `XvlmPretraining(model, losses=("itc", "itm"), seed=0)(batch, step=0)["loss"].backward()`
    """

    terms: tuple[Term, ...] = (
        Term("vision_hidden", "vision.hidden", hidden, regions=True),
        Term("vision_self_attention", "vision.self_attention", attention, regions=True),
        Term("text_hidden", "text.hidden", hidden, "text_mask"),
        Term("text_self_attention", "text.self_attention", attention, "text_mask"),
        *(row for run, loss in RUNS.items() for row in _fusion(run, loss)),
        Term("fusion_hidden", "text.hidden@mlm", hidden, "text_mask", loss="mlm"),
        Term("fusion_self_attention", "text.self_attention@mlm", attention, "text_mask", loss="mlm"),
        Term("itm_logits", "itm_logits", logits, loss="itm"),
        Term("mlm_logits", "mlm_logits", logits, "mlm_slots", loss="mlm"),
        Term("itc_logits", "itc_logits", contrast, loss="itc"),
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        losses: Iterable[str],
        seed: int,
        hard_negatives: bool = True,
        contrast: MomentumContrast | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.losses, self.seed, self.contrast, self.loss_weights = model, frozenset(losses), seed, contrast, dict(weights or {})
        self.loss_weights |= {"giou": self.loss_weights["box"]} if "box" in self.loss_weights else {}
        self.hard_negatives = hard_negatives
        self.told = False
        self.terms = tuple(term for term in self.terms if not term.loss or term.loss in self.losses)
        self.outputs = FEATURES if "itc" in self.losses else frozenset()

    def aligned(self, batch: dict[str, Any]) -> dict[str, Any]:
        return even_texts(batch)

    def cached(self, teacher: Any) -> CachedFeatures:
        """`teacher`, which answers for `itc_logits` alone and sees a picture and a caption once; batches have no regions then."""
        return CachedFeatures(teacher)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Negatives | None = None) -> Pass:
        """Every pass of one step. What is drawn are the negatives of all processes' pairs: an image for each text, a text for each image.

        Passes are named `vision`, `text`, `fusion@itm_positive`, `fusion@itm_negative`, `text@mlm`, `fusion@mlm`. All texts go through the
        text tower in one batch and all pairs through fusion in another, with image keys and values projected once an image. Recorded are,
        beside the taps in `want`, `itc_logits` [B, B], `itm_logits` [3 B, 2] and `mlm_logits` [B, M, V], the masks of texts, and as
        `outputs` the features of this process's pairs [B, E] and their `Contrast`.
        """
        want = frozenset(want)
        wanted = check_taps(model, (tap for tap in want if "." in tap))
        own = model is self.model
        runs = self.losses if own else {LOSS_OF.get(tap.partition("@")[2] or tap) for tap in want}
        record, negatives = Record(), drawn
        if hasattr(model, "temp"):
            with torch.no_grad():
                model.temp.clamp_(0.001, 0.5)
        ids, mask = batch["text_ids"], batch["text_mask"]
        rows, count = torch.arange(len(ids), device=ids.device), len(ids)
        everyone = Rows(count)
        mlm = "mlm" in runs
        regions = (batch["image_index"], covered(model, batch)) if "image_mask" in batch else None

        image = model.encode_image(batch["pixels"], regions, keep=kinds_of(wanted, "vision"))
        both = torch.cat([ids, batch["masked_ids"]]) if mlm else ids
        text = model.encode_text(both, torch.cat([mask, mask]) if mlm else mask, keep=kinds_of(wanted, "text"))
        record["text_mask"] = mask
        _tap(record, "vision", image)
        _tap(record, "text", text, slice(0, count))
        if mlm:
            _tap(record, "text", text, slice(count, 2 * count), "mlm")

        losses: dict[str, Tensor] = {}
        itm = "itm" in runs and everyone.total > 1  # a single pair has no negatives
        draws = itm and negatives is None
        same = positives(batch, everyone) if own or "itc" in runs or draws else None
        if same is not None and ("itc" in runs or draws):
            features = model.image_feature(image.states[:count]), model.text_feature(text.states[:count], mask)
            image_feature, text_feature = (everyone.gather(feature) for feature in features)
            if "itc" in runs:
                record |= {"image_feature": features[0], "text_feature": features[1]}
                record["contrast"] = Contrast(*features, model.temp, everyone, same[everyone.start : everyone.start + count])
                record["itc_logits"] = image_feature @ text_feature.T / model.temp
                losses["itc"] = itc_loss(record["itc_logits"], same)
                if own and self.contrast is not None:
                    keys = self.contrast.keys(batch)
                    record["contrast"] = keys.contrasted(*features, model.temp)
                    losses["itc"] = self.contrast.loss(*features, keys, model.temp, step)
            if draws:
                generator = torch.Generator().manual_seed(seed_of(self.seed, step, "negatives" if own else "teacher negatives"))
                temp = model.temp if self.hard_negatives else torch.full_like(model.temp, torch.inf)  # every other pair is as likely
                chosen = draw_negatives(image_feature, text_feature, temp, same, generator)
                negatives = ranks.agreed(chosen[0]), ranks.agreed(chosen[1])

        # rows of the one fusion batch: matched pairs, true text + drawn image, drawn text + true image, masked text + its image, boxes
        plan: list[tuple[str, Tensor, Tensor]] = []
        images, texts, masks = image.states, text.states, torch.cat([mask, mask]) if mlm else mask
        visible = None if regions is None else visible_patches(regions[1], len(images))
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
            return Pass(losses, record, negatives)
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
                record["mlm_logits"] = model.mlm_logits(fused.states[part], batch["masked_positions"])
                record["mlm_slots"] = batch["masked_labels"] != -100
                losses["mlm"] = masked_token_loss(record["mlm_logits"], batch["masked_labels"])
            elif name == "box":
                losses["box"], losses["giou"] = box_losses(model.box_head(first[part]).sigmoid(), batch["boxes"], batch["is_whole_image"])
            start = part.stop
        if itm:
            record["itm_logits"] = model.itm_head(first[: 3 * count])
            if own and same is not None and negatives is not None:
                found = are_negatives(negatives, same)
                self._tell(torch.cat(found), step)
                known = torch.cat([rows >= 0, *(part[everyone.start : everyone.start + count] for part in found)])
                losses["itm"] = matching_loss(record["itm_logits"], torch.arange(3 * count, device=ids.device) < count, known)
        return Pass(losses, record, negatives)

    def _tell(self, known: Tensor, step: int) -> None:
        """Say once if pairs have no negative, the first time that it happens."""
        if not self.told and (lacking := int((~known).sum())):
            self.told = True
            why = "all others of their batch have their picture or their caption"
            say(f"matching: step {step} lacks {lacking} of {len(known)} negatives, and so may later ones: {why}; larger batches have more")


def covered(model: Any, batch: dict[str, Any]) -> Tensor:
    """Patches [R, 1 + patches] that the regions of a batch cover, CLS first, in the grid of `model`: a teacher may have another one."""
    sizes, mask = model.config.sizes(), batch["image_mask"]
    side = sizes.image_size // sizes.patch_size
    if mask.shape[1] == 1 + side**2:
        return cast(Tensor, mask)
    return torch.from_numpy(patches_of(batch["boxes"].cpu().numpy(), (side, side))).to(mask.device)


def _tap(record: Record, tower: str, out: Encoded, part: slice = slice(None), run: str = "") -> None:
    for kind in ("hidden", "self_attention", "cross_attention"):
        if kept := getattr(out, kind):
            record[f"{tower}.{kind}" + (f"@{run}" if run else "")] = [tensor[part] for tensor in kept]
