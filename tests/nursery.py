"""Runs of stages in processes of their own, forked from one that has imported everything: they may be killed, and started by the dozen.

The server they are forked from has done nothing with torch yet, so that its children may do anything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from conftest import run_stage
from safetensors.torch import load_file, save_file
from torch import Tensor

STAGES = ("prune", "learning", "shrink", "import_", "evaluate", "embed", "select_sentences")
PRELOAD = ["nursery", *(f"efficientvlm.stages.{name}" for name in STAGES)]
Run = list[ForkServerProcess]


@cache
def context() -> ForkServerContext:
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(PRELOAD)
    return chosen


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(stage: str, *, processes: int = 1, fault: tuple[str, Any] | None = None, **settings: Any) -> Run:
    """Begin a stage; `fault` names a function of this module that breaks something in the child first, and its argument."""
    port = free_port()
    return _begin(_child, [(stage, settings, rank, processes, port, fault) for rank in range(processes)])


def _begin(function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> Run:
    here = str(Path(__file__).parent)
    with environment(PYTHONPATH=os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"):
        run = [context().Process(target=function, args=given) for given in arguments]
        for process in run:
            process.start()
    return run


def at_once(function: Callable[[int], dict[str, Tensor]], out: Path, processes: int = 2) -> list[dict[str, Tensor]]:
    """What `function(rank)`, of a module, gives in each of several processes that compute together; `out` is for their files."""
    port = free_port()
    assert finish(_begin(_computed, [(function, rank, processes, port, out) for rank in range(processes)])) == [0] * processes
    return [load_file(out / f"{rank}.safetensors") for rank in range(processes)]


def _computed(function: Callable[[int], dict[str, Tensor]], rank: int, processes: int, port: int, out: Path) -> None:
    from efficientvlm.runtime import ranks

    _join(rank, processes, port)
    ranks.start()
    save_file({name: value.detach().clone().contiguous() for name, value in function(rank).items()}, out / f"{rank}.safetensors")
    ranks.end(0)


def _join(rank: int, processes: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def finish(run: Run, timeout: float = 120) -> list[int | None]:
    """Exit codes of all processes of a run; a signal is its negative number, None a process that hung and was killed."""
    for process in run:
        process.join(timeout)
    codes = [process.exitcode for process in run]
    for process in run:
        process.kill()
        process.join()
    return codes


def whole(stage: str, **settings: Any) -> None:
    """Run a stage to its end."""
    assert finish(start(stage, **settings)) == [0] * settings.get("processes", 1)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _child(stage: str, settings: dict[str, Any], rank: int, processes: int, port: int, fault: tuple[str, Any] | None) -> None:
    import torch

    from efficientvlm.errors import EvlmError
    from efficientvlm.runtime import ranks

    torch.set_num_threads(1)
    if processes > 1:
        _join(rank, processes, port)
    if fault:
        globals()[fault[0]](fault[1])
    code = 0
    try:
        run_stage(stage, **settings)
    except EvlmError as error:
        code = error.exit_code
        Path(f"{settings['out']}.error-{rank}").write_text(f"{error.what}\n{error.why}\n{error.fix}\n")
    except KeyboardInterrupt:
        code = 130
    ranks.end(code)
    raise SystemExit(code)


CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "open")


def dies_at(number: int) -> None:
    """End this process, as kill -9 would, instead of its `number`th call that changes a file or folder; write down how often they come."""
    count = 0

    def deadly(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > number:
                os._exit(137)
            return function(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def _before_step(action: Callable[[int], None]) -> None:
    from efficientvlm.training import loop as training

    real = training.rate

    def rate(step: int, *rest: Any) -> float:
        action(step)
        return real(step, *rest)

    training.rate = rate


def stops_at(steps: list[int]) -> None:
    """Ask this process politely to stop while the gradients of the given steps are computed."""
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step in steps else None)


def stops_one(which: list[int]) -> None:
    """As `stops_at`, in one process of several: [rank, step]."""
    if int(os.environ["RANK"]) == which[0]:
        stops_at(which[1:])


def saves_always(_: None) -> None:
    """A selection of sentences saves its state behind every batch."""
    from efficientvlm.stages import select_sentences

    select_sentences.SAVE_EVERY = -1.0


def in_phase(which: tuple[str, str]) -> None:
    """In a phase ("training", "validation") this process is killed, or gets no more memory."""
    from efficientvlm.stages import common

    phase, what = which
    real = common.enough_memory

    @contextlib.contextmanager
    def enough_memory(now: str, *rest: Any) -> Iterator[None]:
        with real(now, *rest):
            if now == phase and what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if now == phase:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
                )
            yield

    common.enough_memory = enough_memory


def never_trains(_: None) -> None:
    """No step may be taken."""

    def refuse(step: int) -> None:
        raise AssertionError(f"trains at step {step}")

    _before_step(refuse)


def waits_at(which: tuple[int, str]) -> None:
    """Wait at a step for a file."""
    step_of_pause, path = which

    def wait(step: int) -> None:
        while step == step_of_pause and not Path(path).exists():
            time.sleep(0.01)

    _before_step(wait)


def small_files(which: tuple[int | None, int]) -> None:
    """From a step on, or from the start (None), no file may grow beyond so many bytes."""
    first, size = which
    if first is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    else:
        _before_step(lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)) if step == first else None)


def lives_in(folders: list[str]) -> None:
    """Every process has a working directory of its own, as on machines without a common file system."""
    os.chdir(folders[int(os.environ["RANK"])])


def fails_on(rank: int) -> None:
    """One process cannot read its first sample."""
    from efficientvlm.data import plan
    from efficientvlm.errors import BadInput
    from efficientvlm.runtime import ranks

    def broken(*_: Any) -> None:
        raise BadInput("sample 3 is unreadable", "it is torn", "mend it")

    if ranks.rank() == rank:
        plan.IndexPlan.batch = broken  # type: ignore[assignment, method-assign]


def loses_a_worker_at(step: int) -> None:
    """One of the processes that read pictures is killed before a step."""

    def kill(now: int) -> None:
        if now == step:
            worker = min(members(os.getpid()) - {os.getpid()})
            os.kill(worker, signal.SIGKILL)

    _before_step(kill)


def members(run: int) -> set[int]:
    """The process `run`, its children and all that is of its session, as far as they run."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,sid=,stat="], capture_output=True, text=True).stdout.splitlines()
    found = (row.split()[:4] for row in rows)
    return {int(pid) for pid, parent, session, state in found if str(run) in (pid, parent, session) and not state.startswith("Z")}
