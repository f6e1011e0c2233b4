"""Hard-concrete gates: closed forms, reproducible draws, hooks that reach every Linear and pass gradients back."""

from __future__ import annotations

import math

import pytest
import torch
from compression_cases import CONFIGS, build, output
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import Gates, attach, gate_noise, open_probability, published_gates, sample_gates
from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import NEURON, GatePoint, Site, Unit
from efficientvlm.families.towers.attention import attend


def heads(layer, count, kind="head"):
    return [Unit("vision", layer, kind, i, (), (GatePoint("out", i, i + 1),)) for i in range(count)]


def test_open_probability_is_its_closed_form():
    shift = 2 / 3 * math.log(11)  # −β·ln(−γ/ζ)
    for value in (-3.0, -0.5, 0.0, 2.0):
        assert open_probability(torch.tensor(value)).item() == pytest.approx(1 / (1 + math.exp(-value - shift)), abs=1e-6)
    assert 1 - open_probability(torch.tensor(0.0)).item() == pytest.approx(0.168, abs=5e-4)
    assert open_probability(torch.tensor(100.0)).item() == pytest.approx(1 - 1e-6, abs=2e-7)
    assert open_probability(torch.tensor(-100.0)).item() == pytest.approx(1e-6, abs=2e-7)


def test_sample_is_its_closed_form_and_clips_to_exact_ends():
    for log_alpha, u in ((0.0, 0.5), (1.0, 0.3), (-2.0, 0.9)):
        soft = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
        expected = min(max(soft * 1.2 - 0.1, 0), 1)
        assert sample_gates(torch.tensor(log_alpha), torch.tensor(u)).item() == pytest.approx(expected, abs=1e-6)
    assert sample_gates(torch.tensor(5.0), torch.tensor(0.9)).item() == 1
    assert sample_gates(torch.tensor(-5.0), torch.tensor(0.1)).item() == 0


def test_frequency_of_open_gates_is_the_open_probability():
    log_alpha = torch.tensor([-2.0, -1.0, 0.5]).repeat_interleave(20_000)
    open_share = (sample_gates(log_alpha, gate_noise(60_000, 0, 0)) > 0).float().view(3, -1).mean(1)
    torch.testing.assert_close(open_share, open_probability(torch.tensor([-2.0, -1.0, 0.5])), atol=0.02, rtol=0)


def test_published_rule_closes_the_lowest():
    log_alpha = torch.tensor([4.0, -4.0, 4.0, -4.5, 4.0, 4.0])
    assert published_gates(log_alpha).tolist() == [1, 0, 1, 0, 1, 1]
    gates = Gates([*heads(0, 3), *heads(1, 3)])
    gates.log_alpha.data = log_alpha
    assert gates.deterministic_published().tolist() == [1, 0, 1, 0, 1, 1]


def test_draws_depend_on_seed_and_step_only():
    gates = Gates(heads(0, 8), head_init=0.0)
    first = gates.draw(3, 7)
    torch.manual_seed(99)
    assert torch.equal(first, gates.draw(3, 7))
    assert not torch.equal(first, gates.draw(3, 8)) and not torch.equal(first, gates.draw(4, 7))
    noise = gate_noise(10_000, 0, 0)
    assert 0 < noise.min() < 0.01 and 0.99 < noise.max() < 1
    assert not torch.equal(gate_noise(5, 1, 11), gate_noise(5, 11, 1))


def test_initial_values_and_clamp():
    units = [*heads(0, 4), *[Unit("vision", 0, NEURON, i, (), (GatePoint("fc2", i, i + 1),)) for i in range(200)]]
    gates = Gates(units, seed=5)
    again = Gates(units, seed=5)
    assert torch.equal(gates.log_alpha, again.log_alpha) and not torch.equal(gates.log_alpha, Gates(units, seed=6).log_alpha)
    torch.testing.assert_close(gates.log_alpha[:4], torch.full((4,), 10.0), atol=0.1, rtol=0)
    assert gates.log_alpha[4:].abs().max() < 0.1 and gates.log_alpha[4:].std().item() == pytest.approx(0.01, rel=0.2)
    gates.clamp_()
    assert gates.log_alpha.max().item() == pytest.approx(math.log(100))


def test_stored_gates_come_back_and_foreign_ones_do_not():
    units = [*heads(0, 3), *heads(0, 2, "cross_head")]
    gates = Gates(units, seed=1)
    stored = gates.to_tensors()
    assert {name: tuple(row.shape) for name, row in stored.items()} == {
        "log_alpha.vision.0.head": (3,),
        "log_alpha.vision.0.cross_head": (2,),
    }
    assert torch.equal(Gates.from_tensors(units, dict(reversed(stored.items()))).log_alpha, gates.log_alpha)
    with pytest.raises(BadInput, match=r"vision\.0\.head"):
        Gates.from_tensors(heads(0, 4), stored)


