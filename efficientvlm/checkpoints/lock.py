"""One writer a folder: a lock file that the kernel frees when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO

from efficientvlm.checkpoints.scratch import PROGRAM
from efficientvlm.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """An exclusive lock on the file `path`, which says who holds it.

    Where the file system or the operating system knows no such locks, taking it succeeds and `held` stays False.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self) -> None:
        """Lock, making the file. A link in its place is not followed.

        Raises:
            BadInput: somebody else holds it.
            FileNotFoundError: its folder is not there, or no longer: the holder may have just finished and removed it.
            OSError: the file cannot be made.
        """
        while not self.held:
            ours = not os.path.lexists(self.path)
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+", encoding="utf-8")
            if fcntl is None:
                self._give_up(file, ours)
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.readline().strip().removeprefix(f"{PROGRAM} ") or "another process"
                file.close()
                raise BadInput(
                    f"{self.path.parent.parent} is being written", f"by {holder}", "wait for it, stop it, or use another --out"
                ) from None
            except OSError:
                self._give_up(file, ours)
                return
            if self._is_current(file):
                self._file = file
            else:  # removed by its holder between our opening and locking it
                file.close()
        assert self._file
        self._file.write(f"{PROGRAM} process {os.getpid()} on {socket.gethostname()} since {datetime.now().isoformat(' ', 'seconds')}\n")
        self._file.flush()
        self._file.truncate()  # after, not before: at every moment it is ours by what it says

    def release(self) -> None:
        """Remove the file and let go."""
        if self._file:
            if self._is_current(self._file):
                self.path.unlink()
            self._file.close()
            self._file = None

    def _give_up(self, file: IO[str], ours: bool) -> None:
        """Close what cannot be locked, and remove it if we made it: it would mark the folder as one that is being written."""
        file.close()
        if ours:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _is_current(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.lstat())
        except FileNotFoundError:
            return False
