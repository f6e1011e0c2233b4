"""The plan of a chain of stages: sizes, memory, steps, disk and time, and every problem of the inputs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from efficientvlm.control import Control
from efficientvlm.errors import number_of
from efficientvlm.planning import activations
from efficientvlm.planning.chain import Chain
from efficientvlm.planning.checks import Problems
from efficientvlm.planning.costs import add, process
from efficientvlm.planning.forecast import forecast
from efficientvlm.planning.parts import Forecast
from efficientvlm.recipe import Step
from efficientvlm.runtime.progress import say


@dataclass
class Plan:
    """What the stages would make and cost, and what keeps them from running."""

    stages: list[Forecast]
    problems: Problems
    disks: list[dict[str, Any]]

    @property
    def seconds(self) -> float | None:
        """Of all stages that train; None where one was not measured."""
        pending = [stage for stage in self.stages if stage.run is not None]
        if not pending or any(stage.time is None for stage in pending):
            return None
        return sum(stage.time["seconds"] for stage in pending if stage.time)

    def totals(self) -> dict[str, Any]:
        """Largest memory of a stage, disks, seconds of training, and the problems; JSON-ready."""
        return {
            "memory": max((stage.memory["total"] for stage in self.stages if stage.memory), default=0),
            "disks": self.disks,
            "seconds": self.seconds,
            "problems": [problem.as_dict() for problem in self.problems.found],
        }


def plan(steps: Sequence[Step], control: Control = Control(), *, measure: int = 0, verify: bool = False) -> Plan:
    """Plan `steps` in order. No weight file is opened and no picture is read; models are shapes on the meta device.

    Args:
        measure: run so many training steps of every stage that trains, on random weights, if nothing speaks against running it.
        verify: hash every file of the checkpoints that are read, and the data.
    """
    chain = Chain(control, verify)
    stages = [forecast(chain, step) for step in steps]
    own = process()
    for step, stage in zip(steps, stages, strict=True):
        if stage.memory and getattr(step.config, "device", "cpu") != "cuda":
            add(stage.memory, process=own)
    for stage in stages:
        if stage.run is not None and stage.memory is not None and stage.schedule is not None and not chain.problems.of_stage(stage.name):
            with chain.problems.of(stage.name):
                step_fullest = activations.training(stage.run, images_of(stage.schedule))
                add(stage.memory, activations=max(0, step_fullest - stage.memory["gradients"]))
    for stage in stages if measure and not chain.problems.found else ():
        if stage.run is not None and stage.schedule is not None and stage.memory is not None:
            from efficientvlm.planning.measure import measure as timed

            say(f"plan: measuring {number_of(measure, 'step')} of {stage.name}", quiet=control.quiet)
            stage.time = timed(stage.run, measure, total=stage.schedule["steps"])
    return Plan(stages, chain.problems, chain.disks.as_dicts())


def images_of(schedule: dict[str, Any]) -> int:
    """Images of a step in one process."""
    whole = min(schedule["batch_size"], schedule["images"] or schedule["batch_size"])
    return -(-int(whole) // int(schedule["processes"]))
