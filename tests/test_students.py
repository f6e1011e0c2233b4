"""Dual encoders of other sizes than their teacher's: features that stay comparable, what is cut, drawn, resampled, and who opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_folder import byte_pairs, write_clip
from compression_cases import build, tiny_clip
from conftest import QUIET, run_stage
from transformers import CLIPModel

from efficientvlm.compression.accounting import count_parameters
from efficientvlm.compression.widths import resize_model, resolve_sizes
from efficientvlm.errors import BadInput
from efficientvlm.families.clip.config import SlicedCLIPConfig
from efficientvlm.families.clip.network import SlicedCLIPModel
from efficientvlm.families.towers.parts import resize_patches
from efficientvlm.loaded import load
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.shrink import wanted

CLOSE = dict(rtol=1e-5, atol=1e-5)
both = pytest.mark.parametrize("name", ["clip", "siglip"])


@both
def test_a_narrower_student_is_compared_with_its_teachers_features(name: str) -> None:
    teacher, batch = build(name)
    student, origin = resize_model(teacher, resolve_sizes(teacher.config, {"vision": 8}, {}, {}))
    before, after = teacher.run(batch), student.run(batch)
    assert after["image_features"].shape == before["image_features"].shape == (2, teacher.config.feature_width)
    assert torch.equal(after["text_features"], before["text_features"]), "texts stay the teacher's"
    assert origin.random == ([] if name == "clip" else ["visual_projection.weight"]), "a SigLIP has none of its own"
    assert student.config.layers() == teacher.config.layers() and student.config.layered("vision", 0) == (8, 2, 3)
    assert (student.config.opened_by is None) == bool(student.config.foreign) == (name == "siglip")


@both
def test_a_student_of_the_same_size_is_its_teacher(name: str) -> None:
    teacher, batch = build(name)
    student, origin = resize_model(teacher, {tower: teacher.config.layered(tower, 0) for tower in ("vision", "text")})
    assert not origin.cut and not origin.random and torch.equal(student.run(batch)["logits"], teacher.run(batch)["logits"])


def test_heads_of_the_pooling_are_kept_whole() -> None:
    teacher, _ = build("siglip")
    name = "vision_model.head.attention"
    state = teacher.state_dict()
    for head in (0, 3):  # what these say is not heard
        state[f"{name}.out_proj.weight"][:, 4 * head : 4 * head + 4] = 0
    student, _ = resize_model(teacher, resolve_sizes(teacher.config, {"vision": 8}, {}, {}), channels="leading")
    rows = torch.cat([torch.arange(part + 4, part + 12) for part in (0, 16, 32)])
    assert torch.equal(student.state_dict()[f"{name}.in_proj_weight"], state[f"{name}.in_proj_weight"][rows][:, :8])
    assert student.config.head_source is None or not any("vision.2" in group for group in student.config.head_source)


@pytest.mark.parametrize("size", [8, 12, 4])
def test_patches_say_of_a_resized_patch_what_they_said_of_it(size: int) -> None:
    weight, patch = torch.randn(5, 3, 8, 8), torch.randn(2, 3, 8, 8)
    larger = torch.nn.functional.interpolate(patch, size=(size, size), mode="bilinear", align_corners=False)
    before, after = (torch.einsum("wchv,bchv->bw", *pair) for pair in ((weight, patch), (resize_patches(weight, size), larger)))
    assert torch.allclose(before, after, atol=1e-3) == (size >= 8), "exactly, unless pixels are lost"


@both
def test_images_of_another_size_are_read_by_resampled_tables(name: str) -> None:
    teacher, batch = build(name)
    finer = teacher.for_images(32, 16)
    large = torch.nn.functional.interpolate(batch["pixels"], size=(32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(finer.vision_model.position_embedding, teacher.vision_model.position_embedding), "the grid of patches is the same"
    assert finer.run({**batch, "pixels": large})["image_features"].shape == (2, teacher.config.feature_width)
    assert teacher.for_images(None, 4).vision_model.position_embedding.shape[0] == 16 + (name == "clip")
    assert teacher.for_images(16, 8) is teacher
    with pytest.raises(BadInput, match="no multiple of the patch size"):
        teacher.for_images(20, None)


@both
def test_a_fresh_tower_may_be_larger_than_the_teachers(name: str) -> None:
    teacher, batch = build(name)
    sizes = resolve_sizes(teacher.config, {"vision": 32}, {"vision": 4}, {"vision": 50}, ["vision"])
    student, origin = resize_model(teacher.for_images(None, 4), sizes, redrawn=["vision"], depth={"vision": 5})
    assert student.config.layers() == {"vision": 5, "text": 2} and student.config.layered("vision", 4) == (32, 4, 50)
    assert {name.split(".")[0] for name in origin.random} == {"vision_model", "visual_projection"}
    after = student.run(batch)
    assert torch.equal(after["text_features"], teacher.run(batch)["text_features"]) and after["image_features"].isfinite().all()


L14: dict[str, Any] = {
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14},
    "text_config": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "projection_dim": 768,
}
B16: dict[str, Any] = {"vision_config": {"patch_size": 16}, "text_config": {}}
B32: dict[str, Any] = {"vision_config": {"patch_size": 32}, "text_config": {}}


@pytest.mark.parametrize(
    ("preset", "teacher", "vision", "text"),
    [("dime-fm-vit-b32", L14, 87.8, 123.7), ("tinyclip-61m", B32, 61, 54), ("tinyclip-39m", B16, 39, 45), ("tinyclip-8m", B16, 8, 15)],
)
def test_presets_have_the_published_sizes(preset: Any, teacher: dict[str, Any], vision: float, text: float) -> None:
    """Millions of parameters with their projections; published numbers of texts leave the embeddings of tokens out: 29, 19 and 3."""
    config = SlicedCLIPConfig(**teacher)
    config = config.with_images(None, 32) if preset.startswith("dime") else config
    layers, sizes, fusion, depth = wanted(Shrink(model="-", out="-", preset=preset), config)
    with torch.device("meta"):
        student = SlicedCLIPModel(config.with_layers(layers).with_sizes(sizes, fusion).with_depth(depth))
    counted = count_parameters(student)
    assert counted["by_tower"]["vision"] / 1e6 == pytest.approx(vision, abs=0.8)
    assert counted["by_tower"]["text"] / 1e6 == pytest.approx(text, abs=0.8)
    assert student.config.feature_width == config.feature_width


def test_the_command_makes_a_student_that_transformers_opens(tmp_path: Path, evlm: Any) -> None:
    write_clip(tmp_path / "clip", byte_pairs())
    run_stage("import", QUIET, model=str(tmp_path / "clip"), out=str(tmp_path / "teacher"))
    shape = ["--set", "width={vision: 8}", "--set", "image_size=32", "--layers", "vision=1"]
    code, _, err = evlm("shrink", "--model", tmp_path / "teacher", *shape, "--out", tmp_path / "student")
    assert code == 0, err
    assert "opens with transformers' CLIPModel" in err and "patches of 8 pixels on images of 32 are resampled" in err
    settings = json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 40} and settings["crop_size"] == {"height": 32, "width": 32}
    student, stock = load(str(tmp_path / "student")).model, CLIPModel.from_pretrained(tmp_path / "student").eval()
    batch = student.example(2, 5)
    batch["pixels"] = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = stock(**student.stock_inputs(batch))
    torch.testing.assert_close(student.run(batch)["image_features"], theirs.image_embeds, **CLOSE)
    for asked, said in [
        (["--preset", "dlip-small"], "the preset dlip-small does not fit"),
        (["--preset", "dime-fm-vit-b32"], "the preset dime-fm-vit-b32 does not fit"),
        (["--set", "fusion_layers=1"], "neither of its towers looks at the other"),
        (["--set", "width={vision: 100}"], "which has 16"),
        (["--set", "random=[vision]", "--layers", "vision=2000"], "there can be 0 to 1000"),
    ]:
        code, _, err = evlm("shrink", "--model", tmp_path / "teacher", *asked, "--out", tmp_path / "none")
        assert code == 3 and said in err and not (tmp_path / "none").exists(), err


def test_a_fresh_vit_is_drawn_by_the_seed(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", byte_pairs())
    run_stage("import", QUIET, model=str(tmp_path / "clip"), out=str(tmp_path / "teacher"))
    shape: dict[str, Any] = dict(random=["vision"], layers={"vision": 3}, width={"vision": 24}, heads={"vision": 3}, patch_size=4)
    made = [
        run_stage("shrink", QUIET, model=str(tmp_path / "teacher"), out=str(tmp_path / str(n)), seed=seed, **shape)
        for n, seed in enumerate((1, 1, 2))
    ]
    states = [load(str(tmp_path / str(n))).model.state_dict() for n in range(len(made))]
    name = "vision_model.encoder.layers.2.mlp.fc1.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])
    assert made[0].accounting["parameters"]["by_tower"]["vision"] > 0 and tiny_clip().feature_width == 8
