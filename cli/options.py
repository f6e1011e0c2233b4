"""The options of all commands, declared once. None always means: not given, so that the defaults of the settings rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

RUN, TRAINING, KNOWLEDGE, UNITS = "How it runs", "Training", "Distillation", "What is removed"
CAPTIONS = "How captions are written"


class Option(NamedTuple):
    """An option of a stage: its annotation for Typer, and how what was given becomes the value of the setting."""

    annotation: Any
    read: Callable[[Any], Any] = lambda value: value
    default: Any = None


def option(kind: Any, flag: str, help: str, metavar: str | None = None, panel: str | None = None, also: str = "", **more: Any) -> Option:
    """An option that is left out of the settings unless it is given; `also` is a second name of it."""
    flags = (flag, also) if also else (flag,)
    return Option(Annotated[kind | None, typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel)], **more)


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """`key=value` texts as a mapping; anything else is a usage error."""
    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key or not value:
            raise typer.BadParameter(f"{text!r} is not of the form key=value", param_hint=flag)
        found[key] = value
    return found


def number_or_word(text: str) -> int | str:
    """A number as one; the settings say which words there are."""
    return int(text) if text.isdecimal() else text


def layers(texts: list[str]) -> dict[str, int | list[int]]:
    """`vision=6` is a count, `text=1,3,5` (or `5,` for a single one) are layers counted from 0."""
    found: dict[str, int | list[int]] = {}
    for tower, text in pairs(texts, "--layers").items():
        numbers = [part.strip() for part in text.split(",") if part.strip()]
        if not numbers or not all(number.isdecimal() for number in numbers):
            raise typer.BadParameter(f"{text!r} is neither a number of layers nor a list of them", param_hint="--layers")
        found[tower] = int(text) if "," not in text else [int(number) for number in numbers]
    return found


DATA = "easy-vqa, shapes[:key=value,...], a file, a folder, a pattern of shards, hub:NAME, or stream: before one."
MODE = "rank: choose from the answer list; generate: write freely."
METHOD = "How a teacher is followed: efficientvlm, layer by layer; dlip, by what modules say; dime-fm, by embeddings of unpaired data."
LEARNT = "vqa, nlvr2, retrieval, captioning, grounding or embedding"
EVAL_MODE = f"{MODE[:-1]}. Grounding: box, or gradcam: where a network that matches looks."
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print settings and plan as JSON, and all that is wrong; do nothing.", rich_help_panel=RUN)
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or start it anew.", rich_help_panel=RUN)]
Force = Annotated[bool, typer.Option("--force", help="Replace a finished output.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUN)]

RESULT = option(str, "--out", "JSON file for the result.", "FILE")
OPTIONS: dict[str, Option] = {
    "model": option(str, "--model", "Checkpoint folder, or bundled:NAME.", "DIR"),
    "import.model": option(str, "--model", "Published file, or folder or hub id of a CLIP, SigLIP or BLIP.", "FILE|DIR|NAME"),
    "models": option(list[str], "--model", "Checkpoint folder, or bundled:NAME. Repeatable.", "DIR"),
    "out": option(str, "--out", "Folder to write.", "DIR"),
    "eval.out": RESULT,
    "bench.out": RESULT,
    "predict.out": option(str, "--out", "PNG file of what was found; captioning: JSONL file; zeroshot: CSV file.", "FILE"),
    "sheet": option(str, "--sheet", "Zeroshot: PNG file of the pictures by class.", "FILE"),
    "data": option(str, "--data", DATA, "DATA"),
    "columns": option(
        list[str],
        "--column",
        "Where a role is found, e.g. question=text. Repeatable.",
        "ROLE=NAME",
        read=lambda texts: pairs(texts, "--column"),
    ),
    "sentences": option(str, "--sentences", "Embedding: texts, none of which need belong to a picture.", "DATA"),
    "side": option(str, "--side", "What is embedded: images or sentences."),
    "embed.model": option(str, "--model", "Checkpoint folder of the teacher.", "DIR"),
    "vectors": option(str, "--import", "Vectors that another program made, instead of --model: .npy or .parquet.", "FILE"),
    "ids": option(str, "--ids", "Ids of the vectors in an .npy file, one a line; by default in the order of the data.", "FILE"),
    "embed.limit": option(int, "--limit", "Use only so many samples."),
    "embed.batch_size": option(int, "--batch-size", "Samples at a time."),
    "val": option(str, "--val", "Validation data; by default held-out training images.", "DATA"),
    "split": option(str, "--split", "train, val or test."),
    "export.split": option(str, "--split", "What accuracy is measured on: val or test."),
    "limit": option(int, "--limit", "Use only so many images."),
    "task": option(str, "--task", "What is learnt or measured: vqa, nlvr2, retrieval, captioning or grounding.", "TASK"),
    "finetune.task": option(str, "--task", f"What is learnt: {LEARNT}.", "TASK"),
    "distill.task": option(str, "--task", "What is learnt: pretraining, or embedding.", "TASK"),
    "prune.task": option(str, "--task", f"What is learnt: {LEARNT}, or pretraining; or none.", "TASK"),
    "eval.task": option(str, "--task", "What is measured: vqa, nlvr2, retrieval, captioning, grounding, zeroshot or linear-probe.", "TASK"),
    "answers": option(str, "--answers", "File with one answer a line.", "FILE"),
    "classes": option(str, "--classes", "Zeroshot: file of class names; by default as the data call them.", "FILE"),
    "predict.classes": option(list[str], "--classes", "Zeroshot: name of a class, or file of names. Repeatable.", "NAME|FILE"),
    "templates": option(
        list[str], "--template", "Zeroshot: sentence with {} for the class, clip-7, clip-18, or a file. Repeatable.", "TEXT|FILE"
    ),
    "train": option(str, "--train", "Linear probe: data it learns from; by default the split train of --data.", "DATA"),
    "family": option(str, "--family", "xvlm, blip or clip."),
    "size": option(str, "--size", "tiny, small or base: random weights."),
    "vision_from": option(
        str, "--vision-from", "Folder of an image model (init: CLIP, DINOv2, ViT; shrink: ViT, DINOv2, Swin, ConvNeXt).", "DIR"
    ),
    "text_from": option(str, "--text-from", "Folder of a BERT model.", "DIR"),
    "tokenizer": option(str, "--tokenizer", "Folder of a tokenizer.", "DIR"),
    "init.tokenizer": option(str, "--tokenizer", "Folder of a tokenizer, or train.", "DIR|train"),
    "vocab_size": option(int, "--vocab-size", "Size of a tokenizer that is trained."),
    "image_size": option(int, "--image-size", "Side of the square images in pixels."),
    "layout": option(str, "--layout", "auto, pretrain, retrieval, vqa, nlvr2, text_assignment, captioning or grounding."),
    "preset": option(
        str,
        "--preset",
        "Sizes of a known student: dlip-small, dlip-base, dime-fm-vit-b32, tinyclip-61m, tinyclip-39m or tinyclip-8m.",
        "NAME",
    ),
    "layers": option(list[str], "--layers", "How many layers of a tower, or which: vision=6, text=1,3,5.", "TOWER=LAYERS", read=layers),
    "mode": option(str, "--mode", MODE),
    "eval.mode": option(str, "--mode", EVAL_MODE),
    "statement": option(str, "--statement", "A statement about two images, true or false.", "TEXT"),
    "question": option(str, "--question", "The question, or the phrase that is looked for.", "TEXT"),
    "image": option(
        list[str], "--image", "Image file; to search or describe it, also a folder; to describe it, a tar. Repeatable.", "FILE|DIR"
    ),
    "filter": option(str, "--filter", "Captioning: checkpoint that matches; captions that it finds unfit are dropped.", "DIR"),
    "threshold": option(float, "--threshold", "Filter: least probability of a match; 0.5 by default."),
    "predict.task": option(
        str, "--task", "What is asked of a model that does several: vqa, nlvr2, retrieval, grounding, captioning or zeroshot.", "TASK"
    ),
    "captions": option(str, "--captions", "Captioning: JSONL file for what is said of each image.", "FILE"),
    "decoding": option(str, "--decoding", "beam, greedy or sample.", panel=CAPTIONS),
    "beams": option(int, "--beams", "Texts that a search keeps: of a caption 3 by default, of an answer 1.", panel=CAPTIONS),
    "prompt": option(str, "--prompt", "What captions begin with; by default as tuned.", "TEXT", CAPTIONS),
    "min_length": option(int, "--min-length", "Fewest tokens, first one and prompt included; by default as tuned.", panel=CAPTIONS),
    "max_length": option(int, "--max-length", "Most tokens of a caption or answer, counted likewise; by default as tuned.", panel=CAPTIONS),
    "length_rule": option(str, "--length-rule", "published, or generated as newer transformers have it.", panel=CAPTIONS),
    "length_penalty": option(float, "--length-penalty", "Power of the number of tokens that a score is divided by.", panel=CAPTIONS),
    "repetition_penalty": option(float, "--repetition-penalty", "Above 1: what was said is less likely.", panel=CAPTIONS),
    "top_k": option(int, "--top-k", "Sampling: draw from so many of the likeliest tokens.", panel=CAPTIONS),
    "top_p": option(float, "--top-p", "Sampling: draw from the likeliest tokens of this probability.", panel=CAPTIONS),
    "predict.temperature": option(float, "--temperature", "Sampling: divides the logits.", panel=CAPTIONS),
    "predict.seed": option(int, "--seed", "Sampling: what is drawn follows from it.", panel=CAPTIONS),
    "text": option(list[str], "--text", "Retrieval: what is looked for. Repeatable.", "TEXT"),
    "texts": option(str, "--texts", "Retrieval: file with one text a line.", "FILE"),
    "top": option(int, "--top", "How many answers or matches to show; 5 by default."),
    "max_tokens": option(int, "--max-tokens", "Longest question; by default as tuned."),
    "rerank": option(int, "--rerank", "Retrieval: so many candidates of a query are ranked anew by matching.", "K"),
    "rerank_by": option(str, "--rerank-by", "What orders them: matching, or sum of logit and cosine; by default as published.", "RULE"),
    "text_length": option(int, "--text-length", "Tokens a question."),
    "batch_sizes": option(list[int], "--batch-size", "Repeatable; 1 and 8 by default."),
    "rounds": option(int, "--rounds", "Timed rounds; the models take turns."),
    "export.rounds": option(int, "--rounds", "Timed rounds; 0 times nothing."),
    "threads": option(int, "--threads", "Processor threads."),
    "table": option(bool, "--table", "Measure what layers take too, for prune --budget latency: one model, one batch size."),
    "format": option(str, "--format", "onnx: graphs; padded: zeros in the original shapes; hf, open_clip: their classes.", "FORM"),
    "int8": option(bool, "--int8", "ONNX with int8 weights; what they cost and gain is measured."),
    "teacher": option(str, "--teacher", "Checkpoint to learn from.", "DIR", KNOWLEDGE),
    "distillation": option(str, "--distillation", METHOD, panel=KNOWLEDGE, also="--method"),
    "prune.distillation": option(str, "--distillation", METHOD, panel=KNOWLEDGE),
    "kd": option(float, "--kd", "Weight of the distillation terms; 0 to 1, with dlip any.", panel=KNOWLEDGE),
    "temperature": option(float, "--temperature", "Softens the logits that are compared.", panel=KNOWLEDGE),
    "cache_teacher": option(bool, "--cache-teacher/--no-cache-teacher", "Run the teacher once a sample; memory for time.", panel=KNOWLEDGE),
    "sparsity": option(float, "--sparsity", "Part of what can be removed that is removed, 0 to 1.", panel=UNITS),
    "to": option(
        str, "--to", "What the whole model may cost instead: 30M parameters, with --budget macs 1.5G; or 20ms a request.", "SIZE", UNITS
    ),
    "budget": option(str, "--budget", "What is counted: parameters, macs or latency.", panel=UNITS),
    "prune.text_length": option(int, "--text-length", "Budgets macs and latency: tokens a text.", panel=UNITS),
    "prune.table": option(str, "--table", "Budget latency: what evlm bench --table measured; else it is measured first.", "FILE", UNITS),
    "method": option(str, "--method", "l0, magnitude, taylor or random.", panel=UNITS),
    "from_gates": option(str, "--from-gates", "Cut this prune output again, without training.", "DIR", UNITS),
    "min_heads": option(int, "--min-heads", "Heads every layer keeps.", panel=UNITS),
    "min_neurons": option(int, "--min-neurons", "Neurons every layer keeps.", panel=UNITS),
    "round_to": option(int, "--round-to", "Keep neurons in multiples of this.", panel=UNITS),
    "allow_blind": option(bool, "--allow-blind/--no-allow-blind", "Let the last path of an input be cut as well.", panel=UNITS),
    "keep_dense": option(bool, "--keep-dense/--no-keep-dense", "Store the unsliced weights for later cuts.", panel=UNITS),
    "epochs": option(float, "--epochs", "Passes over the images.", panel=TRAINING),
    "max_steps": option(int, "--max-steps", "Length in steps, instead of --epochs.", panel=TRAINING),
    "batch_size": option(int, "--batch-size", "Images a step, over all processes.", panel=TRAINING),
    "eval.batch_size": option(int, "--batch-size", "Images at a time."),
    "select-sentences.batch_size": option(int, "--batch-size", "Sentences at a time."),
    "select-sentences.model": option(str, "--model", "Checkpoint that embeds the sentences.", "DIR"),
    "select-sentences.sentences": option(str, "--sentences", "Text file with a sentence a line, or a table.", "FILE"),
    "images": option(str, "--images", "Embeddings of the images.", "DIR|FILE"),
    "sentence_vectors": option(str, "--sentence-vectors", "Embeddings of the sentences, instead of --model.", "DIR|FILE"),
    "per_image": option(int, "--per-image", "Keep only what is among so many best sentences of some image."),
    "cap": option(int, "--cap", "At most so many whose nearest image is the same; 10 by default."),
    "total": option(int, "--total", "At most so many in all, the best."),
    "min_similarity": option(float, "--min-similarity", "Least cosine with the nearest image."),
    "search": option(str, "--search", "exact, approximate, or auto by the number of images."),
    "lr": option(float, "--lr", "Peak learning rate.", panel=TRAINING),
    "seed": option(int, "--seed", "Every random draw follows from it.", panel=RUN),
    "device": option(str, "--device", "auto, cpu, cuda, mps, ...", panel=RUN),
    "workers": option(str, "--workers", "Processes that read pictures: auto, or a number.", "N", RUN, read=number_or_word),
    "precision": option(str, "--precision", "fp32 or bf16.", panel=RUN),
    "set": option(list[str], "--set", "Any setting by its name, e.g. weights.text_hidden=0.5.", "KEY=VALUE", RUN),
    "dry_run": Option(DryRun, default=False),
    "resume": Option(Resume, default=True),
    "force": Option(Force, default=False),
    "json": Option(Json, default=False),
    "quiet": Option(Quiet, default=False),
}
"""Setting, or `STAGE.SETTING` where a stage says it in other words → its option."""
