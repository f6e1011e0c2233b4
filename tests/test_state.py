"""The state of an unfinished run is checked before it is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from efficientvlm.checkpoints.files import sha256
from efficientvlm.errors import BadInput
from efficientvlm.training.state import TENSORS, Spent, _digest, cut_metrics, restore, save, tensors_of

SPENT = Spent(seconds=1.5, samples=8, steps=2, last={"loss": 1.0}, open_line={"loss": 2.0, "n:loss": 2})
Change = Callable[[dict[str, Any]], dict[str, Any]]


def run(seed: int = 0) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A model after two steps, and its optimizers; one parameter never has a gradient."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters()), torch.optim.AdamW([nn.Parameter(torch.zeros(2))])]
    for _ in range(2):
        model["used"](torch.ones(1, 3)).sum().backward()
        optimizers[0].step()
    return model, optimizers


def saved(folder: Path) -> Path:
    model, optimizers = run()
    (folder / "dense.safetensors").write_bytes(b"of the gate phase")
    save(folder, tensors_of(model, optimizers), SPENT)
    return folder / "step-00000002"


def same(one: Any, two: Any) -> bool:
    left, right = tensors_of(*one), tensors_of(*two)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_whole_state_comes_back(tmp_path: Path) -> None:
    saved(tmp_path)
    other = run(seed=1)
    assert not same(run(), other)
    assert restore(tmp_path, *other, 2) == SPENT and same(run(), other)


def seal(state: Path, change: Change = lambda values: values) -> None:
    """Make `state.json` fit what is there, as whoever changed it on purpose would."""
    values = json.loads((state / "state.json").read_text())
    values["files"] = {name: sha256(state.parent / name) for name in values["files"]}
    values = change(values)
    (state / "state.json").write_text(json.dumps({**values, "digest": _digest(values)}))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize("name", [f"step-00000002/{TENSORS}", "step-00000002/state.json", "dense.safetensors"])
@pytest.mark.parametrize(
    "damage", [flip, lambda path: path.write_bytes(b""), lambda path: path.unlink(), lambda path: path.write_bytes(b"[" * 100_000)]
)
def test_what_is_not_as_it_was_written_is_refused(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    saved(tmp_path)
    damage(tmp_path / name)
    other = run(seed=1)
    if not (tmp_path / "step-00000002" / "state.json").exists():
        assert restore(tmp_path, *other, 2) == Spent(), "without it there is no state"
        return
    with pytest.raises(BadInput, match="cannot resume from") as error:
        restore(tmp_path, *other, 2)
    assert "--no-resume" in error.value.fix and same(run(seed=1), other), "nothing is loaded of what is refused"


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**9},
        {"steps": -5},
        {"steps": 0},
        {"steps": "2"},
        {"steps": 2.5},
        {"samples": -1},
        {"seconds": None},
        {"last": [1]},
        {"open_line": {"loss": 1.0}},
        {"files": {}},
        {"files": {"../outside": "0" * 64}},
        {"files": 1},
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    seal(saved(tmp_path), lambda values: values | change)
    with pytest.raises(BadInput, match="cannot resume from"):
        restore(tmp_path, *run(), 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v[:1].clone() if k.endswith("exp_avg") and v.numel() > 1 else v for k, v in t.items()},
        lambda t: {k: v.double() if k == "module/used.weight" else v for k, v in t.items()},
        lambda t: {k: v.T.contiguous() if k == "module/used.weight" else v for k, v in t.items()},
        lambda t: {k: v for k, v in t.items() if k != "module/used.bias"},
        lambda t: {k: v for k, v in t.items() if k != "optimizer/0/0/exp_avg_sq"},
        lambda t: {k: v - 5 if k == "optimizer/0/1/step" else v for k, v in t.items()},
        lambda t: {**t, "optimizer/0/9/exp_avg": torch.zeros(2)},
        lambda t: {**t, "optimizer/7/0/exp_avg": torch.zeros(2)},
        lambda t: {**t, "optimizer/0/-1/exp_avg": torch.zeros(2)},
        lambda t: {**t, "optimizer/0": torch.zeros(2)},
        lambda t: {**t, "module/other": torch.zeros(2)},
    ],
)
def test_tensors_that_do_not_fit_are_refused_whoever_wrote_them(tmp_path: Path, change: Change) -> None:
    state = saved(tmp_path)
    save_file(change(load_file(state / TENSORS)), state / TENSORS)
    seal(state)
    other = run(seed=1)
    with pytest.raises(BadInput, match="cannot resume from"):
        restore(tmp_path, *other, 2)
    assert same(run(seed=1), other)


def test_a_file_called_like_a_state_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-99999999").write_text("")
    saved(tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002"]


def test_metrics_are_cut_line_by_line(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in range(1, 5)]
    (tmp_path / "m").write_text("\n".join(lines))
    cut_metrics(tmp_path / "m", 3)
    assert (tmp_path / "m").read_text().splitlines() == lines[:3]
    with (tmp_path / "m").open("ab") as file:
        file.truncate(3_000_000_000)
    cut_metrics(tmp_path / "m", 2)
    assert (tmp_path / "m").read_text().splitlines() == lines[:2] and list(tmp_path.iterdir()) == [tmp_path / "m"]
