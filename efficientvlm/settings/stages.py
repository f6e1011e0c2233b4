"""The closed settings of every stage: one pydantic model a stage, shared by the command line and by recipes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Count, DataName, Device, Pixels, Precision, Seed, Size, Strict, Threads
from efficientvlm.settings.common import Data, Stage, Train
from efficientvlm.settings.methods import PASSES, DistillWeights, Gates, Quirks, new_every_time
from efficientvlm.settings.tasks import TaskStage


class InitConfig(Stage):
    family: Literal["xvlm", "blip"] = "xvlm"
    size: Literal["tiny", "small", "base"] | None = Field(None, description="random weights of a named size")
    vision_from: str | None = Field(None, description="folder of a Hugging Face CLIP or DINOv2 vision model")
    text_from: str | None = Field(None, description="folder of a Hugging Face BERT model")
    tokenizer: str = Field("train", description="folder of a tokenizer, or `train`: WordPiece on the data")
    data: DataName | None = Field(None, description="data a tokenizer is trained on")
    columns: dict[str, str] = Field(default_factory=dict)
    vocab_size: Size = Field(8192, ge=16)
    image_size: Pixels | None = Field(None, ge=8)
    settings: dict[str, Any] = Field(default_factory=dict, description="any size of the family: image_size, vision_layers, text_heads, ...")


class ImportConfig(Stage):
    model: str = Field(description="published .th / .pth / .safetensors file, or folder or hub id (owner/name) of a CLIP, SigLIP or BLIP")
    layout: Literal["auto", "pretrain", "retrieval", "vqa"] = "auto"
    tokenizer: str | None = Field(None, description="folder of the tokenizer; by default the one in the folder `model`")
    settings: dict[str, Any] = Field(default_factory=dict, description="what a file does not say, e.g. text_heads")


class Pretrain(Stage, Data, Train):
    """Image-text pre-training without a teacher."""

    model: str
    losses: list[Literal["itc", "itm", "mlm", "box"]] = Field(["itc", "itm", "mlm", "box"], min_length=1)
    region_probability: float = Field(0.5, ge=0, le=1, description="chance of a region step before a general step")
    regions_per_image: Size = Field(5, ge=1)
    mask_probability: float = Field(0.25, gt=0, lt=1, description="part of a text's tokens that MLM hides")
    max_masks: Size = Field(8, ge=1, description="at most so many of them")
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    hard_negatives: bool = Field(True, description="matching draws its negatives by similarity, as published; false: any, for a beginner")
    freeze: list[Literal["vision", "text", "fusion"]] = Field([], description="towers whose weights stay as they are")

    @field_validator("hard_negatives")
    @classmethod
    def _of_matching(cls, hard: bool, info: ValidationInfo) -> bool:
        if not hard and "itm" not in info.data.get("losses", ["itm"]):
            raise ValueError("it needs itm among the losses")
        return hard


class Distill(Pretrain):
    teacher: str
    kd: float = Field(0.4, ge=0, le=1, description="L = (1 - kd) * hard + kd * L_KD")
    temperature: float = Field(1.0, gt=0)
    scale_by_temperature: bool = Field(False, description="multiply logit terms by T²")
    weights: DistillWeights = Field(default_factory=DistillWeights)
    quirks: Quirks = Field(default_factory=Quirks)
    cache_teacher: Annotated[bool, Aside(same_bits=False)] = Field(
        False, description="run the teacher once a sample and keep what it says in memory; for itc_logits alone"
    )

    @field_validator("weights")
    @classmethod
    def _of_these_losses(cls, weights: DistillWeights, info: ValidationInfo) -> DistillWeights:
        """A weight that was left at its default is no mistake where its loss is left out: it does nothing there."""
        usual, losses = DistillWeights(), set(info.data.get("losses", ()))
        chosen = [name for name, value in weights if value and value != getattr(usual, name)]
        wrong = [f"{name} needs {' or '.join(PASSES[name])}" for name in chosen if name in PASSES and losses.isdisjoint(PASSES[name])]
        if losses and wrong:
            raise ValueError(f"{', '.join(wrong)} among the losses")
        return weights

    @field_validator("cache_teacher")
    @classmethod
    def _teacher_repeats_itself(cls, cache: bool, info: ValidationInfo) -> bool:
        regions = "box" in info.data.get("losses", ()) and info.data.get("region_probability")
        if cache and (wrong := [*new_every_time(info.data, "weights", "itc_logits"), *(["region_probability=0"] if regions else [])]):
            raise ValueError(f"what the teacher says does not repeat itself unless {', '.join(wrong)}")
        return cache


class Finetune(TaskStage):
    pass


class Recut(Strict):
    """What decides, before all else, what a pruning run reads."""

    from_gates: str | None = Field(
        None, description="re-cut this prune output without training; model, task and data are by default its own"
    )


class Prune(TaskStage, Recut):
    model: str = Field("", description="as elsewhere; not needed with from_gates")
    data: DataName = Field("", description="as elsewhere; not needed with from_gates, or where task is none")
    task: Literal["vqa", "retrieval", "none"] = Field(  # type: ignore[assignment]
        "vqa", description="none: cut by the weights alone, without training"
    )
    sparsity: float = Field(0.4, ge=0, lt=1, description="part of the prunable weights to remove")
    method: Literal["l0", "magnitude", "taylor", "random"] = "l0"
    sparsity_warmup: float = Field(0.3, ge=0, le=1, description="fraction of the gate phase until the full target")
    freeze_at: float = Field(0.6, gt=0, le=1, description="fraction of all steps after which the structure is final")
    gates: Gates = Field(default_factory=Gates)
    kinds: list[Literal["head", "cross_head", "neuron"]] = Field(["head", "cross_head", "neuron"], min_length=1)
    towers: Annotated[list[str], Field(min_length=1)] | None = Field(None, description="towers that may be pruned; all by default")
    min_heads: Count = Field(0, ge=0, description="floor of heads a layer and kind")
    min_neurons: Count = Field(0, ge=0, description="floor of neurons a layer")
    tower_sparsity: dict[str, float] = Field(default_factory=dict, description="separate budgets instead of one")
    round_to: Count = Field(1, ge=1, description="neurons of a layer are kept in multiples of this")
    allow_blind: bool = Field(False, description="an input may be cut off from an output; else its last path stays open")
    keep_dense: bool = True
    calibration_batches: Count = Field(8, ge=1, description="batches of the Taylor criterion")

    @field_validator("model")
    @classmethod
    def _cut_from_something(cls, model: str, info: ValidationInfo) -> str:
        if not (model or info.data.get("from_gates")):
            raise ValueError("field required")
        return model

    @field_validator("task")
    @classmethod
    def _trained_on_something(cls, task: str, info: ValidationInfo) -> str:
        if task == "none" and info.data.get("from_gates"):
            raise ValueError("gates were learnt on a task; leave task out")
        if task != "none" and info.data.get("data") == "" and not info.data.get("from_gates"):
            raise ValueError(f"{task} is learnt from data, which was not given")
        if task == "none" and info.data.get("teacher"):
            raise ValueError("nothing is trained, so that a teacher has no use")
        return task

    @field_validator("method")
    @classmethod
    def _scored_without_data(cls, method: str, info: ValidationInfo) -> str:
        if info.data.get("task") == "none" and method not in ("magnitude", "random"):
            raise ValueError(f"{method} needs a task; without one use magnitude or random")
        if method != "l0" and info.data.get("from_gates"):
            raise ValueError("the gates that were learnt choose; leave method out")
        return method


class Shrink(Stage):
    model: str
    layers: dict[str, Count | list[Count]] = Field(default_factory=dict, description="tower → layer count or list; half by default")


class Eval(Strict):
    model: str
    data: DataName
    columns: dict[str, str] = Field(default_factory=dict)
    split: Literal["train", "val", "test"] = "test"
    val_fraction: float = Field(0.1, ge=0, lt=1)
    limit: Count | None = Field(None, ge=1)
    max_bad: Count | None = Field(None, ge=0, description="samples that may be skipped as unusable; by default 1 in 100")
    task: Literal["vqa", "retrieval"] = "vqa"
    out: str | None = Field(None, description="JSON file for the result")
    batch_size: Count = Field(64, ge=1)
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    mode: Literal["rank", "generate"] = "rank"
    answers: str | None = None
    rank_top: Count | None = Field(None, ge=1, description="candidates kept after the first token; by default as the model was tuned")
    first_token_twice: bool | None = None
    rerank: Count = Field(0, ge=0, description="retrieval: so many candidates of every query are ranked anew by matching; 0: none")
    device: Device = "auto"
    precision: Precision = "fp32"
    seed: Seed = 0

    @field_validator("mode", "answers", "rank_top", "first_token_twice", "rerank")
    @classmethod
    def _of_this_task(cls, value: Any, info: ValidationInfo) -> Any:
        task = "retrieval" if info.field_name == "rerank" else "vqa"
        if info.data.get("task", task) != task and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"it belongs to task {task}")
        return value


class Bench(Strict):
    models: list[str] = Field(min_length=1)
    batch_sizes: list[Annotated[Size, Field(ge=1)]] = Field([1, 8], min_length=1)
    text_length: Size = Field(12, ge=3, description="tokens a question")
    max_tokens: Size | None = Field(None, ge=4, description="longest answer that is ranked; by default as tuned, else as published")
    rounds: Count = Field(20, ge=1)
    warmup_rounds: Count = Field(3, ge=0)
    threads: Threads | None = Field(None, ge=1)
    out: str | None = None
    device: str = "auto"
    precision: Precision = "fp32"
    seed: Seed = 0


class Export(Strict):
    model: str
    out: str
    format: Literal["onnx", "padded", "hf"] = Field(description="ONNX graphs; zeros in the original shapes; transformers' classes, smaller")
    int8: bool = Field(False, description="ONNX with int8 weights: dynamic quantisation of the matrix products")
    fuse: bool = Field(True, description="attention as ONNX Runtime's own operator, which is faster; false: standard ONNX only")
    tolerance: float = Field(1e-4, gt=0, le=0.1, description="how far ONNX outputs may be from torch, relative to the largest if above 1")
    data: DataName | None = Field(None, description="data that accuracy is measured on, before and after")
    columns: dict[str, str] = Field(default_factory=dict)
    split: Literal["val", "test"] = "test"
    val_fraction: float = Field(0.1, ge=0, lt=1)
    limit: Count | None = Field(None, ge=1, description="use only so many images, drawn at random")
    max_bad: Count | None = Field(None, ge=0, description="samples that may be skipped as unusable; by default 1 in 100")
    batch_size: Count = Field(64, ge=1, description="images at a time for accuracy")
    batch_sizes: list[Annotated[Size, Field(ge=1)]] = Field([1, 8], min_length=1, description="batches that are timed")
    rounds: Count = Field(10, ge=0, description="timed rounds, in which torch and ONNX take turns; 0 measures no latency")
    text_length: Size = Field(12, ge=3, description="tokens a question that is timed")
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    seed: Seed = 0


class Targets(Strict):
    """What the last model of a report should reach beside the first."""

    parameters: float | None = Field(None, gt=0, description="at most this part of the parameters")
    accuracy: float | None = Field(None, gt=0, description="at least this part of the accuracy, or of the task's main metric")
    speedup: float | None = Field(None, gt=0, description="at least so many times as fast at batch 8")


class Report(Strict):
    """The table and picture that end a recipe; refers to folders and results of its earlier stages."""

    out: str
    models: dict[str, str] = Field(min_length=1, description="label → checkpoint folder")
    evals: dict[str, str] = Field(default_factory=dict, description="label → result of an eval stage")
    bench: str | None = Field(None, description="result of a bench stage")
    targets: Targets = Field(default_factory=Targets)


STAGES: dict[str, type[Strict]] = {
    "init": InitConfig,
    "import": ImportConfig,
    "pretrain": Pretrain,
    "shrink": Shrink,
    "distill": Distill,
    "prune": Prune,
    "finetune": Finetune,
    "eval": Eval,
    "bench": Bench,
    "export": Export,
    "report": Report,
}


def asides(stage: str) -> dict[str, Aside]:
    """The settings of a stage that do not change what is learnt, by name."""
    fields = STAGES[stage].model_fields if stage in STAGES else {}
    return {name: mark for name, field in fields.items() for mark in field.metadata if isinstance(mark, Aside)}
