"""The hard-concrete numbers of the published VQA pruning module, gradients included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from efficientvlm.compression.costs import Shares
from efficientvlm.compression.gates import open_probability, published_gates, sample_gates
from efficientvlm.compression.sparsity import lagrangian, target_at

FOLDER = Path(__file__).parent / "reference"
CLOSE = dict(rtol=1e-5, atol=1e-6)
WIDTH, HEADS, INTERMEDIATE = 48, 4, 96


def published_costs(width: int, heads: int, intermediate: int) -> tuple[int, int, int]:
    """Elements of one head, one neuron and one FFN layer as the published code counts them.

    The output bias of attention is shared by the heads, the bias of fc1 is taken as 4·width, a neuron is an integer division.
    """
    layer = 2 * width * intermediate + width + 4 * width
    return (4 * width * width + 4 * width) // heads, layer // intermediate, layer


def test_published_costs_are_those_of_the_base_model():
    assert published_costs(768, 12, 3072) == (196_864, 1_537, 4_722_432)


@pytest.fixture(scope="module")
def numbers():
    return load_file(FOLDER / "l0.safetensors"), json.loads((FOLDER / "l0.json").read_text())


def test_samples_probabilities_and_deterministic_gates(numbers):
    expected, meta = numbers
    for kind in meta["types"]:
        log_alpha = expected[f"log_alpha.{kind}"]
        sampled = sample_gates(log_alpha, expected[f"uniform.{kind}"])
        torch.testing.assert_close(sampled, expected[f"sampled.{kind}_z"].view_as(log_alpha), **CLOSE)
        torch.testing.assert_close(open_probability(log_alpha), expected[f"p_open.{kind}"], **CLOSE)
        rows = torch.stack([published_gates(row) for row in log_alpha])
        assert torch.equal(rows, expected[f"deterministic.{kind}_z"].view_as(log_alpha))


def test_lagrangian_and_gradients(numbers):
    expected, meta = numbers
    head, neuron, layer = published_costs(WIDTH, HEADS, INTERMEDIATE)
    assert (head, neuron) == (meta["params_per_head"], meta["params_per_intermediate_dim"])
    leaves = {kind: expected[f"log_alpha.{kind}"].clone().requires_grad_() for kind in meta["types"]}
    costs = torch.cat([torch.full((leaf.numel(),), float(head if "head" in kind else neuron)) for kind, leaf in leaves.items()])
    total = sum(leaf.numel() * head if "head" in kind else len(leaf) * layer for kind, leaf in leaves.items())
    assert total == meta["prunable_model_size"]
    multipliers = torch.tensor([meta["lambda_1"], meta["lambda_2"]], requires_grad=True)
    for step in (0, 10, 25, 50, 80):
        p_open = torch.cat([open_probability(leaf).flatten() for leaf in leaves.values()])
        torch.testing.assert_close(p_open @ costs, expected["expected_params"], rtol=1e-5, atol=0)
        sparsity = 1 - Shares(costs, torch.ones(len(costs), dtype=torch.bool))(p_open) / total
        torch.testing.assert_close(sparsity, expected[f"expected_sparsity.{step}"], **CLOSE)
        target = target_at(step, meta["warmup_steps"], meta["target_sparsity"], meta["start_sparsity"])
        assert target == pytest.approx(expected[f"target_sparsity.{step}"].item())
        loss = lagrangian(sparsity, target, *multipliers)
        torch.testing.assert_close(loss, expected[f"lagrangian.{step}"], **CLOSE)
        if step == meta["gradients_at_step"]:
            loss.backward()
    for kind, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"grad.log_alpha.{kind}"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(multipliers.grad, torch.stack([expected["grad.lambda_1"], expected["grad.lambda_2"]]), **CLOSE)
