"""Two processes train as one does: the same losses, the same weights, one folder; they stop, fail and resume together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nursery
import pytest
from conftest import SHAPES, SIZES, TRAIN, run_stage
from safetensors.torch import load_file
from test_data_files import jsonl, pictures

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.lineage import verify
from efficientvlm.data.plan import IndexPlan
from efficientvlm.errors import BadInput


def slow(stage: str) -> Any:
    return pytest.param(stage, marks=pytest.mark.slow)


SHORT = {**TRAIN, "max_steps": 4, "batch_size": 8, "log_every": 1, "data": SHAPES}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `chain`, of a network without dropout: processes draw their own."""
    root = tmp_path_factory.mktemp("calm")
    run_stage("init", out=str(root / "init"), size="tiny", data=SHAPES, settings={**SIZES, "dropout": 0.0})
    run_stage("shrink", out=str(root / "student"), model=str(root / "init"))
    run_stage("finetune", out=str(root / "teacher"), model=str(root / "init"), data=SHAPES, **TRAIN)
    return root


def settings_of(stage: str, root: Path) -> dict[str, Any]:
    student, init, teacher = (str(root / name) for name in ("student", "init", "teacher"))
    return {
        "pretrain": {"model": init, "region_probability": 1.0},
        "distill": {"model": student, "teacher": init, "weights": {"fusion_cross_attention": 1.0, "itc_logits": 1.0}},
        "prune": {"model": student, "teacher": teacher, "sparsity": 0.4},
        "finetune": {"model": student, "teacher": teacher},
        "finetune of grounding": {"model": student, "task": "grounding", "phrases_per_image": 2, "data": "shapes:difficulty=4,size=40"},
        "prune of retrieval": {"model": student, "teacher": init, "sparsity": 0.4, "task": "retrieval", "weights": {"itc_logits": 1.0}},
    }[stage]


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["pretrain", "distill", "prune", "finetune", "finetune of grounding", "prune of retrieval"])
def test_two_processes_compute_what_one_does(stage: str, calm: Path, tmp_path: Path) -> None:
    """Contrast and hard negatives over the global batch, means over all tokens, boxes, questions, one vector of gates."""
    settings = {**SHORT, **settings_of(stage, calm)}
    stage, _, task = stage.partition(" of ")
    run_stage(stage, out=str(tmp_path / "one"), **settings)
    nursery.whole(stage, processes=2, out=str(tmp_path / "two"), **settings)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 4
    timing = ("samples_per_s", "data_ms", "teacher_ms", "student_ms", "optimizer_ms")
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - set(timing):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5), name
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    assert max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel()) < 1e-5
    assert verify(tmp_path / "two") == [] and list(tmp_path.glob(".*")) == []
    of_one, of_two = (require_complete(tmp_path / name) for name in ("one", "two"))
    assert of_two.cost.samples == of_one.cost.samples
    if task == "retrieval":
        assert of_two.metrics["val"] == of_one.metrics["val"] and of_one.metrics["val"]["mean_recall"] > 0


def test_uneven_texts_labels_and_regions_are_weighted_by_their_global_counts(calm: Path, tmp_path: Path) -> None:
    """Longer texts and more regions in one half of the batch than in the other."""
    from PIL import Image

    rows = []
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 90, 30)).save(tmp_path / f"{i}.png")
        text = "a red circle" + " left of a small blue square" * (3 * (i == 3))
        boxes = [{"box": [0, 0, 30, 30], "phrase": "a red circle"}] * (i + 1)
        rows.append({"image": f"{i}.png", "caption": text, "regions": boxes})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**settings_of("pretrain", calm), "data": str(tmp_path / "pairs.jsonl"), "val_fraction": 0.0}
    settings |= {"batch_size": 4, "max_steps": 2, "log_every": 1, "augment": "none"}
    run_stage("pretrain", out=str(tmp_path / "one"), **settings)
    nursery.whole("pretrain", processes=2, out=str(tmp_path / "two"), **settings)
    for ours, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        losses = [name for name in ours if name.endswith(("itc", "itm", "mlm", "box", "giou"))]
        assert len(losses) == 8
        for name in losses:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "pretrain", "distill", "finetune"])
def test_two_processes_interrupted_resume_to_the_same_bits(stage: str, chain: Path, tmp_path: Path) -> None:
    settings = {**settings_of(stage, chain), **SHORT}
    nursery.whole(stage, processes=2, out=str(tmp_path / "whole"), **settings)
    broken = {**settings, "out": str(tmp_path / "broken"), "processes": 2}
    assert nursery.finish(nursery.start(stage, fault=("stops_one", [1, 1]), **broken)) == [75, 75]
    assert "resumable state" in (tmp_path / "broken.error-1").read_text()
    assert nursery.finish(nursery.start(stage, fault=("stops_one", [0, 2]), **broken)) == [75, 75]
    nursery.whole(stage, **broken)
    for name in ("model.safetensors", *(["gates.safetensors", "dense.safetensors"] if stage == "prune" else [])):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    assert [line["loss"] for line in lines(tmp_path / "whole")] == [line["loss"] for line in lines(tmp_path / "broken")]


