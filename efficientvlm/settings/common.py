"""Settings that many stages have: where the result goes, where samples come from, how long and how fast is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator, field_validator

from efficientvlm.settings.base import Aside, Count, DataName, Device, Pixels, Precision, Seed, Size, Strict

MOST_WORKERS = 256


def _workers(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    if value == "auto" or (isinstance(value, int) and 0 <= value <= MOST_WORKERS):
        return value
    raise ValueError(f"it is auto, or a number of processes from 0 to {MOST_WORKERS}")


Workers = Annotated[Literal["auto"] | int, WrapValidator(_workers), Aside()]


class Train(Strict):
    """How long and how fast; one set of names for every training stage."""

    epochs: float = Field(1.0, gt=0, le=1_000_000, description="passes over the images")
    max_steps: Count | None = Field(None, ge=1, description="length of the schedule in steps, instead of epochs")
    batch_size: Count = Field(64, ge=1, description="images a step, over all processes")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant", "exponential"] = Field(
        "linear", description="decay to 0 after warm-up; exponential: by a factor after every epoch"
    )
    decay: float = Field(0.9, gt=0, le=1, description="exponential: that factor, for as many equal parts of the run as it has epochs")
    warmup: float = Field(0.1, ge=0, le=1, description="fraction of all steps")
    warmup_steps: Count | None = Field(None, ge=0, description="length of the warm-up in steps, instead of a fraction")
    lr_end: float = Field(0.0, ge=0, lt=1, description="linear and cosine: fraction of `lr` that they end at")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW: how slowly its mean of squared gradients forgets")
    weight_decay: float = Field(0.01, ge=0, description="none on biases and norms")
    new_lr_mult: float = Field(2.0, gt=0, description="learning-rate factor of newly initialised tensors")
    clip: float | None = Field(1.0, gt=0, description="global gradient norm")
    parallel: Annotated[Literal["ddp", "fsdp"], Aside(same_bits=False)] = Field(
        "ddp", description="over several processes: a copy of everything in each, or spread over them"
    )
    freeze: list[str] = Field([], description="towers whose weights stay as they are")
    augment: Literal["none", "light", "paper", "crop"] = Field(
        "light",
        description="light: flip and shift; paper: crop, flip, RandAugment; crop: a random part of the picture, which is as large as the "
        "model reads and a seventh more, resized, and flip, as CLIP and DIME-FM are published",
    )
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="crop: least and most part of the area")
    mirror: bool | None = Field(
        None,
        description="augmentation mirrors half of the images, less those whose texts hold left, right, leftmost, rightmost, leftward(s), "
        "rightward(s) or (counter, anti)clockwise; by default of the built-in data alone",
    )
    log_every: Annotated[Count, Aside()] = Field(20, ge=1, description="steps a metrics line")
    save_every: Annotated[Count, Aside()] = Field(200, ge=1, description="steps a resumable state")
    eval_limit: Annotated[Count | None, Aside()] = Field(
        None, ge=0, description="validation images read at the end, drawn at random; by default all, in pre-training 16 batches; 0: none"
    )
    eval_batch_size: Annotated[Count | None, Aside()] = Field(
        None, ge=1, description="validation images at a time; by default 100 with questions, 64 with captions, batch_size in pre-training"
    )

    @field_validator("crop_scale")
    @classmethod
    def _parts_of_its_augmentation(cls, scale: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("it is a least and a most part, above 0 and up to 1")
        if scale != cls.model_fields["crop_scale"].default and info.data.get("augment", "crop") != "crop":
            raise ValueError("it goes with augment crop")
        return scale

    @field_validator("decay")
    @classmethod
    def _of_its_schedule(cls, decay: float, info: ValidationInfo) -> float:
        if decay != cls.model_fields["decay"].default and info.data.get("schedule", "exponential") != "exponential":
            raise ValueError("it goes with schedule exponential")
        return decay

    def steps(self, per_epoch: int) -> int:
        """Length of the schedule, where an epoch has `per_epoch` steps."""
        return self.max_steps or max(1, round(self.epochs * per_epoch))


class Read(Strict):
    """How pictures are read."""

    workers: Workers = Field(
        "auto",
        description="processes that read pictures ahead of their use, with the same result for any number; 0: none; auto: one a core that "
        "nothing else keeps busy, at most 8, so on the CPU those that torch has no thread for, by default none",
    )


class Samples(Strict):
    """How samples are read, and how many of them."""

    columns: dict[str, str] = Field(default_factory=dict, description="role → column name, e.g. question=text")
    val_fraction: float = Field(0.1, ge=0, lt=1)
    limit: Count | None = Field(None, ge=1, description="use only so many images, drawn at random; of a stream the first rows")
    max_bad: Annotated[Count | None, Aside()] = Field(
        None, ge=0, description="samples that may be skipped as unusable; by default 1 in 100, of a stream 100"
    )


class Data(Samples):
    """Where samples come from."""

    data: DataName = Field(
        description="easy-vqa, shapes[:key=value,...], a file, a pattern of shards, a folder, hub:NAME, or stream: before one"
    )
    val: Annotated[DataName | None, Aside()] = Field(None, description="validation data; by default a held-out part of the training images")
    shuffle_buffer: Count = Field(1000, ge=1, description="samples that a stream draws from at random; 1 keeps its order")


class Machine(Strict):
    """What computes, and what all draws follow from."""

    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "fp32"


class Stage(Machine):
    """A stage that writes a checkpoint."""

    out: str


class OnTask(Strict):
    """A stage that learns or measures a task. What only the task knows is in its class in `tasks.py`."""

    task: str

    @classmethod
    def task_of(cls, values: Mapping[str, Any]) -> Any:
        """The task that settings as given are for; None where they leave it to what the stage reads."""
        return values.get("task", cls.model_fields["task"].default)


class Learning(OnTask, Stage, Data, Train, Read):
    """A stage that trains."""

    model: str
    image_size: Pixels | None = Field(
        None, ge=8, description="side of the images from now on, tables of positions are resized; by default as the model reads them"
    )
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")

    @property
    def keeps_teacher(self) -> str:
        """The setting by which what a teacher says is kept in memory; empty where it is not."""
        return ""

    def fullest(self) -> dict[str, Any]:
        """Settings with which a step surely holds as much as the fullest one does with these."""
        return {}


class Taught(Learning):
    """A stage that trains, by a teacher if there is one. What only a method of distillation knows is in its classes in `methods.py`."""

    teacher: str | None = None
    distillation: str = Field("efficientvlm", description="method by which the student follows its teacher")
    teacherless: ClassVar[bool] = False
    """Whether the method can do without the teacher's network."""

    @property
    def taught(self) -> bool:
        """Whether there is a teacher, or what stands for it."""
        return bool(self.teacher)


