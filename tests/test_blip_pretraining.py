"""BLIP's pre-training network through the stages: it is pre-trained, shrunk, distilled, pruned, and becomes the network of a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch
from compression_cases import CONFIGS, build, network
from conftest import SHAPES, SIZES, TRAIN, run_stage
from test_momentum import batch

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.layers import shrink_model
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.settings.compose import stage_settings

CLOSE = dict(rtol=1e-5, atol=1e-5)
NETWORK = {"vision_layers": 2, "text_layers": 2, "network": "pretrain"}
SHORT: dict[str, Any] = {**TRAIN, "data": SHAPES, "max_steps": 2, "log_every": 1, "queue": 8}


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `init` and `pretrained` of a pre-training network with 16 channels."""
    root = tmp_path_factory.mktemp("pretraining")
    run_stage("init", out=str(root / "init"), family="blip", size="tiny", data=SHAPES, settings={**SIZES, **NETWORK})
    run_stage("pretrain", out=str(root / "pretrained"), model=str(root / "init"), **SHORT)
    return root


def test_all_three_losses_are_learnt_with_averages(blip: Path) -> None:
    manifest = require_complete(blip / "pretrained")
    assert manifest.extra["contrast"]["momentum"] == 0.995 and {"itc", "itm", "lm", "alpha", "queue"} <= set(manifest.metrics["train"])
    assert {"itc", "itm", "lm", "itm_accuracy"} <= set(manifest.metrics["val"])
    tensors = load(str(blip / "pretrained")).model.state_dict()
    assert not [name for name in tensors if "/" in name or "queue" in name]
    shared = [name for name in tensors if name.startswith("text_decoder.") and (".crossattention." in name or ".intermediate." in name)]
    assert not shared, "what decoder and encoder share is there once"


