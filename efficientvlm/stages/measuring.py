"""What an exported form gains and loses: accuracy or recall, latency in turns, bytes of the checkpoint and of its ONNX graphs."""

from __future__ import annotations

from typing import Any

import torch

from efficientvlm.checkpoints.card import number
from efficientvlm.control import Control
from efficientvlm.errors import TargetMissed, shorten
from efficientvlm.loaded import Loaded
from efficientvlm.report.metrics import titles
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.stages import Bench, Export
from efficientvlm.stages import latency
from efficientvlm.stages.bench import calls_of, timed_of
from efficientvlm.tasks.choices import Agreement
from efficientvlm.tasks.known import measured_of

WARMUP = 3
COMPARED = 8  # pictures, of which variants should say the same


def measure(config: Export, variants: dict[str, tuple[Loaded, int]], source: Any, control: Control) -> dict[str, Any]:
    """Bytes of every variant (label → checkpoint, bytes), its metrics on `source` if there is one, median latency unless `rounds` is 0.

    The variants take turns; a speed-up is that over the first variant in the same round. `same_choices` is the part of a few pictures of
    which a variant says the same as the first.

    Raises:
        TargetMissed: ONNX in fp32 says something else than torch where torch's choice was no matter of rounding.
    """
    measured: dict[str, Any] = {label: {"bytes": size} for label, (_, size) in variants.items()}
    for label, (loaded, _) in variants.items() if source else ():
        task = measured_of(loaded)
        assert task is not None
        shown: dict[str, Any] = {"title": f"{label}, {config.split}", "quiet": control.quiet}
        result = task.measure(loaded, source, batch_size=config.batch_size, seed=config.seed, **shown)
        measured[label] |= {name: result[name] for name in (*task.metrics, *task.also) if name in result}
    for label, agreed in agreements(config, variants, source).items():
        measured[label]["same_choices"] = agreed.same / agreed.of
        tied = f", {agreed.tied} differ where both are as likely" if agreed.tied else ""
        said = f"export: {label.replace('_', ' ')} says the same as torch of {agreed.same} of {agreed.of} pictures{tied}"
        say(said + (f"; for instance {shorten(agreed.different[0][1])!r}" if agreed.different else ""), quiet=control.quiet)
        if agreed.different and label == "onnx_fp32":
            wanted, got = (shorten(text) for text in agreed.different[0])
            why = f"it says {got!r} where torch says {wanted!r}, of {len(agreed.different)} of {agreed.of} pictures"
            raise TargetMissed("the ONNX graphs do not say what the checkpoint does", why, "nothing was written")
    for row in timings(config, {label: loaded for label, (loaded, _) in variants.items()}, control) if config.rounds else ():
        measured[row["model"]][f"batch_{row['batch']}"] = {"median_ms": row["median_ms"], "speedup": row["speedup"]}
    return measured


def agreements(config: Export, variants: dict[str, tuple[Loaded, int]], source: Any) -> dict[str, Agreement]:
    """How many of the same choices every other variant makes as the first does; none where the task knows of none."""
    (first, (loaded, _)), *others = variants.items()
    task = measured_of(loaded)
    said = {label: task.choices(form, source, COMPARED, config.seed) if task else [] for label, (form, _) in variants.items()}
    if not said[first]:
        return {}
    return {label: Agreement.between(said[first], said[label], 2 * config.tolerance) for label, _ in others}


def timings(config: Export, variants: dict[str, Loaded], control: Control) -> list[dict[str, Any]]:
    """Records of :func:`latency.latency`: of what the task of all variants is asked, or of the forward pass."""
    settings = Bench(
        models=list(variants), batch_sizes=config.batch_sizes, text_length=config.text_length, rounds=config.rounds, seed=config.seed
    )
    calls = calls_of(variants, timed_of(list(variants.values())), settings, torch.device("cpu"), control.quiet)
    with Bar("latency", len(config.batch_sizes) * (config.rounds + WARMUP), quiet=control.quiet) as bar, torch.inference_mode():
        return latency.latency(calls, config.batch_sizes, rounds=config.rounds, warmup_rounds=WARMUP, progress=bar.update)


def table(measured: dict[str, Any]) -> str:
    """The measurements as text, a line a variant."""
    first = next(iter(measured.values()))
    batches = [key for key in first if key.startswith("batch_")]
    metric = next((name for name in titles() if name in first), "accuracy")
    head = [
        "",
        "MB",
        titles()[metric],
        "says the same",
        *(f"{key.replace('_', ' ')} (ms)" for key in batches),
        *("speed-up" for _ in batches),
    ]
    rows = [head]
    for label, values in measured.items():
        accuracy = f"{values[metric]:.4f}" if metric in values else "not measured"
        times = [number(values[key]["median_ms"]) for key in batches]
        gains = [f"{values[key]['speedup']:.2f}×" for key in batches]
        same = f"{values['same_choices']:.0%}" if "same_choices" in values else ""
        rows.append([label.replace("_", " "), f"{values['bytes'] / 1e6:.2f}", accuracy, same, *times, *gains])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
