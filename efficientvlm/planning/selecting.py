"""What a selection of sentences would take, from the number of images and of sentences (formulas ours)."""

from __future__ import annotations

import time
from typing import Any

import torch

from efficientvlm.planning.costs import FLOAT
from efficientvlm.runtime.hardware import pick_device, synchronise
from efficientvlm.selection.candidates import bytes_of_record
from efficientvlm.selection.pile import KEY, SORTED_AT_ONCE
from efficientvlm.selection.rules import Rules
from efficientvlm.selection.search import BLOCK, TRAINED_ON, clusters

HALF, NUMBER = 2, 8
COLUMNS = 32  # bytes of a candidate in memory
COPIES = 4  # of these while they are sorted
SORTED = 40  # bytes of a sentence while repeated ones are looked for
LINE = 100  # bytes of a sentence that is written, about
SLOWER = 2  # than a plain product: a tower on short texts, and clusters of few images each
PROBE = (256, 8192)  # rows that are multiplied to see how fast a machine is


def held(rules: Rules, images: int, sentences: int) -> int:
    """Candidates that are held at the end, at most."""
    if rules.per_image is not None:
        return images * min(rules.per_image, sentences)
    return min(sentences, rules.places * (images if rules.by_image else 1))


def memory(rules: Rules, images: int, sentences: int, width: int, batch: int, approximate: bool) -> dict[str, int]:
    """Bytes by purpose, those of the model aside."""
    if approximate:
        lists = clusters(images)
        index = images * (HALF * width + NUMBER) + FLOAT * width * (lists + min(images, TRAINED_ON * lists))
        compared = FLOAT * batch * lists
    else:
        index, compared = FLOAT * width * images, 2 * FLOAT * batch * min(images, BLOCK)
    candidates = COPIES * COLUMNS * held(rules, images, sentences) + FLOAT * images
    repeats = sentences // 8 + SORTED * min(sentences, SORTED_AT_ONCE)
    return {"images": index, "comparison": compared, "candidates": candidates, "repeated sentences": repeats}


def disk(rules: Rules, images: int, sentences: int, width: int, approximate: bool) -> dict[str, int]:
    """Bytes of the folder in the end, of what a run that is stopped goes on from, and at the fullest."""
    most = held(rules, images, sentences)
    kept = most if rules.per_image is not None else most // (rules.places // (rules.cap or rules.total or 1))
    output = 2 * LINE * min(kept, sentences, rules.total or sentences)
    state = 2 * most * bytes_of_record(width) + images * HALF * width * approximate
    return {"output": output, "state": state, "peak": max(KEY.itemsize * sentences, state + most * bytes_of_record(width) + output)}


def seconds(sentences: int, images: int, width: int, approximate: bool, probes: int, macs: int, device: str) -> dict[str, Any]:
    """Seconds of embedding and of searching, by the speed of a product of matrices on this machine.

    `macs`: multiply-adds of a sentence in the model; 0 where it is embedded already.
    """
    rate = speed(width, pick_device(device))
    if approximate:
        lists = clusters(images)
        searched = SLOWER * width * (lists + min(1.0, probes / lists) * images) / speed(width, torch.device("cpu"))
    else:
        searched = width * images / rate
    parts = {"embed": sentences * SLOWER * macs / rate, "search": sentences * searched}
    return {**{name: round(value, 1) for name, value in parts.items()}, "seconds": round(sum(parts.values()), 1)}


@torch.inference_mode()
def speed(width: int, device: torch.device) -> float:
    """Multiply-adds a second of a product of matrices `width` wide, the best of three."""
    rows, columns = (torch.ones(count, width, device=device) for count in PROBE)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        rows @ columns.T
        synchronise(device)
        times.append(time.perf_counter() - began)
    return PROBE[0] * PROBE[1] * width / min(times[1:])
