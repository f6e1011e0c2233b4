"""Honest latency: models take turns in one process, are warmed up, and are compared round by round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from efficientvlm.runtime.memory import uncollected


def latency(
    calls: Mapping[str, Callable[[int], object]],
    batch_sizes: Sequence[int],
    *,
    rounds: int,
    warmup_rounds: int = 3,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Time every call at every batch size; ours.

    In each round each model runs once, and the order rotates from round to round, so that drift of the machine meets all models alike.
    A speed-up is the first model's time over a model's own in the same round; the median and the quartiles over the rounds are given.

    Args:
        calls: label → function of the batch size; its inputs are prepared beforehand.
        synchronise: waits for the device, before and after each call.
        clock: seconds.
        progress: is told how many rounds are done, warm-up included, over all batch sizes.

    Returns:
        One record a batch size and model: model, batch, median_ms, p10_ms, p90_ms, samples_per_s, speedup, speedup_q1, speedup_q3.
    """
    labels = list(calls)
    records: list[dict[str, Any]] = []
    done = 0
    with no_garbage_collection():
        for size in batch_sizes:
            seconds: dict[str, list[float]] = {label: [] for label in labels}
            for number in range(-warmup_rounds, rounds):
                turn = number % len(labels)
                for label in labels[turn:] + labels[:turn]:
                    synchronise()
                    began = clock()
                    calls[label](size)
                    synchronise()
                    if number >= 0:
                        seconds[label].append(max(clock() - began, 1e-9))
                progress(done := done + 1)
            records += [_record(label, size, seconds[label], seconds[labels[0]]) for label in labels]
    return records


def _record(label: str, size: int, seconds: list[float], first: list[float]) -> dict[str, Any]:
    p10, median, p90 = (float(value) for value in np.percentile(seconds, [10, 50, 90]))
    low, middle, high = (float(value) for value in np.percentile(np.array(first) / np.array(seconds), [25, 50, 75]))
    return {
        "model": label,
        "batch": size,
        "median_ms": 1e3 * median,
        "p10_ms": 1e3 * p10,
        "p90_ms": 1e3 * p90,
        "samples_per_s": size / median,
        "speedup": middle,
        "speedup_q1": low,
        "speedup_q3": high,
    }


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No collector run inside a measurement; what is there is collected before."""
    gc.collect()
    with uncollected():
        yield


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """`count` processor threads inside the block (as many as before if None); yields how many there are."""
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
