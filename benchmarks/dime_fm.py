"""Does a small tower of images keep what its CLIP can do, without pairs, and how much faster is it taught from stores?

python benchmarks/dime_fm.py [--part scenes|store|photos] [--seed 0] [--row NAME] [--photos photos] [--towers towers]
    [--precision fp32|bf16] [--out runs/dime-fm-figures] [--list]

The part `scenes` has a teacher a seed, trained on made scenes as the recipe `dime_fm/scenes` says, and students that saw no picture of 20
of its colours of shapes, which are what all are measured on. The part `store` times training steps with the teacher at work and with its
vectors looked up. The part `photos` (`dime_fm_photos.py`) needs two folders that scripts write. A row is appended to the CSV of its part as
soon as it is measured; rows that are there are passed over, and a training that was interrupted resumes. `publish_dime_fm.py` makes tables
and a plot of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from dime_fm_photos import PHOTOS, Places, photos_rows
from published import ROOT, about, append, csv_of, lines_of, share
from scenes import Chain

from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.errors import BadInput
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script

RECIPES = ROOT / "recipes" / "dime_fm"
SEEDS = (0, 1, 2)
SCENES, STORE = "scenes", "store"
PARTS = (SCENES, STORE, PHOTOS)
TEACHER, STUDENT, PUBLISHED, UNREAD, PRUNED = "teacher", "student", "both terms", "both terms unread", "pruned"
WHAT = {
    TEACHER: "a CLIP, trained on pairs of all colours of shapes",
    STUDENT: "three of its eight layers of images with 304 of 512 neurons, distilled by L_p-vl alone on pictures without 20 of them",
    PUBLISHED: "the same with L_vl and L_p-vl, weighed as published; sentences name all of them",
    UNREAD: "the same as that, and no sentence names one of the 20",
    PRUNED: "heads and neurons of the teacher's tower of images, cut to the size of the student without labels, by its term and data",
}
OF_RECIPE = {TEACHER: "teacher", STUDENT: "distilled", PRUNED: "pruned"}
"""Row → the stage of the recipe that makes it."""
BATCHES, MEASURED = (8, 32), ("median_ms", "speedup", "speedup_q1", "speedup_q3")
"""Pictures and texts of a request that is timed, and what is written down of it."""
COUNTED_TEXT = 12
"""Tokens of a text, both of the multiply-adds in a manifest and of what is timed."""


@dataclass(frozen=True)
class Row:
    """What has to be measured together: its key in the CSV of its part, and how its records come about."""

    part: str
    key: tuple[str, ...]
    measure: Callable[[Path], Iterator[dict[str, Any]]]


def rows(parts: Sequence[str], seeds: Sequence[int], places: Places) -> Iterator[Row]:
    """Every row, one part and seed after the other."""
    for part in parts:
        if part == SCENES:
            yield from (Row(part, (str(seed), name), partial(kept, seed, name)) for seed in seeds for name in WHAT)
        elif part == STORE:
            yield from (Row(part, (name,), partial(timed, name)) for name in PAIRS)
        else:
            yield from (Row(part, key, measure) for key, measure in photos_rows(seeds, places))


KEYS = {SCENES: ("seed", "model"), STORE: ("pair",), PHOTOS: ("seed", "model")}


class Scenes(Chain):
    """The rows of one seed."""

    def __init__(self, seed: int, root: Path) -> None:
        super().__init__(RECIPES / "scenes.yaml", seed, root / SCENES)

    def model(self, name: str) -> str:
        """The checkpoint of a row."""
        if name in OF_RECIPE:
            return self.made(OF_RECIPE[name])
        own = self.settings("distilled")
        for needed in (own.model, own.image_store):
            self.made(Path(needed).name)
        read = every_composition(own.sentences) if name == PUBLISHED else own.sentences
        self.like("distilled", name.replace(" ", "-"), weights=None, sentences=read)
        return str(self.root / name.replace(" ", "-"))

    def tested(self, name: str, test: str) -> dict[str, Any]:
        """The metrics of a row's model by the test `classes` or `test` of the recipe, measured once."""
        out = f"{name.replace(' ', '-')}-{test}.json"
        return dict(self.like(f"teacher-{test}", out, model=self.model(name))["metrics"])

    def speed(self, name: str, batch: int) -> dict[str, Any]:
        """Latency of a row's model and its speed-up over the teacher, both timed in turns."""
        models = {each: self.model(each) for each in dict.fromkeys((TEACHER, name))}
        out = f"{name.replace(' ', '-')}-speed-{batch}.json"
        return self.timed(out, models, text_length=COUNTED_TEXT, batch_sizes=[batch])[name]


