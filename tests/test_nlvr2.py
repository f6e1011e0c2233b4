"""Statements about two images as a task: learnt with a teacher, pruned, cut again, measured, asked, timed, exported; text assignment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch
from compression_cases import tiny_pairs
from conftest import QUIET, SHAPES, SIZES, TRAIN, run_stage
from doc_pages import script
from PIL import Image
from safetensors.torch import load_file

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.kinds.pairs import PairItem, pair_batch
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.loaded import load
from efficientvlm.objectives.assignment import LEFT_OUT, NEITHER, OURS, TextAssignment, draw
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.report import summary
from efficientvlm.settings.compose import stage_settings
from efficientvlm.tasks.nlvr2 import scores

SHORT = {**TRAIN, "max_steps": 4, "batch_size": 8, "log_every": 1, "data": SHAPES}


@pytest.fixture(scope="module")
def two(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `assigned`, `teacher`, `pruned`, `cut`, `tuned`."""
    root = tmp_path_factory.mktemp("two")
    out = {name: str(root / name) for name in ("assigned", "teacher", "pruned", "cut", "tuned")}
    common: dict[str, Any] = {"task": "nlvr2", "data": SHAPES, **TRAIN}
    run_stage("pretrain", out=out["assigned"], model=str(chain / "init"), task="assignment", data=SHAPES, **TRAIN)
    run_stage("finetune", out=out["teacher"], model=out["assigned"], **common)
    run_stage("prune", out=out["pruned"], model=str(chain / "distilled"), teacher=out["teacher"], sparsity=0.4, **common)
    run_stage("prune", out=out["cut"], from_gates=out["pruned"], sparsity=0.5, eval_limit=4)
    run_stage("finetune", out=out["tuned"], model=out["cut"], teacher=out["teacher"], **common)
    return root


