"""Classes of many pictures: found by their names, written bit by bit as CSV, and shown on a sheet by class."""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints.files import check_writable, open_plain, resolve, result_path
from efficientvlm.checkpoints.growing import GrowingLines, csv_of
from efficientvlm.data.batch import stack
from efficientvlm.data.cells import LONGEST_TEXT
from efficientvlm.data.class_names import Classes, NamesFile, distinct
from efficientvlm.data.images import open_image
from efficientvlm.data.items import Pixels
from efficientvlm.data.reading import of_read
from efficientvlm.data.unlabelled import Shown, Unlabelled
from efficientvlm.errors import BadInput, number_of, shorten
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.runtime.interrupt import stop_flag
from efficientvlm.runtime.progress import say
from efficientvlm.settings.tasks import ZeroshotQuestion
from efficientvlm.tasks.image_features import features_of
from efficientvlm.tasks.over_pictures import Kept, OverPictures, digest
from efficientvlm.tasks.pictures import picture_path, write_picture
from efficientvlm.tasks.prompts import Prompts, class_features, of_names
from efficientvlm.tasks.sheets import MOST_ROWS, drawable, of_pictures

BATCH = 64
ON_SHEET = 8  # pictures of a class
FIRST = ("image", "class", "similarity")
FILES = (".txt", ".csv", ".tsv", ".json")
LOOKED_AT = 10_000


def classify(config: ZeroshotQuestion, loaded: Loaded) -> dict[str, Any]:
    """The nearest classes of all pictures that `config` names, or that lie in folders and shards that it names.

    Returns:
        `answers`, best first, each with `class` and `similarity` (the cosine of the features) for a single picture, and for several a row
        each with `image`, `class`, `similarity` and, for the classes that are next, `class_2`, `similarity_2` and so on; or where these are
        written to `out` its name. How many pictures were `classified`, and how many `skipped` as they cannot be read; `sheet`.

    Raises:
        BadInput: a picture that was named is missing or damaged; a folder without one; fewer than two classes; an `out` that is there, or
            was begun with other settings.
        Interrupted: asked to stop; the same settings go on.
    """
    classes, prompts, texts = asked_classes(config.classes), Prompts.of(config.templates), texts_of(loaded)
    out = _csv_path(config) if config.out else None
    named = [Path(resolve(name)) for name in config.image]
    pictures = Unlabelled(named)
    sheet = picture_path(config.sheet, [path for path in named if path.is_file()], option="--sheet") if config.sheet else None
    for remark in (*pictures.remarks, *of_names(texts, classes, prompts)[1]):
        say(f"predict: {remark}")
    quiet = config.quiet or len(pictures) <= BATCH
    features = class_features(loaded, texts, classes, prompts, batch_size=BATCH, title="predict", quiet=quiet)
    for remark in of_read(texts):
        say(f"predict: {remark}")
    work = Classifier(config, loaded, classes, prompts, features, out)
    if out is None:
        kept = Kept()
        work.work(pictures, kept)
        work.check(pictures, kept)
        rows: Sequence[Mapping[str, Any]] = kept.rows
        found = work.summary(kept.counts)
        if len(pictures) == 1 and len(named) == 1 and named[0].is_file() and named[0].suffix.lower() != ".tar":
            found = {"answers": _in_turn(rows[0]), **found}
        else:
            found = {"answers": list(rows), **found}
        return found | ({"sheet": write_picture(_sheet(rows, classes, Path()), sheet)} if sheet else {})
    with GrowingLines(out, work.run(named), resume=config.resume, form=csv_of(work.columns)) as lines, stop_flag() as stop:
        if lines.done:
            say(f"predict: goes on behind the first {lines.done:,} of {len(pictures):,} pictures", quiet=config.quiet)
        work.work(pictures, lines, stop)
        work.check(pictures, lines)
        lines.finish()
    found = {**work.summary(lines.counts), "out": str(out)}
    if sheet:
        with out.open(encoding="utf-8", errors="backslashreplace", newline="") as file:
            found["sheet"] = write_picture(_sheet(csv.DictReader(file), classes, out.parent), sheet)
    return found


def asked_classes(given: Sequence[str]) -> Classes:
    """Names of classes, and those in files that are given in their place, each once.

    Raises:
        BadInput: a file that is not there or cannot be read; fewer than two classes.
    """
    names: list[str] = []
    for one in given:
        path = Path(os.path.expanduser(one))
        if os.path.isfile(path):
            names += NamesFile.read(path).names
        elif path.suffix.lower() in FILES or one.startswith(("/", "./", "../", "~")):
            raise BadInput(f"there is no file {shorten(one, 80)}", "it would hold names of classes", "check its name")
        elif not one.strip() or len(one) > LONGEST_TEXT:
            raise BadInput("a class has no name" if not one.strip() else "a class name is too long", "", "write it as text")
        else:
            names.append(one.strip())
    distinct_names = distinct(names)
    remarks = [f"{len(names) - len(distinct_names):,} class names are there twice"] if len(distinct_names) < len(names) else []
    if len(distinct_names) < 2:
        raise BadInput("classes", f"there is only one, {shorten(names[0], 60)}, and nothing to choose from", "name two or more")
    return Classes(distinct_names, distinct_names, remarks)


