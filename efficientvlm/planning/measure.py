"""A few real training steps on random weights of the right shapes, so that a plan can say how long a stage takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm.data.draw import seed_of
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.hardware import autocast, pick_device, synchronise
from efficientvlm.stages.learning import Learning
from efficientvlm.training.loop import Batch, Optimizer, update


def measure(run: Learning, steps: int, *, total: int) -> dict[str, Any]:
    """Time `steps` training steps after one that warms up, on the data of the stage, and extrapolate to its `total` steps.

    Returns:
        `seconds_per_step` (median, reading the data included) and `seconds` for all; `steps`, `device`, `threads`. Validation and
        writing are not in it.
    """
    device = pick_device(run.config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        objective, optimizers, feed = ready(run, device)
        objective.to(device).train()
        seconds = []
        for step in range(steps + 1):
            began = time.perf_counter()
            for number, batch in enumerate(feed(step)):
                torch.manual_seed(seed_of(run.config.seed, step, number, 0, "dropout"))
                moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
                with autocast(device, run.config.precision):
                    loss = objective(moved, step)["loss"]
                loss.backward()
                update(optimizers, 1e-6, run.config.clip, step)
            synchronise(device)
            seconds.append(time.perf_counter() - began)
    each = median(seconds[1:])
    return {
        "seconds_per_step": round(each, 4),
        "seconds": round(each * total, 1),
        "steps": steps,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


Fill = Callable[[Loaded, torch.device], Loaded]


def filled(loaded: Loaded, device: torch.device) -> Loaded:
    """The shapes of `loaded` with random weights."""
    return replace(loaded, model=loaded.family.build(loaded.model.config).to(device))


def ready(
    run: Learning, device: torch.device, fill: Fill = filled
) -> tuple[nn.Module, Sequence[Optimizer], Callable[[int], Sequence[Batch]]]:
    """Objective, optimizers and batches as the stage has them, on the weights that `fill` gives its networks."""
    student, teacher = fill(run.student, device), fill(run.teacher, device) if run.teacher else None
    learning = replace(run, student=student, teacher=teacher)
    vars(learning)["hardware"] = SimpleNamespace(device=device)  # a plan does not connect with other processes
    objective = learning.trial()
    return objective, objective.optimizers(run.config, run.new), learning.feed
