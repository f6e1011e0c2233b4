"""Every task of BLIP through every stage: a network that was made for questions learns each, with a teacher, gates and a new cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nursery
import pytest
from conftest import QUIET, SHAPES, SIZES, TRAIN, run_stage
from PIL import Image

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages import predict

STEPS = {**TRAIN, "max_steps": 2, "data": SHAPES, "eval_limit": 2}
TASKS: dict[str, dict[str, Any]] = {
    "captioning": {"captions_per_image": 2, "prompt": "", "min_length": 2, "max_length": 9, "beams": 2},
    "retrieval": {},
    "nlvr2": {},
}
TOWERS = {"captioning": {"vision", "decoder"}, "retrieval": {"vision", "text"}, "nlvr2": {"vision", "text"}}
ASKED: dict[str, dict[str, Any]] = {
    "captioning": {},
    "retrieval": {"text": "a red circle", "top": 1},
    "nlvr2": {"statement": "both are red"},
}
MEASURED = {"captioning": "cider_d", "retrieval": "mean_recall", "nlvr2": "statement_accuracy"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained networks `answer` and, of one layer with cross-attention in two, `few`."""
    root = tmp_path_factory.mktemp("tasks")
    sizes = {**SIZES, "vision_layers": 2, "text_layers": 2, "dropout": 0.0}
    made = {"family": "blip", "size": "tiny", "data": SHAPES}
    run_stage("init", out=str(root / "answer"), settings=sizes, **made)
    run_stage("init", out=str(root / "few"), settings={**sizes, "network": "caption", "fusion_layers": 1}, **made)
    return root


@pytest.mark.parametrize("task", TASKS)
def test_every_stage(task: str, start: Path, tmp_path: Path) -> None:
    common = {"task": task, **STEPS, **TASKS[task]}
    folder = {name: str(tmp_path / name) for name in ("teacher", "student", "tuned", "pruned", "cut")}
    settings = stage_settings("finetune", {**common, "model": str(start / "answer"), "out": folder["teacher"]})
    made = plan([Step("teacher", "finetune", settings)], QUIET)
    assert not made.problems.found
    run_stage("finetune", model=str(start / "answer"), out=folder["teacher"], **common)
    teacher = load(folder["teacher"])
    assert set(teacher.model.config.towers) == TOWERS[task] and teacher.model.config.is_stock == (task != "nlvr2")
    assert (made.stages[0].after or {})["parameters"]["total"] == teacher.manifest.accounting["parameters"]["total"]
    run_stage("shrink", model=folder["teacher"], out=folder["student"])
    taught = {"model": folder["student"], "teacher": folder["teacher"], **common}
    run_stage("finetune", out=folder["tuned"], **taught)
    if task == "nlvr2":
        with pytest.raises(BadInput, match="read both images"):
            run_stage("finetune", out=str(tmp_path / "refused"), quirks={"second_image": True}, **taught)
    run_stage("prune", out=folder["pruned"], sparsity=0.4, **taught)
    run_stage("prune", out=folder["cut"], sparsity=0.6, from_gates=folder["pruned"])
    for name in ("tuned", "pruned"):
        assert require_complete(folder[name]).metrics["train"]["kd"] > 0
    for name, wanted in (("pruned", 0.4), ("cut", 0.6)):
        sparsity = require_complete(folder[name]).accounting["sparsity"]
        assert sparsity["achieved"] == pytest.approx(wanted, abs=0.01) and set(sparsity["by_tower"]) == TOWERS[task]
    two = task == "nlvr2"
    kinds = {"head", "cross_head", "neuron"} | ({"second_cross_head"} if two else set())
    assert {unit.kind for unit in load(folder["pruned"]).model.units()} == kinds
    said = run_stage("eval", model=folder["cut"], data=SHAPES, task=task, split="val", limit=4)
    assert MEASURED[task] in said["metrics"] and (said["manner"]["length_rule"] == "published" if task == "captioning" else True)
    Image.new("RGB", (40, 30), (200, 0, 0)).save(tmp_path / "red.png")
    picture = str(tmp_path / "red.png")
    answer = predict.run(model=folder["cut"], image=[picture, picture] if two else picture, **ASKED[task], device="cpu")
    assert task != "captioning" or answer["manner"]["beams"] == 3
    assert not two or answer["answer"] in ("true", "false")
    timed = run_stage("bench", models=[folder["teacher"], folder["cut"]], batch_sizes=[2], rounds=1, warmup_rounds=0)
    assert timed["models"][1]["parameters_timed"] < timed["models"][0]["parameters_timed"]


