"""The closed configuration of every stage: one pydantic model a stage, shared by the command line and by recipes."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, ValidationInfo, field_validator

from efficientvlm.errors import BadInput, shorten, without_secrets


@dataclass(frozen=True)
class Aside:
    """Marks a setting that does not change what is learnt, only how it is watched, kept, measured or computed.

    A run is resumed with another value, which its manifest records; a finished checkpoint made with another value is up to date.
    `same_bits`: weights come out the same to the bit; else up to rounding.
    """

    same_bits: bool = True


Device = Annotated[str, Aside(same_bits=False)]
Precision = Literal["fp32", "bf16"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(le=1_000_000_000)]
Size = Annotated[int, Field(le=1_000_000)]  # what is made once for each of them would fill the memory beyond
Pixels = Annotated[int, Field(le=16_384)]
DataName = Annotated[str, PlainSerializer(without_secrets)]
"""Where data lies. What opens an address is used, and never written down with the other settings."""
Threads = Annotated[int, Field(le=4_096)]
DEEPEST = 20  # levels of lists and mappings in a value


def check_plain(value: Any, path: tuple[object, ...] = ()) -> None:
    """Refuse what no setting can be or hold, at any depth: text that cannot be written as UTF-8, numbers without bound, other objects.

    Raises:
        ValueError: saying what it is.
    """
    wrong = ""
    if isinstance(value, str):
        if not _writable(value):
            wrong = f"'{shorten(value)}' is no text that can be written as UTF-8"
    elif isinstance(value, float):
        if not math.isfinite(value):
            wrong = "it is no finite number"
    elif isinstance(value, int):
        if abs(value) >= 2**64:
            wrong = "no number of that size has a meaning here"
    elif isinstance(value, dict | list | tuple):
        if len(path) == DEEPEST:
            wrong = f"it is nested more than {DEEPEST} levels deep"
        for name, part in () if wrong else value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(name, (*path, "key"))
            check_plain(part, (*path, name))
    elif value is not None and not isinstance(value, BaseModel):
        wrong = f"a {type(value).__name__} is neither text, number, list nor mapping; put quotes around it"
    if wrong:
        raise ValueError(": ".join(filter(None, (".".join(map(str, path)), wrong))))


def _writable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else True


class Strict(BaseModel):
    """Base of all settings: closed; numbers are finite, text can be written as UTF-8, whatever holds it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = cls.model_fields[str(info.field_name)].annotation
        grouped = isinstance(value, dict) and isinstance(allowed, type) and issubclass(allowed, Strict)
        check_plain(dict.fromkeys(value) if grouped else value)  # a group looks at its own values, and names them
        if isinstance(value, bool) and bool not in (allowed, *get_args(allowed)):
            raise ValueError(f"it is no switch that could be {str(value).lower()}")
        return value

    @field_validator("out", check_fields=False)
    @classmethod
    def _somewhere(cls, out: str | None) -> str | None:
        if out is not None and not out.strip():
            raise ValueError("it is empty, and names no place")
        return out


class Train(Strict):
    """How long and how fast; one set of names for every training stage."""

    epochs: float = Field(1.0, gt=0, le=1_000_000, description="passes over the images")
    max_steps: Count | None = Field(None, ge=1, description="length of the schedule in steps, instead of epochs")
    batch_size: Count = Field(64, ge=1, description="images a step, over all processes")
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay to 0 after warm-up")
    warmup: float = Field(0.1, ge=0, le=1, description="fraction of all steps")
    weight_decay: float = Field(0.01, ge=0, description="none on biases and norms")
    new_lr_mult: float = Field(2.0, gt=0, description="learning-rate factor of newly initialised tensors")
    clip: float | None = Field(1.0, gt=0, description="global gradient norm")
    parallel: Annotated[Literal["ddp", "fsdp"], Aside(same_bits=False)] = Field(
        "ddp", description="over several processes: a copy of everything in each, or spread over them"
    )
    augment: Literal["none", "light", "paper"] = Field("light", description="light: flip and shift; paper: crop, flip, RandAugment")
    mirror: bool | None = Field(
        None,
        description="augmentation mirrors half of the images, less those whose texts hold left, right, leftmost, rightmost, leftward(s), "
        "rightward(s) or (counter, anti)clockwise; by default of the built-in data alone",
    )
    log_every: Annotated[Count, Aside()] = Field(20, ge=1, description="steps a metrics line")
    save_every: Annotated[Count, Aside()] = Field(200, ge=1, description="steps a resumable state")
    eval_limit: Annotated[Count | None, Aside()] = Field(
        None, ge=0, description="validation images read at the end, drawn at random; all by default, 0: none"
    )
    eval_batch_size: Annotated[Count | None, Aside()] = Field(
        None, ge=1, description="validation images at a time; by default 100 with questions, 64 with captions, batch_size in pre-training"
    )


