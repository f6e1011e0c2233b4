"""A tiny X-VLM chain, built once a session; tests copy nothing and never write into it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the commands that tests start: as many workers as processors run already

import torch

from efficientvlm.control import Control
from efficientvlm.data import ahead
from efficientvlm.settings.compose import stage_settings

ahead.MOST = 0  # with `auto` no workers: tests that want some say so
QUIET = Control(quiet=True)
SIZES = {
    "vision_width": 16,
    "text_width": 16,
    "vision_heads": 4,
    "text_heads": 4,
    "vision_intermediate": 32,
    "text_intermediate": 32,
    "patch_size": 16,
    "embed_dim": 8,
    "dropout": 0.1,
}
TRAIN = {"max_steps": 6, "batch_size": 4, "log_every": 2, "limit": 40, "eval_limit": 4}
SHAPES = "shapes:difficulty=2,size=40"


def run_stage(name: str, control: Control = QUIET, **settings: Any) -> Any:
    """Run a stage from plain settings, as the command line does."""
    from efficientvlm.stages.run import module_of

    return module_of(name).run(stage_settings(name, settings), control)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def evlm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process; (exit code, stdout, stderr)."""
    from efficientvlm.cli import main as cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evlm", *map(str, words)])
        code = cli._run()
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `init`, `teacher` (VQA), `student`, `distilled`, `pruned` of a network with 16 channels."""
    root = tmp_path_factory.mktemp("chain")
    run_stage("init", out=str(root / "init"), size="tiny", data=SHAPES, settings=SIZES)
    run_stage("finetune", out=str(root / "teacher"), model=str(root / "init"), data=SHAPES, **TRAIN)
    run_stage("shrink", out=str(root / "student"), model=str(root / "init"))
    run_stage("distill", out=str(root / "distilled"), model=str(root / "student"), teacher=str(root / "init"), data=SHAPES, **TRAIN)
    run_stage("prune", out=str(root / "pruned"), **PRUNE(root), **TRAIN)
    return root


def PRUNE(root: Path) -> dict[str, Any]:
    return {"model": str(root / "distilled"), "teacher": str(root / "teacher"), "data": SHAPES, "sparsity": 0.4}


@contextmanager
def nested(folder: Path, depth: int = 1200) -> Iterator[Path]:
    """The innermost of `depth` folders that are made in `folder`, and removed at the end: older Pythons cannot do it for pytest."""
    folders = [folder / "/".join("a" * count) for count in range(1, depth + 1)]
    for place in (folder, *folders):
        place.mkdir(exist_ok=place == folder)
    try:
        yield folders[-1]
    finally:
        for place in reversed(folders):
            place.rmdir()


def randomised(model: Any) -> Any:
    """Every parameter moved away from where it starts: scales from 1, biases from 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
