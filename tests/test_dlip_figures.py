"""The benchmark of DLIP: which rows it has, what it publishes, and that rows come out of a whole chain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import ROOT, script

from efficientvlm import families
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.accounting import count_parameters
from efficientvlm.compression.widths import resolve_sizes
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.recipe import load_recipe, validate

PAGE = "docs/dlip.md"
VOCABULARY = 267


@pytest.fixture(scope="module")
def dlip() -> Any:
    return script("benchmarks/dlip.py")


@pytest.fixture(scope="module")
def publishing() -> Any:
    return script("benchmarks/publish_dlip.py")


def line(task: str, model: str, kept: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    hidden, part = model == "text only", more.pop("part", "main")
    share = {"teacher": 1.0, "text only": 1.0, "small": 0.22, "small, no teacher": 0.22}.get(model, 0.5)
    about = {"metric": {"retrieval": "mean_recall", "captions": "cider_d", "answers": "accuracy"}[task], "value": 0.95 * kept}
    sizes = {"parameters_of_teacher": share, "without_embeddings_of_teacher": share}
    timed = {"batch_8_speedup": 2.8, "threads": 1, "load": 1.5}
    if hidden or part != "main":
        timed = dict.fromkeys(timed, "")
    data = {"data": "shapes:exact=1" + ",hide=all" * hidden, "images": 1000, "torch": "2", "image_to_text_r1": 0.6, "text_to_image_r1": 0.6}
    return {"task": task, "seed": seed, "model": model, "part": part, "of_teacher": kept, **about, **sizes, **timed, **data, **more}


def rows(small: float = 0.96, alone: float = 0.9, blind: float = 0.3, teacher: float = 1.0, **more: Any) -> list[dict[str, Any]]:
    kept = {"teacher": teacher, "small": small, "small, no teacher": alone, "text only": blind, "base": 0.995}
    return [line(task, name, part, **more) for task in ("retrieval", "captions", "answers") for name, part in kept.items()]


def texts(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{key: str(value) for key, value in record.items()} for record in records]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {},
            "`small` keeps 96.0 % of the teacher in the mean of the tasks (target: 95 %), 96.0 % in the worst of them (90 %), with at most",
        ),
        ({}, "2.80 times as fast at batch 8 in the mean of the tasks (2.7): reached."),
        ({}, "`base` keeps 99.5 % of the teacher in the mean of the tasks (target: 99 %): reached."),
        ({}, "Retrieval: with a teacher the student keeps 6.0 points more than without one, which one seed does not prove."),
        ({"small": 0.94}, "2.80 times as fast at batch 8 in the mean of the tasks (2.7): missed."),
        ({"batch_8_speedup": 2.0}, "2.00 times as fast at batch 8 in the mean of the tasks (2.7): missed."),
        (
            {"parameters_of_teacher": 0.23},
            "with at most 23.0 % of its parameters (22.4 %), and is 2.80 times as fast at batch 8 in the mean of the tasks (2.7): missed.",
        ),
        ({"blind": 0.9}, "Captions does not count: text only is less than 20 points worse than the teacher."),
        ({"teacher": 0.9}, "Answers does not count: the teacher reaches 85.5 %, less than 90."),
        ({"image_to_text_r1": 0.4}, "Retrieval does not count: the teacher's recall at 1 is 40.0 %, less than 50."),
    ],
)
def test_verdicts(publishing: Any, changed: dict[str, Any], said: str) -> None:
    assert said in " ".join(publishing.verdict(texts(rows(**changed))))


def test_rows_beside_another_teacher_are_told(publishing: Any) -> None:
    lines = texts([*rows(), line("captions", "small, pruned", 0.9, value=0.8)])
    assert (
        "Captions: the percentages of small, pruned are of another training of the teacher, not of the one in the table."
        in publishing.verdict(lines)
    )
    assert "another training" not in " ".join(publishing.verdict(texts(rows())))


def test_what_is_not_measured_is_said(publishing: Any) -> None:
    found = " ".join(publishing.verdict(texts([line("retrieval", "teacher", 1.0), line("retrieval", "small", 0.96)])))
    assert "`small`: not measured yet on captions, answers" in found and "`base`: not measured yet on retrieval, captions, answers" in found
    assert "Retrieval does not count yet: no model without pictures" in found and "reached" not in found


@pytest.mark.parametrize(
    ("random_text", "random_vision", "said"),
    [(0.9, 0.7, "retrieval: holds"), (0.7, 0.9, "retrieval: does not hold"), (0.8, 0.795, "retrieval: a tie")],
)
def test_findings_of_the_paper(publishing: Any, random_text: float, random_vision: float, said: str) -> None:
    found = {"retrieval": {"text random": random_text, "vision random": random_vision, "fusion 2": 0.9}}
    ((rule, text),) = publishing.findings(found)
    assert rule.startswith("pretrained weights") and text.startswith(said)


def test_tables_and_plot_are_made_from_the_rows(publishing: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / PAGE).write_text((ROOT / PAGE).read_text("utf-8"))
    append, results = script("benchmarks/published.py").append, tmp_path / "benchmarks/results"
    axis = [line("retrieval", name, kept, part="modules") for name, kept in (("fusion 2", 0.93), ("fusion 3", 0.95))]
    for record in [*axis, *rows(), *rows(seed=1, small=0.92)[1:2]]:
        append(results / "dlip_some-cpu.csv", record)
    for steps, words in ((0, 0.25), (100, 0.5)):
        values = {"words": words, "image": 0.1, "text": 0.2, "loss": 3.0, "teacher_loss": 1.2}
        append(results / "dlip_start_some-cpu.csv", {"seed": 0, "model": "leading channels", "steps": steps, **values, "scenes": 256})
    written = publishing.publish(tmp_path)
    page = (tmp_path / PAGE).read_text("utf-8")
    assert "| small | 89.3 | 87.4 to 91.2 (2) | 94.0 % | 22.0 % | 22.0 % | 2.80 × |" in page
    assert "Timed with 1 thread, load of the machine 1.5 to 1.5." in page
    assert "| fusion 2 | 50.0 % | 93.0 % |\n" in page and "does not hold (fusion 2 93.0 %, fusion 3 95.0 %)" in page
    assert "| leading channels | 100 | 1 | 50.0 % | 0.100 | 0.200 | 3.000 | 1.200 |" in page
    assert written == [tmp_path / PAGE, tmp_path / "docs/dlip.png"] and all(path.stat().st_size for path in written)


def test_seeds_are_those_of_students_and_every_axis_has_its_rows(dlip: Any) -> None:
    found = [run.key for run in dlip.runs([*dlip.TASKS], dlip.SEEDS, dlip.PARTS)]
    assert len({*found}) == len(found) and {seed for _, seed, name in found if name == "teacher"} == {"0"}
    for name in ("small", "small, no teacher"):
        assert {(task, seed) for task, seed, own in found if own == name} == {(task, seed) for task in dlip.TASKS for seed in "012"}
    for name in ("both narrower", "fusion 1", "no decoder terms", "vision random"):
        assert {task for task, _, own in found if own == name} == {"captions", "retrieval"}
    assert {steps for steps, _, name in found if name == "leading channels"} == {""}


@pytest.fixture(scope="module")
def teacher() -> Any:
    """The shapes of the recipes' teacher."""
    steps = {step.name: step.config for step in validate(load_recipe("dlip/scenes-retrieval"))}
    with torch.device("meta"):
        return families.get("blip").build(fresh_config("tiny", steps["start"].settings, VOCABULARY)), steps["student"]


