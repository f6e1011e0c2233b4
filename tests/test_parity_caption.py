"""Captioning of X-VLM against the numbers of the published code: the causal decoder, its losses and gradients, gates, distillation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import attach
from efficientvlm.compression.sparsity import Scope
from efficientvlm.families.published import read_published
from efficientvlm.families.towers.decoding import Rules, beam, continued, stepping
from efficientvlm.families.xvlm.names import published_name
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.efficientvlm import distilled, released, released_rows
from efficientvlm.objectives.losses import caption_loss
from efficientvlm.objectives.self_critical import SelfCritical
from efficientvlm.objectives.terms import compared, tower_maps
from efficientvlm.settings.methods import CaptioningDistillation, CaptioningWeights, DistillationQuirks

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "xvlm_caption_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
KINDS = ("hidden", "self_attention")
DEPTHS = {"model": 1, "kd_student": 2, "kd_teacher": 4}
"""Net → its `local_attn_depth`, which changes nothing here."""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A published captioning net, read as the pre-training file that it maps from, and then made able to caption."""

    def of(name: str) -> Any:
        path = tmp_path_factory.mktemp("net") / f"{name}.safetensors"
        tensors = load_file(FOLDER / f"{name}.safetensors")
        save_file({key.replace("text_decoder.", "text_encoder."): tensor for key, tensor in tensors.items()}, path)
        settings = {"vision_heads": 4 if name == "model" else 5, "text_heads": 5, "local_attention_depth": DEPTHS[name], "dropout": 0.0}
        config, state, _ = read_published(path, settings=settings)
        model = XVLMModel(config).eval()
        model.load_state_dict(state, strict=True)
        tuned, new = model.gain("caption")
        assert not new and tuned.config.abilities() == {"caption"}
        return tuned.eval()

    return of


@pytest.fixture(scope="module")
def net(read: Any) -> Any:
    return read("model")


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    numbers = load_file(FOLDER / "batch.safetensors")
    return {"pixels": numbers["image"], "text_ids": numbers["text_ids"], "text_mask": numbers["text_atts"]}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def agree(ours: Any, theirs: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, **CLOSE)


def test_states_maps_and_logits(net, batch, expected):
    with torch.no_grad():
        record = net.run(batch, {f"{tower}.{kind}" for tower in ("text", "fusion") for kind in KINDS})
        agree(net.encode_image(batch["pixels"]).states, expected["image_embeds"])
        agree(net.run(batch)["logits"], expected["logits"])
    agree(record["logits"], expected["logits"])
    hidden = [*record["text.hidden"], *record["fusion.hidden"][1:]]
    maps = [*record["text.self_attention"], *record["fusion.self_attention"]]
    for ours, name, count in ((hidden, "hidden", 7), (maps, "self_attn", 6)):
        assert len(ours) == count
        for index, tensor in enumerate(ours):
            agree(tensor, expected[f"{name}.{index}"])


@pytest.fixture(scope="module")
def gates() -> dict[str, Tensor]:
    return load_file(FOLDER / "gates_expected.safetensors")


def structure(model: Any, gates: dict[str, Tensor]) -> tuple[Scope, Tensor]:
    """Every unit of `model`, and its published 0/1 gate; rows of cross heads alternate self- and cross-attention."""
    scope = Scope.of(Anatomy.of(model), 0.0)
    rows = {}
    for layer in range(6):
        rows[f"vision.{layer}.head"] = gates["deterministic.vision_head"][layer]
        rows[f"vision.{layer}.neuron"] = gates["deterministic.vision_intermediate"][layer]
    for layer in range(3):
        rows[f"text.{layer}.head"] = gates["deterministic.text_head"][layer]
        rows[f"text.{layer}.neuron"] = gates["deterministic.text_intermediate"][layer]
        rows[f"fusion.{layer}.head"] = gates["deterministic.cross_head"][2 * layer]
        rows[f"fusion.{layer}.cross_head"] = gates["deterministic.cross_head"][2 * layer + 1]
        rows[f"fusion.{layer}.neuron"] = gates["deterministic.cross_intermediate"][layer]
    return scope, torch.stack([rows[unit.group][unit.index] for unit in scope.units])


@pytest.mark.parametrize("form", ["open", "corrected", "published"])
def test_logits_under_gates(read, batch, gates, form):
    model = read("kd_student")
    scope, values = structure(model, gates)
    reads = {"open": torch.ones_like(values), "corrected": values, "published": values[released_rows(scope)]}[form]
    theirs = load_file(FOLDER / "kd_expected.safetensors")["student_logits"] if form == "open" else gates[f"{form}.logits"]
    with torch.no_grad(), attach(model, scope.units) as hooks:
        hooks.set(reads)
        agree(model.run(batch)["logits"], theirs)


