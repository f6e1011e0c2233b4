"""Masked, sliced and zero-padded models are forms of one function; shrunken models are copies of their teacher."""

from __future__ import annotations

import pytest
import torch
from compression_cases import CONFIGS, build, output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_family import ToyConfig, ToyModel

from efficientvlm.compression.anatomy import Anatomy, Groups
from efficientvlm.compression.gates import attach
from efficientvlm.compression.layers import layer_map, resolve_layers, shrink_model
from efficientvlm.compression.surgery import mask_vector, pad_model, slice_model, whole
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import GatePoint, Site, Unit
from efficientvlm.families.structure import Structure, odd_layers

CLOSE = dict(rtol=1e-5, atol=1e-5)
every_family = pytest.mark.parametrize("name", CONFIGS)
few = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def random_keep(units, seed, share, empty_groups):
    """A mask with about `share` of the units, and `empty_groups` (numbers, modulo the group count) without any."""
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < share
    slices = list(Groups(units).slices.values())
    for number in empty_groups:
        keep[slices[number % len(slices)]] = False
    return keep


@every_family
@few
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), empty=st.lists(st.integers(0, 20), max_size=4))
def test_masked_equals_sliced_equals_padded(name, seed, share, empty):
    model, batch = build(name)
    units = model.units()
    keep = random_keep(units, seed, share, empty)
    with torch.no_grad():
        with attach(model, units) as hooks:
            hooks.set(keep.float())
            masked = output(model, batch)
        sliced = slice_model(model, keep)
        padded = pad_model(sliced)
        torch.testing.assert_close(output(sliced, batch), masked, **CLOSE)
        torch.testing.assert_close(output(padded, batch), masked, **CLOSE)
    assert [(unit.group, unit.index) for unit in sliced.units()] == [(u.group, u.index) for u, k in zip(units, keep) if k]
    assert all(tensor.numel() for tensor in sliced.state_dict().values())
    assert {name: t.shape for name, t in padded.state_dict().items()} == {name: t.shape for name, t in model.state_dict().items()}


@every_family
def test_nothing_left_and_everything_left(name):
    model, batch = build(name)
    units = model.units()
    same = slice_model(model, torch.ones(len(units), dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))
    empty = slice_model(model, torch.zeros(len(units), dtype=torch.bool))
    assert empty.units() == []
    with attach(model, units) as hooks, torch.no_grad():
        hooks.set(torch.zeros(len(units)))
        torch.testing.assert_close(output(empty, batch), output(model, batch), **CLOSE)


@every_family
def test_slicing_twice_keeps_original_indices(name):
    model, batch = build(name)
    units = model.units()
    first = random_keep(units, 1, 0.7, [])
    once = slice_model(model, first)
    second = random_keep(once.units(), 2, 0.6, [1])
    twice = slice_model(once, second)
    both = first.clone()
    both[first] = second
    direct = slice_model(model, both)
    assert twice.config.kept_indices() == direct.config.kept_indices()
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), direct.state_dict().values(), strict=True))
    torch.testing.assert_close(output(pad_model(twice), batch), output(direct, batch), **CLOSE)
    assert torch.equal(mask_vector(units, twice.config.kept_indices()), both)


@every_family
def test_padding_puts_tensors_back_where_they_were(name):
    model, _ = build(name)
    keep = random_keep(model.units(), 3, 0.5, [0])
    padded = pad_model(slice_model(model, keep)).state_dict()
    freed = Anatomy.of(model).freed(~keep)
    for tensor_name, tensor in model.state_dict().items():
        expected = tensor.clone()
        for dim, free in freed.get(tensor_name, {}).items():
            expected.index_fill_(dim, torch.from_numpy(free).nonzero().flatten(), 0)
        assert torch.equal(padded[tensor_name], expected), tensor_name


@every_family
def test_every_gate_point_changes_the_output(name):
    model, batch = build(name)
    units = model.units()
    with torch.no_grad(), attach(model, units) as hooks:
        whole_output = output(model, batch)
        for number, unit in enumerate(units):
            gates = torch.ones(len(units))
            gates[number] = 0
            hooks.set(gates)
            assert not torch.allclose(output(model, batch), whole_output, atol=1e-7, rtol=0), unit


