"""X-VLM's losses, distillation terms, features, answers, captions, verdicts and boxes on rebuilt networks, DLIP's terms on made records,
against stored numbers.

The numbers in `reference/xvlm.json` were written by this file (`python tests/test_reference.py`) at a version of the code that agrees with
the published implementation on its own random networks, which are too large for a repository (`test_parity_*.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rebuilt import rebuilt, tokens, values
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.network import Record
from efficientvlm.families.towers.decoding import Rules, beam, stepping
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.family import XVLM
from efficientvlm.objectives.assignment import Drawn, TextAssignment, weights_of
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.comparison import Comparison
from efficientvlm.objectives.dlip import TABLE
from efficientvlm.objectives.efficientvlm import layer_maps, released
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.grounding import Grounding
from efficientvlm.objectives.losses import Contrast, Queues
from efficientvlm.objectives.terms import TowerMap, compared, tower_maps
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.runtime.exchange import Rows
from efficientvlm.settings.dlip import PretrainingDlip, PretrainingQuirks
from efficientvlm.settings.methods import DistillationQuirks, NLVR2Quirks
from efficientvlm.tasks import gradcam
from efficientvlm.tasks.ranking import rank

FILE = Path(__file__).parent / "reference" / "xvlm.json"
LOSSES = ("itc", "itm", "mlm", "box")
VOCABULARY, LENGTH, PAIRS = 40, 7, 4
NEGATIVES = torch.tensor([2, 3, 1, 0]), torch.tensor([1, 2, 3, 0])
STUDENT = {"vision": [1, 3], "text": [1], "fusion": [1]}


def network(**changes: Any) -> Any:
    """A teacher of 4 + 2 + 2 layers, with what pre-training needs."""
    sizes = {"vision_width": 24, "text_width": 32, "vision_layers": 4, "text_layers": 2, "fusion_layers": 2, "vision_heads": 3}
    sizes |= {"text_heads": 4, "vision_intermediate": 40, "text_intermediate": 36, "image_size": 16, "patch_size": 4, "embed_dim": 12}
    config = XVLMConfig(**{**sizes, "vocab_size": VOCABULARY, "max_positions": 12, "local_attention_depth": 1, "dropout": 0.0, **changes})
    return rebuilt(XVLM().build(config))


def student_of(teacher: Any) -> Any:
    return rebuilt(XVLM().build(teacher.config.with_layers(STUDENT)))


def pairs() -> dict[str, Tensor]:
    """Four pairs, of which two texts are padded; two tokens of each are masked."""
    ids = tokens("texts", (PAIRS, LENGTH), VOCABULARY)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[3, 4:] = 0
    positions = torch.tensor([[1, 3], [2, 0], [4, 5], [1, 2]])
    labels = ids.gather(1, positions)
    labels[1, 1] = -100
    return {
        "pixels": values("pixels", (PAIRS, 3, 16, 16)),
        "text_ids": ids * mask,
        "text_mask": mask,
        "masked_ids": ids.scatter(1, positions, 4) * mask,
        "masked_positions": positions,
        "masked_labels": labels,
    }


def regions() -> dict[str, Tensor]:
    """The same texts for three regions and one whole image, of two images."""
    seen = (values("regions", (PAIRS, 17)) > 0).long()
    seen[:, 0] = seen[3] = 1
    boxes = 0.2 + 0.3 * values("boxes", (PAIRS, 4)).abs()
    own = {"pixels": values("pixels", (2, 3, 16, 16)), "image_index": torch.tensor([0, 0, 1, 1]), "image_mask": seen, "boxes": boxes}
    return pairs() | own | {"is_whole_image": torch.tensor([0, 0, 0, 1])}


def questions() -> dict[str, Tensor]:
    asked, answers = tokens("questions", (3, LENGTH), VOCABULARY), tokens("answers", (5, 4), VOCABULARY)
    asked_mask, answer_mask = torch.ones_like(asked), torch.ones_like(answers)
    asked_mask[1, 4:] = answer_mask[2, 3:] = 0
    return {
        "pixels": values("pictures", (2, 3, 16, 16)),
        "image_index": torch.tensor([0, 0, 1]),
        "question_ids": asked * asked_mask,
        "question_mask": asked_mask,
        "answer_ids": answers * answer_mask,
        "answer_mask": answer_mask,
        "answer_weights": torch.tensor([1.0, 0.25, 0.75, 0.5, 0.5]),
        "answer_index": torch.tensor([0, 1, 1, 2, 2]),
    }


def told(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """A scalar as it is, a tensor by its sum of squares and by a weighted sum of its entries."""
    tensor = torch.as_tensor(value).detach().double()
    if tensor.ndim == 0:
        yield name, float(tensor)
    else:
        yield f"{name} squares", float(tensor.square().sum())
        yield f"{name} weighted", float((tensor * values("weights", tensor.shape).double()).sum())


def pretraining() -> Iterator[tuple[str, float]]:
    teacher = network()
    student, records = student_of(teacher), {}
    for name, model in (("teacher", teacher), ("student", student)):
        objective = XvlmPretraining(model, losses=LOSSES, seed=0)
        for kind, batch in (("pairs", pairs()), ("regions", regions())):
            passed = objective.passes(model, batch, 0, [term.tap for term in objective.terms], NEGATIVES)
            losses, records[name, kind] = passed[0], passed[1]
            for loss, value in losses.items():
                yield from told(f"{name} {kind} {loss}", value)
        yield from told(f"{name} matching", records[name, "pairs"]["itm_logits"])
        yield from told(f"{name} similarities", records[name, "pairs"]["itc_logits"])
        yield from told(f"{name} image states", records[name, "pairs"]["vision.hidden"][-1])
    sum(losses.values()).backward()
    for part in ("vision.patch_embedding.weight", "fusion.layers.0.cross_attention.k.weight", "text.embeddings.word.weight"):
        yield from told(f"student gradient {part}", student.get_parameter(part).grad)
    maps = tower_maps(student.config, teacher.config)
    for kind in ("pairs", "regions"):
        for quirks in (DistillationQuirks(), DistillationQuirks(unmasked_padding=True, skip_last_hidden=True)):
            for term in released(XvlmPretraining.terms, quirks):
                ours, theirs = records["student", kind], records["teacher", kind]
                distance = compared(term, ours, theirs, maps, temperature=2.0, scale=quirks.unmasked_padding)
                yield from told(f"{kind} {term.weight} {term.tap}{' released' * quirks.unmasked_padding}", distance)


def answering() -> Iterator[tuple[str, float]]:
    teacher = network(decoder_layers=2, heads=[])
    student = rebuilt(XVLM().build(teacher.config.with_layers({**STUDENT, "decoder": [1]})))
    batch, records = questions(), []
    for name, model in (("teacher", teacher), ("student", student)):
        objective = Generation(model)
        losses, record = objective.passes(model, batch, 0, [term.tap for term in objective.terms])[:2]
        records.append(record)
        yield from told(f"{name} answers", losses["task"])
        yield from told(f"{name} answer logits", record["logits"])
        for twice in (False, True):
            candidates = tokens("candidates", (6, 4), VOCABULARY), torch.tensor([[1, 1, 1, 1]] * 5 + [[1, 1, 1, 0]])
            chosen, probabilities = rank(model, batch, candidates, top=4, first_token_twice=twice)
            yield from told(f"{name} ranks{' twice' * twice}", chosen.double())
            yield from told(f"{name} probabilities{' twice' * twice}", probabilities)
    maps = tower_maps(student.config, teacher.config)
    for term in objective.terms:
        yield from told(f"answering {term.weight} {term.tap}", compared(term, records[1], records[0], maps))


def grounding() -> Iterator[tuple[str, float]]:
    teacher, batch = network(heads=["box"]), {**questions(), "boxes": 0.2 + 0.3 * values("boxes", (3, 4)).abs()}
    student, records = student_of(teacher), []
    for name, model in (("teacher", teacher), ("student", student)):
        objective = Grounding(model)
        losses, record = objective.passes(model, batch, 0, [term.tap for term in objective.terms])[:2]
        records.append(record)
        yield from told(f"{name} box", losses["box"])
        yield from told(f"{name} giou", losses["giou"])
        yield from told(f"{name} boxes", record["boxes"])
    maps = tower_maps(student.config, teacher.config)
    for term in objective.terms:
        yield from told(f"grounding {term.weight} {term.tap}", compared(term, records[1], records[0], maps))
    matching = network(heads=["itc", "itm"])
    for layer in range(2):
        looked, logits = gradcam.maps(matching, pairs(), layer)
        yield from told(f"where layer {layer} looks", looked / looked.mean())
    yield from told("matching of what is looked at", logits)


def captioning() -> Iterator[tuple[str, float]]:
    teacher, batch = network(heads=["lm"]), {**pairs(), "image_index": torch.arange(PAIRS)}
    batch["target_mask"] = batch["text_mask"].clone()
    batch["target_mask"][:, :2] = 0
    student, records = student_of(teacher), []
    for name, model in (("teacher", teacher), ("student", student)):
        for published in (False, True):
            objective = Captions(model, 0.1, published=published)
            losses, record = objective.passes(model, batch, 0, [term.tap for term in objective.terms])[:2]
            yield from told(f"{name} captions{' published' * published}", losses["caption"])
        records.append(record)
        yield from told(f"{name} caption logits", record["logits"])
    losses["caption"].backward()
    for part in ("vision.patch_embedding.weight", "fusion.layers.0.cross_attention.v.weight", "text.embeddings.word.weight"):
        yield from told(f"student gradient {part}", student.get_parameter(part).grad)
    maps = tower_maps(student.config, teacher.config)
    for quirks in (DistillationQuirks(), DistillationQuirks(unmasked_padding=True, skip_last_hidden=True)):
        for term in released(objective.terms, quirks):
            distance = compared(term, records[1], records[0], maps)
            yield from told(f"captions {term.weight} {term.tap}{' released' * quirks.unmasked_padding}", distance)
    given = torch.tensor([[1, 5]]).expand(PAIRS, -1)
    with torch.no_grad():
        for rule in ("published", "generated"):
            step, rules = stepping(teacher, teacher.look(batch["pixels"])), Rules(end=30, filler=0, most=6)
            found = beam(step, given, rules, 3, length_rule=rule)  # type: ignore[arg-type]
            yield from told(f"searched, {rule}", found.ids.double())
            yield from told(f"scores, {rule}", found.scores)


def comparing() -> Iterator[tuple[str, float]]:
    """Three statements about two pairs of images; and texts that are assigned to the first, the second or neither of two."""
    teacher = network(fusion_images=2, fusion_layers=4, heads=["compare"])
    asked = questions()
    batch = {"pixels": asked["pixels"], "second_pixels": values("others", (2, 3, 16, 16)), "pair_index": asked["image_index"]}
    batch |= {"text_ids": asked["question_ids"], "text_mask": asked["question_mask"], "labels": torch.tensor([1, 0, 1])}
    student, records = rebuilt(XVLM().build(teacher.config.with_layers({**STUDENT, "fusion": [2, 3]}))), []
    for name, model in (("teacher", teacher), ("student", student)):
        objective = Comparison(model)
        losses, record = objective.passes(model, batch, 0, [term.tap for term in objective.terms])[:2]
        yield from told(f"{name} statements", losses["task"])
        yield from told(f"{name} verdicts", record["logits"])
        records.append(record)
    losses["task"].backward()
    for part in ("vision.patch_embedding.weight", "fusion.layers.0.cross_attention.v.weight", "fusion.layers.1.cross_attention.q.weight"):
        yield from told(f"student gradient {part}", student.get_parameter(part).grad)
    for quirks in (NLVR2Quirks(), NLVR2Quirks(unmasked_padding=True, skip_last_hidden=True, second_image=True)):
        maps = layer_maps(student.config, teacher.config, quirks)
        for term in released(objective.terms, quirks):
            distance = compared(term, records[1], records[0], maps)
            yield from told(f"statements {term.weight}{' released' * quirks.second_image}", distance)
    assigns, given = network(fusion_images=2, fusion_layers=4, heads=["assign"]), pairs()
    drawn = Drawn(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 3, 1, 3]), torch.tensor([2, 1, 0, 2]))
    found = TextAssignment(assigns, seed=0).passes(assigns, {**given, "image_ids": torch.arange(PAIRS)}, 0, (), drawn)
    yield from told("assigned texts", found.losses["task"])
    features = assigns.image_feature(assigns.encode_image(given["pixels"]).states)
    yield from told("chances of other images", weights_of(features, torch.eye(PAIRS, dtype=torch.bool)))


def said(who: str, layers: int, width: int, heads: int) -> Record:
    """What a BLIP of `layers` text layers records of four pairs in pre-training, as far as DLIP compares it; a queue of five."""
    mask = pairs()["text_mask"]
    counts = {"image": PAIRS, "text": PAIRS, "images": 5, "texts": 5}
    unit = {name: F.normalize(values(f"{who} {name}", (count, 6)), dim=-1) for name, count in counts.items()}
    record = Record(text_mask=mask, predicts=F.pad(mask[:, 1:], (0, 1)), image_feature=unit["image"], text_feature=unit["text"])
    same = torch.eye(PAIRS, PAIRS + 5).bool()
    queues = Queues(unit["images"], unit["texts"], unit["image"], unit["text"], torch.tensor([3, 4, 5, 6]))  # of which two are free
    record["contrast"] = Contrast(unit["image"], unit["text"], torch.tensor(0.1), Rows(PAIRS), same, queues)
    record["lm_logits"] = values(f"{who} logits", (PAIRS, LENGTH, VOCABULARY), 4)
    for tower, run in (("text", "@itm_positive"), ("decoder", "")):
        seen = mask.bool()[:, None, None] & torch.ones(LENGTH, LENGTH).tril(LENGTH * (tower == "text")).bool()
        hidden = [values(f"{who} {tower} {layer}", (PAIRS, LENGTH, width)) for layer in range(layers + 1)]
        scores = [values(f"{who} {tower} itself {layer}", (PAIRS, heads, LENGTH, LENGTH), 3) for layer in range(layers)]
        looks = [values(f"{who} {tower} looks {layer}", (PAIRS, heads, LENGTH, 17), 5).softmax(-1) for layer in range(layers)]
        record[f"{tower}.hidden{run}"], record[f"{tower}.cross_attention{run}"] = hidden, looks
        record[f"{tower}.self_attention{run}"] = [score.masked_fill(~seen, -torch.inf).softmax(-1) for score in scores]
    return record


def dlip() -> Iterator[tuple[str, float]]:
    """A student of two layers and three heads beside a teacher of three and four, of the same width; all of the nine terms."""
    student, teacher = said("student", 2, 8, 3), said("teacher", 3, 8, 4)
    masks = {name: "text_mask" if "." in name else "" for name in student}
    met: Any = [([], []), ([0, 1, 2], [0, 1, 2])]
    maps = dict.fromkeys(("text", "decoder"), TowerMap([(2, 3)], [(1, 2)], {"head": met, "cross_head": met}))
    usual = {name: field.default for name, field in PretrainingDlip.model_fields.items()} | {"quirks": PretrainingQuirks()}
    replicated = {"quirks": PretrainingQuirks(first_token=True, unmasked_padding=True, shrunk_maps=True, queued_first=True)}
    for form, chosen in {
        "repaired": {},
        "as replicated": replicated,
        "mean": {"heads": "mean", "decoder_state": "last"},
        "plain": {"attention_temperature": 0.0},
    }.items():
        for row in TABLE[:9]:  # what follows is ours
            term = row.term(masks, SimpleNamespace(**usual | chosen))  # type: ignore[arg-type]
            assert term
            yield from told(f"{row.weight} {form}", compared(term, student, teacher, maps, temperature=2.0))


def written(figures: Iterator[tuple[str, float]]) -> dict[str, float]:
    return {name: float(f"{value:.7g}") for name, value in figures}


PARTS = (pretraining, answering, grounding, captioning, comparing, dlip)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_numbers_are_those_that_are_stored(part: Any) -> None:
    expected = json.loads(FILE.read_text("utf-8"))[part.__name__]
    found = dict(part())
    assert found.keys() == expected.keys()
    wrong = {name: (found[name], value) for name, value in expected.items() if found[name] != pytest.approx(value, rel=1e-4, abs=1e-4)}
    assert not wrong


if __name__ == "__main__":
    FILE.write_text(json.dumps({part.__name__: written(part()) for part in PARTS}, indent=1) + "\n", "utf-8")
