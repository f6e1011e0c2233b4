"""Question answering of BLIP against the numbers of the published code: loss, ranking, generation, by the same task as X-VLM's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.blip.config import BlipAnswerConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.objectives.generation import Generation
from efficientvlm.tasks.ranking import generate, rank

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "blip_tasks_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
SMOOTHING, CLS, END = 0.1, 1, 2
TOWERS = {"vision": "image", "text": "question", "decoder": "decoder"}


def network(name: str) -> Any:
    """The published weights in our network; `vqa_unequal` has images of another width than texts."""
    published = json.loads((FOLDER / "config.json").read_text())
    sizes, common = published[name], published["common"]
    width = sizes["vision_width"]
    vision = {"hidden_size": width, "num_hidden_layers": sizes["vision_layers"], "num_attention_heads": sizes["vision_heads"]}
    vision |= {"intermediate_size": common["vision_mlp_ratio"] * width, "image_size": common["image_size"]}
    vision |= {"patch_size": common["patch_size"], "layer_norm_eps": common["vision_ln_eps"]}
    text = {key: sizes[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text |= {key: common[key] for key in ("vocab_size", "max_position_embeddings", "layer_norm_eps", "label_smoothing")}
    text |= {"bos_token_id": common["dec"], "sep_token_id": common["sep"], "pad_token_id": common["pad"]}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BlipAnswerConfig(vision_config=vision, text_config=text, question_start_id=common["enc"])
    made = MODELS[BlipAnswerConfig](config).eval()
    weights = load_file(FOLDER / f"{name}.safetensors")
    pairs = json.loads((FOLDER / "hf_key_map.json").read_text())["vqa"]["pairs"]
    found = made.load_state_dict({ours: weights[theirs] for theirs, ours in pairs if ours}, strict=False)
    assert not found.unexpected_keys and not found.missing_keys
    return made


@pytest.fixture(scope="module", params=["vqa", "vqa_unequal"])
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """Network, batch and published numbers."""
    numbers = load_file(FOLDER / f"{request.param}_batch.safetensors")
    questions = torch.arange(len(numbers["question_ids"]))
    batch = {
        "pixels": numbers["image"],
        "image_index": questions,
        "question_ids": numbers["question_ids"],
        "question_mask": numbers["question_atts"],
        "answer_ids": numbers["answer_ids"],
        "answer_mask": numbers["answer_atts"],
        "answer_weights": numbers["answer_weights"],
        "answer_index": questions.repeat_interleave(numbers["answers_per_question"]),
        "candidates": (numbers["candidate_ids"], numbers["candidate_atts"]),
    }
    assert not batch["question_mask"].all()
    return network(request.param), batch, load_file(FOLDER / f"{request.param}_expected.safetensors")


def test_loss_and_gradients(case):
    model, batch, expected = case
    loss = Generation(model, SMOOTHING)(batch, 0)["loss"]
    torch.testing.assert_close(loss, expected["loss"], **CLOSE)
    model.zero_grad()
    loss.backward()
    renamed = {theirs: ours for theirs, ours in json.loads((FOLDER / "hf_key_map.json").read_text())["vqa"]["pairs"] if ours}
    found = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    gradients = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[renamed[name]], gradient, **CLOSE)


def test_states_and_maps_of_every_layer(case):
    model, batch, expected = case
    kinds = {"hidden": "hidden", "self_attention": "self_attn", "cross_attention": "cross_attn"}
    with torch.no_grad():
        record = model.run(batch, model.taps)
    torch.testing.assert_close(record["logits"], expected["lm_logits"], **CLOSE)
    torch.testing.assert_close(record["states"], expected["question_states"], **CLOSE)
    for tap in model.taps:
        tower, _, kind = tap.partition(".")
        theirs = "image_attn" if tap == "vision.self_attention" else f"{TOWERS[tower]}_{kinds[kind]}"
        assert len(record[tap]) == 3 + (kind == "hidden")
        for layer, ours in enumerate(record[tap]):
            torch.testing.assert_close(ours, expected[f"{theirs}.{layer}"], **CLOSE)


def test_ranking(case):
    """Candidates 2 and 9 begin with the same token, so that either may be among the first."""
    model, batch, expected = case
    chosen, _ = rank(model, batch, batch["candidates"], top=4, smoothing=SMOOTHING)
    assert torch.equal(chosen[:, 0], expected["rank.max_ids"])
    alike = {2: 9}
    for ours, theirs in zip(chosen.tolist(), expected["rank.topk_ids"].tolist(), strict=True):
        assert {alike.get(at, at) for at in ours} == {alike.get(at, at) for at in theirs}
    every, probabilities = rank(model, batch, batch["candidates"], top=10, smoothing=SMOOTHING)
    assert torch.equal(every[:, 0], expected["rank.max_ids_all"])
    scores = torch.zeros(4, 10).scatter_(1, every, probabilities.log()).gather(1, expected["rank.topk_ids"])
    wanted = expected["rank.log_probs_sum"]
    torch.testing.assert_close(scores - scores[:, :1], wanted - wanted[:, :1], rtol=1e-4, atol=1e-4)


def test_answers_by_beam_search(case):
    """As published, where answers attend to the padding of questions; those to questions without padding need no switch."""
    model, batch, expected = case
    how: dict[str, Any] = {"cls_id": CLS, "sep_id": END, "max_tokens": 9, "beams": 3}
    theirs = expected["generate.beam3"]

    def answers(**more: Any) -> Tensor:
        ids = generate(model, batch, **how, **more)
        ended = (ids == END).long().cumsum(1) - (ids == END).long() > 0
        ours = F.pad(ids.masked_fill(ended, 0), (1, 9 - ids.shape[1]))
        return torch.cat([theirs[:, :1], ours[:, 1:]], 1)

    assert torch.equal(answers(attends_padding=True), theirs)
    assert torch.equal(answers(attends_padding=True, most=1), theirs), "one question at a time"
    whole = batch["question_mask"].bool().all(1)
    assert whole.any() and torch.equal(answers()[whole], theirs[whole])