def test_units_given_by_name_are_a_mask_too():
    model, _ = build("toy")
    units = model.units()
    sliced = slice_model(model, [unit for unit in units if unit.index % 2])
    assert all(index % 2 for indices in sliced.config.kept_indices().values() for index in indices)
    with pytest.raises(ValueError, match="not in the model"):
        slice_model(sliced, [units[0]])
    with pytest.raises(ValueError, match="booleans"):
        slice_model(model, torch.ones(3, dtype=torch.bool))


def test_tied_tensors_stay_tied_and_the_mode_is_kept():
    model, _ = build("toy")
    sliced = slice_model(model.train(), random_keep(model.units(), 0, 0.5, []))
    assert sliced.output.weight is sliced.words.weight
    assert sliced.training and not slice_model(model.eval(), random_keep(model.units(), 0, 0.5, [])).training


def test_shared_key_value_head_goes_with_its_last_user():
    model, _ = build("toy")
    units = model.units()
    group = Groups(units).slices["text.1.head"]
    removed = torch.zeros(len(units), dtype=torch.bool)
    anatomy = Anatomy.of(model)
    width, rows = model.config.width, model.config.head_width
    query = 2 * rows * width + rows  # q rows with bias, output columns
    removed[group.start] = True
    assert "text.1.attention.k.weight" not in anatomy.freed(removed)
    assert anatomy.removed_elements(removed) == query
    removed[group.start + 1] = True
    assert anatomy.freed(removed)["text.1.attention.k.weight"][0].tolist() == [True] * rows + [False] * rows
    assert anatomy.removed_elements(removed) == 2 * query + 2 * (rows * width + rows)


def unit(index, *sites, layer=0, kind="neuron"):
    return Unit("text", layer, kind, index, sites, (GatePoint("fc2", index, index + 1),))


def test_a_tensor_cut_along_two_dimensions_is_a_union():
    units = [unit(i, Site("w", 0, i, i + 1)) for i in range(3)] + [unit(i, Site("w", 1, i, i + 1), layer=1) for i in range(4)]
    anatomy = Anatomy(units, {"w": (3, 5)})
    assert anatomy.total == 15 and int(anatomy.costs.sum()) == 15
    removed = torch.tensor([True, False, False, True, True, False, False])
    assert anatomy.removed_elements(removed) == 15 - 2 * 3
    path = anatomy.removed_path(torch.zeros(7, dtype=torch.bool), torch.tensor([0, 3, 4]).numpy())
    assert path.tolist() == [0, 5, 5 + 2, 5 + 4]


def test_tied_tensors_are_one_tensor():
    units = [unit(i, Site("a", 0, i, i + 1), layer=0) for i in range(2)] + [unit(i, Site("b", 0, i, i + 1), layer=1) for i in range(2)]
    anatomy = Anatomy(units, {"a": (2, 3), "b": (2, 3)}, aliases={"b": "a"})
    assert anatomy.total == 6 and anatomy.costs.tolist() == [2, 2, 1, 1]
    assert anatomy.freed(torch.tensor([True, False, False, False])) == {}
    freed = anatomy.freed(torch.tensor([True, False, True, False]))
    assert freed["a"][0].tolist() == freed["b"][0].tolist() == [True, False]
    gated = Anatomy([unit(i, Site("a", 0, i, i + 1), Site("b", 0, i, i + 1)) for i in range(2)], {"a": (2, 3), "b": (2, 3)}, {"b": "a"})
    assert gated.costs.tolist() == [3, 3] and gated.opening_costs(torch.tensor([True, False])).tolist() == [3, 0]


