"""Data of every form, pictures and lists of answers of which something is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from attack.case import ONE_STEP, Case, kind, words
from attack.damage import Draw, damaged, dump, scalar, special, spoil, text
from attack.process import Place
from attack.stock import LAYOUTS, SHAPES, Stock, picture

PICTURES = words("png jpeg gif webp bmp tiff")
COLUMNS = words("weight image_id question_id split answers label width regions bb metadata captions id")
NAMES = words(
    "a.png b.json metadata.csv metadata.jsonl captions.txt .hidden.png x.tar train val test-dev c.jpg.txt d.parquet [x].png *.png é.png"
)


def _read(draw: Draw, spec: str, questions: bool, place: Place, stock: Stock) -> Case:
    """A command that reads data."""
    task = "vqa" if questions else "retrieval"
    model = str(stock.get("model/teacher" if questions else "model/init"))
    if draw.randrange(8) == 0 and not spec.startswith("stream:"):
        spec = f"stream:{spec}"
    more = draw.choice([[], [], ["--set", "max_bad=1000"]])
    commands: list[tuple[list[str], str | None]] = [
        (
            [
                "eval",
                "--model",
                model,
                "--data",
                spec,
                "--task",
                task,
                "--split",
                draw.choice(["train", "val", "test"]),
                "--json",
                "-q",
                *more,
            ],
            None,
        ),
        (["finetune", "--model", model, "--data", spec, "--task", task, *ONE_STEP, "--out", "o", *more], "o"),
        (["finetune", "--model", model, "--data", SHAPES, "--val", spec, "--task", task, *ONE_STEP, "--out", "o", *more], "o"),
        (["finetune", "--model", model, "--data", spec, "--task", task, *ONE_STEP, "--out", "o", "--dry-run", *more], None),
        (["init", "--size", "tiny", "--data", spec, "--vocab-size", "64", "-q", "--out", "o"], "o"),
    ]
    if not questions:
        commands.append((["pretrain", "--model", model, "--data", spec, *ONE_STEP, "--out", "o", *more], "o"))
    argv, out = draw.choice([commands[0], *commands])
    return Case(argv, "", out)


@kind
def data_files(draw: Draw, stock: Stock, place: Place) -> Case:
    questions = bool(draw.randrange(2))
    layout = draw.choice(LAYOUTS)
    source = stock.get(f"{'questions' if questions else 'pairs'}/{layout}")
    shutil.copytree(source, place.work, dirs_exist_ok=True)
    spec = (place.work / "SPEC").read_text()
    top = place.work / spec
    files = [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".txt", ".arrow")]
    target = draw.choice([*(texts or files) * 3, *files, *sorted((place.work / "img").iterdir())[:2]])
    if layout in ("csv", "tsv") and draw.randrange(2):
        done = _spoil_table(draw, target) if target == top else spoil(draw, target)
    else:
        done = spoil(draw, target)
    case = _read(draw, spec, questions, place, stock)
    case.what = f"{'questions' if questions else 'pairs'} {layout}, {target.name}: {done}"
    return case


def _spoil_table(draw: Draw, path: Path) -> str:
    """A table with cells that are no such values, or rows of another length, or other quotes, ends of lines or letters."""
    lines = path.read_text().splitlines()
    sign = "\t" if path.suffix == ".tsv" else ","
    at = draw.randrange(len(lines))
    cells = lines[at].split(sign)
    which, value = draw.randrange(len(cells)), scalar(draw)
    said = value if isinstance(value, str) else dump(value)
    kind = draw.randrange(6)
    if kind == 0:
        cells[which] = said
    elif kind == 1:
        cells.append(said)
    elif kind == 2:
        cells = cells[:-1]
    elif kind == 3:
        cells[which] = f'"{cells[which]}'
    elif kind == 4:
        lines = [line.replace(sign, draw.choice([";", "|", "  "])) for line in lines]
        cells = lines[at].split("\0")
    lines[at] = sign.join(cells)
    end = draw.choice(["\n", "\n", "\r\n", "\r", "\n\n", "\0"])
    path.write_bytes(end.join(lines).encode(draw.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]), "surrogatepass"))
    return "changed table"


@kind
def rows_of_data(draw: Draw, stock: Stock, place: Place) -> Case:
    """Well-formed JSON lines with rows that nobody meant."""
    questions = bool(draw.randrange(2))
    shutil.copytree(stock.get(f"{'questions' if questions else 'pairs'}/jsonl"), place.work, dirs_exist_ok=True)
    path = place.work / "d.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    names = [*rows[0], *COLUMNS]
    for _ in range(draw.choice([1, 1, 2])):
        name, value = draw.choice(names), scalar(draw)
        chosen = rows if draw.randrange(2) else [draw.choice(rows)]
        for row in chosen:
            row[name] = value if draw.randrange(4) else [value]
    path.write_text("".join(dump(row) + "\n" for row in rows), "utf-8", "surrogatepass")
    case = _read(draw, draw.choice(["d.jsonl", "./d.jsonl", "*.jsonl", "d.jsonl"]), questions, place, stock)
    case.what = f"{name} = {dump(value)[:40]!r}"
    if draw.randrange(6) == 0:
        case.argv += [
            "--column",
            f"{draw.choice(['answer', 'image', 'caption', 'question', 'weight', 'x'])}={draw.choice([*names, text(draw)])}",
        ]
    return case


@kind
def pictures(draw: Draw, stock: Stock, place: Place) -> Case:
    format = draw.choice(PICTURES)
    content = picture(2, format.upper())
    name = draw.choice([f"p.{format}", f"p.{format.upper()}", "p", os.fsdecode(b"caf\xe9.png"), "a b'\".png", "-p.png", "p\n.png"])
    (place.work / name).write_bytes(damaged(draw, content))
    done = "damaged"
    if draw.randrange(5) == 0:
        done = special(draw, place.work / name)
    question = draw.choice(["what is it?", "what is it?", text(draw)])
    model = str(stock.get("model/teacher"))
    argv = [
        "predict",
        "--model",
        model,
        "--image",
        f"./{name}",
        "--question",
        question,
        "--json",
        "--top",
        draw.choice(["1", "3", "99999999"]),
    ]
    return Case(argv, f"{name}: {done}")


@kind
def folders_of_pictures(draw: Draw, stock: Stock, place: Place) -> Case:
    questions = bool(draw.randrange(2))
    layout = draw.choice(["folder", "classes", "splits", "coco"])
    shutil.copytree(stock.get(f"{'questions' if questions else 'pairs'}/{layout}"), place.work, dirs_exist_ok=True)
    folder = draw.choice([path for path in [place.work / "d", *(place.work / "d").rglob("*")] if path.is_dir()])
    name = draw.choice([*NAMES, os.fsdecode(b"\xff\xfe.png"), "n" * 250 + ".png", "a\x1b[31m.png", "e\u0301.png"])
    path = folder / name
    kind = draw.randrange(5)
    if kind == 0:
        path.symlink_to(draw.choice([".", "..", str(place.work), "/", "/proc", folder.name]))
    elif kind == 1:
        path.write_bytes(damaged(draw, picture(1)))
    elif kind == 2:
        path.write_text(text(draw)[:10_000], errors="surrogateescape")
    else:
        path.write_bytes(picture(1))
        special(draw, path)
    if draw.randrange(6) == 0:
        (place.work / "d").rename(place.work / "e")
        (place.work / "d").symlink_to("e")
    case = _read(draw, draw.choice(["d", "d/", "./d", "d/*", "d/*.png"]), questions, place, stock)
    case.what = f"{layout}, {name!r} of kind {kind} in {folder.name}"
    return case


@kind
def answers(draw: Draw, stock: Stock, place: Place) -> Case:
    path = place.work / "a.txt"
    lines = ["red", "blue", "a lot", "yes"]
    kind = draw.randrange(6)
    if kind == 0:
        done = special(draw, stock.copy("answers.txt", path))
    elif kind == 1:
        path.write_bytes(damaged(draw, "\n".join(lines).encode()))
        done = "damaged"
    else:
        value = scalar(draw)
        lines.insert(draw.randrange(5), value if isinstance(value, str) else dump(value))
        lines += draw.choice([[], lines, [""] * 3, [f"answer {n}" for n in range(2000)]])
        encoding = draw.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-be", "latin-1"])
        path.write_bytes(
            draw.choice(["\n", "\r\n", "\r", "\u2028", "\0"])
            .join(lines)
            .encode(encoding, "surrogatepass" if "utf" in encoding else "replace")
        )
        done = f"{encoding}, {dump(value)[:30]!r}"
    model = str(stock.get("model/teacher"))
    argv = draw.choice(
        [
            ["eval", "--model", model, "--data", SHAPES, "--limit", "2", "--answers", "a.txt", "--json", "-q"],
            ["finetune", "--model", str(stock.get("model/init")), "--data", SHAPES, *ONE_STEP, "--answers", "a.txt", "--out", "o"],
        ]
    )
    return Case(argv, done, "o" if "o" in argv else None)
