"""Folders of pictures: captions beside them or in the folders' names."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from efficientvlm.data.images import PICTURES
from efficientvlm.data.skips import Skips
from efficientvlm.data.splits import split_of
from efficientvlm.data.tables import MemoryTable
from efficientvlm.data.tar import check_size
from efficientvlm.data.text_tables import caption_lines, is_unicode, opened
from efficientvlm.errors import BadInput, number_of, shorten

CONTAINERS = re.compile(r"(data(set)?|frame|image|img|jpe?g|photo|pic(ture)?|png)s?", re.IGNORECASE)
"""Names of folders that only hold pictures."""
NO_WORD = re.compile(r"[\W\d_]*|(?=.*\d)[0-9a-f]{2,}|[a-z]{0,3}\d{3,}", re.IGNORECASE)
"""Names of folders that number their content: `0001`, `3f`, `n01440764`."""


@dataclass
class Found:
    """What lies in a folder and its subfolders."""

    pictures: list[Path] = field(default_factory=list)
    texts: dict[Path, list[Path]] = field(default_factory=dict)
    """Path without its ending → `.txt` files of this name."""
    shards: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    """Ending → files that are none of these."""
    followed: int = 0
    circles: int = 0
    """Links to folders that were followed, and those that were not, because the folder is in it already."""
    bare: list[Path] = field(default_factory=list)
    """Folders with neither pictures nor subfolders."""


def image_folder(folder: Path, skips: Skips) -> MemoryTable | None:
    """Pictures with `name.txt` beside `name.jpg` (a caption a line) or, if there is none at all, with the name of their class folder.

    None if the folder holds no picture.

    Raises:
        BadInput: no captions, and folders that are plainly no classes.
    """
    found = walk(folder, skips)
    if not found.pictures:
        return None
    stems = Counter(path.with_suffix("") for path in found.pictures)
    beside = any(stem in found.texts for stem in stems)
    if not beside:
        check_classes(found.pictures, folder)
    pictures: list[Path] = []
    captions: list[list[str]] = []
    digest = hashlib.sha256()
    for path in found.pictures:
        try:
            said = sidecar(path, found, stems) if beside else [class_name(path)]
        except BadInput as error:
            skips.add(error)
            continue
        pictures.append(path)
        captions.append(said)
        digest.update(os.fsencode(path.relative_to(folder)) + f"\0{said!r}\n".encode())
    note(found, skips, shards=False)
    if not beside:
        kinds = {said for (said,) in captions}
        skips.note(f"the captions are the names of {len(kinds)} folders: {shorten(', '.join(sorted(kinds)), 100)}")
    return MemoryTable({"image": pictures, "caption": captions}, folder, lambda row: str(pictures[row]), digest.hexdigest())


def walk(folder: Path, skips: Skips) -> Found:
    """The files of a folder and its subfolders by their endings, sorted; hidden ones are left out, and a link never leads in circles."""
    found = Found()
    seen: set[tuple[int, int]] = set()
    waiting = [(False, folder)]
    while waiting:
        link, place = waiting.pop()
        try:
            status = place.stat()
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            skips.add(BadInput(str(place), f"the folder cannot be read ({(error.strerror or '').lower()})", "check its permissions"))
            continue
        if (status.st_dev, status.st_ino) in seen:
            found.circles += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        found.followed += link
        folders, before = [], len(found.pictures)
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append((entry.is_symlink(), path))
            elif entry.name.lower().endswith(PICTURES):
                if entry.is_file():
                    found.pictures.append(path)
                else:
                    skips.add(BadInput(str(path), "it is no file that can be read", "replace or remove it"))
            elif path.suffix.lower() == ".tar" and entry.is_file():
                found.shards.append(path)
            elif path.suffix.lower() == ".txt":
                found.texts.setdefault(path.with_suffix(""), []).append(path)
            else:
                found.others[path.suffix.lower() or "no ending"] += 1
        if not folders and len(found.pictures) == before:
            found.bare.append(place)
        waiting += sorted(folders, reverse=True)  # links last: what they lead to may be here itself
    found.pictures.sort()
    found.shards.sort()
    return found


def pictures_of(names: Sequence[Path]) -> tuple[list[tuple[Path, bool]], list[str]]:
    """The pictures that are named, and those in folders that are, each with whether it was named itself; what was passed over, in words.

    Raises:
        BadInput: a folder without pictures.
    """
    files: list[tuple[Path, bool]] = []
    remarks = []
    for name in names:
        if not name.is_dir():
            files.append((name, True))
            continue
        skips = Skips(str(name))
        found = walk(name, skips)
        note(found, skips, shards=False)
        if not found.pictures:
            endings = ", ".join(PICTURES)
            raise BadInput(f"{name} holds no picture", f"looked for are files that end in {endings}", "give another folder, or pictures")
        files += [(path, False) for path in found.pictures]
        remarks += [*skips.notes, *(f"left out {what}: {why}" for what, why in skips.reasons.items())]
    return files, remarks


def note(found: Found, skips: Skips, *, shards: bool) -> None:
    """Say what was passed over, and with it tar files unless `shards` are read."""
    if found.followed:
        skips.note(f"{number_of(found.followed, 'linked folder was', 'linked folders were')} followed")
    if found.circles:
        skips.note(f"{number_of(found.circles, 'linked folder was', 'linked folders were')} not followed, to read no folder twice")
    others = found.others + Counter({".tar": 0 if shards else len(found.shards)})
    if others:
        kinds = ", ".join(f"{ending} {count}" for ending, count in others.most_common())
        passed = number_of(others.total(), "file is no picture of a known kind and was", "files are no pictures of a known kind and were")
        skips.note(f"{passed} passed over: {shorten(kinds, 100)}")


def sidecar(picture: Path, found: Found, stems: Counter[Path]) -> list[str]:
    """The captions beside a picture, one a line."""
    stem = picture.with_suffix("")
    texts = found.texts.get(stem, [])
    if not texts:
        raise BadInput(str(picture), f"there is no {stem.name}.txt beside it", "write its caption there, or remove the picture")
    if stems[stem] > 1 or len(texts) > 1:
        several = f"{number_of(stems[stem], 'picture')} and {number_of(len(texts), 'file')} of captions have its name"
        raise BadInput(str(picture), several, "give every picture a name of its own")
    with opened(texts[0]) as file:
        check_size(".txt", os.fstat(file.fileno()).st_size, str(picture))
        content = file.read()
    try:
        lines = caption_lines(content)
    except UnicodeDecodeError:
        raise BadInput(str(texts[0]), "it is not UTF-8 text", "save it as UTF-8") from None
    if not lines:
        raise BadInput(str(texts[0]), "it holds no caption", "write one, or remove the picture")
    return lines


def check_classes(pictures: list[Path], folder: Path) -> None:
    """Names of folders are captions only where they are plainly classes.

    Raises:
        BadInput: they are not, and why.
    """
    places = {path.parent for path in pictures}
    names = sorted({place.name for place in places})
    if split_of(folder.name):  # a small split may have one class of those that its siblings have
        siblings = [place for place in folder.parent.iterdir() if place.is_dir() and split_of(place.name)]
        names = sorted({*names, *(place.name for sibling in siblings for place in sibling.iterdir() if place.is_dir())})
    depths = {len(place.relative_to(folder).parts) for place in places}
    other = next((name for name in names if CONTAINERS.fullmatch(name) or split_of(name) or NO_WORD.fullmatch(name)), None)
    if folder in places:
        why = f"{next(path.name for path in pictures if path.parent == folder)} lies in no folder of a class"
    elif len(names) < 2:
        why = f"all lie in one folder, {names[0]}"
    elif len(depths) > 1:
        why = "their folders lie at different depths"
    elif other:
        why = f"{other} is no name of a class"
    else:
        return
    fix = "write NAME.txt beside each NAME.jpg, or captions into metadata.csv (file_name,text), or put the pictures into a folder a class"
    raise BadInput(f"the pictures in {folder} have no captions", f"{why}, so that folder names are none", fix)


def class_name(picture: Path) -> str:
    """The name of the folder a picture lies in, underscores as spaces."""
    name = picture.parent.name
    if not is_unicode(name):
        raise BadInput(str(picture), "the name of its folder is not UTF-8", "rename the folder")
    return name.replace("_", " ")
