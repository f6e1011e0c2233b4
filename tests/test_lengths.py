"""How long the texts are that a model reads: all its positions, as published, as tuned or as asked; what is cut is counted and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clip_folder import byte_pairs, write_clip
from compression_cases import CONFIGS
from conftest import run_stage
from PIL import Image

from efficientvlm.control import Control
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load, text_length

LONG = " ".join(["a red circle the blue square a cat and dogs"] * 9)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of few positions, and data whose captions are longer."""
    root = tmp_path_factory.mktemp("lengths")
    run_stage("import", out=str(root / "m"), model=str(write_clip(root / "hf", byte_pairs())))
    for number in range(2):
        Image.new("RGB", (16, 16), (100 * number, 0, 0)).save(root / f"{number}.png")
    rows = [{"image": "0.png", "caption": LONG}, {"image": "1.png", "caption": "a cat"}]
    (root / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_a_clip_reads_all_its_positions_and_says_what_it_cuts(clip, capsys):
    loaded = load(str(clip / "m"))
    positions = loaded.sizes.max_positions
    assert text_length(loaded) == positions and len(Texts(loaded.tokenizer).ids([LONG])[0]) + 2 > positions
    task = {"task": "retrieval", "model": str(clip / "m"), "data": str(clip / "d.jsonl")}
    found = run_stage("eval", Control(), **task)["metrics"]["reading"]
    assert (found["max_tokens"], found["cut_texts"]) == (positions, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 text has more than {positions} tokens" in said and "is cut" in said
    assert run_stage("eval", **task, max_tokens=4)["metrics"]["reading"]["max_tokens"] == 4
    with pytest.raises(BadInput, match=f"has {positions} positions"):
        run_stage("eval", **task, max_tokens=positions + 1)


def test_published_lengths():
    assert {name: config.usual_tokens for name, config in CONFIGS.items() if name != "toy"} == {
        "cross_encoder": None,
        "xvlm": 40,
        "xvlm-swin": 40,
        "xvlm-caption": 40,
        "xvlm-grounding": 40,
        "xvlm-two-images": 40,
        "clip": None,
        "siglip": None,
        "siglip-projected": None,
        "dual-vit": None,
        "dual-dinov2": None,
        "dual-swin": None,
        "blip-qa": 35,
        "blip-caption": 40,
        "blip-retrieval": 35,
        "blip-qa-crossing-once": 35,
        "blip-pretraining": 30,
        "blip-two-images": 35,
    }


def test_the_length_it_was_tuned_with_goes_with_a_model(tmp_path):
    """Through finetuning and pruning without data; one that is longer than the model's positions is refused before anything is written."""
    tuned = {"model": "bundled:easy-vqa", "data": "easy-vqa", "limit": 12, "max_steps": 1, "batch_size": 2, "eval_limit": 1}
    run_stage("finetune", out=str(tmp_path / "f"), **tuned, max_tokens=9)
    run_stage("prune", out=str(tmp_path / "p"), model=str(tmp_path / "f"), task="none", method="magnitude", sparsity=0.2)
    for folder in ("f", "p"):
        assert text_length(load(str(tmp_path / folder))) == 9
    with pytest.raises(BadInput, match="positions for tokens"):
        run_stage("finetune", out=str(tmp_path / "g"), **tuned, max_tokens=4000)
    assert not (tmp_path / "g").exists()
