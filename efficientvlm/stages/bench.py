"""bench: latency of one or more checkpoints side by side, from tensors to what their task makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from efficientvlm.compression.accounting import count_parameters
from efficientvlm.compression.latency import LatencyTable, machine_in_words
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.onnx.description import is_exported
from efficientvlm.loaded import Loaded, check_precision, load, shapes, text_length
from efficientvlm.runtime.hardware import machine_of, pick_device, synchronise
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.stages import Bench
from efficientvlm.stages import latency, tabling
from efficientvlm.stages.results import MACHINE, ResultFile, digests_of
from efficientvlm.stages.workspace import Job, Workspace
from efficientvlm.tasks.known import preferred
from efficientvlm.tasks.task import Asked, timed_passes

FORWARD = "one image and one text a sample, as tensors, to the outputs of the forward pass; random pixels and tokens"


@dataclass(frozen=True)
class Timing(Job):
    """The networks that are timed, as shapes; `task` is what they are asked (None: the forward pass), `trained` whether they learnt it."""

    models: list[Loaded]
    task: Asked | None
    trained: list[bool]


def prepare(config: Bench, workspace: Workspace) -> Timing:
    """What is timed.

    Raises:
        BadInput: a question or answer longer than a model reads, a model that cannot do what the others do; a table of ONNX graphs.
    """
    models = [workspace.checkpoint(spec, exported=True) for spec in config.models]
    task = timed_of(models)
    trained = [task is None or task.able(loaded) for loaded in models]
    for loaded in models:
        with workspace.checking(), torch.device("meta"):
            check_precision(loaded, config.precision)
            check_length(loaded, config.text_length)
            if config.table and is_exported(loaded.path):
                why = "nothing can be removed of ONNX graphs"
                raise BadInput(f"no table can be made of {loaded.path}", why, "give the checkpoint they were exported from")
            if task:
                text_length(loaded, config.max_tokens)
                task.make_able(loaded)
    return Timing(models, task, trained, inputs={f"models.{number}": spec for number, spec in enumerate(config.models)})


def run(config: Bench, control: Control) -> dict[str, Any]:
    """Time all models in turns; the first one is what the others are compared with.

    What is timed is what a task of one of them is asked, or else the forward pass; `timed` says which. A checkpoint that has not learnt
    that task yet is then made able in memory (with an untrained answer decoder, as deep as its fusion tower), and marked `trained: false`.
    A finished result of the same checkpoints and settings in `config.out` is returned as it is, unless forced; where it was measured on
    another machine, that is said.

    Raises:
        BadInput: as :func:`prepare`; an `out` of another measurement.
    """
    device, job = pick_device(config.device), prepare(config, Workspace(control.quiet))
    with latency.threads(config.threads) as threads:
        machine = {**machine_of(device), "threads": threads}
        inputs = digests_of(job)
        inputs[MACHINE] = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()
        file = ResultFile.open(config, "bench", inputs, force=control.force)
        if file.finished:
            where = "" if file.finished["machine"] == machine else f", of another machine ({machine_in_words(file.finished['machine'])})"
            say(f"bench: {file.path} is up to date: these are its earlier timings{where}, --force measures again", quiet=control.quiet)
            return file.finished
        models = [load(spec, exported=True) for spec in config.models]
        listed: list[str] = next((loaded.model.config.answers for loaded in models if loaded.model.config.answers), [])
        labels = unique(config.models)
        calls = calls_of(dict(zip(labels, models, strict=True)), job.task, config, device, control.quiet)
        total = len(config.batch_sizes) * (config.rounds + config.warmup_rounds)
        lower = f"lower batch_sizes (now {', '.join(map(str, config.batch_sizes))}), or time fewer models at once"
        with enough_memory("bench", lower), Bar("bench", total, quiet=control.quiet) as bar, torch.inference_mode():
            rows = latency.latency(
                calls,
                config.batch_sizes,
                rounds=config.rounds,
                warmup_rounds=config.warmup_rounds,
                synchronise=lambda: synchronise(device),
                progress=bar.update,
            )
        table = None
        if config.table:
            source = load(config.models[0])  # timing above may have made it able to do a task
            task = tabled(source, job.task)
            if task is not job.task:
                say("bench: the table is of the forward pass: the network would have other layers for its task", quiet=control.quiet)
            table = table_of(source, task, config, machine, inputs["models.0"], control.quiet)
            for doubt in table.doubts():
                say(f"WARNING: bench: the table is not to be trusted: {doubt}; measure with more rounds on a quiet machine")
    sizes = [
        {
            "model": label,
            "sha256": inputs[f"models.{number}"],
            "parameters_timed": parameters(loaded),
            "form": form(loaded),
            "image_size": loaded.sizes.image_size,
            "answers": len(loaded.model.config.answers or listed),
            "trained": job.trained[number],
        }
        for number, (label, loaded) in enumerate(zip(labels, models, strict=True))
    ]
    result: dict[str, Any] = {
        "timed": job.task.timed_as if job.task else FORWARD,
        "machine": machine,
        "precision": config.precision,
        "text_length": config.text_length,
        "rounds": config.rounds,
        "warmup_rounds": config.warmup_rounds,
        "models": sizes,
        "latency": rows,
    }
    if table:
        result["table"] = table.model_dump(mode="json")
    return file.write(result)


def table_of(loaded: Loaded, task: Asked | None, config: Bench, machine: dict[str, Any], digest: str, quiet: bool) -> LatencyTable:
    """The table of a latency budget of `loaded`, whose weights are there and which is able to do `task`.

    Raises:
        OutOfMemory: saying what to lower.
    """
    device = torch.device(machine["device"])
    total = tabling.ROUND * (config.rounds + config.warmup_rounds)
    with enough_memory("the latency table", "use a smaller batch"), Bar("latency table", total, quiet=quiet) as bar:
        return tabling.measure(
            loaded,
            lambda network: calls_of({"": network}, task, config, device, quiet=True)[""],
            config.batch_sizes[0],
            rounds=config.rounds,
            warmup_rounds=config.warmup_rounds,
            round_to=config.round_to,
            synchronise=lambda: synchronise(device),
            progress=bar.update,
            timed=task.timed_as if task else FORWARD,
            model=digest,
            machine=machine,
            precision=config.precision,
            text_length=config.text_length,
            image_size=loaded.sizes.image_size,
        )


def timed_of(models: Sequence[Loaded]) -> Asked | None:
    """The task that `models` are asked while they are timed; None where it is the forward pass."""
    asked = (task for loaded in models for task in preferred(loaded) if isinstance(task, Asked))
    return next((task for task in asked if task.can_be_timed(models)), None)


def tabled(loaded: Loaded, task: Asked | None) -> Asked | None:
    """What a latency table of `loaded` is of: `task`, or None, the forward pass, where a network able to do it would have other units."""
    if task is None:
        return None
    able = replace(loaded, model=shapes(loaded.family, loaded.model.config))
    with torch.device("meta"):
        task.make_able(able)
    return task if able.model.units() == loaded.model.units() else None


def calls_of(
    models: dict[str, Loaded], task: Asked | None, config: Bench, device: torch.device, quiet: bool
) -> dict[str, Callable[[int], object]]:
    """Label → a function of the batch size that is timed."""
    among = list(models.values())
    return {
        label: task.timed(loaded, config, device, among, quiet) if task else forward(loaded, config, device)
        for label, loaded in models.items()
    }


def unique(names: list[str]) -> list[str]:
    """`names` with a number behind every repetition: the same model may be timed twice, to see the noise."""
    return [name if name not in names[:at] else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)]


def parameters(loaded: Loaded) -> int | None:
    """Parameters of what is timed; of ONNX graphs those of the checkpoint they were exported from."""
    if isinstance(loaded.model, torch.nn.Module):
        return int(count_parameters(loaded.model)["total"])
    return loaded.manifest.accounting.get("parameters", {}).get("total")


def form(loaded: Loaded) -> str:
    """`torch`, or the precision of ONNX graphs."""
    return "torch" if isinstance(loaded.model, torch.nn.Module) else f"onnx {loaded.model.config.precision}"


def forward(loaded: Loaded, config: Bench, device: torch.device) -> Callable[[int], object]:
    """A function of the batch size that runs the forward pass on prepared random inputs."""
    return timed_passes(loaded, config, device, lambda batch: loaded.model.run(batch))


def check_length(loaded: Loaded, length: int) -> None:
    if length > loaded.sizes.max_positions:
        why = f"{loaded.path} reads {loaded.sizes.max_positions} tokens"
        raise BadInput(f"questions of {length} tokens are too long", why, "use a smaller --text-length")