class Data(Strict):
    """Where samples come from."""

    data: DataName = Field(
        description="easy-vqa, shapes[:key=value,...], a file, a pattern of shards, a folder, hub:NAME, or stream: before one"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="role → column name, e.g. question=text")
    val: Annotated[DataName | None, Aside()] = Field(None, description="validation data; by default a held-out part of the training images")
    val_fraction: float = Field(0.1, ge=0, lt=1)
    limit: Count | None = Field(None, ge=1, description="use only so many images, drawn at random; of a stream the first rows")
    max_bad: Annotated[Count | None, Aside()] = Field(
        None, ge=0, description="samples that may be skipped as unusable; by default 1 in 100, of a stream 100"
    )
    shuffle_buffer: Count = Field(1000, ge=1, description="samples that a stream draws from at random; 1 keeps its order")


class Stage(Strict):
    out: str
    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "fp32"


class Quirks(Strict):
    """Behaviours of the published release that are known to be wrong; all off."""

    mask_offsets: bool = Field(False, description="fusion gates read rows from 0 instead of their own in full-stack tasks")
    epoch_step: bool = Field(False, description="the sparsity target restarts every epoch")
    gates_in_main_optimizer: bool = Field(False, description="the main AdamW also moves gates and multipliers")
    independent_negatives: bool = Field(False, description="teacher and student draw their own ITM negatives")
    unmasked_padding: bool = Field(False, description="KD terms include padding")
    skip_last_hidden: bool = Field(False, description="the last vision hidden state is not distilled")
    unfrozen_structure: bool = Field(False, description="the structure still moves after it was declared final")
    double_sep: bool = Field(False, description="training answers end in two separators")
    first_token_twice: bool = Field(False, description="closed-list ranking counts the first token twice")


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


def _new_every_time(given: dict[str, Any], weights: str, kept: str) -> list[str]:
    """Settings that a teacher needs whose outputs are to be kept: of all terms only `kept` has a weight, and pictures do not change."""
    streamed = str(given.get("data", "")).startswith("stream:")
    terms = [name for name, weight in given.get(weights, ()) if weight and name != kept]
    wrong = ["data is no stream"] * streamed + ["augment=none"] * (given.get("augment", "none") != "none")
    return wrong + [f"{weights}.{name}=0" for name in terms]


PASSES = {
    "itc_logits": ("itc",),
    "itm_logits": ("itm",),
    "mlm_logits": ("mlm",),
    "fusion_hidden": ("itm", "mlm"),
    "fusion_attention": ("itm", "mlm"),
    "cross_attention": ("itm", "mlm"),
}
"""Distillation term → the losses in whose passes it compares something; any of them will do."""


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


class DistillWeights(Strict):
    """Weights inside L_KD of the general distillation stage; 0 switches a term off."""

    itm_logits: float = Field(1.0, ge=0)
    mlm_logits: float = Field(1.0, ge=0)
    itc_logits: float = Field(0.0, ge=0, description="not in the published method")
    text_hidden: float = Field(1.0, ge=0)
    text_attention: float = Field(1.0, ge=0)
    image_hidden: float = Field(0.1, ge=0)
    image_attention: float = Field(1.0, ge=0)
    fusion_hidden: float = Field(1.0, ge=0)
    fusion_attention: float = Field(1.0, ge=0)
    cross_attention: float = Field(0.0, ge=0, description="not in the published general stage")


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
        if cache and (wrong := [*_new_every_time(info.data, "weights", "itc_logits"), *(["region_probability=0"] if regions else [])]):
            raise ValueError(f"what the teacher says does not repeat itself unless {', '.join(wrong)}")
        return cache


