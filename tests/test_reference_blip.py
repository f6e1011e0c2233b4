"""BLIP's losses, ranks, answers and captions on rebuilt networks, and what distillation compares of them, against stored numbers.

The numbers in `reference/blip.json` were written by this file (`python tests/test_reference_blip.py`) at a version of the code that agrees
with the published implementation on its own random networks, which are too large for a repository (`test_parity_blip_*.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rebuilt import rebuilt, tokens, values
from test_reference import NEGATIVES, PAIRS, VOCABULARY, pairs, questions, told, written
from torch.nn import functional as F

from efficientvlm.families.blip.config import (
    BlipAnswerConfig,
    BlipCaptionConfig,
    BlipPretrainingConfig,
    BlipRetrievalConfig,
    SlicedBlipConfig,
)
from efficientvlm.families.blip.models import MODELS
from efficientvlm.families.towers.decoding import Rules, beam, stepping
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.momentum import Features, MomentumContrast
from efficientvlm.objectives.terms import compared, tower_maps
from efficientvlm.tasks.ranking import generate, rank

FILE = Path(__file__).parent / "reference" / "blip.json"


def networks(kind: type[SlicedBlipConfig]) -> Iterator[tuple[str, Any]]:
    """A teacher of four layers of images and two of texts, its student of half of them, and a student whose texts look once."""
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36, "vocab_size": VOCABULARY}
    text |= {"max_position_embeddings": 12, "bos_token_id": 3, "sep_token_id": 2, "pad_token_id": 0, "hidden_dropout_prob": 0.0}
    text |= {"attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-12}
    config = kind(vision_config=vision | {"image_size": 16, "patch_size": 4, "layer_norm_eps": 1e-6}, text_config=text, question_start_id=4)
    half: Any = {tower: [1, 3] if tower == "vision" else [1] if count else [] for tower, count in config.layers().items()}
    once = {tower: [1] for tower in ("text", "decoder") if tower in kind.towers and not (kind.shares and tower == "decoder")}
    for name, chosen in {"teacher": config, "student": config.with_layers(half), "once": config.copy(cross_layers=once)}.items():
        yield name, rebuilt(MODELS[kind](chosen))


def answering() -> Iterator[tuple[str, float]]:
    batch, candidates, records = questions(), tokens("candidates", (6, 4), VOCABULARY), {}
    masks = torch.tensor([[1, 1, 1, 1]] * 5 + [[1, 1, 1, 0]])
    models = dict(networks(BlipAnswerConfig))
    for name, model in models.items():
        for smoothing in (0.0, 0.1):
            objective = Generation(model, smoothing)
            losses, record = objective.passes(model, batch, 0, [term.tap for term in objective.terms])[:2]
            yield from told(f"{name} answers, smoothing {smoothing}", losses["task"])
            chosen, probabilities = rank(model, batch, (candidates, masks), top=4, smoothing=smoothing)
            yield from told(f"{name} ranks, smoothing {smoothing}", chosen.double())
            yield from told(f"{name} probabilities, smoothing {smoothing}", probabilities)
        records[name] = model, objective, record
        yield from told(f"{name} answer logits", record["logits"])
        for padding in (False, True):
            for beams, rule in ((1, "published"), (3, "published"), (3, "generated")):
                how: Any = {"cls_id": 1, "sep_id": 30, "max_tokens": 5, "beams": beams, "length_rule": rule, "attends_padding": padding}
                yield from told(f"{name} writes, {beams} {rule}{' padding' * padding}", generate(model, batch, **how).double())
    yield from distances(records)


def captioning() -> Iterator[tuple[str, float]]:
    batch, records = {**pairs(), "image_index": torch.arange(PAIRS)}, {}
    batch["target_mask"] = batch["text_mask"].clone()
    batch["target_mask"][:, :2] = 0
    for name, model in networks(BlipCaptionConfig):
        objective = Captions(model, 0.1)
        losses, record = objective.passes(model, batch, 0, [term.tap for term in objective.terms])[:2]
        records[name] = model, objective, record
        yield from told(f"{name} captions", losses["caption"])
        yield from told(f"{name} caption logits", record["logits"])
        with torch.no_grad():
            for rule in ("published", "generated"):
                step, rules = stepping(model, model.look(batch["pixels"])), Rules(end=30, filler=0, most=6, repetition=1.2)
                found = beam(step, torch.tensor([[3, 5]]).expand(PAIRS, -1), rules, 3, length_rule=rule)  # type: ignore[arg-type]
                yield from told(f"{name} searched, {rule}", found.ids.double())
                yield from told(f"{name} scores, {rule}", found.scores)
    yield from distances(records)


def contrasting() -> Iterator[tuple[str, float]]:
    """A step with averages that lag behind and pairs that wait, before any task and in retrieval."""
    for kind, losses, online in ((BlipPretrainingConfig, ("itc", "itm", "lm"), False), (BlipRetrievalConfig, ("itc", "itm"), True)):
        batch, records, what = pairs(), {}, "retrieval" if online else "pretraining"
        for name, model in networks(kind):
            contrast = MomentumContrast(model, momentum=0.9, queue=8, alpha=0.4, ramp=4)
            for place in contrast.encoder.places.values():
                contrast.encoder.get_buffer(place).mul_(0.95)
            waiting = [F.normalize(values(f"waiting {part}", (6, model.config.feature_width)), dim=-1) for part in ("image", "text")]
            contrast.queue.put(Features(*waiting, torch.arange(6), torch.arange(6) + 100))
            objective = BlipPretraining(model, losses=losses, seed=0, contrast=contrast, online=online)
            objective.begin_step(2)
            want = [term.tap for term in objective.terms]
            found, record, _ = objective.passes(model, batch, 2, want, drawn=NEGATIVES)
            for loss, value in found.items():
                yield from told(f"{what} {name} {loss}", value)
            objective.total(found).backward()
            yield from told(f"{what} {name} gradient", model.vision_proj.weight.grad)
            yield from told(f"{what} {name} itm logits", record["itm_logits"])
            objective.after_step(2)
            yield from told(f"{what} {name} queue", contrast.queue.image)
            records[name] = model, objective, record
        for key, value in distances(records):
            yield f"{what} {key}", value


def distances(records: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of both students from the teacher."""
    teacher, _, said = records["teacher"]
    for name in ("student", "once"):
        model, objective, record = records[name]
        maps = tower_maps(model.config, teacher.config)
        for term in objective.terms:
            yield from told(f"{name} {term.weight}", compared(term, record, said, maps))


PARTS = (answering, captioning, contrasting)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_numbers_are_those_that_are_stored(part: Any) -> None:
    expected = json.loads(FILE.read_text("utf-8"))[part.__name__]
    found = dict(part())
    assert found.keys() == expected.keys()
    wrong = {name: (found[name], value) for name, value in expected.items() if found[name] != pytest.approx(value, rel=1e-4, abs=1e-4)}
    assert not wrong


if __name__ == "__main__":
    FILE.write_text(json.dumps({part.__name__: written(part()) for part in PARTS}, indent=1) + "\n", "utf-8")
