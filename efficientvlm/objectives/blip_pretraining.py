"""BLIP pre-training: contrast with momentum, matching, and captions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.data.draw import seed_of
from efficientvlm.families.network import Record, check_taps, kinds_of
from efficientvlm.families.towers.attention import Context
from efficientvlm.families.towers.parts import Encoded
from efficientvlm.objectives.losses import (
    Contrast,
    Negatives,
    are_negatives,
    caption_loss,
    draw_negatives,
    even_texts,
    itc_loss,
    matching_loss,
    positives,
)
from efficientvlm.objectives.momentum import FEATURES, Contrasting, Keys, MomentumContrast
from efficientvlm.objectives.objective import Pass
from efficientvlm.objectives.teachers import CachedFeatures
from efficientvlm.objectives.terms import Term, attention, contrast, hidden, logits
from efficientvlm.runtime import ranks
from efficientvlm.runtime.exchange import Rows
from efficientvlm.runtime.progress import say
from efficientvlm.settings.tasks import Over

RUNS = ("itm_positive", "itm_negative")
"""Passes of texts with images."""
OFFSET = 1e-4
"""What BLIP's pre-training adds to the weights that negatives are drawn with."""
TEMPERATURE = 0.07
"""The first temperature of a network that has none of its own, and does not say what it was pre-trained with."""
LIMITS = 0.001, 0.5
"""Of a temperature."""


def _matched(run: str) -> list[Term]:
    common: dict[str, Any] = {"mask": f"text_mask@{run}", "loss": "itm"}
    return [
        Term("fusion_hidden", f"text.hidden@{run}", hidden, first=1, **common),  # its input is the same tokens again
        Term("fusion_self_attention", f"text.self_attention@{run}", attention, **common),
        Term("fusion_cross_attention", f"text.cross_attention@{run}", attention, **common),
    ]


