"""Bytes that a stage holds beside weights while it computes, by formula from the shapes of its batches (ours); `--measure` runs real steps.

Without gradients work is done in blocks, of which the largest counts (`families.footprint`). With gradients every layer keeps what its
backward pass reads; the numbers of values a token are those of our layers, counted on real steps (`benchmarks/memory.py`).
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from efficientvlm.config import TaskStage
from efficientvlm.data.shapes import SAMPLED_TEXTS, Shapes
from efficientvlm.families.footprint import FLOAT, Footprint, room
from efficientvlm.stages.common import Loaded, texts_of

KEPT = 18  # values of a token in units of the width that a layer keeps for its backward pass
CROSS = 5  # more of a layer that also attends to another tower
LOGITS = 3  # logits, their log probabilities, and the gradient of either
SAMPLE = 1000  # questions or texts that say how long texts are


def longest(loaded: Loaded, texts: list[str], most: int) -> int:
    """Tokens of the longest of `texts` with its ends, at most `most`."""
    read = texts_of(loaded, most)
    return int(read.batch(texts)[0].shape[1]) if texts else 2


def answering(loaded: Loaded, *, images: int, questions: float, tokens: int, top: int, device: torch.device | None = None) -> int:
    """Of ranking answers to `questions` of `tokens` about each of `images` read at a time."""
    config = loaded.model.config
    size, most = Footprint.of(loaded.family, config), room(device or torch.device("cpu"))
    asked = max(1, round(images * questions))
    answers = longest(loaded, list(config.answers or [])[:SAMPLE], 40)
    one = size.answer(max(0, answers - 2), tokens)
    block = min(most, images * size.image + asked * size.question(tokens))
    rows = min(max(most, one), asked * min(top, len(config.answers or [])) * one)
    pixels = 2 * images * 3 * loaded.sizes.image_size**2
    return round(pixels + block + rows)


def retrieving(loaded: Loaded, *, images: int, batch_size: int, tokens: int) -> int:
    """Of comparing `images` and their captions."""
    size, most = Footprint.of(loaded.family, loaded.model.config), room(torch.device("cpu"))
    held = min(most, images * size.seen)
    block = min(most, batch_size * max(size.encoding, size.seen + size.question(tokens)))
    return 2 * batch_size * 3 * loaded.sizes.image_size**2 + held + block


def training(config: Any, student: Loaded, teacher: Loaded | None, source: Any, images: int) -> int:
    """Of a training step on `images` images in one process: what the student keeps, and what of the teacher is compared with it."""
    sizes, layers = student.sizes, student.family.layer_counts(student.model.config)
    tower = {name: sizes.widths.get(name, max(sizes.widths.values())) for name in layers}
    some = list(islice(source.texts(), SAMPLE))
    tokens, patches = longest(student, some, config.max_tokens), (sizes.image_size // sizes.patch_size) ** 2 + 1
    if isinstance(config, TaskStage) and config.task == "vqa":
        each = asked_each(source)
        questions = images * min(each, config.questions_per_image)
        answers = longest(student, list(student.model.config.answers or [])[:SAMPLE], config.max_answer_tokens)
        rows = {"text": questions * tokens, "fusion": questions * tokens, "decoder": questions * answers}
        logits = questions * answers * sizes.vocab_size
    else:
        masked = "mlm" in getattr(config, "losses", ())
        rows = {"text": images * (1 + masked) * tokens, "fusion": images * (3 + masked) * tokens}
        logits = images * getattr(config, "max_masks", 0) * masked * sizes.vocab_size
    rows["vision"] = images * patches
    kept = sum(
        rows.get(name, rows["text"]) * width * layers[name] * (KEPT + CROSS * (name not in ("vision", "text")))
        for name, width in tower.items()
    )
    kept += images * patches * sum(2 * width * layers[name] for name, width in tower.items() if name not in ("vision", "text", "decoder"))
    maps = 0.0
    if teacher is not None and config.kd:
        taught = teacher.family.layer_counts(teacher.model.config)
        for name in tower:
            length = patches if name == "vision" else tokens
            maps += rows.get(name, rows["text"]) * length * sizes.heads.get(name, 1) * (2 * layers[name] + taught[name])
            kept += rows.get(name, rows["text"]) * tower[name] * taught[name]  # hidden states of the teacher
    return round(FLOAT * (kept + maps + LOGITS * logits) + 3 * images * 3 * sizes.image_size**2 * FLOAT)


def asked_each(source: Any) -> float:
    """Questions an image, by the first questions of `source`; 1 where it cannot be read in advance."""
    if not hasattr(source, "questions"):
        return 1.0
    whole = getattr(source, "source", source)
    listed = min(len(whole), SAMPLED_TEXTS) if isinstance(whole, Shapes) else len(whole)
    return sum(1 for _ in source.questions()) / max(1, listed)
