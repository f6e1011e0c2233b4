"""The layouts of COCO: captions, phrases with boxes, and VQAv2's questions with their ten answers, in JSON beside the pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.files import sha256
from efficientvlm.data.skips import Skips
from efficientvlm.data.splits import part_of, split_of
from efficientvlm.data.tables import MemoryTable, digest_of
from efficientvlm.data.text_tables import first_mark, read_json, read_json_list
from efficientvlm.errors import BadInput, number_of


def json_files(folder: Path, word: str) -> list[Path]:
    """JSON files of a folder whose names hold `word`."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json" and word in path.stem.lower() and path.is_file())


def caption_files(folder: Path) -> list[Path]:
    """`captions_train2017.json` and its like, here or in `annotations`; a list of rows is none of them."""
    return [path for place in (folder, folder / "annotations") for path in json_files(place, "captions") if first_mark(path) == b"{"]


def is_captions(parsed: Any) -> bool:
    """Whether JSON is COCO's: lists of images and of annotations."""
    return isinstance(parsed, dict) and isinstance(parsed.get("images"), list) and isinstance(parsed.get("annotations"), list)


def captions(folder: Path, path: Path, skips: Skips, parsed: Any = None) -> MemoryTable:
    """The captions of a file, a row each, with the pictures that lie below `folder`.

    An annotation that has a box has its row there. Where its caption is that of its image entry, as in the lists of MDETR, every phrase has
    an entry of its own, and its number is none of the picture.

    Args:
        parsed: what the file holds, if it was read already.

    Raises:
        BadInput: the file has no lists of images and annotations.
    """
    parsed = read_json(path) if parsed is None else parsed
    if not is_captions(parsed):
        raise BadInput(
            f"data {path}", "it has no lists called images and annotations", "give captions in COCO's form, or a list of objects"
        )
    names: dict[Any, str] = {}
    said: dict[Any, Any] = {}
    for number, entry in enumerate(parsed["images"], 1):
        identity, name = (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(identity, int | str) or not isinstance(name, str):
            skips.add(BadInput(f"{path} image {number}", "it has no id and file_name", "mend or remove it"))
        elif names.setdefault(identity, name) != name:
            skips.add(
                BadInput(f"{path} image {number}", f"id {identity} is another picture before it", "give every picture an id of its own")
            )
        elif "caption" in entry:
            said[identity] = entry["caption"]
    find = _finder(folder, path)
    found: dict[Any, str] = {}
    columns: dict[str, list[Any]] = {"image": [], "image_id": [], "caption": [], "bbox": []}
    described: set[Any] = set()
    places: list[str] = []
    for number, entry in enumerate(parsed["annotations"], 1):
        where = f"{path} annotation {number}"
        identity = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(identity, int | str) or identity not in names:
            skips.add(BadInput(where, "its image_id is none of the images", "mend or remove it"))
            continue
        picture = found.setdefault(identity, "") or find([names[identity]])
        found[identity] = picture
        own = "caption" in entry or identity not in said
        values = (picture, identity if own else None, entry.get("caption") if own else said[identity], entry.get("bbox"))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        described.add(identity)
        places.append(where)
    if all(box is None for box in columns["bbox"]):
        del columns["bbox"]
    if without := len(names) - len(described):
        skips.note(f"{number_of(without, 'picture has', 'pictures have')} no caption in {path.name}: passed over")
    return MemoryTable(columns, folder, places.__getitem__, sha256(path))


def vqav2_files(folder: Path) -> dict[str, list[tuple[Path, Path | None]]]:
    """Split → its questions and annotations, by the names of the JSON files in `folder`: `...train2014_questions.json`."""
    found: dict[str, list[tuple[Path, Path | None]]] = {}
    annotated = json_files(folder, "annotations")
    for questions in json_files(folder, "questions"):
        if split := split_of(questions.stem):
            answers = next((path for path in annotated if part_of(path.stem).lower() == part_of(questions.stem).lower()), None)
            found.setdefault(split, []).append((questions, answers))
    return found


def vqav2(folder: Path, questions: Path, annotations: Path | None, skips: Skips) -> MemoryTable:
    """Questions joined with the ten answers of their annotations.

    Raises:
        BadInput: no annotations (as for the official test split), or no such lists in the files.
    """
    if annotations is None:
        raise BadInput(f"data {questions}", "there are no annotations for it", "its answers are not public: use another split")
    asked, answered = read_json_list(questions, "questions"), read_json_list(annotations, "annotations")
    answers: dict[Any, Any] = {}
    for entry in answered:
        if isinstance(entry, dict) and isinstance(entry.get("question_id"), int | str):
            answers[entry["question_id"]] = entry.get("answers")
    find = _finder(folder, questions)
    columns: dict[str, list[Any]] = {"image": [], "image_id": [], "question": [], "answer": []}
    names: list[str] = []
    for number, entry in enumerate(asked, 1):
        where = f"{questions} question {number}"
        identity = entry.get("question_id") if isinstance(entry, dict) else None
        image = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(identity, int | str) or not isinstance(image, int) or isinstance(image, bool):
            skips.add(BadInput(where, "it has no question_id and image_id", "mend or remove it"))
        elif identity not in answers:
            skips.add(BadInput(where, f"question_id {identity} has no annotation", "mend or remove it"))
        else:
            picture = find([f"{image:012}.jpg", f"{image}.jpg", f"{image}.png"])
            for column, value in zip(columns.values(), (picture, image, entry.get("question"), answers[identity]), strict=True):
                column.append(value)
            names.append(where)
    return MemoryTable(columns, folder, names.__getitem__, digest_of([questions, annotations]))


def _finder(folder: Path, described: Path) -> Callable[[list[str]], str]:
    """File names → a path below `folder`: in `train2014`, `images/train2014`, `images` or itself, as COCO's 2014 names them or 2017's."""
    match = re.search(r"(train|val|test)(?:-\w+?)?(\d{4})", described.stem)
    part = match[1] + match[2] if match else ""
    places = [place for place in (folder / part, folder / "images" / part, folder / "images", folder) if place.is_dir()]
    prefix = f"COCO_{part}_" if part else ""

    def find(names: list[str]) -> str:
        names = [prefix + names[0], *names]
        paths = [place / name for place in places for name in names]
        return os.path.relpath(next((path for path in paths if os.path.isfile(path)), places[0] / names[0]), folder)

    return find
