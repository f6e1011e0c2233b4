"""Dual encoders whose images are read by a backbone of transformers: the same features as its own class, folders, cuts, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_folder import byte_pairs, write_clip
from compression_cases import BACKBONE, CONVNEXT, SWIN, build, network, tiny_dual
from conftest import QUIET, run_stage
from spoiling import edit, spoil_weights
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    SwinModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from efficientvlm import families
from efficientvlm.compression.surgery import pad_model, slice_model
from efficientvlm.errors import BadInput
from efficientvlm.export.stock import difference
from efficientvlm.families.dual.config import DualSiglipConfig
from efficientvlm.families.dual.family import DualEncoders
from efficientvlm.families.dual.start import with_backbone
from efficientvlm.loaded import load

CLOSE = dict(rtol=1e-5, atol=1e-5)
FAMILY = DualEncoders()
PLAIN = ViTConfig(**BACKBONE, intermediate_size=6)
BACKBONES: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViTModel(PLAIN),
    "vit-of-a-classifier": lambda: ViTForImageClassification(PLAIN),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**BACKBONE, mlp_ratio=2, layerscale_value=0.3)),
    "dinov2-without-biases": lambda: Dinov2Model(Dinov2Config(**BACKBONE, mlp_ratio=2, qkv_bias=False)),
    "swin": lambda: SwinModel(SwinConfig(**SWIN, layer_norm_eps=1e-3)),
    "convnext": lambda: ConvNextModel(ConvNextConfig(**CONVNEXT)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every backbone with all parameters moved away from where they start, and a CLIP of the same image size."""
    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for name, made in BACKBONES.items():
        model = made()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
    write_clip(root / "clip", byte_pairs())
    run_stage("import", QUIET, model=str(root / "clip"), out=str(root / "teacher"))
    return root


@pytest.mark.parametrize("name", BACKBONES)
def test_images_are_what_transformers_class_makes_of_them(folders: Path, tmp_path: Path, name: str) -> None:
    teacher, batch = build("clip")
    model = with_backbone(teacher, folders / name)
    kind = type(BACKBONES[name]())
    stock = kind.from_pretrained(folders / name).eval()
    with torch.no_grad():
        base = getattr(stock, stock.base_model_prefix, stock)(batch["pixels"])
        pooled = base.last_hidden_state[:, 0] if base.pooler_output is None else base.pooler_output
        features = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
    record = model.run(batch)
    torch.testing.assert_close(record["image_features"], features, **CLOSE)
    assert torch.equal(record["text_features"], teacher.run(batch)["text_features"]), "texts are the teacher's"
    opened = model.config.opened_by
    FAMILY.save(model, tmp_path)
    if name == "vit-of-a-classifier":
        assert opened is None and "by a layer of its own" in model.config.foreign
    else:
        assert opened == ("vision-text-dual-encoder", "VisionTextDualEncoderModel")
        _, info = VisionTextDualEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), "nothing is missing, left over, or of another shape"
        assert difference(model, tmp_path, "VisionTextDualEncoderModel") < 1e-5
    again = families.of_folder(tmp_path).load(tmp_path)
    assert type(again) is type(model) and again.config.sizes() == model.config.sizes()
    torch.testing.assert_close(again.run(batch)["logits"], record["logits"], **CLOSE)


