"""What gates choose beside scores: the arms of the benchmark, verdicts and tables from its CSV, and the page that shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from doc_pages import ROOT, script

PAGE, LEARNT = "docs/ablation.md", "tuned first"


def line(arm: str, kept: float, seed: int = 0, sparsity: float = 0.8) -> dict[str, Any]:
    about = {"data": "easy-vqa", "distill_steps": 200, "task_steps": 1200, "torch": "2", "parameters_of_teacher": 0.15}
    shares = {"achieved_sparsity": sparsity, "accuracy": 0.99 * kept, "accuracy_of_teacher": kept}
    return {"task": "easy-vqa", "arm": arm, "sparsity": f"{sparsity:g}", "seed": seed, **about, **shares}


@pytest.fixture(scope="module")
def publishing() -> Any:
    return script("benchmarks/publish_gates.py")


@pytest.mark.parametrize(
    ("held", "taylor", "said"),
    [
        ((0.98, 0.975), (0.87, 0.88), "keeps 97.8 % of the teacher's accuracy (target: 97 %: reached), 2 seeds; better than `taylor-kd`"),
        ((0.96, 0.965), (0.99,), "(target: 97 %: missed), 2 seeds; worse than `taylor-kd` (99.0 %, one seed)"),
        ((0.98, 0.97), (0.974, 0.976), "a tie with `taylor-kd` (97.5 %, 2 seeds)"),
        ((0.98,), (0.87, 0.88), "one seed; not compared with `taylor-kd`"),
        ((0.98,), (), "one seed; nothing beside it is measured yet."),
        ((), (0.9,), "`tuned first` is not measured yet."),
    ],
)
def test_verdicts(publishing: Any, held: tuple[float, ...], taylor: tuple[float, ...], said: str) -> None:
    lines = [line(arm, kept, seed) for arm, some in ((LEARNT, held), ("taylor-kd", taylor)) for seed, kept in enumerate(some)]
    (found,) = publishing.said(publishing.groups([{key: str(value) for key, value in row.items()} for row in lines]))
    assert said in found


def test_tables_and_plot_are_made_from_the_rows(publishing: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text((ROOT / PAGE).read_text("utf-8"))
    append = script("benchmarks/published.py").append
    for row in (line(LEARNT, 0.98), line(LEARNT, 0.96, 1), line("magnitude-kd", 0.4), line(LEARNT, 0.99, sparsity=0.6)):
        append(tmp_path / "benchmarks/results/gates_some-cpu.csv", row)
    assert publishing.publish(tmp_path) == [tmp_path / PAGE, tmp_path / "docs/gates.png"]
    page = (tmp_path / PAGE).read_text("utf-8")
    assert (
        "| easy-vqa | 0.8 | tuned first | 15.0 % | 97.0 % | 96.0 to 98.0 (2) |" in page
        and "easy-vqa at 0.6: `tuned first` keeps 99.0 %" in page
    )
    assert (tmp_path / "docs/gates.png").stat().st_size


def test_longer_runs_have_a_table_of_their_own(publishing: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text((ROOT / PAGE).read_text("utf-8"))
    append = script("benchmarks/published.py").append
    append(tmp_path / "benchmarks/results/gates_some-cpu.csv", line(LEARNT, 0.95))
    append(tmp_path / "benchmarks/results/gates_x2_some-cpu.csv", {**line(LEARNT, 0.98), "task_steps": 2600})
    publishing.publish(tmp_path)
    page = (tmp_path / PAGE).read_text("utf-8")
    assert "`tuned first` keeps 95.0 %" in page and "`tuned first` keeps 98.0 %" in page and "2,600 steps on the task in all rows." in page


def test_longer_runs_take_more_steps_and_share_no_trained_model(publishing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ablation, gates = script("benchmarks/vqa_ablation.py"), script("benchmarks/gates.py")

    def made(times: int) -> dict[str, int]:
        """Where a chain trains on the task → its steps; nothing is trained."""
        (run,) = gates.runs(["easy-vqa"], [0.8], [0], ["tuned first"], times)
        chain, found = ablation.Chain(run, tmp_path), {}
        monkeypatch.setattr(chain, "stage", lambda name, out, **settings: found.update({str(out): settings.get("max_steps", 0)}))
        monkeypatch.setattr(chain, "start", lambda: "distilled")
        chain.final()
        return found

    usual, longer = made(1), made(2)
    assert list(usual.values()) == [600, 600] and list(longer.values()) == [1200, 1200]
    assert not usual.keys() & longer.keys() and publishing.LONGER == gates.CSVS[2]


def test_every_arm_has_a_colour_and_its_own_gates(publishing: Any) -> None:
    gates = script("benchmarks/gates.py")
    assert set(gates.CHOICES) == set(publishing.COLOURS)
    assert {name: arm.gates for name, arm in gates.CHOICES.items() if arm.gates} == {
        "held": {"sparsity_hold": 0.3},
        "held, one stage": {"sparsity_hold": 0.3},
        "defaults": {"sparsity_hold": 0.3, "gates": {}},
        "tuned first": {"sparsity_hold": 0.3, "gates": {}},
    }
    assert len(gates.runs(["easy-vqa"], [0.8], [0, 1], list(gates.CHOICES))) == 14


@pytest.mark.parametrize(
    ("by_time", "said"),
    [
        ((0.95, 0.96), "10.0 points of the teacher's accuracy more; more in 2 of 2 seeds."),
        ((0.84, 0.90), "1.5 points of the teacher's accuracy more, a tie beside the spread of the seeds; more in 1 of 2 seeds."),
    ],
)
def test_budgets_are_compared_at_equal_time(publishing: Any, by_time: tuple[float, ...], said: str) -> None:
    def one(budget: str, kept: float, seed: int) -> dict[str, str]:
        values: dict[str, Any] = {
            "seed": seed,
            "sparsity": 0.8,
            "budget": budget,
            "accuracy_of_teacher": kept,
            "table_ms": 7.0,
            "speedup": 2.0,
            "torch": 2,
        }
        return {name: str(value) for name, value in {**values, "parameters": 360_000, "macs": 11_000_000}.items()}

    shares = {"parameters": (0.85, 0.86), "latency": by_time}
    lines = [one(budget, kept, seed) for budget, some in shares.items() for seed, kept in enumerate(some)]
    text = publishing.of_equal_time(lines, Path("benchmarks/results/equal_time_some-cpu.csv"))
    assert said in text and "| 0.8 | parameters | 2 | 85.5 (85.0 to 86.0) | 7.00 | 2.00 × | 360 k | 11.0 M |" in text
