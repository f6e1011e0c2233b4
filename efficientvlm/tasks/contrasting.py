"""Contrast with averaged encoders and a queue, as the settings of a task, the network and the training data decide it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from efficientvlm.data.plan import plan_for
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded
from efficientvlm.objectives.momentum import MomentumContrast
from efficientvlm.settings.tasks import Contrasting

PUBLISHED = 57_600
"""Pairs in a queue of BLIP."""


class Averaged(NamedTuple):
    """What averaged encoders are made with: the manifest says it."""

    momentum: float
    queue: int
    alpha: float
    ramp: int
    """Steps in which alpha grows from 0."""


def averaged(config: Contrasting, student: Loaded, source: Any) -> Averaged | None:
    """What is left open in `config` as the network and its training data have it; None where there is no momentum."""
    momentum = student.model.config.usual_momentum if config.momentum is None else config.momentum
    if not momentum:
        return None
    most = PUBLISHED if getattr(source, "endless", False) else min(PUBLISHED, len(source))
    queue = config.queue or max(1, most // config.batch_size) * config.batch_size
    ramp = round(config.alpha_warmup * config.steps(plan_for(source, config.batch_size, config.seed).batches_per_epoch))
    return Averaged(momentum, queue, config.alpha, ramp)


def contrast_of(config: Contrasting, student: Loaded, source: Any) -> MomentumContrast | None:
    """The averaged encoders of `student` and their queue, if there is momentum."""
    made = averaged(config, student, source)
    if made is None:
        return None
    return MomentumContrast(
        student.model, **made._asdict(), over=config.contrast_over, random=config.seed if config.queue_start == "random" else None
    )


def contrast_problems(config: Contrasting, student: Loaded) -> Iterator[BadInput]:
    """A queue that whole batches do not fill, and what X-VLM's losses do not know."""
    if config.negatives_over == "process" and "contrast" not in student.abilities:
        why = f"a network of type {student.model.config.model_type} draws negatives from the pairs of all processes"
        yield BadInput("negatives_over process", why, "leave it out")
    if config.queue is not None and config.queue % config.batch_size:
        near = max(1, round(config.queue / config.batch_size)) * config.batch_size
        yield BadInput(f"queue {config.queue:,}", f"it is no multiple of batch_size {config.batch_size:,}", f"use {near:,}")


def elements_beside(config: Contrasting, student: Loaded, source: Any) -> int:
    """Of the averages of weights and of the queue."""
    made = averaged(config, student, source)
    if made is None:
        return 0
    names = student.model.feature_parameters()
    copies = sum(p.numel() for name, p in student.model.named_parameters() if name in names and p.requires_grad)
    return copies + made.queue * 2 * (student.model.config.feature_width + 2)  # numbers of image and caption take two elements each
