"""Retrieval against the numbers of the published code: losses, distillation, gates, and both directions of the ranking."""

from __future__ import annotations

import json
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parity_l0 import published_costs
from test_parity_xvlm import EVERYTHING, FOLDER, Net, agree, agree_all
from torch import Tensor

from efficientvlm.compression.gates import attach, open_probability, published_gates
from efficientvlm.families.anatomy import CROSS_HEAD, NEURON, Unit
from efficientvlm.families.published import read_published
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.efficientvlm import distilled, released
from efficientvlm.objectives.losses import negative_weights, positives
from efficientvlm.objectives.terms import compared, tower_maps
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.settings.methods import DistillationQuirks, RetrievalWeights
from efficientvlm.tasks import recall

NETS = FOLDER / "xvlm_retrieval_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
SETTINGS = {"vision_heads": 5, "text_heads": 5, "dropout": 0.0}
QUIRKS = DistillationQuirks(unmasked_padding=True, skip_last_hidden=True, independent_negatives=True)
SIDES = ("teacher", "student")
Tensors = dict[str, Tensor]


def numbers(name: str) -> Tensors:
    return load_file(NETS / f"{name}.safetensors")


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    found = {}
    for side, file in (("teacher", "teacher"), ("student", "model")):
        config, state, report = read_published(NETS / f"{file}.safetensors", settings=SETTINGS)
        assert report.layout == "retrieval"
        model = XVLMModel(config).eval()
        model.load_state_dict(state, strict=True)
        expected = {key.removeprefix(f"{side}."): value for key, value in numbers("expected").items() if key.startswith(f"{side}.")}
        found[side] = Net(model, expected)
    return found


@pytest.fixture(scope="module")
def batch() -> Tensors:
    given = numbers("batch")
    names = {"pixels": "image", "text_ids": "text_ids", "text_mask": "text_atts", "image_ids": "idx"}
    return {ours: given[theirs] for ours, theirs in names.items()}


def passes(net: Net, batch: Tensors, negatives: tuple[Tensor, Tensor] | None = None) -> Any:
    return XvlmPretraining(net.model, losses=("itc", "itm"), seed=0).passes(net.model, batch, 0, EVERYTHING, negatives or net.negatives())


@pytest.mark.parametrize("side", SIDES)
def test_losses_with_several_positives(nets: dict[str, Net], batch: Tensors, side: str) -> None:
    net = nets[side]
    expected = net.expected
    losses, record, _ = passes(net, batch)
    agree(losses["itc"].detach(), expected["loss_itc"])
    agree(losses["itm"].detach(), expected["loss_itm"])
    agree(record["itm_logits"].detach(), expected["itm_logits_all"])
    same = positives(batch)
    assert same.sum() == 7 + 4 and torch.equal(same, batch["image_ids"][:, None] == batch["image_ids"][None])
    for_text, for_image = negative_weights(expected["image_feat"], expected["text_feat"], net.model.temp.detach(), same)
    agree(for_text, expected["itm_weights_image_for_text"])
    agree(for_image, expected["itm_weights_text_for_image"])
    if side == "student":
        agree_all(record["vision.hidden"], expected, "image_hidden")
        agree_all(record["text.hidden"], expected, "text_hidden")
        for run, name in (("itm_positive", "itm_pos"), ("itm_negative", "itm_neg")):
            agree_all(record[f"fusion.hidden@{run}"], expected, f"{name}_hidden")
        agree_all(record["fusion.cross_attention@itm_positive"], expected, "itm_pos_cross_attn")
        losses["itc"].backward()
        for name, parameter in net.model.named_parameters():
            if f"grad_itc.{name}" in expected:
                agree(parameter.grad, expected[f"grad_itc.{name}"])
        net.model.zero_grad()
    no_ids = {name: tensor for name, tensor in batch.items() if name != "image_ids"}
    agree(passes(net, no_ids)[0]["itc"].detach(), expected["loss_itc_no_idx"])


