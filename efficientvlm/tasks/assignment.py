"""Text assignment: which of two images a text belongs to (X-VLM); learnt on image-text pairs before statements about two images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import on_device
from efficientvlm.data.configured import augmentation
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput, number_of
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.objectives.assignment import TextAssignment
from efficientvlm.runtime.progress import counted, say
from efficientvlm.settings.tasks import AssignmentSettings
from efficientvlm.tasks.task import Learnt, held_out
from efficientvlm.training.loop import Batch

FEWEST = 3  # images: a text's own and two others


class Assignment(Learnt):
    """The part of the texts that are told to belong to the first, the second or neither of two images."""

    name, kind, needs, final = "assignment", PAIRS, ("assign",), False

    def problems(self, config: AssignmentSettings, student: Loaded) -> Iterator[BadInput]:
        for name in ("batch_size", "eval_batch_size"):
            size = getattr(config, name)
            if size is not None and size < FEWEST:
                yield BadInput(f"{name} {size}", "a text meets its own image and two others", f"use {FEWEST} or more")

    def adapt(self, config: AssignmentSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        adapted: tuple[Any, list[str]] = student.model.gain("assign")
        return adapted

    def changes(self, added: int) -> str:
        what = "every fusion layer is there for each of two images, which share keys and values; heads of other tasks are left behind"
        return f"{what}, one that assigns a text is new: {added:+,} parameters"

    def objective(self, config: AssignmentSettings, student: Loaded) -> TextAssignment:
        return TextAssignment(student.model, seed=config.seed)

    def batches(self, config: AssignmentSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        return [pair_batch(items, texts, seed=config.seed, step=step, **augmentation(config), task=True)]

    @torch.inference_mode()
    def validate(self, config: AssignmentSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        """The mean loss and the accuracy, chance is a third, on batches that are always the same; texts left out are counted."""
        source = held_out(source, config.eval_limit, "validate", quiet)
        objective, texts, model = self.objective(config, student), texts_of(student), student.model.eval()
        size = min(config.eval_batch_size or config.batch_size, max(len(source), 1))
        if rest := len(source) % size:
            say(f"validate: {rest:,} of {len(source):,} images are left out, as batches are of {size}", quiet=quiet)
        right = told = left_out = images = 0
        total = 0.0
        starts = range(0, len(source) - size + 1, size)
        read = usable_batches(source, starts, len(source))
        for start, found in zip(counted(starts, "validate", len(source), quiet), read, strict=True):
            items = [item for item in found if item.captions]
            if len(items) < FEWEST:
                continue
            batch = on_device(pair_batch(items, texts, seed=0, step=start, augment_kind="none", task=True), model.device)
            losses, record, _ = objective.passes(model, batch, start)
            labels = record["labels"]
            images, kept = images + len(items), int((labels >= 0).sum())
            right += int((record["logits"].argmax(-1) == labels).sum())
            total, told, left_out = total + float(losses["task"]) * kept, told + kept, left_out + len(labels) - kept
        if left_out:
            why = "for no image of the batch is another than their own"
            say(f"validate: {number_of(left_out, 'text was', 'texts were')} left out, {why}", quiet=quiet)
        measured = {"assignment": total / told, "assignment_accuracy": right / told} if told else {}
        return {"images": images, **measured}
