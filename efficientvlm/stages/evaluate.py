"""eval: the metrics of a checkpoint on a split of some data."""

from __future__ import annotations

import time
from typing import Any

from efficientvlm.checkpoint import fingerprint
from efficientvlm.control import Control
from efficientvlm.data.answer_list import as_input
from efficientvlm.data.opening import record
from efficientvlm.errors import BadInput
from efficientvlm.hardware import autocast, pick_device
from efficientvlm.manifest import Manifest
from efficientvlm.memory import enough_memory
from efficientvlm.progress import say
from efficientvlm.settings.stages import Eval
from efficientvlm.settings.tasks import RetrievalEval, VQAEval
from efficientvlm.stages import influence
from efficientvlm.stages.answering import Answerer, evaluate_on, listed_answers
from efficientvlm.stages.common import Loaded, check_precision, keep_length, load, say_notes, say_skipped
from efficientvlm.stages.influence import tell
from efficientvlm.stages.results import ResultFile
from efficientvlm.stages.retrieving import check_able, evaluate_pairs
from efficientvlm.stages.tasks import TASKS

WEIGHT = "accuracy: the weight of the answer given among the annotated ones, at most 1, averaged over all questions"
SOFT = "accuracy: min(1, n / 3) where n of nine of the ten annotators gave this answer, averaged over which one is left out (VQAv2)"

CONTRAST = "mean_recall: recall at 1, 5 and 10 of captions by images and of images by captions, among all of them, by cosine; their mean"
RERANKED = f"{CONTRAST}; reranked_mean_recall: the same with the best candidates of every query in the order of their matching logits"


def run(config: Eval, control: Control) -> dict[str, Any]:
    """Measure the task's metrics on the split; nothing is trained.

    With `config.out`, a finished result of the same checkpoint, data and settings is returned as it is, unless forced.

    Raises:
        BadInput: a checkpoint that does not do the task, no list of answers, nothing to measure on, an `out` of another measurement.
    """
    loaded = load(config.model, exported=True)
    check_precision(loaded, config.precision)
    keep_length(loaded, config.max_tokens)
    if isinstance(config, RetrievalEval):
        check_able(loaded, config.rerank)
    source = TASKS[config.task].open(config, config.split, loaded.preprocessing)
    inputs = {"model": fingerprint(config.model), "data": source.fingerprint}
    if isinstance(config, VQAEval) and config.answers:
        inputs["answers"] = fingerprint(as_input(config.answers) or "")
    file = ResultFile.open(config, "eval", inputs, force=control.force)
    if file.finished:
        say("\n  ".join([f"eval: {file.path} is up to date", *file.differing]), quiet=control.quiet)
        return file.finished
    say_notes(source, config.split, control.quiet)
    device = pick_device(config.device)
    loaded.model.to(device)
    began = time.monotonic()
    measure: Any = pairs if isinstance(config, RetrievalEval) else answers
    with enough_memory("evaluation", f"lower batch_size (now {config.batch_size})"), autocast(device, config.precision):
        found = measure(config, control, loaded, source)
    tell("eval", found["influence"], control.quiet)
    say_skipped(source, config.split, control.quiet)
    result: dict[str, Any] = {
        "task": config.task,
        "model": config.model,
        "data": record(source, config.split),
        **{key: value for key, value in found.items() if key != "metrics"},
        "device": device.type,
        "precision": getattr(loaded.model.config, "precision", config.precision),
        "seconds": round(time.monotonic() - began, 3),
        "metrics": found["metrics"],
    }
    return file.write(result)


def answers(config: VQAEval, control: Control, loaded: Loaded, source: Any) -> dict[str, Any]:
    """Every question of `source` answered: `metric`, `mode`, how was ranked, `metrics`."""
    listed = listed_answers(config)
    twice = counts_first_token_twice(loaded.manifest, config.first_token_twice)
    answer = Answerer(loaded, mode=config.mode, answers=listed, top=config.rank_top, twice=twice)
    title = f"eval {config.split}"
    measured = evaluate_on(answer, source, limit=None, title=title, quiet=control.quiet, batch_size=config.batch_size)
    if not measured.get("questions"):
        raise BadInput(f"{config.data} has no questions", f"split {config.split} of {source.name}", "use another --split")
    ranked = {"answers": len(answer.answers), "top": min(answer.top, len(answer.answers)), "first_token_twice": twice}
    mode: dict[str, Any] = {"mode": config.mode, **(ranked if config.mode == "rank" else {})}
    return {
        "metric": metric_of(measured),
        **mode,
        "influence": influence.of_answers(answer, source, config.batch_size),
        "metrics": measured,
    }


def pairs(config: RetrievalEval, control: Control, loaded: Loaded, source: Any) -> dict[str, Any]:
    """Every image of `source` looked for by its captions, and the other way round: `metric`, `mode`, `rerank`, `seed`, `metrics`."""
    if not len(source):
        raise BadInput(f"{config.data} has no images", f"split {config.split} of {source.name}", "use another --split")
    measured = evaluate_pairs(
        loaded,
        source,
        limit=None,
        title=f"eval {config.split}",
        quiet=control.quiet,
        batch_size=config.batch_size,
        rerank=config.rerank,
        seed=config.seed,
    )
    mode = "rerank" if config.rerank else "contrast"
    return {
        "metric": RERANKED if config.rerank else CONTRAST,
        "mode": mode,
        "rerank": config.rerank,
        "seed": config.seed,
        "influence": influence.of_pairs(loaded, source, config.batch_size),
        "metrics": measured,
    }


def metric_of(measured: dict[str, Any]) -> str:
    """What `accuracy` means for these questions."""
    soft = measured.get("soft_questions", 0)
    if not soft:
        return WEIGHT
    return SOFT if soft == measured["questions"] else f"{SOFT}; of the {measured['questions'] - soft} questions without ten, {WEIGHT}"


def counts_first_token_twice(manifest: Manifest, asked: bool | None) -> bool:
    """How a checkpoint ranks: as asked, else as it was tuned."""
    return asked if asked is not None else manifest.noted("quirks", dict[str, Any], {}).get("first_token_twice") is True
