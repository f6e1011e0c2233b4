"""What a page relies on in manifests and results: files that anyone may have changed, so they are checked before they are drawn."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from efficientvlm.checkpoints.influence import Influence, Reach

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Group = Annotated[str, Field(pattern=r"^[^.]+\.\d{1,4}\.[^.]+$")]


class Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Total(Shape):
    total: Positive
    by_tower: dict[str, Count]


class Parameters(Total):
    without_embeddings: Count


class Macs(Total):
    image_size: int
    text_length: int


class Units(Shape):
    kept: Count
    of: Count


class Part(Shape):
    initial: Count
    kept: Count
    achieved: Number


class Sparsity(Part):
    by_tower: dict[str, Part]


class Accounting(Shape):
    """The counts of a model."""

    parameters: Parameters
    macs: Macs
    units: dict[Group, Units]
    sparsity: Sparsity
    reach: Reach | None = None


class Asked(Shape):
    target: Number
    achieved: Number
    expected: Number | None = None


class Kept(Shape):
    initial: Count
    kept: Count


class Counted(Shape):
    """What a budget counts."""

    budget: str
    by_tower: dict[str, Kept]
    after: Count | None = None
    to: Count | None = None
    whole: Count | None = None
    part: Number | None = None


class Extra(Shape):
    """What prune and shrink leave under `extra`."""

    budget: dict[str, Asked] | None = None
    cost: Counted | None = None
    layers: dict[str, list[Count]] | None = None
    influence: Influence | None = None


class Provenance(Shape):
    inputs: dict[str, str]
    created: str


class Data(Shape):
    name: str
    split: str
    fingerprint: str


class Eval(Shape):
    """A result of the eval stage, of any task."""

    stage: Literal["eval"]
    task: str
    data: Data
    metrics: dict[str, Any]
    provenance: Provenance


class Timed(Shape):
    model: str
    sha256: str
    trained: bool


class Latency(Shape):
    model: str
    batch: Positive
    median_ms: Number
    speedup: Number
    p10_ms: Number = 0.0
    p90_ms: Number = 0.0


class Machine(Shape):
    name: str
    threads: int


class Bench(Shape):
    """A result of the bench stage."""

    stage: Literal["bench"]
    timed: str
    precision: str
    text_length: int
    machine: Machine
    models: Annotated[list[Timed], Field(min_length=1)]
    latency: list[Latency]
    provenance: Provenance


RESULTS: dict[str, type[Shape]] = {"eval": Eval, "bench": Bench}
"""What a result is, by the stage that writes it."""


def fits(values: Any, shape: type[Shape]) -> bool:
    """Whether `values` have at least what `shape` says."""
    try:
        shape.model_validate(values)
    except ValidationError:
        return False
    return True
