"""Budgets in multiply-adds, and absolute targets: what units cost is what is gone when they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compression_cases import CONFIGS, build
from conftest import SHAPES, run_stage
from pydantic import ValidationError

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.accounting import count_macs, count_parameters
from efficientvlm.compression.budgets import cost_of, reachable
from efficientvlm.compression.pruner import Pruner
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Budget
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.report.story import Chapter
from efficientvlm.report.structure import sparsities
from efficientvlm.settings.amounts import amount_of
from efficientvlm.settings.stages import Prune
from efficientvlm.stages.common import accounted
from efficientvlm.stages.cutting import scope_of


def on_meta(name):
    model, _ = build(name)
    return model.to("meta")


def drawn(model, share, seed):
    return torch.rand(len(model.units()), generator=torch.Generator().manual_seed(seed)) < share


def cut(model, keep):
    with torch.device("meta"):
        return slice_model(model, keep)


@pytest.mark.parametrize("name", CONFIGS)
def test_multiply_adds_of_units_are_those_that_go_with_them(name):
    """Of a network that loses a layer's heads and half of the rest, and of what is left."""
    model = on_meta(name)
    cost = cost_of(model, "macs", text_length=7)
    assert cost.whole == cost.totals and int(cost.costs.sum()) == sum(cost.totals.values()) and int(cost.costs.min()) > 0
    keep = drawn(model, 0.5, 1)
    keep[:8] = False
    smaller = cut(model, keep)
    left = count_macs(smaller, text_length=7)["total"]
    assert cost.now - cost.removed(~keep) == left < cost.now
    again = cost_of(smaller, "macs", text_length=7)
    assert (again.now, again.rest, again.whole) == (left, cost.rest, cost.whole)


@pytest.mark.parametrize("budget", ["macs", "latency"])
def test_texts_that_are_longer_than_a_network_reads_are_refused(budget):
    model = on_meta("xvlm")
    config = Prune(out="a", model="b", task="none", method="magnitude", budget=budget, text_length=1000)
    with pytest.raises(BadInput, match="1000 tokens are too long") as caught:
        scope_of(config, model)
    assert f"reads {model.config.max_positions}" in caught.value.why


def test_what_reads_fewer_tokens_than_is_usual_is_counted_with_as_many():
    model, _ = build("xvlm")
    assert accounted(type(model)(model.config.copy(max_positions=7)))["macs"]["text_length"] == 7


@pytest.mark.parametrize("name", ["xvlm", "xvlm-two-images"])
def test_the_whole_and_the_rest_are_counted_too(name):
    model = on_meta(name)
    cost = cost_of(model, "macs", text_length=6)
    assert cost.now == count_macs(model, text_length=6)["total"]
    nothing = torch.zeros(len(cost.costs), dtype=torch.bool)
    assert cost.rest == count_macs(cut(model, nothing), text_length=6)["total"]


@pytest.mark.parametrize("name", ["toy", "xvlm", "xvlm-two-images", "blip-qa"])
def test_every_way_to_ask_for_multiply_adds_agrees(name):
    model = on_meta(name)
    cost = cost_of(model, "macs", text_length=6)
    removed = ~drawn(model, 0.7, 3)
    order = np.flatnonzero(~removed.numpy())[::2]
    path = cost.path(removed, order)
    gone = removed.clone()
    for step, unit in enumerate(order[:9]):
        assert path[step] == cost.removed(gone)
        gone[unit] = True
    assert cost.removed(removed) == sum(cost.removed(removed, [tower]) for tower in cost.whole)
    opened = np.flatnonzero(removed.numpy())[:5]
    for unit in opened:
        back = removed.clone()
        back[unit] = False
        assert cost.opening(removed)[unit] == cost.removed(removed) - cost.removed(back)


def test_a_head_of_the_images_costs_more_work_than_a_head_of_the_text():
    """Which have as many weights where towers are as wide."""
    model = on_meta("xvlm")
    costs = {
        (unit.tower, unit.kind): int(price) for unit, price in zip(model.units(), cost_of(model, "macs", text_length=3).costs, strict=True)
    }
    tokens, width, head = 5, 16, 4
    assert costs["vision", "head"] == tokens * 4 * width * head + 2 * tokens * tokens * head
    assert costs["vision", "neuron"] == tokens * 2 * width


@pytest.mark.parametrize("budget", ["parameters", "macs"])
@pytest.mark.parametrize("name", ["xvlm", "clip"])
def test_an_absolute_target_is_met_and_no_more_than_that(name, budget):
    model = on_meta(name)
    count = {"parameters": lambda m: count_parameters(m)["total"], "macs": lambda m: count_macs(m, text_length=7)["total"]}[budget]
    cost = cost_of(model, budget, text_length=7)
    to = cost.rest + sum(cost.totals.values()) // 2
    scope = reachable(model, 0.0, cost, to=to)
    p_open = torch.rand(len(scope.units), generator=torch.Generator().manual_seed(0))
    keep = snap(p_open, scope)
    assert to - int(cost.costs.max()) < count(cut(model, keep)) <= to
    assert float(Budget(scope).expected(torch.ones(len(scope.units)))) == pytest.approx(0, abs=1e-6)
    assert scope.targets[0].sparsity == pytest.approx(0.5, abs=1e-3)


