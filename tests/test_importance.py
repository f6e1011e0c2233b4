"""Torch-Pruning's criteria on our units, and Torch-Pruning's tracing as a witness for our sites."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from compression_cases import build, output
from torch import nn

from efficientvlm.compression.anatomy import Anatomy, Groups
from efficientvlm.compression.importance import CRITERIA, importance_scores, pruning_group
from efficientvlm.compression.snapping import snap_scores
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model

FIRST = (".q.weight", ".q_proj.weight", ".query.weight", ".fc1.weight", ".intermediate.dense.weight")
FUSED = ("vision.0.head", "vision.1.head")


class Traced(nn.Module):
    """A network's pass as a module that returns one tensor, which is what tracing wants."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return output(self.model, batch)


def traced_sites(graph, root, channels):
    """(module, dimension) → indices of every Linear weight that Torch-Pruning finds coupled with output `channels` of `root`."""
    sites = {}
    for dependency, indices in graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=channels):
        if isinstance(dependency.layer, nn.Linear):
            dim = int(dependency.pruning_fn == tp.prune_linear_in_channels)
            sites.setdefault((dependency.layer, dim), set()).update(indices)
    return sites


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize(
    "name, skip",
    [("xvlm", ()), ("toy", ("text.0.head", "text.1.head")), ("clip", ()), ("siglip", ()), ("blip-qa", FUSED), ("blip-caption", FUSED)],
)
def test_dependency_graph_confirms_our_sites(name, skip):
    """All groups but fused and shared projections, which Torch-Pruning does not trace."""
    model, batch = build(name)
    graph = tp.DependencyGraph().build_dependency(Traced(model), example_inputs=batch)
    checked = 0
    for unit in model.units():
        if unit.group in skip:
            continue
        ours = {}
        for tensor, dim, start, stop in unit.sites:
            module, _, what = tensor.rpartition(".")
            if what == "weight":
                ours.setdefault((model.get_submodule(module), dim), set()).update(range(start, stop))
        root = next(site for site in unit.sites if site.tensor.endswith(FIRST))
        found = traced_sites(graph, model.get_submodule(root.tensor.rpartition(".")[0]), list(range(root.start, root.stop)))
        assert ours == found, unit
        checked += 1
    assert checked >= 38


@pytest.mark.parametrize("name", ["toy", "xvlm"])
@pytest.mark.parametrize("method", CRITERIA)
def test_every_criterion_meets_the_same_budget(name, method):
    model, batch = build(name)
    output(model, batch).square().mean().backward()
    scope = Scope.of(Anatomy.of(model), 0.4)
    scores = importance_scores(method, model, scope.units, seed=1)
    assert torch.equal(scores, importance_scores(method, model, scope.units, seed=1))
    for part in Groups(scope.units).slices.values():
        assert scores[part].mean().item() == pytest.approx(1)
    keep = snap_scores(scores, scope)
    assert 0.4 <= scope.achieved(keep)["all"] < 0.41
    slice_model(model, keep)


def test_magnitude_is_the_mean_squared_weight_of_a_unit():
    model, _ = build("toy")
    units = [unit for unit in model.units() if unit.group == "text.1.head"]
    attention, d = model.text[1].attention, model.config.head_width
    by_hand = []
    for index in range(len(units)):
        own, shared = slice(index * d, (index + 1) * d), slice(index // 2 * d, (index // 2 + 1) * d)
        weights = attention.q.weight[own], attention.k.weight[shared], attention.v.weight[shared], attention.out.weight[:, own]
        by_hand.append(sum(weight.square().sum() for weight in weights).double())
    by_hand = torch.stack(by_hand).detach()
    torch.testing.assert_close(importance_scores("magnitude", model, units), by_hand / by_hand.mean(), rtol=1e-5, atol=0)


def test_taylor_is_weight_times_gradient_also_for_fused_projections():
    model, batch = build("toy")
    output(model, batch).square().mean().backward()
    units = [unit for unit in model.units() if unit.group == "text.0.head"]
    attention, d, inner = model.text[0].attention, model.config.head_width, model.config.width

    def effect(weight):
        return (weight * weight.grad).abs().detach().double()

    qkv, out = effect(attention.qkv.weight).sum(1).view(3, inner).sum(0), effect(attention.out.weight).sum(0)
    by_hand = (qkv + out).view(-1, d).sum(1)
    torch.testing.assert_close(importance_scores("taylor", model, units), by_hand / by_hand.mean(), rtol=1e-4, atol=0)


def test_taylor_without_gradients_is_an_error():
    model, _ = build("toy")
    with pytest.raises(ValueError, match="gradient"):
        importance_scores("taylor", model, model.units())


def test_groups_without_units_are_fine():
    model, _ = build("toy")
    assert importance_scores("magnitude", model, []).shape == (0,)
    assert len(pruning_group(model, [])) == 0