def share(teacher: Any, shape: dict[str, Any]) -> float:
    layers = {tower: [*range(shape.get("layers", {}).get(tower, count))] for tower, count in teacher.config.layers().items()}
    config = teacher.config.with_layers({tower: chosen for tower, chosen in layers.items()})
    sizes = resolve_sizes(config, shape.get("width") or {}, {}, shape.get("neurons") or {})
    with torch.device("meta"):
        student = type(teacher)(config.with_sizes(sizes, shape.get("fusion_layers")))
    return float(count_parameters(student)["total"] / count_parameters(teacher)["total"])


def test_students_are_as_large_as_is_said(dlip: Any, teacher: Any) -> None:
    network, recipe = teacher
    own = {name: value for name, value in recipe.model_dump(exclude_unset=True).items() if name in ("layers", "width", "neurons")}
    assert share(network, own) < 0.23  # of the network before the task; each task's is a little smaller
    assert share(network, {**own, **dlip.MODELS["base"].shape}) == pytest.approx(0.51, abs=0.01)
    equal = [share(network, {**dlip.MODELS[f"{name} narrower"].shape, "layers": {}}) for name in ("vision", "text", "both")]
    assert equal == pytest.approx([0.7] * 3, abs=0.012) and max(equal) - min(equal) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("task", ["retrieval", "captions", "answers"])
def test_rows_come_out_of_a_chain(task: str, dlip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "recipes" / "dlip").glob("scenes-*.yaml"):
        text = re.sub(r"(?<=batch_size: )\d+", "4", re.sub(r"(?<=max_steps: )\d+", "3", path.read_text("utf-8")))
        text = re.sub(r"limit: \d+", "limit: 12", re.sub(r"queue: \d+", "queue: 8", text))
        (tmp_path / path.name).write_text(text)
    for name, value in {"RECIPES": tmp_path, "ROOT": tmp_path, "SHORT": 2, "COMPARED": 8}.items():
        monkeypatch.setattr(dlip, name, value)
    monkeypatch.setitem(script("benchmarks/scenes.py").TIMED, "rounds", 1)
    chosen = {
        "retrieval": ["small", "small, no teacher", "text only", "small, pruned", "logit alone", "leading channels"],
        "captions": ["small", "fusion 2", "no decoder terms", "text random"],
        "answers": ["small", "text only", "base"],
    }[task]
    parts = [part for name in dlip.PARTS for part in ("--part", name)]
    given = ["--task", task, *parts, "--seed", "0", "--out", str(tmp_path / "runs"), "--row", "teacher"]
    given += [part for name in chosen for part in ("--row", name)]
    assert dlip.main(given) == 0
    table, starts = (tmp_path / dlip.csv_of(name, dlip.processor()) for name in ("dlip", "dlip_start"))
    rows_of = script("benchmarks/published.py").rows_of
    found = {record["model"]: record for record in rows_of(table)}
    assert {*found} == {"teacher", *chosen} - {"leading channels"}
    assert float(found["small"]["parameters_of_teacher"]) < 0.224 and float(found["small"]["batch_8_speedup"]) > 0
    assert task == "captions" or found["text only"]["data"].endswith("hide=all")
    if task == "retrieval":
        assert float(found["small, pruned"]["sparsity"]) == pytest.approx(0.3, abs=0.03)
        for name, steps in (("retrieval-small", 3), ("general-logit-alone", 1), ("retrieval-logit-alone", 1)):
            assert require_complete(tmp_path / "runs" / "0" / name).config["max_steps"] == steps
        begun = rows_of(starts)
        assert [record["steps"] for record in begun] == ["0", "2"] and all(0 <= float(record["words"]) <= 1 for record in begun)
    before = table.read_text("utf-8")
    assert dlip.main(given) == 0 and table.read_text("utf-8") == before  # nothing is left to do
