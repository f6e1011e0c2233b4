"""The latencies in the README and in docs/export.md are those of the CSV."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doc_pages import ROOT, script

from efficientvlm.errors import BadInput


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/export.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    return tmp_path


def test_the_pages_show_what_the_csv_says(project: Path) -> None:
    for page in script("benchmarks/latency.py").publish(project):
        assert page.read_text("utf-8") == (ROOT / page.relative_to(project)).read_text("utf-8")


def test_a_changed_figure_is_noticed(project: Path) -> None:
    (path,) = (project / "benchmarks/results").glob("latency_*.csv")
    head, *lines = path.read_text("utf-8").splitlines()
    (last,) = (line for line in lines if line.startswith("sliced,onnx int8,8,"))
    path.write_text("\n".join([head, *(line for line in lines if line != last), last.replace(",15.", ",17.")]) + "\n")
    script("benchmarks/latency.py").publish(project)
    assert (project / "README.md").read_text("utf-8") != (ROOT / "README.md").read_text("utf-8")


def test_one_csv_is_published(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="0 CSVs"):
        script("benchmarks/latency.py").publish(tmp_path)
