"""The summary table, the targets and the picture, from manifests and results made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from efficientvlm.checkpoints.manifest import Code, Manifest
from efficientvlm.errors import BadInput
from efficientvlm.report import summary as report
from efficientvlm.report.picture import structure_figure
from efficientvlm.settings.stages import Targets

CROSS = ("fusion", "decoder")
ASKED = Targets(parameters=0.443, accuracy=0.98, speedup=2.2)


def manifest(stage: str, layers: dict[str, int], heads: int = 4, neurons: int = 512, **total: int) -> Manifest:
    units = {}
    for tower, count in layers.items():
        for layer in range(count):
            units[f"{tower}.{layer}.head"] = {"kept": heads, "of": 4}
            if tower in CROSS:
                units[f"{tower}.{layer}.cross_head"] = {"kept": heads, "of": 4}
            units[f"{tower}.{layer}.neuron"] = {"kept": neurons, "of": 512}
    parameters = total["parameters"]
    by_tower = {"heads": parameters // 10, **dict.fromkeys(layers, parameters // 10)}
    accounting = {
        "parameters": {"total": parameters, "without_embeddings": parameters - 40_000, "by_tower": by_tower},
        "macs": {"total": 40 * parameters, "by_tower": {}, "image_size": 64, "text_length": 12},
        "units": units,
        "sparsity": {"initial": 100, "kept": heads * 25, "achieved": 1 - heads / 4, "by_tower": {}},
    }
    return Manifest(stage=stage, family="xvlm", code=Code(version="0"), accounting=accounting, created="2024-01-01T00:00:00+00:00")


TEACHER, STUDENT = {"vision": 4, "text": 2, "fusion": 2, "decoder": 2}, {"vision": 2, "text": 1, "fusion": 1}


@pytest.fixture
def models() -> dict[str, tuple[Manifest, str]]:
    small = {**STUDENT, "decoder": 1}
    return {
        "teacher": (manifest("finetune", TEACHER, parameters=2_400_000), "a" * 64),
        "student": (manifest("distill", STUDENT, parameters=1_100_000), "b" * 64),
        "pruned": (manifest("prune", small, heads=2, neurons=300, parameters=720_000), "c" * 64),
        "final": (manifest("finetune", small, heads=2, neurons=300, parameters=720_000), "d" * 64),
    }


def evaluation(sha: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    data = {"name": "easy-vqa", "split": "test", "count": 1000, "fingerprint": "f" * 64, "licence": "MIT"}
    ranked = {"mode": "rank", "answers": 13, "first_token_twice": True}
    metrics = {"accuracy": accuracy, "questions": 9673}
    return {
        "stage": "eval",
        "task": "vqa",
        "data": data,
        **ranked,
        "metrics": metrics,
        "provenance": {"inputs": {"model": sha}, "config": {}},
        **changes,
    }


@pytest.fixture
def evals() -> dict[str, dict[str, Any]]:
    return {"teacher": evaluation("a" * 64, 0.98), "final": evaluation("d" * 64, 0.97)}


@pytest.fixture
def bench(models: dict[str, tuple[Manifest, str]]) -> dict[str, Any]:
    ratios = {"teacher": 1.0, "student": 2.0, "pruned": 2.9, "final": 3.0}
    rows = [
        {"model": f"runs/{label}", "batch": size, "median_ms": 10 * size / ratio, "speedup": ratio}
        for size in (1, 8)
        for label, ratio in ratios.items()
    ]
    return {
        "stage": "bench",
        "timed": "image tensors to an answer; random pixels",
        "machine": {"device": "cpu", "name": "Fast CPU", "threads": 2},
        "precision": "fp32",
        "text_length": 12,
        "models": [{"model": f"runs/{label}", "sha256": models[label][1], "trained": label != "student"} for label in ratios],
        "latency": rows,
    }


def cells(text: str, name: str) -> list[str]:
    """The row of a table that begins with `name`; cells are two spaces apart."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
    return [cell.strip() for cell in line.strip().removeprefix(name).split("  ") if cell.strip()]


def test_the_table_has_measures_as_rows_and_fits_a_terminal(models: Any, evals: Any, bench: Any) -> None:
    text = report.text(report.summarise(models, evals, bench, ASKED))
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].split() == ["teacher", "student", "pruned", "final"]
    assert cells(text, "parameters (M)") == ["2.400", "1.100", "0.720", "0.720"]
    assert cells(text, "multiply-adds (M)") == ["96.00", "44.00", "28.80", "28.80"]
    assert cells(text, "sparsity of prunable weights") == ["–", "–", "50.0 %", "50.0 %"]
    assert cells(text, "latency (ms), batch 8") == ["80.00", "*40.00", "27.59", "26.67"]
    assert cells(text, "latency (ms), batch 1") == ["10.00", "*5.00", "3.45", "3.33"]
    assert cells(text.partition("\naccuracy:")[0], "accuracy") == ["98.0 %", "–", "–", "97.0 %"]
    assert cells(text, "layers (vision/text/fusion/decoder)") == ["4/2/2/2", "2/1/1/0", "2/1/1/1", "2/1/1/1"]
    blocks = {lines[0]: "\n".join(lines[1:]) for lines in (block.splitlines() for block in text.split("\n\n"))}
    assert cells(blocks["heads kept"], "vision") == ["16/16", "8/8", "4/8", "4/8"]
    assert cells(blocks["cross-attention heads kept"], "fusion") == ["8/8", "4/4", "2/4", "2/4"]
    assert cells(blocks["neurons kept"], "decoder") == ["1,024/1,024", "–", "300/512", "300/512"]
    assert "* not trained for the task" in text and "9,673 questions" in text and "2 threads of Fast CPU" in text
    assert "latency: image tensors to an answer; texts of 12 tokens, median; fp32" in text


