"""Several processes on one model: what one of them does for all, and what they compute together.

`torchrun` starts the processes and numbers them. With a single process nothing here communicates. Values that are told to the other
processes travel as JSON, never as pickles.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from efficientvlm import errors
from efficientvlm.errors import BadInput, EvlmError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # how long a process waits for one that evaluates or writes; one that dies is noticed at once
FAREWELL = timedelta(seconds=20)
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENDED = "evlm: the main process has ended"

_alone = 0
_store: Any = None


def launched() -> int:
    """How many processes were started.

    Raises:
        BadInput: `WORLD_SIZE` or `LOCAL_RANK`, which the launcher sets, is no such number; accelerate reads both.
    """
    _number("LOCAL_RANK", -1, least=-1)
    return _number("WORLD_SIZE", 1, least=1)


def rank() -> int:
    """The number of this process, from 0."""
    return _number("RANK", 0) if launched() > 1 else 0


def _number(variable: str, default: int, least: int = 0) -> int:
    text = os.environ.get(variable, "").strip()
    if text and not (text.removeprefix("-").isdecimal() and least <= int(text) < 2**31):
        raise BadInput(f"{variable} is {text!r}", "torchrun sets this variable to a number", "unset it, or start with torchrun")
    return int(text or default)


def is_main() -> bool:
    """Whether this is the process that reads and writes the output folder and prints."""
    return rank() == 0


def world() -> int:
    """How many processes take part in what is being computed: one while the main process works alone."""
    return 1 if _alone else launched()


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute by itself what all of them compute together otherwise."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def start() -> None:
    """Connect the processes, once; :class:`BadInput` where they were not started by `torchrun`.

    A variable of the launcher that is empty counts as one that is not set, for the libraries that read it after us too.
    """
    global _store
    for variable in VARIABLES:
        if not os.environ.get(variable, "unset").strip():
            del os.environ[variable]
    from torch import distributed as dist

    if launched() == 1 or dist.is_initialized():
        return
    import torch

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    try:
        _store, number, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise BadInput(
            f"WORLD_SIZE is {launched()}, but the processes do not find one another", str(error).splitlines()[0], "start them with torchrun"
        ) from None


def end(code: int) -> bool:
    """Disconnect, before this process exits with `code`. Returns whether it has to report its failure itself.

    torchrun stops all processes when one fails, so the others leave the last word to the main process.
    """
    global _store
    from torch import distributed as dist

    store, _store = _store, None
    report = code != 0
    if store is not None:
        try:
            if is_main():
                store.set(ENDED, "")
            else:
                store.wait([ENDED], FAREWELL)
                report = False
        except RuntimeError:  # the main process is stuck, or gone with the store
            pass
    if dist.is_initialized() and code != 1:  # after an unexpected error a collective may be pending, for which this would wait
        dist.destroy_process_group()
    return report


def leave(code: int) -> NoReturn:
    """Exit, one of several processes, once the functions registered with `atexit` have run; other threads are not waited for.

    The interpreter is not taken down: DDP keeps the process group beyond its end, and a thread of gloo that lets go of its last tensor
    while that happens aborts the process.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # full or closed by what has just run: the code says how the work went
            print(end="", file=stream, flush=True)
    os._exit(code)


def tell(value: Any, source: int = 0) -> Any:
    """`value` (JSON) of process `source`, on every process."""
    if world() == 1:
        return value
    import torch
    from torch import distributed as dist

    ours = source == rank()
    data = bytearray(json.dumps(value).encode()) if ours else bytearray()
    size = torch.tensor([len(data)])
    dist.broadcast(size, source)
    buffer = torch.frombuffer(data, dtype=torch.uint8) if ours else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(buffer, source)
    return value if ours else json.loads(bytes(buffer.tolist()))


def on_main(function: Callable[[], T], read: Callable[[Any], T] = lambda value: value) -> T:
    """What `function` returns, run by the main process while the others wait; an error it raises is raised by all.

    The value is JSON or a pydantic model; the other processes get what `read` makes of the JSON.
    """
    if world() == 1:
        return function()
    start()
    value: Any = None
    failure: BaseException | None = None
    if is_main():
        try:
            with alone():
                value = function()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again below, once the others know
            failure = error
    plain = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    answer = tell({"value": plain, "error": described(failure)})
    if failure is not None:
        raise failure
    if answer["error"]:
        raise rebuilt(answer["error"])
    return value if is_main() else read(answer["value"])


def together(function: Callable[[], T]) -> T:
    """`function()` on every process; if it fails on some, all raise the error of the first of them."""
    if world() == 1:
        return function()
    import torch
    from torch import distributed as dist

    start()
    failure: BaseException | None = None
    value: Any = None
    try:
        value = function()
    except Exception as error:  # noqa: BLE001 - raised again below, by all
        failure = error
    first = torch.tensor([rank() if failure else launched()])
    dist.all_reduce(first, dist.ReduceOp.MIN)
    source = int(first)
    if source == launched():
        return value
    told = tell(described(failure), source)
    if failure is not None and source == rank():
        raise failure
    raise rebuilt(told)


def described(error: BaseException | None) -> list[str] | None:
    """An error as text, for another process."""
    if error is None:
        return None
    if isinstance(error, EvlmError):
        return [type(error).__name__, error.what, error.why, error.fix]
    return [type(error).__name__, f"another process failed: {type(error).__name__}", " ".join(str(error).split()), ""]


def rebuilt(described: list[str]) -> BaseException:
    """The error that :func:`described` has described."""
    name, *parts = described
    if name == "KeyboardInterrupt":
        return KeyboardInterrupt()
    kind = getattr(errors, name, EvlmError)
    return kind(*parts) if isinstance(kind, type) and issubclass(kind, EvlmError) else EvlmError(*parts)


def any_of(flag: bool) -> bool:
    """Whether `flag` is set on any process."""
    if world() == 1:
        return flag
    import torch
    from torch import distributed as dist

    found = torch.tensor([int(flag)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def share_of(count: int | Tensor) -> Any:
    """What a sum over the items of this process is divided by, so that the *mean over the processes* is the mean over all items.

    That is the count of all processes over their number, at least one item in all. DDP and FSDP average gradients over the processes, so a
    loss of this form has the gradient of one process with the whole batch.
    """
    import torch

    if world() == 1:
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(1, count)
    from torch import distributed as dist

    total = torch.as_tensor(count).detach().to(torch.float64, copy=True)
    dist.all_reduce(total)
    return (total.clamp(min=1) / world()).float()


def mean(values: Tensor) -> Tensor:
    """The mean of `values` in the sense of :func:`share_of`."""
    return values.mean() if world() == 1 else values.sum() / share_of(values.numel())


def averaged(values: Tensor) -> Tensor:
    """The mean over the processes of a tensor of equal shape on all; no gradient."""
    if world() == 1:
        return values.detach()
    from torch import distributed as dist

    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world()


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over the processes, as DDP does."""
    for parameter in parameters:
        if world() > 1 and parameter.grad is not None:
            parameter.grad = averaged(parameter.grad)


def agreed(values: Tensor) -> Tensor:
    """The main process's tensor, of equal shape and type on all."""
    if world() > 1:
        from torch import distributed as dist

        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


def longest(length: int) -> int:
    """The largest of the processes' numbers."""
    if world() == 1:
        return length
    import torch
    from torch import distributed as dist

    found = torch.tensor([length])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
