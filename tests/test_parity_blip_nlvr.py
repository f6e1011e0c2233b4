"""BLIP on two images against the numbers of the published code: passes, loss, gradients."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parity_xvlm import FOLDER
from torch import Tensor

from efficientvlm.compression.accounting import count_parameters
from efficientvlm.families.blip.config import BlipComparisonConfig
from efficientvlm.families.blip.models import BlipForComparison
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.objectives.comparison import Comparison

NETS = FOLDER / "blip_tasks_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
NAMES = [
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.crossattention\.self0\.", ".crossattention.first.self."),
    (r"\.crossattention\.self1\.", ".crossattention.second.self."),
    (r"\.crossattention\.output\.dense0\.", ".crossattention.first.output.dense."),
    (r"\.crossattention\.output\.dense1\.", ".crossattention.second.output.dense."),
    (r"\.crossattention\.output\.merge_layer\.", ".crossattention.merge."),
]


def ours(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def model() -> Any:
    settings = json.loads((NETS / "config.json").read_text())
    common, sizes = settings["common"], settings["nlvr"]
    vision = {"hidden_size": sizes["vision_width"], "num_hidden_layers": sizes["vision_layers"], "intermediate_size": 256}
    vision |= {"num_attention_heads": sizes["vision_heads"], "image_size": 32, "patch_size": 8, "layer_norm_eps": common["vision_ln_eps"]}
    text = {name: sizes[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text |= {name: common[name] for name in ("vocab_size", "max_position_embeddings", "layer_norm_eps")}
    text |= {"bos_token_id": 98, "sep_token_id": 2, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BlipComparisonConfig(vision_config=vision, text_config=text, merging_layers=[6, 7], question_start_id=99)
    made = BlipForComparison(config).eval()
    published = {name: tensor for name, tensor in load_file(NETS / "nlvr.safetensors").items() if "position_ids" not in name}
    made.load_state_dict({ours(name): tensor for name, tensor in published.items()}, strict=True)
    return made


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(NETS / "nlvr_expected.safetensors")


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    given = load_file(NETS / "nlvr_batch.safetensors")
    left, right = given["image"].chunk(2)
    rows = {"pair_index": torch.arange(len(given["targets"])), "labels": given["targets"]}
    return {"pixels": left, "second_pixels": right, "text_ids": given["text_ids"], "text_mask": given["text_atts"], **rows}


@torch.no_grad()
def test_states_maps_and_logits(model: Any, expected: dict[str, Tensor], batch: dict[str, Any]) -> None:
    record = model.run(batch, model.taps)
    torch.testing.assert_close(record["logits"], expected["logits"], **CLOSE)
    torch.testing.assert_close(model.run(batch)["logits"], expected["logits"], **CLOSE)  # without maps, by another path
    torch.testing.assert_close(record["image_states"], torch.cat([expected["image0_embeds"], expected["image1_embeds"]]), **CLOSE)
    kept = {"fusion_hidden": "text.hidden", "fusion_self_attn": "text.self_attention"}
    kept |= {"image_hidden": "vision.hidden", "image_attn": "vision.self_attention"}
    for theirs, tap in kept.items():
        assert f"{theirs}.{len(record[tap])}" not in expected
        for number, tensor in enumerate(record[tap]):
            torch.testing.assert_close(tensor, expected[f"{theirs}.{number}"], **CLOSE)
    for number, tensor in enumerate(record["text.cross_attention"]):
        both = torch.cat([expected[f"fusion_cross_attn{image}.{number}"] for image in (0, 1)], 1)
        torch.testing.assert_close(tensor, both, **CLOSE)
    swapped = {**batch, "pixels": batch["second_pixels"], "second_pixels": batch["pixels"]}
    assert not torch.allclose(model.run(swapped)["logits"], expected["logits"], **CLOSE)


def test_loss_and_gradients(model: Any, expected: dict[str, Tensor], batch: dict[str, Any]) -> None:
    model.zero_grad()
    loss = Comparison(model)(batch, 0)["loss"]
    torch.testing.assert_close(loss, expected["loss"], **CLOSE)
    loss.backward()
    gradients = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(ours(name)).grad, gradient, **CLOSE)


def test_parameters_of_the_full_size() -> None:
    """Of BLIP-base with 384 px."""
    counts = json.loads((FOLDER / "blip_full_size" / "counts.json").read_text())["blip_base"]["384"]
    with torch.device("meta"):
        made = BlipForComparison(fresh_config("base", {"network": "compare", "vocab_size": 30524}, 30524))
    assert count_parameters(made)["total"] == counts["nets"]["nlvr"]
    assert count_parameters(made)["by_tower"]["text"] == counts["nlvr_text_encoder"]
