"""Progress on stderr: a live bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from efficientvlm.errors import printable
from efficientvlm.runtime import ranks

PATIENCE, LINE_EVERY = 2.0, 10.0


class Bar:
    """One task of `total` units; silent when `quiet`, and in all processes of a run but the main one."""

    def __init__(self, title: str, total: int, *, start: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.start, self.quiet = title, total, start, quiet or not ranks.is_main()
        self.console = Console(stderr=True)
        self.live: Progress | None = None
        self.began = self.printed = time.monotonic()
        self.noted = False

    def __enter__(self) -> Bar:
        if not self.quiet and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.live = Progress(*columns, console=self.console)
            self.live.start()
            self.task = self.live.add_task(self.title, total=self.total, completed=self.start, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        """`done` units are finished; `note` is what is worth reading beside the bar: a log shows the first one at once."""
        if self.live:
            self.live.update(self.task, completed=done, note=note)
            return
        now, first = time.monotonic(), bool(note) and not self.noted
        if self.quiet or (now - self.printed < LINE_EVERY and done < self.total and not first):
            return
        self.printed, self.noted = now, bool(note)
        rate = (done - self.start) / max(1e-9, now - self.began)
        left = f"{(self.total - done) / rate:.0f} s left" if rate and done < self.total else f"{now - self.began:.0f} s"
        say(f"{self.title} {done}/{self.total} · {left}{' · ' + note if note else ''}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            with suppress(OSError):
                self.live.stop()


def counted(starts: range, title: str, total: int, quiet: bool) -> Iterator[int]:
    """The `starts` of batches of `total` units, one after another, with progress."""
    with Bar(title, total, quiet=quiet) as bar:
        for start in starts:
            yield start
            bar.update(min(total, start + starts.step))


def say(text: str, *, quiet: bool = False) -> None:
    """One line of news on stderr, from the main process; where nobody listens any more, as after the terminal was closed, work goes on."""
    if not quiet and ranks.is_main():
        with suppress(OSError):
            print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def telling(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Say what is being done, if the block takes more than two seconds, and from time to time that it still is."""
    ended = threading.Event()

    def tell() -> None:
        began, pause = time.monotonic(), PATIENCE
        while not ended.wait(pause):
            seconds = time.monotonic() - began
            say(f"{text} …" if pause == PATIENCE else f"{text} … {seconds:.0f} s")
            pause = LINE_EVERY

    teller = threading.Thread(target=tell, daemon=True)
    if not quiet:
        teller.start()
    try:
        yield
    finally:
        ended.set()
        if not quiet:
            teller.join()