class TaskWeights(Strict):
    """Weights inside L_KD of the VQA stage."""

    logits: float = Field(1.0, ge=0)
    text_hidden: float = Field(1.0, ge=0)
    text_attention: float = Field(1.0, ge=0)
    image_hidden: float = Field(0.2, ge=0)
    image_attention: float = Field(1.0, ge=0)
    fusion_hidden: float = Field(0.5, ge=0)
    fusion_attention: float = Field(0.5, ge=0)
    cross_attention: float = Field(0.5, ge=0)
    decoder_hidden: float = Field(1.0, ge=0)
    decoder_attention: float = Field(1.0, ge=0)
    decoder_cross_attention: float = Field(1.0, ge=0)


class RetrievalWeights(Strict):
    """Weights inside L_KD of the retrieval stage; those of fusion apply to matched and to unmatched pairs each."""

    itm_logits: float = Field(1.0, ge=0)
    itc_logits: float = Field(0.0, ge=0, description="not in the published method")
    text_hidden: float = Field(0.33, ge=0)
    text_attention: float = Field(0.33, ge=0)
    image_hidden: float = Field(0.066, ge=0)
    image_attention: float = Field(0.33, ge=0)
    fusion_hidden: float = Field(0.165, ge=0)
    fusion_attention: float = Field(0.165, ge=0)
    cross_attention: float = Field(0.165, ge=0)


PUBLISHED_KD = {"vqa": 0.4, "retrieval": 0.5}
QUESTIONS_ONLY = ("weights", "questions_per_image", "max_answer_tokens", "answers", "min_answer_count", "rank_top", "decoder_init")
QUESTION_QUIRKS = ("mask_offsets", "double_sep", "first_token_twice")


