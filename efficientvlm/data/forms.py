"""Which form a user's data has: from the path alone to the table that reads it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from efficientvlm.data import coco, hub, nlvr2
from efficientvlm.data.folders import image_folder
from efficientvlm.data.kinds.kind import IMAGE_NAMES
from efficientvlm.data.skips import Skips
from efficientvlm.data.splits import SPLIT_NAMES, by_split, only, split_of
from efficientvlm.data.tables import ParquetTable, SavedTable, Selection, Table
from efficientvlm.data.tar import TarTable
from efficientvlm.data.text_tables import CsvTable, JsonlTable, first_mark, json_list, read_json
from efficientvlm.errors import BadInput, shorten

SINGLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SHARDED = (".parquet", ".tar")
SUFFIXES = (*SINGLE, *SHARDED)
METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))
"""Columns that are taken for the picture's without `--column`."""
MOST_FILES = 100_000
PATTERN = re.compile(r"[*?\[{]")


Pictures = Callable[[Path, Skips], Table | None]
"""What makes rows of a folder that holds pictures alone, with no file that says what they show; None where there is no picture."""


def open_table(spec: str, split: str, skips: Skips, pictures: Pictures = image_folder) -> tuple[Table, bool]:
    """The rows of one split, and whether the caller must still hold out its validation part.

    A single file, a pattern of shards, a folder of pictures or a `save_to_disk` folder serves train and val together and, whole, as test.
    A folder with one file (or several shards, or a subfolder) a split, or a saved `DatasetDict`, is used as it is split; without a
    validation split that is held out from train. Rows that are none, and what was guessed, go to `skips`.

    Raises:
        BadInput: not there, of an unknown form, without the split, or with several that could be it.
    """
    if spec.startswith(hub.PREFIX):
        return hub.open_hub(spec, split)
    paths = paths_of(spec)
    if len(paths) > 1 or not paths[0].is_dir():
        return open_files(paths, skips), split != "test"
    folder = paths[0]
    if not os.access(folder, os.R_OK | os.X_OK):
        raise BadInput(f"data {spec} cannot be read", "permission denied", "check the folder's permissions")
    if (folder / "state.json").is_file():
        return SavedTable(folder), split != "test"
    found = _parts(folder, skips, pictures)
    if isinstance(found, Rows):
        found = {role: [Part(role, partial(found.of, role))] for role in found.splits}
    elif not isinstance(found, dict):
        return found, split != "test"
    wanted = split if split in found else "train" if split == "val" and "train" in found else ""
    if not wanted:
        have = ", ".join(part.name for parts in found.values() for part in parts)
        have = f"it has {shorten(have)}" if have else f"it holds no {', '.join(SUFFIXES)} file, no pictures and nothing that datasets saved"
        fix = "name the files train.jsonl, val.jsonl, test.jsonl (or .csv, .parquet), or give one file"
        raise BadInput(f"data {spec} has no split {split}", have, fix)
    part = only(found[wanted], [part.name for part in found[wanted]], spec, wanted)
    if split_of(part.name) and part.name not in (wanted, *SPLIT_NAMES[wanted]):
        skips.note(f"split {wanted} is {part.name}")
    return part.open(), wanted == "train" and "val" not in found


@dataclass(frozen=True)
class Part:
    """What may be a split of a folder: its name, and how it is opened."""

    name: str
    open: Callable[[], Table]


class Rows:
    """A table at the root of a folder whose pictures lie in folders called after splits: rows by that folder."""

    def __init__(self, table: Table, roles: list[str]) -> None:
        self.table, self.roles = table, roles
        self.splits = list(dict.fromkeys(roles))

    def of(self, split: str) -> Table:
        """The rows of `split`."""
        return Selection(self.table, [row for row, role in enumerate(self.roles) if role == split])


def exists(spec: str) -> bool:
    """Whether there is something to open under `spec`; nothing is read."""
    try:
        return bool(paths_of(spec))
    except BadInput:
        return False


