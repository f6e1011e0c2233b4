"""Snapping meets the budget within one unit, for any probabilities, within the floors, the same way every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compression_cases import CONFIGS, build
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientvlm.compression.anatomy import Anatomy, Groups
from efficientvlm.compression.snapping import snap, snap_scores
from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import Diverged, TargetMissed
from efficientvlm.families.anatomy import NEURON, GatePoint, Site, Unit

ANATOMIES = {name: Anatomy.of(build(name)[0]) for name in CONFIGS}
many = settings(max_examples=60, deadline=None, derandomize=True)


def probabilities(count, seed, shape):
    values = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return {"spread": values, "sure": (values < 0.5).float() * 0.9 + 0.05, "tied": (values * 3).round() / 3, "open": 0 * values + 1}[shape]


@st.composite
def cases(draw):
    anatomy = ANATOMIES[draw(st.sampled_from(sorted(ANATOMIES)))]
    other = next(tower for tower in anatomy.totals if tower != "vision")
    limits = {
        "min_heads": draw(st.integers(0, 2)),
        "min_neurons": draw(st.integers(0, 3)),
        "round_to": draw(st.sampled_from([1, 1, 2, 4])),
        "kinds": draw(st.sampled_from([["head", "cross_head", "neuron"], ["neuron"], ["head", "neuron"]])),
        "tower_sparsity": draw(st.sampled_from([{}, {}, {"vision": 0.3}, {"vision": 0.1, other: 0.5}])),
    }
    scope = Scope.of(anatomy, draw(st.floats(0, 0.9)), **limits)
    return scope, probabilities(len(scope.units), draw(st.integers(0, 10**6)), draw(st.sampled_from(["spread", "sure", "tied", "open"])))


def test_what_can_be_reached_is_reached_though_the_best_heads_cost_most() -> None:
    """Two query heads of one key head cost less than two of different ones, which may have the higher probabilities."""
    limits = {"min_heads": 2, "min_neurons": 1, "round_to": 4, "kinds": ["head", "cross_head", "neuron"], "tower_sparsity": {}}
    scope = Scope.of(ANATOMIES["toy"], 0.515, **limits)
    scope.check_feasible()
    for seed in range(8):
        keep = snap(probabilities(len(scope.units), seed, "spread"), scope)
        assert scope.anatomy.removed_elements(~keep, scope.targets[0].towers) >= scope.targets[0].need


@many
@given(case=cases(), by_score=st.booleans())
def test_budget_is_met_within_one_unit_and_limits_hold(case, by_score):
    scope, p_open = case
    method = snap_scores if by_score else snap
    try:
        keep = method(p_open, scope)
    except TargetMissed:
        with pytest.raises(TargetMissed):
            scope.check_feasible()
        return
    assert torch.equal(keep, method(p_open.clone(), scope))
    assert keep[torch.from_numpy(~scope.active)].all()
    anatomy, groups = scope.anatomy, Groups(scope.anatomy.units)
    for name, part in groups.slices.items():
        size, kept, kind = part.stop - part.start, int(keep[part].sum()), name.rpartition(".")[2]
        assert kept >= min(size, scope.min_neurons if kind == NEURON else scope.min_heads)
        assert kind != NEURON or kept % scope.round_to == 0 or kept == size
    ranked = dict(zip(np.flatnonzero(scope.active).tolist(), p_open.tolist(), strict=True))
    for target in scope.targets:
        removed = anatomy.removed_elements(~keep, target.towers)
        assert removed >= target.need
        for name, part in groups.slices.items():
            closed = [u for u in range(part.start, part.stop) if not keep[u]]
            if name.partition(".")[0] not in target.towers or not closed:
                continue
            step = scope.round_to if name.endswith(NEURON) else 1
            best_first = sorted(closed, key=lambda u: (-ranked[u], u))
            again = keep.clone()
            again[best_first[:step]] = True
            assert anatomy.removed_elements(~again, target.towers) < target.need, f"{name} could come back"


@many
@given(case=cases())
def test_plain_groups_keep_their_most_probable_units(case):
    scope, p_open = case
    try:
        keep = snap(p_open, scope)[torch.from_numpy(scope.active)]
    except TargetMissed:
        return
    for name, part in Groups(scope.units).slices.items():
        if name == "text.1.head":  # heads of the toy family that share keys and values
            continue
        order = sorted(range(part.start, part.stop), key=lambda u: (-float(p_open[u]), u))
        kept = keep[order].tolist()
        assert kept == sorted(kept, reverse=True), name


def row(tower, layer, kind, count, cost):
    name = f"{tower}.{layer}.{kind}"
    return [Unit(tower, layer, kind, i, (Site(name, 0, i, i + 1),), (GatePoint("m", i, i + 1),)) for i in range(count)], {
        name: (count, cost)
    }


def scope_of(*rows, sparsity, **limits):
    units = [unit for part, _ in rows for unit in part]
    return Scope.of(Anatomy(units, {k: v for _, shape in rows for k, v in shape.items()}), sparsity, **limits)


def test_counts_are_rounded_sums_when_they_meet_the_budget():
    scope = scope_of(row("vision", 0, "neuron", 4, 10), row("vision", 1, "neuron", 4, 10), sparsity=0.5)
    p_open = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.2, 0.95, 0.4, 0.35])  # sums 2.1 and 1.9
    assert snap(p_open, scope).tolist() == [True, False, True, False, False, True, True, False]


def test_moves_go_in_order_of_probability():
    rows = row("vision", 0, "neuron", 4, 10), row("vision", 1, "neuron", 4, 10)
    p_open = torch.tensor([0.9, 0.7, 0.8, 0.6, 0.2, 0.95, 0.4, 0.35])
    assert snap(p_open, scope_of(*rows, sparsity=0.75)).tolist() == [True, False, False, False, False, True, False, False]
    assert snap(p_open, scope_of(*rows, sparsity=0.125)).tolist() == [True, True, True, True, False, True, True, True]


def test_ties_keep_the_earlier_unit():
    rows = row("vision", 0, "neuron", 3, 10), row("text", 0, "neuron", 3, 10)
    assert snap(torch.full((6,), 0.5), scope_of(*rows, sparsity=2 / 3)).tolist() == [True, True, False, False, False, False]


def test_with_neurons_closed_the_excess_is_less_than_a_neuron():
    rows = row("vision", 0, "head", 4, 100), row("vision", 0, "neuron", 200, 1)
    scope = scope_of(*rows, sparsity=0.3)
    keep = snap_scores(torch.cat([torch.full((4,), 0.1), torch.linspace(0, 0.2, 200)]), scope)
    assert keep[:4].tolist() == [True, True, True, False], "of equal heads the last goes"
    assert scope.anatomy.removed_elements(~keep) == scope.targets[0].need == 180
    # 100 neurons go before the head; of those the 20 that the head makes superfluous come back, best first.
    assert not keep[4:84].any() and keep[84:].all()


def test_rounded_layers_may_stay_whole():
    scope = scope_of(row("vision", 0, "neuron", 6, 10), row("vision", 1, "neuron", 6, 10), sparsity=1 / 3, round_to=4)
    keep = snap(torch.cat([torch.ones(6), torch.full((6,), 0.2)]), scope)
    assert int(keep[:6].sum()) == 6 and int(keep[6:].sum()) == 0


def test_missed_target_and_bad_vectors():
    scope = scope_of(row("vision", 0, "head", 4, 10), sparsity=0.9, min_heads=1)
    with pytest.raises(TargetMissed, match="min_heads 1"):
        snap(torch.ones(4), scope)
    with pytest.raises(ValueError, match="expected 4 values"):
        snap(torch.ones(3), scope)
    with pytest.raises(Diverged, match="not a number"):
        snap(torch.tensor([0.1, float("nan"), 0.3, 0.4]), scope)


def test_shared_keys_and_values_are_budgeted_exactly():
    anatomy = ANATOMIES["toy"]
    scope = Scope.of(anatomy, 0.05, kinds=["head"], towers=["text"])
    keep = snap_scores(torch.rand(len(scope.units), generator=torch.Generator().manual_seed(0)), scope)
    assert scope.achieved(keep)["all"] >= 0.05


@many
@given(seed=st.integers(0, 10**6), low=st.floats(0, 0.9), high=st.floats(0, 0.9))
def test_a_higher_target_removes_no_fewer_elements(seed, low, high):
    anatomy = ANATOMIES["xvlm"]
    p_open = probabilities(len(anatomy.units), seed, "spread")
    few, more = (anatomy.removed_elements(~snap(p_open, Scope.of(anatomy, value))) for value in sorted((low, high)))
    assert few <= more + int(anatomy.costs.max())


def test_nothing_to_prune_is_fine():
    scope = Scope.of(ANATOMIES["toy"], 0.0, towers=[])
    assert snap(torch.empty(0), scope).all()
