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

from efficientvlm.data.kinds.kind import Kind, Picture, Row
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.planning.live import fullest, valueless
from efficientvlm.planning.measure import ready
from efficientvlm.runtime import ranks
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.stages.learning import Learning

SEEN = 200  # samples whose texts are looked at
HELD = {"cpu": 1.25}  # resident bytes a live byte of a training step: the allocator keeps some of what was freed; measured 1.2 to 1.35


def training(run: Learning, images: int) -> int:
    """Of a training step on `images` images in one process: activations, gradients at the same time, and freed memory that stays."""
    device, fake = pick_device(run.config.device), FakeTensorMode(allow_non_fake_inputs=True)
    with ranks.alone():
        objective, _, feed = ready(stand_in(run, images), device, lambda loaded, device: valueless(loaded, device, fake))
        live = fullest(objective, feed(0), fake, device=device, precision=run.config.precision)
    return round(HELD.get(device.type, 1.0) * live)


def stand_in(run: Learning, images: int) -> Learning:
    """`run` on grey pictures, `images` a step, such as takes most."""
    config, source = run.config, run.sources["train"]
    side = Preprocessing.squash(run.student.sizes.image_size).for_training(config.augment).side
    grey = Grey(source, images, side, run.task.kind)
    return replace(run, config=config.model_copy(update={**config.fullest(), "batch_size": images}), sources={**run.sources, "train": grey})


class Grey:
    """Samples that say what the first ones of a source say, those with the longest texts first, on grey pictures: none is read."""

    def __init__(self, source: Any, count: int, side: int, kind: Kind[Any, Any]) -> None:
        self.source, self.count, self.kind = source, count, kind
        self.pictures = [Picture(np.full((side, side, 3), 127, np.uint8), None, None)] * len(kind.pictures)
        said = [kind.longest(contents) for contents in islice(source.contents(), SEEN)]
        self.said = sorted(said, key=lambda contents: max(map(len, kind.texts(contents)), default=0), reverse=True)

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __getitem__(self, index: int) -> Any:
        rows = [Row(content, "") for content in self.said[index % len(self.said)]]
        return self.kind.item(str(index), self.pictures, rows)
