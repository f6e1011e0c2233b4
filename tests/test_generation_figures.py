"""Figures of generation: all ways that are timed write the same, the published one does what is said of it, and the page shows the CSV."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from doc_pages import ROOT, script

from efficientvlm.errors import BadInput


def test_all_ways_write_the_same_and_the_published_one_projects_at_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = script("benchmarks/generation.py")
    ours, stock = benchmark.network("tiny", 32)
    projected: Counter[str] = Counter()
    for name, model in (("ours", ours), ("stock", stock)):
        keys = [part for at, part in model.named_modules() if ".crossattention." in at and at.endswith(".key")]
        assert len(keys) == ours.config.text_config.num_hidden_layers
        keys[0].register_forward_hook(lambda module, given, made, name=name: projected.update({name: len(given[0])}))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for beams, wanted in ((3, (2, 6 * 16, 6)), (1, (2, 2 * 16, 2))):
        with torch.inference_mode():
            written = {}
            for (name, way), count in zip(benchmark.ways(ours, stock, beams).items(), (*wanted[:2], wanted[0], wanted[2]), strict=True):
                projected.clear()
                written[name] = way.write(way.see(pixels))
                assert projected.total() == count, (name, beams)
            assert all(torch.equal(ids, written["ours"]) for ids in written.values()) and written["ours"].shape == (2, 16)
    rows = benchmark.measure(ours, stock, "1x1", 1)
    assert [row["way"] for row in rows] == list(benchmark.WAYS) and all(row["cpu_seconds"] > 0 for row in rows)
    other = dict(benchmark.ways(ours, stock, 1))
    other["transformers"] = benchmark.Way(other["ours"].see, lambda states: other["ours"].write(states) + 1)
    monkeypatch.setattr(benchmark, "ways", lambda *given: other)
    with pytest.raises(BadInput, match="writes something else"):
        benchmark.measure(ours, stock, "1x1", 1)


def test_the_page_shows_what_the_csv_says(tmp_path: Path) -> None:
    benchmark = script("benchmarks/generation.py")
    (tmp_path / "docs").mkdir()
    shutil.copyfile(ROOT / benchmark.PAGE, tmp_path / benchmark.PAGE)
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    (page,) = benchmark.publish(tmp_path)
    assert page.read_text("utf-8") == (ROOT / benchmark.PAGE).read_text("utf-8")
    (path,) = (tmp_path / "benchmarks/results").glob("generation_*.csv")
    head, *lines = path.read_text("utf-8").splitlines()
    assert {line.partition(",")[0] for line in lines} == set(benchmark.CASES)
    path.write_text("\n".join([head, *(line.replace(",16,", ",99,") for line in lines)]) + "\n")
    benchmark.publish(tmp_path)
    assert "99 tokens" in page.read_text("utf-8")
