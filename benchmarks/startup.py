"""Processor seconds of short commands, most of which go into loading torch and transformers.

python benchmarks/startup.py [--code LABEL=PYTHON ...] [--rounds 5]

Every command runs as a process of its own on a tiny model; user and system time are added, and the median over the rounds is kept. The
versions take turns. A version is named by the Python that it is installed for; by default this one alone, called `after`. Rows of the CSV
that are measured again are replaced. `torch` and `transformers` are what an import of torch, and of transformers' base class of models,
takes by itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median

from PIL import Image
from published import ROOT, as_csv, csv_of, rows_of

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.runtime.hardware import processor

MODEL = "bundled:easy-vqa"
COMMANDS = {
    "--help": ["--help"],
    "inspect": ["inspect", MODEL],
    "shrink": ["shrink", "--model", MODEL, "--out", "shrunk", "--force"],
    "predict": ["predict", "--model", MODEL, "--image", "picture.png", "--question", "what color is the shape?"],
    "eval": ["eval", "--model", MODEL, "--data", "shapes", "--set", "limit=2"],
}
FLOORS = {"torch": "import torch", "transformers": "from transformers import PreTrainedModel"}


def seconds(call: list[str], folder: Path) -> float:
    """User and system time of one run of `call` in `folder`."""
    before = os.times()
    subprocess.run(call, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", action="append", default=[], help="LABEL=PYTHON of an environment that has the version")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    versions = dict(text.split("=", 1) for text in options.code) or {"after": sys.executable}
    floors = {("", name): [sys.executable, "-c", text] for name, text in FLOORS.items()}
    calls = floors | {
        (label, name): [os.path.abspath(python), "-m", "efficientvlm.cli.main", *words]
        for name, words in COMMANDS.items()
        for label, python in versions.items()
    }
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
        for _ in range(options.rounds):
            for key, call in calls.items():
                found[key].append(seconds(call, folder))
    rows = [
        {
            "code": label,
            "command": name,
            "processor_s": round(median(times), 2),
            "least_s": round(min(times), 2),
            "rounds": len(times),
            "load": round(os.getloadavg()[0], 1),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        for (label, name), times in found.items()
    ]
    path = ROOT / csv_of("startup", processor())
    kept = [row for row in rows_of(path) if (row["code"], row["command"]) not in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, as_csv([*kept, *rows]))
    for row in rows:
        print(f"{row['code']:8} {row['command']:14} {row['processor_s']:6.2f} s")


if __name__ == "__main__":
    main()
