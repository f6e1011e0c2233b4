"""The resumable state of a training run: written as a whole, read by the main process, the same for any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from efficientvlm.checkpoints.files import fsync_dir, open_plain, read_limited, sha256, write_new
from efficientvlm.checkpoints.manifest import LARGEST_JSON, inside, parse_json
from efficientvlm.checkpoints.scratch import private_folder
from efficientvlm.errors import BadInput
from efficientvlm.runtime import ranks

TENSORS = "state.safetensors"
LONGEST_LINE = 2**20


@dataclass
class Spent:
    """What a training run took, interruptions included; `open_line` sums the metrics line that is not written yet.

    `conditions` are those it trained under last, `changes` what changed before (conditions.py); at step `begun` it went on last.
    """

    seconds: float = 0.0
    samples: int = 0
    steps: int = 0
    last: dict[str, float] = field(default_factory=dict)
    open_line: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    begun: int = 0


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
    """Write the state of a step as `step-N/` (tensors, then `state.json`, which knows their digest), then drop the older ones.

    The digests of other tensor files in `folder`, which the rest of the run will read, are kept with it.
    """
    target = folder / f"step-{spent.steps:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(unshared(tensors), temporary / TENSORS)
        with (temporary / TENSORS).open("rb+") as file:
            os.fsync(file.fileno())
        beside = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}
        values = {"step": spent.steps, **asdict(spent), "files": {f"{target.name}/{TENSORS}": sha256(temporary / TENSORS), **beside}}
        write_new(temporary / "state.json", json.dumps({**values, "digest": _digest(values)}).encode())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, room for what is written while the run ends
        raise
    _remove(target)
    temporary.rename(target)
    fsync_dir(folder)
    for old in folder.iterdir():
        if old.name.startswith("step-") and old != target:
            _remove(old)


def _digest(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _remove(state: Path) -> None:
    if state.is_dir() and not state.is_symlink():
        (state / "state.json").unlink(missing_ok=True)  # first: what is left of the state is no state any more
        shutil.rmtree(state, ignore_errors=True)
    else:
        state.unlink(missing_ok=True)


def restore(folder: Path, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int) -> Spent:
    """Load the newest complete state of `folder` into `objective` and `optimizers`; a fresh :class:`Spent` if there is none.

    Only the main process reads; the others are told. Nothing is changed before everything has been checked: digests, numbers, and the
    names, shapes and types of all tensors.

    Args:
        steps: of the whole run.

    Raises:
        BadInput: a state that is damaged, or does not fit this model or run.
    """
    tensors: dict[str, Tensor] = {}

    def read() -> dict[str, Any] | None:
        found = newest(folder)
        if found is None:
            return None
        try:
            spent = _read_spent(found, steps)
            with safe_open(found / TENSORS, "pt") as file:  # copied: a mapped file keeps its place on the disk when removed
                tensors.update((name, file.get_tensor(name).clone()) for name in file.keys())  # noqa: SIM118  it is no mapping
        except (BadInput, OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise _useless(found, error) from error
        shapes = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}
        return {"spent": asdict(spent), "tensors": shapes, "path": str(found)}

    shared = ranks.on_main(read)
    if shared is None:
        return Spent()
    for name, (kind, shape) in shared["tensors"].items():
        tensors[name] = ranks.agreed(tensors[name] if name in tensors else torch.empty(shape, dtype=getattr(torch, kind)))
    try:
        check(tensors, objective, optimizers)
        load(tensors, objective, optimizers)
    except (ValueError, KeyError, RuntimeError) as error:
        raise _useless(Path(shared["path"]), error) from error
    return Spent(**shared["spent"])


def _read_spent(state: Path, steps: int) -> Spent:
    """What `state.json` says, once its digest and those of the files it knows are right; ValueError or BadInput if not."""
    values = parse_json(read_limited(state / "state.json", LARGEST_JSON, "a state").decode())
    if not isinstance(values, dict) or values.get("digest") != _digest(values):
        raise ValueError("state.json is not as it was written")
    files = values["files"]
    if f"{state.name}/{TENSORS}" not in files:
        raise ValueError("state.json does not know its tensors")
    for name, digest in files.items():
        path = state.parent / inside(name)
        if path.is_symlink() or sha256(path) != digest:
            raise ValueError(f"{name} is not as it was written")
    try:
        known = {name: values[name] for name in asdict(Spent()) if name in values or name != "begun"}
        spent = TypeAdapter(Spent).validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        (first, *_) = error.errors()
        raise ValueError(f"state.json: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
    if not 0 < spent.steps <= steps or state.name != f"step-{spent.steps:08d}":
        raise ValueError(f"it is of step {spent.steps}, and the run has {steps}")
    if (
        spent.samples < 0
        or spent.seconds < 0
        or any(spent.open_line.get(f"n:{name.removeprefix('n:')}", 0) < 1 for name in spent.open_line)
    ):
        raise ValueError("it counts less than nothing")
    return spent


def newest(folder: Path) -> Path | None:
    """The last complete state in `folder`."""
    states = sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
    return states[-1] if states else None


def check(tensors: Mapping[str, Tensor], objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """ValueError unless names, shapes and types are those that :func:`tensors_of` gives for this model and these optimizers.

    An optimizer keeps nothing for a parameter that never had a gradient; for all others it keeps the same entries: `step`, a count, and
    the rest in the shape and type of the parameter.
    """
    wanted = {f"module/{name}": value for name, value in objective.state_dict().items()}
    entries: dict[tuple[int, int], set[str]] = {}
    for name, value in tensors.items():
        expected: Tensor | None = wanted.get(name)
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            number, index, entry = rest.split("/")
            parameters = (
                [p for group in optimizers[int(number)].param_groups for p in group["params"]] if int(number) < len(optimizers) else []
            )
            if 0 <= int(index) < len(parameters):
                entries.setdefault((int(number), int(index)), set()).add(entry)
                expected = torch.zeros(()) if entry == "step" else parameters[int(index)]
            if entry == "step" and not bool((value >= 0).all()):
                raise ValueError(f"{name} is no count")
        if expected is None:
            raise ValueError(f"{name} belongs to no tensor of this run")
        if (value.shape, value.dtype) != (expected.shape, expected.dtype):
            found, due = (f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)}" for item in (value, expected))
            raise ValueError(f"{name} is {found} instead of {due}")
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    for which in range(len(optimizers)):
        kept = [names for (owner, _), names in entries.items() if owner == which]
        if any(names != kept[0] for names in kept):
            raise ValueError(f"optimizer {which} has not kept the same for all parameters")


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
    why = f"{error.what}: {error.why}" if isinstance(error, BadInput) else (str(error).splitlines() or [type(error).__name__])[0]
    return BadInput(f"cannot resume from {state}", why, "use --no-resume to start again")


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of `path` beyond `step`, which the resumed run writes again."""
    if not os.path.lexists(path):
        return
    with open_plain(path) as file, private_folder(path.parent, path) as folder:
        with (folder / "content").open("xb") as kept:
            while line := file.readline(LONGEST_LINE):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.write(line.rstrip(b"\n") + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    break  # a line cut short by a crash, or filled with something else
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(folder / "content", path)
    fsync_dir(path.parent)
