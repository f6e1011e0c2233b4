"""X-VLM, its losses, its distillation terms and its answer ranking against the numbers of the published code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm.families.published import read_published
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.efficientvlm import distilled, released
from efficientvlm.objectives.losses import answer_loss, itc_loss, negative_weights, positives
from efficientvlm.objectives.terms import compared, tower_maps
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.settings.methods import DistillationQuirks, DistillWeights
from efficientvlm.tasks.ranking import rank

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity")
NETS, VQA = FOLDER / "xvlm_tiny", FOLDER / "vqa_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
SETTINGS = {"vision_heads": 4, "text_heads": 4, "local_attention_depth": 2, "dropout": 0.0}
EVERYTHING = frozenset(tap for tap in XVLMModel.taps if not tap.startswith("decoder"))
both_nets = pytest.mark.parametrize("name", ["teacher", "student"])


@dataclass
class Net:
    model: Any
    expected: dict[str, Tensor]

    def negatives(self, prefix: str = "") -> tuple[Tensor, Tensor]:
        return self.expected[f"{prefix}itm_neg_image_for_text"], self.expected[f"{prefix}itm_neg_text_for_image"]

    def passes(self, batch: dict[str, Tensor], prefix: str = "") -> Any:
        """The whole step with the negatives that the published run drew."""
        objective = XvlmPretraining(self.model, losses=("itc", "itm", "mlm", "box"), seed=0)
        with torch.no_grad():
            return objective.passes(self.model, batch, 0, EVERYTHING, self.negatives(prefix))


def read(path: Path) -> Any:
    config, state, _ = read_published(path, settings=SETTINGS)
    model = XVLMModel(config).eval()
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture(scope="module")
def nets() -> dict[str, Net]:
    return {n: Net(read(NETS / f"{n}.safetensors"), load_file(NETS / f"{n}_expected.safetensors")) for n in ("teacher", "student")}


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    numbers = load_file(NETS / "batch.safetensors")
    names = {
        "pixels": "image",
        "text_ids": "text_ids",
        "text_mask": "text_atts",
        "masked_ids": "text_ids_masked",
        "masked_positions": "masked_pos",
        "masked_labels": "masked_ids",
    }
    return {ours: numbers[theirs] for ours, theirs in names.items()}


@pytest.fixture(scope="module")
def region_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    numbers = load_file(NETS / "region_batch.safetensors")
    names = {
        "pixels": "image",
        "image_index": "idx_to_group_img",
        "image_mask": "image_atts",
        "boxes": "target_bbox",
        "is_whole_image": "is_image",
    }
    return batch | {ours: numbers[theirs] for ours, theirs in names.items()}


def agree(ours: Any, theirs: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, **CLOSE)


def agree_all(ours: list[Tensor], expected: dict[str, Tensor], name: str) -> None:
    """`ours[i]` is `expected["name.i"]`, and there are as many."""
    assert len(ours) == sum(key.startswith(f"{name}.") for key in expected)
    for index, tensor in enumerate(ours):
        agree(tensor, expected[f"{name}.{index}"])


def test_the_pickled_checkpoint_is_the_same_network(nets):
    ours, theirs = read(NETS / "teacher.th").state_dict(), nets["teacher"].model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@both_nets
def test_states_features_and_maps(nets, batch, name):
    net = nets[name]
    model, expected = net.model, net.expected
    kinds = frozenset(("hidden", "self_attention", "cross_attention"))
    with torch.no_grad():
        image = model.encode_image(batch["pixels"], keep=kinds)
        text = model.encode_text(batch["text_ids"], batch["text_mask"], keep=kinds)
        fused = model.fuse(text.states, batch["text_mask"], model.fusion.context(image.states), keep=kinds)
        agree(image.states, expected["image_embeds"])
        agree(text.states, expected["text_embeds"])
        agree(fused.states, expected["cross_embeds"])
        agree(model.image_feature(image.states), expected["image_feat"])
        agree(model.text_feature(text.states, batch["text_mask"]), expected["text_feat"])
        agree(model.itm_head(fused.states[:, 0]), expected["itm_logits_pos"])
        # the same without maps, through scaled_dot_product_attention
        plain = model.encode_text(batch["text_ids"], batch["text_mask"]).states
        context = model.fusion.context(model.encode_image(batch["pixels"]).states)
        agree(model.fuse(plain, batch["text_mask"], context).states, expected["cross_embeds"])
    agree_all(image.hidden, expected, "image_hidden")
    agree_all(image.self_attention, expected, "image_attn")
    agree_all(text.hidden, expected, "text_hidden")
    agree_all(text.self_attention, expected, "text_attn")
    agree_all(fused.hidden, expected, "cross_hidden")
    agree_all(fused.self_attention, expected, "cross_self_attn")
    agree_all(fused.cross_attention, expected, "cross_attn")


@both_nets
def test_contrastive_loss_and_weights_of_negatives(nets, batch, name):
    net = nets[name]
    expected, temperature = net.expected, net.model.temp.detach()
    image, text = expected["image_feat"], expected["text_feat"]
    same = positives(batch)
    assert torch.equal(same, torch.eye(4, dtype=torch.bool))
    agree(itc_loss(image @ text.T / temperature, same), expected["loss_itc"])
    by_image = positives(batch | {"image_ids": torch.tensor([7, 8, 7, 9])})
    agree(itc_loss(image @ text.T / temperature, by_image), expected["loss_itc_idx"])
    for_text, for_image = negative_weights(image, text, temperature, same)
    agree(for_text, expected["itm_weights_image_for_text"])
    agree(for_image, expected["itm_weights_text_for_image"])


@both_nets
@pytest.mark.parametrize("prefix", ["", "full_"])
def test_image_text_step(nets, batch, name, prefix):
    net = nets[name]
    losses, record, _ = net.passes(batch, prefix)
    assert set(losses) == {"itc", "itm", "mlm"}
    for loss, value in losses.items():
        agree(value, net.expected[f"{prefix}loss_{loss}"])
    if not prefix:
        agree(record["itm_logits"], net.expected["itm_logits_all"])
        agree(record["mlm_logits"], net.expected["mlm_logits"])


@both_nets
def test_region_step(nets, region_batch, name):
    net = nets[name]
    losses, _, _ = net.passes(region_batch, "region_")
    for loss, theirs in {"itc": "itc", "itm": "itm", "mlm": "mlm", "box": "bbox", "giou": "giou"}.items():
        agree(losses.pop(loss), net.expected[f"region_loss_{theirs}"])
    assert not losses


def kd_names(temperature: float) -> dict[str, list[str]]:
    """Published name of a term → our taps whose distances it is the sum of."""
    names = {}
    for theirs, kind in (("hidden", "hidden"), ("attn", "self_attention")):
        names |= {f"image_{theirs}": [f"vision.{kind}"], f"text_{theirs}": [f"text.{kind}"]}
        names |= {f"itm_{short}_{theirs}": [f"fusion.{kind}@itm_{run}"] for short, run in (("pos", "positive"), ("neg", "negative"))}
        names[f"mlm_{theirs}"] = [f"fusion.{kind}@mlm", f"text.{kind}@mlm"]
    return names | {f"{task}_logits_T{temperature:.0f}": [f"{task}_logits"] for task in ("itm", "mlm")}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_terms(nets, batch, temperature):
    student, teacher = nets["student"], nets["teacher"]
    expected = load_file(NETS / "kd_expected.safetensors")
    quirks = DistillationQuirks(unmasked_padding=True, skip_last_hidden=True, independent_negatives=True)
    maps = tower_maps(student.model.config, teacher.model.config)
    ours, theirs = student.passes(batch, "full_")[1], teacher.passes(batch, "full_")[1]
    rows = {term.tap: term for term in released(XvlmPretraining.terms, quirks)}
    names = kd_names(temperature)
    assert set(names) | {f"{task}_logits_T{t}" for task in ("itm", "mlm") for t in (1, 2)} == set(expected)
    for published, taps in names.items():
        agree(sum(compared(rows[tap], ours, theirs, maps, temperature=temperature) for tap in taps), expected[published])


def test_distillation_loss_is_the_weighted_sum(nets, batch, monkeypatch):
    """The objective itself, negatives of each net drawn as recorded."""
    student, teacher = nets["student"], nets["teacher"]
    expected = load_file(NETS / "kd_expected.safetensors")
    hard = XvlmPretraining(student.model, losses=("itc", "itm", "mlm"), seed=0)
    quirks = DistillationQuirks(unmasked_padding=True, skip_last_hidden=True, independent_negatives=True)
    drawn = iter([student.negatives("full_"), teacher.negatives("full_")])
    monkeypatch.setattr("efficientvlm.objectives.xvlm_pretraining.draw_negatives", lambda *_: next(drawn))
    settings = SimpleNamespace(
        kd=0.4, weights=DistillWeights(), quirks=quirks, temperature=1.0, scale_by_temperature=False, cache_teacher=False
    )
    objective = distilled(hard, teacher.model, settings)
    losses = objective(batch, 0)
    kd = sum(expected[name] * (0.1 if name == "image_hidden" else 1) for name in kd_names(1.0))
    own = sum(student.expected[f"full_loss_{name}"] for name in ("itc", "itm", "mlm"))
    agree(losses["kd"].detach(), kd)
    agree(losses["loss"].detach(), 0.6 * own + 0.4 * kd)


@pytest.fixture(scope="module")
def vqa() -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    numbers = load_file(VQA / "batch.safetensors")
    batch = {
        "pixels": numbers["image"],
        "image_index": torch.arange(3),
        "question_ids": numbers["question_ids"],
        "question_mask": numbers["question_atts"],
        "answer_ids": numbers["answer_ids"],
        "answer_mask": numbers["answer_atts"],
        "answer_weights": numbers["answer_weights"],
        "answer_index": torch.arange(3).repeat_interleave(numbers["answers_per_question"]),
        "candidates": (numbers["candidate_ids"], numbers["candidate_atts"]),
    }
    return read(VQA / "model.safetensors"), batch, load_file(VQA / "expected.safetensors")


def test_answer_loss(vqa):
    model, batch, expected = vqa
    with torch.no_grad():
        logits = model.run(batch)["logits"]
    agree(logits, expected["open.decoder_logits"])
    agree(answer_loss(logits, batch["answer_ids"], batch["answer_mask"], batch["answer_weights"], 3), expected["open.loss"])


def test_answer_ranking(vqa):
    model, batch, expected = vqa
    chosen, probabilities = rank(model, batch, batch["candidates"], top=3, first_token_twice=True)
    assert torch.equal(chosen, expected["open.rank_ids"])
    agree(probabilities, expected["open.rank_probs"])