def written(
    net: Any, pixels: Tensor, beams: int, least: int, most: int, *, cached: bool = True, repetition: float = 1.0, **rule: Any
) -> Any:
    """Captions [B, K, L], the prompt in front, padded with 0, and their scores; `least` and `most` count the prompt. 0 beams: greedy."""
    ids = torch.tensor(json.loads((FOLDER / "config.json").read_text())["prompt_ids"]).expand(len(pixels), -1)
    rules = Rules(end=2, filler=0, most=most - ids.shape[1], least=max(0, least - ids.shape[1]), repetition=repetition)
    with torch.no_grad():
        step = stepping(net, net.look(pixels)) if cached else uncached(net, pixels)
        if beams:
            found = beam(step, ids, rules, beams, **rule)
            return torch.cat([ids[:, None].expand(-1, beams, -1), found.ids], -1), found.scores
        return torch.cat([ids, continued(step, ids, rules)], 1), None


def uncached(net: Any, pixels: Tensor) -> Any:
    """Steps that compute every token anew."""
    before = torch.empty(len(pixels), 0, dtype=torch.long)
    rows = torch.arange(len(pixels))

    def step(ids: Tensor, goes_on: Tensor | None) -> Tensor:
        nonlocal before, rows
        if goes_on is not None:
            before, rows = before[goes_on], rows[goes_on]
        before = torch.cat([before, ids], 1)
        return net.run({"pixels": pixels[rows], "text_ids": before, "text_mask": torch.ones_like(before)})["logits"]

    return step


def same(ours: Tensor, theirs: Tensor) -> None:
    width = max(ours.shape[-1], theirs.shape[-1])
    assert torch.equal(*(F.pad(ids, (0, width - ids.shape[-1])) for ids in (ours, theirs)))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("beams, least, most", [(3, 5, 20), (3, 9, 12), (5, 5, 20), (2, 5, 7)])
def test_beam_search(net, batch, expected, beams, least, most, cached):
    name = f"beam{beams}.min{least}.max{most}"
    ids, scores = written(net, batch["pixels"], beams, least, most, cached=cached)
    same(ids[:, 0], expected[name])
    if f"{name}.sequence_score" in expected:
        agree(scores[:, 0], expected[f"{name}.sequence_score"])
    if f"{name}.all_beams" in expected:
        same(ids.flatten(0, 1), expected[f"{name}.all_beams"])
        agree(scores.flatten(), expected[f"{name}.all_beams_sequence_score"])
    newer = f"{name}.generated_length_norm"
    if newer in expected:
        ids, scores = written(net, batch["pixels"], beams, least, most, cached=cached, length_rule="generated")
        same(ids[:, 0], expected[newer])
        agree(scores[:, 0], expected[f"{newer}.sequence_score"])
        assert not torch.equal(expected[newer], expected[name])


def test_beam_search_with_a_penalty_on_repetition(net, batch, expected):
    same(written(net, batch["pixels"], 3, 5, 20, repetition=1.3)[0][:, 0], expected["beam3.min5.max20.rep1.3"])


@pytest.mark.parametrize("least, most", [(5, 20), (9, 20)])
def test_greedy_decoding(net, batch, expected, least, most):
    same(written(net, batch["pixels"], 0, least, most)[0], expected[f"hf_greedy.min{least}.max{most}"])


@pytest.mark.parametrize("most", [10, 20])
def test_the_published_greedy_loop_ends_every_text(net, batch, expected, most):
    """It ignores the least length, and its last slot is the end token where a text has not ended."""
    ids = F.pad(written(net, batch["pixels"], 0, 0, most - 1)[0], (0, 1))
    ids = F.pad(ids, (0, most - ids.shape[1]))
    unfinished = ~(ids == 2).any(1)
    ids[unfinished, -1] = 2
    same(ids, expected[f"greedy.max{most}"])


@pytest.mark.parametrize("form", ["open", "corrected", "published"])
def test_beam_search_under_gates(read, batch, gates, form):
    model = read("kd_student")
    scope, values = structure(model, gates)
    reads = {"open": torch.ones_like(values), "corrected": values, "published": values[released_rows(scope)]}[form]
    with attach(model, scope.units) as hooks:
        hooks.set(reads)
        same(written(model, batch["pixels"], 3, 5, 20)[0][:, 0], gates[f"{form}.beam3.min5.max20"])


def of_captions(batch: dict[str, Tensor], prompt: int = 4) -> dict[str, Tensor]:
    """The batch of a training step, a caption an image, whose first `prompt` tokens are not said."""
    target = batch["text_mask"].clone()
    target[:, :prompt] = 0
    return {**batch, "target_mask": target, "image_index": torch.arange(len(target))}


