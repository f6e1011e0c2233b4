"""The ablation's published figures: verdicts, tables and plots from the CSV, and the page that shows them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from doc_pages import ROOT, script

from efficientvlm.errors import BadInput

PAGE = "docs/ablation.md"


def line(arm: str, accuracy: float, seed: int = 0, sparsity: float = 0.6, task: str = "easy-vqa") -> dict[str, Any]:
    about = {"data": "easy-vqa", "questions": 9673, "teacher_accuracy": 0.998, "distill_steps": "0", "task_steps": "9", "torch": "2"}
    shares = {"achieved_sparsity": sparsity, "parameters_of_teacher": 0.25, "accuracy_of_teacher": accuracy / 0.998}
    return {"task": task, "arm": arm, "sparsity": f"{sparsity:g}", "seed": seed, "accuracy": accuracy, **about, **shares}


def project(tmp_path: Path, lines: list[dict[str, Any]]) -> Path:
    published = script("benchmarks/published.py")
    (tmp_path / "docs").mkdir()
    for page in (PAGE, "README.md"):
        (tmp_path / page).write_text((ROOT / page).read_text("utf-8"))
    for record in lines:
        published.append(tmp_path / "benchmarks/results/vqa_ablation_some-cpu.csv", record)
    timed = {"batch": 8, "speedup": 4.0}
    for record in lines:
        name = {key: record[key] for key in ("task", "arm", "sparsity", "seed")}
        published.append(tmp_path / "benchmarks/results/vqa_ablation_latency_some-cpu.csv", {**name, **timed})
    return tmp_path


@pytest.mark.parametrize(
    ("method", "other", "is_"),
    [
        ((0.99, 0.98, 0.985), (0.90, 0.91, 0.92), "worse"),
        ((0.90, 0.91, 0.92), (0.99, 0.98, 0.985), "better"),
        ((0.99, 0.98, 0.985), (0.976, 0.98, 0.981), "tie"),
        ((0.99, 0.98, 0.985), (0.90, 0.99, 0.91), "tie"),  # the other's own seeds differ by more than the means do
        ((0.99, 0.98, 0.985), (0.97,), "worse"),
        ((0.99, 0.98, 0.985), (0.976,), "tie"),
        ((0.99,), (0.90, 0.91), "–"),
    ],
)
def test_a_difference_within_the_spread_of_the_seeds_is_a_tie(method: tuple[float, ...], other: tuple[float, ...], is_: str) -> None:
    ablation = script("benchmarks/publish_ablation.py")
    lines = [line("method", value, seed) for seed, value in enumerate(method)] + [
        line("x", value, seed) for seed, value in enumerate(other)
    ]
    assert ablation.verdict(*ablation.groups(lines)) == is_


def test_tables_and_plots_are_made_from_the_rows(tmp_path: Path) -> None:
    ablation = script("benchmarks/publish_ablation.py")
    lines = [
        line(arm, value + seed / 1000, seed, 0.6, task)
        for task in ("easy-vqa", "shapes")
        for arm, value in (("method", 0.99), ("scratch", 0.9))
        for seed in (0, 1)
    ]
    root = project(tmp_path, [*lines, line("taylor", 0.991), line("method", 0.9925, sparsity=0.4)])
    for _ in range(2):  # the second time it replaces what it wrote
        written = ablation.publish(root)
    page = (root / PAGE).read_text("utf-8")
    assert "| method | 60.0 % | 25.0 % | 99.05 | 99.00 to 99.10 (2) | 99.2 % | – |" in page
    assert "| scratch | 60.0 % | 25.0 % | 90.05 | 90.00 to 90.10 (2) | 90.2 % | worse |" in page
    assert "| taylor | 60.0 % | 25.0 % | 99.10 | one seed | 99.3 % | tie |" in page
    assert page.index("| method | 40.0 %") < page.index("| method | 60.0 %") < page.index("### shapes")
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written[2:]) and len(written) == 4
    summary = script("benchmarks/published.py").block_of((root / "README.md").read_text("utf-8"), "ablation")
    assert "| scratch | 90.2 % (2) worse | 90.2 % (2) worse |" in summary and "99.2 % (2) |" in summary


def test_rows_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    ablation, published = script("benchmarks/publish_ablation.py"), script("benchmarks/published.py")
    fine = [line("method", 0.99), {**line("quirks", 0.9), "achieved_sparsity": 0.3, "distill_steps": "200"}]
    ablation.check(ablation.groups(fine))
    for wrong in ({"task_steps": "10"}, {"torch": "3"}, {"achieved_sparsity": 0.594}):
        with pytest.raises(BadInput):
            ablation.check(ablation.groups([*fine, {**line("method", 0.99, seed=1), **wrong}]))
    root = project(tmp_path, fine)
    with pytest.raises(BadInput, match="other columns"):
        published.append(root / "benchmarks/results/vqa_ablation_some-cpu.csv", {"task": "easy-vqa"})


def test_one_csv_is_published_and_the_page_needs_its_markers(tmp_path: Path) -> None:
    ablation = script("benchmarks/publish_ablation.py")
    with pytest.raises(BadInput, match="0 CSVs"):
        ablation.publish(tmp_path)
    root = project(tmp_path, [line("method", 0.99)])
    (root / PAGE).write_text("no markers")
    with pytest.raises(BadInput, match="no place for the ablation"):
        ablation.publish(root)


def test_the_page_shows_what_the_csv_says() -> None:
    ablation, published = script("benchmarks/publish_ablation.py"), script("benchmarks/published.py")
    (name,) = (path for path in (ROOT / published.RESULTS).glob("vqa_ablation_*.csv") if "latency" not in path.name)
    found = ablation.groups(published.rows_of(name))
    assert published.block_of((ROOT / PAGE).read_text("utf-8"), "ablation").strip() == ablation.block(found, published.RESULTS / name.name)
    assert published.block_of((ROOT / "README.md").read_text("utf-8"), "ablation").strip() == ablation.summary(found)
    assert all((ROOT / path).is_file() for path in ablation.PICTURES.values())
    sparsities = [(float(line["sparsity"]), float(line["achieved_sparsity"]), line["arm"]) for group in found for line in group.lines]
    assert all(abs(wanted - got) <= 0.005 for wanted, got, arm in sparsities if arm != "quirks")


def test_every_arm_is_run_at_every_seed_it_needs() -> None:
    ablation = script("benchmarks/vqa_ablation.py")
    planned = [run.key for run in ablation.runs(["easy-vqa", "shapes"])]
    assert len(planned) == len(set(planned)) == 2 * (4 * 2 * 3 + 10 + 3)
    for task in ("easy-vqa", "shapes"):
        for arm in ("method", "scratch", "no-kd", "magnitude"):
            sparsities = ("0.2", "0.4", "0.6") if arm == "method" else ("0.4", "0.6")
            assert {(sparsity, seed) for t, a, sparsity, seed in planned if (t, a) == (task, arm) and sparsity != "0.8"} == {
                (sparsity, seed) for sparsity in sparsities for seed in "012"
            }


def test_gates_are_compared_with_scores_that_had_the_same_seeds_and_teacher() -> None:
    gates = script("benchmarks/gates.py")
    chosen = gates.runs(list(gates.DATA), gates.USUAL, gates.SEEDS, list(gates.CHOICES))
    assert len({run.key for run in chosen}) == len(chosen) == 2 * 2 * 3 * len(gates.CHOICES)
    assert all(run.arm.kd and not run.arm.without for run in chosen)


@pytest.mark.slow
def test_the_runs_append_rows_of_equal_size_and_are_passed_over_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to a small model, in a few steps: learnt gates, random weights, a structure cut out, Torch-Pruning, the quirks."""
    ablation, published, gates = (script(f"benchmarks/{name}.py") for name in ("vqa_ablation", "published", "gates"))
    shapes = "shapes:difficulty=2,size=40"
    for name, value in {
        "ROOT": tmp_path,
        "PAIRS": shapes,
        "DATA": {"shapes": ablation.Data("shapes", shapes, "bundled:easy-vqa", tested=8)},
        "DISTILL_STEPS": 1,
        "PRUNE_STEPS": 4,
        "FINETUNE_STEPS": 1,
        "TRAINING": {**ablation.TRAINING, "batch_size": 4, "eval_limit": 4},
        "TIMED": {**ablation.TIMED, "rounds": 1},
    }.items():
        monkeypatch.setattr(ablation, name, value)
    arms = [
        *ablation.MAIN,
        *(ablation.ARMS[name] for name in ("magnitude-kd", "tower-budgets", "no-logits", "taylor")),
        gates.CHOICES["taylor-kd"],
    ]
    monkeypatch.setattr(ablation, "runs", lambda names: [ablation.Run(ablation.DATA["shapes"], arm, 0.6, 0) for arm in arms])
    out = ["--out", str(tmp_path / "runs")]
    assert ablation.main(out) == 0
    (path,) = (tmp_path / published.RESULTS).iterdir()
    rows, before = published.rows_of(path), path.read_bytes()
    assert [row["arm"] for row in rows] == [arm.name for arm in arms]
    assert all(abs(float(row["achieved_sparsity"]) - 0.6) <= 0.005 for row in rows)
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["method"]["parameters"] == by_arm["scratch"]["parameters"] == by_arm["no-kd"]["parameters"]
    assert ablation.main(out) == 0 and path.read_bytes() == before
    assert ablation.main([*out, "--latency"]) == 0
    (timed,) = (tmp_path / published.RESULTS).glob("vqa_ablation_latency_*")
    assert len(published.rows_of(timed)) == 2 * len(arms)


