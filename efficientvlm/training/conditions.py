"""Under which conditions a run trains, apart from what decides what is learnt: what changes while it is stopped is recorded."""

from __future__ import annotations

from typing import Any

import torch

from efficientvlm.checkpoints.manifest import Change
from efficientvlm.runtime import ranks
from efficientvlm.runtime.hardware import machine_of
from efficientvlm.settings.base import Strict
from efficientvlm.settings.compose import asides

HIDDEN = ("device",)  # a setting; the device that it came to be says more


def conditions(config: Strict, stage: str, device: torch.device) -> dict[str, Any]:
    """Settings of the stage that do not change what is learnt, and the machine as far as it decides how sums are rounded; JSON-ready."""
    machine = machine_of(device)
    return {
        **{name: getattr(config, name) for name in sorted(asides(stage).keys() & type(config).model_fields) if name not in HIDDEN},
        "device": device.type,
        "processor": machine["name"],
        "instructions": machine.get("instructions", "of the GPU"),
        "torch": machine["torch"],
        "threads": torch.get_num_threads(),
        "processes": ranks.world(),
    }


def changes(before: dict[str, Any], now: dict[str, Any], stage: str, step: int, steps: int) -> list[Change]:
    """What changed between two :func:`conditions` after `step` of `steps` steps; nothing where there were none before."""
    marks = {name: mark.same_bits for name, mark in asides(stage).items() if name not in HIDDEN}
    return [
        Change(step=step, what=name, before=before[name], now=now[name], same_bits=step == steps or marks.get(name, False))
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def described(change: Change) -> str:
    """A line for people."""
    bits = "" if change.same_bits else "; the weights are no longer those of an uninterrupted run to the bit, but up to rounding"
    return f"{change.what} is {change.now} instead of {change.before}{bits}"
