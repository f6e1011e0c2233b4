"""Pictures a second: those that worker processes read and hand over, beside PyTorch's usual loader with Pillow, and steps on large JPEGs.

python benchmarks/loader.py [--pictures 400] [--steps 8] [--workers 0 1 2] [--parts alone training]

Both loaders read the same JPEGs of 640 x 480, resize them to a square (bicubic) and give uint8 batches of 32. The training steps are those
of an X-VLM of random weights on pictures of 256 and of 4096 pixels; `exact` ones are decoded whole, `reduced` ones as random crops allow.
Two processors in all; of several rounds the fastest counts, and beside it stands what the processors had to do for a picture. Rows of the
same processor are replaced, and the plot is drawn from the CSV.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from published import ROOT, as_csv, csv_of, rows_of
from torch.utils.data import DataLoader, Dataset

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.control import Control
from efficientvlm.data.ahead import Ahead, wanted
from efficientvlm.data.batch import stack
from efficientvlm.data.draw import generator
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.opening import open_data
from efficientvlm.runtime.hardware import processor
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages.run import module_of

SIDES = 224, 384
BATCH, STEP_BATCH = 32, 8
SMALL, PHOTO, LARGE = (341, 256), (640, 480), (4096, 3072)
MODEL = {"size": "tiny", "image_size": 224, "data": "shapes:size=100"}
PLOT = Path("docs/loader.png")


def photos(folder: Path, count: int, size: tuple[int, int]) -> str:
    """`count` JPEGs with smooth and rough parts, as photographs have them, and a caption each, as a CSV file; of large ones two, again and
    again."""
    folder.mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(count):
        lines.append(f"{number}.jpg,picture number {number}")
        if size == LARGE and number > 1:
            shutil.copy(folder / f"{number % 2}.jpg", folder / f"{number}.jpg")
            continue
        rng = generator(0, "photo", size[0], number)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        fine = Image.fromarray(rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        Image.blend(coarse, fine, 0.15).save(folder / f"{number}.jpg", quality=90)
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "rows.csv")


class Plain(Dataset[torch.Tensor]):
    """What many training scripts have: a file opened by Pillow, resized, as a tensor."""

    def __init__(self, folder: Path, side: int) -> None:
        self.paths, self.side = sorted(folder.glob("*.jpg")), side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = Image.open(self.paths[index]).convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def plain(rows: str, side: int, workers: int) -> Iterator[Any]:
    yield from DataLoader(Plain(Path(rows).parent, side), batch_size=BATCH, num_workers=workers)


@cache
def opened(rows: str, side: int) -> Any:
    return open_data(PAIRS, rows, "test", image_size=side)


def ours(rows: str, side: int, workers: int) -> Iterator[Any]:
    source = opened(rows, side)
    jobs = [range(start, min(start + BATCH, len(source))) for start in range(0, len(source), BATCH)]
    with Ahead(lambda job: stack([source[index].image for index in wanted(job)]), jobs, workers) as batches:
        yield from batches


def speed(read: Callable[[str, int, int], Iterator[Any]], rows: str, side: int, workers: int) -> tuple[float, float]:
    """Pictures a second from the first asked for to the last one had, workers started in it; milliseconds of processors a picture."""
    opened(rows, side)
    began, used = time.perf_counter(), sum(os.times()[:4])
    count = sum(len(batch) for batch in read(rows, side, workers))
    return count / (time.perf_counter() - began), 1000 * (sum(os.times()[:4]) - used) / count


def steps(model: Path, rows: str, out: Path, number: int, workers: int, augment: str) -> dict[str, float]:
    """Medians over the steps of a short run, without the first: seconds a step, and milliseconds waited for data."""
    settings = {"task": "retrieval", "model": str(model), "data": rows, "out": str(out), "max_steps": number, "batch_size": STEP_BATCH}
    settings |= {"val_fraction": 0.0, "eval_limit": 0, "log_every": 1, "save_every": 10**6, "device": "cpu", "seed": 0}
    given = stage_settings("finetune", {**settings, "workers": workers, "augment": augment})
    module_of("finetune").run(given, Control(quiet=True))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    return {
        "seconds_per_step": median(STEP_BATCH / line["samples_per_s"] for line in lines),
        "data_ms": median(line["data_ms"] for line in lines),
    }


def alone(pictures: int, workers: Sequence[int], rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row a measurement of pictures that nothing is done with; loaders take turns."""
    rows = photos(folder / "photos", pictures, PHOTO)
    for side in SIDES:
        for count in workers:
            found: dict[str, list[tuple[float, float]]] = {"evlm": [], "DataLoader + PIL": []}
            for _ in range(rounds):
                for name, read in (("evlm", ours), ("DataLoader + PIL", plain)):
                    found[name].append(speed(read, rows, side, count))
            for name, speeds in found.items():
                best, used = max(fast for fast, _ in speeds), median(busy for _, busy in speeds)
                row = {"what": "pictures alone", "loader": name, "side": side, "workers": count}
                yield {**row, "pictures_per_s": best, "processor_ms": used}


