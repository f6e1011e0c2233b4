"""What a training run reports between two metrics lines: means of the losses, samples a second, milliseconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from efficientvlm.runtime.hardware import synchronise
from efficientvlm.runtime.stopwatch import TEACHER


class Meter:
    """Sums since the last metrics line; `totals` are the losses' and their counts, which a resumable state keeps.

    A GPU is waited for where a phase ends, so that its work is booked on the phase that asked for it. That costs time, so there only the
    steps that :meth:`watch` picks are booked.
    """

    def __init__(self, totals: dict[str, float], device: torch.device) -> None:
        self.totals, self.device = totals, device
        self.watching = True
        TEACHER.settle = self._settle
        TEACHER.take()
        self._restart()

    def _settle(self) -> None:
        if self.watching:
            synchronise(self.device)

    def watch(self, step: bool) -> None:
        """Whether the phases of the coming step are booked; on the CPU they always are."""
        self.watching = step or self.device.type == "cpu"

    def _restart(self) -> None:
        self.clock = {"data": 0.0, "teacher": 0.0, "student": 0.0, "optimizer": 0.0}
        self.images = self.watched = 0
        self.since = time.monotonic()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Book the block on `phase`, less what the teacher took inside it."""
        began = time.perf_counter()
        yield
        self._settle()
        teacher = TEACHER.take()
        if not self.watching:
            return
        self.clock[phase] += time.perf_counter() - began - teacher
        self.clock["teacher"] += teacher

    def add(self, losses: Mapping[str, float], images: int, prefix: str) -> None:
        """One batch's losses; `prefix` tells the kinds of batches apart."""
        self.images, self.watched = self.images + images, self.watched + self.watching
        for name, value in losses.items():
            for key, amount in ((prefix + name, value), (f"n:{prefix}{name}", 1)):
                self.totals[key] = self.totals.get(key, 0.0) + amount

    def means(self) -> dict[str, float]:
        """Mean losses since the last metrics line."""
        return {name: value / self.totals[f"n:{name}"] for name, value in self.totals.items() if not name.startswith("n:")}

    def rate(self) -> float:
        """Samples a second since the last metrics line."""
        return self.images / max(1e-9, time.monotonic() - self.since)

    def line(self, more: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """(mean losses and `more`, speed), and start again."""
        means = self.means()
        speed = {"samples_per_s": round(self.rate(), 1)}
        speed |= {f"{name}_ms": round(1000 * value / max(1, self.watched), 2) for name, value in self.clock.items()}
        self.totals = {}
        self._restart()
        return means | more, speed
