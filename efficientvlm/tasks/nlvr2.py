"""Statements about two images, true or false (NLVR2): how they are learnt, measured, asked and timed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import on_device
from efficientvlm.data.configured import augmentation
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.statements import STATEMENTS, Statement, TwoImageItem, statement_batch
from efficientvlm.data.reading import counts_of, of_read
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import Footprint
from efficientvlm.loaded import Loaded, longest, texts_of
from efficientvlm.objectives.comparison import Comparison
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.common import Measuring
from efficientvlm.settings.stages import Bench
from efficientvlm.settings.tasks import NLVR2Question, NLVR2Settings
from efficientvlm.tasks.influence import PICTURES, Influence, first_of, measure, not_measured
from efficientvlm.tasks.remembered import bytes_of_verdicts
from efficientvlm.tasks.task import Asked, Learnt, check_question, held_out, timed_passes
from efficientvlm.training.loop import Batch

EVAL_BATCH = 32  # pairs
SAMPLE = 1000  # statements that say how long texts are
METRIC = (
    "statement_accuracy: the part of the statements that are judged rightly; consistency: the part of the sentences that are judged "
    "rightly about all their pairs of images; the standard error of the accuracy is clustered by sentence"
)


class NLVR2(Learnt, Asked):
    """Cross-entropy of false and true; two images go through the vision tower in one pass (X-VLM, BLIP)."""

    name, kind, needs = "nlvr2", STATEMENTS, ("compare",)
    also = ("consistency",)
    grows = ("statements_per_pair",)
    timed_as = "tensors of two images and a statement to true or false, a statement a sample; random pixels and tokens"

    def remedy(self, loaded: Loaded) -> str:
        heads, gains = getattr(loaded.model.config, "heads", None), getattr(loaded.model.config, "gains", ())
        return "finetune it with --task nlvr2 first" if heads or "compare" in gains else ""

    # learning

    def adapt(self, config: NLVR2Settings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """What sees an image is doubled where it is single, heads of other tasks are left behind, and the head is new."""
        adapted: tuple[Any, list[str]] = student.model.gain("compare")
        return adapted

    def changes(self, added: int) -> str:
        what = "there is cross-attention to each of two images; heads of other tasks are left behind, one that says true or false is new"
        return f"{what}: {added:+,} parameters"

    def objective(self, config: NLVR2Settings, student: Loaded) -> Comparison:
        return Comparison(student.model)

    def batches(self, config: NLVR2Settings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        drawn = {"seed": config.seed, "step": step, **augmentation(config)}
        return [statement_batch(items, texts, **drawn, statements_per_pair=config.statements_per_pair)]

    def validate(self, config: NLVR2Settings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        source = held_out(source, config.eval_limit, "validate", quiet)
        return judged(student, source, batch_size=config.eval_batch_size or EVAL_BATCH, title="validate", quiet=quiet)

    def influence(self, config: NLVR2Settings, student: Loaded, source: Any) -> Influence:
        return of_statements(student, source, config.eval_batch_size)

    def bytes_of_cached_teacher(self, config: NLVR2Settings, teacher: Loaded, source: Any, images_seen: int) -> int:
        return bytes_of_verdicts(source, images_seen)

    # measuring

    def evaluate(self, config: Measuring, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        """Every statement of `source` judged: `metric`, `mode`, `influence`, `metrics`."""
        measured = judged(loaded, source, batch_size=config.batch_size, title=title, quiet=quiet)
        if not measured.get("statements"):
            raise BadInput(f"{config.data} has no statements", f"split {config.split} of {source.name}", "use another --split")
        found = of_statements(loaded, source, config.batch_size)
        return {"metric": METRIC, "mode": "compare", "influence": found, "metrics": measured}

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        return judged(loaded, source, batch_size=batch_size, title=title, quiet=quiet)

    def bytes_of_measuring(self, config: Measuring, loaded: Loaded, source: Any) -> int:
        texts = list(islice(source.texts(), SAMPLE))
        each = len(texts) / max(1, sum(1 for _ in islice(source.contents(), SAMPLE)))
        pairs = min(len(source), config.batch_size)
        return bytes_of_pairs(loaded, pairs, round(pairs * max(1.0, each)), longest(loaded, texts, 40))

    # asking

    def ask(self, config: NLVR2Question, loaded: Loaded) -> dict[str, Any]:
        """Whether a statement about a left and a right image is true, and how probable that is.

        Raises:
            BadInput: an image that is missing, damaged or huge, a statement that is too long, a checkpoint that compares nothing.
        """
        left, right = (open_image(image, loaded.preprocessing) for image in config.image)
        item = TwoImageItem("asked", (left, right), [Statement(config.statement, True, "")])
        texts = texts_of(loaded)
        check_question(texts, config.statement, "statement")
        batch = statement_batch([item], texts, seed=0, step=0, train=False)
        with torch.inference_mode():
            logits = loaded.model.eval().run(on_device(batch, loaded.model.device))["logits"].float()
        probability = float(logits.softmax(-1)[0, 1])
        return {"statement": config.statement, "answer": "true" if probability > 0.5 else "false", "probability_of_true": probability}

    def can_be_timed(self, models: Sequence[Loaded]) -> bool:
        return all(self.able(loaded) for loaded in models)

    def timed(self, loaded: Loaded, config: Bench, device: torch.device, among: Sequence[Loaded], quiet: bool) -> Callable[[int], object]:
        self.make_able(loaded)
        return timed_passes(loaded, config, device, lambda batch: loaded.model.run(batch)["logits"].argmax(-1))

    def bytes_of_timing(self, loaded: Loaded, config: Bench) -> int:
        most = max(config.batch_sizes)
        return bytes_of_pairs(loaded, most, most, config.text_length)


def batches_of(source: Any, texts: Texts, batch_size: int, progress: Callable[[int], object]) -> Iterator[Batch]:
    """All statements of `source`, in order; pairs of which a picture cannot be read are left out."""
    starts = range(0, len(source), batch_size)
    for start, items in zip(starts, usable_batches(source, starts, len(source)), strict=True):
        if items:
            yield statement_batch(items, texts, seed=0, step=0, train=False)
        progress(min(len(source), start + batch_size))


@torch.inference_mode()
def judged(loaded: Loaded, source: Any, *, batch_size: int, title: str, quiet: bool) -> dict[str, Any]:
    """Accuracy and consistency over all statements of `source`, with progress; see :func:`scores`. `pairs` are those of images."""
    if not len(source):
        return {"pairs": 0}
    model, texts, pairs = loaded.model.eval(), texts_of(loaded), 0
    said: list[int] = []
    labels: list[int] = []
    groups: list[str] = []
    with Bar(title, len(source), quiet=quiet) as bar:
        for batch in batches_of(source, texts, batch_size, bar.update):
            said += model.run(on_device(batch, model.device))["logits"].argmax(-1).tolist()
            labels += batch["labels"].tolist()
            groups += batch["groups"]
            pairs += batch["samples"]
    for remark in of_read(texts):
        say(f"{title}: {remark}", quiet=quiet)
    return {"pairs": pairs, **scores(said, labels, groups), "reading": counts_of(texts)}


def scores(said: Sequence[int], labels: Sequence[int], groups: Sequence[str]) -> dict[str, Any]:
    """What verdicts `said` are worth where `labels` are true, and statements of one of `groups` are one sentence.

    Returns `statement_accuracy` with its `standard_error`, clustered by sentence, as statements of one are no independent samples;
    `statements`, `majority_accuracy` (of the more frequent label for all); `consistency`, the part of the sentences that are judged rightly
    about all their images (Suhr et al. 2019), with `consistency_standard_error` and `majority_consistency`, and `sentences`.
    """
    count = len(labels)
    if not count:
        return {"statements": 0}
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    usual: defaultdict[str, list[bool]] = defaultdict(list)
    most = int(2 * sum(labels) >= count)
    for verdict, label, group in zip(said, labels, groups, strict=True):
        hits[group].append(verdict == label)
        usual[group].append(most == label)
    accuracy = sum(map(sum, hits.values())) / count
    sentences, consistent = len(hits), sum(map(all, hits.values())) / len(hits)
    spread = sum((sum(group) - accuracy * len(group)) ** 2 for group in hits.values())
    several = sentences > 1
    return {
        "statement_accuracy": accuracy,
        "standard_error": math.sqrt(spread * sentences / (sentences - 1)) / count if several else None,
        "statements": count,
        "majority_accuracy": sum(map(sum, usual.values())) / count,
        "consistency": consistent,
        "consistency_standard_error": math.sqrt(consistent * (1 - consistent) / (sentences - 1)) if several else None,
        "majority_consistency": sum(map(all, usual.values())) / sentences,
        "sentences": sentences,
    }


def of_statements(loaded: Loaded, source: Any, batch_size: int | None = None) -> Influence:
    """What each of two pictures and the text do to the verdicts, for a statement about each of the first pairs of `source`."""
    items = [item for item in first_of(source) if item.statements]
    chosen = [TwoImageItem(item.id, item.images, [item.statements[at % len(item.statements)]]) for at, item in enumerate(items)]
    if len(chosen) < 2:
        return not_measured(f"there are {len(chosen)} pairs of images with statements, and 2 are needed")
    model = loaded.model
    whole = on_device(statement_batch(chosen, texts_of(loaded), seed=0, step=0, train=False), model.device)
    inputs = {what: (name,) for name, what in PICTURES.items()} | {"text": ("text_ids", "text_mask")}
    batch = {name: whole[name] for names in inputs.values() for name in names}

    def run(batch: Batch) -> tuple[dict[str, Tensor], list[str]]:
        logits = model.run({**batch, "pair_index": torch.arange(len(batch["pixels"]), device=model.device)})["logits"]
        return {"verdict": logits}, ["true" if verdict else "false" for verdict in logits.argmax(-1).tolist()]

    return measure(run, batch, inputs, batch_size)


def bytes_of_pairs(loaded: Loaded, pairs: int, statements: int, tokens: int) -> int:
    """Bytes held while `statements` of `tokens` about `pairs` of images are judged, beside weights."""
    size = Footprint.of(loaded.config)
    return 2 * pairs * (2 * 3 * loaded.sizes.image_size**2 + size.image) + statements * (tokens * size.question_token + size.attended)
