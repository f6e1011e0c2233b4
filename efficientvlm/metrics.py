"""Which of its metrics stands for a task, in a summary or a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {"accuracy": "accuracy", "reranked_mean_recall": "mean recall, reranked", "mean_recall": "mean recall"}
"""Main metrics, the first one that was measured counting, and what to call them: of question answering, then of retrieval."""


def main_metric(metrics: Any) -> tuple[str, float] | None:
    """Name and value of the metric that stands for `metrics`; None if it has none."""
    for name in TITLES if isinstance(metrics, Mapping) else ():
        if isinstance(value := metrics.get(name), int | float):
            return name, float(value)
    return None
