"""A vision tower from a DINOv2 or a ViT: the states that transformers' own network has, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET, randomised, run_stage
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2ForImageClassification, Dinov2Model, ViTConfig, ViTModel

from efficientvlm.data.tokenizer import save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.vit_files import HALF, IMAGENET, add_patch_bias
from efficientvlm.families.weights import read_folder
from efficientvlm.families.xvlm.start import from_towers
from efficientvlm.loaded import load

CLOSE = dict(rtol=1e-5, atol=1e-5)
SIZE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=7, layer_norm_eps=1e-4)
BERT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=20)
BIAS, SCALE = "embeddings.patch_embeddings.projection.bias", "encoder.layer.2.layer_scale1.lambda1"


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    randomised(Dinov2Model(Dinov2Config(**SIZE))).save_pretrained(root / "dinov2")
    randomised(Dinov2Model(Dinov2Config(**SIZE, qkv_bias=False))).save_pretrained(root / "no_bias")
    randomised(Dinov2ForImageClassification(Dinov2Config(**SIZE, num_labels=3))).save_pretrained(root / "classifier")
    shape = dict(SIZE, intermediate_size=48)
    del shape["mlp_ratio"]
    randomised(ViTModel(ViTConfig(**shape))).save_pretrained(root / "vit")
    tokenizer = train_wordpiece(["two dogs run on the grass", "a child in a red coat"], 60)
    for name in ("bert", "words"):
        save_tokenizer(tokenizer, root / name)
    BertModel(BertConfig(**BERT, vocab_size=len(tokenizer))).save_pretrained(root / "bert")
    return root


def built(towers: Path, vision: str | Path = "dinov2", **settings: Any) -> Any:
    vocab = json.loads((towers / "bert" / "config.json").read_text())["vocab_size"]
    return from_towers(towers / vision, towers / "bert", vocab, settings)


def stock(towers: Path, name: str, pixels: torch.Tensor) -> Any:
    """What transformers' own network of the folder says of pictures, positions resized as its class does."""
    if name != "vit":
        return Dinov2Model.from_pretrained(towers / name).eval()(pixels, output_hidden_states=True)
    return ViTModel.from_pretrained(towers / name).eval()(pixels, output_hidden_states=True, interpolate_pos_encoding=True)


