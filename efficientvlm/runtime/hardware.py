"""The processor, the device and the number format a model runs in."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from efficientvlm.errors import BadInput

CPUINFO = Path("/proc/cpuinfo")


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one.

    Raises:
        BadInput: unknown, or not in this machine.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, found in there.items() if found))
    if name not in there:
        raise BadInput(f"unknown device {name}", "", "use auto, cpu, cuda or mps")
    if not there[name]:
        raise BadInput(f"device {name} is not available", "torch sees no such GPU", "use --device cpu")
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 for `bf16` (weights stay float32), nothing for `fp32`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def processor() -> str:
    """Name of the processor as the system gives it."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def machine_of(device: torch.device) -> dict[str, Any]:
    """What the timings were taken on. Rented processors of one name differ in their `instructions`, and so in speed and rounding."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    found = {"device": device.type, "name": name, "cpus": os.cpu_count() or 0, "torch": torch.__version__}
    return found if device.type == "cuda" else {**found, "instructions": torch.backends.cpu.get_cpu_capability()}