def every_composition(data: str) -> str:
    """The scenes of `data` without what leaves compositions out."""
    name, _, settings = data.partition(":")
    return f"{name}:" + ",".join(part for part in settings.split(",") if not part.startswith(("without=", "only=")))


def kept(seed: int, name: str, root: Path) -> Iterator[dict[str, Any]]:
    """Train, measure on what only the teacher saw, and say what came out."""
    chain, began = Scenes(seed, root), time.process_time()
    model, teacher = (checkpoint.require_complete(chain.model(each)).accounting for each in (name, TEACHER))
    seconds = time.process_time() - began
    classes, found = chain.tested(name, "classes"), chain.tested(name, "test")
    best_classes, best = chain.tested(TEACHER, "classes"), chain.tested(TEACHER, "test")
    timings = {batch: chain.speed(name, batch) for batch in BATCHES}
    tower, whole = (each["parameters"]["by_tower"]["vision"] for each in (model, teacher))
    yield {
        "seed": seed,
        "model": name,
        "accuracy": classes["top1_accuracy"],
        "accuracy_of_teacher": share(classes["top1_accuracy"], best_classes["top1_accuracy"]),
        "image_to_text_r1": found["image_to_text_r1"],
        "text_to_image_r1": found["text_to_image_r1"],
        "r1": first(found),
        "r1_of_teacher": share(first(found), first(best)),
        "vision_parameters": tower,
        "vision_of_teacher": tower / whole,
        "parameters": model["parameters"]["total"],
        "macs": model["macs"]["total"],
        "macs_of_teacher": model["macs"]["total"] / teacher["macs"]["total"],
        "sparsity": model["sparsity"]["achieved"],
        **{f"batch_{batch}_{column}": timed[column] for batch, timed in timings.items() for column in MEASURED},
        "threads": timings[BATCHES[0]]["threads"],
        "load": timings[BATCHES[0]]["load"],
        "cpu_seconds": round(seconds, 1),
        "data": chain.settings("teacher-test").data,
        "images": chain.settings("teacher-test").limit,
        "classified": chain.settings("teacher-classes").limit,
        "classified_data": chain.settings("teacher-classes").data,
        **about(WHAT[name]),
    }


def first(metrics: dict[str, Any]) -> float:
    """R@1, the mean of both directions."""
    return float(metrics["image_to_text_r1"] + metrics["text_to_image_r1"]) / 2


@dataclass(frozen=True)
class Pair:
    """A teacher, drawn at random, and a student, of which training steps are timed. `teacher` is what init is told beyond the scenes'
    own, `student` what shrink is told; each stage of `rounds` takes `warm` steps and then `steps` that count."""

    what: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    batch: int
    rounds: int
    warm: int
    steps: int


VIT_L14 = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_intermediate": 4096, "patch_size": 14}
VIT_L14 |= {"text_width": 768, "text_layers": 12, "text_heads": 12, "text_intermediate": 3072, "embed_dim": 768}
PAIRS = {
    "scenes": Pair("eight layers at 64 pixels, and two of them", {}, {"layers": {"vision": 2, "text": 2}}, 64, 3, 5, 20),
    "published": Pair(
        "the shapes of ViT-L/14 and of ViT-B/32", {"size": "base", "settings": VIT_L14}, {"preset": "dime-fm-vit-b32"}, 8, 2, 1, 4
    ),
}
LIVE, IMAGES, BOTH = SOURCES = ("live", "images", "images and sentences")
"""What is looked up: nothing, as the teacher looks on; or its vectors of one side or both."""


