"""Statements about two images on NLVR: accuracy and consistency of one small network, beside the majority class.

python benchmarks/nlvr.py FOLDER [--out runs/nlvr] [--steps 3000] [--seed 0]

FOLDER has `nlvr_train.parquet` and `nlvr_val.parquet`, with columns image (three boxes side by side), sentence, label, identifier. The left
image is made of the first two boxes, the right one of the third. Every sentence about three boxes is there with their six permutations,
which are one group: consistency is of all six. A row is appended to the CSV. There are 247 different sentences to learn from, so no
comparison of methods is drawn from it.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from PIL import Image
from published import ROOT, append, code, csv_of

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import sha256
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.runtime.hardware import processor
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages.run import run_stage

BOXES = ((0, 100), (150, 250), (300, 400))
"""Left and right ends in pixels; all are 100 high, with gray between them."""
SIZE = (400, 100)
SPLITS = {"train": "nlvr_train.parquet", "val": "nlvr_val.parquet"}
NETWORK: dict[str, Any] = {
    "image_size": 64, "patch_size": 8, "vision_width": 128, "vision_heads": 4, "vision_intermediate": 256, "vision_layers": 4,
    "text_width": 128, "text_heads": 4, "text_intermediate": 256, "text_layers": 2, "fusion_layers": 2, "local_attention_depth": 1,
    "embed_dim": 64, "dropout": 0.1,
}  # fmt: skip
METRICS = (
    *("statement_accuracy", "standard_error", "majority_accuracy"),
    *("consistency", "consistency_standard_error", "majority_consistency", "statements", "sentences"),
)


def two_images(picture: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The first two boxes of a picture of NLVR side by side, and the third.

    Raises:
        BadInput: a picture of another size.
    """
    if picture.size != SIZE:
        raise BadInput(f"a picture of {picture.size[0]} x {picture.size[1]}", "NLVR's have 400 x 100", "give NLVR's own pictures")
    first, second, third = (picture.convert("RGB").crop((left, 0, right, SIZE[1])) for left, right in BOXES)
    both = Image.new("RGB", (first.width + second.width, SIZE[1]))
    both.paste(first, (0, 0))
    both.paste(second, (first.width, 0))
    return both, third


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of NLVR as statements about two images."""
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(64, columns=["image", "sentence", "label", "identifier"]):
        for row in batch.to_pylist():
            images = two_images(Image.open(io.BytesIO(row["image"]["bytes"])))
            yield {
                **{side: {"bytes": png(image), "path": None} for side, image in zip(("left", "right"), images, strict=True)},
                **{"sentence": row["sentence"], "label": row["label"], "group": row["identifier"]},
            }


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def prepared(folder: Path, out: Path) -> dict[str, str]:
    """Split → file of statements about two images below `out`, made of NLVR's in `folder` unless it is there."""
    import datasets

    found = {}
    for split, name in SPLITS.items():
        target = out / f"{split}-{sha256(folder / name)[:12]}.parquet"
        if not target.is_file():
            out.mkdir(parents=True, exist_ok=True)
            image, text = datasets.Image(), datasets.Value("string")
            kinds = {"left": image, "right": image, "sentence": text, "label": datasets.Value("bool"), "group": text}
            made = datasets.Dataset.from_list(list(rows(folder / name)), features=datasets.Features(kinds))
            made.to_parquet(target.with_suffix(".part"))
            target.with_suffix(".part").rename(target)
        found[split] = str(target)
    return found


def measured(folder: Path, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train one network on NLVR's training statements, and judge those of its other file."""
    data, began, control = prepared(folder, out / "data"), time.process_time(), Control()

    def run(stage: str, name: str, **settings: Any) -> str:
        path = str(out / str(seed) / str(steps) / name)
        run_stage(stage, stage_settings(stage, {"out": path, "seed": seed, **settings}), control)
        return path

    init = run("init", "init", size="tiny", data=data["train"], settings=NETWORK)
    learning = {"task": "nlvr2", "data": data["train"], "val": data["val"], "max_steps": steps, "batch_size": 32, "lr": 5e-4}
    model = run("finetune", "model", model=init, eval_limit=0, **learning)
    test = {"task": "nlvr2", "model": model, "data": data["val"], "split": "test"}
    result = run_stage("eval", stage_settings("eval", {**test, "out": str(Path(model).with_name("val.json"))}), control)
    made = require_complete(model)
    return {
        "data": "NLVR, boxes 1 and 2 as left image, box 3 as right image",
        "seed": seed,
        "steps": steps,
        **{name: result["metrics"][name] for name in METRICS},
        "above_majority_in_standard_errors": (result["metrics"]["statement_accuracy"] - result["metrics"]["majority_accuracy"])
        / result["metrics"]["standard_error"],
        "parameters": made.accounting["parameters"]["total"],
        "training_pairs": next(record.count for record in made.data if record.split == "train"),
        "cpu_seconds": round(time.process_time() - began, 1),
        "commit": code(),
        "torch": manifest.environment()["torch"],
        "date": manifest.now()[:10],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two files of NLVR lie")
    parser.add_argument("--out", type=Path, default=Path("runs/nlvr"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if missing := [name for name in SPLITS.values() if not (options.folder / name).is_file()]:
        parser.error(f"{options.folder} has no {missing[0]}")
    path = ROOT / csv_of("nlvr", processor())
    append(path, measured(options.folder, options.out, options.steps, options.seed))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
