"""The benchmark of the made scenes: which rows it has, what it publishes, and that a row comes out of a whole chain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from doc_pages import ROOT, script

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.errors import BadInput
from efficientvlm.recipe import load_recipe, validate

PAGE = "docs/scenes.md"


@pytest.fixture(scope="module")
def scenes() -> Any:
    return script("benchmarks/scenes.py")


@pytest.fixture(scope="module")
def publishing() -> Any:
    return script("benchmarks/publish_scenes.py")


def line(model: str, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    hidden = model in ("text only", "one image only")
    share = 1.0 if model == "teacher" or hidden else 0.36
    about = {"metric": "statement_accuracy", "of_teacher": value / 0.95, "parameters": int(share * 2e6), "parameters_of_teacher": share}
    timed = {"batch_8_speedup": "" if hidden else (1.0 if model == "teacher" else 2.4), "threads": 2, "load": 0.5}
    data = {"data": "shapes:exact=1" + ",hide=all" * hidden, "images": 1000, "torch": "2", "image_to_text_r1": "", "text_to_image_r1": ""}
    return {"task": "statements", "seed": seed, "model": model, "value": value, **about, **timed, **data, **more}


def rows(method: float = 0.945, plain: float = 0.8, blind: float = 0.5, teacher: float = 0.95, **more: Any) -> list[dict[str, Any]]:
    values = {"teacher": teacher, "method": method, "no-kd": plain, "text only": blind}
    return [line(name, value + seed / 1000, seed, **more) for name, value in values.items() for seed in range(3)]


def project(tmp_path: Path, lines: list[dict[str, Any]]) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text((ROOT / PAGE).read_text("utf-8"))
    for record in lines:
        script("benchmarks/published.py").append(tmp_path / "benchmarks/results/scenes_some-cpu.csv", record)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "target reached; better than no-kd"),
        ({"method": 0.9}, "target missed: 94.8 % of the teacher's accuracy, not 98.4; better than no-kd"),
        ({"plain": 0.945}, "target reached; a tie with no-kd"),
        ({"batch_8_speedup": 1.9}, "target missed: 1.90 times as fast, not 2.2; better than no-kd"),
        ({"parameters_of_teacher": 0.5}, "target missed: 50.0 % of its parameters, not 44.3; better than no-kd"),
        ({"blind": 0.8}, "does not count: text only is less than 20 points worse than the teacher"),
        ({"teacher": 0.85}, "does not count: the teacher reaches 85.0 %, less than 90"),
    ],
)
def test_verdicts(publishing: Any, changed: dict[str, Any], said: str) -> None:
    lines = [{key: str(value) for key, value in record.items()} for record in rows(**changed)]
    assert said in publishing.verdict(publishing.by_model(lines, "statements"))


def test_table_and_plot_are_made_from_the_rows(publishing: Any, tmp_path: Path) -> None:
    root = project(tmp_path, rows())
    written = publishing.publish(root)
    page = (root / PAGE).read_text("utf-8")
    assert "| method | 94.6 | 94.5 to 94.7 (3) | 99.6 % | 0.72 M | 36.0 % | 2.40 × |" in page
    assert "Target reached; better than no-kd." in page and "load of the machine was 0.5 to 0.5" in page
    assert written == [root / PAGE, root / "docs/scenes.png"] and all(path.stat().st_size for path in written)


def test_one_seed_is_weak_and_two_torches_are_refused(publishing: Any, tmp_path: Path) -> None:
    lines = [line("teacher", 0.95), line("method", 0.94), line("no-kd", 0.9)]
    texts = [{key: str(value) for key, value in record.items()} for record in lines]
    assert "one seed says nothing" in publishing.verdict(publishing.by_model(texts, "statements"))
    with pytest.raises(BadInput, match="cannot be compared"):
        publishing.publish(project(tmp_path, [*lines, line("text only", 0.5, torch="3")]))
    with pytest.raises(BadInput, match="0 CSVs"):
        publishing.publish(tmp_path / "empty")


def test_seeds_may_be_of_several_machines(publishing: Any, tmp_path: Path) -> None:
    root, published = project(tmp_path, [record for record in rows() if record["seed"]]), script("benchmarks/published.py")
    for record in rows():
        if not record["seed"]:
            published.append(root / "benchmarks/results/scenes_other-cpu.csv", record)
    publishing.publish(root)
    page = (root / PAGE).read_text("utf-8")
    assert "94.5 to 94.7 (3)" in page and "scenes_other-cpu.csv), [scenes_some-cpu.csv" in page
    published.append(root / "benchmarks/results/scenes_other-cpu.csv", line("method", 0.9, 1))
    with pytest.raises(BadInput, match=r"some-cpu\.csv and scenes_other-cpu\.csv.* twice"):
        publishing.publish(root)
    with pytest.raises(BadInput, match=r"^scenes_some-cpu\.csv: .* twice"):
        (tmp_path / "double").mkdir()
        publishing.publish(project(tmp_path / "double", [*rows(), line("method", 0.9, 1)]))


def test_rows_have_baselines_that_do_not_see_the_pictures(scenes: Any) -> None:
    found = [run.key for run in scenes.runs(list(scenes.TASKS), scenes.SEEDS)]
    blind = {run.task.name: scenes.described(run) for run in scenes.runs(list(scenes.TASKS), [0]) if run.model == "text only"}
    assert blind["retrieval"].startswith("the teacher") and blind["boxes"].startswith("trained")
    assert len(set(found)) == len(found) and {seed for _, seed, _ in found} == {"0", "1", "2"}
    assert {model for task, _, model in found if task == "statements"} >= {"one image only", "text only"}
    assert all({"teacher", "method", "no-kd", "text only"} <= set(task.models) for task in scenes.TASKS.values())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "efficientvlm").glob("scenes-*.yaml")), ids=lambda path: path.stem)
def test_recipes_share_what_is_general_and_need_their_pictures(path: Path, scenes: Any) -> None:
    steps = {step.name: step for step in validate(load_recipe(str(path)))}
    general = {step.name: step for step in validate(load_recipe(str(path.with_name("scenes-retrieval.yaml"))))}
    task = scenes.TASKS[path.stem.removeprefix("scenes-")]
    if task.general:
        for name in ("pretrained", "student", "distilled"):
            assert steps[name] == general[name]
    assert steps[task.student].stage == "shrink" and {*task.general} <= {*steps}
    for stage in ("teacher", "pruned", "final", "teacher-test"):
        assert f"{task.name}-{stage}" in steps
    assert steps[f"{task.name}-pruned"].config.sparsity == 0.4
    spec = steps[f"{task.name}-teacher-test"].config.data
    assert "difficulty=3" in spec and "objects=2-" in spec and ("exact=1" in spec or "alike=2" in spec)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "captions", "statements", "boxes"])
def test_every_row_of_a_task_comes_out_of_a_chain(task: str, scenes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    text = (ROOT / "recipes" / "efficientvlm" / f"scenes-{task}.yaml").read_text("utf-8")
    text = re.sub(r"(?<=batch_size: )\d+", "4", re.sub(r"(?<=max_steps: )\d+", "2", text))
    text = re.sub(r"limit: \d+", "limit: 12", text)
    (tmp_path / f"scenes-{task}.yaml").write_text(text)
    monkeypatch.setattr(scenes, "RECIPES", tmp_path)
    monkeypatch.setattr(scenes, "TIMED", {**scenes.TIMED, "rounds": 1})
    monkeypatch.setattr(scenes, "ROOT", tmp_path)
    assert scenes.main(["--task", task, "--seed", "0", "--out", str(tmp_path / "runs")]) == 0
    (table,) = (tmp_path / "benchmarks" / "results").glob("scenes_*.csv")
    found = {record["model"]: record for record in script("benchmarks/published.py").rows_of(table)}
    assert list(found) == scenes.TASKS[task].models
    assert found["teacher"]["of_teacher"] in ("1", "") and all(0 <= float(record["value"]) <= 10 for record in found.values())
    assert float(found["method"]["parameters_of_teacher"]) < 0.443 and float(found["method"]["sparsity"]) == pytest.approx(0.4, abs=0.02)
    assert found["text only"]["data"].endswith("hide=all") and float(found["method"]["batch_8_speedup"]) > 0
    before = table.read_text("utf-8")
    scenes.main(["--task", task, "--seed", "0", "--out", str(tmp_path / "runs")])  # nothing is left to do
    assert table.read_text("utf-8") == before


def test_what_every_tower_kept_is_published_from_the_manifests(chain: Path, tmp_path: Path) -> None:
    kept, root, runs = script("benchmarks/kept.py"), project(tmp_path, []), tmp_path / "runs"
    with pytest.raises(BadInput, match="holds no pruned checkpoints"):
        kept.publish(runs, root)
    (runs / "0").mkdir(parents=True)
    shutil.copytree(chain / "pruned", runs / "0/boxes-pruned")
    page, picture, table = kept.publish(runs, root)
    units = require_complete(chain / "pruned").accounting["units"]
    rows = script("benchmarks/published.py").rows_of(table)
    for column in ("kept", "of"):
        assert sum(int(row[column]) for row in rows) == sum(count[column] for count in units.values())
    assert {row["task"] for row in rows} == {"boxes"} and picture.is_file() and "| boxes | 1 | 4" in page.read_text("utf-8")
    picture.unlink()
    assert kept.publish(None, root) == [page, picture, table] and picture.is_file()
