"""Private folders for files under way: of mode 0700, with a record of who made them for what, under a lock that ends with its process.

What a killed process left is removed by the next one that works in the same place, and nothing else is: a folder without our record, or
whose lock is held, is left alone, whatever it is called.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".evlm-"
RECORD = "record.json"
PROGRAM = "efficientvlm"
LARGEST_RECORD = 16_384
TRIES = 20


@contextmanager
def private_folder(parent: Path, target: Path) -> Iterator[Path]:
    """A new folder in `parent` for files that become `target`, removed at the end of the block; what died in `parent` before is swept.

    Raises:
        OSError: it cannot be made.
    """
    sweep(parent)
    folder, held = _make(parent)
    try:
        _write_record(folder, target)
        yield folder
    finally:
        remove(folder)
        os.close(held)


def sweep(parent: Path) -> None:
    """Remove the private folders in `parent` whose process has ended."""
    if fcntl is None:
        return
    try:
        with os.scandir(parent) as entries:
            found = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
    except OSError:
        return
    for folder in found:
        if (held := _lock(folder)) is not None:
            if _is_left_over(folder):
                remove(folder)
            os.close(held)


def remove(folder: Path) -> None:
    """Remove a private folder, its record last, so that one that is half removed is still known for what it is."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != RECORD:
                path.unlink(missing_ok=True)
        (folder / RECORD).unlink(missing_ok=True)
        folder.rmdir()


def _make(parent: Path) -> tuple[Path, int]:
    for _ in range(TRIES):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        held = _lock(folder, made=True)
        if held is not None:
            return folder, held
        with contextlib.suppress(OSError):  # another process took it for an empty one that was left over, and may have removed it
            folder.rmdir()
    raise OSError(errno.EAGAIN, "a private folder cannot be kept", str(parent))


def _write_record(folder: Path, target: Path) -> None:
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    record = {"program": PROGRAM, "user": user, "target": os.path.abspath(target), "process": os.getpid()}
    with open(os.open(folder / RECORD, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(json.dumps(record).encode())


def _lock(folder: Path, *, made: bool = False) -> int | None:
    """An open, locked descriptor of a private folder of this user; None if it is none, is gone, or somebody else holds its lock.

    Args:
        made: it was made here a moment ago, and is ours even where the file system has neither owners nor modes nor locks; else such a
            folder counts as one that somebody holds.
    """
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    status = os.fstat(descriptor)
    try:
        if made or (status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) & 0o777 == 0o700):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                if not made:
                    raise
            if os.path.samestat(status, os.lstat(folder)):
                return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _is_left_over(folder: Path) -> bool:
    """Whether an unlocked folder holds our record, or was left before there was one: then it holds nothing at all."""
    try:
        names = os.listdir(folder)
        if not names:
            return True
        with open(os.open(folder / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = file.read(LARGEST_RECORD) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b"?"
        if not content:
            return names == [RECORD]
        record = json.loads(content)
        return record["program"] == PROGRAM and record["user"] == os.geteuid() and isinstance(record["target"], str)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
