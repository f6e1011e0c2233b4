"""The script that compares a GPU with the CPU: on the CPU it finds no difference, and a wrong number is told."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doc_pages import ROOT, script

gpu = script("benchmarks/gpu.py")
CPU = torch.device("cpu")
FEW = tuple(case for case in gpu.CASES if case.name in ("x-vlm grounding", "blip captioning"))


def test_on_the_cpu_there_is_no_difference_but_that_of_bf16() -> None:
    rows = list(gpu.agreement(CPU, FEW))
    assert len(rows) == 4 * len(FEW) and all(row["holds"] for row in rows)
    assert all(row["value"] == 0 for row in rows if row["precision"] == "fp32")
    assert all(0 < row["value"] for row in rows if row["precision"] == "bf16")


def test_small_tensors_are_measured_by_the_least_norm() -> None:
    expected = {"a": torch.ones(4), "b": torch.full((4,), 0.5), "c": torch.zeros(4)}
    found = {"a": torch.ones(4), "b": torch.tensor([0.5, 0.5, 0.5, 0.6]), "c": torch.full((4,), 1e-6)}
    assert gpu.off(found, expected, 1e-2) == pytest.approx({"a": 0, "b": 0.1, "c": 2e-4}, rel=1e-5)
    with pytest.raises(AssertionError, match="other tensors"):
        gpu.off({"a": found["a"]}, expected, 1e-2)


def test_a_step_is_timed_by_phase_and_planned() -> None:
    (_, case) = list(gpu.stages(*gpu.STEPS[0]))[1]
    spent = gpu.step(gpu.ready(case, "tiny", CPU, 2), CPU, 0)
    assert list(spent) == ["teacher", "student", "backward", "optimizer"] and all(seconds > 0 for seconds in spent.values())
    assert gpu.planned(case, "tiny", CPU, 4) > gpu.planned(case, "tiny", CPU, 2) > 0


def test_it_needs_no_package_for_data_or_pruning() -> None:
    code = "import sys; sys.path.insert(0, 'benchmarks'); import gpu; print(*{'datasets', 'torch_pruning', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.slow
def test_the_whole_script_with_tiny_networks(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    command = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--most", "4", "--out", str(out)]
    assert subprocess.run([sys.executable, "benchmarks/gpu.py", *command], cwd=ROOT, check=False).returncode == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert {row["part"] for row in rows} == {"agreement", "latency", "step"}
    assert len([row for row in rows if row["holds"] == "1"]) == 2 * sum(len(case.precisions) for case in gpu.CASES) and not any(
        row["what"] == "not planned" for row in rows
    )
