"""eval: the accuracy of a checkpoint on a split of some data."""

from __future__ import annotations

import time
from typing import Any

from efficientvlm.checkpoint import fingerprint
from efficientvlm.config import Eval
from efficientvlm.control import Control
from efficientvlm.data.sources import record
from efficientvlm.errors import BadInput
from efficientvlm.files import resolve
from efficientvlm.hardware import autocast, pick_device
from efficientvlm.manifest import Manifest
from efficientvlm.progress import say
from efficientvlm.stages.answering import Answerer, evaluate_on, open_task, read_answers, tuned_with
from efficientvlm.stages.common import check_precision, load, say_skipped
from efficientvlm.stages.results import ResultFile

WEIGHT = "accuracy: the weight of the answer given among the annotated ones, at most 1, averaged over all questions"
SOFT = "accuracy: min(1, n / 3) where n of nine of the ten annotators gave this answer, averaged over which one is left out (VQAv2)"


def run(config: Eval, control: Control) -> dict[str, Any]:
    """Answer every question of the split and report `metrics`; nothing is trained.

    With `config.out`, a finished result of the same checkpoint, data and settings is returned as it is, unless forced.

    Raises:
        BadInput: a checkpoint without answer decoder, no list of answers to rank, no questions, an `out` of another measurement.
    """
    loaded = load(config.model, exported=True)
    check_precision(loaded, config.precision)
    source = open_task(config, config.split, loaded.sizes.image_size)
    inputs = {"model": fingerprint(config.model), "data": source.fingerprint}
    if config.answers:
        inputs["answers"] = fingerprint(config.answers)
    file = ResultFile.open(config, "eval", inputs, force=control.force)
    if file.finished:
        say(f"eval: {file.path} is up to date", quiet=control.quiet)
        return file.finished
    device = pick_device(config.device)
    loaded.model.to(device)
    answers = read_answers(resolve(config.answers)) if config.answers else None
    twice = counts_first_token_twice(loaded.manifest, config.first_token_twice)
    answer = Answerer(loaded, mode=config.mode, answers=answers, top=config.rank_top, twice=twice)
    began = time.monotonic()
    with autocast(device, config.precision):
        measured = evaluate_on(answer, source, limit=None, title=f"eval {config.split}", quiet=control.quiet, batch_size=config.batch_size)
    say_skipped(source, config.split, control.quiet)
    if not measured.get("questions"):
        raise BadInput(f"{config.data} has no questions", f"split {config.split} of {source.name}", "use another --split")
    ranked = {"answers": len(answer.answers), "top": min(answer.top, len(answer.answers)), "first_token_twice": twice}
    result: dict[str, Any] = {
        "task": config.task,
        "model": config.model,
        "data": record(source, config.split),
        "metric": metric_of(measured),
        "mode": config.mode,
        **(ranked if config.mode == "rank" else {}),
        "device": device.type,
        "precision": getattr(loaded.model.config, "precision", config.precision),
        "seconds": round(time.monotonic() - began, 3),
        "metrics": measured,
    }
    return file.write(result)


def metric_of(measured: dict[str, Any]) -> str:
    """What `accuracy` means for these questions."""
    soft = measured.get("soft_questions", 0)
    if not soft:
        return WEIGHT
    return SOFT if soft == measured["questions"] else f"{SOFT}; of the {measured['questions'] - soft} questions without ten, {WEIGHT}"


def counts_first_token_twice(manifest: Manifest, asked: bool | None) -> bool:
    """How a checkpoint ranks: as asked, else as it was tuned."""
    return asked if asked is not None else bool(tuned_with(manifest, "quirks", {}).get("first_token_twice", False))
