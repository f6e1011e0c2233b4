"""The commands that run a stage: each is a row of a table, which says what it does and which options it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from efficientvlm.cli.launch import CONTROL, launch
from efficientvlm.cli.options import OPTIONS, Option

HOW = ("set", *CONTROL)
RUN = ("seed", "device", "precision", *HOW)
SAMPLES = ("columns", "val", "limit")
TRAINING = ("epochs", "max_steps", "batch_size", "lr", "workers")
KNOWLEDGE = ("distillation", "kd", "temperature", "cache_teacher")
CAPTIONS = (
    *("decoding", "prompt", "min_length", "max_length", "repetition_penalty", "beams", "length_rule", "length_penalty"),
    *("top_k", "top_p", "temperature", "seed"),
)
REMOVED = ("sparsity", "to", "budget", "text_length", "table", "method", "from_gates")
UNITS = (*REMOVED, "min_heads", "min_neurons", "round_to", "allow_blind", "keep_dense")


class Command(NamedTuple):
    help: str
    options: tuple[str, ...]


COMMANDS = {
    "init": Command(
        "Make a new model at random, or an X-VLM or BLIP from the folders of a vision transformer and a BERT.",
        ("out", "family", "size", "vision_from", "text_from", "tokenizer", "data", "columns", "vocab_size", "image_size", *RUN),
    ),
    "import": Command(
        "Read a published X-VLM, EfficientVLM or BLIP file, or a Hugging Face folder of CLIP, SigLIP or BLIP.",
        ("model", "out", "tokenizer", "layout", *RUN),
    ),
    "shrink": Command(
        "Make a student of fewer layers, columns, heads or neurons from its teacher's weights; half the layers by default.\n\n"
        "With --vision-from its images are read by another network, and its texts by the teacher's tower.",
        ("model", "out", "preset", "layers", "vision_from", *RUN),
    ),
    "pretrain": Command("Train on images and their texts (ITC, ITM, MLM, boxes).", ("model", "data", "out", *SAMPLES, *TRAINING, *RUN)),
    "distill": Command(
        "Pre-train a student with its teacher beside it (hidden states, attention maps, logits, embeddings).",
        ("model", "teacher", "data", "out", "task", "sentences", *SAMPLES, *TRAINING, *KNOWLEDGE, *RUN),
    ),
    "prune": Command(
        "Remove attention heads and neurons while the task is learnt; the result is really smaller.\n\n"
        "With --from-gates, --model, --task and --data default to those of that run. "
        "With --task none nothing is learnt and no data is needed.",
        ("model", "teacher", "data", "out", "task", "sentences", *SAMPLES, "answers", *UNITS, *TRAINING, *KNOWLEDGE, *RUN),
    ),
    "finetune": Command(
        "Train a task, with or without a teacher, from any stage's output.",
        ("model", "teacher", "data", "out", "task", "sentences", *SAMPLES, "answers", *TRAINING, *KNOWLEDGE, *RUN),
    ),
    "embed": Command(
        "Store a teacher's vectors of images or sentences, to train from or to search.",
        ("model", "data", "side", "out", "vectors", "ids", "split", "columns", "limit", "workers", "batch_size", *RUN),
    ),
    "eval": Command(
        "Measure a task's metrics; nothing is trained.",
        (
            *("model", "data", "out", "task", "split", "columns", "limit", "answers", "captions", "mode", "rerank"),
            *("classes", "templates", "train", "batch_size", "workers", *RUN),
        ),
    ),
    "bench": Command(
        "Measure latency and size of one or more models side by side.",
        ("models", "out", "batch_sizes", "text_length", "rounds", "threads", "table", *RUN),
    ),
    "predict": Command(
        "Ask a model about an image file, have it describe or classify pictures, or search them for a text.",
        (
            *("model", "image", "task", "question", "statement", "text", "texts", "mode", "top", "rerank", "rerank_by"),
            *("classes", "templates", "out", "sheet"),
            *("filter", "threshold", *CAPTIONS, "max_tokens", "device", "resume", "force", "json", "quiet"),
        ),
    ),
    "select-sentences": Command(
        "Keep the sentences of a pile that say something visible: those that are near to an image.",
        (
            *("sentences", "columns", "images", "model", "sentence_vectors", "out", "per_image", "cap", "total", "min_similarity"),
            *("search", "batch_size", "device", "precision", *HOW),
        ),
    ),
    "export": Command(
        "Write a checkpoint as ONNX graphs or for stock transformers, compared with torch.",
        ("model", "format", "out", "int8", "data", "split", "columns", "limit", "rounds", "seed", *HOW),
    ),
}


def command(stage: str, act: Callable[[str, dict[str, Any]], None] = launch) -> Callable[..., None]:
    """The function of a command, which is `act` on its options, with the signature that Typer reads these from."""
    row = COMMANDS[stage]
    options = {name: OPTIONS.get(f"{stage}.{name}", OPTIONS[name]) for name in row.options}

    def run(**given: Any) -> None:
        act(stage, {name: _read(options[name], value) for name, value in given.items()})

    kind = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, default=option.default, annotation=option.annotation) for name, option in options.items()]
    )
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    run.__doc__ = row.help
    return run


def _read(option: Option, value: Any) -> Any:
    return option.read(value) if value not in (None, []) else None