@pytest.mark.parametrize("name", ["dinov2", "no_bias", "classifier", "vit"])
@pytest.mark.parametrize("image_size", [28, 14, 35])
def test_the_states_are_those_of_transformers_network(towers, name, image_size):
    model, new = built(towers, name, image_size=image_size)
    pixels = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        ours, theirs = model.encode_image(pixels, keep=frozenset({"hidden"})), stock(towers, name, pixels)
    torch.testing.assert_close(ours.states, theirs.last_hidden_state, **CLOSE)
    for mine, other in zip(ours.hidden, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    assert not [tensor for tensor in new if tensor.startswith("vision.")]
    assert (tuple(model.config.image_mean), tuple(model.config.image_std)) == (HALF if name == "vit" else IMAGENET)


def test_layer_scale_goes_into_weights_and_biases(towers):
    model, theirs = built(towers)[0].state_dict(), read_folder(towers / "dinov2")
    for number, source, target in (("1", "attention.output.dense", "attention.out"), ("2", "mlp.fc2", "ffn.fc2")):
        scale = theirs[f"encoder.layer.1.layer_scale{number}.lambda1"]
        assert not torch.allclose(scale, torch.ones_like(scale), atol=0.05)
        for kind, factor in (("weight", scale[:, None]), ("bias", scale)):
            torch.testing.assert_close(model[f"vision.layers.1.{target}.{kind}"], theirs[f"encoder.layer.1.{source}.{kind}"] * factor)


def test_positions_are_resized_before_the_bias_of_the_patches_is_added(towers):
    table = read_folder(towers / "dinov2")["embeddings.position_embeddings"][0]
    smaller = built(towers, image_size=14)[0].vision.position_embedding
    bias = read_folder(towers / "dinov2")[BIAS]
    assert torch.equal(smaller, add_patch_bias(resize_positions(table, 2), bias)) and torch.equal(smaller[0], table[0])


def test_fewer_layers_are_taken_at_equal_distance(towers):
    model = built(towers, vision_layers=2)[0]
    for layer, source in ((0, 1), (1, 3)):
        expected = read_folder(towers / "dinov2")[f"encoder.layer.{source}.norm1.weight"]
        assert torch.equal(model.vision.layers[layer].attention_norm.weight, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2_with_registers"}, "model_type is dinov2_with_registers"),
        ({"use_swiglu_ffn": True}, "SwiGLU"),
        ({"hidden_act": "relu"}, "activation is relu"),
        ({"image_size": [28, 14]}, "not square"),
    ],
)
def test_other_kinds_of_dinov2_are_refused_by_name(towers, tmp_path, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(towers / "dinov2", folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(BadInput, match=message):
        built(towers, folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (SCALE, None, "layer_scale1.lambda1 is missing"),
        (SCALE, torch.ones(31), r"has shape \[31\], \[32\] is needed"),
        (BIAS, None, "projection.bias is missing"),
        ("encoder.layer.0.norm2.bias", None, "lack 1 tensor"),
        ("embeddings.register_tokens", torch.ones(1, 4, 32), "no place for"),
        ("encoder.layer.1.mlp.fc2.weight", torch.full((32, 64), float("nan")), "not all finite"),
        ("encoder.layer.1.mlp.fc2.weight", torch.full((32, 64), 1e300, dtype=torch.float64), "not all finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(towers, tmp_path, name, value, message):
    folder = tmp_path / "spoiled"
    shutil.copytree(towers / "dinov2", folder)
    weights = read_folder(folder)
    weights.pop(name, None)
    save_file(weights | ({} if value is None else {name: value}), folder / "model.safetensors")
    with pytest.raises(BadInput, match=message):
        built(towers, folder)


def test_a_checkpoint_of_it_opens_again_and_is_cut(towers, tmp_path):
    start = dict(vision_from=str(towers / "dinov2"), text_from=str(towers / "bert"), tokenizer=str(towers / "words"), image_size=14)
    run_stage("init", QUIET, out=str(tmp_path / "start"), **start)
    run_stage("shrink", QUIET, out=str(tmp_path / "half"), model=str(tmp_path / "start"))
    cut = dict(model=str(tmp_path / "half"), task="none", method="magnitude", sparsity=0.5)
    run_stage("prune", QUIET, out=str(tmp_path / "cut"), **cut)
    model = load(str(tmp_path / "cut")).model
    assert model.config.vision_layers == 2 and not model.config.vision_pre_norm and model.config.vision_activation == "gelu"
    assert not any(name.startswith("vision.pre_norm") for name in model.state_dict())
    settings = json.loads((tmp_path / "start" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == list(IMAGENET[0]) and settings["size"] == {"height": 14, "width": 14}


SENTENCES = {"heads": ["itc"], "text_layers": 4, "fusion_layers": 0, "text_pooling": "mean", "embed_dim": 16}


def test_vectors_of_texts_may_be_those_of_a_sentence_encoder(towers, tmp_path):
    start = dict(vision_from=str(towers / "dinov2"), text_from=str(towers / "bert"), tokenizer=str(towers / "words"), image_size=14)
    done = run_stage("init", QUIET, out=str(tmp_path / "start"), **start, text_projection="identity", settings=SENTENCES)
    assert "vision_proj.weight" in done.extra["new"] and not any(name.startswith("text_proj") for name in done.extra["new"])
    run_stage("shrink", QUIET, out=str(tmp_path / "small"), model=str(tmp_path / "start"), layers={"vision": 2, "text": 4, "fusion": 0})
    cut = dict(model=str(tmp_path / "small"), task="none", method="magnitude", sparsity=0.5, towers=["vision"])
    run_stage("prune", QUIET, out=str(tmp_path / "cut"), **cut)
    ids, mask = torch.tensor([[2, 9, 12, 3, 0], [2, 7, 8, 11, 3]]), torch.tensor([[1, 1, 1, 1, 0], [1] * 5])
    with torch.inference_mode():
        states = BertModel.from_pretrained(towers / "bert").eval()(ids, mask).last_hidden_state
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        ours = load(str(tmp_path / "cut")).model.eval().embed_texts(ids, mask)[1]
    torch.testing.assert_close(ours, torch.nn.functional.normalize(pooled, dim=-1), **CLOSE)


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"embed_dim": 8}, "texts are 16 wide"), ({"heads": ["itm"], "fusion_layers": 1, "text_layers": 3}, "heads are itm")],
)
def test_a_projection_that_keeps_texts_has_to_fit(towers, tmp_path, changed, words):
    start = dict(vision_from=str(towers / "dinov2"), text_from=str(towers / "bert"), tokenizer=str(towers / "words"), image_size=14)
    with pytest.raises(BadInput, match=words):
        run_stage("init", QUIET, out=str(tmp_path / "x"), **start, text_projection="identity", settings=SENTENCES | changed)
    with pytest.raises(BadInput, match="text_projection is identity"):
        run_stage("init", QUIET, out=str(tmp_path / "x"), size="tiny", data="shapes:size=20", text_projection="identity")
