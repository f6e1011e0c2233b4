"""Answers as text and their accuracy: what every stage that evaluates question answering uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.data import reading
from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.answer_list import read_answers
from efficientvlm.data.kinds.questions import vqa_batch
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.network import refusal
from efficientvlm.families.towers.decoding import Choose, likeliest
from efficientvlm.loaded import Loaded, decoded, texts_of
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.tasks import Answered, VQAEval, VQASettings
from efficientvlm.tasks.choices import Choice, Likeliest
from efficientvlm.tasks.influence import Influence, first_of, measure, not_measured
from efficientvlm.tasks.ranking import evaluate, generate, rank
from efficientvlm.tasks.task import held_out
from efficientvlm.training.loop import Batch

EVAL_BATCH = 100


def listed_answers(config: VQASettings | VQAEval) -> list[str] | None:
    """The answers in the file that `config` names; None where it names none."""
    return read_answers(resolve(config.answers)) if config.answers else None


def longest_answer(manifest: Manifest) -> int:
    """Tokens of the longest answer, by the stage that tuned the checkpoint."""
    return int(manifest.noted("max_answer_tokens", Annotated[int, Field(ge=3)], 10))


def evaluation_batches(source: Any, texts: Texts, count: int, batch_size: int = EVAL_BATCH) -> Iterator[Batch]:
    """All questions of the first `count` images, in order; images that cannot be read are left out."""
    for items in usable_batches(source, range(0, count, batch_size), count):
        if items:
            yield vqa_batch(items, texts, seed=0, step=0, train=False)


def remedy(loaded: Loaded) -> str:
    """How a model that answers no questions comes to answer them; empty where it never will."""
    config = loaded.model.config
    heads, gains = getattr(config, "heads", None), getattr(config, "gains", ())
    if heads is None and "answer" not in gains:
        return ""
    if heads is None or "mlm" in heads:
        return "finetune it with --task vqa first"
    return "finetune with --task vqa the pre-trained model it comes from, or this one with a --teacher that answers questions"


class Scoring(NamedTuple):
    """How candidates are ranked, beside their likelihood: whether their first token counts twice, and the label smoothing in it."""

    first_token_twice: bool = False
    smoothing: float = 0.0

    @classmethod
    def of(cls, manifest: Manifest, asked: VQAEval | None = None) -> Scoring:
        """As asked, else as a checkpoint was tuned."""
        quirks = manifest.noted("quirks", dict[str, Any], {})
        smoothing = manifest.noted("label_smoothing", float, 0.0) if quirks.get("smoothed_ranking") is True else 0.0
        tuned = cls(quirks.get("first_token_twice") is True, smoothing)
        if asked is None:
            return tuned
        twice, smoothing = asked.first_token_twice, asked.rank_smoothing
        return cls(tuned.first_token_twice if twice is None else twice, tuned.smoothing if smoothing is None else smoothing)

    @classmethod
    def learnt(cls, config: VQASettings) -> Scoring:
        """As a stage that tunes has it."""
        return cls(config.quirks.first_token_twice, config.label_smoothing if config.quirks.smoothed_ranking else 0.0)

    @property
    def said(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"first_token_twice": self.first_token_twice, **({"rank_smoothing": self.smoothing} if self.smoothing else {})}


class Answerer:
    """Answers as text: the best of the closed list in the configuration, or in mode `generate` free text, both as `how` says."""

    def __init__(
        self,
        loaded: Loaded,
        how: Answered | None = None,
        *,
        answers: list[str] | None = None,
        top: int | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        self.loaded, self.how = loaded, how or Answered()
        self.mode, self.scoring = self.how.mode, scoring or Scoring.of(loaded.manifest)
        mode, config = self.mode, loaded.config
        self.texts = texts_of(loaded)
        self.answers = list(answers or config.answers or [])
        self.top = top or config.rank_top
        self.device = loaded.model.device
        self.room = self.texts.room(self.longest - 1)
        self.reading, self.listed = reading.Reading(), frozenset[Any]()
        if "answer" not in loaded.abilities:
            raise refusal(config, "answer", str(loaded.path), fix=remedy(loaded))
        if (most := self.how.max_length or 0) > (positions := loaded.sizes.max_positions):
            raise BadInput(f"max_length {most}", f"{loaded.path} has {positions} positions for tokens", f"use at most {positions}")
        if mode == "rank":
            if not self.answers:
                raise BadInput(f"{loaded.path} has no list of answers", "", "give --answers FILE, or use generation")
            self.reading = reading.of_answers(self.texts, self.answers, self.room)
            first: dict[tuple[int, ...] | None, str] = {}  # "Red" and "red" are one answer to the model
            for answer, identity in zip(self.answers, self.texts.identities(self.answers), strict=True):
                first.setdefault(identity, answer)
            first.pop(None, None)
            if not first:
                why = f"it has no tokens for them: {reading.named(self.answers)}"
                raise BadInput("no answer can be read by the tokenizer", why, "use a model made with a tokenizer for these answers")
            self.answers, self.listed = list(first.values()), frozenset(first)
            ids, mask = self.texts.batch(self.answers)
            self.candidates = ids.to(self.device), mask.to(self.device)

    def on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}

    def scored(self, batch: Batch) -> list[list[tuple[str, float]]]:
        """Ranked answers with probabilities, best first, for each question."""
        scoring = self.scoring._asdict()
        chosen, probabilities = rank(self.loaded.model, self.on_device(batch), self.candidates, top=self.top, **scoring)
        return [
            [(self.answers[i], p) for i, p in zip(row, row_p, strict=True)]
            for row, row_p in zip(chosen.tolist(), probabilities.tolist(), strict=True)
        ]

    def __call__(self, batch: Batch) -> list[str]:
        """One answer a question."""
        if self.mode == "rank":
            return [row[0][0] for row in self.scored(batch)]
        return [self.decoded(row) for row in self.generated(batch).tolist()]

    def generated(self, batch: Batch, choose: Callable[[], Choose] = lambda: likeliest) -> Tensor:
        """Tokens of one answer a question, those behind its end included."""
        how = settings_of(self.how, "beams", "length_rule") | {"attends_padding": self.attends_padding}
        how |= {"cls_id": self.texts.start, "sep_id": self.texts.sep, "max_tokens": self.longest - 1}
        return generate(self.loaded.model, self.on_device(batch), **how, choose=choose)

    def greedy(self, batch: Batch) -> list[Choice]:
        """One answer a question, written freely."""
        made: list[Likeliest] = []

        def choose() -> Likeliest:
            made.append(Likeliest(self.texts.sep))
            return made[-1]

        rows = self.generated(batch, choose).tolist()
        margins = [margin for block in made for margin in block.margins.tolist()]
        return [Choice(self.decoded(row), margin) for row, margin in zip(rows, margins, strict=True)]

    @property
    def attends_padding(self) -> bool:
        return isinstance(self.how, VQAEval) and self.how.attends_padding

    @property
    def longest(self) -> int:
        """Most tokens of an answer that is generated, its first one included."""
        return self.how.max_length or 1 + longest_answer(self.loaded.manifest)

    @property
    def said(self) -> dict[str, Any]:
        """What a result says of how answers came about."""
        if self.mode == "rank":
            return {"answers": len(self.answers), "top": min(self.top, len(self.answers)), **self.scoring.said}
        search = settings_of(self.how, "beams", "length_rule") if self.how.beams > 1 else {}
        padding = {"attends_padding": True} if self.attends_padding else {}
        return {"manner": {"decoding": "beam" if search else "greedy", "max_length": self.longest, **search, **padding}}

    def decoded(self, ids: list[int]) -> str:
        return decoded(self.loaded, self.texts, ids)

    def as_read(self, answer: str) -> str | None:
        """An annotated answer as this model could say it, through its tokens and back; None where its tokenizer cannot read it."""
        (ids,) = self.texts.identities([answer])
        return None if ids is None else self.decoded(list(ids)) or None

    def can_say(self, read: str) -> bool:
        """Whether the closed list has an answer, or generation room for it; `read` is as :meth:`as_read` gives it."""
        (ids,) = self.texts.identities([read])
        return ids in self.listed if self.mode == "rank" else ids is not None and len(ids) <= self.room + 1


def evaluate_on(
    answer: Answerer, source: Any, *, limit: int | None, title: str, quiet: bool, batch_size: int = EVAL_BATCH
) -> dict[str, Any]:
    """Accuracy of `answer` over `source`, or over `limit` images drawn from it, with progress.

    `reading` counts what the tokenizer could not read.
    """
    source = held_out(source, limit, title, quiet)
    count = len(source)
    for remark in reading.titled(title, answer.reading):
        say(remark, quiet=quiet)
    if not count:
        return {"images": 0}
    answer.loaded.model.eval()
    with Bar(title, count, quiet=quiet) as bar:
        done = 0

        def batches() -> Iterator[Batch]:
            nonlocal done
            for batch in evaluation_batches(source, answer.texts, count, batch_size):
                yield batch
                done += len(batch["pixels"])
                bar.update(done)

        result = evaluate(answer, batches(), answer.as_read, answer.can_say)
    lost, texts = result.get("unanswerable", 0), answer.texts
    for remark in (*reading.unanswerable(lost, result["questions"]), *reading.of_read(texts)):
        say(f"{title}: {remark}", quiet=quiet)
    counts = {**answer.reading.counts, **reading.counts_of(texts)}
    return {"images": done, **result, "reading": counts}


def of_answers(answer: Answerer, source: Any, batch_size: int | None = None) -> Influence:
    """What picture and question do to the answers to one question about each of the first images of `source`."""
    items = [item for item in first_of(source) if item.questions]
    chosen = [replace(item, questions=[item.questions[number % len(item.questions)]]) for number, item in enumerate(items)]
    if len(chosen) < 2:
        return not_measured(f"there are {len(chosen)} images with questions, and 2 are needed")
    whole = answer.on_device(vqa_batch(chosen, answer.texts, seed=0, step=0, train=False))
    batch = {name: whole[name] for name in ("pixels", "question_ids", "question_mask")}
    model = answer.loaded.model

    def run(batch: Batch) -> tuple[dict[str, Tensor], list[str]]:
        count, device = len(batch["pixels"]), answer.device
        batch = {**batch, "image_index": torch.arange(count, device=device)}
        start = torch.full((count, 1), answer.texts.start, device=device)
        _, context = model.encode(batch)
        return {"answer": model.decode(context, start, None, None, model.new_cache())}, answer(batch)

    return measure(run, batch, {"image": ("pixels",), "text": ("question_ids", "question_mask")}, batch_size)
