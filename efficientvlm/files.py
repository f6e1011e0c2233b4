"""Files and folders: what a user's path means, digests, and writes that a crash cannot leave half done."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

from efficientvlm.errors import BadInput
from efficientvlm.manifest import MANIFEST, Parent

BUNDLED = Path(__file__).resolve().parent / "bundled"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Replace a file as a whole: after a crash it has its old content or the new one, never a mixture."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


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
