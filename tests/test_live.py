"""What a step holds at its fullest is counted by running it on tensors without values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SHAPES, TRAIN
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from efficientvlm.planning import activations
from efficientvlm.planning.live import Live, fullest, places, valueless
from efficientvlm.planning.measure import ready
from efficientvlm.planning.plan import images_of, plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings


class Line(nn.Module):
    """The mean of a linear map of float pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 128, device="meta"))

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return {"loss": torch.sigmoid(batch["pixels"] @ self.weight).sum()}


def test_a_storage_counts_while_it_exists() -> None:
    with Live() as live:
        x = torch.zeros(100)
        y = x.view(10, 10)[:5]
        assert live.now == 400
        z = y + 1
        assert live.now == 600
        del z
        assert (live.now, live.peak) == (400, 600)
        del x
        assert live.now == 400
        del y
        assert (live.now, live.peak) == (0, 600)


def test_what_was_there_before_does_not_count_and_neither_do_views_of_it() -> None:
    weight, x = torch.zeros(100, 50), torch.zeros(2, 50)
    with Live() as live:
        y = x @ weight.t()
        assert live.now == 4 * 2 * 100
        weight.mul_(2)
        del y
        assert live.now == 0


def test_a_step_without_values_holds_what_the_formulas_say() -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    line = Line()
    with fake:
        line.weight = nn.Parameter(torch.empty(64, 128))
    held = fullest(line, [{"pixels": torch.zeros(32, 64)}], fake, device=torch.device("cpu"), precision="fp32")
    states, gradient = 4 * 32 * 128, 4 * 64 * 128
    # sigmoid's output is kept and its gradient made; then the gradient of the weights
    assert states + gradient <= held <= 3 * states + 2 * gradient and line.weight.grad is None


def test_a_mask_becomes_the_places_it_takes() -> None:
    rows, columns = places(torch.tensor([[True, False], [True, True]]))
    assert rows is not None and columns is not None
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 1], [0, 0, 1])
    assert places(None) == [None]


STEPS = {
    "pretrain": {},
    "distill": {"teacher": "init", "region_probability": 1.0},
    "finetune": {"teacher": "teacher", "kd": 0.4},
    "prune": {"teacher": "teacher", "sparsity": 0.4},
}


@pytest.mark.parametrize("stage", ["prune", *(pytest.param(stage, marks=pytest.mark.slow) for stage in STEPS if stage != "prune")])
def test_the_same_is_counted_with_values(chain: Any, tmp_path: Any, stage: str) -> None:
    """Of a real step on real weights, of every kind of objective: within a hundredth, as negatives and masks are other draws."""
    settings = {name: str(chain / value) if name == "teacher" else value for name, value in STEPS[stage].items()}
    common = {"model": str(chain / "init"), "data": SHAPES, "out": str(tmp_path / "out"), **TRAIN}
    (found,) = plan([Step(stage, stage, stage_settings(stage, {**common, **settings}))]).stages
    assert found.run and found.schedule and found.memory
    counted = activations.training(found.run, images_of(found.schedule))
    grey = activations.stand_in(found.run, images_of(found.schedule))
    objective, _, feed = ready(grey, torch.device("cpu"))
    objective.train()
    real = 0
    for batch in feed(0):
        with Live() as live:
            objective(batch, 0)["loss"].backward()
        objective.zero_grad(set_to_none=True)
        real = max(real, live.peak)
    assert counted == pytest.approx(activations.HELD["cpu"] * real, rel=0.01)
    assert found.memory["activations"] == counted - found.memory["gradients"] > 0


def test_a_valueless_network_keeps_its_tied_tensors(chain: Any) -> None:
    from efficientvlm.loaded import load

    loaded = load(str(chain / "teacher"), weights=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made = valueless(loaded, torch.device("cpu"), fake).model
    before, after = dict(loaded.model.named_parameters()), dict(made.named_parameters())
    assert {name: (value.shape, value.requires_grad) for name, value in before.items()} == {
        name: (value.shape, value.requires_grad) for name, value in after.items()
    }
    assert all(value.device.type == "cpu" for value in after.values())
