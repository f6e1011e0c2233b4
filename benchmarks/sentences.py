"""Time, memory and recall of selecting sentences among many images:  python benchmarks/sentences.py

Vectors are drawn in clusters, as those of images and sentences lie. All sentences are searched approximately and selected with a cap, and
some of them exactly beside it, which gives the recall and what an exact search of all would take.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import ROOT, as_csv, csv_of

from efficientvlm.checkpoints.manifest import environment, peak_memory_bytes
from efficientvlm.runtime.hardware import processor
from efficientvlm.runtime.progress import Bar
from efficientvlm.selection.candidates import Candidates, Offer
from efficientvlm.selection.rules import Rules
from efficientvlm.selection.search import Approximate, Exact, unit

BLOCK = 16_384
SPREAD = 0.7  # of a vector about its cluster, in parts of a cluster's own length


class Clustered:
    """Vectors in clusters, drawn block by block: `side` tells images from sentences, which lie in the same clusters."""

    def __init__(self, count: int, clusters: int, width: int, side: int) -> None:
        self.count, self.width, self.side, self.ids = count, width, side, range(count)
        self.centres = np.random.default_rng(0).standard_normal((clusters, width), np.float32)

    def blocks(self) -> Iterator[Any]:
        for number, begin in enumerate(range(0, self.count, BLOCK)):
            draw = np.random.default_rng([self.side, number])
            size = min(BLOCK, self.count - begin)
            around = self.centres[draw.integers(0, len(self.centres), size)]
            yield unit(around + SPREAD * draw.standard_normal((size, self.width), np.float32))


def measure(images: Clustered, sentences: Clustered, probes: int, compared: int, cap: int) -> dict[str, Any]:
    """Seconds of making the index, of searching and holding all sentences, and of choosing; recall on the first `compared`."""
    before = peak_memory_bytes() or 0
    began = time.perf_counter()
    index = Approximate(images, images.count, probes=probes)
    made = time.perf_counter() - began
    searched = 0.0
    first: list[tuple[Any, Any]] = []
    with tempfile.TemporaryDirectory() as folder, Bar("select", sentences.count) as bar:
        began, drawn, done = time.perf_counter(), 0.0, 0
        candidates = Candidates(Path(folder), images.count, images.width, Rules(cap=cap))
        blocks = sentences.blocks()
        while True:
            paused = time.perf_counter()
            vectors = next(blocks, None)
            drawn += time.perf_counter() - paused
            if vectors is None:
                break
            paused = time.perf_counter()
            near = index.nearest(vectors)
            searched += time.perf_counter() - paused
            if sum(len(part) for part, _ in first) < compared:
                first.append((vectors, near.best))
            offer = Offer(np.arange(done, done + len(vectors)), near.best, near.score, near.best, near.score)
            candidates.offer(offer, lambda numbers, block=vectors, begin=done: block[numbers - begin])
            done += len(vectors)
            candidates.save(done, {})
            bar.update(done)
        streamed = time.perf_counter() - began - drawn
        began = time.perf_counter()
        choice, held = candidates.choose()
        chosen = time.perf_counter() - began
        candidates.close()
    peak = peak_memory_bytes() or 0
    vectors, best = (np.concatenate(column)[:compared] for column in zip(*first, strict=True))
    exact = Exact(images)
    began = time.perf_counter()
    truth = np.concatenate([exact.nearest(vectors[at : at + 1024]).best for at in range(0, len(vectors), 1024)])
    slow = time.perf_counter() - began
    return {
        "index_seconds": round(made, 1),
        "search_seconds": round(searched, 1),
        "hold_seconds": round(streamed - searched, 1),
        "choose_seconds": round(chosen, 1),
        "exact_seconds_for_all": round(slow * sentences.count / len(vectors), 1),
        "compared": len(vectors),
        "recall": round(float((best == truth).mean()), 4),
        "held": len(held.number),
        "kept": len(choice.kept),
        "peak_mib": round(peak / 2**20),
        "peak_mib_before": round(before / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--compared", type=int, default=10_000)
    parser.add_argument("--cap", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / csv_of("sentences", processor()))
    given = parser.parse_args()
    images = Clustered(given.images, given.clusters, given.width, 1)
    sentences = Clustered(given.sentences, given.clusters, given.width, 2)
    found = measure(images, sentences, given.probes, given.compared, given.cap)
    asked = {name: value for name, value in vars(given).items() if name != "out"}
    machine = {"processor": processor(), "threads": torch.get_num_threads(), "python": environment()["python"]}
    row = {**asked, **found, **machine}
    given.out.write_bytes(as_csv([row]))
    print("\n".join(f"{name}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
