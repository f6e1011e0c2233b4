"""Counts agree with sizes worked out by hand and with each other."""

from __future__ import annotations

import json

import pytest
import torch
from compression_cases import CONFIGS, build

from efficientvlm.compression.accounting import account, count_macs, count_parameters, count_sparsity
from efficientvlm.compression.surgery import slice_model
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.family import XVLM


def half(model):
    return torch.rand(len(model.units()), generator=torch.Generator().manual_seed(4)) < 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_account_is_json_and_adds_up(name):
    model, _ = build(name)
    keep = half(model)
    keep[:8] = False  # the first layer loses all its heads
    sliced = slice_model(model, keep)
    before, after = account(model), account(sliced, text_length=12)
    assert json.loads(json.dumps(after)) == after
    for part in (before, after):
        assert part["parameters"]["total"] == sum(part["parameters"]["by_tower"].values())
        assert part["macs"]["total"] == sum(part["macs"]["by_tower"].values())
        for key in ("initial", "kept"):
            assert part["sparsity"][key] == sum(tower[key] for tower in part["sparsity"]["by_tower"].values())
    gone = before["parameters"]["total"] - after["parameters"]["total"]
    assert gone == after["sparsity"]["initial"] - after["sparsity"]["kept"] > 0
    assert after["sparsity"]["initial"] == before["sparsity"]["initial"] == before["sparsity"]["kept"]
    assert after["macs"]["total"] < before["macs"]["total"]
    assert sum(group["kept"] for group in after["units"].values()) == len(sliced.units())
    assert all(group["kept"] == group["of"] for group in before["units"].values())


def test_tied_tensors_count_once_and_as_embedding():
    model, _ = build("toy")
    counted = count_parameters(model)
    assert counted["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counted["total"] - counted["without_embeddings"] == model.words.weight.numel()


def test_sparsity_of_nothing_left_is_one():
    model, _ = build("xvlm")
    empty = slice_model(model, torch.zeros(len(model.units()), dtype=torch.bool))
    counted = count_sparsity(empty)
    assert counted["achieved"] == 1 and all(tower["achieved"] == 1 for tower in counted["by_tower"].values())


def test_macs_of_vision_are_the_closed_form():
    model, _ = build("xvlm")
    tokens, width, neurons, patches = 5, 16, 6, 4
    layer = tokens * (4 * width * width + 2 * width * neurons) + 2 * tokens * tokens * width
    macs = count_macs(model, text_length=7)
    assert macs["by_tower"]["vision"] == 2 * layer + patches * 3 * 8 * 8 * width
    assert (macs["image_size"], macs["text_length"]) == (16, 7)
    assert count_macs(model, text_length=9)["by_tower"]["vision"] == macs["by_tower"]["vision"]


def test_counting_leaves_mode_hooks_and_random_numbers_alone():
    model, _ = build("toy")
    model.train()
    state = torch.get_rng_state()
    account(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_base_size_is_counted_on_the_meta_device():
    with torch.device("meta"):
        model = XVLM().build(XVLMConfig(vision_layers=6, text_layers=3, fusion_layers=3, local_attention_depth=2))
    counted = account(model, text_length=40)
    assert counted["parameters"]["total"] == pytest.approx(120.12e6, rel=1e-3)  # the student of EfficientVLM with pre-training heads
    assert counted["macs"]["total"] == pytest.approx(11.4e9, rel=0.02)
    assert counted["sparsity"]["initial"] == (
        92_104_704  # as published, which counts the output biases, and the bias of fc1 as 4·768
        - 768 * (6 + 3 + 2 * 3)
        - 768 * 12
    )
