"""What is said of tasks where no network is loaded: what their figures are called, and how a model card shows their use. No torch here."""

from __future__ import annotations

from typing import NamedTuple


class About(NamedTuple):
    """`metrics`: the main ones, the first that was measured counting, and what to call each. `tag` is that of the Hub's pipelines."""

    metrics: dict[str, str]
    tag: str | None = None
    asked: str | None = None
    """Options of `evlm predict`, where the task can be asked of one picture."""


ABOUT = {
    "vqa": About({"accuracy": "accuracy"}, "visual-question-answering", '--image picture.png --question "What colour is it?"'),
    "retrieval": About({"reranked_mean_recall": "mean recall, reranked", "mean_recall": "mean recall"}),
    "pretraining": About({}),
}
