"""X-VLM-base at 384 px through the whole chain on an ordinary machine: every command in a process of its own, its memory measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from efficientvlm.checkpoints.folder import require_complete

GIB = 2**30
PEAK = 8 * GIB
TOWERS = 208_874_496  # vision, text and fusion at 224 px (CLIP-ViT-B/16 and BERT-base of the paper)
POSITIONS = (24**2 - 14**2) * 768  # that 384 px have more
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] what color is the shape ? yes no red green blue circle rectangle triangle".split()
TUNING = "--data easy-vqa --set limit=20 --set eval_limit=1 --set batch_size=2 --set questions_per_image=2 --set freeze_at=1".split()

RELOADED = """
import sys
import torch
from efficientvlm.compression.surgery import mask_vector
from efficientvlm.loaded import load
from efficientvlm.stages.recut import dense_model

pruned = load(sys.argv[1])
family, sizes = pruned.family, pruned.sizes
draw = torch.Generator().manual_seed(0)
batch = pruned.model.example(2, 12)
batch["pixels"] = torch.randint(256, batch["pixels"].shape, generator=draw, dtype=torch.uint8)
batch["question_ids"] = torch.randint(sizes.vocab_size, batch["question_ids"].shape, generator=draw)
dense = dense_model(pruned)
masks = {}
units = dense.units()
for unit, stays in zip(units, mask_vector(units, pruned.model.config.kept_indices()).tolist(), strict=True):
    (gate,) = unit.gates
    module = dense.get_submodule(gate.module)
    if module not in masks:
        masks[module] = torch.ones(module.in_features)
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * masks[module],))
    masks[module][gate.start : gate.stop] = float(stays)
with torch.inference_mode():
    masked, small = dense.run(batch)["logits"], pruned.model.run(batch)["logits"]
    for mask in masks.values():
        mask.fill_(1)
    whole = dense.run(batch)["logits"]
print(float((masked - small).abs().max()), float((whole - small).abs().max()), float(small.abs().max()))
"""


class Commands:
    """Runs commands in fresh processes and remembers what each took."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spent: list[tuple[str, float, int]] = []

    def __call__(self, name: str, *words: str) -> str:
        return self.run(name, [sys.executable, "-m", "efficientvlm.cli.main", name, *words, "--quiet"])

    def run(self, name: str, command: list[str]) -> str:
        """What it prints; AssertionError with its last words unless it ends well, or needs more memory than allowed."""
        began = time.monotonic()
        with (self.folder / "out").open("w+") as out, (self.folder / "err").open("w+") as errors:
            process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            errors.seek(0)
            assert process.returncode == 0, f"{name}: {errors.read()[-2000:]}"
            self.spent.append((name, time.monotonic() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
            assert self.spent[-1][2] < PEAK, f"{name} took {self.spent[-1][2] / GIB:.1f} GiB"
            return out.read()

    def table(self) -> str:
        lines = [f"{name:8} {seconds:6.0f} s {peak / GIB:6.2f} GiB" for name, seconds, peak in self.spent]
        return "\n".join(["", "X-VLM-base, 384 px: seconds and peak memory of each process", *lines])


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    yield Commands(tmp_path)
    shutil.rmtree(tmp_path)  # five gigabytes


def accounting(folder: Path) -> dict[str, Any]:
    return require_complete(folder).accounting


@pytest.mark.slow
def test_base_is_shrunk_pruned_reloaded_timed_and_exported(commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join([*WORDS, *(f"unused{number}" for number in range(30522 - len(WORDS)))]) + "\n")
    decoder = ("--set", "settings.decoder_layers=6", "--set", "settings.heads=[]")
    commands("init", "--size", "base", "--image-size", "384", "--tokenizer", "bert", *decoder, "--out", "teacher")
    teacher = accounting(tmp_path / "teacher")["parameters"]["by_tower"]
    assert sum(teacher[tower] for tower in ("vision", "text", "fusion")) == TOWERS + POSITIONS

    commands("shrink", "--model", "teacher", "--out", "student")
    commands("prune", "--model", "student", "--teacher", "teacher", *TUNING, "--sparsity", "0.4", "--max-steps", "2", "--out", "pruned")
    shutil.rmtree(tmp_path / "student")
    pruned = accounting(tmp_path / "pruned")
    assert abs(pruned["sparsity"]["achieved"] - 0.4) < 0.005
    masked, whole, largest = map(float, commands.run("reload", [sys.executable, "-c", RELOADED, "pruned"]).split())
    assert masked < 1e-5 * max(1, largest) < 0.01 * whole

    timing = ("--set", "batch_sizes=[1]", "--set", "rounds=1")
    timed = json.loads(commands("bench", "--model", "teacher", "--model", "pruned", *timing, "--set", "warmup_rounds=0", "--json"))
    assert [model["parameters_timed"] for model in timed["models"]] == [sum(teacher.values()), pruned["parameters"]["total"]]

    commands("export", "--model", "pruned", "--format", "onnx", "--int8", *timing, "--out", "int8")
    exported = require_complete(tmp_path / "int8").metrics
    assert exported["onnx_int8"]["bytes"] < 0.6 * exported["onnx_fp32"]["bytes"]
    assert max(exported["difference"].values()) < 0.1
    with capsys.disabled():
        print(commands.table())
