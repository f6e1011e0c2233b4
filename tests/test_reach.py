"""Every input keeps a way to every output, whatever chooses the units, unless that is allowed; and the description of the ways is true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compression_cases import CONFIGS, build, network
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import attach
from efficientvlm.compression.reach import Pair, Reach
from efficientvlm.compression.snapping import snap, snap_scores
from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import TargetMissed
from efficientvlm.families.anatomy import Flow, GatePoint, Site, Unit

NETWORKS = {name: build(name) for name in CONFIGS}
ANATOMIES = {name: Anatomy.of(model) for name, (model, _) in NETWORKS.items()}
OUTPUTS = {
    "image_features": ("itc", "image"),
    "text_features": ("itc", "text"),
    "image_feature": ("itc", "image"),
    "text_feature": ("itc", "text"),
    "vision.features": ("itc", "image"),
    "text.features": ("itc", "text"),
}
many = settings(max_examples=40, deadline=None, derandomize=True)


def batches(name):
    """A batch, and the same with another picture or other tokens; the last token of a text stays, which pools it in a CLIP."""
    config = CONFIGS[name]
    draw = torch.Generator().manual_seed(3)
    batch = network(config).example(2, 6)
    text = next(key for key in ("question_ids", "text_ids", "text") if key in batch)
    pictures = {"left image": "pixels", "right image": "second_pixels"} if "second_pixels" in batch else {}
    pictures = pictures or {"image": "pixels" if "pixels" in batch else "image"}
    for image in pictures.values():
        batch[image] = torch.randn(batch[image].shape, generator=draw)
    batch[text][:, :-1] = torch.randint(4, 10, batch[text][:, :-1].shape, generator=draw)
    other = torch.randint(4, 10, batch[text][:, 1:-1].shape, generator=draw)
    changed = batch[text].clone()
    changed[:, 1:-1] = other
    others = {what: {**batch, image: batch[image].flip(0)} for what, image in pictures.items()}
    return batch, {**others, "text": {**batch, text: changed}}


def outputs(model, batch):
    """Output of the flows → tensors, those of one half of a comparison apart."""
    want = [tap for tap in ("vision.features", "text.features") if tap in model.taps and hasattr(model, "itm_head")]
    record = model.run(batch, want)
    return {key: value for key, value in record.items() if key in OUTPUTS or key.endswith("logits")}


def seen(name, keep):
    """Pairs that are connected, found by changing an input of the gated network and looking for other bits."""
    model, _ = NETWORKS[name]
    anatomy = ANATOMIES[name]
    batch, changed = batches(name)
    found = set()
    with torch.inference_mode(), attach(model, anatomy.units) as hooks:
        hooks.set(keep.float())
        before = outputs(model, batch)
        for what, other in changed.items():
            after = outputs(model, other)
            for key, value in before.items():
                if not torch.equal(value, after[key]):
                    output = {"logits": "logits", "lm_logits": "caption"}.get(key, "itc")
                    found.add((what, output))
    return found


def described(name, keep):
    """The same by the flows: the logits of a comparison depend on what either side sees."""
    anatomy = ANATOMIES[name]
    alias = {"words": "text", **dict.fromkeys(("answer", "itm", "verdict", "box"), "logits")}
    alias["caption"] = "caption" if "pretraining" in name else "logits"  # there besides matching
    pairs = {
        (alias.get(pair.input, pair.input), alias.get(pair.output, pair.output)) for pair in anatomy.reach.pairs(anatomy.standing(keep))
    }
    return pairs | (
        {(what, "logits") for what, output in pairs if output == "itc"} if name.startswith(("clip", "siglip", "dual")) else set()
    )


@pytest.mark.parametrize("name", CONFIGS)
@many
@given(data=st.data())
def test_what_flows_say_is_what_other_inputs_change(name, data):
    anatomy = ANATOMIES[name]
    guards = anatomy.reach.groups
    shut = data.draw(st.sets(st.sampled_from(guards))) if data.draw(st.booleans()) else set(guards)
    shut -= data.draw(st.sets(st.sampled_from(guards), max_size=2))
    keep = torch.rand(len(anatomy.units), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))) < 0.5
    for group in guards:
        part = anatomy.groups.slices[group]
        keep[part] = keep[part] if group not in shut else False
    assert seen(name, keep) == described(name, keep)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_groups_of_the_flows_are_there(name):
    anatomy = ANATOMIES[name]
    assert set(anatomy.reach.groups) <= set(anatomy.groups.names)
    assert anatomy.reach.pairs(anatomy.groups.names) and set(anatomy.reach.towers) == set(anatomy.totals)


@pytest.mark.parametrize("method", [snap, snap_scores])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.8])
def test_the_last_path_stays_open_by_its_best_units(name, sparsity, method):
    anatomy = ANATOMIES[name]
    values = torch.rand(len(anatomy.units), generator=torch.Generator().manual_seed(1)) * 0.5 + 0.5
    for group in anatomy.reach.groups:  # gates that would close every head that something is read through
        values[anatomy.groups.slices[group]] *= 0.01
    scope, blind = (Scope.of(anatomy, sparsity, allow_blind=allowed) for allowed in (False, True))
    assert (
        blind.cut_off(method(values, blind))
        or sparsity == 0.3
        or name.startswith(("clip", "siglip", "dual"))
        or name in ("cross_encoder", "xvlm-grounding", "blip-two-images")
    )  # their heads are most of what there is
    keep = method(values, scope)
    assert not scope.cut_off(keep) and 0 <= anatomy.removed_elements(~keep) - scope.targets[0].need
    for part in (anatomy.groups.slices[group] for group in anatomy.reach.groups):
        if keep[part].any():
            assert keep[part][values[part].argmax()]


def test_a_floor_is_not_felt_where_nothing_would_be_cut():
    anatomy = ANATOMIES["xvlm"]
    values = torch.rand(len(anatomy.units), generator=torch.Generator().manual_seed(0))
    values[[unit.kind != "neuron" for unit in anatomy.units]] = 0.999
    floors, none = (snap(values, Scope.of(anatomy, 0.1, allow_blind=allowed)) for allowed in (False, True))
    assert torch.equal(floors, none)


def test_what_reaches_nothing_goes_first_when_blindness_is_allowed():
    anatomy = ANATOMIES["xvlm"]
    values = torch.full((len(anatomy.units),), 0.9)
    values += 0.01 * torch.rand(len(values), generator=torch.Generator().manual_seed(0))
    for number, unit in enumerate(anatomy.units):
        if unit.tower == "fusion" and unit.kind == "cross_head":
            values[number] = 0.01
    vision = np.array([unit.tower == "vision" for unit in anatomy.units])
    for sparsity in (0.2, 0.3, 0.6):
        scope = Scope.of(anatomy, sparsity, allow_blind=True)
        keep = snap(values, scope).numpy()
        assert Pair("image", "answer") in scope.cut_off(keep)
        removed = anatomy.removed_elements(~keep)
        assert 0 <= removed - scope.targets[0].need <= 2 * 24 + 1
        others = [unit for unit, kept in zip(anatomy.units, keep, strict=True) if not kept and unit.tower != "vision"]
        assert not keep[vision].any() or all(unit.kind == "cross_head" and unit.tower == "fusion" for unit in others)


def test_a_budget_that_needs_the_last_path_is_missed():
    anatomy = ANATOMIES["xvlm"]
    values = torch.linspace(0, 1, len(anatomy.units))
    scope = Scope.of(anatomy, 1.0)
    for cut in (scope.check_feasible, lambda: snap(values, scope)):
        with pytest.raises(TargetMissed, match="the last path of every input stays open"):
            cut()
    blind = Scope.of(anatomy, 1.0, allow_blind=True)
    blind.check_feasible()
    assert not snap(values, blind).any()


def test_the_cheapest_path_stays_where_the_best_one_does_not_fit_the_budget():
    def unit(layer, rows):
        return Unit("vision", layer, "head", 0, (Site(f"w{layer}", 0, 0, rows),), GatePoint(f"m{layer}", 0, rows))

    rows = (90, 10, 10)  # the third is no way to the answer
    units, shapes = [unit(layer, size) for layer, size in enumerate(rows)], {f"w{layer}": (size, 1) for layer, size in enumerate(rows)}
    anatomy = Anatomy(units, shapes, flows=[Flow("image", "answer", ("vision.0.head", "vision.1.head"))])
    values = torch.tensor([0.9, 0.1, 0.95])
    assert snap(values, Scope.of(anatomy, 0.05)).tolist() == [True, False, True]
    scope = Scope.of(anatomy, 0.82)
    scope.check_feasible()
    assert snap(values, scope).tolist() == snap_scores(values, scope).tolist() == [False, True, False]


def test_a_network_that_was_blind_before_keeps_what_it_still_sees():
    config = CONFIGS["xvlm"]
    kept = {group: [] for group in config.original_counts() if group.startswith("fusion") and group.endswith("cross_head")}
    anatomy = Anatomy.of(network(config.with_kept(kept)))
    assert anatomy.reach.pairs(anatomy.groups.names) == {Pair("text", "answer")}
    assert anatomy.reach.dead_towers(anatomy.groups.names) == ["vision"]
    scope = Scope.of(anatomy, 0.8)
    values = torch.rand(len(anatomy.units), generator=torch.Generator().manual_seed(0))
    assert not scope.cut_off(snap(values, scope))


def test_of_two_ways_the_better_is_held():
    flows = [Flow("image", "a"), Flow("a", "b", ("x", "y")), Flow("b", "out", ("z",)), Flow("text", "b")]
    reach = Reach(flows)
    both = reach.pairs({"x", "z"})
    assert both == {Pair("image", "out"), Pair("text", "out")}
    assert reach.narrowest(both, ["y", "z", "x"], ()) == {"y", "z"}
    assert reach.narrowest(both, ["y", "z", "x"], {"x"}) == {"z"}
    assert reach.narrowest([Pair("text", "out")], ["y", "x", "z"], ()) == {"z"}
    assert reach.dead_towers({"z"}) == ["a"] and reach.dead_towers({"x"}) == ["a", "b"]