def paths_of(spec: str) -> list[Path]:
    """The path that `spec` is, or those its pattern stands for: `{000..003}`, `{a,b}`, `*`, `?`.

    Raises:
        BadInput: there is none, or one of a counted pattern is missing.
    """
    try:
        spec = os.path.expanduser(spec)
        if os.path.exists(spec):
            return [Path(spec)]
    except ValueError:
        raise BadInput(f"no data called {spec!r}", "it is not a usable path", "check the path") from None
    folder = os.path.dirname(spec)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    pattern = spec[len(folder) :]  # what is there already is a name, whatever marks it has
    if not PATTERN.search(pattern):
        raise BadInput(f"no data called {spec}", "there is no such file or folder", "check the path")
    paths: list[Path] = []
    for rest in braces(pattern):
        text = folder + rest
        matches = [text] if os.path.isfile(text) or not glob.has_magic(rest) else sorted(glob.glob(glob.escape(folder) + rest))
        missing = not matches or not os.path.isfile(matches[0])
        if missing:
            raise BadInput(f"no data called {spec}", f"there is no file {text}", "check the pattern")
        paths += [Path(match) for match in matches if os.path.isfile(match)]
    return paths


def braces(text: str) -> Iterator[str]:
    """`text` with every `{first..last}` counted (zeros kept) and every `{a,b}` taken apart, as a shell does."""
    match = re.search(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{}]*,[^{}]*))\}", text)
    if match is None:
        yield text
        return
    if match[1] is None:
        middles = match[3].split(",")
    else:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if last - first >= MOST_FILES:
            raise BadInput(f"data {text}", f"its pattern counts to more than {MOST_FILES:,} files", "check the pattern")
        middles = [f"{number:0{width}}" for number in range(first, last + 1)]
    for middle in middles:
        for rest in braces(text[match.end() :]):
            yield text[: match.start()] + middle + rest


def open_files(paths: list[Path], skips: Skips) -> Table:
    """One file, or several shards, of one kind.

    Raises:
        BadInput: kinds that are not known or cannot be put together.
    """
    kinds = {path.suffix.lower() for path in paths}
    if kinds == {".parquet"}:
        return ParquetTable(paths)
    if kinds == {".tar"}:
        return TarTable(paths, skips)
    if len(paths) == 1 and kinds <= {".jsonl", ".ndjson"}:
        return JsonlTable(paths[0], skips)
    if len(paths) == 1 and kinds <= {".csv", ".tsv"}:
        return CsvTable(paths[0], skips)
    if len(paths) == 1 and kinds == {".json"}:
        if nlvr2.is_statements(paths[0]):
            return nlvr2.statements(paths[0], skips)
        if first_mark(paths[0]) == b"{":
            home, parsed = paths[0].parent, read_json(paths[0])
            if "captions" in paths[0].stem.lower() or coco.is_captions(parsed):
                return coco.captions(home.parent if home.name == "annotations" else home, paths[0], skips, parsed)
        return json_list(paths[0], skips)
    if len(paths) == 1 and re.search(r"\.(tar\.\w+|tgz)$", paths[0].name, re.IGNORECASE):
        raise BadInput(f"data {paths[0]}", "samples of a compressed tar are not found at once", f"unpack it, or train on stream:{paths[0]}")
    if len(paths) == 1:
        ending = f"a file that ends in {paths[0].suffix}" if paths[0].suffix else "a file without an ending"
        fix = f"give a {', '.join(SINGLE)}, .parquet or .tar file, or a folder; plain text is read where only sentences are asked for"
        raise BadInput(f"data {paths[0]}", f"{ending} is no table", fix)
    listed = ", ".join(path.name for path in paths[:5]) + ", ..." * (len(paths) > 5)
    raise BadInput(
        f"data {paths[0].parent}", f"cannot use {listed} as one split", f"give one {', '.join(SINGLE)} file, or shards in parquet or tar"
    )