def test_the_least_that_is_named_can_be_reached():
    model = on_meta("xvlm")
    cost = cost_of(model)
    with pytest.raises(TargetMissed, match="the least is") as caught:
        reachable(model, 0.0, cost, to=cost.rest + 1, min_heads=1)
    least = int(caught.value.why.split("the least is ")[1].split(" ")[0].replace(",", ""))
    scope = reachable(model, 0.0, cost, to=least, min_heads=1)
    assert cost.now - cost.removed(~snap(torch.zeros(len(scope.units)), scope)) == least
    with pytest.raises(TargetMissed):
        reachable(model, 0.0, cost, to=least - 1, min_heads=1)


def test_what_makes_no_sense_is_refused():
    model = on_meta("clip")
    cost = cost_of(model)
    with pytest.raises(BadInput, match="asked for"):
        reachable(model, 0.0, cost, to=cost.now)
    with pytest.raises(BadInput, match="tower_sparsity"):
        reachable(model, 0.0, cost, to=cost.now // 2, tower_sparsity={"text": 0.5})
    with pytest.raises(BadInput, match="no such budget"):
        cost_of(model, "watts")
    for ways in ({}, {"sparsity": 0.5, "to": 100}):
        with pytest.raises(BadInput, match="not said once"):
            Pruner.of(model, steps=1, **ways)


def test_gates_learn_under_multiply_adds():
    model, _ = build("clip")
    pruner = Pruner.of(model, budget="macs", sparsity=0.5, text_length=5, steps=1)
    pruner.begin_step(0)
    pruner.penalty(0).backward()
    pruner.end_step(0)
    before, after = (count_macs(network, text_length=5)["total"] for network in (model, pruner.finish()))
    assert before - after >= 0.5 * sum(pruner.scope.cost.whole.values())


AMOUNTS = {"30M": 30_000_000, "1.5G": 1_500_000_000, " 12 k": 12_000, "7": 7, "3e7": 30_000_000, "0.0305B": 30_500_000}


@pytest.mark.parametrize(("text", "amount"), AMOUNTS.items())
def test_amounts(text, amount):
    assert amount_of("parameters", text) == amount


@pytest.mark.parametrize("text", ["", "M", "-3M", "30Q", "1e99", "0.2", "nan", "30 M M", "３0ＭＢ", "20ms"])
def test_no_amounts(text):
    with pytest.raises(ValueError, match=r"no number of macs; .* a time ends in us, ms or s|not between|less than one; .*--sparsity"):
        amount_of("macs", text)


def test_settings_of_an_absolute_target():
    common = {"out": "a", "task": "none", "method": "magnitude", "model": "b"}
    assert Prune(**common, to=30_000_000).to == "30000000"
    assert Prune(**common, to="2.5G", budget="macs").to == "2.5G"
    assert Prune(**common, to="20ms").budget == Prune(**common, to="1.5 s").budget == "latency"
    wrongs = {"to": True}, {"to": "20ms", "budget": "macs"}, {"to": "30Q"}, {"to": "3M", "tower_sparsity": {"vision": 0.5}}, {"to": [3]}
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            Prune(**common, **wrong)


def test_a_cut_by_multiply_adds_says_what_it_counted(chain, tmp_path):
    """From gates that were learnt under another budget, to a number of multiply-adds; and the page draws it."""
    source = chain / "pruned"
    common = {"from_gates": str(source), "data": SHAPES, "limit": 40, "eval_limit": 2, "budget": "macs"}
    with pytest.raises(TargetMissed, match="10,000 multiply-adds cannot be reached"):
        run_stage("prune", out=str(tmp_path / "none"), to="10k", **common)
    to = require_complete(source).accounting["macs"]["total"] * 9 // 10
    run_stage("prune", out=str(tmp_path / "cut"), to=str(to), **common)
    manifest = require_complete(tmp_path / "cut")
    cost, macs = manifest.extra["cost"], manifest.accounting["macs"]
    assert cost["budget"] == "macs" and cost["to"] == to and (cost["image_size"], cost["text_length"]) == (macs["image_size"], 12)
    assert to - 10_000 < cost["after"] == macs["total"] <= to < cost["before"]
    kept = sum(part["kept"] for part in cost["by_tower"].values())
    assert cost["rest"] + kept == cost["after"]
    chapter = Chapter(tmp_path / "cut", "cut", "cut", manifest, None)
    assert "multiply-adds kept" in sparsities([chapter]) and f"{kept:,}" in sparsities([chapter])
