"""Work on data that processes of their own do ahead of its use: the same results, in the same order, for any number of them.

Workers are forks (torch's `DataLoader` runs them), so they have all that the process has that they work for, and nothing of theirs comes
back but results and what they tell to :mod:`data.ledger`. They need neither a GPU nor the network, and must not communicate with the other
processes of a run. None outlives the process it works for, whichever way that one ends.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import connection
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from efficientvlm.data import ledger
from efficientvlm.data.opening import usable
from efficientvlm.data.packing import packed, unpacked
from efficientvlm.errors import BadInput, EvlmError
from efficientvlm.runtime import ranks

MOST = 8
"""Workers that `auto` takes at most."""
AHEAD = 2
"""Results that every worker makes ahead."""
PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl

Workers = Literal["auto"] | int
Job = TypeVar("Job")
Made = TypeVar("Made")


def forks() -> bool:
    """Whether workers can be had: elsewhere a new process begins with nothing, or a fork of this one is not safe."""
    return sys.platform == "linux"


def cores() -> int:
    """Processor cores that each process of a run may use."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "").strip()
    return max(1, there // max(1, int(beside) if beside.isdecimal() else ranks.launched()))


def how_many(asked: Workers, device: torch.device) -> int:
    """How many workers are taken: as asked, or with `auto` one a core that nothing else keeps busy, at most eight.

    On a GPU that is all cores but one; on the CPU those that torch has no thread for, by default none.

    Raises:
        BadInput: some are asked for on a system where there are none.
    """
    if asked == "auto":
        busy = torch.get_num_threads() if device.type == "cpu" else 1
        return max(0, min(MOST, cores() - busy)) if forks() else 0
    if asked and not forks():
        raise BadInput(f"workers {asked}", "only on Linux pictures are read by processes of their own", "use --workers 0")
    return asked


def usable_batches(source: Any, starts: range, count: int) -> Iterator[list[Any]]:
    """For each of `starts` the samples from there to the next one, of the first `count`, that can be read; by `source.workers` processes.

    They come in order, and empty lists do too.
    """

    def read(start: int) -> list[Any]:
        return usable(source, range(start, min(count, start + starts.step)))

    with Ahead(read, starts, workers_of(source)) as batches:
        yield from batches


def workers_of(source: Any) -> int:
    """By how many processes a source is read, as the stage has noted in it; none where it is read by the one that uses it (`by_one`)."""
    return 0 if getattr(source, "by_one", False) else int(getattr(source, "workers", 0))


class Ahead(Generic[Job, Made]):
    """`make(job)` for every job, in order: by `workers` processes, which are up to two results each ahead, or without any by this one.

    `make` must depend on the job alone. Its results may hold arrays, tensors of the CPU and plain values, see `data.packing`; with `pin`
    tensors are copied to a GPU without waiting. An :class:`EvlmError` of `make` is raised where its result would have come.

    Leaving it as a context ends the workers, after at most one sample; so does the last result.
    """

    def __init__(self, make: Callable[[Job], Made], jobs: Iterable[Job], workers: int = 0, *, pin: bool = False) -> None:
        if workers and isinstance(jobs, Sequence):
            workers = min(workers, len(jobs)) if len(jobs) > 1 else 0
        self.workers = workers
        self._halt: Any = None
        self._results: Any = _forked(self, make, jobs, pin) if workers else map(make, jobs)

    def __iter__(self) -> Iterator[Made]:
        return self

    def __next__(self) -> Made:
        """
        Raises:
            RuntimeError: a worker was killed; `runtime.memory.enough_memory` says so in words.
        """
        if not self.workers:
            made: Made = next(self._results)
            return made
        try:
            result: _Result = next(self._results)
        except (ConnectionError, EOFError):  # of fetching the result of a worker that died meanwhile
            try:
                _check_alive(self._results)
            finally:
                self.close()
            raise
        except BaseException:  # the last one, a dead worker or a signal
            self.close()
            raise
        ledger.enter(result.entries)
        if result.failure:
            self.close()
            raise ranks.rebuilt(result.failure)
        found: Made = unpacked(result.buffer, result.rest)
        return found

    def __enter__(self) -> Ahead[Job, Made]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they have made and nobody has asked for is lost, and so is what they counted in it."""
        results, self._results = self._results, iter(())
        if self._halt is not None:
            self._halt.value = 1
            self._halt = None
            with suppress(RuntimeError):  # one that was killed has been told
                results._shutdown_workers()


class _Result:
    """What a worker sends: a result or a failure, and what it told."""

    def __init__(self, buffer: torch.Tensor, rest: Any, entries: list[ledger.Entry], failure: list[str] | None) -> None:
        self.buffer, self.rest, self.entries, self.failure = buffer, rest, entries, failure

    def pin_memory(self) -> _Result:
        self.buffer = self.buffer.pin_memory()
        return self


class _Halted(Exception):
    """Nobody waits for the result any more."""


_halt: Any = None
_running: WeakSet[Ahead[Any, Any]] = WeakSet()


def wanted(parts: Iterable[Job]) -> Iterator[Job]:
    """`parts`, one after another; in a worker that is to end, no more of them."""
    for part in parts:
        if _halt is not None and _halt.value:
            raise _Halted
        yield part


class _Work(Dataset[_Result]):
    """Makes results in a worker."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, job: Any) -> _Result:
        failure = None
        made: Any = None
        buffer = torch.empty(0, dtype=torch.uint8)
        try:
            buffer, made = packed(self.make(job))
        except _Halted:
            pass
        except EvlmError as error:
            failure = ranks.described(error)
        return _Result(buffer, made, ledger.told(), failure)


def _forked(owner: Ahead[Any, Any], make: Callable[[Any], Any], jobs: Iterable[Any], pin: bool) -> Any:
    """The iterator of a `DataLoader` whose workers have begun."""
    fork = multiprocessing.get_context("fork")
    owner._halt = halt = fork.RawValue("b", 0)
    parent = os.getpid()
    with _tokenizers_alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks of a process with threads, and of more workers than cores
        loader: DataLoader[Any] = DataLoader(
            _Work(make),
            batch_size=None,
            sampler=jobs,
            num_workers=owner.workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            pin_memory=pin,
            worker_init_fn=lambda number: _begin(parent, halt),
            multiprocessing_context=fork,
            generator=torch.Generator(),  # so that nothing is drawn from torch's own
        )
        results = iter(loader)
    _running.add(owner)
    return results


def _check_alive(results: Any) -> None:
    """RuntimeError, in torch's words, if a worker ends within a second; torch itself may be the first to say so."""
    workers = {worker.sentinel: worker for worker in getattr(results, "_workers", ())}
    for sentinel in connection.wait(list(workers), timeout=1):
        worker = workers[sentinel]
        worker.join()  # its files are closed before it is gone
        code = worker.exitcode
        how = f"is killed by signal: {signal.strsignal(-code)}" if code < 0 else f"exited unexpectedly with exit code {code}"
        raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}.")


def _as_it_is(value: Any) -> Any:
    return value


def _begin(parent: int, halt: Any) -> None:
    """What a worker does first: signals that are meant for the run are left to the process it works for, and it dies with that one."""
    global _halt
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # without it a worker notices within five seconds
        ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    names = count()  # of sockets over which results are fetched: without a file, which would be left behind by a kill
    connection.arbitrary_address = lambda family: f"\0evlm-{os.getpid()}-{next(names)}"  # type: ignore[attr-defined]
    gc.freeze()  # looking through what is shared would copy it
    _halt = halt
    ledger.work_for_another()


@contextmanager
def _tokenizers_alone() -> Iterator[None]:
    """Keep fast tokenizers from warning that they use one thread after a fork."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ[name] = before or "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _close_all() -> None:
    for ahead in list(_running):
        ahead.close()


atexit.register(_close_all)