class BlipPretraining(Contrasting):
    """The losses of BLIP: contrast (itc), matching (itm) and captions (lm), of weight 1 unless `weights` say otherwise.

    Use it to pre-train a network that embeds, matches and captions, and with itc and itm alone as the loss of retrieval of one that embeds
    and matches; `distillation.Distilled` adds a teacher.

    Inputs of `forward`: a `data.kinds.pairs.pair_batch`, of which are read: pixels [B, 3, H, W]; text_ids and text_mask [B, L]; image_ids
    and caption_ids [B], if they are there. The step seeds the negatives. Returns the scalar losses `itc`, `itm`, `lm` that apply, and their
    weighted sum `loss`. The temperature is kept within 0.001 and 0.5; a network without one gets one here, which is not deployed.

    Pairs of one image, and equal captions, are no negatives of one another, neither in the batch nor in the queue; in the published
    pre-training they are, and in the published retrieval captions do not count. A pair for which the batch has no negative is left out of
    that part of matching. Each loss is such that its mean over the processes is that of one process with the whole batch.

    Args:
        losses: which of itc, itm, lm.
        seed: of the negatives.
        contrast: averaged encoders and a queue for itc; without it pairs are contrasted with those of the batch alone.
        hard_negatives: whether negatives are drawn by similarity; else any are.
        negatives: from whose pairs: those of all processes, or each process from its own, as published in pre-training.
        online: similarities for that are those of the network itself, as published in retrieval, and not those to momentum features.
        smoothing: of the tokens of captions, see `losses.caption_loss`.
        weights: of losses, by name.

    Source: BLIP (Li et al. 2022), section 3.2; momentum contrast as in ALBEF (Li et al. 2021).

    Example: `BlipPretraining(model, losses=("itc", "itm", "lm"), seed=0)(batch, step=0)["loss"].backward()`
    """

    terms: tuple[Term, ...] = (
        Term("vision_hidden", "vision.hidden", hidden),
        Term("vision_self_attention", "vision.self_attention", attention),
        Term("text_hidden", "text.hidden", hidden, "text_mask"),
        Term("text_self_attention", "text.self_attention", attention, "text_mask"),
        *(row for run in RUNS for row in _matched(run)),
        Term("decoder_hidden", "decoder.hidden", hidden, "text_mask", loss="lm"),
        Term("decoder_self_attention", "decoder.self_attention", attention, "text_mask", loss="lm"),
        Term("decoder_cross_attention", "decoder.cross_attention", attention, "text_mask", loss="lm"),
        Term("itm_logits", "itm_logits", logits, loss="itm"),
        Term("lm_logits", "lm_logits", logits, "predicts", loss="lm"),
        Term("itc_logits", "itc_logits", contrast, loss="itc"),
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        losses: Iterable[str],
        seed: int,
        contrast: MomentumContrast | None = None,
        hard_negatives: bool = True,
        negatives: Over = "all",
        online: bool = False,
        smoothing: float = 0.1,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.losses, self.seed, self.contrast = model, frozenset(losses), seed, contrast
        self.hard_negatives, self.negatives, self.online, self.smoothing = hard_negatives, negatives, online, smoothing
        self.loss_weights, self.told = dict(weights or {}), False
        if not hasattr(model, "temp"):
            first = getattr(model.config, "contrast_temperature", None) or TEMPERATURE
            self.temp = nn.Parameter(next(model.parameters()).new_tensor(first))
        self.terms = tuple(term for term in self.terms if not term.loss or term.loss in self.losses)
        self.outputs = FEATURES if "itc" in self.losses else frozenset()

    def aligned(self, batch: dict[str, Any]) -> dict[str, Any]:
        return even_texts(batch)

    def cached(self, teacher: Any) -> CachedFeatures:
        """`teacher`, which answers for `itc_logits` alone and sees a picture and a caption once."""
        return CachedFeatures(teacher, lambda: self.temperature(teacher))

    def temperature(self, model: Any) -> Tensor:
        """That of `model`, or of the objective where it has none, within its limits."""
        learnt: Tensor = model.temp if hasattr(model, "temp") else self.temp
        return learnt.clamp(*LIMITS)

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        (self.model.temp if hasattr(self.model, "temp") else self.temp).clamp_(*LIMITS)

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Negatives | None = None) -> Pass:
        """Every pass of one step. What is drawn are negatives: an image for each text, a text for each image.

        Passes are named `vision`, `text` (alone), `text@itm_positive`, `text@itm_negative` (with images), `decoder`. Recorded are, beside
        the taps in `want`, `itc_logits` [B, B] of the pairs of all processes, `itm_logits` [3 B, 2], `lm_logits` [B, L, V] with `predicts`
        [B, L], True where the next token is to be said, the masks of texts, and as `outputs` the features of this process's pairs [B, E]
        and their `Contrast`; of the student also `keys`, what contrast met, if there are averaged encoders.
        """
        want, own, ids, mask = frozenset(want), model is self.model, batch["text_ids"], batch["text_mask"]
        wanted = check_taps(model, (tap for tap in want if "." in tap))
        alone = frozenset(tap for tap in wanted if "@" not in tap)
        runs = self.losses if own else {loss_of(tap) for tap in want}
        record, losses, temperature, count = Record(text_mask=mask), dict[str, Tensor](), self.temperature(model), len(ids)
        image = model.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        text = model.encode_text(ids, mask, keep=kinds_of(alone, "text"))
        features = model.image_feature(image.states), model.text_feature(text.states, mask)
        record |= {"image_feature": features[0], "text_feature": features[1]}
        _tap(record, "vision", image)
        _tap(record, "text", text)
        if "itc" in runs and own and self.contrast is not None:
            keys = record["keys"] = self.contrast.keys(batch)
            record["contrast"] = keys.contrasted(*features, temperature)
            losses["itc"] = self.contrast.loss(*features, keys, temperature, step)
        if "itc" in runs and ("itc_logits" in want or not losses):
            everyone = Rows(count)
            same = positives(batch, everyone)
            record.setdefault("contrast", Contrast(*features, temperature, everyone, same[everyone.start : everyone.start + count]))
            record["itc_logits"] = everyone.gather(features[0]) @ everyone.gather(features[1]).T / temperature
            if own and not losses:
                losses["itc"] = itc_loss(record["itc_logits"], same)
        if "itm" in runs:
            losses |= self._match(model, batch, step, image.states, record, kinds_of(wanted - alone, "text"), temperature, drawn)
        if "lm" in runs:
            projected = record.get("context") if model.config.shares else None  # by the same cross-attention, for matching
            seen = model.attended(image.states) if projected is None else _first(projected, count)
            record["lm_logits"], out = model.follow(ids, mask, seen, keep=kinds_of(wanted, "decoder"))
            _tap(record, "decoder", out)
            record["predicts"] = F.pad(mask[:, 1:], (0, 1)).bool()
            if own:
                losses["lm"] = caption_loss(record["lm_logits"], ids, mask, self.smoothing)
        return Pass(losses, record, record.get("negatives"))

    def _match(
        self,
        model: Any,
        batch: dict[str, Any],
        step: int,
        images: Tensor,
        record: Record,
        keep: frozenset[str],
        temperature: Tensor,
        drawn: Negatives | None,
    ) -> dict[str, Tensor]:
        """Matched pairs, every text with a drawn image and every image with a drawn text, as one batch; `itm` of the student."""
        ids, mask, count, own = batch["text_ids"], batch["text_mask"], len(batch["text_ids"]), model is self.model
        everyone = Rows(count) if self.negatives == "all" else Rows.of_one(count)
        if everyone.total == 1:  # a single pair has no negatives
            return {}
        same = positives(batch, everyone)
        negatives = record["negatives"] = drawn or self._draw(record, everyone, same, temperature, step, own)
        rows = torch.arange(count, device=ids.device)
        images, of_text = everyone.reach(images, negatives[0])
        texts, of_image = everyone.reach(ids, negatives[1])
        masks, _ = everyone.reach(mask, negatives[1])
        text_rows, image_rows = torch.cat([rows, rows, of_image]), torch.cat([rows, of_text, rows])
        context = record["context"] = model.text_encoder.context(images, rows=image_rows)
        fused = model.read(texts[text_rows], masks[text_rows], context, keep)
        for run, part in zip(RUNS, (slice(0, count), slice(count, 3 * count)), strict=True):
            _tap(record, "text", fused, part, run)
            record[f"text_mask@{run}"] = masks[text_rows][part]
        record["itm_logits"] = model.itm_head(fused.states[:, 0])
        if not own:
            return {}
        found = are_negatives(negatives, same)
        self._tell(torch.cat(found), step)
        known = torch.cat([rows >= 0, *(part[everyone.start : everyone.start + count] for part in found)])
        return {"itm": matching_loss(record["itm_logits"], torch.arange(3 * count, device=ids.device) < count, known)}

    def _draw(self, record: Record, everyone: Rows, same: Tensor, temperature: Tensor, step: int, own: bool) -> Negatives:
        """By similarities of the network itself, or to the momentum features where there are some."""
        image, text = (everyone.gather(record[f"{tower}_feature"]).detach() for tower in ("image", "text"))
        keys: Keys | None = None if self.online else record.get("keys")
        how: dict[str, Any] = {"offset": 0.0 if self.online else OFFSET}
        if keys is not None:
            averaged = keys.every if self.negatives == "all" else keys.own
            how["keys"] = averaged.image, averaged.text
        place = (step, "negatives" if own else "teacher negatives", *(() if self.negatives == "all" else (ranks.rank(),)))
        temperature = temperature if self.hard_negatives else torch.full_like(temperature, torch.inf)  # every other pair is as likely
        chosen = draw_negatives(image, text, temperature, same, torch.Generator().manual_seed(seed_of(self.seed, *place)), **how)
        return (ranks.agreed(chosen[0]), ranks.agreed(chosen[1])) if self.negatives == "all" else chosen

    def _tell(self, known: Tensor, step: int) -> None:
        """Say once if pairs have no negative, the first time that it happens."""
        if not self.told and (lacking := int((~known).sum())):
            self.told = True
            why = "all others of their batch have their picture or their caption"
            say(f"matching: step {step} lacks {lacking} of {len(known)} negatives, and so may later ones: {why}; larger batches have more")


def _first(context: Context, count: int) -> Context:
    """Keys and values of the first `count` images, one after another."""
    return Context([pair and (pair[0][:count], pair[1][:count]) for pair in context.kv])


def loss_of(tap: str) -> str:
    """The loss without whose pass nothing is recorded at `tap`; empty where it always is."""
    if "@" in tap or tap == "itm_logits":
        return "itm"
    if tap.startswith("decoder.") or tap == "lm_logits":
        return "lm"
    return "itc" if tap == "itc_logits" or tap in FEATURES else ""


def _tap(record: Record, tower: str, out: Encoded, part: slice = slice(None), run: str = "") -> None:
    for kind in ("hidden", "self_attention", "cross_attention"):
        if kept := getattr(out, kind):
            record[f"{tower}.{kind}" + (f"@{run}" if run else "")] = [tensor[part] for tensor in kept]