class TaskStage(Stage, Data, Train):
    model: str
    teacher: str | None = None
    task: Literal["vqa", "retrieval"] = "vqa"
    kd: float = Field(
        default_factory=lambda given: PUBLISHED_KD.get(given.get("task"), 0.4),
        ge=0,
        le=1,
        description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher; 0.5 by default for retrieval",
    )
    temperature: float = Field(1.0, gt=0)
    scale_by_temperature: bool = False
    weights: TaskWeights = Field(default_factory=TaskWeights, description="of VQA")
    retrieval_weights: RetrievalWeights = Field(default_factory=RetrievalWeights)
    hard_negatives: bool = Field(True, description="of retrieval: matching draws its negatives by similarity, as published; false: any")
    quirks: Quirks = Field(default_factory=Quirks)
    questions_per_image: Size = Field(6, ge=1, description="questions that share one vision pass")
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    max_answer_tokens: Size = Field(10, ge=3)
    answers: str | None = Field(None, description="file with one answer a line; by default those of the training data")
    min_answer_count: Count = Field(1, ge=1, description="training questions that must accept an answer for it to be in the closed list")
    rank_top: Annotated[Count, Aside()] = Field(128, ge=1, description="candidates kept after the first token")
    decoder_init: Literal["auto", "teacher", "fusion"] = Field("auto", description="where a new answer decoder comes from")
    cache_teacher: Annotated[bool, Aside(same_bits=False)] = Field(
        False, description="run the teacher once a sample and keep what it says in memory; for logits (VQA) or itc_logits alone"
    )

    @field_validator("cache_teacher")
    @classmethod
    def _teacher_repeats_itself(cls, cache: bool, info: ValidationInfo) -> bool:
        if cache and not info.data.get("teacher"):
            raise ValueError("there is no teacher")
        if info.data.get("task") == "retrieval":
            wrong = _new_every_time(info.data, "retrieval_weights", "itc_logits")
        else:
            wrong = _new_every_time(info.data, "weights", "logits")
            wrong += ["quirks.unmasked_padding=false"] if "quirks" in info.data and info.data["quirks"].unmasked_padding else []
        if cache and wrong:
            raise ValueError(f"what the teacher says does not repeat itself unless {', '.join(wrong)}")
        return cache

    @field_validator(*QUESTIONS_ONLY, "retrieval_weights", "hard_negatives")
    @classmethod
    def _of_this_task(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        task = "vqa" if name in QUESTIONS_ONLY else "retrieval"
        usual = cls.model_fields[name].get_default(call_default_factory=True, validated_data={})
        if info.data.get("task", task) != task and value != usual:
            raise ValueError(f"it belongs to task {task}")
        return value

    @field_validator("quirks")
    @classmethod
    def _quirks_of_this_task(cls, quirks: Quirks, info: ValidationInfo) -> Quirks:
        wrong = [name for name in QUESTION_QUIRKS if getattr(quirks, name)]
        if wrong and info.data.get("task", "vqa") != "vqa":
            raise ValueError(f"{', '.join(wrong)} belong to task vqa")
        return quirks


class Finetune(TaskStage):
    pass


class Gates(Strict):
    """How gates learn (hard concrete)."""

    lr: float = Field(0.01, gt=0, description="of log α; constant, no schedule")
    multiplier_lr: float = Field(0.01, gt=0, description="of the Lagrange multipliers, which ascend")
    head_init: float = Field(10.0, description="mean of log α of heads at the start")
    neuron_init: float = Field(0.0, description="mean of log α of neurons at the start; 0 starts at 10 % expected sparsity")
    init_std: float = Field(0.01, ge=0, description="spread of log α at the start")


class Prune(TaskStage):
    data: DataName = Field("", description="as elsewhere; needed unless task is none")
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
    from_gates: str | None = Field(None, description="re-cut this prune output without training")
    keep_dense: bool = True
    calibration_batches: Count = Field(8, ge=1, description="batches of the Taylor criterion")

    @field_validator("task")
    @classmethod
    def _trained_on_something(cls, task: str, info: ValidationInfo) -> str:
        if task != "none" and info.data.get("data") == "":
            raise ValueError(f"{task} is learnt from data, which was not given")
        if task == "none" and info.data.get("teacher"):
            raise ValueError("nothing is trained, so that a teacher has no use")
        return task

    @field_validator("method")
    @classmethod
    def _scored_without_data(cls, method: str, info: ValidationInfo) -> str:
        if info.data.get("task") == "none" and method not in ("magnitude", "random"):
            raise ValueError(f"{method} needs a task; without one use magnitude or random")
        return method

    @field_validator("from_gates")
    @classmethod
    def _learnt_on_a_task(cls, from_gates: str | None, info: ValidationInfo) -> str | None:
        if from_gates and info.data.get("task") == "none":
            raise ValueError("gates were learnt on a task; leave task out")
        if from_gates and info.data.get("method", "l0") != "l0":
            raise ValueError("the gates that were learnt choose; leave method out")
        return from_gates


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

T = TypeVar("T", bound=Strict)


def asides(stage: str) -> dict[str, Aside]:
    """The settings of a stage that do not change what is learnt, by name."""
    fields = STAGES[stage].model_fields if stage in STAGES else {}
    return {name: mark for name, field in fields.items() for mark in field.metadata if isinstance(mark, Aside)}


def parse(model: type[T], values: dict[str, Any], where: str) -> T:
    """`values` as `model`; every problem at once, unknown keys with their nearest known key.

    Raises:
        BadInput: naming `where` (a file or command) and each wrong key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        items = [item for item in error.errors() if item["type"] != "default_factory_not_called"]  # it follows from another one
        problems = [_describe(model, item) for item in items]
        raise BadInput(
            f"{where} has {len(problems)} wrong setting{'s' * (len(problems) > 1)}",
            "\n  " + "\n  ".join(problems),
            "correct what is listed",
        ) from None


def problems_with(model: type[Strict], name: str, value: Any) -> list[str]:
    """What is wrong with one setting by itself, whatever the others are."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return [_describe(model, item) for item in error.errors() if item["loc"][:1] == (name,)]
    return []


def _describe(model: type[BaseModel], item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] != "extra_forbidden":
        message = str(item["msg"]).removeprefix("Value error, ")
        return f"{name}: {message[:1].lower()}{message[1:]}"
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    near = difflib.get_close_matches(path[-1], model.model_fields, n=1, cutoff=0.5)
    return f"{name}: unknown key" + (f", did you mean {near[0]}?" if near else f"; known are {', '.join(model.model_fields)}")


def merge(base: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """`base` with `key=value` assignments applied; keys may be dotted, values are YAML.

    Raises:
        BadInput: an assignment without `=` or through a value that is no mapping.
    """
    from efficientvlm.plain_yaml import parse_yaml

    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for assignment in assignments:
        key, found, text = assignment.partition("=")
        if not found or not key:
            raise BadInput(f"--set {assignment}", "it is not key=value", "write for example --set lr=3e-4")
        value = parse_yaml(text, f"--set {assignment}", "put quotes around the value")
        target = merged
        *path, last = key.split(".")
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise BadInput(f"--set {assignment}", f"{part} is not a group of settings", "see the settings in the documentation")
        target[last] = value
    return merged
