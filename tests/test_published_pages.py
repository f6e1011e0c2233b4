"""What stands on the pages is what the scripts make of the CSVs that lie beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from doc_pages import ROOT, script


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("publish_*.py")))
def test_a_page_is_made_of_its_csvs(name: str, tmp_path: Path) -> None:
    for folder in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "README.md", tmp_path)
    pages = [path for path in script(f"benchmarks/{name}.py").publish(tmp_path) if path.suffix == ".md"]
    assert pages
    for page in pages:
        assert page.read_text("utf-8") == (ROOT / page.relative_to(tmp_path)).read_text("utf-8"), f"run: python benchmarks/{name}.py"