def test_a_narrow_network_learns_statements_from_its_teacher(start: Path, tmp_path: Path) -> None:
    """By what its modules say, all of it or the verdict alone, which a teacher may have said before."""
    common = {"task": "nlvr2", **STEPS, "log_every": 1, "augment": "none"}
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    run_stage("finetune", model=str(start / "answer"), out=teacher, **common)
    run_stage("shrink", model=teacher, out=student, layers={"vision": 1}, width={"vision": 8, "text": 8})
    taught = {"model": student, "teacher": teacher, "distillation": "dlip", **common}
    run_stage("finetune", out=str(tmp_path / "all"), **taught)
    found = {name for name in require_complete(tmp_path / "all").metrics["train"] if name.startswith("kd_")}
    states = {"image_features", "fused_feature"}
    assert found == {f"kd_{name}" for name in {*states, "fusion_self_attention", "fusion_cross_attention", "verdict"}}
    for cached in (False, True):
        run_stage("finetune", out=str(tmp_path / str(cached)), preset="logit", cache_teacher=cached, **taught)
    live, kept = (require_complete(tmp_path / name).metrics["train"] for name in ("False", "True"))
    assert kept == pytest.approx(live, rel=1e-5) and kept["kd_verdict"] > 0 and "kd_image_features" not in kept


@pytest.mark.slow
def test_statements_interrupted_and_spread_over_processes_are_the_same_run(start: Path, tmp_path: Path) -> None:
    common = {"task": "nlvr2", **STEPS, "max_steps": 4, "log_every": 1, "batch_size": 8}
    teacher, whole, broken, two = (str(tmp_path / name) for name in ("teacher", "whole", "broken", "two"))
    run_stage("finetune", model=str(start / "answer"), out=teacher, **common)
    taught = {"model": teacher, "teacher": teacher, "sparsity": 0.4, **common}
    run_stage("prune", out=whole, **taught)
    assert nursery.finish(nursery.start("prune", fault=("stops_at", [1]), out=broken, **taught)) == [75]
    nursery.whole("prune", out=broken, **taught)
    assert Path(whole, "model.safetensors").read_bytes() == Path(broken, "model.safetensors").read_bytes()
    nursery.whole("prune", processes=2, out=two, **taught)
    one, both = (require_complete(out).metrics["train"] for out in (whole, two))
    assert both == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_a_captioner_with_few_cross_layers_goes_on_to_questions(start: Path, tmp_path: Path) -> None:
    """Padded it is transformers' own; tuned for questions it begins with what read its images."""
    few = load(str(start / "few"))
    assert few.abilities == {"caption"} and few.model.config.cross_layers == {"decoder": [1]} and not few.model.config.is_stock
    run_stage("finetune", model=str(start / "few"), out=str(tmp_path / "tuned"), **STEPS, task="captioning", **TASKS["captioning"])
    run_stage("export", model=str(tmp_path / "tuned"), out=str(tmp_path / "padded"), format="padded")
    assert require_complete(str(tmp_path / "padded")).extra["stock_class"] == "BlipForConditionalGeneration"
    run_stage("finetune", model=str(tmp_path / "tuned"), out=str(tmp_path / "answers"), **STEPS, label_smoothing=0.1)
    tuned = load(str(tmp_path / "answers")).model.config
    assert tuned.cross_layers == {"text": [1], "decoder": [1]} and tuned.text_config.label_smoothing == 0.1
    assert tuned.prompt is None and tuned.answers


def test_what_a_network_of_another_task_is_told(start: Path, tmp_path: Path) -> None:
    model, asked = str(start / "answer"), {"data": SHAPES, "limit": 2}
    for task in TASKS:
        with pytest.raises(BadInput) as caught:
            run_stage("eval", model=model, task=task, **asked)
        assert caught.value.fix == f"finetune it with --task {task} first"
    with pytest.raises(BadInput) as caught:
        run_stage("eval", model=str(start / "few"), **asked)
    assert caught.value.fix == "finetune it with --task vqa first"
    with pytest.raises(BadInput, match=r"decoder_layers is 3.*one depth for all texts"):
        run_stage(
            "init", out=str(tmp_path / "y"), family="blip", size="tiny", data=SHAPES, settings={"network": "match", "decoder_layers": 3}
        )
    with pytest.raises(BadInput, match="mask_offsets changes nothing here"):
        run_stage("prune", model=model, out=str(tmp_path / "z"), task="vqa", sparsity=0.2, quirks={"mask_offsets": True}, **STEPS)
