"""The teachers inside the package: whole, small, of one chain, and as good as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import run_stage

import efficientvlm
from efficientvlm import recipe
from efficientvlm.checkpoints.files import BUNDLED, bundled_names
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.lineage import lineage, verify

PUBLISHED_LENGTH = 40  # tokens that an X-VLM reads where nothing else is asked for
NAMES = ["easy-vqa", "easy-vqa-pretrained"]


def test_both_are_there_and_small() -> None:
    assert bundled_names() == NAMES
    for name in NAMES:
        assert sum(file.stat().st_size for file in (BUNDLED / name).iterdir()) <= 10_000_000


@pytest.mark.parametrize("name", NAMES)
def test_files_are_as_written_and_load_in_full_precision(name: str) -> None:
    assert verify(f"bundled:{name}") == []
    model = efficientvlm.load(f"bundled:{name}")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    manifest = require_complete(f"bundled:{name}")
    assert manifest.origin == "bundled" and sum(p.numel() for p in model.parameters()) == manifest.accounting["parameters"]["total"]


def test_the_tuned_teacher_comes_from_the_other() -> None:
    (parent,) = lineage("bundled:easy-vqa").parents
    assert parent.node.path == BUNDLED / "easy-vqa-pretrained" and parent.problem is parent.node.problem is None
    tuned, pretrained = (efficientvlm.load(f"bundled:{name}") for name in NAMES)
    assert tuned.config.decoder_layers and not pretrained.config.decoder_layers


def test_they_were_trained_by_the_recipe_of_today() -> None:
    steps = {step.name: step.config for step in recipe.validate(recipe.load_recipe("easy-vqa-teacher"), [])}
    for name, stage in (("easy-vqa-pretrained", "pretrained"), ("easy-vqa", "teacher")):
        recorded = require_complete(f"bundled:{name}").config
        today = {**steps[stage].model_dump(mode="json"), "max_tokens": steps[stage].max_tokens or PUBLISHED_LENGTH}
        if today.get("losses", ()) is None:
            today["losses"] = list(efficientvlm.load(f"bundled:{name}").config.usual_losses)
        assert recorded.keys() >= steps[stage].model_fields_set
        for key in (today.keys() & recorded.keys()) - {"out", "model"}:
            now, then = (value if isinstance(value, dict) else {"": value} for value in (today[key], recorded[key]))
            assert all(now[part] == then[part] for part in now.keys() & then.keys()), f"{name}: {key}"


@pytest.mark.slow
def test_the_teacher_answers_the_test_questions(tmp_path: Path) -> None:
    result = run_stage("eval", model="bundled:easy-vqa", data="easy-vqa", split="test")
    assert result["metrics"]["questions"] == 9673 and result["metrics"]["accuracy"] >= 0.97
    opened = run_stage("eval", model="bundled:easy-vqa", data="easy-vqa", split="test", mode="generate", limit=100)
    assert opened["metrics"]["accuracy"] >= 0.97
