"""The quickstart's figures: from a finished run to CSV and README, where every one of them must agree with the CSV."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import FENCE, ROOT, SHORTENED, evlm, script, substituted

from efficientvlm.errors import BadInput

UNITS = {"1": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
KINDS = {"heads kept": "head", "cross-attention heads kept": "cross_head", "neurons kept": "neuron"}


def column(name: str, above: str) -> tuple[str, float] | None:
    """Column of the CSV that a row of the table shows, and the unit it is shown in; `above` is the row it is indented under."""
    of = name.startswith("of the ")
    if found := re.fullmatch(r"(parameters|multiply-adds) \((\w)\)", name):
        return {"parameters": "parameters", "multiply-adds": "macs"}[found[1]], UNITS[found[2]]
    if found := re.fullmatch(r"latency \(ms\), batch (\d+)", name):
        return f"batch_{found[1]}_median_ms", 1.0
    if name.startswith("speed-up over "):
        return f"batch_{above.rpartition(' ')[2]}_speedup", 1.0
    if above.startswith("parameters ("):
        part = {"projections and heads": "heads", "embeddings (counted in the towers)": "embeddings"}.get(name, name)
        return ("parameters_of_reference", 0.01) if of else (f"parameters_{part}", UNITS[above[-2]])
    if above.startswith("multiply-adds ("):
        return "macs_of_reference", 0.01
    if above == "accuracy" and (
        beside := {"standard error": "standard_error", "of the most frequent answer alone": "majority_accuracy"}.get(name)
    ):
        return beside, 0.01
    if name in ("accuracy", "sparsity of prunable weights"):
        return name.partition(" ")[0], 0.01
    return ("accuracy_of_reference", 0.01) if above == "accuracy" and of else None


def agrees(shown: str, value: str, unit: float) -> bool:
    """Whether `shown` is `value` in `unit`, rounded to the decimals that are shown."""
    if shown == "–":
        return value in ("", "0")
    number = shown.strip("*×% ").replace(",", "")
    decimals = len(number.partition(".")[2])
    return value != "" and abs(float(number) - float(value) / unit) <= 0.5 * 10**-decimals + 1e-5 * abs(float(number))


def check_figures(readme: Path) -> int | None:
    """Compare every figure between the markers with the CSV that is linked there; how many there were, None for the placeholder."""
    quickstart = script("benchmarks/quickstart.py")
    block = readme.read_text("utf-8").partition(quickstart.BEGIN)[2].partition(quickstart.END)[0]
    if block.strip().startswith("_The table"):
        return None
    (name,) = re.findall(r"\((benchmarks/results/[\w.-]+\.csv)\)", block)
    with (readme.parent / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    models, *others = ({row["model"]: row for row in rows if row["seed"] == seed} for seed in seeds)
    table, _, notes = FENCE.search(block.strip() + "\n")[3].partition("\nmultiply-adds: ")  # type: ignore[index]
    head, _, *lines = table.splitlines()
    assert head.split() == list(models)
    compared, above = 0, ""
    for line in filter(str.strip, lines):
        row, *shown = re.split(r" {2,}", line.strip())
        above = above if line.startswith(" ") else row
        pairs: list[tuple[str, str, float]] = []
        if above in KINDS and shown:
            for cell, record in zip(shown, models.values(), strict=True):
                parts = ["", ""] if cell == "–" else cell.replace(",", "").split("/")
                expected = [record[f"{row}_{KINDS[above]}_kept"], record[f"{row}_{KINDS[above]}_of"]]
                assert parts == expected, f"{above}, {row}: {cell}"
                compared += 1
        elif found := re.fullmatch(r"layers \((.+)\)", row):
            for cell, record in zip(shown, models.values(), strict=True):
                assert cell.split("/") == [record[f"{tower}_layers"] for tower in found[1].split("/")], f"{row}: {cell}"
                compared += 1
        elif shown:
            where = column(row, "" if row == above else above)
            assert where, f"no column is known for the row {row}"
            pairs = [(cell, record[where[0]], where[1]) for cell, record in zip(shown, models.values(), strict=True)]
        for cell, value, unit in pairs:
            assert agrees(cell, value, unit), f"{row}: {cell} in the table, {value} in the CSV"
            compared += 1
    first, last = next(iter(models.values())), list(models.values())[-1]
    assert f"{int(first['questions']):,} questions" in notes and f"{first['threads']} thread" in notes and first["processor"] in notes
    for what, key, unit in (
        ("parameters", "parameters", 0.01),
        ("accuracy", "accuracy", 0.01),
        ("speed-up at batch 8", "batch_8_speedup", 1),
    ):
        found = re.search(rf"{last['model']} / {first['model']}: {what} ([\d.]+)", notes)
        assert found and agrees(found[1], last[key if unit == 1 else f"{key}_of_reference"], unit), what
        compared += 1
    assert f"Measured on {first['date']}" in block and first["torch"] in block
    again = re.findall(r"seed (\d+): ([\d.]+) % of the parameters, ([\d.]+) % of the accuracy, ([\d.]+)×", block)
    for (seed, *shown), other in zip(again, others, strict=True):
        row = list(other.values())[-1]
        keys = (("parameters_of_reference", 0.01), ("accuracy_of_reference", 0.01), ("batch_8_speedup", 1.0))
        assert seed == row["seed"] and all(agrees(each, row[key], unit) for each, (key, unit) in zip(shown, keys, strict=True))
        compared += 3
    return compared


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, chain: Path) -> Path:
    """The recipe `quickstart` on the tiny chain, run to its end; its project folder."""
    root = tmp_path_factory.mktemp("project")
    text = (ROOT / "recipes" / "quickstart.yaml").read_text("utf-8")
    recipe = substituted(yaml.safe_load(text))
    text = json.dumps(recipe)
    text = text.replace('"bundled/pretrained"', json.dumps(str(chain / "init"))).replace(
        '"bundled/vqa"', json.dumps(str(chain / "teacher"))
    )
    (root / "quickstart.yaml").write_text(text)
    code, out, err = evlm(["run", str(root / "quickstart.yaml"), "--out", str(root / "runs" / "quickstart"), *SHORTENED["run"]])
    assert code == 0 and out.splitlines()[-1] == str(root / "runs" / "quickstart"), err
    shutil.copyfile(ROOT / "README.md", root / "README.md")
    return root


def test_the_quickstart_is_published(finished: Path) -> None:
    quickstart = script("benchmarks/quickstart.py")
    run = finished / "runs" / "quickstart"
    for others in ((), (run, run)):  # the second time it replaces what it wrote
        written = quickstart.publish(run, finished, others)
    assert (finished / "README.md").read_text("utf-8").count("seed 0: ") == 2
    written = quickstart.publish(run, finished)
    assert [path.relative_to(finished).parts[0] for path in written] == ["benchmarks", "docs", "README.md"]
    compared = check_figures(finished / "README.md")
    assert compared and compared >= 100
    text, mine = (ROOT / "README.md").read_text("utf-8"), (finished / "README.md").read_text("utf-8")
    assert text.partition(quickstart.BEGIN)[0] == mine.partition(quickstart.BEGIN)[0]
    assert text.partition(quickstart.END)[2] == mine.partition(quickstart.END)[2]


def test_a_changed_figure_is_noticed(finished: Path, tmp_path: Path) -> None:
    quickstart = script("benchmarks/quickstart.py")
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    quickstart.publish(finished / "runs" / "quickstart", tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    for pattern in (
        r"parameters \(k\) +(\d)",
        r"\n  fusion +(\d)",
        r"batch 8 +(\d)",
        r"16/(1)6",
        r"parameters (\d)[\d.]+ % \(at",
        r"\naccuracy +(\d)",
    ):
        found = re.search(pattern, text)
        assert found, pattern
        digit = str((int(found[1]) + 1) % 10)
        (tmp_path / "README.md").write_text(text[: found.start(1)] + digit + text[found.end(1) :])
        with pytest.raises(AssertionError):
            check_figures(tmp_path / "README.md")


def test_only_a_finished_run_of_these_checkpoints_is_published(finished: Path, tmp_path: Path) -> None:
    quickstart = script("benchmarks/quickstart.py")
    with pytest.raises(BadInput, match="no summary"):
        quickstart.publish(tmp_path, finished)
    report = tmp_path / "report"
    shutil.copytree(finished / "runs" / "quickstart" / "report", report)
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(BadInput, match="no place for the quickstart"):
        quickstart.publish(tmp_path, tmp_path)
    for change, why in (
        (lambda summary: summary["provenance"]["models"]["final"].update(sha256="0" * 64), "out of date"),
        (lambda summary: summary.update(speed=None), "incomplete"),
        (lambda summary: summary.pop("provenance"), "no summary"),
    ):
        summary: dict[str, Any] = json.loads((finished / "runs" / "quickstart" / "report" / "summary.json").read_text("utf-8"))
        change(summary)
        (report / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(BadInput, match=why):
            quickstart.publish(tmp_path, finished)
    (report / "summary.json").write_bytes((finished / "runs" / "quickstart" / "report" / "summary.json").read_bytes())
    (report / "structure.png").unlink()
    with pytest.raises(BadInput, match=r"structure\.png is not there"):
        quickstart.publish(tmp_path, finished)


def test_processors_in_file_names() -> None:
    slug = script("benchmarks/published.py").slug
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon-cpu-2-20ghz" and slug("") == "unknown" and slug("AMD EPYC") == "amd-epyc"


def test_the_figures_of_the_readme_are_those_of_the_csv() -> None:
    compared = check_figures(ROOT / "README.md")
    assert compared is not None and compared >= 100