@pytest.mark.parametrize("name", ["dual-vit", "dual-dinov2", "dual-swin"])
def test_cut_networks_are_written_with_our_type_and_are_what_they_were(tmp_path: Path, name: str) -> None:
    model, batch = build(name)
    cut = slice_model(model, [unit for unit in model.units() if unit.index % 3 or unit.group == "vision.1.head"])
    FAMILY.save(cut, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "evlm_dual"
    again = families.of_folder(tmp_path).load(tmp_path)
    assert again.config.kept_indices() == cut.config.kept_indices()
    assert torch.equal(again.run(batch)["logits"], cut.run(batch)["logits"])
    whole = pad_model(cut)
    torch.testing.assert_close(whole.run(batch)["logits"], cut.run(batch)["logits"], **CLOSE)
    (tmp_path / "padded").mkdir()
    FAMILY.save(whole, tmp_path / "padded")
    assert difference(cut, tmp_path / "padded", "VisionTextDualEncoderModel") < 1e-5, "with zeros in the gaps transformers opens it"


def test_texts_of_a_siglip_are_opened_here_alone(folders: Path, tmp_path: Path) -> None:
    teacher, batch = build("siglip")
    model = with_backbone(teacher, folders / "convnext")
    assert isinstance(model.config, DualSiglipConfig) and model.config.opened_by is None and "SigLIP" in model.config.foreign
    record = model.run(batch)
    assert torch.equal(record["text_features"], teacher.run(batch)["text_features"])
    assert {unit.tower for unit in model.units()} == {"text"} and not any(tap.startswith("vision.") for tap in model.taps)
    FAMILY.save(model, tmp_path)
    assert torch.equal(families.of_folder(tmp_path).load(tmp_path).run(batch)["logits"], record["logits"])


def test_images_of_the_teachers_size_are_read_with_resampled_positions(folders: Path) -> None:
    teacher, batch = build("clip")
    large = {**batch, "pixels": torch.randn(2, 3, 32, 32)}
    for name in ("vit", "dinov2", "swin", "convnext"):
        model = with_backbone(teacher.for_images(32, None), folders / name)
        assert model.config.sizes().image_size == 32 and model.run(large)["logits"].shape == (2, 2)
    with pytest.raises(BadInput, match="windows of 2 must fill them"):
        with_backbone(teacher, folders / "swin", 20)


def test_neurons_that_a_dinov2_of_transformers_cannot_count_are_said() -> None:
    config = tiny_dual(Dinov2Config(**BACKBONE, mlp_ratio=2))
    odd = config.with_sizes({"vision": config.layered("vision", 0)._replace(neurons=5)})
    assert odd.layered("vision", 1).neurons == 5 and odd.opened_by is None and "5 for 16 columns" in odd.foreign
    assert network(odd).run(network(odd).example(1, 4))["logits"].shape == (1, 1)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("vit", lambda f: edit(f, model_type="beit"), "not a backbone that is known"),
        ("vit", lambda f: edit(f, hidden_act="tanhh"), "unknown activation"),
        ("vit", lambda f: edit(f, num_channels=1), "num_channels is 1"),
        ("dinov2", lambda f: edit(f, use_swiglu_ffn=True), "SwiGLU"),
        ("swin", lambda f: edit(f, use_absolute_embeddings=True), "absolute positions"),
        ("swin", lambda f: edit(f, window_size=3), "windows of 3 must fill them"),
        ("vit", lambda f: spoil_weights(f, lambda t: t.pop("layernorm.bias")), "1 missing keys"),
        ("convnext", lambda f: spoil_weights(f, lambda t: t.update({"layernorm.bias": torch.ones(9)})), "mismatched keys"),
        ("dinov2", lambda f: spoil_weights(f, lambda t: t.update({"embeddings.register_tokens": torch.ones(1, 4, 16)})), "unexpected keys"),
        ("swin", lambda f: spoil_weights(f, lambda t: t["layernorm.bias"].fill_(float("nan"))), "not all finite"),
        (
            "swin",
            lambda f: spoil_weights(f, lambda t: t.update({"layernorm.bias": t["layernorm.bias"].double() + 1e300})),
            "not all finite",
        ),
    ],
)
def test_backbones_that_do_not_fit_are_refused(tmp_path: Path, name: str, spoil: Any, said: str) -> None:
    BACKBONES[name]().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=said):
        with_backbone(build("clip")[0], tmp_path)


def test_the_command_makes_a_student_that_is_pruned_and_exported(folders: Path, tmp_path: Path, evlm: Any) -> None:
    asked = ("--model", folders / "teacher", "--vision-from", folders / "dinov2")
    code, _, err = evlm("shrink", *asked, "--layers", "vision=1", "--out", tmp_path / "student")
    assert code == 0, err
    assert "opens with transformers' VisionTextDualEncoderModel" in err and "images are read by the dinov2" in err
    student, teacher = load(str(tmp_path / "student")), load(str(folders / "teacher"))
    assert student.family.name == "dual" and student.sizes.heads["vision"] == (4,)
    assert student.manifest.extra["origin"]["random"] == ["visual_projection.weight"]
    ours, theirs = student.image_processor or {}, teacher.image_processor or {}
    assert ours["crop_size"] == theirs["crop_size"] and ours["image_mean"] == [0.485, 0.456, 0.406] != theirs["image_mean"]
    code, _, err = evlm("verify", tmp_path / "student")
    assert code == 0, err
    cut = ("--task", "none", "--set", "method=magnitude", "--sparsity", 0.4, "--out", tmp_path / "cut")
    code, _, err = evlm("prune", "--model", tmp_path / "student", *cut)
    assert code == 0, err
    code, _, err = evlm("export", "--model", tmp_path / "cut", "--format", "padded", "--out", tmp_path / "padded")
    assert code == 0 and "VisionTextDualEncoderModel" in err, err
    code, _, err = evlm("export", "--model", tmp_path / "cut", "--format", "hf", "--out", tmp_path / "none")
    assert code == 3 and "does not fit transformers' own classes" in err
    code, _, err = evlm("shrink", *asked[:2], "--vision-from", tmp_path / "nowhere", "--out", tmp_path / "none")
    assert code == 3 and "does not exist" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "convnext"])
def test_graphs_say_what_the_network_does(folders: Path, tmp_path: Path, evlm: Any, name: str) -> None:
    run_stage("shrink", QUIET, model=str(folders / "teacher"), vision_from=str(folders / name), out=str(tmp_path / "student"))
    run_stage("prune", QUIET, model=str(tmp_path / "student"), task="none", method="magnitude", sparsity=0.3, out=str(tmp_path / "cut"))
    code, _, err = evlm("export", "--model", tmp_path / "cut", "--format", "onnx", "--set", "rounds=0", "--out", tmp_path / "onnx")
    assert code == 0 and "image.onnx differs from torch by" in err, err
