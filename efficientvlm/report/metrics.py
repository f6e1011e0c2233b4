"""Which of its metrics stands for a task, in a summary or a report."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from efficientvlm.settings.tasks import ABOUT


def titles() -> dict[str, str]:
    """Main metrics of all tasks, the first one that was measured counting, and what to call them."""
    return {name: title for about in ABOUT.values() for name, title in about.metrics.items()}


def unbounded() -> frozenset[str]:
    """Main metrics that are no parts of 1."""
    return frozenset(name for about in ABOUT.values() if not about.parts for name in about.metrics)


def main_metric(metrics: Any) -> tuple[str, float] | None:
    """Name and value of the metric that stands for `metrics`; None if it has none."""
    for name in titles() if isinstance(metrics, Mapping) else ():
        if isinstance(value := metrics.get(name), int | float) and isfinite(value):
            return name, float(value)
    return None
