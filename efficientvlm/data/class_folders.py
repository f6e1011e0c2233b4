"""Folders of pictures by class: a picture's class is the folder that it lies in."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from efficientvlm.data.folders import note, walk
from efficientvlm.data.skips import Skips
from efficientvlm.data.splits import split_of
from efficientvlm.data.tables import MemoryTable
from efficientvlm.data.text_tables import is_unicode
from efficientvlm.errors import BadInput, number_of, shorten

FIX = "put the pictures into a folder a class, or write metadata.csv (file_name,label)"


def class_folder(folder: Path, skips: Skips) -> MemoryTable | None:
    """Pictures with the class that their folder stands for (column label); None if the folder holds no picture.

    A class is called as its folder, or where several folders have this name, by as much of the path as tells them apart: `church/indoor`.

    Raises:
        BadInput: a picture that lies in no folder of a class; folders of a class that lie in folders of splits.
    """
    found = walk(folder, skips)
    if not found.pictures:
        return None
    places = sorted({path.parent for path in found.pictures})
    if folder in places:
        first = next(path.name for path in found.pictures if path.parent == folder)
        raise BadInput(f"the pictures in {folder} have no class", f"{first} lies in no folder of a class", FIX)
    paths = {place: place.relative_to(folder) for place in places}
    if splits := sorted({part for path in paths.values() for part in path.parts[:-1] if split_of(part)}):
        why = f"folders of classes lie in folders of splits ({shorten(', '.join(splits), 80)})"
        raise BadInput(f"data {folder}", why, "give the folder that the splits lie in")
    names = shortest_suffixes(paths.values())
    pictures: list[Path] = []
    labels: list[str] = []
    digest = hashlib.sha256()
    for path in found.pictures:
        label = names[paths[path.parent]]
        if not is_unicode(label):
            skips.add(BadInput(str(path), "the name of its folder is not UTF-8", "rename the folder"))
            continue
        pictures.append(path)
        labels.append(label)
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
    note(found, skips, shards=False)
    if texts := sum(map(len, found.texts.values())):
        skips.note(f"{texts} .txt files were not read: a class is the name of a folder")
    if bare := sorted(str(path.relative_to(folder)) for path in found.bare):
        held = number_of(len(bare), "folder holds no picture and names no class", "folders hold no picture and name no class")
        skips.note(f"{held}: {shorten(', '.join(bare), 100)}")
    skips.note(f"the classes are the names of {len(set(labels))} folders: {shorten(', '.join(sorted(set(labels))), 100)}")
    return MemoryTable({"image": pictures, "label": labels}, folder, lambda row: str(pictures[row]), digest.hexdigest())


def shortest_suffixes(paths: Iterable[Path]) -> dict[Path, str]:
    """The fewest last parts of each path, joined by a slash, that no other of `paths` ends in."""
    waiting, names, length = list(paths), dict[Path, str](), 1
    while waiting:
        suffix = {path: str(PurePosixPath(*path.parts[-length:])) for path in waiting}
        counts = Counter(suffix.values())
        for path, name in suffix.items():
            if counts[name] == 1 or len(path.parts) <= length:
                names[path] = name
        waiting = [path for path in waiting if path not in names]
        length += 1
    return names
