"""Pre-training: X-VLM's losses on image-text pairs and described regions, BLIP's on pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import on_device
from efficientvlm.data.configured import augmentation
from efficientvlm.data.draw import generator
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch, region_batch
from efficientvlm.data.opening import drawn
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.momentum import MomentumContrast
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.runtime import ranks
from efficientvlm.runtime.progress import counted, say
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.tasks import PretrainingSettings
from efficientvlm.tasks.contrasting import averaged, contrast_of, contrast_problems, elements_beside
from efficientvlm.tasks.remembered import bytes_of_features
from efficientvlm.tasks.task import Learnt
from efficientvlm.training.loop import Batch

VALIDATION_BATCHES = 16


class Pretraining(Learnt):
    """Contrast, matching, masked tokens and boxes of an X-VLM; contrast with averaged encoders, matching and captions of a BLIP."""

    name, kind, needs, final = "pretraining", PAIRS, ("pretrain",), False

    def problems(self, config: PretrainingSettings, student: Loaded) -> Iterator[BadInput]:
        if not self.able(student):
            yield self.refusal(student)
        losses, able = losses_of(config, student), student.model.config.learns()
        if self.able(student) and (missing := sorted({*losses} - able)):
            fix = f"leave it out: losses={sorted(able)}"
            yield BadInput(f"{student.path} has no head for {', '.join(missing)}", "", fix)
        for name in ("batch_size", "eval_batch_size"):
            if getattr(config, name) == 1 and "itm" in losses:
                yield BadInput(f"{name} 1", "matching needs another pair as negative", "use 2 or more")
        yield from contrast_problems(config, student)
        if config.momentum and "contrast" not in student.abilities:
            yield BadInput(f"momentum {config.momentum}", "regions are contrasted too, and no encoder is averaged for them", "leave it out")

    def teacher_problems(self, config: PretrainingSettings, teacher: Loaded) -> Iterator[BadInput]:
        if missing := sorted({*losses_of(config, teacher)} - teacher.model.config.learns()):
            yield BadInput(f"teacher {teacher.path} has no head for {', '.join(missing)}", "", "use the task-agnostic teacher")

    def adapt(self, config: PretrainingSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """Nothing is added; what is new since the network was made from others, its manifest says."""
        return student.model, student.manifest.extra.get("new", [])

    def configure(self, config: PretrainingSettings, student: Loaded, source: Any) -> None:
        """Nothing is noted; :class:`BadInput` if boxes alone are to be learnt of data that describe no regions."""
        if boxes_alone(config) and not getattr(source, "endless", False):
            if not any(content.places for contents in source.contents() for content in contents):
                raise BadInput(f"{config.data} describes no regions", "its boxes alone are to be learnt", "give losses=[itc,itm,mlm]")

    def objective(self, config: PretrainingSettings, student: Loaded, contrast: MomentumContrast | None = None) -> Objective:
        """By what the network can do: BLIP's losses or X-VLM's."""
        common: dict[str, Any] = {"losses": losses_of(config, student), "contrast": contrast, "weights": config.loss_weights}
        common |= settings_of(config, "seed", "hard_negatives")
        if "contrast" in student.abilities:
            return BlipPretraining(student.model, negatives=config.negatives_over, smoothing=config.label_smoothing, **common)
        return XvlmPretraining(student.model, **common)

    def objective_on(self, config: PretrainingSettings, student: Loaded, source: Any) -> Objective:
        return self.objective(config, student, contrast_of(config, student, source) if "itc" in losses_of(config, student) else None)

    def notes(self, config: PretrainingSettings, student: Loaded, source: Any) -> dict[str, Any]:
        made = averaged(config, student, source) if "itc" in losses_of(config, student) else None
        return {"contrast": made._asdict()} if made else {}

    def elements_beside(self, config: PretrainingSettings, student: Loaded, source: Any) -> int:
        return elements_beside(config, student, source) if "itc" in losses_of(config, student) else 0

    def batches(self, config: PretrainingSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        """Pairs, and before them by chance a region step, where the network has boxes to learn and the data describe regions; where there
        are boxes alone to learn, always a region step and no pairs."""
        settings = {"seed": config.seed, "step": step, **augmentation(config), **settings_of(config, "mask_probability", "max_masks")}
        alone, losses = boxes_alone(config), losses_of(config, student)
        batches = [] if alone else [pair_batch(items, texts, masks="mlm" in losses, **settings)]
        regions = config.region_probability if "box" in losses else 0.0
        described = [item for item in items if item.regions]
        drawn = generator(config.seed, step, "region step").random() < regions
        if alone or (drawn and (described or ranks.world() > 1)):
            some = described or items[:1]  # a process without regions takes part with a whole image
            grid = student.sizes.image_size // student.sizes.patch_size
            batches.insert(0, region_batch(some, texts, **settings, regions_per_image=config.regions_per_image, patch_grid=grid))
        if drawn and not alone:
            batches[0]["regions"] = bool(described)
        return batches

    def settled(self, batches: Sequence[Batch], step: int) -> Sequence[Batch]:
        """A region step is made where regions are described in the share of any process."""
        described = batches[0].pop("regions", None)
        return batches if described is None or ranks.any_of(described) else batches[-1:]

    def bytes_of_cached_teacher(self, config: PretrainingSettings, teacher: Loaded, source: Any, images_seen: int) -> int:
        return bytes_of_features(teacher, source, images_seen)

    @torch.inference_mode()
    def validate(self, config: PretrainingSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        """Mean losses, matching accuracy (1 of 3 pairs is positive) and masked-token accuracy on fixed validation batches, with progress.

        A batch of texts in which no token was masked says nothing of masked tokens; where all are so, these metrics are missing.
        """
        objective, texts = self.objective(config, student), texts_of(student)
        model = student.model.eval()
        device = next(model.parameters()).device
        batch_size = config.eval_batch_size or config.batch_size
        held_out = len(source)
        source = drawn(source, config.eval_limit or VALIDATION_BATCHES * config.batch_size)
        count = len(source)
        found: dict[str, list[float]] = {}
        images = 0
        if not count:
            return {"images": 0}
        size = min(batch_size, count)
        whole = count - count % size  # an incomplete batch would have other negatives than the rest
        if whole < held_out:
            say(f"validate: {whole:,} of {held_out:,} images, drawn at random (eval_limit, whole batches of {size})", quiet=quiet)
        starts = range(0, count - size + 1, size)
        for start, items in zip(counted(starts, "validate", count, quiet), usable_batches(source, starts, count), strict=True):
            if len(items) < min(2, size):
                continue  # matching needs another pair
            images += len(items)
            masking = settings_of(config, "mask_probability", "max_masks")
            masking["masks"] = "mlm" in losses_of(config, student)
            batch = pair_batch(items, texts, seed=0, step=start, augment_kind="none", **masking)
            for name, value in measured(objective, on_device(batch, device), start).items():
                found.setdefault(name, []).append(value)
        return {"images": images, **{name: sum(values) / len(values) for name, values in found.items()}}


def losses_of(config: PretrainingSettings, loaded: Loaded) -> tuple[str, ...]:
    """What is minimised: by default all with which the network was published."""
    return tuple(config.losses or loaded.model.config.usual_losses)


def boxes_alone(config: PretrainingSettings) -> bool:
    """Whether nothing but boxes is learnt, as X-VLM does before grounding."""
    return set(config.losses or ()) == {"box"}


def measured(objective: Objective, batch: Batch, step: int) -> dict[str, float]:
    """Losses and accuracies of one batch."""
    losses, record, _ = objective.passes(objective.model, batch, step)
    values = {name: float(value) for name, value in losses.items()}
    if "itm_logits" in record:
        matched = torch.arange(len(record["itm_logits"]), device=batch["text_ids"].device) < batch["samples"]
        values["itm_accuracy"] = float((record["itm_logits"].argmax(-1) == matched.long()).float().mean())
    if "mlm_logits" in record:
        labels = batch["masked_labels"]
        masked = labels != -100
        if masked.any():
            values["mlm_accuracy"] = float((record["mlm_logits"].argmax(-1) == labels)[masked].float().mean())
        else:
            del values["mlm"]
    return values
