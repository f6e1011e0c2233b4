"""Gates beside magnitude on photos: rows of both arms come of one teacher and one distilled student, and tables of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doc_pages import script
from test_flickr8k import short, world  # noqa: F401

from efficientvlm.errors import BadInput


@pytest.mark.slow
def test_both_arms_come_of_one_tuned_student(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    benchmark = script("benchmarks/photo_gates.py")
    monkeypatch.setattr(benchmark, "STEPS", 4)
    monkeypatch.chdir(world)
    chain = benchmark.Photos(tmp_path, short("flickr8k"))
    rows = [benchmark.row(arm, 1, chain) for arm in benchmark.WHAT]
    assert [row["arm"] for row in rows] == ["tuned first", "magnitude-kd"]
    assert all(abs(row["achieved_sparsity"] - 0.6) < 0.03 and row["task_steps"] == 8 for row in rows)
    assert rows[0]["teacher_mean_recall"] == rows[1]["teacher_mean_recall"] > 0
    made = {path.name for path in (tmp_path / "0").iterdir() if path.is_dir()}
    assert made == {"start", "aligned", "teacher", "student", "distilled", "tuned-1", "tuned-first-1", "magnitude-kd-1"}


def line(arm: str, recall: float) -> dict[str, str]:
    values: dict[str, Any] = {"arm": arm, "parameters_of_teacher": 0.3, "mean_recall": recall, "mean_recall_of_teacher": recall / 0.5}
    values |= {"teacher_mean_recall": 0.5, "task_steps": 600, "precision": "bf16", "torch": "2"}
    return {name: str(value) for name, value in values.items()}


def test_seeds_are_compared_with_themselves() -> None:
    lines = [line("tuned first", value) | {"seed": seed} for seed, value in (("0", 0.40), ("1", 0.30))]
    lines += [line("magnitude-kd", value) | {"seed": seed} for seed, value in (("1", 0.29), ("0", 0.39), ("2", 0.5))]
    assert "; more in 2 of 2 seeds." in script("benchmarks/publish_gates.py").of_photos(lines, Path("x/y.csv"))


@pytest.mark.parametrize(
    ("gates", "magnitude", "said"),
    [
        ((0.40, 0.42), (0.30, 0.31), ": 10.5 points of mean recall more; more in 2 of 2 seeds."),
        ((0.30, 0.31), (0.40, 0.42), ": 10.5 points of mean recall less; more in 0 of 2 seeds."),
        ((0.40, 0.42), (0.41, 0.42), ": 0.5 points of mean recall less, a tie beside the spread of the seeds; more in 0 of 2 seeds."),
    ],
)
def test_the_verdict_is_by_the_spread_of_the_seeds(gates: tuple[float, ...], magnitude: tuple[float, ...], said: str) -> None:
    arms = (("tuned first", gates), ("magnitude-kd", magnitude))
    lines = [line(arm, value) | {"seed": str(seed)} for arm, some in arms for seed, value in enumerate(some)]
    text = script("benchmarks/publish_gates.py").of_photos(lines, Path("benchmarks/results/photo_gates_some-cpu.csv"))
    assert said in text and "The teacher has 50.0. 600 steps on the task, trained in bf16." in text
    one = script("benchmarks/publish_gates.py").of_photos(lines[:1] + lines[2:], Path("x/y.csv"))
    assert "points of mean recall" in one and ", of one seed." in one
    with pytest.raises(BadInput, match="compared"):
        script("benchmarks/publish_gates.py").of_photos([lines[0], {**lines[1], "torch": "3"}], Path("x/y.csv"))