def test_what_is_to_be_said_and_its_loss(net, batch, expected):
    captions = of_captions(batch)
    assert torch.equal(captions["target_mask"].bool(), expected["labels"] != -100)
    logits, ids, target = expected["logits"], batch["text_ids"], captions["target_mask"]
    agree(caption_loss(logits, ids, target, 0.1, published=True), expected["loss_smooth_0.1"])
    agree(caption_loss(logits, ids, target, 0.1), expected["loss_torch_label_smoothing_0.1"])
    for published in (True, False):
        agree(caption_loss(logits, ids, target, published=published), expected["loss_smooth_0"])
    agree(caption_loss(logits, ids, of_captions(batch, 1)["target_mask"]), expected["loss_no_prompt_mask_smooth_0"])
    for row in range(len(ids)):
        one = slice(row, row + 1)
        for smoothing in (0, 0.1):
            mean = caption_loss(logits[one], ids[one], target[one], smoothing, published=True)
            agree(mean * target[row, 1:].sum(), expected[f"per_caption_loss_sum_smooth_{smoothing}"][row])


def test_gradients(read, batch, expected):
    net = read("model")
    losses = Captions(net, 0.1, published=True)(of_captions(batch), 0)
    losses["loss"].backward()
    agree(losses["caption"].detach(), expected["loss_smooth_0.1"])
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    count = 0
    for name, gradient in expected.items():
        if name.startswith("grad."):
            ours = published_name(name.removeprefix("grad.").replace("text_decoder.", "text_encoder."), 3)
            if ours is not None:
                agree(found[ours.replace("mlm_head.", "lm_head.")], gradient)
                count += 1
    assert count == 3


def test_distillation(read, batch):
    student, teacher = read("kd_student"), read("kd_teacher")
    expected = load_file(FOLDER / "kd_expected.safetensors")
    captions, hard = of_captions(batch), Captions(student, 0.1, published=True)
    quirks = DistillationQuirks(unmasked_padding=True, skip_last_hidden=True)
    taps = {term.tap for term in Captions.terms if not term.tap.startswith("decoder")}
    with torch.no_grad():
        ours, theirs = (hard.passes(model, captions, 0, taps).record for model in (student, teacher))
    maps = tower_maps(student.config, teacher.config)
    rows = {term.tap: term for term in released(hard.terms, quirks)}
    assert rows.keys() == taps
    names = {
        "image_hidden": ["vision.hidden"],
        "image_attn": ["vision.self_attention"],
        "decoder_hidden": ["text.hidden", "fusion.hidden"],
        "decoder_attn": ["text.self_attention", "fusion.self_attention"],
        "decoder_cross_attn": ["fusion.cross_attention"],
    }
    for name, parts in names.items():
        agree(sum(compared(rows[tap], ours, theirs, maps) for tap in parts), expected[name])
    for temperature in (1.0, 2.0):
        agree(compared(rows["logits"], ours, theirs, maps, temperature=temperature), expected[f"logits_T{temperature:.0f}"])
    whole = [term._replace(mask="") for term in hard.terms if term.tap in ("text.hidden", "fusion.hidden")]
    agree(sum(compared(term, ours, theirs, maps) for term in whole), expected["decoder_hidden_with_last"])

    settings = SimpleNamespace(kd=0.3, weights=CaptioningWeights(), quirks=quirks, temperature=1.0, scale_by_temperature=False)
    settings.cache_teacher = False
    assert CaptioningDistillation.model_fields["kd"].default == 0.3
    losses = distilled(hard, teacher, settings)(captions, 0)
    agree(losses["kd"].detach(), expected["kd_total"])
    agree(losses["caption"].detach(), expected["student_loss"])
    agree(losses["loss"].detach(), expected["total"])


def test_self_critical_loss():
    """By the published rewards of 4 images with 5 samples each, under both baselines."""
    published = json.loads((FOLDER.parent / "caption_metrics" / "scst.json").read_text())
    references = published["ground_truth"]
    scores = dict(
        zip([*published["samples"], *published["greedy"]], [*published["sample_cider_d"], *published["greedy_cider_d"]], strict=True)
    )
    chances = torch.tensor(published["sample_mean_logprob"])

    class Told(SelfCritical):
        """What is said, and how probable it was, is told instead of computed."""

        def sampled(self, *_: Any) -> Tensor:
            return torch.arange(20)[:, None]

        def likeliest(self, *_: Any) -> Tensor:
            return torch.arange(20, 24)[:, None]

        def log_probability(self, *_: Any) -> Tensor:
            return chances

    texts = [*published["samples"], *published["greedy"]]
    for baseline, name in (("greedy", "greedy"), ("samples", "sample")):
        objective = Told(
            None,
            lambda said, known: [scores[text] for text in said],
            lambda ids: texts[ids[0]],
            [1],
            Rules(2, 2, 8),
            baseline=baseline,  # type: ignore[arg-type]
        )
        found = objective({"references": references, "pixels": torch.zeros(4)}, 0)
        agree(found["loss"], torch.tensor(published[f"loss_{name}_baseline"]))
        agree(found["reward"], torch.tensor(published[f"mean_sample_score_{name}"]))