def training(number: int, workers: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """A row a measurement of `number` training steps."""
    module_of("init").run(stage_settings("init", {**MODEL, "out": str(folder / "model")}), Control(quiet=True))
    small = photos(folder / "small", STEP_BATCH, SMALL)
    large = photos(folder / "large", STEP_BATCH, LARGE)
    cases = [("256 px", small, "crop", min(workers)), ("4096 px, exact", large, "light", min(workers))]
    cases += [("4096 px, reduced", large, "crop", count) for count in workers]
    for at, (what, data, augment, count) in enumerate(cases):
        found = steps(folder / "model", data, folder / f"out{at}", number, count, augment)
        yield {"what": f"training on {what}", "loader": "evlm", "side": MODEL["image_size"], "workers": count, **found}


COLUMNS = ("what", "loader", "side", "workers", "pictures_per_s", "processor_ms", "seconds_per_step", "data_ms")


def draw(lines: list[dict[str, str]], path: Path) -> None:
    """Pictures a second of both loaders, and seconds a step, by the number of workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column, key in ((left, "pictures_per_s", ("loader", "side")), (right, "seconds_per_step", ("what",))):
        groups: dict[str, list[tuple[str, float]]] = {}
        for line in lines:
            if line[column]:
                groups.setdefault(", ".join(line[part] for part in key), []).append((line["workers"], float(line[column])))
        for name, points in groups.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("training on "))
        axes.set(xlabel="workers", title=column.replace("_per_step", " a step").replace("_per_s", " a second"))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pictures", type=int, default=400)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--parts", nargs="+", choices=["alone", "training"], default=["alone", "training"])
    options.add_argument("--csv", type=Path, help="by default in benchmarks/results")
    options.add_argument("--plot", type=Path, help=f"by default {PLOT}")
    given = options.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # and with it all that is started here
    torch.set_num_threads(1)
    path, rows = given.csv or ROOT / csv_of("loader", processor()), []
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        if "alone" in given.parts:
            found.append(alone(given.pictures, given.workers, given.rounds, folder))
        if "training" in given.parts:
            found.append(training(given.steps, given.workers, folder))
        for row in chain(*found):
            about = {"load": os.getloadavg()[0], "threads": 1, "torch": version("torch"), "pillow": version("pillow")}
            about |= {"processor": processor(), "date": time.strftime("%Y-%m-%d")}
            rows.append({**{name: row.get(name) for name in COLUMNS}, **about})
            print(row, file=sys.stderr, flush=True)
            write_atomic(path, as_csv(rows))  # what is there counts, if the rest is not waited for
    draw(rows_of(path), given.plot or ROOT / PLOT)


if __name__ == "__main__":
    main()
