"""Files and folders: what a user's path means, digests, and writes that a crash cannot leave half done."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import select
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from efficientvlm.checkpoints.scratch import private_folder
from efficientvlm.errors import BadInput

if TYPE_CHECKING:
    from efficientvlm.checkpoints.manifest import Parent

BUNDLED = Path(__file__).resolve().parents[1] / "bundled"
MANIFEST = "evlm_manifest.json"
STATE = "training_state"
"""Folder inside an output that is not finished."""
MIB = 2**20
CHUNK = MIB
LARGE = 1024 * MIB
DEEPEST = 100  # folders in one another
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a pipe",
}


def kind(mode: int) -> str:
    """What a file that is no regular one is, in words."""
    return KINDS.get(stat.S_IFMT(mode), "no regular file")


def unreadable(path: Path, error: OSError) -> BadInput:
    """What to say where the system refuses to read `path`."""
    return BadInput(f"{path} cannot be read", (error.strerror or "unknown reason").lower(), "check the path and its permissions")


def open_plain(path: Path) -> BufferedReader:
    """A regular file (or a link to one), open for reading; nothing else is opened, so nothing can wait for a writer or go on for ever.

    Raises:
        BadInput: a folder, pipe, device or socket, or a file that cannot be opened.
    """
    return os.fdopen(_opened(path, pipes=False), "rb")


def read_limited(path: Path, limit: int, what: str) -> bytes:
    """The bytes of a regular file, or of a pipe that somebody writes into.

    Args:
        limit: the most bytes that are read.
        what: the kind of file the limit is for, for the message: "a manifest", "a list of answers".

    Raises:
        BadInput: more than `limit` bytes, a pipe without a writer, a folder, device or socket, or a file that cannot be read.
    """
    descriptor = _opened(path, pipes=True)
    try:
        status = os.fstat(descriptor)
        if status.st_size > limit:
            raise _too_large(path, f"it has {status.st_size:,} bytes", limit, what)
        content = bytearray()
        while chunk := _read(descriptor):
            content += chunk
            if len(content) > limit:
                raise _too_large(path, "it goes on beyond that", limit, what)
    except OSError as error:
        raise unreadable(path, error) from None
    finally:
        os.close(descriptor)
    if stat.S_ISFIFO(status.st_mode) and not content:
        raise BadInput(f"{path} cannot be read", "it is a pipe that nobody writes into", "give a file, or start what writes into it first")
    return bytes(content)


def _too_large(path: Path, found: str, limit: int, what: str) -> BadInput:
    allowed = f"{limit // MIB} MiB" if limit >= MIB else f"{limit:,} bytes"
    return BadInput(f"{path} is too large", f"{found}; {what} may have {allowed}", "check that it is the right file")


def _opened(path: Path, *, pipes: bool) -> int:
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) or (pipes and stat.S_ISFIFO(status.st_mode)):  # looked at first: to open a device may change it
            descriptor = os.open(
                path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            )
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) or (pipes and stat.S_ISFIFO(status.st_mode)):
                return descriptor
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise BadInput(f"{str(path)!r} cannot be read", str(error), "check the path") from None
    raise BadInput(f"{path} cannot be read", f"it is {kind(status.st_mode)}", "give a file")


def _read(descriptor: int) -> bytes:
    """The next bytes; none at the end, and none of a pipe without a writer. One that has a writer is waited for."""
    while True:
        try:
            return os.read(descriptor, CHUNK)
        except BlockingIOError:
            select.select([descriptor], [], [])


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        BadInput: it is no regular file, or cannot be read; a large file of which next to nothing was ever written, as a broken download
            leaves it, and which would take minutes to read.
    """
    with open_plain(path) as file:
        try:
            status = os.fstat(file.fileno())
            size = status.st_size
            if size > LARGE and (written := _written(file.fileno(), size)) < size / 100:
                why = f"of its {size:,} bytes at most {written:,} were ever written"
                raise BadInput(f"{path} is empty for the most part", why, "fetch it again")
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path, error) from None


