"""What an exported form gains and loses: accuracy or recall, latency in turns, bytes of the checkpoint and of its ONNX graphs."""

from __future__ import annotations

from typing import Any

import torch

from efficientvlm.checkpoints.card import number
from efficientvlm.control import Control
from efficientvlm.loaded import Loaded
from efficientvlm.report.metrics import titles
from efficientvlm.runtime.progress import Bar
from efficientvlm.settings.stages import Bench, Export
from efficientvlm.stages import latency
from efficientvlm.stages.bench import calls_of, timed_of
from efficientvlm.tasks.known import measured_of

WARMUP = 3


def measure(config: Export, variants: dict[str, tuple[Loaded, int]], source: Any, control: Control) -> dict[str, Any]:
    """Bytes of every variant (label → checkpoint, bytes), its metrics on `source` if there is one, median latency unless `rounds` is 0.

    The variants take turns; a speed-up is that over the first variant in the same round.
    """
    measured: dict[str, Any] = {label: {"bytes": size} for label, (_, size) in variants.items()}
    for label, (loaded, _) in variants.items() if source else ():
        task = measured_of(loaded)
        assert task is not None
        shown: dict[str, Any] = {"title": f"{label}, {config.split}", "quiet": control.quiet}
        result = task.measure(loaded, source, batch_size=config.batch_size, seed=config.seed, **shown)
        measured[label] |= {name: result[name] for name in (*task.metrics, *task.also) if name in result}
    for row in timings(config, {label: loaded for label, (loaded, _) in variants.items()}, control) if config.rounds else ():
        measured[row["model"]][f"batch_{row['batch']}"] = {"median_ms": row["median_ms"], "speedup": row["speedup"]}
    return measured


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
    head = ["", "MB", titles()[metric], *(f"{key.replace('_', ' ')} (ms)" for key in batches), *("speed-up" for _ in batches)]
    rows = [head]
    for label, values in measured.items():
        accuracy = f"{values[metric]:.4f}" if metric in values else "not measured"
        times = [number(values[key]["median_ms"]) for key in batches]
        gains = [f"{values[key]['speedup']:.2f}×" for key in batches]
        rows.append([label.replace("_", " "), f"{values['bytes'] / 1e6:.2f}", accuracy, *times, *gains])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