def timed(name: str, root: Path) -> Iterator[dict[str, Any]]:
    """Images a second of training by what is looked up, in turns, in this process."""
    pair, chain = PAIRS[name], Chain(RECIPES / "scenes.yaml", SEEDS[0], root / STORE / name)
    data = f"{every_composition(chain.settings('start').data).partition(',size=')[0]},size={pair.batch * (pair.warm + pair.steps)}"
    teacher, student = str(chain.root / "start"), str(chain.root / "student")
    chain.like("start", "start", **pair.teacher)
    chain.run("shrink", "student", model=teacher, seed=SEEDS[0], **pair.student)
    stores: dict[str, str] = {}
    rates: dict[str, float | None] = {}
    for side in ("images", "sentences"):
        done = chain.run("embed", side, side=side, model=teacher, data=data)
        stores[side], rates[side] = str(chain.root / side), share(done.cost.samples, done.cost.seconds)
    given: dict[str, dict[str, Any]] = {
        LIVE: {"teacher": teacher},
        IMAGES: {"teacher": teacher, "image_store": stores["images"]},
        BOTH: {"teacher": None, "image_store": stores["images"], "sentence_store": stores["sentences"]},
    }
    load = round(os.getloadavg()[0], 1)
    found: dict[str, list[dict[str, Any]]] = {source: [] for source in SOURCES}
    common = {"model": student, "data": data, "sentences": data, "batch_size": pair.batch, "eval_limit": 0, "log_every": 1}
    for number in range(pair.rounds):
        for source in SOURCES:
            out = f"{source.replace(' ', '-')}-{number}"
            chain.like("distilled", out, max_steps=pair.warm + pair.steps, **{**common, "image_store": None, **given[source]})
            logged = map(json.loads, (chain.root / out / "metrics.jsonl").read_text("utf-8").splitlines())
            found[source] += [line for line in logged if "samples_per_s" in line][pair.warm :]
    base = median(line["samples_per_s"] for line in found[LIVE])
    for source, lines in found.items():
        low, middle, high = quantiles((line["samples_per_s"] for line in lines), n=4)
        yield {
            "pair": name,
            "source": source,
            "batch_size": pair.batch,
            "images_per_s": middle,
            "images_per_s_q1": low,
            "images_per_s_q3": high,
            "speedup": middle / base,
            **{f"{phase}_ms": median(line[f"{phase}_ms"] for line in lines) for phase in ("data", "teacher", "student", "optimizer")},
            "embedded_images_per_s": rates["images"],
            "embedded_sentences_per_s": rates["sentences"],
            "steps": len(lines),
            "threads": torch.get_num_threads(),
            "load": load,
            "data": data,
            **about(pair.what),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="all by default")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="all by default")
    parser.add_argument("--row", action="append", help="name of a model or of a pair; all by default")
    parser.add_argument("--photos", type=Path, default=Path("photos"), help="what efficientvlm.examples.photo_teacher wrote")
    parser.add_argument("--towers", type=Path, default=Path("towers"), help="what efficientvlm.examples.towers wrote")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="in which students of photos are trained")
    parser.add_argument("--out", type=Path, default=Path("runs/dime-fm-figures"))
    parser.add_argument("--list", action="store_true", help="say what is still to be run")
    options = parser.parse_args(arguments)
    return run_script(lambda: [*work(options)])


def work(options: argparse.Namespace) -> dict[Path, None]:
    """Add every row that is not there yet; the CSVs.

    Raises:
        BadInput: a row of no such name.
    """
    every = list(rows(options.part or PARTS, options.seed or SEEDS, Places(options.photos, options.towers, options.precision)))
    known = list(dict.fromkeys(row.key[-1] for row in every))
    if unknown := set(options.row or ()) - {*known}:
        raise BadInput(f"no row {', '.join(sorted(unknown))}", f"there are {'; '.join(known)}", "use one of these")
    paths: dict[Path, None] = {}
    for row in every:
        name = f"dime_fm_{row.part}"
        path = ROOT / csv_of(name, processor())
        paths[path] = None
        there = {tuple(line[column] for column in KEYS[row.part]) for line in lines_of(name, ROOT)}
        if row.key in there or (options.row and row.key[-1] not in options.row):
            continue
        print(" · ".join((row.part, *row.key)), file=sys.stderr, flush=True)
        if not options.list:
            for record in list(row.measure(options.out)):
                append(path, record)
    return paths


if __name__ == "__main__":
    sys.exit(main())
