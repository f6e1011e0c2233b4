"""The resumable state of a training run: written as a whole, read by the main process, the same for any number of processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from efficientvlm import ranks
from efficientvlm.errors import BadInput
from efficientvlm.files import fsync_dir, write_atomic


@dataclass
class Spent:
    """What a training run took, interruptions included; `open_line` sums the metrics line that is not written yet.

    `conditions` are those it trained under last, `changes` what changed before (conditions.py).
    """

    seconds: float = 0.0
    samples: int = 0
    steps: int = 0
    last: dict[str, float] = field(default_factory=dict)
    open_line: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)


def tensors_of(objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that training changes, on the CPU and whole: `module/NAME` and `optimizer/NUMBER/INDEX/ENTRY`.

    Where parameters are sharded, all processes call this together.
    """
    tensors = {f"module/{name}": whole(value) for name, value in objective.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{name}": whole(torch.as_tensor(value)) for name, value in entries.items()}
    return tensors


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU, gathered if its parts lie with several processes."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().cpu().contiguous()


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` for a safetensors file, which takes no tied ones: all names of one tensor but the first get a copy."""
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr() if value.numel() else 0
        apart[name] = value.clone() if place in seen else value
        seen |= {place} - {0}
    return apart


def save(folder: Path, tensors: Mapping[str, Tensor], spent: Spent) -> None:
    """Write the state of a step as `step-N/` (tensors, then `state.json`), then drop the older ones."""
    target = folder / f"step-{spent.steps:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(unshared(tensors), temporary / "state.safetensors")
        with (temporary / "state.safetensors").open("rb+") as file:
            os.fsync(file.fileno())
        write_atomic(temporary / "state.json", json.dumps({"step": spent.steps, **asdict(spent)}).encode())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for what is written while the run ends
        raise
    _remove(target)
    temporary.rename(target)
    fsync_dir(folder)
    for old in folder.glob("step-*"):
        if old != target:
            _remove(old)


def _remove(state: Path) -> None:
    (state / "state.json").unlink(missing_ok=True)  # first: what is left of the state is no state any more
    shutil.rmtree(state, ignore_errors=True)


def restore(folder: Path, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Spent:
    """Load the newest complete state of `folder` into `objective` and `optimizers`; a fresh :class:`Spent` if there is none.

    Only the main process reads; the others are told.

    Raises:
        BadInput: a state that does not fit this model.
    """
    tensors: dict[str, Tensor] = {}

    def read() -> dict[str, Any] | None:
        found = newest(folder)
        if found is None:
            return None
        try:
            content: dict[str, Any] = json.loads((found / "state.json").read_text("utf-8"))
            spent = asdict(Spent(**{name: content[name] for name in asdict(Spent())}))
            with safe_open(found / "state.safetensors", "pt") as file:  # copied: a mapped file keeps its place on the disk when removed
                tensors.update((name, file.get_tensor(name).clone()) for name in file.keys())  # noqa: SIM118  it is no mapping
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _useless(found, error) from error
        shapes = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}
        return {"spent": spent, "tensors": shapes, "path": str(found)}

    told = ranks.on_main(read)
    if told is None:
        return Spent()
    for name, (kind, shape) in told["tensors"].items():
        tensors[name] = ranks.agreed(tensors[name] if name in tensors else torch.empty(shape, dtype=getattr(torch, kind)))
    try:
        load(tensors, objective, optimizers)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _useless(Path(told["path"]), error) from error
    return Spent(**told["spent"])


def newest(folder: Path) -> Path | None:
    """The last complete state in `folder`."""
    states = sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
    return states[-1] if states else None


def load(tensors: Mapping[str, Tensor], objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put what :func:`tensors_of` gave back; ValueError, KeyError or RuntimeError if it does not fit."""
    objective.load_state_dict({name.removeprefix("module/"): value for name, value in tensors.items() if name.startswith("module/")})
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"optimizer/{number}/"):
                _, _, index, entry = name.split("/")
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _useless(state: Path, error: Exception) -> BadInput:
    return BadInput(f"cannot resume from {state}", str(error).splitlines()[0], "use --no-resume to start again")


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of `path` beyond `step`, which the resumed run writes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            break  # a line cut short by a crash, or filled with something else
    write_atomic(path, b"".join(kept))
