"""What the scripts of this folder share: where figures are published, and how they are written."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from efficientvlm.checkpoints import manifest
from efficientvlm.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
"""Below the project's root."""


def csv_of(name: str, processor: str) -> Path:
    """Path below the project's root of the CSV of the benchmark `name` on `processor`."""
    return RESULTS / f"{name}_{slug(processor)}.csv"


def slug(name: str) -> str:
    """A processor's name for use in a file name: `Intel(R) Xeon(R) CPU @ 2.20GHz` becomes `intel-xeon-cpu-2-20ghz`."""
    plain = re.sub(r"\((r|tm|c)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"


def as_csv(records: list[dict[str, Any]]) -> bytes:
    """UTF-8 CSV with a header; floats with six significant digits, None as an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: _cell(value) for key, value in record.items()})
    return file.getvalue().encode()


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line to the CSV `path`; several processes may share the file.

    Raises:
        BadInput: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, list(record)):
            raise BadInput(f"{path} has other columns", "it was written by another version of the script", "move it away")
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, record, lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerow({key: _cell(value) for key, value in record.items()})


def rows_of(path: Path) -> list[dict[str, str]]:
    """The lines of the CSV `path`; none if it is not there."""
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8")))) if path.is_file() else []


def published_rows(root: Path, name: str, *, fix: str = "move the others away") -> tuple[list[dict[str, str]], Path]:
    """The lines of the one CSV of the benchmark `name` below `root`, and its path below it.

    Raises:
        BadInput: there is none or more than one.
    """
    found = csvs(root, name)
    if len(found) != 1:
        raise BadInput(f"{len(found)} CSVs of {name.replace('_', ' ')}", "one machine's is published", fix)
    return rows_of(found[0]), RESULTS / found[0].name


def lines_of(name: str, root: Path = ROOT) -> list[dict[str, str]]:
    """The lines of all machines' CSVs of the benchmark `name`: what was measured on one need not be measured again."""
    return [line for path in csvs(root, name) for line in rows_of(path)]


def csvs(root: Path, name: str) -> list[Path]:
    """The CSVs of the benchmark `name` below `root`, one a machine, whose name has no underscore; those of `name_more` are another's."""
    return [path for path in sorted((root / RESULTS).glob(f"{name}_*.csv")) if "_" not in path.stem.removeprefix(f"{name}_")]


def all_rows(root: Path, name: str, keys: Sequence[str], *, fix: str) -> tuple[list[dict[str, str]], list[Path]]:
    """The lines of all machines' CSVs of the benchmark `name` below `root`, and their paths below it; a run was made on one of them.

    Raises:
        BadInput: there is no CSV, or two lines have equal `keys`.
    """
    paths = csvs(root, name)
    if not paths:
        raise BadInput(f"0 CSVs of {name}", "", fix)
    lines: list[dict[str, str]] = []
    seen: dict[tuple[str, ...], Path] = {}
    for path in paths:
        for line in rows_of(path):
            run = tuple(line[key] for key in keys)
            if run in seen:
                where = f"{path.name} and {seen[run].name}" if seen[run] != path else path.name
                raise BadInput(f"{where}: {', '.join(run)} twice", "one run of a seed is published", "take it out of one place")
            seen[run] = path
            lines.append(line)
    return lines, [RESULTS / path.name for path in paths]


def links(paths: Sequence[Path]) -> str:
    """Markdown links from a page in `docs/` to CSVs."""
    return ", ".join(f"[{path.name}](../{path.as_posix()})" for path in paths)


def of_one_torch(lines: list[dict[str, str]]) -> None:
    """:class:`BadInput` if rows were made with several versions of torch: they cannot be compared."""
    if len(versions := {line["torch"] for line in lines}) > 1:
        raise BadInput("the runs cannot be compared", f"torch {', '.join(sorted(versions))}", "run them again with one version")


def with_block(readme: str, name: str, text: str) -> str:
    """`readme` with `text` between the two markers of the block `name`, each of which must stand there once."""
    begin, end = markers(name)
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(end) < readme.index(begin):
        raise BadInput(f"no place for the {name}", f"{begin} and {end} must stand there once, in this order")
    before, _, rest = readme.partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def block_of(readme: str, name: str) -> str:
    """What stands between the markers of the block `name`."""
    begin, end = markers(name)
    return readme.partition(begin)[2].partition(end)[0]


def markers(name: str) -> tuple[str, str]:
    """The comments around the block `name` of a page."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def code() -> str:
    """The commit that is run, with + if files have changed since; the version where there is no repository."""
    found = manifest.code()
    return f"{found.commit[:12]}{'+' * bool(found.dirty)}" if found.commit else found.version


def about(what: str) -> dict[str, Any]:
    """What a row is, which code made it, on which torch, and when."""
    return {"what": what, "commit": code(), "torch": manifest.environment()["torch"], "date": manifest.now()[:10]}


def of_towers(towers: Path) -> list[str]:
    """Overrides of a recipe whose stage `start` reads the pretrained towers in a folder that :mod:`efficientvlm.examples.towers` wrote."""
    dinov2, minilm = towers / "dinov2-small", towers / "minilm"
    return [f"start.vision_from={dinov2}", f"start.text_from={minilm}", f"start.tokenizer={minilm}"]


def grouped(lines: list[dict[str, str]], column: str) -> dict[str, list[dict[str, str]]]:
    """The rows by what stands in `column`, in the order of the file."""
    found: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        found.setdefault(line[column], []).append(line)
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def spread(values: Sequence[float]) -> str:
    """The mean of some seeds in per cent, and their worst and best."""
    shown = f"{100 * mean(values):.1f}"
    return shown if len(set(values)) == 1 else f"{shown} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def is_tie(own: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the means of two arms differ by no more than the seeds of either do."""
    return abs(mean(own) - mean(other)) <= max(max(some) - min(some) for some in (own, other))


def against(own: Sequence[float], other: Sequence[float], unit: str = "points of mean recall") -> str:
    """The gap of two arms in per cent, and whether the seeds tell it from none."""
    gap = 100 * (mean(own) - mean(other))
    text = f"{abs(gap):.1f} {unit} {'more' if gap >= 0 else 'less'}"
    if min(len(own), len(other)) < 2:
        return f"{text}, of one seed"
    return f"{text}{', a tie beside the spread of the seeds' if is_tie(own, other) else ''}"


def share(value: float, whole: float) -> float | None:
    """`value` as a part of `whole`; None where that is 0."""
    return value / whole if whole else None


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