def _written(descriptor: int, size: int) -> int:
    """Bytes of a file that are no holes, all where the system does not tell; counted up to a hundredth of `size`.

    Not the blocks on the disk: a file system that compresses has few, and some report none.
    """
    if not hasattr(os, "SEEK_DATA"):
        return size
    found = end = 0
    try:
        while end < size and found < size / 100:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            found += end - begin
    except OSError as error:
        return found if error.errno == errno.ENXIO else size  # only a hole is left
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return found


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder with the names of its folders, of which the caller may remove some, and of all else; links are not followed.

    As `os.walk`, which does not say what it could not read, and with which older Pythons fail on folders that are nested deeply.

    Raises:
        BadInput: a folder that cannot be read, or that lies deeper than `DEEPEST`.
    """
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        if len(place.parts) - len(folder.parts) > DEEPEST:
            raise BadInput(
                f"{folder} cannot be read", f"its folders are nested more than {DEEPEST} deep", "check that it is the right folder"
            )
        try:
            with os.scandir(place) as found:
                entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
        except FileNotFoundError:
            continue  # removed in the meantime
        except OSError as error:
            raise unreadable(place, error) from None
        folders = [name for name, is_folder in entries if is_folder]
        yield place, folders, [name for name, is_folder in entries if not is_folder]
        waiting += [place / name for name in reversed(folders)]


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, and those that links lead to, sorted; :class:`BadInput` as :func:`walk`."""
    return sorted(path for place, _, names in walk(folder) for path in (place / name for name in names) if path.is_file())


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable; does nothing where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole: after a crash it has its old content or the new one, never a mixture.

    What stands at `path` is replaced whatever it is, a link itself and not what it leads to: the caller has looked.
    """
    with private_folder(path.parent, path) as folder:
        write_new(folder / "content", data)
        os.replace(folder / "content", path)
    fsync_dir(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not be there yet, down to the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folders(path: Path, mode: int = 0o777) -> list[Path]:
    """Make a folder and those above it; the ones that were not there, outermost first. `mode` is that of the last one."""
    missing = [path]
    while not os.path.lexists(missing[-1].parent) and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    created = []
    for folder in reversed(missing):
        try:
            folder.mkdir(mode if folder == path else 0o777)
            created.append(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
    return created


def result_path(text: str | Path, example: str = "result.json") -> Path:
    """The file that a result is to be written to: none yet, or a regular file, which the caller must know as ours.

    Raises:
        BadInput: a folder, a link, a device, a pipe; or a path that cannot be looked at.
    """
    try:
        path = Path(text).expanduser()
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError, RuntimeError) as error:
        why = (error.strerror or "unknown reason").lower() if isinstance(error, OSError) else str(error).lower()
        raise BadInput(f"{str(text)!r} cannot be written", why, "use another --out") from None
    if not stat.S_ISREG(mode):
        raise BadInput(f"{path} cannot be written", f"it is {kind(mode)}", f"give a file, e.g. --out {example}")
    return path


def check_writable(path: Path) -> None:
    """:class:`BadInput` if a file could not be made at `path` now; nothing is left behind, and no folder is made."""
    folder = path.parent
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with private_folder(folder, path) as private:
            write_new(private / path.name, b"")  # whose name may be too long
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> BadInput:
    """What to say where the system refuses to write `path`."""
    if out_of_space(error):
        return BadInput(f"{path} cannot be written", "the disk is full", "free some space, or use another --out")
    return BadInput(f"{path} cannot be written", (error.strerror or "unknown reason").lower(), "use another --out")


def out_of_space(error: BaseException) -> bool:
    """Whether a write failed because the disk, the user's share of it, or the largest file allowed is full."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"os error {number})" in str(error) for number in numbers)  # the safetensors writer has an error of its own


def bundled_names() -> list[str]:
    """Names usable as `bundled:NAME`."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{MANIFEST}"))


def resolve(spec: str | Path, *, checkpoint: bool = False) -> Path:
    """The existing path a user means by `spec`; `bundled:NAME` is a checkpoint inside this package.

    Args:
        checkpoint: whether a checkpoint is meant, for the advice where there is none.

    Raises:
        BadInput: there is no such path or bundled checkpoint.
    """
    text = str(spec)
    kind, found, name = text.partition(":")
    if found and kind == "bundled":
        names = bundled_names()
        if name not in names:
            raise BadInput(
                f"there is no bundled checkpoint {name!r}", f"this package has {', '.join(names) or 'none'}", "use one of them, or a folder"
            )
        return BUNDLED / name
    try:
        path = Path(text).expanduser()
        exists = bool(text) and path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"{text!r} is not a usable path", str(error), "check the path") from None
    if not exists:
        bundled = ", ".join(f"bundled:{name}" for name in bundled_names()) if checkpoint else ""
        raise BadInput(
            f"{text!r} does not exist",
            f"looked in {Path.cwd()}",
            f"check the path, or use one of {bundled}" if bundled else "check the path",
        )
    return path


def is_hub_id(spec: str) -> bool:
    """Whether `spec` reads as `owner/name` of the Hugging Face hub, and no such path exists."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", spec) is not None and not Path(spec).exists()


def expanded(spec: str | Path) -> Path:
    """A path with `~` and `~user` spelt out; :class:`BadInput` if there is no such user."""
    try:
        return Path(spec).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{str(spec)!r} is not a usable path", str(error), "check the path") from None


def shown(path: Path) -> str:
    """How a path is shown to people: `bundled:NAME`, without the working directory in front, or as given."""
    resolved = path.resolve()
    if resolved.parent == BUNDLED:
        return f"bundled:{resolved.name}"
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


def locate(parent: Parent, folder: Path) -> Path:
    """Where a parent named in the manifest of `folder` is now."""
    if parent.path.startswith("bundled:"):
        return BUNDLED / parent.path.removeprefix("bundled:")
    return Path(os.path.normpath(folder.resolve() / parent.path))
