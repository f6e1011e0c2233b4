"""The table of a latency budget: what the layers of a network take of one request, at several counts of their units."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.initialization import no_init_weights

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.latency import Check, Curve, LatencyTable, curves_of, digest_of, rising
from efficientvlm.compression.probe import Probe
from efficientvlm.compression.surgery import pad_model, slice_model
from efficientvlm.families.anatomy import NEURON
from efficientvlm.loaded import Loaded
from efficientvlm.stages.latency import no_garbage_collection

PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of the units of every layer, in the networks that are timed; in the last one a layer has one unit, or the fewest that it may keep."""
ODD_ABOVE = 64
ROUND = len(PARTS) + 1  # requests of a round

Call = Callable[[int], object]


def measure(
    loaded: Loaded,
    call_of: Callable[[Loaded], Call],
    batch: int,
    *,
    rounds: int,
    warmup_rounds: int,
    round_to: int = 1,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda done: None,
    **about: Any,
) -> LatencyTable:
    """Time the layers of `loaded`, as it was before anything was removed from it, inside of whole requests; ours.

    Five networks take turns, from which the same part of every layer was cut, and beside them the first one without a clock inside. A layer
    takes the least of all rounds, since whatever else the machine does only adds to it, and of a tower, kind and shape the mean over those
    that are alike; more units take no less time (isotonic regression). What is left of a request is the rest. Layers and rest are scaled
    to the median of the request without a clock, in which the machine does what it usually does.

    Args:
        loaded: a checkpoint with weights, whose values do not matter.
        call_of: a function of the batch size that answers prepared requests, of a checkpoint.
        rounds, warmup_rounds: as of :func:`latency.latency`.
        round_to: neurons are counted in multiples of this.
        about: `timed`, `model`, `machine` and `precision`, `text_length`, `image_size`, as the table has them.
    """
    with no_init_weights():  # every weight is copied
        dense = pad_model(loaded.model)
        anatomy = Anatomy.of(dense)
        kept = {part: _keep(anatomy, part, round_to) for part in PARTS}
        networks = {part: replace(loaded, model=slice_model(dense, keep)) for part, keep in kept.items()}
    calls = {part: call_of(network) for part, network in networks.items()}
    whole = networks[1.0].model
    del dense
    probes = {part: Probe(network.model, synchronise=synchronise, clock=clock) for part, network in networks.items()}
    with no_garbage_collection(), torch.inference_mode():
        plain, inside = _timed(calls, probes, batch, range(-warmup_rounds, rounds), progress)
    counts = {part: _counts(anatomy, keep) for part, keep in kept.items()}
    alike = curves_of(anatomy, {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()})
    raw = [_curve(groups, counts, inside) for groups in alike]
    rest = median(min(request.all_of - sum(request.layers.values()) for request in timed) for timed in inside.values())
    scale = median(plain) / (rest + sum(len(groups) * seconds[-1] for groups, (_, seconds) in zip(alike, raw, strict=True)))
    curves = []
    for groups, (at, seconds) in zip(alike, raw, strict=True):
        tower, _, kind = groups[0].split(".")
        layers = [int(name.split(".")[1]) for name in groups]
        curves.append(Curve(tower=tower, kind=kind, layers=layers, counts=at, ms=[1e3 * scale * value for value in seconds]))
    table = LatencyTable(
        shapes=digest_of(whole),
        batch=batch,
        answers=len(whole.config.answers or []),
        rounds=rounds,
        whole_ms=1e3 * median(plain),
        rest_ms=1e3 * scale * rest,
        scale=scale,
        curves=curves,
        **about,
    )
    checks = [
        Check(part=part, measured_ms=1e3 * median(request.all_of for request in timed), predicted_ms=_predicted(table, counts[part]))
        for part, timed in inside.items()
    ]
    return table.model_copy(update={"checks": checks})


class Request(NamedTuple):
    """Seconds of a request, and of them those of layers, by group."""

    all_of: float
    layers: dict[str, float]


def _timed(
    calls: dict[float, Call], probes: dict[float, Probe], batch: int, rounds: range, progress: Callable[[int], None]
) -> tuple[list[float], dict[float, list[Request]]]:
    """Seconds of requests to the whole network without a clock inside; and to all networks with one. Rounds below 0 are not counted."""
    turns: list[float | None] = [None, *PARTS]
    plain: list[float] = []
    inside: dict[float, list[Request]] = {part: [] for part in PARTS}
    for done, number in enumerate(rounds):
        turn = number % len(turns)
        for at, part in enumerate(turns[turn:] + turns[:turn], 1):
            probe = probes[1.0 if part is None else part]
            with nullcontext() if part is None else probe:
                began = probe.now()
                calls[1.0 if part is None else part](batch)
                seconds = max(probe.now() - began, 1e-9)
            if number >= 0 and part is None:
                plain.append(seconds)
            elif number >= 0 and part is not None:
                inside[part].append(Request(seconds, probe.seconds))
            progress(done * len(turns) + at)
    return plain, inside


def _keep(anatomy: Anatomy, part: float, round_to: int) -> torch.Tensor:
    """bool [units]: the first units of every group."""
    keep = torch.zeros(len(anatomy.units), dtype=torch.bool)
    for name, units in anatomy.groups.slices.items():
        keep[units.start : units.start + count_at(part, units.stop - units.start, round_to if name.endswith(NEURON) else 1)] = True
    return keep


def count_at(part: float, of: int, step: int) -> int:
    """About `part` of `of` units, in steps; of many an odd number, as learnt structures mostly have, where the step allows it."""
    if part == 1 or of <= step:
        return of
    count = max(step, round(part * of / step) * step)
    return min(of, count | 1 if step == 1 and of > ODD_ABOVE else count)


def _counts(anatomy: Anatomy, keep: torch.Tensor) -> dict[str, int]:
    return {name: int(keep[part].sum()) for name, part in anatomy.groups.slices.items()}


def _curve(groups: list[str], counts: dict[float, dict[str, int]], inside: dict[float, list[Request]]) -> tuple[list[int], list[float]]:
    """Counts from 0 on, and seconds of one of `groups` at each."""
    found: dict[int, list[float]] = {}
    for part, timed in inside.items():
        own = float(np.mean([min(request.layers[name] for request in timed) for name in groups]))
        found.setdefault(counts[part][groups[0]], []).append(own)
    at = sorted(found)
    seconds = rising(np.array([0.0, *(float(np.mean(found[count])) for count in at)]))
    return [0, *at], seconds.tolist()


def _predicted(table: LatencyTable, counts: dict[str, int]) -> float:
    layers = (np.interp(counts[name], curve.counts, curve.ms) for name, curve in table.by_group().items())
    return table.rest_ms + float(sum(layers))
