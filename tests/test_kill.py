"""kill -9, again and again, and full disks: the same command goes on, ends in the same bits, and leaves nothing behind."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import nursery
import pytest
from conftest import PRUNE, SHAPES, SIZES, TRAIN
from safetensors.torch import save_file

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.lineage import verify
from efficientvlm.checkpoints.manifest import MANIFEST
from efficientvlm.data.tokenizer import load_tokenizer

KILLS = 10


def settings_of(stage: str, root: Path) -> dict[str, Any]:
    train = {**TRAIN, "save_every": 2, "data": SHAPES}
    return {
        "pretrain": {"model": str(root / "init"), **train},
        "distill": {"model": str(root / "student"), "teacher": str(root / "init"), **train},
        "prune": {**PRUNE(root), **train},
        "finetune": {"model": str(root / "pruned"), "teacher": str(root / "teacher"), **train},
        "shrink": {"model": str(root / "init")},
        "init": {"size": "tiny", "data": SHAPES, "settings": SIZES},
        "import": {"tokenizer": str(root / "init")},
    }[stage]


def assert_sound(out: Path) -> None:
    """With a manifest a folder is complete to the last bit; without one it is not taken for a checkpoint."""
    if (out / MANIFEST).exists():
        assert verify(out) == []
    elif out.exists():
        assert {path.name for path in out.iterdir()} == set() or (out / "training_state").is_dir()


def assert_same(out: Path, whole: Path) -> None:
    ours, theirs = require_complete(out).files, require_complete(whole).files
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name not in ("metrics.jsonl", "README.md"):  # they tell times, and what validation measured
            assert ours[name].sha256 == theirs[name].sha256, name
    assert [path.name for path in out.parent.iterdir()] == [out.name], "a stray file or folder"
    assert {path.name for path in out.iterdir()} == {*ours, MANIFEST, "README.md"}


def campaign(stage: str, kills: int, settings: dict[str, Any], tmp_path: Path) -> int:
    """Kill runs at random moments, each followed by the same command, until `kills` have hit. Returns how many runs came to their end."""
    nursery.whole(stage, out=str(tmp_path / "whole" / "out"), **settings)
    began = time.monotonic()
    nursery.whole(stage, out=str(tmp_path / "again" / "out"), **settings)
    assert_same(tmp_path / "again" / "out", tmp_path / "whole" / "out")
    length, draw = time.monotonic() - began, random.Random(stage)
    out, finished = tmp_path / "killed" / "out", 0
    while True:
        (process,) = nursery.start(stage, out=str(out), **settings)
        if kills > 0:
            process.join(draw.uniform(0, length))
        else:
            process.join(120)
        process.kill()
        process.join()
        assert_sound(out)
        if process.exitcode == 0:
            assert_same(out, tmp_path / "whole" / "out")
            finished += 1
            if kills <= 0:
                return finished
            shutil.rmtree(out)
        else:
            assert process.exitcode == -9
            kills -= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "distill", "prune", "finetune"])
def test_kills_of_a_training_stage(stage: str, chain: Path, tmp_path: Path) -> None:
    assert campaign(stage, KILLS, settings_of(stage, chain), tmp_path) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["shrink", "init", "import"])
def test_kills_of_stages_that_do_not_train(stage: str, chain: Path, tmp_path: Path) -> None:
    settings = settings_of(stage, chain)
    if stage == "import":
        from test_import import published

        settings["model"] = str(tmp_path.parent / "published.safetensors")
        save_file(published(vocab=len(load_tokenizer(chain / "init"))), settings["model"])
    assert campaign(stage, 8, settings, tmp_path) >= 1


def without_pairs(command: str, root: Path, given: Path) -> dict[str, Any]:
    """Settings of the stages of a chain that learns from images and sentences that are no pairs; some files are made in `given`."""
    draw = np.random.default_rng(0)
    given.mkdir()
    (given / "pile.txt").write_text("".join(f"sentence number {number} of a pile\n" for number in range(90)))
    for name, count in (("images", 12), ("sentences", 90)):
        np.save(given / f"{name}.npy", draw.standard_normal((count, 8)).astype(np.float32))
    selected = {"sentences": "pile.txt", "images": "images.npy", "sentence_vectors": "sentences.npy"}
    learnt = {"model": str(root / "student"), "teacher": str(root / "init"), "data": SHAPES, "sentences": SHAPES, "learn_texts": True}
    return {
        "embed": {"model": str(root / "init"), "data": SHAPES, "side": "images", "limit": 24, "shard_size": 2, "batch_size": 2},
        "select-sentences": {name: str(given / file) for name, file in selected.items()}
        | {"cap": 3, "batch_size": 4, "fault": ("saves_always", None)},
        "distill": {**TRAIN, **learnt, "task": "embedding", "save_every": 2},
    }[command]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "select-sentences", "distill"])
def test_kills_of_what_needs_no_pairs(command: str, chain: Path, tmp_path: Path) -> None:
    """Stores, selections and towers of images come out as if nothing had happened."""
    assert campaign(command, 6, without_pairs(command, chain, tmp_path / "given"), tmp_path) >= 1


def every_crash(stage: str, chain: Path, tmp_path: Path, numbers: range) -> None:
    """The process dies in the place of its n-th change to a file or folder; the same command then completes the stage."""
    settings = settings_of(stage, chain)
    nursery.whole(stage, out=str(tmp_path / "whole" / "out"), **settings)
    out, crashed = tmp_path / "killed" / "out", 0
    for number in numbers:
        (code,) = nursery.finish(nursery.start(stage, fault=("dies_at", number), out=str(out), **settings))
        assert_sound(out)
        assert code in (0, 137)
        crashed += code == 137
        nursery.whole(stage, out=str(out), **settings)
        assert_same(out, tmp_path / "whole" / "out")
        shutil.rmtree(out)
        if code == 0:
            break
    assert crashed >= 3 and code == 0, "the last run died nowhere"


def test_a_crash_at_some_changes_of_the_file_system(chain: Path, tmp_path: Path) -> None:
    every_crash("shrink", chain, tmp_path, range(1, 200, 31))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("shrink", 9), ("prune", 41)])
def test_crashes_at_many_changes_of_the_file_system(stage: str, step: int, chain: Path, tmp_path: Path) -> None:
    every_crash(stage, chain, tmp_path, range(0, 2000, step))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "pretrain", "distill", "finetune"])
def test_a_run_stopped_at_an_epoch_boundary_and_in_between(stage: str, chain: Path, tmp_path: Path) -> None:
    """9 steps an epoch: stopped after the last step of the first one, and in the second."""
    settings = {**settings_of(stage, chain), "max_steps": 12, "save_every": 100}
    nursery.whole(stage, out=str(tmp_path / "whole" / "out"), **settings)
    out = tmp_path / "broken" / "out"
    for step in (8, 10):
        (code,) = nursery.finish(nursery.start(stage, fault=("stops_at", [step]), out=str(out), **settings))
        assert code == 75
        (out.parent / "out.error-0").unlink()
    nursery.whole(stage, out=str(out), **settings)
    assert_same(out, tmp_path / "whole" / "out")


@pytest.mark.parametrize(
    ("stage", "evaluation"),
    [
        ("prune", {"eval_batch_size": 2}),
        *(
            pytest.param(stage, settings, marks=pytest.mark.slow)
            for stage, settings in (("pretrain", {}), ("distill", {}), ("finetune", {"eval_limit": 0}))
        ),
    ],
)
def test_finished_training_is_never_stranded(stage: str, evaluation: dict[str, Any], chain: Path, tmp_path: Path) -> None:
    """Killed in validation, and out of memory there: what was learnt is kept, the end needs no step, and validation can be left out."""
    settings = settings_of(stage, chain)
    nursery.whole(stage, out=str(tmp_path / "whole" / "out"), **settings)
    out = tmp_path / "killed" / "out"
    assert nursery.finish(nursery.start(stage, fault=("in_phase", ("validation", "kill")), out=str(out), **settings)) == [-9]
    assert nursery.finish(nursery.start(stage, fault=("in_phase", ("validation", "memory")), out=str(out), **settings)) == [3]
    error = (out.parent / "out.error-0").read_text().splitlines()
    assert error[0] == "out of memory in validation" and "DefaultCPUAllocator" in error[1] and "eval_limit=0" in error[2]
    (out.parent / "out.error-0").unlink()
    settings |= evaluation
    assert nursery.finish(nursery.start(stage, fault=("never_trains", None), out=str(out), **settings)) == [0]
    assert_same(out, tmp_path / "whole" / "out")
    made = require_complete(out)
    assert [(change.what, change.same_bits) for change in made.changes] == [(name, True) for name in evaluation]
    assert (made.metrics["val"] == {"images": 0}) == (evaluation == {"eval_limit": 0})


@pytest.mark.parametrize("stage", ["finetune", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_loses_nothing(stage: str, chain: Path, tmp_path: Path) -> None:
    """The state is larger than what may be written from the third step on; the one before it is resumed."""
    settings = settings_of(stage, chain)
    nursery.whole(stage, out=str(tmp_path / "whole" / "out"), **settings)
    out = tmp_path / "full" / "out"
    (code,) = nursery.finish(nursery.start(stage, fault=("small_files", [3, 20_000]), out=str(out), **settings))
    assert code == 3
    error = (out.parent / "out.error-0").read_text().splitlines()
    assert error == [f"{out} cannot be written", "the disk is full", "free some space and run the same command again"]
    assert [path.name for path in (out / "training_state").glob("*step*")] == ["step-00000002"]
    (out.parent / "out.error-0").unlink()
    nursery.whole(stage, out=str(out), **settings)
    assert_same(out, tmp_path / "whole" / "out")


def test_a_disk_that_is_full_from_the_start(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (code,) = nursery.finish(nursery.start("shrink", fault=("small_files", [None, 20_000]), out=str(out), **settings_of("shrink", chain)))
    assert code == 3 and "the disk is full" in (tmp_path / "out.error-0").read_text()
    assert not out.exists() and list(tmp_path.glob(".*")) == []


def test_a_second_command_on_the_same_folder_is_refused_and_the_first_goes_on(chain: Path, tmp_path: Path) -> None:
    settings = {**settings_of("finetune", chain), "out": str(tmp_path / "out")}
    first = nursery.start("finetune", fault=("waits_at", [2, str(tmp_path / "go")]), **settings)
    while not list((tmp_path / "out").glob("training_state/step-*/state.json")):
        assert first[0].is_alive()
        time.sleep(0.02)
    assert nursery.finish(nursery.start("finetune", **settings)) == [3]
    assert f"by process {first[0].pid} on " in (tmp_path / "out.error-0").read_text()
    (tmp_path / "go").touch()
    assert nursery.finish(first) == [0] and verify(tmp_path / "out") == []
