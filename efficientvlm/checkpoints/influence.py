"""What is on record about the influence of a model's inputs, in words; see `tasks/influence.py` for how it is measured. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MEASURING = ("prune", "finetune")  # stages that write down the influence of the inputs

Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Noted(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Input(Noted):
    """`outputs`: by output the part of the samples of which some bit changed; `said`: of the answers."""

    outputs: dict[str, Part] = Field(default_factory=dict)
    said: Part | None = None
    not_measured: str | None = None


class Influence(Noted):
    samples: int = 0
    inputs: dict[str, Input] = Field(default_factory=dict)
    not_measured: str | None = None

    def without(self) -> list[tuple[str, str]]:
        """(input, output) without any influence."""
        return [(name, output) for name, found in self.inputs.items() for output, part in found.outputs.items() if part == 0]

    def gaps(self) -> dict[str, str]:
        """What could not be measured → why."""
        whole = {"inputs": self.not_measured} if self.not_measured else {}
        return whole | {name: found.not_measured for name, found in self.inputs.items() if found.not_measured}

    def unheard(self) -> list[str]:
        """Inputs that change scores, but not one answer."""
        return [name for name, found in self.inputs.items() if found.said == 0 and any(found.outputs.values())]

    def summary(self) -> str:
        """By input how many of the answers change with it, or else of the outputs: `image 44 %, text 91 % of 32 answers`."""
        answers = any(found.said is not None for found in self.inputs.values())
        parts = []
        for name, found in self.inputs.items():
            changed = found.said if answers else max(found.outputs.values(), default=None)
            parts.append(f"{name} {'not measured' if changed is None else f'{changed:.0%}'}")
        return f"{', '.join(parts)} of {self.samples} {'answers' if answers else 'outputs'}" if parts else "not measured"


class Wasted(Noted):
    parameters: Part
    macs: Part


class Reach(Noted):
    """What the structure says; as :func:`efficientvlm.compression.reach.of_config` and `wasted` of an accounting."""

    reaches: dict[str, list[str]]
    cut_off: dict[str, list[str]]
    dead_towers: list[str]
    wasted: Wasted | None = None


T = TypeVar("T", bound=Noted)


def read(kind: type[T], value: Any) -> T | None:
    """A record of a manifest or result; None where there is none, or not of this form."""
    try:
        return kind.model_validate(value)
    except ValidationError:
        return None


def problems(influence: Influence | None, reach: Reach | None) -> list[str]:
    """What makes a model worthless: inputs without influence, measured or by the structure."""
    measured = influence.without() if influence else []
    found = [
        f"the {name} has no influence on the {output}: with that of another sample all is equal to the last bit"
        for name, output in measured
    ]
    for name, outputs in (reach.cut_off if reach else {}).items():
        found += [f"no path is left from the {name} to the {output}" for output in outputs if (name, output) not in measured]
    return found


def notes(influence: Influence | None, reach: Reach | None) -> list[str]:
    """What a reader ought to know besides: what changes no answer, what was not measured, what is carried along for nothing."""
    found = []
    if influence:
        found += [
            f"the {name} changes none of {influence.samples} answers, though it changes the scores behind them"
            for name in influence.unheard()
        ]
        found += [f"the influence of the {name} was not measured: {why}" for name, why in influence.gaps().items()]
    if reach and reach.dead_towers and reach.wasted:
        found.append(waste(reach.dead_towers, reach.wasted))
    return found


def waste(dead_towers: Sequence[str], wasted: Wasted) -> str:
    """How much influences nothing, in words."""
    towers = " and ".join(dead_towers)
    return f"{wasted.parameters:.1%} of the parameters and {wasted.macs:.1%} of the multiply-adds influence nothing: {towers}"
