"""Bytes that a stage holds beside weights while it computes: a training step by running it without values, the rest by formula (ours).

Without gradients work is done in blocks, of which the largest counts (`families.footprint`). A training step is run on the shapes of the
stage's networks and on a batch of its longest texts (`live`), so that every family, objective and precision is counted by its operations.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from efficientvlm import ranks
from efficientvlm.data.items import Question, Region
from efficientvlm.data.kinds.pairs import PairItem, phrases_of
from efficientvlm.data.kinds.questions import VQAItem, asked
from efficientvlm.data.shapes import SAMPLED_TEXTS, Shapes
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.hardware import pick_device
from efficientvlm.planning.live import fullest, valueless
from efficientvlm.planning.measure import ready
from efficientvlm.planning.parts import Run
from efficientvlm.settings.tasks import VQASettings
from efficientvlm.stages.common import Loaded, texts_of

SAMPLE = 1000  # questions or texts that say how long texts are
HELD = {"cpu": 1.25}  # resident bytes a live byte of a training step: the allocator keeps some of what was freed; measured 1.2 to 1.35


def longest(loaded: Loaded, texts: list[str], most: int) -> int:
    """Tokens of the longest of `texts` with its ends, at most `most`."""
    read = texts_of(loaded, most)
    return int(read.batch(texts)[0].shape[1]) if texts else 2


def answering(loaded: Loaded, *, images: int, questions: float, tokens: int, top: int, device: torch.device | None = None) -> int:
    """Of ranking answers to `questions` of `tokens` about each of `images` read at a time."""
    config = loaded.model.config
    size, most = Footprint.of(loaded.family, config), room(device or torch.device("cpu"))
    asked = max(1, round(images * questions))
    answers = longest(loaded, list(config.answers or [])[:SAMPLE], 40)
    one = size.answer(max(0, answers - 2), tokens)
    block = min(most, images * size.image + asked * size.question(tokens))
    rows = min(max(most, one), asked * min(top, len(config.answers or [])) * one)
    pixels = 2 * images * 3 * loaded.sizes.image_size**2
    return round(pixels + block + rows)


def retrieving(loaded: Loaded, *, images: int, batch_size: int, tokens: int) -> int:
    """Of comparing `images` and their captions."""
    size, most = Footprint.of(loaded.family, loaded.model.config), room(torch.device("cpu"))
    held = min(most, images * size.seen)
    block = min(most, batch_size * max(size.encoding, size.seen + size.question(tokens)))
    return 2 * batch_size * 3 * loaded.sizes.image_size**2 + held + block


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
    grey = Grey(source, images, run.student.sizes.image_size, vqa=isinstance(config, VQASettings))
    return replace(run, config=config.model_copy(update=changed), sources={**run.sources, "train": grey})


class Grey:
    """Samples of the form of a source, with its longest and then its first texts, and grey pictures: none is read."""

    def __init__(self, source: Any, count: int, side: int, *, vqa: bool) -> None:
        self.source, self.count, self.vqa = source, count, vqa
        self.image = np.full((side, side, 3), 127, np.uint8)
        if vqa:
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

        if self.vqa:
            return VQAItem(str(index), self.image, some(self.each))
        return PairItem(str(index), self.image, some(1), [Region(text, (0.5, 0.5, 0.5, 0.5)) for text in some(self.each)])


def said_length(question: Question) -> int:
    return max((len(answer) for answer, _ in question.answers), default=0)


def described(source: Any) -> int:
    """Described regions an image, by the first images of `source`; 0 where it has none."""
    whole = getattr(source, "source", source)
    counts = [sum(len(phrases_of(content)) for content in contents) for contents in islice(whole.contents(), SAMPLE)]
    return -(-sum(counts) // len(counts)) if counts else 0


def asked_each(source: Any) -> float:
    """Questions an image, by the first questions of `source`; 1 of a stream, whose every row is a sample of its own."""
    if getattr(source, "endless", False):
        return 1.0
    whole = getattr(source, "source", source)
    listed = min(len(whole), SAMPLED_TEXTS) if isinstance(whole, Shapes) else len(whole)
    return sum(1 for _ in asked(source)) / max(1, listed)
