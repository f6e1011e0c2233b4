"""The linear probe: a logistic regression on the features of images, whose penalty is chosen on a held-out part (CLIP's protocol)."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from efficientvlm.data.draw import generator
from efficientvlm.data.kinds.labels import LABELS
from efficientvlm.data.opening import record
from efficientvlm.data.reading import Reading
from efficientvlm.errors import BadInput, number_of
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.tasks import LinearProbeEval
from efficientvlm.tasks.class_metrics import TOP, tell
from efficientvlm.tasks.image_features import encoded
from efficientvlm.tasks.influence import Influence, first_of, not_measured, of_images
from efficientvlm.tasks.task import Task

TRAIN, HELD_OUT = "train", "held_out"
PART = 0.1
"""Of the training images, by which the penalty is chosen where the data keep none apart for it."""
EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINEST = 1 / 8
"""Powers of ten between two values of C in the end: eight steps a decade, 97 of them from 1e-6 to 1e6."""
FITS = len(EXPONENTS) + 2 * 4
"""On the way there."""
SEEN_AT_MOST = 0.5


@dataclass
class Features:
    """Unit vectors [N, E] of images, the class of each, and a digest of its pixels."""

    values: NDArray[np.float32]
    labels: list[str]
    digests: list[bytes]
    several: int
    """Images that were left out, as they have several classes."""

    def part(self, rows: NDArray[np.bool_]) -> Features:
        chosen = np.flatnonzero(rows).tolist()
        return Features(self.values[rows], [self.labels[row] for row in chosen], [self.digests[row] for row in chosen], 0)

    def __add__(self, other: Features) -> Features:
        values = np.concatenate([self.values, other.values])
        return Features(values, self.labels + other.labels, self.digests + other.digests, self.several + other.several)


class LinearProbe(Task):
    """What a linear classifier tells of the features of images, which stay as they are."""

    name, kind, needs = "linear-probe", LABELS, ("embed",)
    also = ("mean_per_class_accuracy",)

    def reads(self, config: LinearProbeEval) -> dict[str, Any]:
        """The training images, and what the data keep apart as val, by which the penalty is chosen and which is learnt from in the end."""
        learnt = {"data": config.train or config.data}
        found = {TRAIN: config.model_copy(update={**learnt, "split": "train"})}
        if config.split != "val":
            found[HELD_OUT] = config.model_copy(update={**learnt, "split": "val"})
        return found

    def check(self, config: LinearProbeEval, loaded: Loaded) -> None:
        super().check(config, loaded)
        if importlib.util.find_spec("sklearn") is None:
            raise BadInput("the linear probe needs scikit-learn", "it is not installed", "pip install 'efficientvlm[probe]'")
        if config.features == "pooled" and not hasattr(loaded.model, "pooled_image"):
            raise BadInput("features pooled", f"{loaded.path} gives vectors that are projected already", "use features=projected")
        if config.split == "train":
            raise BadInput("split train", "the classifier learns from it", "measure val or test")

    def evaluate(
        self, config: LinearProbeEval, loaded: Loaded, source: Any, *, title: str, quiet: bool, others: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """`metric`, `c` and how it was found, `train` and, where the data keep a part apart, `held_out`, `influence` and `metrics` of
        :func:`tasks.class_metrics.tell`, of which `accuracy` is called `probe_accuracy`.

        The classifier that is measured has learnt from both `train` and `held_out`, also where `c` is given.
        """
        assert others is not None
        if not len(source):
            raise BadInput(f"{config.data} has no images", f"split {config.split} of {source.name}", "use another split")
        read: dict[str, Features] = {}
        for role, some in {**others, "data": source}.items():
            if len(some) or role != HELD_OUT:
                named = title if role == "data" else f"eval {role.replace('_', ' ')}"
                read[role] = features(loaded, some, config.batch_size, named, quiet, projected=config.features == "projected")
        test, whole = read["data"], read[TRAIN]
        train, held_out = whole, read.get(HELD_OUT)
        if config.c is None and held_out is None:
            apart = np.array([generator(config.seed, "held out", number).random() < PART for number in range(len(whole.labels))])
            train, held_out = whole.part(~apart), whole.part(apart)
        elif held_out is not None:
            whole = train + held_out
        seen = check_sets(config, train, held_out, whole, test)
        order = sorted({*whole.labels, *test.labels})
        c, tried = config.c, dict[float, float]()
        if c is None and held_out is not None:
            with Bar(f"{title} C", FITS, quiet=quiet) as bar:

                def accuracy(c: float, part: Features = held_out) -> float:
                    bar.update(min(FITS, bar.start + len(tried)))
                    tried[c] = float(np.mean(fitted(train, c, config)[0].predict(part.values) == np.array(part.labels)))
                    return tried[c]

                c = sought(accuracy)
        assert c is not None
        model, unfinished = fitted(whole, c, config)
        numbers = {label: number for number, label in enumerate(order)}
        scores = model.decision_function(test.values)
        if scores.ndim == 1:
            scores = np.stack([-scores, scores], 1)
        known = np.array([numbers[label] for label in model.classes_])
        best = known[np.argsort(-scores, axis=1, kind="stable")[:, :TOP]]
        told = tell([[numbers[label]] for label in test.labels], best, order)
        learnt = set(model.classes_.tolist())
        unseen = sum(label not in learnt for label in test.labels)
        remarks = [f"{unseen:,} of {len(test.labels):,} images are of a class without a training image, and never right"] if unseen else []
        remarks += [f"{number_of(seen, 'image is', 'images are')} among those that were learnt from, pixel by pixel"] if seen else []
        remarks += [f"L-BFGS was stopped after {config.max_iterations:,} iterations; max_iterations raises it"] if unfinished else []
        remarks += [
            f"{number_of(some.several, 'image has', 'images have')} several classes: left out" for some in read.values() if some.several
        ]
        edge = config.c is None and c in (10 ** EXPONENTS[0], 10 ** EXPONENTS[-1])
        remarks += [f"the best C lies at an end of what was tried, {c:g}"] if edge else []
        for remark in remarks:
            say(f"{title}: {remark}", quiet=quiet)
        return {
            "metric": "probe_accuracy: the part of the images whose class a logistic regression tells by their features, of length 1",
            "c": c,
            "c_from": "given" if config.c is not None else "the split val" if HELD_OUT in read else f"{PART:.0%} of the training images",
            **({"held_out_accuracy": {f"{tried_c:g}": value for tried_c, value in sorted(tried.items())}} if tried else {}),
            "train": record(others[TRAIN], TRAIN),
            **({"held_out": record(others[HELD_OUT], "val")} if HELD_OUT in read else {}),
            "features": config.features,
            "influence": influence_of(loaded, source, config.batch_size),
            "metrics": {
                "probe_accuracy": told.pop("accuracy"),
                **told,
                "training_images": len(whole.labels),
                "images_learnt_from": seen,
                "images_of_unseen_classes": unseen,
                "converged": not unfinished,
            },
        }

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        """Nothing: it takes training data besides."""
        return {"images": len(source)}

    def reading_of_measuring(self, config: LinearProbeEval, loaded: Loaded, source: Any) -> Reading:
        return Reading()

    def bytes_of_measuring(self, config: LinearProbeEval, loaded: Loaded, source: Any) -> int:
        """Of a batch of pictures and a block of work; features of the training images are four bytes each and come on top."""
        most = room(torch.device("cpu"))
        block = min(most, config.batch_size * Footprint.of(loaded.config).encoding)
        return 2 * config.batch_size * 3 * loaded.sizes.image_size**2 + block


def features(loaded: Loaded, source: Any, batch_size: int, title: str, quiet: bool, *, projected: bool = True) -> Features:
    """Of all images that can be read and have one class."""
    values: list[NDArray[np.float32]] = []
    labels: list[str] = []
    digests: list[bytes] = []
    several = 0
    for items, seen in encoded(loaded, source, batch_size, title, quiet, projected=projected):
        single = [row for row, item in enumerate(items) if len(item.labels) == 1]
        several += len(items) - len(single)
        values.append(seen.cpu().numpy()[single])
        labels += [items[row].labels[0] for row in single]
        digests += [hashlib.blake2b(items[row].image.tobytes(), digest_size=16).digest() for row in single]
    if not labels:
        raise BadInput(f"data {source.name}", "it has no image of a single class that can be read", "use other data")
    return Features(np.concatenate(values), labels, digests, several)


def check_sets(config: LinearProbeEval, train: Features, held_out: Features | None, whole: Features, test: Features) -> int:
    """How many of the images that are measured were learnt from.

    Raises:
        BadInput: they are mostly the same; there is one class only, or nothing to choose the penalty by.
    """
    known = set(whole.digests)
    seen = sum(digest in known for digest in test.digests)
    if seen > SEEN_AT_MOST * len(test.digests):
        why = f"{seen:,} of {len(test.digests):,} images of split {config.split} are among those that are learnt from"
        raise BadInput(f"data {config.data}", why, "measure --split val, or give other data to learn from: --train DATA")
    if len(set(train.labels)) < 2:
        raise BadInput(f"data {config.train or config.data}", "the training images are of one class", "use data with several classes")
    if held_out is not None and not held_out.labels:
        raise BadInput("c", "there are too few training images to choose it by", "give it: --set c=1")
    return seen


def sought(accuracy: Callable[[float], float]) -> float:
    """The C of the highest accuracy: of seven powers of ten from 1e-6 to 1e6, then of ever closer ones around the best, eight a decade in
    the end (Radford et al. 2021, appendix A.3). Of equal ones the smallest, the strongest penalty."""
    found: dict[float, float] = {}

    def of(exponent: float) -> float:
        if exponent not in found:
            found[exponent] = accuracy(10.0**exponent)
        return found[exponent]

    for exponent in EXPONENTS:
        of(exponent)
    step = EXPONENTS[1] - EXPONENTS[0]
    while True:
        best = min(found, key=lambda exponent: (-found[exponent], exponent))
        if step <= FINEST:
            return 10.0**best
        step /= 2
        for exponent in (best - step, best + step):
            if EXPONENTS[0] <= exponent <= EXPONENTS[-1]:
                of(exponent)


def fitted(some: Features, c: float, config: LinearProbeEval) -> tuple[Any, bool]:
    """A multinomial logistic regression with a penalty on squared weights, and whether it was stopped before its end."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=config.max_iterations, random_state=config.seed % 2**32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(some.values.astype(np.float64), np.array(some.labels))
    if not math.isfinite(float(np.abs(model.coef_).max())):
        raise BadInput(f"c {c:g}", "the weights of the regression are no finite numbers", "give a smaller one: --set c=1")
    return model, any(issubclass(one.category, ConvergenceWarning) for one in told)


def influence_of(loaded: Loaded, source: Any, batch_size: int) -> Influence:
    """What the picture does to its features, for the first images."""
    items: Sequence[Any] = first_of(source)
    if len(items) < 2:
        return not_measured(f"there are {len(items)} images, and 2 are needed")
    return of_images(loaded, [item.image for item in items], batch_size)
