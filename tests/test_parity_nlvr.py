"""X-VLM on two images against the numbers of the published code: passes, losses, distillation, gates, text assignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_parity_xvlm import FOLDER, agree, agree_all
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.names import published_name
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.families.xvlm.pairs import first_copy, second_copies

NETS = FOLDER / "xvlm_nlvr_tiny"
pytestmark = pytest.mark.skipif(not NETS.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
SIZES: dict[str, Any] = {
    "image_size": 24, "patch_size": 8, "vision_width": 40, "vision_heads": 5, "vision_intermediate": 60, "vocab_size": 101,
    "max_positions": 32, "text_width": 40, "text_heads": 5, "text_intermediate": 60, "dropout": 0.0, "fusion_images": 2,
}  # fmt: skip
LAYERS = {"student": (6, 3, 6), "teacher": (12, 6, 12)}
KEEP = frozenset(("hidden", "self_attention", "cross_attention"))
EVERYTHING = frozenset(tap for tap in XVLMModel.taps if not tap.startswith("decoder"))
TEXT = {"text_ids": "text_ids", "text_mask": "text_atts"}


def config_of(name: str, **changes: Any) -> XVLMConfig:
    layers = dict(zip(("vision_layers", "text_layers", "fusion_layers"), LAYERS[name], strict=True))
    return XVLMConfig(**SIZES | layers | {"heads": ["compare"], "local_attention_depth": LAYERS[name][0] // 3} | changes)


def read(name: str, file: str) -> Any:
    model = XVLMModel(config_of(name)).eval()
    theirs = {published_name(key, LAYERS[name][1]): value for key, value in load_file(NETS / file).items() if "position_ids" not in key}
    assert None not in theirs
    second = second_copies(theirs)
    assert second and all(torch.equal(theirs[copy], theirs[first_copy(copy)]) for copy in second)
    model.load_state_dict({key: value for key, value in theirs.items() if key not in second}, strict=True)
    return model


@pytest.fixture(scope="module")
def nets() -> dict[str, Any]:
    return {"student": read("student", "model.safetensors"), "teacher": read("teacher", "teacher.safetensors")}


@pytest.fixture(scope="module")
def numbers() -> dict[str, Tensor]:
    return load_file(NETS / "expected.safetensors")


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    given = load_file(NETS / "batch.safetensors")
    found: dict[str, Any] = {ours: given[theirs] for ours, theirs in TEXT.items()}
    pairs = torch.arange(len(given["targets"]))
    return found | {"pixels": given["image0"], "second_pixels": given["image1"], "labels": given["targets"], "pair_index": pairs}


@torch.no_grad()
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_states_maps_and_logits(nets: dict[str, Any], numbers: dict[str, Tensor], batch: dict[str, Any], name: str) -> None:
    expected = {key.removeprefix(f"{name}."): value for key, value in numbers.items() if key.startswith(f"{name}.")}
    record = nets[name].run(batch, EVERYTHING)
    agree(record["logits"], expected["logits"])
    agree(nets[name].run(batch)["logits"], expected["logits"])  # without maps, by another path
    agree(F.cross_entropy(record["logits"], batch["labels"]), expected["loss"])
    agree_all([*record["text.hidden"], *record["fusion.hidden"][1:]], expected, "text_hidden")
    agree_all([*record["text.self_attention"], *record["fusion.self_attention"]], expected, "self_attn")
    agree_all(record["fusion.cross_attention"], expected, "cross_attn")
    agree_all(record["vision.hidden"], expected, "image_hidden")
    if name == "student":
        agree_all(record["vision.self_attention"], expected, "image_attn")
        swapped = {**batch, "pixels": batch["second_pixels"], "second_pixels": batch["pixels"]}
        agree(nets[name].run(swapped)["logits"], expected["logits_images_swapped"])
    images = nets[name].encode_image(torch.cat([batch["pixels"], batch["second_pixels"]])).states
    agree(images, torch.cat([expected["image0_embeds"], expected["image1_embeds"]]))


def test_gradients(nets: dict[str, Any], numbers: dict[str, Tensor], batch: dict[str, Any]) -> None:
    model = nets["student"]
    model.zero_grad()
    F.cross_entropy(model.run(batch)["logits"], batch["labels"]).backward()
    ours = dict(model.named_parameters())
    found = {key.removeprefix("student.grad."): value for key, value in numbers.items() if key.startswith("student.grad.")}
    for name, gradient in found.items():
        torch.testing.assert_close(ours[str(published_name(name, 3))].grad, gradient, rtol=1e-3, atol=1e-6)
    assert any("crossattention.self.key" in name for name in found)
    model.zero_grad()
