"""Bytes that a stage holds beside weights while it computes: a training step by running it without values, the rest by formula (ours).

Without gradients work is done in blocks, of which the largest counts (`families.footprint`). A training step is run on the shapes of the
stage's networks and on a batch of its longest texts (`live`), so that every family, objective and precision is counted by its operations.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensorMode

from efficientvlm import ranks
from efficientvlm.data.items import Question, Region
from efficientvlm.data.kinds.pairs import PairItem, phrases_of
from efficientvlm.data.kinds.questions import QUESTIONS, VQAItem, asked
from efficientvlm.hardware import pick_device
from efficientvlm.planning.live import fullest, valueless
from efficientvlm.planning.measure import ready
from efficientvlm.planning.parts import Run
from efficientvlm.tasks.known import learnt_by
from efficientvlm.tasks.remembered import asked_each

SAMPLE = 1000  # questions or texts of which the longest are read
HELD = {"cpu": 1.25}  # resident bytes a live byte of a training step: the allocator keeps some of what was freed; measured 1.2 to 1.35


def training(run: Run, images: int) -> int:
    """Of a training step on `images` images in one process: activations, gradients at the same time, and freed memory that stays."""
    device, fake = pick_device(run.config.device), FakeTensorMode(allow_non_fake_inputs=True)
    with ranks.alone():
        objective, _, feed = ready(stand_in(run, images), device, lambda loaded, device: valueless(loaded, device, fake))
        live = fullest(objective, feed(0), fake, device=device, precision=run.config.precision)
    return round(HELD.get(device.type, 1.0) * live)


def stand_in(run: Run, images: int) -> Run:
    """`run` on grey pictures, `images` a step, with a region step if there may be one; a cached teacher is run as at first sight."""
    config, source = run.config, run.sources["train"]
    changed: dict[str, Any] = {"batch_size": images, "cache_teacher": False}
    if hasattr(config, "region_probability"):
        changed["region_probability"] = float(config.region_probability > 0)
    grey = Grey(source, images, run.student.sizes.image_size, learnt_by(config).kind)
    return replace(run, config=config.model_copy(update=changed), sources={**run.sources, "train": grey})


class Grey:
    """Samples of the form of a source, with its longest and then its first texts, and grey pictures: none is read."""

    def __init__(self, source: Any, count: int, side: int, kind: Any) -> None:
        self.source, self.count, self.asks = source, count, kind is QUESTIONS
        self.image = np.full((side, side, 3), 127, np.uint8)
        if self.asks:
            first = list(islice(asked(source), SAMPLE))
            longest = [max(first, key=lambda question: len(question.text)), max(first, key=said_length)] if first else []
            self.texts: list[Any] = [*longest, *first]
            self.each = max(1, round(asked_each(source)))
        else:
            texts = list(islice(source.texts(), SAMPLE))
            self.texts = [*([max(texts, key=len)] if texts else []), *texts]
            self.each = described(source)

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __getitem__(self, index: int) -> PairItem | VQAItem:
        def some(count: int) -> list[Any]:
            return [self.texts[(index * count + number) % len(self.texts)] for number in range(count)]

        if self.asks:
            return VQAItem(str(index), self.image, some(self.each))
        return PairItem(str(index), self.image, some(1), [Region(text, (0.5, 0.5, 0.5, 0.5)) for text in some(self.each)])


def said_length(question: Question) -> int:
    return max((len(answer) for answer, _ in question.answers), default=0)


def described(source: Any) -> int:
    """Described regions an image, by the first images of `source`; 0 where it has none."""
    whole = getattr(source, "source", source)
    counts = [sum(len(phrases_of(content)) for content in contents) for contents in islice(whole.contents(), SAMPLE)]
    return -(-sum(counts) // len(counts)) if counts else 0