@pytest.mark.slow
def test_budgets_are_compared_at_the_same_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    equal, published = script("benchmarks/equal_time.py"), script("benchmarks/published.py")
    ablation, shapes = sys.modules[equal.Chain.__module__], "shapes:difficulty=2,size=40"
    small = {"PAIRS": shapes, "DISTILL_STEPS": 1, "PRUNE_STEPS": 1, "FINETUNE_STEPS": 4}
    small |= {"DATA": {"easy-vqa": ablation.Data("easy-vqa", shapes, "bundled:easy-vqa", tested=8)}}
    small |= {"TRAINING": {**ablation.TRAINING, "batch_size": 4, "eval_limit": 4}}
    for name, value in small.items():
        for module in (ablation, equal):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(equal, "ROOT", tmp_path)
    given = ["--sparsity", "0.6", "--seed", "1", "--out", str(tmp_path / "runs")]
    assert equal.main(given) == 0
    (path,) = (tmp_path / published.RESULTS).iterdir()
    parameters, latency = published.rows_of(path)
    assert (parameters["budget"], latency["budget"], parameters["seed"], latency["sparsity"]) == ("parameters", "latency", "1", "0.6")
    assert 0.9 * float(parameters["table_ms"]) <= float(latency["table_ms"]) <= float(parameters["table_ms"])
    before = path.read_bytes()
    assert equal.main(given) == 0 and path.read_bytes() == before