def test_an_error_on_one_process_ends_all_with_it(calm: Path, tmp_path: Path) -> None:
    settings = {**settings_of("finetune", calm), **SHORT, "out": str(tmp_path / "out"), "processes": 2}
    assert nursery.finish(nursery.start("finetune", fault=("fails_on", 1), **settings)) == [3, 3]
    for rank in (0, 1):
        assert (tmp_path / f"out.error-{rank}").read_text() == "sample 3 is unreadable\nit is torn\nmend it\n"
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "diary.txt").write_text("mine")
    assert nursery.finish(nursery.start("finetune", **settings)) == [3, 3], "the folder is refused by the main process"
    assert "no stage wrote" in (tmp_path / "out.error-1").read_text()


@pytest.mark.slow
def test_a_state_of_two_processes_is_resumed_by_one(calm: Path, tmp_path: Path) -> None:
    """The state belongs to no process, and the batches are the same."""
    settings = {**settings_of("finetune", calm), **SHORT}
    run_stage("finetune", out=str(tmp_path / "one"), **settings)
    broken = {**settings, "out": str(tmp_path / "two")}
    assert nursery.finish(nursery.start("finetune", processes=2, fault=("stops_one", [0, 1]), **broken)) == [75, 75]
    nursery.whole("finetune", **broken)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "pretrain", "distill"])
def test_spread_parameters_train_as_copies_do(stage: str, calm: Path, tmp_path: Path) -> None:
    """FSDP2 against one process, and interrupted against uninterrupted."""
    settings = {**settings_of(stage, calm), **SHORT, "clip": 0.1}
    run_stage(stage, out=str(tmp_path / "one"), **settings)
    spread = {**settings, "processes": 2, "parallel": "fsdp"}
    nursery.whole(stage, out=str(tmp_path / "whole"), **spread)
    assert nursery.finish(nursery.start(stage, fault=("stops_one", [1, 1]), out=str(tmp_path / "broken"), **spread)) == [75, 75]
    nursery.whole(stage, out=str(tmp_path / "broken"), **spread)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "whole"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel()) < 1e-4
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "broken" / "model.safetensors").read_bytes()
    for ours, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "whole"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)


