"""Files of the published BLIP code as they lie, imported: names by the checked map, and numbers of networks that are made so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.published import read_published

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity")
NETS = FOLDER / "blip_tasks_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {NETS}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
ROUNDED = dict(rtol=1e-4, atol=1e-4)  # logits of up to 12: the published ones and ours are both 3e-5 off those of float64, by processor
VOCAB = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[DEC]": 98, "[ENC]": 99}
HEADS = {"vision_heads": 4, "text_heads": 4, "dropout": 0.0}


def imported(path: Path, **settings: Any) -> tuple[Any, Any]:
    config, state, report = read_published(path, settings=HEADS | settings, vocabulary=lambda config, report: VOCAB)
    model = BLIP().build(config).eval()
    model.load_state_dict(state, strict=True)
    return model, report


@pytest.mark.parametrize("name", ["caption", "vqa", "vqa_unequal", "retrieval"])
def test_names(name):
    model, report = imported(NETS / f"{name}.safetensors")
    published, ours = load_file(NETS / f"{name}.safetensors"), model.state_dict()
    pairs = json.loads((NETS / "hf_key_map.json").read_text())[name.removesuffix("_unequal")]["pairs"]
    assert {key for _, key in pairs if key} == set(ours)
    assert all(torch.equal(ours[key], published[theirs]) for theirs, key in pairs if key)
    ignored = {name for names in report.ignored.values() for name in names}
    assert {theirs for theirs, key in pairs if not key} <= ignored


def test_a_caption_of_a_file_at_another_size():
    expected = load_file(NETS / "caption_expected.safetensors")
    model, _ = imported(NETS / "caption.safetensors", image_size=48)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(expected["px48.image"]).states, expected["px48.image_embeds"], **CLOSE)


def test_two_images():
    expected, batch = (load_file(NETS / f"nlvr_{kind}.safetensors") for kind in ("expected", "batch"))
    model, _ = imported(NETS / "nlvr.safetensors")
    assert model.config.merging == [6, 7]
    images = batch["image"]
    half = len(images) // 2
    inputs = {"pixels": images[:half], "second_pixels": images[half:], "text_ids": batch["text_ids"], "text_mask": batch["text_atts"]}
    with torch.no_grad():
        given = model.run({**inputs, "pair_index": torch.arange(half)})
    torch.testing.assert_close(given["logits"], expected["logits"], **CLOSE)


def test_pretraining():
    folder = FOLDER / "blip_pretrain_tiny"
    expected, batch = (load_file(folder / f"{kind}.safetensors") for kind in ("expected", "batch"))
    model, report = imported(folder / "model.safetensors")
    assert report.layout == "pretrain" and report.mapped + sum(map(len, report.ignored.values())) == 432
    rows = torch.arange(len(batch["image"]))
    inputs = {"pixels": batch["image"], "image_index": rows, "text_ids": batch["text_ids"], "text_mask": batch["text_atts"]}
    with torch.no_grad():
        given = model.run(inputs, ["vision.features", "text.features"])
    torch.testing.assert_close(given["lm_logits"], expected["step1.lm_logits"], **ROUNDED)
    torch.testing.assert_close(given["logits"], expected["step1.itm_logits"][: len(rows)], **CLOSE)