def test_losses_are_chosen_and_weighed() -> None:
    model = network(CONFIGS["blip-pretraining"])
    objective = BlipPretraining(model, losses=("itc", "itm", "lm"), seed=0, weights={"lm": 0.5, "itm": 0.0})
    found = objective(batch(), 0)
    torch.testing.assert_close(found["loss"], found["itc"] + 0.5 * found["lm"])
    alone = BlipPretraining(model, losses=("lm",), seed=0)(batch(), 0)
    assert set(alone) == {"loss", "lm"}
    torch.testing.assert_close(alone["lm"], found["lm"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"losses": ["itc", "mlm"]}, "no head for mlm"),
        ({"batch_size": 1, "queue": 8}, "batch_size 1"),
        ({"queue": 7}, "queue 7"),
    ],
)
def test_what_it_cannot_learn_is_refused(blip: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run_stage("pretrain", out=str(tmp_path / "out"), model=str(blip / "init"), **SHORT | settings)


def test_weights_of_losses_that_are_left_out_are_refused() -> None:
    with pytest.raises(BadInput, match="lm is not among the losses"):
        stage_settings("pretrain", {"out": "o", "model": "m", "data": "d", "losses": ["itc"], "loss_weights": {"lm": 2.0}})


def test_another_family_has_no_averages_in_pretraining(chain: Path, tmp_path: Path) -> None:
    for wrong in ({"momentum": 0.9}, {"negatives_over": "process"}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            run_stage("pretrain", out=str(tmp_path / "out"), model=str(chain / "init"), data=SHAPES, **TRAIN, **wrong)


@pytest.mark.parametrize("ability", ["match", "caption"])
def test_the_network_of_a_task_does_what_the_whole_one_does(ability: str) -> None:
    """Also of a network from which units were removed, in shared layers too."""
    model, given = build("blip-pretraining")
    units = model.units()
    small = slice_model(model, torch.rand(len(units), generator=torch.Generator().manual_seed(3)) < 0.6)
    tuned, new = small.gain(ability)
    assert not new and type(tuned) is not type(small) and tuned.config.is_stock is False
    with torch.no_grad():
        whole, part = small.run(given), tuned.run(given)
    torch.testing.assert_close(part["logits"], whole["logits" if ability == "match" else "lm_logits"], **CLOSE)
    whole_sized, _ = model.gain(ability)
    assert whole_sized.config.kept is None


def test_retrieval_goes_on_with_the_temperature_of_pre_training() -> None:
    """Its network has none, as in transformers."""
    model = network(CONFIGS["blip-pretraining"])
    assert BlipPretraining(model.gain("match")[0], losses=("itc",), seed=0).temp.item() == pytest.approx(0.07)
    with torch.no_grad():
        model.temp.fill_(0.03)
    assert BlipPretraining(model.gain("match")[0], losses=("itc",), seed=0).temp.item() == pytest.approx(0.03)


def test_a_decoder_of_answers_begins_with_what_fits() -> None:
    """Keys and values of questions are new where these are not as wide as images."""
    model = network(CONFIGS["blip-pretraining"])
    tuned, new = model.gain("answer")
    assert new and all(".crossattention.self.key" in name or ".crossattention.self.value" in name for name in new)
    assert "answer" in tuned.config.abilities()


def test_layers_are_taken_of_encoder_and_decoder_together() -> None:
    model, given = build("blip-pretraining")
    with pytest.raises(BadInput, match="text and decoder keep other layers"):
        model.config.with_layers({"vision": [0], "text": [0], "decoder": [1]})
    small = shrink_model(model, {"vision": [1], "text": [1], "decoder": [1]})
    assert small.run(given)["lm_logits"].shape[-1] == 20 and small.config.layers() == {"vision": 1, "text": 1, "decoder": 1}


@pytest.mark.slow
def test_two_processes_compute_what_one_does(blip: Path, tmp_path: Path) -> None:
    """Of a network without dropout, which processes draw for themselves."""
    run_stage("init", out=str(tmp_path / "init"), family="blip", size="tiny", data=SHAPES, settings={**SIZES, **NETWORK, "dropout": 0.0})
    settings = {"model": str(tmp_path / "init"), **SHORT, "max_steps": 3, "momentum": 0.5, "eval_limit": 0}
    run_stage("pretrain", out=str(tmp_path / "one"), **settings)
    nursery.whole("pretrain", processes=2, out=str(tmp_path / "two"), **settings)
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("itc", "itm", "lm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5)


@pytest.mark.slow
def test_a_chain_of_stages(blip: Path, tmp_path: Path) -> None:
    """Shrunk, distilled by both methods, pruned with its teacher, and tuned for three tasks."""
    run_stage("shrink", out=str(tmp_path / "student"), model=str(blip / "pretrained"))
    taught = {"model": str(tmp_path / "student"), "teacher": str(blip / "pretrained"), **SHORT, "max_steps": 1, "eval_limit": 0}
    found = run_stage("distill", out=str(tmp_path / "dlip"), **taught, distillation="dlip")
    said = {name for name in found.metrics["train"] if name.startswith("kd_")}
    assert len(said) == 9, "all terms of DLIP are there"
    weights = {"lm_logits": 1.0, "decoder_hidden": 1.0, "decoder_self_attention": 1.0}
    run_stage("distill", out=str(tmp_path / "layers"), **taught, weights=weights)
    pruned = run_stage("prune", out=str(tmp_path / "pruned"), task="pretraining", sparsity=0.3, **taught)
    assert pruned.accounting["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.03)
    short = {name: value for name, value in SHORT.items() if name != "queue"} | {"max_steps": 1, "eval_limit": 2}
    for task, able in (("retrieval", {"embed", "match", "contrast"}), ("captioning", {"caption"}), ("vqa", {"answer"})):
        for name in ("pretrained", "pruned") if task == "captioning" else ("pretrained",):
            model = str((blip if name == "pretrained" else tmp_path) / name)
            run_stage("finetune", out=str(tmp_path / f"{name}-{task}"), model=model, task=task, **short)
            assert load(str(tmp_path / f"{name}-{task}")).abilities == able
    config = json.loads((tmp_path / "pretrained-retrieval" / "config.json").read_text())
    assert config["architectures"] == ["BlipForImageTextRetrieval"]
