"""Grounding: where in a picture lies what a phrase means. A box is said, or seen by where a network that matches looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import on_device, stack
from efficientvlm.data.boxes import PixelBox, in_pixels
from efficientvlm.data.configured import augmentation
from efficientvlm.data.images import open_sized
from efficientvlm.data.kinds.expressions import EXPRESSIONS, ExpressionItem, asking_batch, expression_batch
from efficientvlm.data.reading import counts_of, of_read
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import Footprint, room, spans
from efficientvlm.families.network import refusal
from efficientvlm.loaded import Loaded, longest, texts_of
from efficientvlm.objectives.grounding import Grounding as Boxes
from efficientvlm.runtime.progress import counted, say
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.stages import Bench
from efficientvlm.settings.tasks import GroundingEval, GroundingQuestion, GroundingSettings
from efficientvlm.tasks import gradcam
from efficientvlm.tasks.boxes import Found, scores
from efficientvlm.tasks.influence import Influence, first_of, measure, not_measured
from efficientvlm.tasks.pictures import picture_path, with_box, write_picture
from efficientvlm.tasks.task import Asked, Learnt, check_question, gain_untrained, held_out, timed_passes
from efficientvlm.training.loop import Batch

EVAL_BATCH = 64
SAMPLE = 1000  # phrases that say how long phrases are
BOXES = (
    "box_accuracy: the part of the phrases whose box overlaps the one that is meant by one half or more; mean_iou: the mean overlap; "
    "centre_accuracy: box_accuracy of a box in the middle, as large as the median box"
)
PUBLISHED = "; boxes may leave their picture, and those that share one row of pixels do not meet (as published)"
Locate = Callable[[Sequence[ExpressionItem]], list[PixelBox]]
"""Pictures to the box of each of their phrases, in order, in pixels of the picture."""


class Grounding(Learnt, Asked):
    """A phrase about a picture to the box that it means, by a head of boxes (X-VLM)."""

    name, kind, needs = "grounding", EXPRESSIONS, ("ground",)
    grows = ("phrases_per_image",)
    also = ("mean_iou",)
    timed_as = "image and phrase tensors to a box; random pixels and tokens, a phrase an image"

    def remedy(self, loaded: Loaded) -> str:
        return "finetune it with --task grounding first" if hasattr(loaded.config, "heads") and "pretrain" in loaded.abilities else ""

    # learning

    def adapt(self, config: GroundingSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """Heads of other tasks are left behind; a network without a head of boxes gets one."""
        tuned: tuple[Any, list[str]] = student.model.gain("ground")
        return tuned

    def changes(self, added: int) -> str:
        what = "a head of boxes takes the place of others" if added > 0 else "heads of other tasks are left behind"
        return f"{what}: {added:+,} parameters"

    def objective(self, config: GroundingSettings, student: Loaded) -> Boxes:
        return Boxes(student.model)

    def batches(self, config: GroundingSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        drawn = {"seed": config.seed, "step": step, **augmentation(config), **settings_of(config, "phrases_per_image")}
        return [expression_batch(items, texts, **drawn)]

    def validate(self, config: GroundingSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        size = config.eval_batch_size or EVAL_BATCH
        return measured_on(student, held_out(source, config.eval_limit, "validate", quiet), batch_size=size, title="validate", quiet=quiet)

    def influence(self, config: GroundingSettings, student: Loaded, source: Any) -> Influence:
        return of_expressions(student, source, config.eval_batch_size)

    def bytes_of_cached_teacher(self, config: GroundingSettings, teacher: Loaded, source: Any, images_seen: int) -> int:
        return sum(1 for _ in source.texts()) * 16

    # measuring

    def check(self, config: GroundingEval, loaded: Loaded) -> None:
        if config.mode == "box":
            super().check(config, loaded)
            return
        if "match" not in loaded.abilities:
            raise refusal(loaded.config, "match", str(loaded.path))
        _, layers = gradcam.crossing(loaded.model)
        if config.layer is not None and config.layer >= layers:
            raise BadInput(
                f"layer {config.layer}",
                f"{loaded.path} has {layers} layers that see images",
                f"use 0 to {layers - 1}" if layers > 1 else "use 0",
            )

    def evaluate(self, config: GroundingEval, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        """Every phrase of `source` looked for in its picture: `metric`, `mode`, with Grad-CAM its `layer`, `metrics`."""
        if not len(source):
            raise BadInput(f"{config.data} has no images", f"split {config.split} of {source.name}", "use another --split")
        shown: dict[str, Any] = {"title": title, "quiet": quiet, "batch_size": config.batch_size, "published": config.as_published}
        told: dict[str, Any] = {"metric": BOXES + PUBLISHED * config.as_published, "mode": config.mode}
        if config.mode == "box":
            return {**told, "influence": of_expressions(loaded, source, config.batch_size), "metrics": measured_on(loaded, source, **shown)}
        layers = gradcam.crossing(loaded.model)[1]
        layer = layers // 2 if config.layer is None else config.layer
        texts = texts_of(loaded)
        looked = Looked(loaded, texts, layer)
        measured = measured_on(loaded, source, texts=texts, locate=looked, **shown)
        influence = not_measured("where a network looks is measured, not what it says")
        return {**told, "layer": layer, "influence": influence, "metrics": {**measured, "phrases_with_detections": looked.chosen}}

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        return measured_on(loaded, source, batch_size=batch_size, title=title, quiet=quiet)

    def bytes_of_measuring(self, config: GroundingEval, loaded: Loaded, source: Any) -> int:
        """Of a batch of images with their phrases."""
        tokens = longest(loaded, list(islice(source.texts(), SAMPLE)), 40)
        size, most = Footprint.of(loaded.config), room(torch.device("cpu"))
        images = min(len(source), config.batch_size)
        return 2 * images * 3 * loaded.sizes.image_size**2 + min(most, images * (size.image + size.question(tokens)))

    # asking

    def ask(self, config: GroundingQuestion, loaded: Loaded) -> dict[str, Any]:
        """`box`: left, top, width and height in pixels of the picture; with `out` it is drawn into a copy of it.

        Raises:
            BadInput: an image that is missing, damaged or huge, a phrase that is too long, an `out` that cannot be written.
        """
        (image,), phrase = config.image, config.question
        path = picture_path(config.out, [image]) if config.out else None
        pixels, size = open_sized(image, loaded.preprocessing)
        texts = texts_of(loaded)
        check_question(texts, phrase, "phrase")
        ids, mask = texts.batch([phrase])
        batch = {"pixels": stack([pixels]), "image_index": torch.zeros(1, dtype=torch.long), "question_ids": ids, "question_mask": mask}
        with torch.inference_mode():
            said = loaded.model.eval().ground(on_device(batch, loaded.model.device))["boxes"][0].tolist()
        box = in_pixels(said, size, loaded.preprocessing)
        rounded = dict(zip(("left", "top", "width", "height"), (round(part, 1) for part in box), strict=True))
        answer = ", ".join(f"{name} {value:g}" for name, value in rounded.items())
        found: dict[str, Any] = {"question": phrase, "answer": answer, "box": rounded, "image_size": list(size)}
        return {**found, "out": write_picture(with_box(image, box), path)} if path else found

    def can_be_timed(self, models: Sequence[Loaded]) -> bool:
        """Where one of them grounds."""
        return any(map(self.able, models))

    def make_able(self, loaded: Loaded) -> None:
        """Leave the heads of other tasks behind, and give a network that has none an untrained head of boxes."""
        gain_untrained(loaded, "ground")

    def timed(self, loaded: Loaded, config: Bench, device: torch.device, among: Sequence[Loaded], quiet: bool) -> Callable[[int], object]:
        self.make_able(loaded)
        return timed_passes(loaded, config, device, lambda batch: loaded.model.ground(batch))


def said_by(loaded: Loaded, texts: Texts, *, cut: bool = True) -> Locate:
    """The boxes that the head of boxes says, cut to their pictures."""
    model, size = loaded.model.eval(), Footprint.of(loaded.config)

    @torch.inference_mode()
    def locate(items: Sequence[ExpressionItem]) -> list[PixelBox]:
        batch = asking_batch(items, texts)
        owners: list[int] = batch["image_index"].tolist()
        said: list[list[float]] = []
        for start, stop in spans(owners, size.image, size.question(batch["question_ids"].shape[1]), room(model.device)):
            first, last = owners[start], owners[stop - 1]
            part = {name: batch[name][start:stop] for name in ("question_ids", "question_mask")}
            part |= {"pixels": batch["pixels"][first : last + 1], "image_index": batch["image_index"][start:stop] - first}
            said += model.ground(on_device(part, model.device))["boxes"].float().tolist()
        return [in_pixels(box, items[row].size, items[row].how, cut=cut) for row, box in zip(owners, said, strict=True)]

    return locate


class Looked:
    """The boxes that a network which matches looks at; `chosen` counts the phrases whose data give boxes to choose from."""

    def __init__(self, loaded: Loaded, texts: Texts, layer: int) -> None:
        self.model, _ = loaded.model.gain("match")
        for name, parameter in self.model.eval().named_parameters():
            parameter.requires_grad_(self.model.tower_of(name) != "vision")  # so that no pass through images is kept
        self.at_once = max(1, min(EVAL_BATCH, room(self.model.device) // Footprint.of(loaded.config).encoding))
        self.texts, self.layer, self.chosen = texts, layer, 0

    def __call__(self, items: Sequence[ExpressionItem]) -> list[PixelBox]:
        batch = on_device(asking_batch(items, self.texts), self.model.device)
        found = []
        for rows in torch.arange(len(batch["image_index"]), device=self.model.device).split(self.at_once):
            some = {f"text_{part}": batch[f"question_{part}"][rows] for part in ("ids", "mask")}
            found += list(gradcam.maps(self.model, {"pixels": batch["pixels"][batch["image_index"][rows]], **some}, self.layer)[0])
        meant = [(item, expression) for item in items for expression in item.expressions]
        self.chosen += sum(bool(expression.candidates) for _, expression in meant)
        return [gradcam.pick(map_, expression.candidates, item.size) for map_, (item, expression) in zip(found, meant, strict=True)]


def measured_on(
    loaded: Loaded,
    source: Any,
    *,
    batch_size: int,
    title: str,
    quiet: bool,
    texts: Texts | None = None,
    locate: Locate | None = None,
    published: bool = False,
) -> dict[str, Any]:
    """Metrics of :func:`tasks.boxes.scores` over all phrases of `source`, whose boxes `locate` finds; it reads them by `texts`."""
    texts = texts or texts_of(loaded)
    locate = locate or said_by(loaded, texts, cut=not published)
    found: list[Found] = []
    images = 0
    starts = range(0, len(source), batch_size)
    for _, items in zip(counted(starts, title, len(source), quiet), usable_batches(source, starts, len(source)), strict=True):
        if not items:
            continue
        images += len(items)
        meant = [(item, expression) for item in items for expression in item.expressions]
        for said, (item, expression) in zip(locate(items), meant, strict=True):
            found.append(Found(said, expression.box, item.size, expression.part))
    for remark in of_read(texts):
        say(f"{title}: {remark}", quiet=quiet)
    return {"images": images, **scores(found, inclusive=published), "reading": counts_of(texts)}


def of_expressions(loaded: Loaded, source: Any, batch_size: int | None = None) -> Influence:
    """What picture and phrase do to the box, for the first images of `source` and one phrase of each."""
    items: list[ExpressionItem] = first_of(source)
    if len(items) < 2:
        return not_measured(f"there are {len(items)} images with phrases, and 2 are needed")
    model = loaded.model.eval()
    ids, mask = texts_of(loaded).batch([item.expressions[at % len(item.expressions)].phrase for at, item in enumerate(items)])
    batch = on_device({"pixels": stack([item.image for item in items]), "question_ids": ids, "question_mask": mask}, model.device)

    def run(batch: Batch) -> tuple[dict[str, torch.Tensor], Sequence[str]]:
        return {"box": model.ground(batch)["boxes"]}, []

    return measure(run, batch, {"image": ("pixels",), "text": ("question_ids", "question_mask")}, batch_size)