def test_every_metric_that_stands_for_a_task_is_shown_by_its_name(models: Any) -> None:
    found = {
        "task": "grounding",
        "mode": "gradcam",
        "layer": 2,
        "metrics": {"box_accuracy": 0.5, "phrases": 40, "images": 9, "mean_iou": 0.3},
    }
    evals = {label: evaluation(models[label][1], 0.0, **found) for label in ("teacher", "final")}
    text = report.text(report.summarise(models, evals, None))
    table, _, how = text.partition("box accuracy: ")
    assert how.startswith("easy-vqa test, 40 phrases and 9 images, gradcam") and cells(table, "box accuracy") == [
        "50.0 %",
        "–",
        "–",
        "50.0 %",
    ]
    evals["final"]["layer"] = 3
    with pytest.raises(BadInput, match="cannot be compared"):
        report.summarise(models, evals, None)


def test_targets_are_stated_as_facts(models: Any, evals: Any, bench: Any) -> None:
    lines = report.text(report.summarise(models, evals, bench, ASKED)).splitlines()[-3:]
    assert lines == [
        "final / teacher: parameters 30.0 % (at most 44.3 %: met)",
        "final / teacher: accuracy 99.0 % (at least 98.0 %: met)",
        "final / teacher: speed-up at batch 8 3.00× (at least 2.20×: met)",
    ]
    evals["final"]["metrics"]["accuracy"] = 0.9
    bench["latency"][-1]["speedup"] = 2.19
    assert [target["met"] for target in report.summarise(models, evals, bench, ASKED)["targets"]] == [True, False, False]


def test_without_targets_the_values_stand_alone(models: Any, evals: Any, bench: Any) -> None:
    summary = report.summarise(models, evals, bench)
    assert report.text(summary).splitlines()[-3:] == [
        "final / teacher: parameters 30.0 %",
        "final / teacher: accuracy 99.0 %",
        "final / teacher: speed-up at batch 8 3.00×",
    ]
    assert [target["met"] for target in summary["targets"]] == [None] * 3


def test_what_was_not_measured_is_left_out(models: Any, bench: Any) -> None:
    summary = report.summarise(models, {}, None, ASKED)
    text = report.text(summary)
    assert "latency" not in text and "speed-up" not in text.partition("final / teacher")[0]
    assert text.count("not measured") == 2 and [target["met"] for target in summary["targets"]] == [True, None, None]
    one = report.summarise({"teacher": models["teacher"]}, {}, None)
    assert one["targets"] == [] and "final" not in report.text(one)
    bench["models"] = bench["models"][1:]  # now the student is what all were compared with
    summary = report.summarise(models, {}, bench)
    assert summary["targets"][2]["value"] is None and "speed-up over student" in report.text(summary)


def test_results_of_other_checkpoints_are_refused(models: Any, evals: Any, bench: Any) -> None:
    for changed, why in (
        ({"final": evaluation("e" * 64, 0.9)}, "another checkpoint"),
        ({"last": evaluation("d" * 64, 0.9)}, "evals names last"),
        ({**evals, "final": evaluation("d" * 64, 0.9, mode="generate")}, "cannot be compared"),
        ({**evals, "final": evaluation("d" * 64, 0.9, metrics={"accuracy": 0.9, "questions": 5})}, "cannot be compared"),
    ):
        with pytest.raises(BadInput, match=why):
            report.summarise(models, changed, bench)
    for record in bench["models"]:
        record["sha256"] = "e" * 64
    with pytest.raises(BadInput, match="other checkpoints"):
        report.summarise(models, evals, bench, ASKED)


def test_the_summary_is_json(models: Any, evals: Any, bench: Any) -> None:
    summary = report.summarise(models, evals, bench, ASKED)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["models"]["final"]["kept"]["decoder"] == {"head": [2, 4], "cross_head": [2, 4], "neuron": [300, 512]}


def test_captions_give_sizes_in_one_unit(models: Any) -> None:
    words = report.captions(report.summarise(models, {}, None))
    assert words["teacher"] == "2.400 M parameters" and words["final"] == "0.720 M parameters, 30.0 % of the teacher's"


def structure(kept: int) -> dict[str, tuple[list[int], int]]:
    return {"vision.0.head": (list(range(kept)), 4), "vision.0.neuron": (list(range(kept * 2)), 8), "fusion.0.cross_head": ([0, 3], 4)}


def colours(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        return {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}


def test_the_picture_fills_what_was_kept(tmp_path: Path) -> None:
    blue = (0x2A, 0x6F, 0xBB)
    filled = {}
    for kept in (0, 2, 4):
        structure_figure({"model": structure(kept)}, tmp_path / f"{kept}.png")
        filled[kept] = colours(tmp_path / f"{kept}.png").get(blue, 0)
    words = filled[0]  # the name of the tower is written in its colour
    assert filled[4] - words == pytest.approx(2 * (filled[2] - words), rel=0.02) and filled[2] > 2 * words


def test_models_of_one_structure_share_a_column(tmp_path: Path) -> None:
    def ratio(name: str, structures: Any) -> float:
        structure_figure(structures, tmp_path / name, {"a": "1 M parameters"})
        with Image.open(tmp_path / name) as image:
            return image.width / image.height

    two = ratio("two.png", {"a": structure(4), "b": structure(2)})
    assert ratio("same.png", {"a": structure(4), "b": structure(2), "c": structure(2)}) == pytest.approx(two, rel=0.01)
    assert ratio("three.png", {"a": structure(4), "b": structure(2), "c": structure(1)}) > 1.2 * two
    assert not list(tmp_path.glob(".*"))
