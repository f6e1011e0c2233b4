"""Many unbalanced answers of several words through the whole chain, from `init` with a tokenizer of its own, in little memory.

python benchmarks/many_answers.py --work FOLDER [--answers 1400] [--images 2800] [--steps 30]

Small pictures and questions are drawn here, in the manner of DAQUAR: what lies on what, how many, of which colour; answers of one to four
words whose frequencies fall off as those of words do. A stage that is finished in FOLDER is not run again, so that the command may be
stopped and goes on. A row a stage, with the resident peak of its process, goes to the CSV.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from peaks import run
from PIL import Image
from published import ROOT, as_csv, csv_of, rows_of

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.runtime.hardware import processor

COLOURS = ("red", "blue", "green", "brown", "black", "white", "yellow", "grey", "pink", "beige")
THINGS = (
    "table", "chair", "lamp", "book", "pillow", "bed", "sofa", "door", "window", "cup", "bottle", "box", "shelf", "mirror", "clock",
    "plant", "curtain", "basket", "drawer", "toy", "picture", "sink", "stove", "monitor", "keyboard", "towel", "bag", "rug", "plate", "pan",
)  # fmt: skip
SIDE = 64
BATCH = "32"


def answers(count: int) -> list[str]:
    """`count` different answers, the short ones first: numbers, colours, things, coloured things, pairs of things."""
    pairs = (f"{one}, {other}" for one, other in product(THINGS, THINGS) if one < other)
    coloured = (f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS))
    triples = (f"{colour} {one} and {other}" for colour, one, other in product(COLOURS, THINGS, THINGS) if one < other)
    found = [*map(str, range(10)), *COLOURS, *THINGS, *coloured, *pairs, *triples]
    return found[:count]


def rows(count: int, images: int, seed: int = 0) -> Iterator[tuple[np.ndarray[Any, Any], dict[str, str]]]:
    """Pictures with a question, its answer and a caption; the n-th answer is 1/n as frequent as the first, and each comes once at least."""
    rng, said = np.random.default_rng(seed), answers(count)
    weights = 1 / np.arange(1, len(said) + 1)
    drawn = [*range(len(said)), *rng.choice(len(said), max(0, images - len(said)), p=weights / weights.sum())]
    for at in rng.permutation(drawn[:images]):
        answer = said[at]
        picture = np.full((SIDE, SIDE, 3), rng.integers(60, 200, 3), np.uint8)
        left, top = rng.integers(0, SIDE // 2, 2)
        picture[top : top + 24, left : left + 24] = np.random.default_rng(at).integers(0, 256, 3)  # an answer has its colour
        thing = THINGS[rng.integers(len(THINGS))]
        yield picture, {"question": f"what is beside the {thing}?", "answer": answer, "caption": f"a room with a {thing} and {answer}"}


def write(folder: Path, count: int, images: int) -> None:
    """`questions.jsonl` and `pairs.jsonl` with their pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    questions, pairs = [], []
    for number, (picture, row) in enumerate(rows(count, images)):
        name = f"pictures/{number}.png"
        Image.fromarray(picture).save(folder / name)
        questions.append(json.dumps({"image": name, "question": row["question"], "answer": row["answer"]}))
        pairs.append(json.dumps({"image": name, "caption": row["caption"]}))
    for file, lines in (("pairs.jsonl", pairs), ("questions.jsonl", questions)):
        write_atomic(folder / file, "".join(f"{line}\n" for line in lines).encode())


def stages(steps: int, vocabulary: int) -> dict[str, list[str]]:
    """Stage → its command, in the order in which they run."""
    train = ["--max-steps", str(steps), "--batch-size", BATCH]
    questions, pairs = ["--data", "questions.jsonl"], ["--data", "pairs.jsonl"]
    words = ["--set", f"vocab_size={vocabulary}"]
    return {
        "init": ["init", "--size", "tiny", *questions, *words, "--set", f"settings.image_size={SIDE}", "--out", "made"],
        "pretrain": ["pretrain", "--model", "made", *pairs, *train, "--out", "pretrained"],
        "teacher": ["finetune", "--model", "pretrained", *questions, *train, "--out", "teacher"],
        "shrink": ["shrink", "--model", "pretrained", "--out", "student"],
        "distill": ["distill", "--model", "student", "--teacher", "pretrained", *pairs, *train, "--out", "distilled"],
        "prune": ["prune", "--model", "distilled", "--teacher", "teacher", *questions, *train, "--sparsity", "0.4", "--out", "pruned"],
        "finetune": ["finetune", "--model", "pruned", "--teacher", "teacher", *questions, *train, "--out", "final"],
        "eval": ["eval", "--model", "final", *questions, "--split", "val", "--out", "accuracy.json"],
    }


def chain(folder: Path, path: Path, *, count: int, images: int, steps: int, vocabulary: int) -> list[dict[str, Any]]:
    """Run what is not in the CSV `path` yet, and return its rows."""
    if not (folder / "questions.jsonl").is_file():
        write(folder, count, images)
    made: list[dict[str, Any]] = [dict(row) for row in rows_of(path)]
    done = {row["stage"] for row in made}
    for stage, arguments in stages(steps, vocabulary).items():
        if stage in done:
            continue
        peak, seconds = run(*arguments, folder=folder)
        metrics = json.loads((folder / "accuracy.json").read_bytes())["metrics"] if stage == "eval" else {}
        found = {name: metrics.get(name) for name in ("accuracy", "standard_error", "majority_accuracy", "unanswerable")}
        sizes = {"answers": count, "images": images, "steps": steps, "vocabulary": vocabulary}
        where = {"processor": processor(), "commit": manifest.code().commit, "date": manifest.now()[:10]}
        made.append({"stage": stage, "peak_mib": peak, "cpu_seconds": seconds, **sizes, **found, **where})
        write_atomic(path, as_csv(made))
        print(f"{stage}: {peak:.0f} MiB, {seconds:.0f} s of processor time", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--answers", type=int, default=1400)
    parser.add_argument("--images", type=int, default=2800)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=2000)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    own = asked.work / "many_answers.csv"  # in the folder, so that another folder begins anew
    sizes = {"count": asked.answers, "images": asked.images, "steps": asked.steps, "vocabulary": asked.vocabulary}
    made = chain(asked.work, own, **sizes)
    write_atomic(ROOT / csv_of("many_answers", processor()), as_csv(made))


if __name__ == "__main__":
    main()