@every_family
@few
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_costs_and_paths_are_the_elements_that_slicing_removes(name, seed, share):
    model, _ = build(name)
    anatomy = Anatomy.of(model)
    keep = random_keep(anatomy.units, seed, share, [])
    sliced = slice_model(model, keep)

    def size(net):
        return sum(parameter.numel() for parameter in net.parameters())

    assert size(model) - size(sliced) == anatomy.removed_elements(~keep)
    assert int(anatomy.costs.sum()) == anatomy.total == sum(anatomy.totals.values())
    order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed)).numpy()
    path = anatomy.removed_path(torch.zeros(len(keep), dtype=torch.bool), order)
    removed = torch.zeros(len(keep), dtype=torch.bool)
    removed[order[: len(order) // 2]] = True
    assert path[len(order) // 2] == anatomy.removed_elements(removed) and path[-1] == anatomy.total


def test_bad_anatomies_are_refused():
    with pytest.raises(ValueError, match="does not have"):
        Anatomy([unit(0, Site("missing", 0, 0, 1))], {})
    with pytest.raises(ValueError, match="cuts 0:9"):
        Anatomy([unit(0, Site("w", 0, 0, 9))], {"w": (3, 3)})
    with pytest.raises(ValueError, match="consecutive"):
        Groups([unit(0), unit(0, layer=1), unit(1)])
    assert Anatomy([], {}).total == 0


class Towers(Structure):
    """Of so many layers, and nothing else."""

    def __init__(self, **counts: int) -> None:
        self.counts = counts

    def layers(self) -> dict[str, int]:
        return self.counts

    def with_layers(self, layers: dict[str, list[int]]) -> Towers:
        return self


def test_layer_choice():
    assert odd_layers(12, 6) == [1, 3, 5, 7, 9, 11]
    assert odd_layers(6, 3) == [1, 3, 5]
    assert odd_layers(5, 2) == [1, 4]
    counts = Towers(vision=12, text=1, decoder=0)
    assert resolve_layers(counts, {}) == {"vision": [1, 3, 5, 7, 9, 11], "text": [0], "decoder": []}
    assert resolve_layers(counts, {"vision": [0, 11], "text": 0}) == {"vision": [0, 11], "text": [], "decoder": []}
    assert layer_map([1, 3, 5]) == ({0: 0, 1: 2, 2: 4, 3: 6}, {0: 1, 1: 3, 2: 5})


@pytest.mark.parametrize("wanted", [{"audio": 1}, {"vision": 13}, {"vision": -1}, {"vision": [12]}, {"vision": [3, 3]}, {"vision": [5, 1]}])
def test_impossible_layer_choices_are_bad_input(wanted):
    with pytest.raises(BadInput):
        resolve_layers(Towers(vision=12), wanted)


def test_all_impossible_layer_choices_are_named():
    with pytest.raises(BadInput, match=r"(?s)no such tower: audio.*13 vision layers"):
        resolve_layers(Towers(vision=12), {"vision": 13, "audio": 1})


@every_family
def test_shrinking_copies_the_chosen_layers(name):
    model, batch = build(name)
    counts = model.config.layers()
    layers = resolve_layers(model.config, {})
    student = shrink_model(model, layers)
    teacher = model.state_dict()
    for tensor_name, tensor in student.state_dict().items():
        assert torch.equal(tensor, teacher[model.source_name(tensor_name, layers)]), tensor_name
    moved = {name for name in student.state_dict() if model.source_name(name, layers) != name}
    assert {model.tower_of(name) for name in moved} == {tower for tower, chosen in layers.items() if chosen != list(range(len(chosen)))}
    assert output(student, batch).shape == output(model, batch).shape
    everything = {tower: list(range(count)) for tower, count in counts.items()}
    same = shrink_model(model, everything).eval()
    torch.testing.assert_close(output(same, batch), output(model, batch), rtol=0, atol=0)


@every_family
def test_a_pruned_model_can_be_shrunk(name):
    model, batch = build(name)
    pruned = slice_model(model, random_keep(model.units(), 5, 0.6, []))
    layers = resolve_layers(model.config, {})
    student = shrink_model(pruned, layers)
    for kind in ("head", "neuron"):
        assert student.config.kept_indices()[f"vision.0.{kind}"] == pruned.config.kept_indices()[f"vision.{layers['vision'][0]}.{kind}"]
    output(student, batch)


def test_a_source_that_is_missing_or_used_twice_is_an_error():
    class Wrong(ToyModel):
        def source_name(self, parameter, layers):
            return "vision.0.norm.weight" if parameter.endswith("norm.weight") else parameter

    with pytest.raises(ValueError, match="two tensors"):
        shrink_model(Wrong(ToyConfig()), {"vision": [0, 1], "text": [0, 1]})


def test_whole_names_every_group():
    model, _ = build("toy")
    assert {group: len(kept) for group, kept in whole(model.config).items()} == model.config.original_counts()
