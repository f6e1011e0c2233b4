"""Progress on stderr: a live bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from efficientvlm import ranks

LINE_EVERY = 10.0


class Bar:
    """One task of `total` units; silent when `quiet`, and in all processes of a run but the main one."""

    def __init__(self, title: str, total: int, *, start: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.start, self.quiet = title, total, start, quiet or not ranks.is_main()
        self.console = Console(stderr=True)
        self.live: Progress | None = None
        self.began = self.printed = time.monotonic()

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
        """`done` units are finished; `note` is what is worth reading beside the bar."""
        if self.live:
            self.live.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if self.quiet or (now - self.printed < LINE_EVERY and done < self.total):
            return
        self.printed = now
        rate = (done - self.start) / max(1e-9, now - self.began)
        left = f"{(self.total - done) / rate:.0f} s left" if rate and done < self.total else f"{now - self.began:.0f} s"
        print(f"{self.title} {done}/{self.total} · {left}{' · ' + note if note else ''}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()


def say(text: str, *, quiet: bool = False) -> None:
    """One line of news on stderr, from the main process."""
    if not quiet and ranks.is_main():
        print(text, file=sys.stderr, flush=True)
