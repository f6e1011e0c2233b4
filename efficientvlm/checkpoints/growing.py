"""A file of lines that grows while it is made, and goes on where a run was stopped, however it was."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from efficientvlm.checkpoints.files import fsync_dir, make_folders, read_limited, result_path, unreadable, unwritable, write_atomic
from efficientvlm.checkpoints.lock import fcntl
from efficientvlm.errors import BadInput, shorten

ENDING, STATE = ".unfinished", ".unfinished.json"
LARGEST_STATE = 1_000_000


class Form(NamedTuple):
    """How rows stand in a file, and what stands above them."""

    text: Callable[[Mapping[str, Any]], str]
    head: str = ""


def csv_of(columns: Sequence[str]) -> Form:
    """A table of `columns`, called by their names in its first line; a cell without a value is empty."""

    def line(cells: Sequence[Any]) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerow(cells)
        return file.getvalue()

    return Form(lambda row: line([row.get(name, "") for name in columns]), line(columns))


JSON_LINES = Form(lambda row: json.dumps(dict(row), ensure_ascii=False) + "\n")


class GrowingLines:
    """Lines, JSON by default, for the file `path`, which appears with all of them or not at all.

    Until then they lie in `path.unfinished`, and how far they go stands in `path.unfinished.json`: what was written after the last
    :meth:`add`, half a line included, is cut off when the work goes on, so that nothing is there twice and nothing is missing.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, resume: bool = True, form: Form = JSON_LINES) -> None:
        """`run` are the settings that the lines follow from; without `resume`, what another run has left is thrown away.

        Raises:
            BadInput: what is there was begun with other settings, is damaged, or is being written; or the system refuses to write.
        """
        self.path, self.run, self.form = path, json.loads(json.dumps(run)), form
        self.lines, self.state = (path.with_name(path.name + ending) for ending in (ENDING, STATE))
        self.done, self.last = 0, ""
        """Units of work that are finished, and the name of the last of them."""
        self.counts: Counter[str] = Counter()
        try:
            make_folders(path.parent) if not path.parent.is_dir() else None
            for file in (self.lines, self.state):
                result_path(file)  # no link, device or folder
            self._file = self._open()
        except OSError as error:
            raise unwritable(self.lines, error) from None
        try:
            size = self._take_up() if resume else 0
            self._file.truncate(size)
            self._file.seek(size)
            if not size:
                self._write(form.head)
        except BaseException:
            self._file.close()
            raise

    def add(self, rows: Sequence[Mapping[str, Any]], done: int, last: str, counts: Mapping[str, int]) -> None:
        """Write what came out of the units up to number `done`, the last of which is called `last`; `counts` are those of all so far."""
        try:
            self._write("".join(map(self.form.text, rows)))
            self._file.flush()
            os.fsync(self._file.fileno())
            self.done, self.last, self.counts = done, last, Counter(counts)
            state = {"run": self.run, "done": done, "last": last, "counts": dict(counts), "bytes": self._file.tell()}
            write_atomic(self.state, json.dumps(state).encode())
        except OSError as error:
            raise unwritable(self.lines, error) from None

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "backslashreplace"))

    def finish(self) -> None:
        """Let the file appear at `path`, in the place of what is there."""
        try:
            os.replace(self.lines, self.path)
            fsync_dir(self.path.parent)
            self.state.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def discard(self) -> None:
        """Remove what was begun."""
        for file in (self.lines, self.state):
            file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if error is not None and not self.done:  # there is nothing to go on from
            with contextlib.suppress(OSError):
                self.discard()

    def _open(self) -> IO[bytes]:
        """The file of lines, which nobody else writes."""
        while True:
            file = os.fdopen(os.open(self.lines, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "r+b")
            if fcntl is None:
                return file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise BadInput(f"{self.path} is being written", "by another process", "wait for it, or use another --out") from None
            except OSError:
                return file  # a file system that knows no locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.lines.lstat()):
                    return file
            file.close()  # finished by its holder between our opening and locking it

    def _take_up(self) -> int:
        """Bytes of the lines that are there and count."""
        present = os.fstat(self._file.fileno()).st_size
        if not self.state.is_file():
            return 0
        fix = f"remove {self.state.name}, give --no-resume to begin anew, or use another --out"
        try:
            found = json.loads(read_limited(self.state, LARGEST_STATE, "a state"))
            run, size = found["run"], int(found["bytes"])
            self.done, self.last, self.counts = int(found["done"]), str(found["last"]), Counter(found["counts"])
            if min(self.done, size) < 0 or not isinstance(run, dict):
                raise ValueError("it holds something else")
        except OSError as error:
            raise unreadable(self.state, error) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{self.state} cannot be read", f"it is no state of a run ({error})", fix) from None
        if present < size:
            if not present:  # it was finished, and the state alone is left
                self.done, self.last, self.counts = 0, "", Counter()
                return 0
            raise BadInput(f"{self.lines} is cut short", f"{present:,} bytes are left of {size:,}", fix)
        if run != self.run:
            other = next(name for name in {**self.run, **run} if run.get(name) != self.run.get(name))
            said = f"{other} is {shorten(self.run.get(other), 80)}, and was {shorten(run.get(other), 80)}"
            raise BadInput(f"{self.path} was begun with other settings", said, f"give the same ones, or {fix}")
        return size
