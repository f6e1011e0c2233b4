"""One writer a folder: a lock file that the kernel frees when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO

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
        """Lock, making the file and its folder.

        Raises:
            BadInput: somebody else holds it.
            OSError: the file cannot be made.
        """
        while not self.held:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            ours = not self.path.exists()
            try:
                file = self.path.open("a+", encoding="utf-8")
            except FileNotFoundError:  # the holder has just finished and removed the folder
                continue
            if fcntl is None:
                self._give_up(file, ours)
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
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
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now().isoformat(' ', 'seconds')}\n")
        self._file.flush()

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
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False