def terms_of(expected: Tensors, kind: str) -> dict[str, list[str]]:
    """Published name of a term → our taps."""
    names = {}
    for theirs, ours in (("hidden", "hidden"), ("attn", "self_attention")):
        names |= {f"image_{theirs}": f"vision.{ours}", f"text_{theirs}": f"text.{ours}"}
    for theirs, ours in (("hidden", "hidden"), ("attn", "self_attention"), ("cross_attn", "cross_attention")):
        names |= {f"itm_{short}_{theirs}": f"fusion.{ours}@itm_{run}" for short, run in (("pos", "positive"), ("neg", "negative"))}
    names["itm_logits_T1"] = "itm_logits"
    there = {name.removeprefix(f"{kind}.") for name in expected if name.startswith(f"{kind}.")}
    assert there - {"kd_total", "total", "itm_logits_T2"} - {name for name in there if "teacher" in name} == set(names)
    return {f"{kind}.{name}": [tap] for name, tap in names.items()}


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_distillation(nets: dict[str, Net], batch: Tensors, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher draws its own negatives, as published, or sees those of the student, as here."""
    expected, student, teacher = numbers("kd_expected"), nets["student"], nets["teacher"]
    drawn = tuple(expected[f"student.itm_neg_{name}"] for name in ("image_for_text", "text_for_image"))
    theirs = tuple(expected[f"own.teacher_itm_neg_{name}"] for name in ("image_for_text", "text_for_image")) if kind == "own" else drawn
    quirks = QUIRKS.model_copy(update={"independent_negatives": kind == "own"})
    rows = {term.tap: term for term in released(XvlmPretraining.terms, quirks)}
    maps = tower_maps(student.model.config, teacher.model.config)
    with torch.no_grad():
        ours, reference = passes(student, batch, drawn)[1], passes(teacher, batch, theirs)[1]
    agree(ours["itm_logits"], expected["student_itm_logits"])
    agree(reference["itm_logits"], expected[f"{kind}.teacher_itm_logits"])
    for published, taps in terms_of(expected, kind).items():
        agree(sum(compared(rows[tap], ours, reference, maps) for tap in taps), expected[published])
    agree(compared(rows["itm_logits"], ours, reference, maps, temperature=2.0), expected[f"{kind}.itm_logits_T2"])

    draws = iter([drawn, theirs])
    monkeypatch.setattr("efficientvlm.objectives.xvlm_pretraining.draw_negatives", lambda *_: next(draws))
    settings = SimpleNamespace(
        kd=0.5, weights=RetrievalWeights(), quirks=quirks, temperature=1.0, scale_by_temperature=False, cache_teacher=False
    )
    losses = distilled(XvlmPretraining(student.model, losses=("itc", "itm"), seed=0), teacher.model, settings)(batch, 0)
    agree(losses["itc"].detach(), expected["student.loss_itc"])
    agree(losses["itm"].detach(), expected["student.loss_itm"])
    agree(losses["kd"].detach(), expected[f"{kind}.kd_total"])
    agree(losses["loss"].detach(), expected[f"{kind}.total"])


@pytest.fixture(scope="module")
def gallery(nets: dict[str, Net]) -> recall.Gallery:
    given, model = numbers("batch"), nets["student"].model
    captions = json.loads((NETS / "config.json").read_text())["captions_per_image"]
    ends = list(accumulate(captions))
    said = [[str(text) for text in range(end - count, end)] for end, count in zip(ends, captions, strict=True)]
    assert torch.equal(given["eval_image_of_text"], torch.arange(12).repeat_interleave(torch.tensor(captions)))

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([int(text) for text in texts])
        return given["eval_text_ids"][rows], given["eval_text_atts"][rows]

    parts = [(list(map(str, rows.tolist())), given["eval_image"][rows], [said[row] for row in rows]) for rows in torch.arange(12).split(5)]
    return recall.encode(model, parts, tokens, 7, 12)


def test_features_and_recalls_by_contrast(gallery: recall.Gallery, nets: dict[str, Net]) -> None:
    expected = numbers("expected")
    agree(gallery.image, expected["eval.image_feat"])
    agree(gallery.text, expected["eval.text_feat"])
    agree(gallery.image @ gallery.text.T, expected["eval.sims"])
    found = recall.evaluate(nets["student"].model, gallery, batch_size=5)
    same_recalls(found, expected, "itc_only", "")


@pytest.mark.parametrize("k", [10, 3])
def test_the_best_candidates_are_ranked_anew(gallery: recall.Gallery, nets: dict[str, Net], k: int) -> None:
    """Scores of every pair that is matched, and with blocks of one pair the recalls."""
    expected, model = numbers("expected"), nets["student"].model
    scores = {"image_to_text": expected[f"k{k}.score_i2t"], "text_to_image": expected[f"k{k}.score_t2i"]}
    orders = {"image_to_text": recall.best_captions(gallery, k), "text_to_image": recall.best_images(gallery, k)}
    for direction, order in orders.items():
        queries = torch.arange(len(order)).repeat_interleave(k)
        images, texts = (queries, order.flatten()) if direction == "image_to_text" else (order.flatten(), queries)
        by_image = images.argsort(stable=True)
        with torch.no_grad():
            matched = recall.match(model, gallery, images[by_image], texts[by_image], batch_size=4)[:, 1]
        ours = torch.full_like(scores[direction], -100.0)
        ours[queries[by_image], (texts if direction == "image_to_text" else images)[by_image]] = matched
        agree(ours, scores[direction])
    found = recall.evaluate(model, gallery, batch_size=1, rerank=k, most=1)
    same_recalls(found, expected, f"k{k}", "reranked_")
    assert ("reranked_mean_recall" in found) == ("reranked_image_to_text_r10" in found) == (k == 10)


def same_recalls(found: dict[str, Any], expected: Tensors, prefix: str, ours: str) -> None:
    for theirs, direction in (("txt", "image_to_text"), ("img", "text_to_image")):
        for top in (1, 5, 10):
            assert (f"{ours}{direction}_r{top}" in found) == (f"{prefix}.{theirs}_r{top}" in expected)
            if f"{prefix}.{theirs}_r{top}" in expected:
                assert 100 * found[f"{ours}{direction}_r{top}"] == pytest.approx(float(expected[f"{prefix}.{theirs}_r{top}"]), abs=1e-3)
    if f"{prefix}.r_mean" in expected:
        assert 100 * found[f"{ours}mean_recall"] == pytest.approx(float(expected[f"{prefix}.r_mean"]), abs=1e-3)


def gate_of(unit: Unit, rows: Tensors) -> Tensor:
    """The entry of a unit in published tables: of fusion the rows of heads take turns, self-attention first."""
    tower = "cross" if unit.tower == "fusion" else unit.tower
    if unit.kind == NEURON:
        return rows[f"{tower}_intermediate"][unit.layer, unit.index]
    return rows[f"{tower}_head"][2 * unit.layer + (unit.kind == CROSS_HEAD) if tower == "cross" else unit.layer, unit.index]


def test_gates(nets: dict[str, Net], batch: Tensors) -> None:
    expected, model = numbers("gates_expected"), nets["student"].model
    tables = {key.partition(".")[2]: value for key, value in expected.items() if key.startswith("log_alpha.")}
    closed = {name: torch.stack([published_gates(row) for row in table]) for name, table in tables.items()}
    for name, table in closed.items():
        assert torch.equal(table, expected[f"deterministic.{name}"])
    costs = json.loads((NETS / "config.json").read_text())["gates"]
    head, neuron, layer = published_costs(40, 5, 60)
    assert costs == {"params_per_head": head, "params_per_ffn_layer": layer, "params_per_neuron": neuron}
    each = {name: float(head if "head" in name else neuron) for name in tables}
    prunable = sum(table.numel() * head if "head" in name else len(table) * layer for name, table in tables.items())
    agree(sum(open_probability(table).sum() * each[name] for name, table in tables.items()), expected["expected_params"])
    assert prunable == int(expected["prunable_params"])

    units = model.units()
    with torch.no_grad(), attach(model, units) as hooks:
        hooks.set(torch.stack([gate_of(unit, closed) for unit in units]))
        losses, record, _ = passes(nets["student"], batch)
        image, (states, text) = model.embed_images(batch["pixels"]), model.embed_texts(batch["text_ids"], batch["text_mask"])
        agree(image[0], expected["deterministic_image_embeds"])
        agree(image[1], expected["deterministic_image_feat"])
        agree(states, expected["deterministic_text_embeds"])
        agree(text, expected["deterministic_text_feat"])
        agree(record["fusion.hidden@itm_positive"][-1], expected["deterministic_cross_embeds"])
        agree(record["itm_logits"][:7], expected["deterministic_itm_logits_pos"])
        agree(losses["itc"], expected["deterministic_loss_itc"])
        agree(losses["itm"], expected["deterministic_loss_itm_with_student_negatives"])
