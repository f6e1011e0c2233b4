"""Captioning of BLIP against the numbers of the published code, by the same task, loss and search as X-VLM's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.blip.config import BlipCaptionConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.families.towers.decoding import Rules, beam, continued, stepping
from efficientvlm.objectives.captioning import Captions

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "blip_tasks_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
END = 2


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    published: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return published["common"] | published["caption"]


@pytest.fixture(scope="module")
def model(settings: dict[str, Any]) -> Any:
    width, layers, heads = settings["vision_width"], settings["vision_layers"], settings["vision_heads"]
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    text = {name: settings[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    published = load_file(FOLDER / "caption.safetensors")
    table = published["text_decoder.bert.embeddings.position_embeddings.weight"]
    text |= {"vocab_size": 100, "max_position_embeddings": len(table), "layer_norm_eps": 1e-12, "bos_token_id": 98, "sep_token_id": END}
    text |= {"pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    made = MODELS[BlipCaptionConfig](BlipCaptionConfig(vision_config=vision, text_config=text)).eval()
    pairs = json.loads((FOLDER / "hf_key_map.json").read_text())["caption"]["pairs"]
    found = made.load_state_dict({ours: published[theirs] for theirs, ours in pairs if ours}, strict=False)
    assert not found.unexpected_keys and not found.missing_keys
    return made


def test_layers_without_cross_attention(model, batch):
    """Built without it, and switched off in the layout that has it in all layers."""
    expected = load_file(FOLDER / "caption_expected.safetensors")["ours.no_cross_in_layers_0_1.lm_logits"]
    few = type(model)(model.config.copy(cross_layers={"decoder": [2, 3]})).eval()
    missing = few.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys and all(".crossattention." in name for name in missing.unexpected_keys)
    whole = few.completed()
    assert whole.config.is_stock and not few.config.is_stock and whole.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for network in (few, whole):
            torch.testing.assert_close(network.run(batch)["logits"], expected, **CLOSE)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    numbers = load_file(FOLDER / "caption_batch.safetensors")
    mask = numbers["text_atts"]
    target = mask.clone()
    target[:, : len(numbers["prompt_ids"])] = 0
    rows = torch.arange(len(mask))
    return {"pixels": numbers["image"], "image_index": rows, "text_ids": numbers["text_ids"], "text_mask": mask, "target_mask": target}


def test_loss_and_gradients(model, batch):
    expected = load_file(FOLDER / "caption_expected.safetensors")
    torch.testing.assert_close(model.run(batch)["logits"], expected["lm_logits"], **CLOSE)
    assert torch.equal(batch["target_mask"].bool(), expected["decoder_targets"] != -100)
    loss = Captions(model, 0.1)(batch, 0)["loss"]
    torch.testing.assert_close(loss, expected["loss"], **CLOSE)
    loss.backward()
    renamed = {theirs: ours for theirs, ours in json.loads((FOLDER / "hf_key_map.json").read_text())["caption"]["pairs"] if ours}
    found = {name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    gradients = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[renamed[name]], gradient, **CLOSE)


@pytest.mark.parametrize("rule", ["published", "generated"])
@pytest.mark.parametrize("name", ["greedy", "beam3", "beam3_default", "beam3_rep12", "greedy_rep12"])
def test_captions(model, settings, batch, name, rule):
    """By the published rule, and by that of newer versions of transformers, which fill captions up with their end."""
    published = load_file(FOLDER / "caption_expected.safetensors")[f"generate.{name}"]
    newer = load_file(FOLDER / "hf_expected.safetensors")[f"caption.generate.{name}"]
    expected = published if rule == "published" else newer.masked_fill((newer == END).cumsum(1) - (newer == END).long() > 0, 0)
    assert torch.equal(published[:, : expected.shape[1]], expected) == (rule == "published" or "greedy" in name)
    how, given = settings["generate"][name], batch["text_ids"][:, :4].clone()
    length = given.shape[1]
    rules = Rules(END, 0, how["max_length"] - length, how["min_length"] - length, how.get("repetition_penalty", 1.0))
    given[:, 0] = 98  # of which a penalty on repetition knows, as the published code starts with it
    with torch.no_grad():
        step = stepping(model, model.look(batch["pixels"]))
        searched = how["num_beams"] > 1
        ids = beam(step, given, rules, how["num_beams"], length_rule=rule).ids[:, 0] if searched else continued(step, given, rules)
    ours = torch.cat([expected[:, :length], ids], 1)
    assert torch.equal(F.pad(ours, (0, expected.shape[1] - ours.shape[1])), expected)


def test_images_of_another_size(model, settings, batch):
    """The same weights at 48 px, whose positions are resized."""
    expected = load_file(FOLDER / "caption_expected.safetensors")
    larger, pixels = model.resized(48), expected["px48.image"]
    torch.testing.assert_close(larger.state_dict()["vision_model.embeddings.position_embedding"], expected["px48.pos_embed"], **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(larger.encode_image(pixels).states, expected["px48.image_embeds"], **CLOSE)
        given = batch["text_ids"][:2, :4].clone()
        given[:, 0] = 98
        how = settings["generate"]["beam3"]
        rules = Rules(END, 0, how["max_length"] - 4, how["min_length"] - 4)
        ids = beam(stepping(larger, larger.look(pixels)), given, rules, how["num_beams"]).ids[:, 0]
    wanted = expected["px48.generate.beam3"]
    assert torch.equal(torch.cat([wanted[:, :4], F.pad(ids, (0, wanted.shape[1] - 4 - ids.shape[1]))], 1), wanted)
