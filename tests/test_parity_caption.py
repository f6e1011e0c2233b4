"""Captioning of X-VLM against the numbers of the published code: the causal decoder, its losses and gradients, gates, distillation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficientvlm.compression.gates import attach
from efficientvlm.compression.sparsity import Scope
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.families.xvlm.published import read_published

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
    from efficientvlm.compression.anatomy import Anatomy

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


def test_constants_of_the_published_setting():
    published = json.loads((FOLDER / "config.json").read_text())["published_generation"]
    assert published["num_beams"] == 3 and published["prompt"] == "a picture of "


@pytest.mark.parametrize("form", ["open", "corrected", "published"])
def test_logits_under_gates(read, batch, gates, form):
    from efficientvlm.objectives.efficientvlm import released_rows

    model = read("kd_student")
    scope, values = structure(model, gates)
    reads = {"open": torch.ones_like(values), "corrected": values, "published": values[released_rows(scope)]}[form]
    theirs = load_file(FOLDER / "kd_expected.safetensors")["student_logits"] if form == "open" else gates[f"{form}.logits"]
    with torch.no_grad(), attach(model, scope.units) as hooks:
        hooks.set(reads)
        agree(model.run(batch)["logits"], theirs)
