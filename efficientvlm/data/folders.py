"""Folders of pictures: captions beside them or in the folders' names, and the layout of VQAv2."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import MemoryTable
from efficientvlm.data.tar import PICTURES
from efficientvlm.data.text_tables import is_unicode, opened, read_json_list
from efficientvlm.errors import BadInput

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}


def image_folder(folder: Path, skips: Skips) -> MemoryTable | None:
    """Pictures with `name.txt` beside `name.jpg` (a caption a line) or, if there is none at all, with the name of their folder.

    None if the folder holds no picture. Links to folders are not followed, so that they cannot lead in circles.
    """
    pictures = sorted(walk(folder))
    if not pictures:
        return None
    beside = any(path.with_suffix(".txt").is_file() for path in pictures)
    found: list[Path] = []
    captions: list[list[str]] = []
    digest = hashlib.sha256()
    for path in pictures:
        try:
            said = sidecar(path) if beside else class_name(path, folder)
        except BadInput as error:
            skips.add(error)
            continue
        found.append(path)
        captions.append(said)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{said!r}\n".encode())
    return MemoryTable({"image": found, "caption": captions}, folder, lambda row: str(found[row]), digest.hexdigest())


def walk(folder: Path) -> Iterator[Path]:
    """Picture files in a folder and its subfolders, by their endings; hidden ones are left out."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if name.lower().endswith(PICTURES) and not name.startswith("."))


def sidecar(picture: Path) -> list[str]:
    """The captions beside a picture, one a line."""
    path = picture.with_suffix(".txt")
    if not path.is_file():
        raise BadInput(str(picture), f"there is no {path.name} beside it", "write its caption there, or remove the picture")
    with opened(path) as file:
        content = file.read()
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise BadInput(str(path), "it is not UTF-8 text", "save it as UTF-8") from None
    if not lines:
        raise BadInput(str(path), "it holds no caption", "write one, or remove the picture")
    return lines


def class_name(picture: Path, folder: Path) -> list[str]:
    """The name of the folder a picture lies in, underscores as spaces."""
    if picture.parent == folder or not is_unicode(picture.parent.name):
        raise BadInput(str(picture), "it has no caption", f"write {picture.stem}.txt beside it, or put it into a folder of its class")
    return [picture.parent.name.replace("_", " ")]


def vqav2_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Split → its questions and annotations, by the names of the JSON files in `folder`: `...train2014_questions.json`."""
    names = sorted(path for path in folder.iterdir() if path.suffix == ".json" and path.is_file())
    found: dict[str, tuple[Path, Path | None]] = {}
    for questions in (path for path in names if "questions" in path.stem.lower()):
        split = _split_of(questions)
        if split is None:
            continue
        if split in found:
            raise BadInput(f"data {folder}", f"{found[split][0].name} and {questions.name} are both {split}", "keep one of them there")
        found[split] = questions, next((p for p in names if "annotations" in p.stem.lower() and _split_of(p) == split), None)
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
    pictures = _pictures(folder, questions)
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
            values = (pictures(image), image, entry.get("question"), answers[identity])
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            names.append(where)
    digest = hashlib.sha256()
    for path in (questions, annotations):
        with opened(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return MemoryTable(columns, folder, names.__getitem__, digest.hexdigest())


def _split_of(path: Path) -> str | None:
    """The split that a file name speaks of: `v2_mscoco_val2014_annotations` is val."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    return next((split for split, known in SPLIT_NAMES.items() if any(word in known for word in words)), None)


def _pictures(folder: Path, questions: Path) -> Any:
    """image_id → path below `folder`, in the naming of COCO: `train2014/COCO_train2014_000000000042.jpg`, or 2017's without prefix."""
    part = next((word for word in questions.stem.split("_") if re.fullmatch(r"(train|val|test)\d{4}", word)), "")
    places = [place for place in (folder / part, folder / "images" / part, folder / "images", folder) if place.is_dir()]
    prefix = f"COCO_{part}_" if part else ""

    def find(image: int) -> str:
        names = [f"{prefix}{image:012}.jpg", f"{image:012}.jpg", f"{image}.jpg", f"{image}.png"]
        paths = [place / name for place in places for name in names]
        return os.path.relpath(next((path for path in paths if os.path.isfile(path)), places[0] / names[0]), folder)

    return find
