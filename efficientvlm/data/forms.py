"""Which form a user's data has: from the path alone to the table that reads it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from efficientvlm.data import hub
from efficientvlm.data.folders import SPLIT_NAMES, image_folder, vqav2, vqav2_files
from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import ParquetTable, SavedTable, Table
from efficientvlm.data.tar import TarTable
from efficientvlm.data.text_tables import CsvTable, JsonlTable, json_list
from efficientvlm.errors import BadInput

SINGLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SHARDED = (".parquet", ".tar")
SUFFIXES = (*SINGLE, *SHARDED)
METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))
MOST_FILES = 100_000
PATTERN = re.compile(r"[*?\[{]")


def open_table(spec: str, split: str, skips: Skips) -> tuple[Table, bool]:
    """The rows of one split, and whether the caller must still hold out its validation part.

    A single file, a pattern of shards, a folder of pictures or a `save_to_disk` folder serves train and val together and, whole, as test.
    A folder with one file (or several shards, or a subfolder of pictures) a split, or a saved `DatasetDict`, is used as it is split;
    without a validation split that is held out from train. Rows that are none go to `skips`.

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
    found = _splits(folder)
    names = {role: name for role, known in SPLIT_NAMES.items() for name in found if name in known}
    same = [name for name in found if name in SPLIT_NAMES[split]]
    if len(same) > 1:
        raise BadInput(f"data {spec} has {len(same)} splits for {split}", f"it has {', '.join(same)}", "keep one of them")
    if not names:
        whole = _whole(folder, skips)
        if whole is not None:
            return whole, split != "test"
    if split in names:
        chosen, hold_out = split, split == "train" and "val" not in names
    elif split == "val" and "train" in names:
        chosen, hold_out = "train", True
    else:
        kinds = f"{', '.join(SUFFIXES)} file, no pictures and nothing that datasets saved"
        have = f"it has {', '.join(found)}" if found else f"it holds no {kinds}"
        raise BadInput(
            f"data {spec} has no split {split}",
            have,
            "name the files train.jsonl, val.jsonl, test.jsonl (or .csv, .parquet), or give one file",
        )
    return _open_split(folder, found[names[chosen]], skips), hold_out


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
    if not PATTERN.search(spec):
        raise BadInput(f"no data called {spec}", "there is no such file or folder", "check the path")
    paths: list[Path] = []
    for text in braces(spec):
        matches = sorted(glob.glob(text)) if re.search(r"[*?\[]", text) else [text]
        missing = not matches or not os.path.isfile(matches[0])
        if missing:
            raise BadInput(f"no data called {spec}", f"there is no file {text}", "check the pattern")
        paths += [Path(match) for match in matches if os.path.isfile(match)]
    return paths


def braces(text: str) -> Iterator[str]:
    """`text` with every `{first..last}` counted (zeros kept) and every `{a,b}` taken apart, as a shell does."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
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
    kinds = {path.suffix for path in paths}
    if kinds == {".parquet"}:
        return ParquetTable(paths)
    if kinds == {".tar"}:
        return TarTable(paths, skips)
    if len(paths) == 1 and kinds <= {".jsonl", ".ndjson"}:
        return JsonlTable(paths[0], skips)
    if len(paths) == 1 and kinds <= {".csv", ".tsv"}:
        return CsvTable(paths[0], skips)
    if len(paths) == 1 and kinds == {".json"}:
        return json_list(paths[0], skips)
    if len(paths) == 1 and re.search(r"\.(tar\.\w+|tgz)$", paths[0].name):
        raise BadInput(f"data {paths[0]}", "samples of a compressed tar are not found at once", f"unpack it, or train on stream:{paths[0]}")
    listed = ", ".join(path.name for path in paths[:5]) + ", ..." * (len(paths) > 5)
    raise BadInput(
        f"data {paths[0].parent}", f"cannot use {listed} as one split", f"give one {', '.join(SINGLE)} file, or shards in parquet or tar"
    )


def _splits(folder: Path) -> dict[str, list[Path]]:
    """What a folder holds, by the name of its split: saved datasets, data files, JSON of VQAv2, subfolders of pictures."""
    if (folder / "dataset_dict.json").is_file():
        return {path.name: [path] for path in sorted(folder.iterdir()) if (path / "state.json").is_file()}
    if official := vqav2_files(folder):
        return {split: [path for path in paths if path is not None] for split, paths in official.items()}
    found = _split_files(folder)
    if any(name in known for known in SPLIT_NAMES.values() for name in found):
        return found
    parts = {path.name: [path] for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: path for name, path in parts.items() if any(name in known for known in SPLIT_NAMES.values())} or found


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder (or of its subfolder `data`) by split; the name of a shard goes on after a `-`."""
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.suffix in SUFFIXES and path.is_file():
                found.setdefault(path.stem.partition("-")[0], []).append(path)
        if found:
            return found
    return {}


def _whole(folder: Path, skips: Skips) -> Table | None:
    """A folder that is not split: pictures with a metadata file, shards, or pictures alone."""
    for name in METADATA:
        if (folder / name).is_file():
            return open_files([folder / name], skips)
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if not files:
        return image_folder(folder, skips)
    return TarTable(files, skips) if all(path.suffix == ".tar" for path in files) else None  # pictures of a table are no data by themselves


def _open_split(folder: Path, paths: list[Path], skips: Skips) -> Table:
    first = paths[0]
    if (first / "state.json").is_file():
        return SavedTable(first)
    if first.is_dir():
        table = _whole(first, skips)
        if table is None:
            raise BadInput(f"data {first}", "it holds no pictures", "fill or remove the folder")
        return table
    if first.suffix == ".json" and "questions" in first.stem.lower():
        return vqav2(folder, first, paths[1] if len(paths) > 1 else None, skips)
    return open_files(paths, skips)