class Classifier(OverPictures[Pixels]):
    """The nearest classes of pictures, batch by batch."""

    work_done = "classified"

    def __init__(
        self, config: ZeroshotQuestion, loaded: Loaded, classes: Classes, prompts: Prompts, features: Tensor, out: Path | None
    ) -> None:
        super().__init__(out, BATCH, shown_above=BATCH, quiet=config.quiet)
        self.loaded, self.classes, self.prompts, self.features = loaded, classes, prompts, features
        self.top = min(config.top, len(classes))
        later = range(2, self.top + 1)
        self.columns = [*FIRST, *(name for number in later for name in (f"class_{number}", f"similarity_{number}"))]

    def run(self, named: Sequence[Path]) -> dict[str, Any]:
        """What the classes follow from."""
        given = {"classes": self.classes.names, "templates": self.prompts.templates}
        digests = {what: hashlib.sha256(json.dumps(texts).encode()).hexdigest() for what, texts in given.items()}
        return {"image": [str(name) for name in named], "model": digest(self.loaded), **digests, "top": self.top}

    def read(self, shown: Shown, where: str) -> Pixels:
        assert not isinstance(shown.content, BadInput)
        return open_image(shown.content, self.loaded.preprocessing, where)

    @torch.inference_mode()
    def made(self, seen: Sequence[tuple[Shown, Pixels]], counts: Counter[str]) -> list[dict[str, Any]]:
        scores = features_of(self.loaded, stack([pixels for _, pixels in seen])) @ self.features.T
        order = scores.sort(dim=1, descending=True, stable=True)
        best = zip(order.values[:, : self.top].tolist(), order.indices[:, : self.top].tolist(), strict=True)
        rows = []
        for (shown, _), (values, numbers) in zip(seen, best, strict=True):
            row: dict[str, Any] = {"image": self.called(shown.name)}
            for at, (value, number) in enumerate(zip(values, numbers, strict=True), 1):
                row |= {f"class{_th(at)}": self.classes.names[number], f"similarity{_th(at)}": round(value, 4)}
            rows.append(row)
        return rows

    def summary(self, counts: Counter[str]) -> dict[str, Any]:
        return {"classes": len(self.classes), "classified": counts["classified"], "skipped": counts["skipped"]}


def _th(number: int) -> str:
    return f"_{number}" if number > 1 else ""


def _in_turn(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The classes of one picture, a row each."""
    last = sum(name.startswith("class") for name in row)
    return [{"class": row[f"class{_th(at)}"], "similarity": row[f"similarity{_th(at)}"]} for at in range(1, last + 1)]


def _csv_path(config: ZeroshotQuestion) -> Path:
    """The CSV file that classes are written to: none yet, or with `force` one that was written here."""
    path = result_path(str(config.out), "classes.csv")
    if path.suffix.lower() != ".csv":
        raise BadInput(f"--out {config.out}", "classes are written as CSV", "give a file that is called .csv")
    if os.path.lexists(path):
        with open_plain(path) as file:
            first = file.readline(LOOKED_AT)
        if first.strip() and not first.startswith(",".join(FIRST).encode()):
            raise BadInput(f"{path} is no file of classes", "it holds something else", "remove it, or give another file")
        if first.strip() and not config.force:
            raise BadInput(f"{path} is there already", "classes would take its place", "give --force to replace it, or another --out")
    check_writable(path)
    return path


def _sheet(rows: Iterable[Mapping[str, Any]], classes: Classes, base: Path) -> Any:
    """The pictures that are surest of each class, in the order of the classes; what it lacks is said."""
    best: dict[str, list[tuple[float, int, str]]] = {}
    counts = Counter[str]()
    without = 0
    for number, row in enumerate(rows):
        path = os.path.join(base, row["image"])
        counts[row["class"]] += 1
        if not os.path.isfile(path):
            without += 1  # in a shard
            continue
        heap = best.setdefault(row["class"], [])
        push = heapq.heappush if len(heap) < ON_SHEET else heapq.heappushpop
        push(heap, (float(row["similarity"]), -number, path))
    lines = [
        (f"{name} ({counts[name]:,})", [(path, f"{value:.3f}") for value, _, path in sorted(best[name], reverse=True)])
        for name in classes.names
        if name in best
    ]
    if without:
        say(f"predict: the sheet lacks {number_of(without, 'picture')}: it shows what is a file of its own")
    if not lines:
        raise BadInput("--sheet", "none of the pictures is a file of its own", "leave it out")
    if len(lines) > MOST_ROWS:
        say(f"predict: the sheet shows the first {MOST_ROWS} of {len(lines):,} classes")
    if foreign := sum(not drawable(text) for text, _ in lines):
        say(f"predict: the sheet has question marks for letters of {number_of(foreign, 'class', 'classes')}, which its font lacks")
    return of_pictures(lines)
