"""Visual question answering: loss over weighted answers, closed-list ranking, open generation, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.footprint import Footprint, room, spans, tiles
from efficientvlm.families.network import Generates
from efficientvlm.families.towers.attention import Context
from efficientvlm.families.towers.decoding import Choose, LengthRule, Rules, beam, continued, likeliest, stepping
from efficientvlm.objectives.losses import sequence_nll
from efficientvlm.tasks.vqa_answers import normalised

ANNOTATORS = 10  # a question with so many answers is one of VQAv2's kind


@torch.inference_mode()
def rank(
    model: Generates,
    batch: dict[str, Any],
    candidates: tuple[Tensor, Tensor],
    *,
    top: int,
    first_token_twice: bool = False,
    smoothing: float = 0.0,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Closed-list answers: candidate indices [Q, K] and their probabilities among those K, best first (ALBEF / X-VLM / BLIP).

    The probability of each candidate's first token picks K = min(top, candidates); the score of those is minus their sequence NLL, plus
    once more the first token's log probability when `first_token_twice` (as X-VLM's code does). With `smoothing` that NLL is the smoothed
    loss (as in BLIP's code, 0.1), whose second part prefers short answers whatever is asked. `candidates` are (ids, mask) [C, L].

    The work is done in blocks of at most `most` bytes each, by default what the device has room for: some questions with their images,
    and of those some candidates at a time. Memory does not grow with the batch, and the result does not depend on it.
    """
    ids, mask = candidates
    top, most = min(top, len(ids)), most or room(ids.device)
    size = Footprint.of(model.config)
    how = top, 1 + first_token_twice, smoothing
    parts = [_rank(model, part, ids, mask, how, size, most) for part in in_parts(batch, size, most)]
    if not parts:
        return ids.new_empty(0, top), torch.empty(0, top, device=ids.device)
    chosen, probabilities = (torch.cat(found) for found in zip(*parts, strict=True))
    return chosen, probabilities


def _rank(
    model: Generates, batch: dict[str, Any], ids: Tensor, mask: Tensor, how: tuple[int, int, float], size: Footprint, most: int
) -> tuple[Tensor, Tensor]:
    top, times, smoothing = how
    _, context = model.encode(batch)
    questions, cache = len(batch["question_ids"]), model.new_cache()
    start = ids[:1, :1].expand(questions, 1)
    likelihood = model.decode(context, start, None, None, cache)[:, 0].float().log_softmax(-1)
    first_score, chosen = likelihood[:, ids[:, 1]].topk(top, dim=1)
    score = first_score * (times - smoothing) + smoothing * likelihood.mean(-1, keepdim=True)
    lengths = mask.sum(1)
    by_length = lengths[chosen].argsort(dim=1, stable=True)  # candidates of about one length together, so that little is padding
    longest = int(lengths[chosen].max())
    if longest > 2:  # the start is in the cache, and the last token of a sequence predicts nothing that is scored
        one = size.answer(longest - 2, batch["question_ids"].shape[1])
        for some, of_them in tiles(questions, top, one, most):
            at = by_length[some, of_them]
            part = chosen[some].gather(1, at)
            rows = torch.arange(some.start, some.stop, device=ids.device).repeat_interleave(part.shape[1])
            width = max(3, int(lengths[part].max()))
            picked, seen = ids[part.flatten(), :width], mask[part.flatten(), :width]
            logits = model.decode(context, picked[:, 1:-1], None, rows, cache.select(rows))
            score[some].scatter_add_(1, at, -sequence_nll(logits, picked[:, 1:], seen[:, 1:], smoothing).view(part.shape))
    probabilities, order = score.softmax(1).sort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order), probabilities


def in_parts(batch: dict[str, Any], size: Footprint, most: int, more: int = 0) -> Iterator[dict[str, Tensor]]:
    """What a network reads of a `vqa_batch`, in runs of questions with their images that take at most `most` bytes each; a question takes
    `more` besides."""
    ids = batch["question_ids"]
    index = batch["image_index"] if "image_index" in batch else torch.arange(len(ids), device=ids.device)
    for start, stop in spans(index.tolist(), size.image, size.question(ids.shape[1]) + more, most):
        images, rows = index[start:stop].unique(return_inverse=True)
        part = {"pixels": batch["pixels"][images], "image_index": rows}
        part |= {name: batch[name][start:stop] for name in ("question_ids", "question_mask")}
        if "distinct_index" in batch:
            entries, at = batch["distinct_index"][start:stop].unique(return_inverse=True)
            first = torch.empty_like(entries).scatter_(0, at.flip(0), torch.arange(stop - start, device=at.device).flip(0))
            part |= {"distinct_questions": first, "distinct_index": at}
        yield part


@torch.inference_mode()
def generate(
    model: Generates,
    batch: dict[str, Any],
    *,
    cls_id: int,
    sep_id: int,
    max_tokens: int,
    beams: int = 1,
    length_rule: LengthRule = "published",
    attends_padding: bool = False,
    most: int | None = None,
    choose: Callable[[], Choose] = lambda: likeliest,
) -> Tensor:
    """Answers [Q, <= max_tokens] with a key/value cache, greedy or the best that `beams` show; all after the separator is the separator.

    `attends_padding`: answers attend to the padding of questions too, as in BLIP's code and in transformers, so that they depend on the
    questions beside them. Done in blocks of at most `most` bytes, as :func:`rank`, each with what `choose` returns where beams are one.
    """
    device = batch["question_ids"].device
    size, rules = Footprint.of(model.config), Rules(sep_id, sep_id, max_tokens)
    kept = size.writing(1 + max_tokens) * beams if beams > 1 else 0
    parts = []
    for part in in_parts(batch, size, most or room(device), kept):
        _, context = model.encode(part)
        step = stepping(model, _unmasked(context) if attends_padding else context)
        start = part["question_ids"].new_full((len(part["question_ids"]), 1), cls_id)
        if beams > 1:
            parts.append(beam(step, start, rules, beams, length_rule=length_rule).ids[:, 0])
        else:
            parts.append(continued(step, start, rules, choose()))
    longest = max((part.shape[1] for part in parts), default=0)
    padded = [F.pad(part, (0, longest - part.shape[1]), value=sep_id) for part in parts]
    return torch.cat(padded) if padded else batch["question_ids"].new_empty(0, 0)


