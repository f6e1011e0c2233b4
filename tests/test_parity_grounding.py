"""Grounding by boxes and by Grad-CAM against the numbers of the published code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_parity_xvlm import FOLDER, agree
from torch import Tensor

from efficientvlm.data.boxes import in_pixels, iou
from efficientvlm.families.published import read_published
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.grounding import Grounding
from efficientvlm.objectives.losses import giou
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.tasks import gradcam
from efficientvlm.tasks.boxes import Found, scores

NETS = FOLDER / "xvlm_grounding_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
SETTINGS = {"text_heads": 5, "dropout": 0.0}
FLOAT32 = dict(rtol=1e-4, atol=1e-8)


def read(name: str, **settings: Any) -> Any:
    config, state, _ = read_published(NETS / f"{name}.safetensors", settings=SETTINGS | settings)
    model = XVLMModel(config).eval()
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture(scope="module")
def net() -> Any:
    return read("model")


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(NETS / "expected.safetensors")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return json.loads((NETS / "config.json").read_text())


def batch() -> dict[str, Any]:
    numbers = load_file(NETS / "batch.safetensors")
    names = {"pixels": "image", "question_ids": "text_ids", "question_mask": "text_atts", "boxes": "target_bbox"}
    return {ours: numbers[theirs] for ours, theirs in names.items()} | {"image_index": torch.arange(len(numbers["image"]))}


def test_boxes_losses_and_gradients(net: Any, expected: dict[str, Tensor]) -> None:
    assert net.config.abilities() == {"ground"}
    losses, record, _ = Grounding(net).passes(net, batch(), 0)
    agree(record["boxes"], expected["output_coord"])
    agree(losses["box"], expected["loss_bbox"])
    agree(losses["giou"], expected["loss_giou"])
    agree(giou(record["boxes"], batch()["boxes"]), expected["per_box_giou"])
    (losses["box"] + losses["giou"]).backward()
    ours = {"bbox_head.3.weight": net.box_head[3].weight, "bbox_head.0.weight": net.box_head[0].weight}
    found = {name.removeprefix("grad."): tensor for name, tensor in expected.items() if name.startswith("grad.")}
    for name in found.keys() & ours.keys():
        agree(ours[name].grad, found[name])
    assert found.keys() & ours.keys(), sorted(found)


def test_a_step_on_boxes_of_pre_training(net: Any, expected: dict[str, Tensor]) -> None:
    given, numbers = batch(), load_file(NETS / "batch.safetensors")
    shown = numbers["pretrain_idx_to_group_img"]
    whole = numbers["pretrain_is_image"]
    regions = {
        "pixels": given["pixels"][: int(shown.max()) + 1],
        "image_index": shown,
        "is_whole_image": whole,
        "boxes": given["boxes"],
        "text_ids": given["question_ids"],
        "text_mask": given["question_mask"],
        "image_mask": torch.ones(len(shown), 10, dtype=torch.long),
    }
    losses = XvlmPretraining(net, losses=("box",), seed=0).passes(net, regions, 0).losses
    agree(losses["box"], expected["pretrain.loss_bbox"])
    agree(losses["giou"], expected["pretrain.loss_giou"])
    asked = {**given, "pixels": regions["pixels"], "image_index": shown, "is_whole_image": whole}
    ours = Grounding(net).passes(net, asked, 0).losses
    agree(ours["box"], expected["pretrain.loss_bbox"])
    agree(ours["giou"], expected["pretrain.loss_giou"])


def test_accuracy_in_pixels(expected: dict[str, Tensor], told: dict[str, Any]) -> None:
    evaluation = told["evaluation"]
    sizes = [tuple(size) for size in evaluation["image_sizes_width_height"]]
    said = [in_pixels(box, size, None, cut=False) for box, size in zip(expected["output_coord"].tolist(), sizes, strict=True)]
    meant = evaluation["reference_boxes_xywh"]
    overlap = iou(np.array(said), np.array(meant), inclusive=True)
    np.testing.assert_allclose(overlap, expected["eval.pixel_iou"].numpy(), rtol=1e-4, atol=1e-5)
    rows = [Found(*row) for row in zip(said, map(tuple, meant), sizes, evaluation["splits"], strict=True)]
    found = scores(rows, inclusive=True)
    for name in ("val", "testA", "testB"):
        assert found["box_accuracy_of"][name] == pytest.approx(float(expected[f"eval.accuracy.{name}_d"]))
    cut = [in_pixels(box, size, None) for box, size in zip(expected["output_coord"].tolist(), sizes, strict=True)]
    assert (iou(np.array(cut), np.array(meant)) >= overlap - 1e-9).all()


def test_where_a_network_that_matches_looks(expected: dict[str, Tensor], told: dict[str, Any]) -> None:
    model, given = read("gradcam_model"), batch()
    assert "match" in model.config.abilities() and gradcam.crossing(model) == ("fusion", 3)
    layer = told["gradcam"]["layer_index"] - model.config.text_layers
    assert layer == 3 // 2
    shown = {"pixels": given["pixels"], "text_ids": given["question_ids"], "text_mask": given["question_mask"]}
    maps, logits = gradcam.maps(model, shown, layer)
    agree(logits, expected["gradcam.itm_logits"])
    maps = maps * given["question_mask"].float().mean(1)[:, None, None]  # published: a mean over padding too
    torch.testing.assert_close(maps, expected["gradcam.map"], **FLOAT32)
    evaluation = told["evaluation"]
    rows = []
    for at, size in enumerate(map(tuple, evaluation["image_sizes_width_height"])):
        boxes = [tuple(box) for box in evaluation["detections_xywh"][at]]
        torch.testing.assert_close(torch.tensor(gradcam.box_scores(maps[at], boxes, size)), expected["gradcam.det_scores"][at], **FLOAT32)
        picked = gradcam.pick(maps[at], boxes, size)
        assert boxes.index(picked) == int(expected["gradcam.picked_det"][at])
        rows.append(Found(picked, tuple(evaluation["reference_boxes_xywh"][at]), size, evaluation["splits"][at]))
    found = scores(rows, inclusive=True)
    for name in ("val", "testA", "testB"):
        assert found["box_accuracy_of"][name] == pytest.approx(float(expected[f"gradcam.accuracy.{name}_d"]))
