"""Pre-training: X-VLM's losses on image-text pairs and described regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from efficientvlm.data.batch import on_device
from efficientvlm.data.configured import augmentation
from efficientvlm.data.draw import generator
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch, region_batch
from efficientvlm.data.opening import drawn, usable
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.runtime import ranks
from efficientvlm.runtime.progress import counted, say
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.tasks import PretrainingSettings
from efficientvlm.tasks.remembered import bytes_of_features
from efficientvlm.tasks.task import Learnt
from efficientvlm.training.loop import Batch

VALIDATION_BATCHES = 16


class Pretraining(Learnt):
    """Contrast, matching, masked tokens and boxes, as far as the network has heads for them (X-VLM)."""

    name, kind, needs, final = "pretraining", PAIRS, ("pretrain",), False

    def problems(self, config: PretrainingSettings, student: Loaded) -> Iterator[BadInput]:
        if not self.able(student):
            yield self.refusal(student)
        elif missing := sorted(set(config.losses) - set(student.model.config.heads)):
            fix = f"leave it out: losses={sorted(student.model.config.heads)}"
            yield BadInput(f"{student.path} has no head for {', '.join(missing)}", "", fix)
        for name in ("batch_size", "eval_batch_size"):
            if getattr(config, name) == 1 and "itm" in config.losses:
                yield BadInput(f"{name} 1", "matching needs another pair as negative", "use 2 or more")

    def teacher_problems(self, config: PretrainingSettings, teacher: Loaded) -> Iterator[BadInput]:
        if missing := sorted(set(config.losses) - set(getattr(teacher.model.config, "heads", ()))):
            yield BadInput(f"teacher {teacher.path} has no head for {', '.join(missing)}", "", "use the task-agnostic teacher")

    def adapt(self, config: PretrainingSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """Nothing is added; what is new since the network was made from others, its manifest says."""
        return student.model, student.manifest.extra.get("new", [])

    def configure(self, config: PretrainingSettings, student: Loaded, source: Any) -> None:
        """Nothing is noted; :class:`BadInput` if boxes alone are to be learnt of data that describe no regions."""
        if boxes_alone(config) and not getattr(source, "endless", False):
            if not any(content.places for contents in source.contents() for content in contents):
                raise BadInput(f"{config.data} describes no regions", "its boxes alone are to be learnt", "give losses=[itc,itm,mlm]")

    def objective(self, config: PretrainingSettings, student: Loaded) -> XvlmPretraining:
        settings = settings_of(config, "losses", "seed", "hard_negatives")
        return XvlmPretraining(student.model, **settings)

    def batches(self, config: PretrainingSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        """Pairs, and before them by chance a region step, where the network has boxes to learn and the data describe regions; where there
        are boxes alone to learn, always a region step and no pairs."""
        settings = {"seed": config.seed, "step": step, **augmentation(config), **settings_of(config, "mask_probability", "max_masks")}
        alone = boxes_alone(config)
        batches = [] if alone else [pair_batch(items, texts, **settings)]
        regions = config.region_probability if "box" in config.losses else 0.0
        described = [item for item in items if item.regions]
        if alone or (ranks.any_of(bool(described)) and generator(config.seed, step, "region step").random() < regions):
            some = described or items[:1]  # a process without regions takes part with a whole image
            grid = student.sizes.image_size // student.sizes.patch_size
            batches.insert(0, region_batch(some, texts, **settings, regions_per_image=config.regions_per_image, patch_grid=grid))
        return batches

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
        for start in counted(range(0, count - size + 1, size), "validate", count, quiet):
            items = usable(source, range(start, start + size))
            if len(items) < min(2, size):
                continue  # matching needs another pair
            images += len(items)
            masking = settings_of(config, "mask_probability", "max_masks")
            batch = pair_batch(items, texts, seed=0, step=start, augment_kind="none", **masking)
            for name, value in measured(objective, on_device(batch, device), start).items():
                found.setdefault(name, []).append(value)
        return {"images": images, **{name: sum(values) / len(values) for name, values in found.items()}}


def boxes_alone(config: PretrainingSettings) -> bool:
    """Whether nothing but boxes is learnt, as X-VLM does before grounding."""
    return set(config.losses) == {"box"}


def measured(objective: XvlmPretraining, batch: Batch, step: int) -> dict[str, float]:
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
