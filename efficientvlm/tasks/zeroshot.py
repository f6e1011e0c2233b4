"""Zero-shot classification: which of several classes an image shows, told from their names alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientvlm.checkpoints.files import expanded
from efficientvlm.data.class_names import Classes, NamesFile, classes_named
from efficientvlm.data.kinds.labels import LABELS, classes_of, present_in
from efficientvlm.data.opening import record
from efficientvlm.data.reading import Reading, counts_of, of_read
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.runtime.progress import say
from efficientvlm.settings.tasks import ZeroshotEval, ZeroshotQuestion
from efficientvlm.tasks.choices import Choice, margin, pictures
from efficientvlm.tasks.class_metrics import METRICS, TOP, Scores, judged, read_metrics, tell
from efficientvlm.tasks.classifying import classify
from efficientvlm.tasks.image_features import encoded, features_of
from efficientvlm.tasks.influence import Influence, first_of, not_measured, of_texts
from efficientvlm.tasks.prompts import Prompts, class_features, files_of, of_names, record_of
from efficientvlm.tasks.task import Asked

OWN = "data"
"""What the set of --data is called beside others."""
TEMPLATE = ["a photo of a {}."]


@dataclass
class Set:
    """A data set, its classes and how they are asked for, and the metric by which it is judged."""

    name: str
    source: Any
    classes: Classes
    prompts: Prompts
    metric: str = "accuracy"


class Zeroshot(Asked):
    """The class whose name is nearest to the image, by the cosine of features (CLIP)."""

    name, kind, needs = "zeroshot", LABELS, ("embed",)
    also = ("mean_per_class_accuracy",)

    def files(self, config: ZeroshotEval) -> dict[str, str | None]:
        """Files of names, templates and metrics. A role that is not called like a setting leaves this to be compared by itself too."""
        found: dict[str, str | None] = {"classes": config.classes, "set_metrics": config.set_metrics}
        found |= {f"template_file.{number}": str(path) for number, path in enumerate(files_of(config.templates))}
        for name, other in config.also.items():
            found[f"classes_of.{name}"] = other.classes
            found |= {f"template_file.{name}.{number}": str(path) for number, path in enumerate(files_of(other.templates or []))}
        return found

    def reads(self, config: ZeroshotEval) -> dict[str, Any]:
        def of(other: Any) -> Any:
            columns = config.columns if other.columns is None else other.columns
            return config.model_copy(update={"data": other.data, "split": other.split, "columns": columns})

        return {f"set.{name}": of(other) for name, other in config.also.items()}

    def check(self, config: ZeroshotEval, loaded: Loaded) -> None:
        super().check(config, loaded)
        every: list[Any] = [config, *config.also.values()]
        for one in every:
            if one.templates is not None:
                Prompts.of(one.templates)
            if one.classes:
                NamesFile.read(expanded(one.classes))
        if config.set_metrics:
            named = read_metrics(expanded(config.set_metrics))
            if lost := [name for name in config.also if name not in named]:
                raise BadInput(f"{config.set_metrics} names no metric of {lost[0]}", f"it names {', '.join(named)}", "add a row")
            if strange := [name for name in named if name not in (OWN, *config.also)]:
                known = ", ".join((OWN, *config.also))
                raise BadInput(
                    f"{config.set_metrics} names the set {strange[0]}", f"the sets are {known}", "measure it too: --set also.NAME=DATA"
                )

    def evaluate(
        self, config: ZeroshotEval, loaded: Loaded, source: Any, *, title: str, quiet: bool, others: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """`metric`, `templates`, `class_count`, `candidates`, `sets`, `influence` and `metrics`.

        The metrics are those of :func:`tasks.class_metrics.tell`, whose `accuracy` is called `top1_accuracy`; `sets` of them has those of
        further sets, and `sets_mean` is the mean of what these are judged by.
        """
        sets = list(sets_of(config, source, others or {}))
        texts = texts_of(loaded)
        counted_names = [of_names(texts, one.classes, one.prompts) for one in sets]
        for one, (_, remarks) in zip(sets, counted_names, strict=True):
            for remark in (*one.classes.remarks, *remarks):
                say(f"{title if one.name == OWN else f'eval {one.name}'}: {remark}", quiet=quiet)
        features: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        metrics: dict[str, Any] = {}
        values: dict[str, float] = {}
        for one, (counts, _) in zip(sets, counted_names, strict=True):
            shown: dict[str, Any] = {"title": title if one.name == OWN else f"eval {one.name}", "quiet": quiet}
            key = tuple(one.classes.names), tuple(one.prompts.templates)
            if key not in features:
                features[key] = class_features(loaded, texts, one.classes, one.prompts, batch_size=config.batch_size, **shown)
            told, values[one.name] = told_of(loaded, one, features[key], config.batch_size, **shown)
            told |= counts
            if one.name == OWN:
                metrics |= told
            else:
                metrics.setdefault("sets", {})[one.name] = told
        if others:
            counted = [name for name in values if name != OWN or (config.set_metrics and OWN in read_metrics(expanded(config.set_metrics)))]
            metrics["sets_mean"] = sum(values[name] for name in counted) / len(counted)
        for remark in of_read(texts):
            say(f"{title}: {remark}", quiet=quiet)
        own = sets[0]
        return {
            "metric": metric_of(sets, own),
            **record_of(own.prompts),
            "class_count": len(own.classes),
            "candidates": config.candidates,
            **({"sets": {one.name: record(one.source, config.also[one.name].split) for one in sets[1:]}} if others else {}),
            "influence": influence_of(loaded, own, config.batch_size),
            "metrics": {**metrics, "reading": counts_of(texts)},
        }

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        """With the names that the data have, in one sentence each."""
        one = Set(OWN, source, classes_named(classes_of(source), None, source.name), Prompts.of(TEMPLATE))
        features = class_features(loaded, texts_of(loaded), one.classes, one.prompts, batch_size=batch_size, title=title, quiet=quiet)
        return told_of(loaded, one, features, batch_size, title, quiet)[0]

    @torch.inference_mode()
    def choices(self, loaded: Loaded, source: Any, count: int, seed: int) -> list[Choice]:
        """The class of each picture, by its name; none without data that have classes."""
        if source is None:
            return []
        pixels, _ = pictures(loaded, source, count, seed)
        classes = classes_named(classes_of(source), None, source.name)
        shown: dict[str, Any] = {"title": "", "quiet": True}
        features = class_features(loaded, texts_of(loaded), classes, Prompts.of(TEMPLATE), batch_size=count, **shown)
        scores = (features_of(loaded, pixels) @ features.T).cpu()
        return [Choice(classes.keys[best], gap) for best, gap in zip(scores.argmax(1).tolist(), margin(scores).tolist(), strict=True)]

    def reading_of_measuring(self, config: ZeroshotEval, loaded: Loaded, source: Any) -> Reading:
        classes = classes_named(classes_of(source), NamesFile.read(expanded(config.classes)) if config.classes else None, config.data)
        counts, remarks = of_names(texts_of(loaded), classes, Prompts.of(config.templates))
        return Reading({"classes": len(classes), **counts}, [*classes.remarks, *remarks])

    def bytes_of_measuring(self, config: ZeroshotEval, loaded: Loaded, source: Any) -> int:
        """Of a batch of pictures, a block of work, and what is kept of every image."""
        most, size = room(torch.device("cpu")), Footprint.of(loaded.config)
        block = min(most, config.batch_size * max(size.encoding, size.question(loaded.sizes.max_positions)))
        return 2 * config.batch_size * 3 * loaded.sizes.image_size**2 + block + 8 * TOP * len(source)

    def ask(self, config: ZeroshotQuestion, loaded: Loaded) -> dict[str, Any]:
        """See :func:`tasks.classifying.classify`."""
        return classify(config, loaded)


def sets_of(config: ZeroshotEval, source: Any, others: Mapping[str, Any]) -> list[Set]:
    """The set of --data, and all that are measured beside it.

    Raises:
        BadInput: a set has no images, no classes, or one that has no name in its file.
    """
    metrics = read_metrics(expanded(config.set_metrics)) if config.set_metrics else {}
    every: list[tuple[str, Any, Any, str, str]] = [(OWN, source, config, config.data, config.split)]
    every += [(name, others[f"set.{name}"], other, other.data, other.split) for name, other in config.also.items()]
    found = []
    for name, read, own, data, split in every:
        if not len(read):
            raise BadInput(f"{data} has no images", f"split {split} of {read.name}", "use another split")
        file = own.classes or config.classes
        classes = classes_named(classes_of(read), NamesFile.read(expanded(file)) if file else None, data)
        if config.candidates == "present":
            classes = classes.only(present_in(read))
        found.append(Set(name, read, classes, Prompts.of(own.templates or config.templates), metrics.get(name, "accuracy")))
    return found


def metric_of(sets: Sequence[Set], own: Set) -> str:
    what = (
        f"top1_accuracy: the part of the images whose class is the nearest of {len(own.classes):,} by cosine, of its sentences to the image"
    )
    if len(sets) == 1:
        return what
    return f"{what}; sets_mean: the mean over sets, of {', '.join(f'{one.name} {one.metric}' for one in sets[1:])}"


def told_of(loaded: Loaded, one: Set, features: Tensor, batch_size: int, title: str, quiet: bool) -> tuple[dict[str, Any], float]:
    """Metrics of a set, and the value of the one it is judged by.

    Raises:
        BadInput: no image can be read; the metric is none of these data.
    """
    labels, best, scores = answers(loaded, one, features, batch_size, callable(METRICS[one.metric]), title, quiet)
    told = tell(labels, best, one.classes.keys)
    value = judged(one.metric, told, labels, scores)
    if one.metric != "accuracy":
        told[one.metric] = value
    return {"top1_accuracy": told.pop("accuracy"), **told}, value


def answers(
    loaded: Loaded, one: Set, features: Tensor, batch_size: int, keep: bool, title: str, quiet: bool
) -> tuple[list[list[int]], NDArray[np.int64], Scores | None]:
    """The classes of each image as numbers, the five [N, K] that are nearest to it, best first, and with `keep` all cosines [N, C].

    Of equal cosines the first class counts as the nearest.
    """
    index = {key: number for number, key in enumerate(one.classes.keys)}
    labels: list[list[int]] = []
    best: list[Tensor] = []
    kept: list[Tensor] = []
    for items, seen in encoded(loaded, one.source, batch_size, title, quiet):
        scores = seen @ features.T
        labels += [[index[label] for label in item.labels] for item in items]
        best.append(scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP].cpu())
        if keep:
            kept.append(scores.cpu())
    return labels, torch.cat(best).numpy(), torch.cat(kept).numpy() if keep else None


def influence_of(loaded: Loaded, one: Set, batch_size: int) -> Influence:
    """What picture and sentence do to features, for the first images and a sentence of each."""
    items, names = first_of(one.source), dict(zip(one.classes.keys, one.classes.names, strict=True))
    if len(items) < 2:
        return not_measured(f"there are {len(items)} images, and 2 are needed")
    return of_texts(loaded, [item.image for item in items], [one.prompts.texts(names[item.labels[0]])[0] for item in items], batch_size)