def test_gates_are_not_learnt_on_spread_parameters(calm: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="parallel=fsdp"):
        run_stage("prune", **settings_of("prune", calm), **SHORT, parallel="fsdp", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_others_skip_is_written_and_limited_by_the_first_process(calm: Path, tmp_path: Path) -> None:
    """On two machines that see no common folder."""
    paths = pictures(tmp_path, 20)
    data = jsonl(tmp_path / "pairs.jsonl", [{"image": path, "caption": "a red circle"} for path in paths])
    plans = [IndexPlan(20, 4, 0, 2, rank) for rank in (0, 1)]
    shares = [[index for step in range(5) for index in plan.batch(step)] for plan in plans]
    bad = [shares[0][2], shares[1][0], shares[1][9]]
    for index in bad:
        (tmp_path / paths[index]).write_bytes(b"")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    settings = {"model": str(calm / "init"), "data": data, "val_fraction": 0.0, "batch_size": 4, "max_steps": 5, "save_every": 2}
    settings |= {"out": "out", "processes": 2, "fault": ("lives_in", [str(folder) for folder in folders])}
    nursery.whole("pretrain", **settings, max_bad=3)
    listed = [json.loads(line)["sample"] for line in (folders[0] / "out" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(int(sample.rpartition(" ")[2]) for sample in listed) == sorted(index + 1 for index in bad)
    assert [record.skipped for record in require_complete(folders[0] / "out").data if record.split == "train"] == [3]
    nursery.whole("pretrain", **settings, max_bad=3)  # up to date, as the first process knows
    assert list(folders[1].iterdir()) == []
    shutil.rmtree(folders[0] / "out")
    assert nursery.finish(nursery.start("pretrain", **settings, max_bad=2)) == [3, 3]
    for number, folder in enumerate(folders):
        assert (folder / f"out.error-{number}").read_text().startswith("3 samples of data")


def test_a_batch_that_cannot_be_shared_is_refused(calm: Path, tmp_path: Path) -> None:
    settings = {**settings_of("finetune", calm), **SHORT, "batch_size": 5, "out": str(tmp_path / "out")}
    assert nursery.finish(nursery.start("finetune", processes=2, **settings)) == [3, 3]
    assert not (tmp_path / "out").exists() and "cannot share" in (tmp_path / "out.error-0").read_text()


@pytest.mark.slow
def test_one_of_two_processes_is_killed(chain: Path, tmp_path: Path) -> None:
    """The other one ends too, the state stays, and the same command ends in the same bits."""
    settings = {**settings_of("prune", chain), **SHORT, "max_steps": 8, "save_every": 1}
    nursery.whole("prune", processes=2, out=str(tmp_path / "whole"), **settings)
    broken = {**settings, "out": str(tmp_path / "broken"), "processes": 2}
    for victim, least in ((0, 2), (1, 4), (1, 6)):
        run = nursery.start("prune", **broken)
        while not any(int(path.parent.name[5:]) >= least for path in (tmp_path / "broken").glob("training_state/step-*/state.json")):
            assert all(process.is_alive() for process in run)
            time.sleep(0.01)
        run[victim].kill()
        codes = nursery.finish(run)
        assert codes[victim] == -9 and codes[1 - victim] == 1, codes
    nursery.whole("prune", **broken)
    for name in ("model.safetensors", "gates.safetensors", "dense.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


def torchrun(*words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(nursery.free_port())]
    return [*launcher, "--no-python", str(Path(sys.executable).with_name("evlm")), *words]


def launch(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(torchrun(*words), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_torchrun_is_stopped_twice_and_started_again(chain: Path, tmp_path: Path) -> None:
    """SIGTERM reaches torchrun, Ctrl-C all processes at once, which then get it once more from torchrun."""
    words = ["prune", "--model", str(chain / "distilled"), "--teacher", str(chain / "teacher"), "--data", SHAPES, "--batch-size", "4"]
    words += ["--limit", "40", "--max-steps", "200", "--set", "log_every=20", "--set", "eval_limit=4", "--out"]
    for number in (signal.SIGTERM, signal.SIGINT):
        before = len(lines(tmp_path / "out")) if (tmp_path / "out").exists() else 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            torchrun(*words, "out"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, process_group=0
        )
        while not (tmp_path / "out" / "metrics.jsonl").exists() or len(lines(tmp_path / "out")) <= before:
            assert process.poll() is None
            time.sleep(0.05)
        if number == signal.SIGTERM:
            process.terminate()
        else:
            os.killpg(process.pid, number)
        _, said = process.communicate(timeout=120)
        assert said.count("error: stopped at step ") == 1 and "run the same command again" in said
        assert not (tmp_path / "out" / "evlm_manifest.json").exists()
    assert launch(*words, "out", cwd=tmp_path).returncode == 0
    assert launch(*words, "whole", cwd=tmp_path).returncode == 0
    for name in ("model.safetensors", "gates.safetensors", "dense.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.slow
def test_torchrun_runs_a_recipe_of_every_stage(tmp_path: Path) -> None:
    training = {"max_steps": 2, "batch_size": 4, "limit": 20, "eval_limit": 2, "log_every": 1}
    recipe = {
        "name": "all",
        "description": "every stage",
        "out": "runs",
        "stages": [
            {"name": "start", "stage": "init", "size": "tiny", "data": SHAPES, "settings": SIZES},
            {"name": "pretrained", "stage": "pretrain", "model": "@start", "data": SHAPES, **training},
            {"name": "teacher", "stage": "finetune", "model": "@pretrained", "data": SHAPES, **training},
            {"name": "student", "stage": "shrink", "model": "@pretrained"},
            {"name": "distilled", "stage": "distill", "model": "@student", "teacher": "@pretrained", "data": SHAPES, **training},
            {"name": "pruned", "stage": "prune", "model": "@distilled", "teacher": "@teacher", "data": SHAPES, "sparsity": 0.4, **training},
            {"name": "test", "stage": "eval", "model": "@pruned", "data": SHAPES, "limit": 4},
            {"name": "speed", "stage": "bench", "models": ["@teacher", "@pruned"], "rounds": 1, "warmup_rounds": 0},
        ],
    }
    (tmp_path / "all.yaml").write_text(json.dumps(recipe))
    done = launch("run", "all.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [stage["up_to_date"] for stage in result["stages"]] == [False] * 8
    assert verify(tmp_path / "runs" / "pruned") == [] and list(tmp_path.rglob("training_state")) == []
    assert done.stderr == "", "no warning, and nothing twice"
    again = launch("run", "all.yaml", "--json", cwd=tmp_path)
    assert [stage["up_to_date"] for stage in json.loads(again.stdout)["stages"]] == [True] * 8
    cut = launch("prune", "--from-gates", "runs/pruned", "--sparsity", "0.5", "--out", "cut", cwd=tmp_path)
    assert cut.returncode == 0 and cut.stdout.splitlines()[-1] == "cut"
    refused = launch("shrink", "--model", "runs/start", "--out", "cut", cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.count("error: cut holds a finished checkpoint of other settings") == 1
