"""The figures of a Swin at full size in docs/own-model.md are those of the CSV."""

from __future__ import annotations

import shutil
from pathlib import Path

from doc_pages import ROOT, script


def test_the_page_shows_what_the_csv_says(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copyfile(ROOT / "docs/own-model.md", tmp_path / "docs/own-model.md")
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    (page,) = script("benchmarks/swin.py").publish(tmp_path)
    assert page.read_text("utf-8") == (ROOT / "docs/own-model.md").read_text("utf-8")
    (path,) = (tmp_path / "benchmarks/results").glob("swin_[!s]*.csv")
    head, *lines = path.read_text("utf-8").splitlines()
    at = head.split(",").index("cpu_ms")
    changed = [",".join("9999" if number == at else cell for number, cell in enumerate(line.split(","))) for line in lines]
    path.write_text("\n".join([head, *changed]) + "\n")
    script("benchmarks/swin.py").publish(tmp_path)
    assert page.read_text("utf-8").count("9,999 ms") > 3
