"""Budgets: schedule, expectation, Lagrangian, what may be pruned, and what cannot be reached."""

from __future__ import annotations

import pytest
import torch
from compression_cases import build

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.costs import Shares
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.sparsity import Budget, Scope, lagrangian, target_at
from efficientvlm.errors import BadInput, TargetMissed


@pytest.fixture(scope="module")
def anatomy():
    model, _ = build("xvlm")
    return Anatomy.of(model)


def test_target_rises_linearly_and_stays():
    assert [target_at(step, 50, 0.4) for step in (0, 10, 25, 50, 80)] == pytest.approx([0, 0.08, 0.2, 0.4, 0.4])
    assert target_at(0, 0, 0.4) == 0.4
    assert target_at(5, 10, 0.4, start=0.2) == pytest.approx(0.3)


def test_expected_sparsity_and_lagrangian_by_hand():
    p_open = torch.tensor([1.0, 0.5, 0.25], requires_grad=True)
    expected = 1 - Shares(torch.tensor([10.0, 20.0, 40.0]), torch.ones(3, dtype=torch.bool))(p_open) / 100
    assert expected.item() == pytest.approx(1 - 30 / 100)
    multipliers = torch.tensor([0.7, 1.3], requires_grad=True)
    loss = lagrangian(expected, 0.5, *multipliers)
    assert loss.item() == pytest.approx(0.7 * 0.2 + 1.3 * 0.04)
    loss.backward()
    slope = 0.7 + 2 * 1.3 * 0.2
    torch.testing.assert_close(p_open.grad, torch.tensor([-10.0, -20.0, -40.0]) / 100 * slope)
    torch.testing.assert_close(multipliers.grad, torch.tensor([0.2, 0.04]))


def test_costs_are_exact_for_plain_units(anatomy):
    costs = dict(zip([(unit.tower, unit.kind) for unit in anatomy.units], anatomy.costs.tolist(), strict=True))
    assert costs["vision", "head"] == 4 * 4 * 16 + 3 * 4  # three projections with bias, output without
    assert costs["fusion", "cross_head"] == 2 * 8 * 24 + 2 * 8 * 16 + 3 * 8  # keys and values read the vision width
    assert costs["text", "neuron"] == 2 * 24 + 1
    assert anatomy.total == int(anatomy.costs.sum())


def test_one_budget_covers_all_towers(anatomy):
    scope = Scope.of(anatomy, 0.4)
    budget = Budget(scope)
    assert budget.names == ("all",) and scope.units == list(anatomy.units)
    ones = torch.ones(len(scope.units))
    torch.testing.assert_close(budget.expected(ones), torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(budget.expected(0 * ones), torch.ones(1))
    torch.testing.assert_close(budget.target(5, 10), torch.tensor([0.2]))
    assert budget(ones, budget.target(9, 9)).item() == 0, "multipliers start at 0"


def test_separate_budgets_have_their_own_multipliers(anatomy):
    scope = Scope.of(anatomy, 0.3, tower_sparsity={"vision": 0.6, "decoder": 0.0})
    budget = Budget(scope)
    assert budget.names == ("vision", "decoder", "text+fusion") and budget.lambda1.shape == (3,)
    assert budget.final.tolist() == pytest.approx([0.6, 0.0, 0.3])
    p_open = torch.tensor([0.25 if unit.tower == "vision" else 1.0 for unit in scope.units])
    torch.testing.assert_close(budget.expected(p_open), torch.tensor([0.75, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_frozen_units_have_no_gate_but_count_in_the_whole(anatomy):
    scope = Scope.of(anatomy, 0.1, kinds=["neuron"], towers=["vision", "text"])
    assert {(unit.tower, unit.kind) for unit in scope.units} == {("vision", "neuron"), ("text", "neuron")}
    assert scope.targets[0].whole == anatomy.total
    all_gone = Budget(scope).expected(torch.zeros(len(scope.units)))
    neurons = sum(cost for unit, cost in zip(anatomy.units, anatomy.costs.tolist(), strict=True) if unit in set(scope.units))
    torch.testing.assert_close(all_gone, torch.tensor([neurons / anatomy.total]))


def test_ascent_and_descent_reach_the_target(anatomy):
    scope = Scope.of(anatomy, 0.5)
    budget, gates = Budget(scope), Gates(scope.units)
    gates.clamp_()
    down = torch.optim.AdamW(gates.parameters(), lr=0.05, weight_decay=0)
    up = torch.optim.AdamW(budget.parameters(), lr=0.05, weight_decay=0, maximize=True)
    for _ in range(400):
        loss = budget(gates.p_open(), budget.target(1, 1))
        down.zero_grad(), up.zero_grad(), loss.backward(), down.step(), up.step(), gates.clamp_()
    assert budget.expected(gates.p_open()).item() == pytest.approx(0.5, abs=0.05)
    assert (budget.lambda1 != 0).all()


def test_what_went_before_counts(anatomy):
    whole = {tower: 2 * count for tower, count in anatomy.totals.items()}
    scope = Scope.of(anatomy, 0.6, whole=whole)
    assert scope.targets[0].need == round(0.2 * anatomy.total)
    torch.testing.assert_close(Budget(scope).expected(torch.ones(len(scope.units))), torch.tensor([0.5]))
    assert scope.achieved(torch.ones(len(anatomy.units), dtype=torch.bool)) == {"all": 0.5}
    assert Scope.of(anatomy, 0.3, whole=whole).targets[0].need == 0


def test_unreachable_targets_exit_4_with_the_numbers(anatomy):
    Scope.of(anatomy, 1.0, allow_blind=True).check_feasible()
    for limits in ({"min_heads": 2}, {"min_neurons": 1}, {"min_neurons": 1, "round_to": 4}, {"kinds": ["head"]}, {"towers": ["text"]}):
        with pytest.raises(TargetMissed, match=r"at most 0\.\d+") as caught:
            Scope.of(anatomy, 0.99, **limits).check_feasible()
        assert caught.value.exit_code == 4
    with pytest.raises(TargetMissed, match="of vision cannot"):
        Scope.of(anatomy, 0.0, tower_sparsity={"vision": 1.0}, min_heads=1).check_feasible()


def test_a_floor_of_one_kind_is_no_floor_of_another(anatomy):
    for kinds, floor in ((["head", "cross_head"], {"min_neurons": 10_000}), (["neuron"], {"min_heads": 10_000})):
        alone = Scope.of(anatomy, 0.0, kinds=kinds, allow_blind=True)
        most = alone.cost.removed(alone.active) / anatomy.total
        Scope.of(anatomy, 0.999 * most, kinds=kinds, allow_blind=True, **floor).check_feasible()
        with pytest.raises(TargetMissed):
            Scope.of(anatomy, 0.001, allow_blind=True, min_heads=10_000, min_neurons=10_000).check_feasible()


def test_need_is_the_fewest_elements_that_reach_the_target(anatomy):
    for sparsity in (0.0, 0.07, 0.1, 0.3, 0.7, 1.0):
        target = Scope.of(anatomy, sparsity).targets[0]
        assert target.need / target.whole >= sparsity
        assert target.need == 0 or (target.need - 1) / target.whole < sparsity


@pytest.mark.parametrize(
    "wrong", [{"towers": ["audio"]}, {"kinds": ["layer"]}, {"tower_sparsity": {"audio": 0.1}}, {"tower_sparsity": {"text": 2}}]
)
def test_unknown_names_are_bad_input(anatomy, wrong):
    with pytest.raises(BadInput):
        Scope.of(anatomy, 0.4, **wrong)
