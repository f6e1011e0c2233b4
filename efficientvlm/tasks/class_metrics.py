"""How well classes are told apart: accuracies, what is mistaken for what, and the metrics by which data sets are judged."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientvlm.checkpoints.files import MIB, read_limited
from efficientvlm.errors import BadInput, shorten
from efficientvlm.tasks.ranking import mean, standard_error

TOP = 5
SHOWN = 10
"""Of the hardest classes and of the most frequent confusions."""
LARGEST = 4 * MIB
Scores = NDArray[np.float32]


def tell(labels: Sequence[Sequence[int]], best: NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any]:
    """Accuracies of what was said, as parts of 1.

    An image that has several classes is answered rightly by any of them, and counts in each of them.

    Args:
        labels: the classes of each of N images, as numbers of `classes`.
        best: [N, K] the K classes that were found likeliest of each, best first.

    Returns:
        `images`, `classes` among which was chosen, `classes_seen`, those that have an image; `accuracy` with its `standard_error`,
        `top5_accuracy` where there are more than five classes, `mean_per_class_accuracy` over the classes seen, `majority_accuracy` of
        always saying the most frequent class; `several_classes`, how many images have more than one, if any has; `hardest_classes` and
        `confusions`, at most ten of each.
    """
    said = best[:, 0].tolist()
    hits = [one in given for one, given in zip(said, labels, strict=True)]
    seen: dict[int, list[bool]] = {}
    for given, hit in zip(labels, hits, strict=True):
        for label in given:
            seen.setdefault(label, []).append(hit)
    by_class = {label: mean(list(map(float, those))) for label, those in seen.items()}
    found: dict[str, Any] = {
        "accuracy": mean(list(map(float, hits))),
        "standard_error": standard_error(list(map(float, hits))),
        "mean_per_class_accuracy": mean(list(by_class.values())),
        "majority_accuracy": max(map(len, seen.values()), default=0) / max(1, len(hits)),
        "images": len(hits),
        "classes": len(classes),
        "classes_seen": len(seen),
    }
    if len(classes) > TOP:
        five = [not set(row).isdisjoint(given) for row, given in zip(best[:, :TOP].tolist(), labels, strict=True)]
        found["top5_accuracy"] = mean(list(map(float, five)))
    if several := sum(len(given) > 1 for given in labels):
        found["several_classes"] = several
    order = sorted(by_class, key=lambda label: (by_class[label], label))[:SHOWN]
    found["hardest_classes"] = [{"class": classes[label], "accuracy": by_class[label], "images": len(seen[label])} for label in order]
    wrong = Counter((given[0], one) for one, given, hit in zip(said, labels, hits, strict=True) if not hit and len(given) == 1)
    found["confusions"] = [
        {"class": classes[label], "said": classes[one], "images": count, "part": count / len(seen[label])}
        for (label, one), count in sorted(wrong.items(), key=lambda entry: (-entry[1], entry[0]))[:SHOWN]
    ]
    return found


def roc_auc(labels: Sequence[Sequence[int]], scores: Scores) -> float:
    """The chance that an image of the second of two classes has a higher score for it than one of the first; equal scores count half.

    Raises:
        BadInput: there are not two classes, or no image of one of them.
    """
    if scores.shape[1] != 2:
        raise BadInput("metric roc_auc", f"it is of 2 classes, and there are {scores.shape[1]:,}", "use accuracy or mean_per_class")
    wanted = np.array([1 in given for given in labels])
    ahead = scores[:, 1].astype(np.float64) - scores[:, 0]
    positive, negative = int(wanted.sum()), int((~wanted).sum())
    if not positive or not negative:
        raise BadInput("metric roc_auc", "one of the two classes has no image", "use data with images of both")
    _, place, counts = np.unique(ahead, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # the mean rank of those that are equal, from 1
    return float((ranks[wanted].sum() - positive * (positive + 1) / 2) / (positive * negative))


def mean_average_precision(labels: Sequence[Sequence[int]], scores: Scores) -> float:
    """Mean over the classes that have an image of the average precision at recalls of 0, 0.1, ..., 1 (Pascal VOC 2007)."""
    found = []
    for label in range(scores.shape[1]):
        right = np.array([label in given for given in labels])
        if not right.any():
            continue
        hits = np.cumsum(right[np.argsort(-scores[:, label], kind="stable")])
        recall, precision = hits / hits[-1], hits / np.arange(1, len(hits) + 1)
        found.append(np.mean([precision[recall >= least - 1e-9].max() for least in np.arange(11) / 10]))
    return float(np.mean(found)) if found else 0.0


METRICS: dict[str, str | Callable[[Sequence[Sequence[int]], Scores], float]] = {
    "accuracy": "accuracy",
    "mean_per_class": "mean_per_class_accuracy",
    "top5": "top5_accuracy",
    "roc_auc": roc_auc,
    "11point_map": mean_average_precision,
}
"""Metric of a data set → what :func:`tell` calls it, or what computes it of all scores."""


def read_metrics(path: Path) -> dict[str, str]:
    """Data set → its metric, of a CSV file with the columns set and metric.

    Raises:
        BadInput: it cannot be read, names a set twice, or a metric that is not known.
    """
    fix = f"write the columns set,metric; metrics are {', '.join(METRICS)}"
    try:
        rows = list(csv.reader(io.StringIO(read_limited(path, LARGEST, "a file of metrics").decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read the metrics in {path}", str(error), fix) from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if not {"set", "metric"} <= set(header):
        raise BadInput(f"cannot read the metrics in {path}", f"its columns are {shorten(', '.join(header), 80) or 'none'}", fix)
    found: dict[str, str] = {}
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) < len(header):
            raise BadInput(f"cannot read the metrics in {path}", f"row {number} has too few cells", fix)
        name, metric = row[header.index("set")].strip(), row[header.index("metric")].strip().lower().replace("-", "_")
        if metric not in METRICS:
            raise BadInput(f"cannot read the metrics in {path}", f"row {number} has the metric {shorten(metric, 60)}", fix)
        if name in found:
            raise BadInput(f"cannot read the metrics in {path}", f"row {number} names {shorten(name, 60)} again", fix)
        found[name] = metric
    if not found:
        raise BadInput(f"{path} names no data set", "", fix)
    return found


def judged(metric: str, told: dict[str, Any], labels: Sequence[Sequence[int]], scores: Scores | None) -> float:
    """The value of a metric; `scores` [N, C] where it is computed of them.

    Raises:
        BadInput: it is none of these data.
    """
    how = METRICS[metric]
    if isinstance(how, str):
        if how not in told:
            raise BadInput(f"metric {metric}", f"there are {told['classes']} classes, and it takes more", "use accuracy")
        return float(told[how])
    assert scores is not None
    return how(labels, scores)
