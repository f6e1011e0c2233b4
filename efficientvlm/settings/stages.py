"""The closed settings of every stage: one pydantic model a stage, shared by the command line and by recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from efficientvlm.settings.amounts import Amount, amount_of, is_time
from efficientvlm.settings.base import Aside, Count, DataName, Device, Pixels, Precision, Seed, Size, Strict, Threads
from efficientvlm.settings.common import Learning, Measuring, Read, Samples, Stage, Taught
from efficientvlm.settings.methods import METHODS, GateQuirks, Gates

Script = Literal[
    "arabic",
    "armenian",
    "bengali",
    "cjk",
    "cyrillic",
    "devanagari",
    "ethiopic",
    "georgian",
    "greek",
    "gujarati",
    "gurmukhi",
    "hangul",
    "hebrew",
    "hiragana",
    "kannada",
    "katakana",
    "khmer",
    "lao",
    "latin",
    "malayalam",
    "myanmar",
    "sinhala",
    "tamil",
    "telugu",
    "thai",
    "tibetan",
]
"""Scripts as Unicode calls their letters; `cjk` are the characters of Chinese, which Japanese uses beside hiragana and katakana."""


class InitConfig(Stage):
    family: Literal["xvlm", "blip", "clip"] = "xvlm"
    size: Literal["tiny", "small", "base"] | None = Field(None, description="random weights of a named size")
    vision_from: str | None = Field(None, description="folder of a Hugging Face CLIP (for an X-VLM), DINOv2 or ViT")
    text_from: str | None = Field(None, description="folder of a Hugging Face BERT model")
    tokenizer: str = Field("train", description="folder of a tokenizer, or `train`: WordPiece on the data")
    data: DataName | None = Field(None, description="data a tokenizer is trained on")
    columns: dict[str, str] = Field(default_factory=dict)
    vocab_size: Size = Field(8192, ge=16)
    image_size: Pixels | None = Field(None, ge=8)
    settings: dict[str, Any] = Field(default_factory=dict, description="any size of the family: image_size, vision_layers, text_heads, ...")
    text_projection: Literal["random", "identity"] = Field(
        "random",
        description="identity: vectors of texts are those of the BERT itself, as a sentence encoder has them; embed_dim is its width",
    )
    positions: Literal["random", "sincos"] = Field(
        "random",
        description="of a new tower of images, sincos: where a patch lies begins as sines and cosines, as strong as what it shows",
    )


class Expected(NamedTuple):
    """A published network: its family, what is set of its base size, and its tokens."""

    family: str
    settings: dict[str, Any]
    vocab_size: int


VIT_L14 = {"patch_size": 14, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_intermediate": 4096}
VIT_L14 |= {"text_width": 768, "text_heads": 12, "text_intermediate": 3072, "embed_dim": 768}
EXPECTED = {
    "xvlm-base": Expected("xvlm", {}, 30522),
    "blip-base": Expected("blip", {"network": "pretrain", "image_size": 224}, 30524),
    "clip-vit-large-patch14": Expected("clip", VIT_L14, 49408),
}


class ImportConfig(Stage):
    model: str = Field(description="published .th / .pth / .safetensors file, or folder or hub id (owner/name) of a CLIP, SigLIP or BLIP")
    layout: Literal["auto", "pretrain", "retrieval", "vqa", "nlvr2", "text_assignment", "captioning", "grounding"] = "auto"
    tokenizer: str | None = Field(None, description="folder of the tokenizer; by default the one in the folder `model`")
    settings: dict[str, Any] = Field(default_factory=dict, description="what a file does not say, e.g. text_heads")
    expects: Annotated[Literal["xvlm-base", "blip-base", "clip-vit-large-patch14"] | None, Aside()] = Field(
        None, description="what `evlm plan` takes in the place of a file that is not there; the import itself does not read it"
    )


class Pretrain(Learning):
    """Training without a teacher, before any task."""

    stage: ClassVar[str] = "pretrain"
    task: str = "pretraining"


class Following(Taught):
    """A stage with a teacher: its task is by default one that its method of distillation knows."""

    @classmethod
    def task_of(cls, values: Mapping[str, Any]) -> Any:
        usual, known = super().task_of(values), METHODS.get(str(values.get("distillation")), {})
        return usual if "task" in values or not known or usual in known else next(iter(known))


class Distill(Following):
    stage: ClassVar[str] = "distill"
    task: str = "pretraining"
    teacher: str


class Finetune(Following):
    stage: ClassVar[str] = "finetune"
    task: str = "vqa"


class Recut(Strict):
    """What decides, before all else, what a pruning run reads."""

    from_gates: str | None = Field(
        None, description="re-cut this prune output without training; model, task and data are by default its own"
    )


class Requests(Strict):
    """Of what requests a latency table is measured before anything is trained."""

    batch_size: Size = Field(8, ge=1, description="images or pairs a request")
    threads: Threads | None = Field(None, ge=1, description="processor threads; by default as many as torch takes")
    device: str = Field("auto", description="auto, cpu, cuda or mps")
    precision: Precision = "fp32"
    rounds: Count = Field(7, ge=1, description="timed rounds")
    warmup_rounds: Count = Field(2, ge=0)


class Prune(Following, Recut):
    model: str = Field("", description="as elsewhere; not needed with from_gates")
    data: DataName = Field("", description="as elsewhere; not needed with from_gates, or where task is none")
    task: str = Field("vqa", description="none: cut by the weights alone, without training")
    quirks: GateQuirks = Field(default_factory=GateQuirks)
    budget: Literal["parameters", "macs", "latency"] = Field("parameters", description="what the heads and neurons are counted by")
    sparsity: float = Field(0.4, ge=0, lt=1, description="part of what can be removed that is removed, counted by budget")
    text_length: Size = Field(12, ge=3, description="tokens a text that macs or milliseconds are of, with one image of the model's size")
    table: str | None = Field(None, description="with budget latency, result of evlm bench --table; by default it is measured first")
    requests: Requests = Field(default_factory=Requests)
    method: Literal["l0", "magnitude", "taylor", "random"] = "l0"
    sparsity_hold: float = Field(
        0.3, ge=0, le=1, description="fraction of the gate phase before more is asked for: the task is learnt first; 0: none, as published"
    )
    sparsity_warmup: float = Field(0.5, ge=0, le=1, description="fraction of the gate phase in which the target then rises to the full one")
    freeze_at: float = Field(0.6, gt=0, le=1, description="fraction of all steps after which the structure is final")
    gates: Gates = Field(default_factory=Gates)
    kinds: list[Literal["head", "cross_head", "neuron"]] = Field(["head", "cross_head", "neuron"], min_length=1)
    towers: Annotated[list[str], Field(min_length=1)] | None = Field(None, description="towers that may be pruned; all by default")
    min_heads: Count = Field(0, ge=0, description="floor of heads a layer and kind")
    min_neurons: Count = Field(0, ge=0, description="floor of neurons a layer")
    tower_sparsity: dict[str, float] = Field(default_factory=dict, description="separate budgets instead of one")
    to: Amount | None = Field(
        None,
        description="instead of sparsity, what the whole may cost: 30M parameters with embeddings, 1.5G macs, or 20ms (budget latency)",
    )
    round_to: Count = Field(1, ge=1, description="neurons of a layer are kept in multiples of this")
    allow_blind: bool = Field(False, description="an input may be cut off from an output; else its last path stays open")
    keep_dense: bool = True
    calibration_batches: Count = Field(8, ge=1, description="batches of the Taylor criterion")

    @model_validator(mode="before")
    @classmethod
    def _counted_by_its_unit(cls, values: Any) -> Any:
        """A time that the whole may take says by itself what is counted."""
        said = isinstance(values, dict) and "budget" not in values and is_time(values.get("to"))
        return {**values, "budget": "latency"} if said else values

    @classmethod
    def task_of(cls, values: Mapping[str, Any]) -> Any:
        return None if values.get("from_gates") and not values.get("task") else super().task_of(values)

    @classmethod
    def lacking(cls, values: Mapping[str, Any]) -> list[str]:
        needed = [] if values.get("from_gates") else ["model"] if cls.task_of(values) == "none" else ["model", "data"]
        return super().lacking(values) + [name for name in needed if not values.get(name)]

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
        return task

    @field_validator("sparsity_warmup")
    @classmethod
    def _within_the_phase(cls, warmup: float, info: ValidationInfo) -> float:
        if (hold := info.data.get("sparsity_hold", 0.0)) + warmup > 1 + 1e-9:
            raise ValueError(f"with sparsity_hold {hold:g} in front {warmup:g} is longer than the gate phase; together at most 1")
        return warmup

    @field_validator("to")
    @classmethod
    def _of_the_whole(cls, to: str | None, info: ValidationInfo) -> str | None:
        if to is not None and "budget" in info.data:
            amount_of(info.data["budget"], to)
        if to is not None and info.data.get("tower_sparsity"):
            raise ValueError("it is one budget over all towers; leave tower_sparsity out")
        return to

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
    preset: Literal["dlip-small", "dlip-base", "dime-fm-vit-b32", "tinyclip-61m", "tinyclip-39m", "tinyclip-8m"] | None = Field(
        None, description="sizes of a known student of a BLIP (dlip) or of a CLIP; what is given beside it rules"
    )
    layers: dict[str, Count | list[Count]] = Field(
        default_factory=dict, description="tower → layer count or list; half by default, all where widths or fusion_layers are given"
    )
    width: dict[str, Size] = Field(default_factory=dict, description="tower → columns; the teacher's by default")
    heads: dict[str, Size] = Field(default_factory=dict, description="tower → heads a layer; by default of the teacher's size")
    neurons: dict[str, Size] = Field(
        default_factory=dict, description="tower → neurons a layer; by default in the teacher's ratio to the width"
    )
    fusion_layers: Size | None = Field(
        None, ge=1, description="so many of the last layers of a BLIP look at images; the teacher's by default"
    )
    channels: Literal["important", "leading"] = Field("important", description="which columns of the teacher's are kept")
    random: list[str] = Field(
        default_factory=list, description="towers of which nothing is taken from the teacher; they may be larger than its"
    )
    vision_from: str | None = Field(
        None,
        description="folder of a ViT, DINOv2, Swin or ConvNeXt of transformers, which is to read the images",
    )
    patch_size: Pixels | None = Field(None, ge=1, description="pixels a patch of a CLIP or SigLIP; the teacher's by default")
    image_size: Pixels | None = Field(None, ge=8, description="pixels that a CLIP or SigLIP reads on a side; the teacher's by default")

    @property
    def narrower(self) -> bool:
        """Whether more than layers may be left out."""
        given = (self.preset, self.width, self.heads, self.neurons, self.random, self.fusion_layers, self.patch_size, self.image_size)
        return any(given) or self.vision_from is not None


class Eval(Measuring):
    task: str = "vqa"


VECTORS = ("vector", "embedding", "vectors", "embeddings")
"""Columns in which vectors of another program are found."""


class Embed(Stage, Read):
    """Vectors of a teacher, once."""

    model: str | None = Field(
        None, description="the teacher, whose vectors of images and sentences are compared with one another; not needed with vectors"
    )
    vectors: str | None = Field(None, description=".npy or .parquet file of vectors that another program made, which are taken over")
    ids: str | None = Field(
        None, description="samples of the vectors in an .npy file: text or .npy file of ids; by default those of the data, in order"
    )
    id_column: str | None = Field(
        None,
        description="column of a parquet file with ids, or with sentences; by default the one called id, image_id, img_id, file_name, "
        "image_path, or sentence, text, caption; without one the vectors are in the order of the data",
    )
    vector_column: str | None = Field(
        None,
        description="column of a parquet file with vectors; by default vector, embedding, vectors, embeddings, or the only one",
    )
    data: DataName = Field(description="as elsewhere, but no stream; of sentences also plain text files, one a line")
    side: Literal["images", "sentences"] = Field(description="what is embedded: pictures, which need no texts, or texts without pictures")
    split: Literal["train", "val", "test"] = "train"
    columns: dict[str, str] = Field(default_factory=dict, description="role → column name, e.g. sentence=text")
    val_fraction: float = Field(0.0, ge=0, lt=1, description="part that is held out, and not embedded with split train")
    limit: Count | None = Field(None, ge=1, description="use only so many samples, drawn at random")
    batch_size: Count = Field(64, ge=1, description="samples at a time")
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    shard_size: Count = Field(65_536, ge=1, description="samples a file, which is also what an interrupted run loses at most")
    max_missing: Annotated[float, Aside()] = Field(0.01, ge=0, le=1, description="part of the samples that may be left out as unusable")

    @property
    def max_bad(self) -> int:
        """Samples that may be skipped while data are read: any number, for what is missing in the end is judged by `max_missing`."""
        return 10**12

    @classmethod
    def lacking(cls, values: Mapping[str, Any]) -> list[str]:
        return super().lacking(values) + ["model"] * (not values.get("model") and not values.get("vectors"))

    @field_validator("vectors")
    @classmethod
    def _of_something(cls, vectors: str | None, info: ValidationInfo) -> str | None:
        if vectors is None and info.data.get("model", "") is None:
            raise ValueError("give model, which embeds, or vectors that are there")
        return vectors

    @field_validator("ids", "id_column", "vector_column")
    @classmethod
    def _of_vectors(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is not None and info.data.get("vectors", "") is None:
            raise ValueError("it goes with vectors, a file that is imported")
        return name

    @field_validator("limit")
    @classmethod
    def _all_of_them(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("vectors"):
            raise ValueError("vectors of a file are taken over as a whole; leave it out")
        return limit

    @field_validator("data")
    @classmethod
    def _with_ids(cls, data: str) -> str:
        if data.startswith("stream:"):
            raise ValueError("samples of a stream are not found again by an id; give its file or folder")
        return data


class Bench(Strict):
    models: list[str] = Field(min_length=1)
    batch_sizes: list[Annotated[Size, Field(ge=1)]] = Field([1, 8], min_length=1)
    text_length: Size = Field(12, ge=3, description="tokens a question")
    max_tokens: Size | None = Field(None, ge=4, description="longest answer that is ranked; by default as tuned, else as published")
    rounds: Count = Field(20, ge=1)
    warmup_rounds: Count = Field(3, ge=0)
    threads: Threads | None = Field(None, ge=1)
    table: bool = Field(False, description="measure what layers take at several counts of units too: of one model, at one batch size")
    round_to: Count = Field(1, ge=1, description="with table: neurons are counted in multiples of this")
    out: str | None = None
    device: str = "auto"
    precision: Precision = "fp32"
    seed: Seed = 0

    @field_validator("table")
    @classmethod
    def _of_one(cls, table: bool, info: ValidationInfo) -> bool:
        if table and any(len(info.data.get(name, [0])) > 1 for name in ("models", "batch_sizes")):
            raise ValueError("a table is of one model at one batch size: give one --model and one --batch-size")
        return table


class Export(Samples):
    model: str
    out: str
    format: Literal["onnx", "padded", "hf", "open_clip"] = Field(
        description="ONNX graphs; zeros in the original shapes; transformers' classes, smaller; open_clip's CLIP"
    )
    int8: bool = Field(False, description="ONNX with int8 weights: dynamic quantisation of the matrix products")
    fuse: bool = Field(True, description="attention as ONNX Runtime's own operator, which is faster; false: standard ONNX only")
    tolerance: float = Field(1e-4, gt=0, le=0.1, description="how far ONNX outputs may be from torch, relative to the largest if above 1")
    data: DataName | None = Field(None, description="data that accuracy is measured on, before and after")
    split: Literal["val", "test"] = "test"
    batch_size: Count = Field(64, ge=1, description="images at a time for accuracy")
    batch_sizes: list[Annotated[Size, Field(ge=1)]] = Field([1, 8], min_length=1, description="batches that are timed")
    rounds: Count = Field(10, ge=0, description="timed rounds, in which torch and ONNX take turns; 0 measures no latency")
    text_length: Size = Field(12, ge=3, description="tokens a question that is timed")
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    seed: Seed = 0


class SelectSentences(Strict):
    out: str
    sentences: str = Field(description="text file with a sentence a line, or a parquet, JSONL, CSV or TSV table")
    columns: dict[str, str] = Field(default_factory=dict, description="sentence → column name; by default sentence, text or caption")
    images: str = Field(description="embeddings of images that sentences are to be near to")
    model: str | None = Field(None, description="checkpoint that embeds sentences in the same space")
    sentence_vectors: str | None = Field(None, description="embeddings of the sentences, row by row, instead of model")
    per_image: Count | None = Field(None, ge=1, description="keep only what is among so many best sentences of some image")
    cap: Count | None = Field(10, ge=1, description="sentences of which the same image is the nearest, at most; null: any number")
    total: Count | None = Field(None, ge=1, description="sentences in all, at most; the best are kept")
    min_similarity: float | None = Field(None, ge=-1, le=1, description="least cosine with the nearest image")
    max_missing: Annotated[float, Aside()] = Field(
        0.01, ge=0, le=1, description="part of the sentences that may be unreadable or without a usable vector"
    )
    near: float | None = Field(
        0.97, gt=0, le=1, description="cosine at which a sentence repeats one kept of the same nearest image; null: none does"
    )
    reserve: Count = Field(4, ge=1, le=1000, description="candidates held for each place under cap or total, which near-duplicates use up")
    min_characters: Count = Field(5, ge=1)
    max_characters: Count = Field(300, ge=1)
    min_words: Count | None = Field(None, ge=1, description="words are what blanks separate")
    max_words: Count | None = Field(None, ge=1)
    scripts: list[Script] = Field([], description="scripts that the letters of a sentence are to be of; any by default")
    script_share: float = Field(0.9, gt=0, le=1, description="least part of its letters that is of these scripts")
    search: Literal["auto", "exact", "approximate"] = Field(
        "auto", description="compare with every image, or with those of the nearest clusters (extra search)"
    )
    exact_up_to: Count = Field(100_000, ge=0, description="auto: so many images are searched exactly")
    probes: Count = Field(32, ge=1, description="approximate: clusters of images that a sentence is compared with")
    batch_size: Count = Field(1024, ge=1, le=1_000_000, description="sentences that are looked up at once")
    max_tokens: Size | None = Field(None, ge=4, description="longest sentence; by default as the model was tuned")
    device: Device = "auto"
    precision: Precision = "fp32"

    @field_validator("sentence_vectors")
    @classmethod
    def _embedded_once(cls, vectors: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("model") is None) == (vectors is None):
            raise ValueError("give model, which embeds the sentences, or their embeddings, and not both")
        return vectors

    @field_validator("columns")
    @classmethod
    def _of_sentences(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(columns.keys() - {"sentence"}):
            raise ValueError(f"no such role: {unknown[0]}; there is sentence")
        return columns

    @field_validator("total")
    @classmethod
    def _bounded(cls, total: int | None, info: ValidationInfo) -> int | None:
        if "cap" in info.data and total is info.data["cap"] is info.data.get("per_image") is None:
            raise ValueError("one of per_image, cap and total has to say how many are kept")
        return total

    @field_validator("max_characters", "max_words")
    @classmethod
    def _not_less(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get(str(info.field_name).replace("max", "min"))
        if most is not None and least is not None and most < least:
            raise ValueError(f"it is less than the least, {least}")
        return most


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
    "embed": Embed,
    "eval": Eval,
    "bench": Bench,
    "export": Export,
    "select-sentences": SelectSentences,
    "report": Report,
}
