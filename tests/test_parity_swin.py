"""X-VLM with a Swin tower, as in the public files, against the numbers of the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parity_xvlm import CLOSE, FOLDER, agree
from torch import Tensor

from efficientvlm.families import published
from efficientvlm.families.published import read_published
from efficientvlm.families.towers.swin import resize_bias_table
from efficientvlm.families.xvlm.names import published_name
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining

NETS = FOLDER / "xvlm_swin_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
SETTINGS = {"text_heads": 5, "dropout": 0.0}
NAMES = {
    "pixels": "image", "text_ids": "text_ids", "text_mask": "text_atts", "masked_ids": "text_ids_masked",
    "masked_positions": "masked_pos", "masked_labels": "masked_ids", "image_index": "idx_to_group_img",
    "image_mask": "image_atts", "boxes": "target_bbox", "is_whole_image": "is_image",
}  # fmt: skip


def read(**settings: Any) -> Any:
    config, state, report = read_published(NETS / "model.safetensors", settings=SETTINGS | settings)
    assert report.layout == "pretrain" and sum(map(len, report.ignored.values())) == 17
    model = XVLMModel(config).eval()
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture(scope="module")
def net() -> Any:
    return read()


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(NETS / "expected.safetensors")


def batch(*files: str) -> dict[str, Tensor]:
    numbers = {name: tensor for file in files for name, tensor in load_file(NETS / f"{file}.safetensors").items()}
    return {ours: numbers[theirs] for ours, theirs in NAMES.items() if theirs in numbers}


@torch.no_grad()
def test_states_maps_and_features(net: Any, expected: dict[str, Tensor]) -> None:
    given = batch("batch")
    out = net.encode_image(given["pixels"], keep=frozenset({"hidden", "self_attention"}))
    agree(net.encode_image(given["pixels"]).states, expected["image_embeds"])  # without maps, by another path
    agree(out.states, expected["image_embeds"])
    agree(out.hidden[0], expected["patch_embed"])
    agree(net.image_feature(out.states), expected["image_feat"])
    layer = 0
    for stage, depth in enumerate(net.config.vision_depths):
        for block in range(depth):
            agree(out.self_attention[layer].unflatten(0, (4, -1))[0], expected[f"attn_probs.{stage}.{block}"])
            layer += 1
            if block + 1 < depth:
                agree(out.hidden[layer][:2], expected[f"block.{stage}.{block}"])
        agree(out.hidden[layer], expected[f"stage_out.{stage}"])
    text = net.encode_text(given["text_ids"], given["text_mask"])
    agree(net.fuse(text.states, given["text_mask"], net.fusion.context(out.states)).states, expected["cross_embeds"])


def passes(net: Any, given: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> Any:
    negatives = tuple(expected[f"{prefix}itm_neg_{name}"] for name in ("image_for_text", "text_for_image"))
    return XvlmPretraining(net, losses=("itc", "itm", "mlm", "box"), seed=0).passes(net, given, 0, (), negatives)


@pytest.mark.parametrize("prefix", ["", "full_"])
def test_losses_and_gradients(net: Any, expected: dict[str, Tensor], prefix: str) -> None:
    net.zero_grad()
    losses = passes(net, batch("batch"), expected, prefix).losses
    for name, loss in losses.items():
        agree(loss, expected[f"{prefix}loss_{name}"])
    if not prefix:
        return
    sum(losses.values()).backward()
    found = {name.removeprefix("grad."): tensor for name, tensor in expected.items() if name.startswith("grad.")}
    ours = dict(net.named_parameters())
    for name, gradient in found.items():
        mine = published_name(name, 3, net.config.vision_depths)
        torch.testing.assert_close(ours[str(mine)].grad, gradient, rtol=1e-3, atol=1e-5)
    assert found


def test_region_step(net: Any, expected: dict[str, Tensor]) -> None:
    losses = passes(net, batch("batch", "region_batch"), expected, "region_").losses
    for ours, theirs in {"itc": "itc", "itm": "itm", "mlm": "mlm", "box": "bbox", "giou": "giou"}.items():
        agree(losses[ours], expected[f"region_loss_{theirs}"])


@torch.no_grad()
def test_another_resolution() -> None:
    numbers = load_file(NETS / "other_resolution.safetensors")
    model = read(image_size=256)
    assert model.config.vision_window == 8
    out = model.encode_image(numbers["image"])
    agree(out.states, numbers["expected.image_embeds"])
    agree(model.image_feature(out.states), numbers["expected.image_feat"])
    for name in [name for name in numbers if name.startswith("interp.") and name.endswith(".in")]:
        wanted = numbers[name.replace(".in", ".out")]
        torch.testing.assert_close(resize_bias_table(numbers[name], round(len(wanted) ** 0.5)), wanted, **CLOSE)


FULL = {
    "": ("pretrain", 224, ["itc", "itm", "mlm", "box"]),
    "retrieval_384": ("retrieval", 384, ["itc", "itm"]),
    "grounding_box_384": ("grounding", 384, ["box"]),
    "nlvr2_384": ("nlvr2", 384, ["compare"]),
    "nlvr2_text_assignment_224": ("text_assignment", 224, ["assign"]),
    "captioning_384": ("captioning", 384, ["lm"]),
    "vqa_480": ("vqa", 480, []),
}


@pytest.mark.parametrize("key", FULL)
def test_all_entries_of_full_size_files_are_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Without their values: what is in a file is used, or is one of the tables that are made anew."""
    whole = json.loads((NETS / ("keys_finetuned.json" if key else "keys.json")).read_text("utf-8"))
    entries, counts = (whole["layouts"][key], whole["counts"][key]) if key else (whole["layout"], whole["counts"])
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, (kind, shape) in entries.items()}
    monkeypatch.setattr(published, "read_file", lambda path, *, values: {"model": tensors, "config": {}})
    config, state, report = read_published(tmp_path, values=False)
    with torch.device("meta"):
        model = XVLMModel(config)
    model.load_state_dict(state, strict=True, assign=True)
    layout, pixels, heads = FULL[key]
    ignored = {reason: names for reason, names in report.ignored.items() if names != ["config"]}
    assert report.layout == layout and len(state) + sum(map(len, ignored.values())) == len(tensors) == counts["state_dict_entries"]
    assert (config.image_size, config.vision_depths, config.vision_window) == (pixels, [2, 2, 18, 2], pixels // 32)
    assert config.heads == heads and report.assumed == {"text_heads": 12}
    assert sum(parameter.numel() for parameter in model.parameters()) == counts["parameters"]
    assert sum(parameter.numel() for parameter in model.vision.parameters()) == counts["vision_parameters"]