def _parts(folder: Path, skips: Skips, pictures: Pictures) -> dict[str, list[Part]] | Rows | Table:
    """What a folder holds: parts by split (several may claim one), a table whose rows are split by folder, or a table that is whole."""
    if (folder / "dataset_dict.json").is_file():
        saved = {path.name: path for path in sorted(folder.iterdir()) if (path / "state.json").is_file()}
        return {role: [Part(name, partial(SavedTable, saved[name])) for name in names] for role, names in by_split(saved).items()}
    if official := coco.vqav2_files(folder):
        return {
            role: [Part(asked.name, partial(coco.vqav2, folder, asked, answered, skips)) for asked, answered in files]
            for role, files in official.items()
        }
    if captions := _claims((path.stem, path.name, partial(coco.captions, folder, path, skips)) for path in coco.caption_files(folder)):
        return captions
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for place in places:
        files: dict[str, list[Path]] = {}
        for path in _data_files(place, skips):
            if split_of(path.stem):
                files.setdefault(_without_number(path.stem) + path.suffix.lower(), []).append(path)
        if files:
            rest = [path.name for path in _data_files(place, skips) if not split_of(path.stem)]
            if rest:
                skips.note(f"{shorten(', '.join(rest), 100)}: passed over, as other files are named after splits")
            return _claims((shards[0].stem, name, partial(open_files, shards, skips)) for name, shards in files.items())
    for place in places:
        subfolders = sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
        if claims := _claims((path.name, path.name, partial(_whole, path, skips, pictures)) for path in subfolders):
            if not (table := _table(place, skips)):
                if rest := [path.name for path in subfolders if not split_of(path.name)]:
                    skips.note(f"{shorten(', '.join(rest), 100)}: passed over, as other folders are named after splits")
                return claims
            inner = [path / name for path in subfolders if split_of(path.name) for name in METADATA if (path / name).is_file()]
            if inner:
                why = f"a file of it and {inner[0].relative_to(place)} both say what its pictures show"
                raise BadInput(f"data {place}", why, "keep one of them")
            return _by_folder(table, place)
    for place in places:
        if table := _table(place, skips):
            return table
    return pictures(folder, skips) or {}


def _claims(found: Iterable[tuple[str, str, Callable[[], Table]]]) -> dict[str, list[Part]]:
    """Split → what claims it, out of (name that says the split, name for people, how it is opened)."""
    claims: dict[str, list[Part]] = {}
    for stem, name, opener in found:
        if role := split_of(stem):
            claims.setdefault(role, []).append(Part(name, opener))
    return claims


def _without_number(stem: str) -> str:
    """The name that all shards of one split have: `train` of `train-00000-of-00004`; a year is no number of a shard."""
    return re.sub(r"[-_.](?!(?:19|20)\d\d$)\d+([-_]of[-_]\d+)?$", "", stem)


def _data_files(folder: Path, skips: Skips) -> list[Path]:
    """The data files of a folder; a JSON object is none (`dataset_infos.json`), nor is what img2dataset puts beside its shards."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    shards = {path.stem for path in files if path.suffix.lower() == ".tar"}
    beside = [path for path in files if path.suffix.lower() in (".parquet", ".json") and path.stem.removesuffix("_stats") in shards]
    objects = [
        path
        for path in files
        if path.suffix.lower() == ".json" and path not in beside and not split_of(path.stem) and first_mark(path) != b"["
    ]
    if beside:
        skips.note(f"{len(beside)} files that img2dataset wrote beside its shards were passed over")
    if objects:
        skips.note(f"{shorten(', '.join(path.name for path in objects), 100)}: no list of rows, passed over")
    return [path for path in files if path not in beside and path not in objects]


def _table(folder: Path, skips: Skips) -> Table | None:
    """The data of a folder that is not split by names: its metadata file, its only file, or its shards."""
    files = _data_files(folder, skips)
    described = [path for path in files if path.name.lower() in METADATA]
    if len(described) > 1:
        both = " and ".join(path.name for path in described)
        raise BadInput(f"data {folder}", f"{both} both say what its pictures show", "keep one of them")
    if described and (rest := [path.name for path in files if path not in described]):
        skips.note(f"{shorten(', '.join(rest), 100)}: passed over beside {described[0].name}")
    return open_files(described or files, skips) if files else None


def _by_folder(table: Table, folder: Path) -> Rows | Table:
    """The rows of a table by the split that their pictures' folder is called after, if it is."""
    column = next((name for name in IMAGE_NAMES if name in table.columns), None)
    if column is None:
        return table
    values = table.column(column)
    parts = [Path(value).parent.parts if isinstance(value, str) else () for value in values]
    roles = [next(filter(None, map(split_of, names)), None) for names in parts]
    known = [role for role in roles if role]
    if not known:
        return table
    if len(known) < len(roles):
        row = roles.index(None)
        why = f"its picture lies in no folder of a split, others lie in {known[0]}"
        raise BadInput(table.where(row), why, "put all of them into folders called after splits, or none")
    return Rows(table, known)


def _whole(folder: Path, skips: Skips, pictures: Pictures) -> Table:
    """A folder that is a split: its table, or pictures alone."""
    if (folder / "state.json").is_file():
        return SavedTable(folder)
    table = _table(folder, skips) or pictures(folder, skips)
    if table is None:
        raise BadInput(f"data {folder}", f"it holds no {', '.join(SUFFIXES)} file and no pictures", "fill or remove the folder")
    return table
