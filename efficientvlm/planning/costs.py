"""Bytes a stage needs, in memory and on disk, by formulas from the number of elements (ours); `activations.py` has the rest."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.files import expanded
from efficientvlm.errors import BadInput

FLOAT = 4  # weights, gradients and optimizer states are float32, with bf16 autocast too
MOMENTS = 2  # of AdamW


def elements(model: Any) -> int:
    """Elements of the weights file: every tensor of the state dict, tied ones once."""
    tensors = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensors.values())


def trainable(model: Any) -> int:
    """Elements of the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def memory(
    model: Any, teacher: Any = None, *, gates: int = 0, training: bool = False, processes: int = 1, spread: bool = False
) -> dict[str, int]:
    """Bytes of one process by purpose, without activations.

    Training adds a gradient and AdamW's two moments an element, and with several processes the buckets in which gradients are exchanged. A
    gate has its value, gradient and moments too. With `spread` parameters (FSDP) a process has its part of the moments; a step still holds
    all parameters and gradients, beside the process's own parts of them.
    """
    parts = {"weights": FLOAT * elements(model)}
    if training:
        learnt = trainable(model)
        own = -(-learnt // processes) if spread else learnt
        parts |= {"gradients": FLOAT * learnt, "optimizer": MOMENTS * FLOAT * own}
        if gates:
            parts["gates"] = (2 + MOMENTS) * FLOAT * gates
        if processes > 1:
            parts["exchange"] = FLOAT * (learnt + 2 * own if spread else learnt)
    if teacher is not None:
        parts["teacher"] = FLOAT * elements(teacher)
    return {**parts, "total": sum(parts.values())}


def process() -> int:
    """Bytes of this process, which has loaded what every stage loads: the interpreter, its packages, the tables of the data, no weights."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource  # not on Windows, which has no /proc either

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add(memory: dict[str, int], **parts: int) -> None:
    """Put more `parts` into `memory`, or others in the place of those that are there, with their `total`."""
    memory |= parts
    memory["total"] = sum(count for part, count in memory.items() if part != "total")


def main_memory() -> int | None:
    """Bytes of memory in this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def too_much(setting: str, kept: int) -> BadInput | None:
    """What is wrong with keeping so many bytes of a teacher's outputs on this machine, as `setting` asks."""
    there = main_memory()
    if there is None or kept <= there:
        return None
    return BadInput(f"{setting} takes too much memory", f"up to {size(kept)} would be kept; this machine has {size(there)}", "leave it out")


def disk(
    output: Any, *, trained: Any = None, gates: int = 0, averages: int = 0, dense: bool = False, recut: bool = False
) -> dict[str, int]:
    """Bytes of the finished folder and, while the stage runs, at its fullest.

    Args:
        output: the model that is written.
        trained: the model that is trained, if one is: its state (weights and two moments) is on disk, twice while a new one replaces it.
        averages: elements that the objective keeps beside the model, in the state too.
        gates, dense: gates, and whether the uncut weights are written beside the output.
        recut: the uncut weights are copied from another run, not kept in a state first.
    """
    uncut = FLOAT * elements(trained) if dense and trained is not None else 0
    folder = FLOAT * (elements(output) + gates) + uncut
    if trained is None or recut:
        return {"output": folder, "state": 0, "peak": folder}
    state = FLOAT * (elements(trained) + MOMENTS * trainable(trained) + (1 + MOMENTS) * gates + averages)
    return {"output": folder, "state": state, "peak": max(2 * state, state + folder) + uncut}


class Disks:
    """What stages in order need on the filesystems they write to."""

    def __init__(self) -> None:
        self.written: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        self.free: dict[int, tuple[str, int]] = {}

    def add(self, out: str, output: int, peak: int) -> None:
        """Book a stage that writes `output` bytes into `out`, and `peak` at its fullest.

        Raises:
            BadInput: more than is free, with what earlier stages leave there, or no place for files at all.
        """
        folder = _existing(out)
        device = os.stat(folder).st_dev
        before = self.written.get(device, 0)
        self.written[device] = before + output
        self.peak[device] = max(self.peak.get(device, 0), before + peak)
        disk = shutil.disk_usage(folder)
        if not disk.total or not os.access(folder, os.W_OK):
            raise BadInput(f"{out} cannot be written", f"{folder} takes no files", "use another --out")
        place, free = self.free.setdefault(device, (str(folder), disk.free))
        if before + peak > free:
            earlier = f", {size(before)} of them for earlier stages" if before else ""
            why = f"{size(before + peak)} are needed at the fullest{earlier}; {size(free)} are free in {place}"
            raise BadInput(f"{out} has too little space", why, "free some, or use another --out")

    def as_dicts(self) -> list[dict[str, Any]]:
        return [
            {"folder": folder, "peak": self.peak[device], "left": self.written[device], "free": free}
            for device, (folder, free) in self.free.items()
        ]


def _existing(out: str) -> Path:
    """`out`, or the nearest folder above it that is there."""
    path = expanded(out).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def size(count: float) -> str:
    """A number of bytes with a unit: 1.27 GiB."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} bytes"