def test_the_chain(two: Path) -> None:
    assigned = require_complete(two / "assigned")
    assert {"task", "loss"} <= set(assigned.metrics["train"]) and set(assigned.metrics["val"]) == {
        "images",
        "assignment",
        "assignment_accuracy",
    }
    for name in ("teacher", "pruned", "tuned"):
        manifest = require_complete(two / name)
        assert manifest.config["task"] == "nlvr2" and ({"task", "kd"} if name != "teacher" else {"task"}) <= set(manifest.metrics["train"])
        val = manifest.metrics["val"]
        assert val["pairs"] == 4 and val["statements"] == 4 and 0 <= val["consistency"] <= val["statement_accuracy"] <= 1
        assert set(manifest.extra["influence"]["inputs"]) == {"left image", "right image", "text"}
        assert list(manifest.accounting["reach"]["reaches"]) == ["text", "left image", "right image"]
    cut = load(str(two / "cut"))
    assert require_complete(two / "cut").accounting["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)
    config = cut.model.config
    assert (config.fusion_images, config.fusion_layers, list(config.heads)) == (2, 2, ["compare"])
    kept = config.kept_indices()
    assert kept["fusion.0.cross_head"] and kept["fusion.1.cross_head"], "a path from each image stays"
    card = (two / "tuned" / "README.md").read_text("utf-8")
    assert '--image left.png --image right.png --statement "Both pictures show a dog."' in card


def test_it_is_measured_asked_and_timed(two: Path, tmp_path: Path, evlm: Callable[..., tuple[int, str, str]]) -> None:
    found = run_stage("eval", model=str(two / "tuned"), data=SHAPES, task="nlvr2", split="val", out=str(tmp_path / "r.json"))
    metrics = found["metrics"]
    assert found["metric"].startswith("statement_accuracy: ") and found["metric"].endswith("clustered by sentence")
    assert metrics["majority_accuracy"] >= 0.5 and metrics["statements"] == metrics["pairs"] and 0 < metrics["standard_error"] < 0.3
    assert all(part["outputs"]["verdict"] > 0 for part in found["influence"]["inputs"].values()) and "statements" in summary.test_of(found)
    for name, colour in (("l", (200, 0, 0)), ("r", (0, 0, 200))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    pictures = ["--image", tmp_path / "l.png", "--image", tmp_path / "r.png"]
    asked = ["predict", "--model", two / "tuned"]
    code, out, _ = evlm(*asked, *pictures, "--statement", "both are red", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["answer"] == ("true" if answer["probability_of_true"] > 0.5 else "false")
    for wrong in ([*pictures[:2], "--statement", "x"], [*pictures, "--statement", " "], [*pictures, "--statement", "x", "--question", "y"]):
        assert evlm(*asked, *wrong)[0] in (2, 3)
    assert evlm(*asked, *pictures[:2], "--image", tmp_path / "none.png", "--statement", "x")[0] == 3
    timed = run_stage("bench", models=[str(two / "tuned"), str(two / "teacher")], rounds=1, warmup_rounds=0, batch_sizes=[1, 2])
    assert timed["timed"].startswith("tensors of two images") and len(timed["latency"]) == 4


def test_one_that_answers_questions_leaves_its_decoder_behind(chain: Path, tmp_path: Path) -> None:
    old = load(str(chain / "pruned")).model
    assert old.config.decoder_layers and any(name.startswith("decoder.") for name in old.config.kept)
    run_stage("finetune", out=str(tmp_path / "o"), model=str(chain / "pruned"), task="nlvr2", **{**SHORT, "max_steps": 1, "lr": 1e-9})
    new = load(str(tmp_path / "o")).model
    assert new.config.abilities() == {"compare"} and new.config.answers is None and not new.config.decoder_layers
    before, after = old.config.kept_indices(), new.config.kept_indices()
    assert before["fusion.0.neuron"] == after["fusion.0.neuron"] == after["fusion.1.neuron"]
    weight = "text.layers.0.attention.q.weight"
    assert torch.allclose(old.state_dict()[weight], new.state_dict()[weight], atol=1e-6)


def test_what_cannot_be_is_refused(chain: Path, two: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"out": str(tmp_path / "o"), "data": SHAPES, **TRAIN}
    with pytest.raises(BadInput, match=r"teacher .* cannot compare two images"):
        run_stage("finetune", model=str(chain / "init"), teacher=str(chain / "teacher"), task="nlvr2", **common)
    with pytest.raises(BadInput, match="cannot compare two images") as refused:
        run_stage("eval", model=str(chain / "init"), data=SHAPES, task="nlvr2")
    assert "--task nlvr2" in refused.value.fix
    with pytest.raises(BadInput, match="no statements about two pictures"):
        run_stage("finetune", model=str(chain / "init"), task="nlvr2", **{**common, "data": "easy-vqa"})
    with pytest.raises(BadInput, match="batch_size 2"):
        run_stage("pretrain", model=str(chain / "init"), task="assignment", **{**common, "batch_size": 2})
    with pytest.raises(BadInput, match="cannot answer questions"):
        run_stage("finetune", model=str(two / "tuned"), task="vqa", **common)


@pytest.mark.slow
def test_graphs_judge_as_torch_does(two: Path, tmp_path: Path) -> None:
    out, ask = tmp_path / "onnx", {"data": SHAPES, "limit": 12}
    manifest = run_stage("export", model=str(two / "tuned"), out=str(out), format="onnx", rounds=1, **ask)
    assert max(manifest.metrics["difference"].values()) < 1e-5
    torch_fp32, onnx_fp32 = manifest.metrics["torch_fp32"], manifest.metrics["onnx_fp32"]
    assert all(onnx_fp32[name] == torch_fp32[name] for name in ("statement_accuracy", "consistency")) and onnx_fp32["batch_1"]
    ours, theirs = (run_stage("eval", model=str(path), task="nlvr2", **ask) for path in (two / "tuned", out))
    assert ours["metrics"] == theirs["metrics"] and ours["influence"] == theirs["influence"]
    with pytest.raises(BadInput, match="pre-training is not exported"):
        run_stage("export", model=str(two / "assigned"), out=str(tmp_path / "a"), format="onnx", rounds=0)


def test_the_plan_and_a_cached_teacher(chain: Path, two: Path, tmp_path: Path) -> None:
    taught = {"model": str(chain / "distilled"), "teacher": str(two / "teacher"), "task": "nlvr2", "data": SHAPES, **TRAIN}
    steps = [
        Step("assigned", "pretrain", stage_settings("pretrain", {**SHORT, "task": "assignment", "model": str(chain / "init"), "out": "x"})),
        Step("pruned", "prune", stage_settings("prune", {"out": "a", "sparsity": 0.4, **taught})),
        Step("test", "eval", stage_settings("eval", {"model": "a", "data": SHAPES, "task": "nlvr2", "split": "val"})),
        Step("timed", "bench", stage_settings("bench", {"models": [str(two / "teacher"), "a"]})),
    ]
    made = plan(steps, QUIET)
    assert not made.problems.found and all(stage.memory for stage in made.stages)
    logits_alone = {name: float(name == "logits") for name in stage_settings("finetune", {**taught, "out": "x"}).weights.model_dump()}
    lines = []
    for cached in (False, True):
        settings = {**taught, "weights": logits_alone, "augment": "none", "cache_teacher": cached, "log_every": 1, "limit": 8}
        run_stage("finetune", out=str(tmp_path / str(cached)), **settings)
        lines.append([json.loads(line)["kd"] for line in (tmp_path / str(cached) / "metrics.jsonl").read_text().splitlines()])
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)


@pytest.mark.parametrize("stage", ["assignment", pytest.param("prune", marks=pytest.mark.slow)])
def test_two_processes_compute_what_one_does(stage: str, tmp_path: Path) -> None:
    run_stage("init", out=str(tmp_path / "init"), size="tiny", data=SHAPES, settings={**SIZES, "dropout": 0.0})
    settings: dict[str, Any] = {**SHORT, "model": str(tmp_path / "init"), "task": "assignment"}
    if stage == "prune":
        run_stage("finetune", **{**settings, "task": "nlvr2", "max_steps": 1}, out=str(tmp_path / "teacher"))
        settings |= {"task": "nlvr2", "teacher": str(tmp_path / "teacher"), "sparsity": 0.4}
    name = "pretrain" if stage == "assignment" else stage
    run_stage(name, out=str(tmp_path / "one"), **settings)
    nursery.whole(name, processes=2, out=str(tmp_path / "two"), **settings)
    lines = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for ours, theirs in zip(*lines, strict=True):
        for loss in ours.keys() & {"loss", "task", "kd"}:
            assert theirs[loss] == pytest.approx(ours[loss], rel=1e-5, abs=1e-5), loss
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert first.keys() == second.keys()
    assert max(float((first[key] - second[key]).abs().max()) for key in first if first[key].numel()) < 1e-5


def test_consistency_is_of_sentences_and_errors_are_clustered() -> None:
    found = scores([1, 1, 0, 1, 0], [1, 1, 0, 0, 0], ["a", "a", "a", "b", "b"])
    assert (found["statement_accuracy"], found["consistency"], found["sentences"], found["majority_accuracy"]) == (0.8, 0.5, 2, 0.6)
    assert found["standard_error"] == pytest.approx(((0.6**2 + 0.6**2) * 2) ** 0.5 / 5) and found["consistency_standard_error"] == 0.5
    assert found["majority_consistency"] == 0.5
    assert scores([0, 0, 0], [1, 1, 0], ["a", "a", "b"])["majority_consistency"] == 0.5
    alone = scores([1, 0, 1], [1, 1, 0], ["a", "b", "c"])
    assert alone["standard_error"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5) == alone["consistency_standard_error"]
    assert scores([1], [1], ["a"])["standard_error"] is None and scores([], [], []) == {"statements": 0}


def test_a_picture_of_nlvr_becomes_two() -> None:
    made = script("benchmarks/nlvr.py")
    picture = Image.new("RGB", (400, 100), (128, 128, 128))
    for left, colour in ((0, "red"), (150, "green"), (300, "blue")):
        picture.paste(colour, (left, 0, left + 100, 100))
    first, second = made.two_images(picture)
    assert first.size == (200, 100) and [first.getpixel((x, 50)) for x in (99, 100)] == [(255, 0, 0), (0, 128, 0)]
    assert second.size == (100, 100) and second.getcolors() == [(10_000, (0, 0, 255))]
    with pytest.raises(BadInput, match="300 x 100"):
        made.two_images(picture.crop((0, 0, 300, 100)))


def test_a_text_is_never_given_an_image_that_is_its_own() -> None:
    """Two pairs of one image, and two images with one text: the published draw would call a copy a wrong image."""
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    same = torch.eye(6, dtype=torch.bool)
    same[0, 1] = same[1, 0] = same[2, 3] = same[3, 2] = True
    seen: dict[int, int] = {}
    for seed in range(300):
        labels, first, second = draw(features, same, torch.Generator().manual_seed(seed))
        for row in range(6):
            label, images = int(labels[row]), (int(first[row]), int(second[row]))
            seen[label] = seen.get(label, 0) + 1
            own = [image == row for image in images]
            assert own == [label == OURS, label == 1] and images[0] != images[1]
            assert not any(same[row, image] for image in images if image != row)
    assert all(500 < count < 700 for count in seen.values()) and sorted(seen) == [OURS, 1, NEITHER]
    few = draw(features[:3], same[:3, :3], torch.Generator().manual_seed(0))  # of the first two, one other image
    assert all(label in (OURS, 1) for label in few.labels[:2].tolist()) and few.labels[2] >= 0
    none = draw(features[:2], same[:2, :2], torch.Generator().manual_seed(0))
    assert none.labels.tolist() == [LEFT_OUT] * 2

    model = XVLMModel(tiny_pairs(heads=["assign"], embed_dim=4))
    texts = Texts(train_wordpiece(["a red dog", "two cats"], 20), 8)
    item = PairItem("one", torch.zeros(16, 16, 3, dtype=torch.uint8).numpy(), ["a red dog"])
    for count in (3, 1):
        batch = pair_batch([item] * count, texts, seed=0, step=0, augment_kind="none", task=True)
        losses = TextAssignment(model, seed=0)(batch, 0)
        assert losses["loss"].item() == 0 and losses["loss"].requires_grad