@pytest.mark.parametrize("name", CONFIGS)
def test_hooks_change_nothing_until_set_and_pass_gradients(name):
    model, batch = build(name)
    units = Scope.of(Anatomy.of(model), 0.5).units
    gates = Gates(units, head_init=0.0)
    plain = output(model, batch)
    hooks = attach(model, units)
    assert torch.equal(output(model, batch), plain)
    hooks.set(torch.ones(len(units)))
    assert torch.equal(output(model, batch), plain)
    hooks.set(gates.sample(torch.full((len(units),), 0.5)))
    gated = output(model, batch)
    assert not torch.allclose(gated, plain)
    gated.square().sum().backward()
    assert (gates.log_alpha.grad != 0).all()
    hooks.set(None)
    assert torch.equal(output(model, batch), plain)
    hooks.set(torch.zeros(len(units)))
    hooks.remove()
    assert torch.equal(output(model, batch), plain)


class Doubled(nn.Module):
    """Two attentions that share keys and values, as NLVR2's doubled layers do: a head works in both."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q1", "q2", "k", "v", "out1", "out2"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.k, self.v))
        for q, out in ((self.q1, self.out1), (self.q2, self.out2)):
            seen = attend(q(x).unflatten(-1, (2, 4)).transpose(1, 2), k, v)
            x = x + out(seen.transpose(1, 2).flatten(2))
        return x


def test_a_unit_with_two_gate_points_is_shut_in_both():
    """Masked is the same as without what the anatomy says is freed; its cost is all of that, once."""
    torch.manual_seed(0)
    model, x = Doubled(), torch.randn(3, 5, 8)
    units = []
    for head in range(2):
        part = (4 * head, 4 * head + 4)
        rows = [Site(f"{name}.{kind}", 0, *part) for name in ("q1", "q2", "k", "v") for kind in ("weight", "bias")]
        columns = [Site(f"{name}.weight", 1, *part) for name in ("out1", "out2")]
        units.append(Unit("fusion", 0, "cross_head", head, (*rows, *columns), tuple(GatePoint(f"out{i}", *part) for i in (1, 2))))
    anatomy = Anatomy(units, {name: tensor.shape for name, tensor in model.state_dict().items()})
    assert anatomy.costs.tolist() == [4 * (4 * 8 + 4) + 2 * 4 * 8] * 2
    with attach(model, units) as hooks, torch.no_grad():
        hooks.set(torch.tensor([0.0, 1.0]))
        masked = model(x)
        hooks.set(None)
        assert not torch.allclose(masked, model(x), atol=1e-3)
        for name, freed in anatomy.freed(torch.tensor([True, False])).items():
            for dim, free in freed.items():
                model.get_parameter(name).index_fill_(dim, torch.from_numpy(free).nonzero()[:, 0], 0)
        torch.testing.assert_close(model(x), masked)


def test_gates_work_under_checkpointing_and_in_half_precision():
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    units = [Unit("vision", 0, "head", i, (), (GatePoint("", 2 * i, 2 * i + 2),)) for i in range(2)]  # columns 4, 5 have no gate
    x = torch.randn(5, 6, requires_grad=True)

    def run(recompute):
        gates = torch.tensor([0.5, 0.25], requires_grad=True)
        with attach(linear, units) as hooks:
            hooks.set(gates)
            y = checkpoint(linear, x, use_reentrant=False) if recompute else linear(x)
            y.sum().backward()
        return y, gates.grad

    for plain, again in zip(run(False), run(True)):
        assert torch.equal(plain, again)
    scale = torch.tensor([0.5, 0.5, 0.25, 0.25, 1, 1])
    torch.testing.assert_close(run(False)[0], linear(x * scale))
    with attach(linear.bfloat16(), units) as hooks:
        hooks.set(torch.tensor([0.5, 0.25]))
        assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_impossible_gate_points_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    with pytest.raises(TypeError, match="not a Linear"):
        attach(model, [Unit("vision", 0, "head", 0, (), (GatePoint("1", 0, 2),))])
    with pytest.raises(ValueError, match="outside"):
        attach(model, [Unit("vision", 0, "head", 0, (), (GatePoint("0", 2, 6),))])
    with pytest.raises(ValueError, match="expected 1 gates"):
        attach(model, [Unit("vision", 0, "head", 0, (), (GatePoint("0", 0, 2),))]).set(torch.ones(2))