class Repeatable(Taught):
    """A method whose teacher may be cached, by a setting `cache_teacher` behind `weights`."""

    kept: ClassVar[tuple[str, ...]]
    """The terms whose teacher may be cached: they compare what is the same for a sample whatever it is trained with."""
    keeps_texts: ClassVar[bool] = False
    """Whether these compare tokens, of which a cached teacher keeps no padding."""

    @property
    def keeps_teacher(self) -> str:
        return "cache_teacher" if self.cache_teacher and self.kd else ""  # type: ignore[attr-defined]

    def fullest(self) -> dict[str, Any]:
        """A teacher that is kept is run at first sight."""
        return {**super().fullest(), "cache_teacher": False}

    @field_validator("cache_teacher", check_fields=False)
    @classmethod
    def _teacher_repeats_itself(cls, cache: bool, info: ValidationInfo) -> bool:
        if cache and not info.data.get("teacher"):
            raise ValueError("there is no teacher")
        if cache and (wrong := list(cls._new_every_time(info.data))):
            raise ValueError(f"what the teacher says does not repeat itself unless {', '.join(wrong)}")
        return cache

    @classmethod
    def _new_every_time(cls, given: dict[str, Any]) -> Iterator[str]:
        """Settings that would have to be otherwise: of all terms only those `kept` have a weight, and pictures do not change."""
        if str(given.get("data", "")).startswith("stream:"):
            yield "data is no stream"
        if given.get("augment", "none") != "none":
            yield "augment=none"
        yield from (f"weights.{name}=0" for name, weight in given.get("weights", ()) if weight and name not in cls.kept)
        if cls.keeps_texts and "quirks" in given and given["quirks"].unmasked_padding:
            yield "quirks.unmasked_padding=false"


class Measuring(OnTask, Machine, Samples, Read):
    """A stage that measures."""

    model: str
    data: DataName
    split: Literal["train", "val", "test"] = "test"
    out: str | None = Field(None, description="JSON file for the result")
    batch_size: Count = Field(64, ge=1)
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")


class Asking(Strict):
    """A question that is put to a model: beside these settings, what its task asks about."""

    folders: ClassVar[bool] = False
    """Whether a folder may stand for the pictures in it."""

    model: str
    device: Device = "auto"
    max_tokens: Size | None = Field(None, ge=4, description="longest question; by default as tuned")
    quiet: bool = Field(False, description="no progress")
