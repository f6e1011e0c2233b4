"""The command line in a forked process of its own: bounded, watched, and with nothing of this process's left to touch.

The process that forks has imported everything and started no thread, so that a command costs what it does and not its imports.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import json
import os
import re
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

CPU_SECONDS, WALL_SECONDS, IDLE_SECONDS = 60, 240, 20
MEMORY_MB = 2000
"""Resident; a tiny model on a few pictures needs some 400."""
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")
SHOWN = 1 << 20
MINUTE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC")  # a page says when it was written
OF_THE_RUN = ("created", "cost", "digest")  # of a manifest: when, how long, and what follows from both


def preload() -> None:
    """Import what commands import, so that their forks need not, and keep the collector away from it."""
    import datasets  # noqa: F401
    import psutil  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import typer.rich_utils  # noqa: F401
    from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: F401

    from efficientvlm.cli import main  # noqa: F401

    torch.set_num_threads(1)
    for name in ("stages", "families"):
        package = import_module(f"efficientvlm.{name}")
        for path in sorted(Path(str(package.__path__[0])).glob("[a-z]*.py")):
            import_module(f"efficientvlm.{name}.{path.stem}")
    for name in ("planning.plan", "checkpoints.folder", "export.stock"):
        import_module(f"efficientvlm.{name}")
    gc.collect()
    gc.freeze()


@dataclass
class Ended:
    """How a command ended: exit code (minus a signal), what it printed, and what it took."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float
    stopped: str = ""


@dataclass
class Place:
    """A folder for one command: `work` is where it runs, `tmp` and `home` are its own."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (self.work, self.tmp, self.home):
            path.mkdir(parents=True, exist_ok=True)

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def home(self) -> Path:
        return self.root / "home"


def read_first(path: Path) -> str:
    """The beginning of what a command said; nothing where it was killed before it could say anything."""
    try:
        with path.open("rb") as file:
            return file.read(SHOWN).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


class Running:
    """A command line at work; :meth:`poll` until it has ended."""

    def __init__(self, argv: Sequence[str], place: Place, prepare: Callable[[], None] | None = None) -> None:
        self.place, self.began, self.stopped, self.peak = place, time.monotonic(), "", 0.0
        self._used, self._busy, self._seen = -1.0, self.began, self.began
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = _inside(list(argv), place, prepare)
            finally:
                os._exit(code)

    def poll(self) -> Ended | None:
        """What became of it, once it has ended; it is stopped beyond the limits."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            self._watch()
            return None
        self._sweep()
        self.peak = max(self.peak, usage.ru_maxrss / 1024)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGXCPU:
            self.stopped = f"more than {CPU_SECONDS} s of processor time"
        said = [read_first(self.place.root / name) for name in ("out", "err")]
        return Ended(code, *said, time.monotonic() - self.began, self.peak, self.stopped)

    def wait(self) -> Ended:
        while (ended := self.poll()) is None:
            time.sleep(0.005)
        return ended

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(self.pid, signal.SIGKILL)

    def _sweep(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def _watch(self) -> None:
        now = time.monotonic()
        if (asleep := now - self._seen - 1) > 0:  # this program was stopped meanwhile, as its commands may have been
            self.began, self._busy = self.began + asleep, self._busy + asleep
        self._seen = now
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            self.peak = max(self.peak, int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE / 2**20)
        except (OSError, IndexError):
            return
        used = sum(map(int, fields[11:15])) / TICK
        if used != self._used:
            self._used, self._busy = used, now
        if self.peak > MEMORY_MB:
            self.stopped = f"more than {MEMORY_MB} MB"
        elif now - self._busy > IDLE_SECONDS and fields[0] != "R":
            self.stopped = f"waits for ever ({IDLE_SECONDS} s without work)"
        elif now - self.began > WALL_SECONDS:
            self.stopped = f"more than {WALL_SECONDS} s"
        if self.stopped:
            self.kill()


def _inside(argv: list[str], place: Place, prepare: Callable[[], None] | None) -> int:
    """In the fork: become a fresh process as far as that goes, run, and say the exit code."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(place.root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))  # the machine survives what is noticed too late
    os.environ.update({"TMPDIR": str(place.tmp), "HOME": str(place.home), "XDG_CACHE_HOME": str(place.home / ".cache"), "COLUMNS": "200"})
    os.environ.update(place.environment)
    tempfile.tempdir = None
    import datasets

    datasets.config.HF_DATASETS_CACHE = place.home / ".cache" / "datasets"
    os.chdir(place.work)
    sys.argv = ["evlm", *argv]
    try:
        if prepare:
            prepare()
        from efficientvlm.cli.main import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the interpreter would print it and end with 1
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


Seen = dict[str, tuple[str, ...]]


def seen(folder: Path, *, times: bool = True) -> Seen:
    """Every name below a folder → kind, mode, and size and digest or where it points; a manifest counts with its `times` or without."""
    found: Seen = {}
    for parent, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(parent, name)
            found[os.path.relpath(path, folder)] = _look(path, times)
    return found


def _look(path: Path, times: bool) -> tuple[str, ...]:
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        return "link", os.readlink(path)
    about = (str(kind), oct(status.st_mode))
    if kind != stat.S_IFREG:
        return about
    if status.st_blocks * 512 + 4096 < status.st_size or status.st_size > 1 << 26:  # sparse, or large
        return *about, str(status.st_size), str(status.st_mtime_ns)
    try:
        content = path.read_bytes()
    except PermissionError:
        return *about, str(status.st_size), str(status.st_mtime_ns)
    if path.name == "evlm_manifest.json" and not times:
        with contextlib.suppress(ValueError):  # a damaged one counts as it is
            content = json.dumps({key: value for key, value in json.loads(content).items() if key not in OF_THE_RUN}).encode()
    return *about, hashlib.sha256(MINUTE.sub(b"", content)).hexdigest()
