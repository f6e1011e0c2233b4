"""Whose folder an output is: read from what lies in it, never from a name; and whether anything in it is reached through a link."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints import files as places
from efficientvlm.checkpoints import manifest as manifests
from efficientvlm.checkpoints.files import STATE, expanded, kind, resolve, unreadable, walk
from efficientvlm.checkpoints.lineage import CARD
from efficientvlm.checkpoints.manifest import MANIFEST
from efficientvlm.checkpoints.request import BEGINNING, REQUEST, UNDER_WAY, read_request
from efficientvlm.checkpoints.scratch import PROGRAM
from efficientvlm.errors import BadInput

LOCK = "lock"
METRICS = "metrics.jsonl"
MARK = ".training_state.done"  # a finished stage's request, moved here while its state is removed: see `Output._drop_state`
BEGINNINGS = {LOCK: PROGRAM.encode(), UNDER_WAY: BEGINNING}  # what precedes a request, and what it says from its first byte on
PATTERN = re.compile(r"[{*?[]")  # where a name of data goes on as a pattern
READ = ("model", "teacher", "data", "val", "answers", "tokenizer", "from_gates")  # settings that name what a stage reads


def require_ours(out: Path) -> None:
    """:class:`BadInput` unless `out` is free, or a stage wrote what is in it, which its manifest or its request says.

    Ours is a folder with a readable manifest, or with a readable request in its `training_state`, or with nothing but the lock that
    precedes one.
    """
    if places.BUNDLED in (out.resolve(), *out.resolve().parents):
        raise BadInput(f"{out} cannot be written", "it belongs to the installed package", "use another --out")
    try:
        try:
            os.lstat(out)
        except FileNotFoundError:
            return
        if not out.is_dir():
            what = "a link that leads nowhere" if not out.exists() else "a file" if out.is_file() else kind(out.stat().st_mode)
            raise BadInput(f"{out} cannot be written", f"it is {what}", "use another --out")
        names = set(os.listdir(out))
        if os.path.lexists(out / MANIFEST):
            manifests.read(out)
        elif names - {MARK} and not owns_state(out, alone=names <= {STATE, MARK}):
            raise BadInput(f"{out} is not empty", "it holds files that no stage wrote", "use another --out")
        if MARK in names:
            read_request(out / MARK)
    except OSError as error:
        raise unreadable(out, error) from None


def owns_state(out: Path, *, alone: bool = True) -> bool:
    """Whether `training_state` in `out` was made by a stage.

    Args:
        alone: whether it will do that it holds nothing but the lock that precedes a request.

    Raises:
        BadInput: it holds a request that cannot be read.
    """
    state = out / STATE
    if not os.path.lexists(state) or not stat.S_ISDIR(os.lstat(state).st_mode):
        return False
    if read_request(state / REQUEST):
        return True
    if os.path.lexists(out / MARK):
        return read_request(out / MARK) is not None
    names = set(os.listdir(state))
    return alone and names <= set(BEGINNINGS) and all(_begins(state / name, BEGINNINGS[name]) for name in names)


def _begins(path: Path, said: bytes) -> bool:
    """Whether a file begins like that, or was left empty."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with path.open("rb") as file:
        return file.read(len(said)) in (b"", said)


def refuse_inputs_inside(out: Path, inputs: dict[str, str], config: dict[str, Any]) -> None:
    """:class:`BadInput` if a stage would read what it writes: an input that is the output, holds it, or lies in it."""
    for role, spec in inputs.items():
        if not spec or spec.startswith("sha256:"):  # data, whose digest a plan does not take
            continue
        source = resolve(spec)
        if any(_within(out, folder) for folder in _ways(source)):
            raise BadInput(f"{out} cannot be written", f"it is the {role} this stage reads", "use another --out")
        if _lies_in(source, out):
            raise BadInput(f"{out} cannot be written", f"the {role} this stage reads lies in it: {spec}", "use another --out")
    for name in READ:
        given = config.get(name)
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str) or not os.path.lexists(out):
                continue
            spec = value.removeprefix("stream:")
            try:
                path = expanded(spec)
                there = os.path.lexists(path)
                if not there and (pattern := PATTERN.search(spec)):  # {000..010}.tar or *.tar name shards
                    path, there = expanded(spec[: pattern.end()]), True
                inside = there and _lies_in(path, out)
            except (OSError, ValueError, BadInput):
                continue  # no path, or one that is refused where it is read
            if inside:
                raise BadInput(f"{out} cannot be written", f"the {name} this stage reads lies in it: {value}", "use another --out")


def _ways(path: Path) -> set[Path]:
    """A path as it is written and as it is with its links followed."""
    return {Path(os.path.abspath(path)), path.resolve()}


def _within(path: Path, folder: Path) -> bool:
    return any(folder == way or folder in way.parents for way in _ways(path))


def _lies_in(path: Path, folder: Path) -> bool:
    return any(way in given.parents for given in _ways(path) for way in _ways(folder))


def refuse_text(out: Path, inputs: dict[str, str], config: dict[str, Any]) -> None:
    """:class:`BadInput` for what no manifest can hold, before anything is computed: text that is not UTF-8, or no finite number."""
    named: dict[str, Any] = {"out": str(out), **inputs, **config}
    for name, value in {**named, "name of the output folder": out.resolve().name}.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise BadInput(f"{name} {value!a} cannot be used", "it is not UTF-8 text", "rename it, or give another value") from None
        except ValueError as error:
            raise BadInput(f"{name} {value!r} cannot be used", str(error).lower(), "give a finite number") from None


def refuse_links(out: Path, names: Iterable[str]) -> None:
    """:class:`BadInput` if what a stage writes or removes in `out` is reached through a link, or is no file where it writes one.

    Args:
        names: of files, beside those that every stage writes.
    """
    for name in sorted({MANIFEST, METRICS, CARD, MARK, *names}):
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            path = out.joinpath(*parts[:depth])
            if not os.path.lexists(path):
                break
            mode = os.lstat(path).st_mode
            if not (stat.S_ISREG(mode) if depth == len(parts) else stat.S_ISDIR(mode)):
                raise _in_the_way(out, path, mode)
    if os.path.lexists(out / STATE):
        if not stat.S_ISDIR(mode := os.lstat(out / STATE).st_mode):
            raise _in_the_way(out, out / STATE, mode)
        for folder, below, held in walk(out / STATE):
            for path in (folder / name for name in (*below, *held)):
                mode = os.lstat(path).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise _in_the_way(out, path, mode)


def _in_the_way(out: Path, path: Path, mode: int) -> BadInput:
    return BadInput(f"{out} cannot be written", f"{path.relative_to(out)} in it is {kind(mode)}", "remove it, or use another --out")
