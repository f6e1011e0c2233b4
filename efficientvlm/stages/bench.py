"""bench: latency of one or more checkpoints side by side, from image and question tensors to the ranked answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from efficientvlm import bench
from efficientvlm.checkpoint import fingerprint
from efficientvlm.compression.accounting import count_parameters
from efficientvlm.control import Control
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.hardware import autocast, pick_device, synchronise
from efficientvlm.memory import enough_memory
from efficientvlm.progress import Bar, say
from efficientvlm.settings.stages import Bench
from efficientvlm.stages.common import Loaded, check_precision, load, texts_of
from efficientvlm.stages.evaluate import counts_first_token_twice
from efficientvlm.stages.reading import of_read
from efficientvlm.stages.results import MACHINE, ResultFile
from efficientvlm.tasks.vqa import rank

RANKED = (
    "image and question tensors to the answer ranked first in the closed list; random pixels and tokens, candidates tokenised beforehand"
)
FORWARD = "one image and one text a sample, as tensors, to the outputs of the forward pass; random pixels and tokens"


def run(config: Bench, control: Control) -> dict[str, Any]:
    """Time all models in turns; the first one is what the others are compared with.

    Where one of them has a list of answers, what is timed is ranking it, else the forward pass; `timed` says which. Then a task-agnostic
    checkpoint is timed with an untrained answer decoder, as deep as its fusion tower, and marked `trained: false`.
    A finished result of the same checkpoints and settings in `config.out` is returned as it is, unless forced; where it was measured on
    another machine, that is said.

    Raises:
        BadInput: a question longer than a model reads, a model that cannot do what the others do, an `out` of another measurement.
    """
    device = pick_device(config.device)
    with bench.threads(config.threads) as threads:
        machine = {**bench.machine(device), "threads": threads}
        inputs = {f"models.{number}": fingerprint(spec) for number, spec in enumerate(config.models)}
        inputs[MACHINE] = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
        file = ResultFile.open(config, "bench", inputs, force=control.force)
        if file.finished:
            where = "" if file.finished["machine"] == machine else f", of another machine ({described(file.finished['machine'])})"
            say(f"bench: {file.path} is up to date: these are its earlier timings{where}, --force measures again", quiet=control.quiet)
            return file.finished
        models = [load(spec, exported=True) for spec in config.models]
        for loaded in models:
            check_precision(loaded, config.precision)
        trained = ["vqa" in loaded.tasks for loaded in models]
        answers = next((loaded.model.config.answers for loaded in models if loaded.model.config.answers), None)
        answering = any(trained) and bool(answers)
        labels = unique(config.models)
        timed = partial(ranking, answers=answers, quiet=control.quiet) if answering else forward
        calls = {label: timed(loaded, config=config, device=device) for label, loaded in zip(labels, models, strict=True)}
        total = len(config.batch_sizes) * (config.rounds + config.warmup_rounds)
        lower = f"lower batch_sizes (now {', '.join(map(str, config.batch_sizes))}), or time fewer models at once"
        with enough_memory("bench", lower), Bar("bench", total, quiet=control.quiet) as bar, torch.inference_mode():
            rows = bench.latency(
                calls,
                config.batch_sizes,
                rounds=config.rounds,
                warmup_rounds=config.warmup_rounds,
                synchronise=lambda: synchronise(device),
                progress=bar.update,
            )
    sizes = [
        {
            "model": label,
            "sha256": inputs[f"models.{number}"],
            "parameters_timed": parameters(loaded),
            "form": form(loaded),
            "image_size": loaded.sizes.image_size,
            "answers": len(loaded.model.config.answers or answers or []),
            "trained": trained[number] or not answering,
        }
        for number, (label, loaded) in enumerate(zip(labels, models, strict=True))
    ]
    result: dict[str, Any] = {
        "timed": RANKED if answering else FORWARD,
        "machine": machine,
        "precision": config.precision,
        "text_length": config.text_length,
        "rounds": config.rounds,
        "warmup_rounds": config.warmup_rounds,
        "models": sizes,
        "latency": rows,
    }
    return file.write(result)


def described(machine: dict[str, Any]) -> str:
    """Name, threads and torch of a machine."""
    return f"{machine.get('name')}, {machine.get('threads')} threads, torch {machine.get('torch')}"


def unique(names: list[str]) -> list[str]:
    """`names` with a number behind every repetition: the same model may be timed twice, to see the noise."""
    return [name if name not in names[:at] else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)]


def parameters(loaded: Loaded) -> int | None:
    """Parameters of what is timed; of ONNX graphs those of the checkpoint they were exported from."""
    if isinstance(loaded.model, torch.nn.Module):
        return int(count_parameters(loaded.family, loaded.model)["total"])
    return loaded.manifest.accounting.get("parameters", {}).get("total")


def form(loaded: Loaded) -> str:
    """`torch`, or the precision of ONNX graphs."""
    return "torch" if isinstance(loaded.model, torch.nn.Module) else f"onnx {loaded.model.config.precision}"


def forward(loaded: Loaded, config: Bench, device: torch.device) -> Callable[[int], object]:
    """A function of the batch size that runs the forward pass on prepared random inputs."""
    check_length(loaded, config.text_length)
    family, model = loaded.family, loaded.model.to(device).eval()
    draw = torch.Generator().manual_seed(config.seed)
    batches = {size: family.example_batch(model.config, size, config.text_length, device) for size in config.batch_sizes}
    for batch in batches.values():
        batch["pixels"] = torch.randint(256, batch["pixels"].shape, generator=draw, dtype=torch.uint8).to(device)

    def run(size: int) -> object:
        with autocast(device, config.precision):
            return family.forward(model, batches[size])

    return run


def check_length(loaded: Loaded, length: int) -> None:
    if length > loaded.sizes.max_positions:
        why = f"{loaded.path} reads {loaded.sizes.max_positions} tokens"
        raise BadInput(f"questions of {length} tokens are too long", why, "use a smaller --text-length")


def ranking(
    loaded: Loaded, config: Bench, device: torch.device, answers: list[str] | None = None, quiet: bool = False
) -> Callable[[int], object]:
    """A function of the batch size that ranks `loaded`'s own answers, or else `answers`, for prepared random inputs.

    A model without answer decoder gets one, in memory: `loaded.model` is replaced.
    """
    make_answering(loaded)
    family, model = loaded.family, loaded.model.to(device).eval()
    check_length(loaded, config.text_length)
    texts = texts_of(loaded, config.max_tokens)
    ids, mask = (tensor.to(device) for tensor in texts.batch(model.config.answers or answers or []))
    for remark in of_read(texts):
        say(f"bench: {loaded.path}: {remark}", quiet=quiet)
    batches = {size: example(loaded.sizes.image_size, texts, size, config.text_length, config.seed, device) for size in config.batch_sizes}
    twice = counts_first_token_twice(loaded.manifest, None)

    def answer(size: int) -> object:
        with autocast(device, config.precision):
            return rank(family, model, batches[size], (ids, mask), top=model.config.rank_top, first_token_twice=twice)

    return answer


def make_answering(loaded: Loaded) -> None:
    """Give `loaded.model` an untrained answer decoder, if it has none; :class:`BadInput` where none can be made."""
    try:
        loaded.model, _ = loaded.family.for_vqa(loaded.model, None, "auto")
    except BadInput as error:
        why = error.why or error.what
        raise BadInput(f"{loaded.path} cannot be timed beside the others", why, "time models that do the same thing") from None


def example(image_size: int, texts: Texts, size: int, length: int, seed: int, device: torch.device) -> dict[str, Any]:
    """`size` random images with one question of `length` tokens each, none of them padding."""
    draw = torch.Generator().manual_seed(seed)
    special = {texts.cls, texts.sep, texts.pad}
    words = torch.tensor([token for token in range(len(texts.tokenizer)) if token not in special])
    questions = words[torch.randint(len(words), (size, length), generator=draw)]
    questions[:, 0], questions[:, -1] = texts.start, texts.sep
    pixels = torch.randint(256, (size, 3, image_size, image_size), generator=draw, dtype=torch.uint8)
    return {
        "pixels": pixels.to(device),
        "image_index": torch.arange(size, device=device),
        "question_ids": questions.to(device),
        "question_mask": torch.ones_like(questions).to(device),
    }
