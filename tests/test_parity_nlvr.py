"""X-VLM on two images against the numbers of the published code: passes, losses, distillation, gates, text assignment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parity_xvlm import FOLDER, agree, agree_all
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.compression.anatomy import Anatomy, Groups
from efficientvlm.compression.gates import attach, published_gates, sample_gates
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.names import published_name
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.families.xvlm.pairs import first_copy, second_copies
from efficientvlm.objectives.assignment import Drawn, TextAssignment, weights_of
from efficientvlm.objectives.comparison import Comparison
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.efficientvlm import distilled, released_rows
from efficientvlm.objectives.terms import compared
from efficientvlm.settings.compose import stage_settings

NETS = FOLDER / "xvlm_nlvr_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
SIZES: dict[str, Any] = {
    "image_size": 24, "patch_size": 8, "vision_width": 40, "vision_heads": 5, "vision_intermediate": 60, "vocab_size": 101,
    "max_positions": 32, "text_width": 40, "text_heads": 5, "text_intermediate": 60, "dropout": 0.0, "fusion_images": 2,
}  # fmt: skip
LAYERS = {"student": (6, 3, 6), "teacher": (12, 6, 12)}
KEEP = frozenset(("hidden", "self_attention", "cross_attention"))
EVERYTHING = frozenset(tap for tap in XVLMModel.taps if not tap.startswith("decoder"))
TEXT = {"text_ids": "text_ids", "text_mask": "text_atts"}


def config_of(name: str, **changes: Any) -> XVLMConfig:
    layers = dict(zip(("vision_layers", "text_layers", "fusion_layers"), LAYERS[name], strict=True))
    return XVLMConfig(**SIZES | layers | {"heads": ["compare"], "local_attention_depth": LAYERS[name][0] // 3} | changes)


def read(name: str, file: str) -> Any:
    model = XVLMModel(config_of(name)).eval()
    theirs = {published_name(key, LAYERS[name][1]): value for key, value in load_file(NETS / file).items() if "position_ids" not in key}
    assert None not in theirs
    second = second_copies(theirs)
    assert second and all(torch.equal(theirs[copy], theirs[first_copy(copy)]) for copy in second)
    model.load_state_dict({key: value for key, value in theirs.items() if key not in second}, strict=True)
    return model


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    return {"student": read("student", "model.safetensors"), "teacher": read("teacher", "teacher.safetensors")}


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return load_file(NETS / "expected.safetensors")


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    given = load_file(NETS / "batch.safetensors")
    found: dict[str, Any] = {ours: given[theirs] for ours, theirs in TEXT.items()}
    pairs = torch.arange(len(given["targets"]))
    return found | {"pixels": given["image0"], "second_pixels": given["image1"], "labels": given["targets"], "pair_index": pairs}


@torch.no_grad()
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_states_maps_and_logits(nets: dict[str, Any], numbers: dict[str, Tensor], batch: dict[str, Any], name: str) -> None:
    expected = {key.removeprefix(f"{name}."): value for key, value in numbers.items() if key.startswith(f"{name}.")}
    record = nets[name].run(batch, EVERYTHING)
    agree(record["logits"], expected["logits"])
    agree(nets[name].run(batch)["logits"], expected["logits"])  # without maps, by another path
    agree(F.cross_entropy(record["logits"], batch["labels"]), expected["loss"])
    agree_all([*record["text.hidden"], *record["fusion.hidden"][1:]], expected, "text_hidden")
    agree_all([*record["text.self_attention"], *record["fusion.self_attention"]], expected, "self_attn")
    agree_all(record["fusion.cross_attention"], expected, "cross_attn")
    agree_all(record["vision.hidden"], expected, "image_hidden")
    if name == "student":
        agree_all(record["vision.self_attention"], expected, "image_attn")
        swapped = {**batch, "pixels": batch["second_pixels"], "second_pixels": batch["pixels"]}
        agree(nets[name].run(swapped)["logits"], expected["logits_images_swapped"])
    images = nets[name].encode_image(torch.cat([batch["pixels"], batch["second_pixels"]])).states
    agree(images, torch.cat([expected["image0_embeds"], expected["image1_embeds"]]))


def test_gradients(nets: dict[str, Any], numbers: dict[str, Tensor], batch: dict[str, Any]) -> None:
    model = nets["student"]
    model.zero_grad()
    F.cross_entropy(model.run(batch)["logits"], batch["labels"]).backward()
    ours = dict(model.named_parameters())
    found = {key.removeprefix("student.grad."): value for key, value in numbers.items() if key.startswith("student.grad.")}
    for name, gradient in found.items():
        torch.testing.assert_close(ours[str(published_name(name, 3))].grad, gradient, rtol=1e-3, atol=1e-6)
    assert any("crossattention.self.key" in name for name in found)
    model.zero_grad()


def kd_settings(**quirks: bool) -> Any:
    return stage_settings("finetune", {"task": "nlvr2", "model": "a", "teacher": "b", "data": "c", "out": "d", "quirks": quirks})


RELEASED = {"unmasked_padding": True, "skip_last_hidden": True}
TERMS = {
    "text_hidden": "text.hidden", "text_attn": "text.self_attention", "image_hidden": "vision.hidden",
    "image_attn": "vision.self_attention", "cross_hidden": "fusion.hidden", "cross_self_attn": "fusion.self_attention",
    "cross_attn": "fusion.cross_attention",
}  # fmt: skip


@pytest.mark.parametrize("form", ["published", "corrected"])
def test_distillation(nets: dict[str, Any], batch: dict[str, Any], form: str) -> None:
    """The published map compares layers of both images with those of the second; the right one goes image by image."""
    expected = load_file(NETS / "kd_expected.safetensors")
    settings = kd_settings(**RELEASED, second_image=form == "published")
    objective = distilled(Comparison(nets["student"]), nets["teacher"], settings)
    assert isinstance(objective, Distilled) and (settings.kd, settings.weights.fusion_hidden) == (0.2, 0.165)
    rows = {term.tap: term for term in objective.terms}
    with torch.no_grad():
        ours, theirs = (objective.hard.passes(nets[name], batch, 0, EVERYTHING).record for name in ("student", "teacher"))
        losses = objective(batch, 0)
    for name, tap in TERMS.items():
        agree(compared(rows[tap], ours, theirs, objective.maps), expected[f"{form}.{name}" if "cross" in name else name])
    for temperature in (1, 2):
        agree(compared(rows["logits"], ours, theirs, objective.maps, temperature=temperature), expected[f"logits_T{temperature}"])
    agree(losses["task"], expected["student_loss"])
    agree(losses["kd"], expected[f"{form}.kd_total"])
    agree(losses["loss"], expected[f"{form}.total"])


GATES = {
    "vision_head": ["vision.{}.head"], "text_head": ["text.{}.head"], "cross_head": ["fusion.{}.head", "fusion.{}.cross_head"],
    "vision_intermediate": ["vision.{}.neuron"], "text_intermediate": ["text.{}.neuron"], "cross_intermediate": ["fusion.{}.neuron"],
}  # fmt: skip


def gates_of(model: Any, expected: dict[str, Tensor], name: str) -> Tensor:
    """Values by unit of `model`: of fusion layer n, the cross head rows 2n (self-attention) and 2n + 1, and neuron row n."""
    rows = {}
    for kind, groups in GATES.items():
        for number, row in enumerate(expected[f"{name}.{kind}"]):
            rows[groups[number % len(groups)].format(number // len(groups))] = row
    return torch.stack([rows[unit.group][unit.index] for unit in model.units()])


@pytest.mark.parametrize("form", ["published", "corrected"])
@pytest.mark.parametrize("draw", ["deterministic", "sampled"])
def test_gates(nets: dict[str, Any], batch: dict[str, Any], form: str, draw: str) -> None:
    expected, model = load_file(NETS / "gates_expected.safetensors"), nets["student"]
    scope = Scope.of(Anatomy.of(model), 0.25)
    log_alpha = gates_of(model, expected, "log_alpha").requires_grad_()
    if draw == "sampled":
        gates = sample_gates(log_alpha, gates_of(model, expected, "uniform"))
        agree(gates, gates_of(model, expected, "sampled"))
    else:
        gates = torch.cat([published_gates(row) for row in Groups(scope.units).split(log_alpha.detach()).values()])
        agree(gates, gates_of(model, expected, "deterministic"))
    applied = gates[released_rows(scope)] if form == "published" else gates
    with attach(model, scope.units) as hooks, before_activation(model, scope, applied) as others:
        hooks.set(others)
        record = model.run(batch, {"text.hidden", "fusion.hidden"})
        loss = F.cross_entropy(record["logits"], batch["labels"])
        agree(record["logits"].detach(), expected[f"{form}.{draw}_logits"])
        agree(loss.detach(), expected[f"{form}.{draw}_loss"])
        if draw == "deterministic":
            agree_all([*record["text.hidden"], *record["fusion.hidden"][1:]], expected, f"{form}.deterministic_text_hidden")
            return
        loss.backward()
    wanted = {f"grad.{kind}": expected[f"{form}.grad.{kind}"] for kind in GATES}
    torch.testing.assert_close(log_alpha.grad, gates_of(model, wanted, "grad"), rtol=1e-3, atol=1e-7)
    model.zero_grad()
    if form == "published":  # rows that never act: the last three of twelve, and of six
        assert not log_alpha.grad[[unit.group in DEAD for unit in scope.units]].any()


@contextmanager
def before_activation(model: Any, scope: Scope, gates: Tensor) -> Iterator[Tensor]:
    """Published gates of vision neurons lie in front of the activation, ours behind it: the same where they are 0 or 1. The other gates."""
    parts = Groups(scope.units).split(gates)
    names = [f"vision.{layer}.neuron" for layer in range(model.config.vision_layers)]
    handles = []
    for layer, name in zip(model.vision.layers, names, strict=True):
        handles.append(layer.fc1.register_forward_hook(lambda _, __, out, part=parts[name]: out * part))
    try:
        yield torch.cat([torch.ones_like(part) if name in names else part for name, part in parts.items()])
    finally:
        for handle in handles:
            handle.remove()


DEAD = {"fusion.4.cross_head", "fusion.5.head", "fusion.5.cross_head", "fusion.3.neuron", "fusion.4.neuron", "fusion.5.neuron"}


def test_a_structure_of_the_published_gates_is_the_network_under_them(nets: dict[str, Any], batch: dict[str, Any]) -> None:
    expected, model = load_file(NETS / "gates_expected.safetensors"), nets["student"]
    keep = gates_of(model, expected, "deterministic").bool()
    with torch.no_grad():
        agree(slice_model(model, keep).run(batch)["logits"], expected["corrected.deterministic_logits"])


def test_text_assignment(nets: dict[str, Any], numbers: dict[str, Tensor]) -> None:
    given, extra = load_file(NETS / "batch.safetensors"), load_file(NETS / "text_assignment_extra.safetensors")
    model = XVLMModel(config_of("student", heads=["assign"], embed_dim=20)).eval()
    state = {name: value for name, value in nets["student"].state_dict().items() if not name.startswith("compare_head.")}
    model.load_state_dict(state | {name.replace("ta_head", "assign_head"): value for name, value in extra.items()}, strict=True)
    batch = {"pixels": given["ta_image"], "text_ids": given["ta_text_ids"], "text_mask": given["ta_text_atts"]}
    drawn = Drawn(numbers["ta.labels"], numbers["ta.image0_index"], numbers["ta.image1_index"])
    with torch.no_grad():
        found = TextAssignment(model, seed=0).passes(model, {**batch, "image_ids": torch.arange(7)}, 0, (), drawn)
        features = model.image_feature(model.encode_image(batch["pixels"]).states)
    agree(features, numbers["ta.image_feat"])
    agree(weights_of(features, torch.eye(7, dtype=torch.bool)), numbers["ta.distractor_weights"])
    agree(found.record["logits"], numbers["ta.logits"])
    agree(found.losses["task"], numbers["ta.loss"])