def _unmasked(context: Any) -> Any:
    """What a network, or a graph, attends to of questions, with their padding."""
    if isinstance(context, Context):
        return replace(context, mask=None)
    return {**context, "question_mask": torch.ones_like(context["question_mask"])}


def soft_accuracy(guess: str, given: Sequence[tuple[str, float]], annotators: int) -> float:
    """VQAv2's accuracy of one answer: min(1, n / 3), averaged over all ways to leave one annotator out.

    `given` holds distinct answers with weights that sum to the same whole; n of the `annotators` left gave `guess`.
    """
    whole = sum(weight for _, weight in given)
    same = round(annotators * sum(weight for text, weight in given if text == guess) / whole) if whole else 0
    without_a_same, without_another = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    return (same * without_a_same + (annotators - same) * without_another) / annotators


def accuracy(predicted: Sequence[str], answers: Sequence[Sequence[tuple[str, float]]]) -> float:
    """Mean weight of the predicted answer among the annotated ones, at most 1: exact match where there is one answer."""
    hits = [min(1.0, sum(weight for text, weight in given if text == guess)) for guess, given in zip(predicted, answers, strict=True)]
    return sum(hits) / len(hits) if hits else 0.0


Read = Callable[[str], "str | None"]


def as_it_is(text: str) -> str | None:
    """Text that stands for itself; nothing is no answer."""
    return text or None


def evaluate(
    predict: Callable[[dict[str, Any]], list[str]],
    batches: Iterable[dict[str, Any]],
    as_read: Read = as_it_is,
    can_say: Callable[[str], bool] = lambda read: True,
) -> dict[str, Any]:
    """Accuracy of `predict` over batches of `data.kinds.questions.vqa_batch(train=False)`, overall and for each annotated answer's kind.

    Both sides are compared as `as_read` gives them: what a tokenizer cannot tell apart (case, spacing) is no mistake, and a text that it
    cannot read (None) is never right. A question with ten annotators is measured as VQAv2 does, with its normalisation of answers; any
    other by the weight of the answer given.

    Args:
        can_say: whether an answer, as it is read, could be given at all.

    Returns `accuracy` with its `standard_error` (of a mean over questions), `questions`, `majority_accuracy` (of one answer to all of them,
    the most frequent), the accuracy of the questions whose answer is yes or no and of the others, `soft_questions`, those with ten
    annotators, if there are any, and `unanswerable`, the questions of which no accepted answer can be read and said, if there are any.
    """
    guesses: list[str] = []
    answers: list[list[tuple[str, float]]] = []
    annotators: list[int] = []
    for batch in batches:
        guesses += predict(batch)
        answers += batch["answer_texts"]
        annotators += batch.get("annotators") or [0] * len(batch["answer_texts"])
    seen = {text: as_read(text) for text in {*guesses, *(text for given in answers for text, _ in given)}}
    official = {text: as_read(normalised(text)) for text in seen} if ANNOTATORS in annotators else {}
    forms: list[dict[str, str | None]] = []
    accepted: list[list[tuple[str | None, float]]] = []
    for given, count in zip(answers, annotators, strict=True):
        disagree = count == ANNOTATORS and len(given) > 1  # with one answer only, the published evaluation compares it as it is
        forms.append(official if disagree else seen)
        accepted.append([(forms[-1][text], weight) for text, weight in given])
    read = (form[guess] for form, guess in zip(forms, guesses, strict=True))
    hits = [score(*case) for case in zip(read, accepted, annotators, strict=True)]
    closed = [any(text in ("yes", "no") for text, _ in given) for given in accepted]
    said: dict[str, float] = {}
    for text, weight in (pair for given in accepted for pair in given):
        if text is not None:
            said[text] = said.get(text, 0.0) + weight
    most = max(said, key=lambda text: (said[text], text), default=None)
    always = [score(most, *case) for case in zip(accepted, annotators, strict=True)]
    able = {text for text in {text for given in accepted for text, _ in given} if text is not None and can_say(text)}
    lost = sum(able.isdisjoint(text for text, _ in given) for given in accepted)
    result: dict[str, Any] = {
        "accuracy": mean(hits),
        "standard_error": standard_error(hits),
        "questions": len(guesses),
        "majority_accuracy": mean(always),
    }
    for name, wanted in (("yes_no", True), ("other", False)):
        if any(kind is wanted for kind in closed):
            result[f"accuracy_{name}"] = mean([hit for hit, kind in zip(hits, closed, strict=True) if kind is wanted])
    soft = annotators.count(ANNOTATORS)
    return result | ({"soft_questions": soft} if soft else {}) | ({"unanswerable": lost} if lost else {})


def score(guess: str | None, given: Sequence[tuple[str | None, float]], annotators: int) -> float:
    """Accuracy of one answer by the measure of its question; 0 for one that cannot be read."""
    if guess is None:
        return 0.0
    read = [(text, weight) if text is not None else ("", weight) for text, weight in given]
    return soft_accuracy(guess, read, annotators) if annotators == ANNOTATORS else accuracy([guess], [read])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent `values`; None for fewer than two."""
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values)) if len(values) > 1 else None
