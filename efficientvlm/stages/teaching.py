"""Reasons to doubt that a teacher helps, as far as manifests and annotations tell them at once; nothing is computed by a model."""

from __future__ import annotations

from typing import Any

from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.data.kinds.questions import answers
from efficientvlm.report.metrics import main_metric, titles
from efficientvlm.runtime.progress import say

ADVICE = "compare with a run without --teacher (docs/distillation.md, When a teacher helps)"


def doubt(stage: str, teacher: Manifest, student: Manifest, val: Any, quiet: bool, *, asked: bool) -> None:
    """Say every one of :func:`doubts`."""
    for line in doubts(teacher, student, val, asked=asked):
        say(f"{stage}: {line}; {ADVICE}", quiet=quiet)


def doubts(teacher: Manifest, student: Manifest, val: Any = None, *, asked: bool) -> list[str]:
    """Why the student may learn nothing from the teacher.

    Args:
        val: the held-out data of this run; accuracies count only where they were measured on the same.
        asked: whether `val` holds questions, of which one answer may be right more often than the teacher.
    """
    if teacher.stage == "init" and teacher.origin == "random":
        return ["the teacher was never trained: its weights are random"]
    theirs = _measured(teacher, val)
    if theirs is None:
        return []
    name, accuracy = theirs
    found = []
    own = _measured(student, val)
    if own and own[0] == name and accuracy <= own[1]:
        found.append(f"the teacher's validation {titles()[name]}, {accuracy:.4f}, is not above the student's own, {own[1]:.4f}")
    if asked and (majority := majority_answer(val)) and accuracy <= majority[1]:
        answer, part = majority
        found.append(f"the teacher's validation accuracy, {accuracy:.4f}, is not above {part:.4f}, that of always answering {answer!r}")
    most = teacher.metrics["val"].get("majority_accuracy")
    if name != "accuracy" and isinstance(most, int | float) and accuracy <= most:
        found.append(f"the teacher's validation {titles()[name]}, {accuracy:.4f}, is not above {most:.4f}, that of one answer to all")
    return found


def majority_answer(source: Any) -> tuple[str, float] | None:
    """The answer that is right most often, and the part of all answers that it is, by weight; None where nothing is answered."""
    weights: dict[str, float] = {}
    for answer, weight in answers(source):
        weights[answer] = weights.get(answer, 0.0) + weight
    if not weights:
        return None
    answer = max(weights, key=weights.__getitem__)
    return answer[:80], weights[answer] / sum(weights.values())


def _measured(manifest: Manifest, val: Any) -> tuple[str, float] | None:
    """The main metric on validation data that are those of `val`."""
    same = any(record.split == "val" and record.fingerprint == getattr(val, "fingerprint", None) for record in manifest.data)
    return main_metric(manifest.metrics.get("val")) if same else None
