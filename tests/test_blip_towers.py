"""A BLIP from a vision transformer and a BERT: the states of transformers' own networks, what is fresh, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET, randomised, run_stage
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from efficientvlm.data.tokenizer import save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.weights import read_folder
from efficientvlm.loaded import load

CLOSE = dict(rtol=1e-5, atol=1e-5)
VIT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=7)
BERT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=20)
NEW = {"match": ("vision_proj", "text_proj", "itm_head"), "caption": ("text_decoder.cls",), "answer": ("text_decoder.cls",)}


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    randomised(ViTModel(ViTConfig(**VIT, intermediate_size=48))).save_pretrained(root / "vit")
    randomised(Dinov2Model(Dinov2Config(**VIT, mlp_ratio=2))).save_pretrained(root / "dinov2")
    randomised(CLIPVisionModel(CLIPVisionConfig(**VIT, intermediate_size=48))).save_pretrained(root / "clip")
    tokenizer = train_wordpiece(["two dogs run on the grass", "a child in a red coat"], 60)
    save_tokenizer(tokenizer, root / "words")
    bert = BertConfig(**BERT, vocab_size=len(tokenizer))
    randomised(BertModel(bert)).save_pretrained(root / "bert")
    randomised(BertForMaskedLM(bert)).save_pretrained(root / "masked")
    return root


def start(towers: Path, out: Path, vision: str = "vit", text: str = "bert", family: str = "blip", **given: Any) -> Any:
    where = dict(vision_from=str(towers / vision), text_from=str(towers / text), tokenizer=str(towers / "words"))
    run_stage("init", QUIET, out=str(out), family=family, **where, **given)
    return load(str(out))


@pytest.mark.parametrize("vision", ["vit", "dinov2"])
@pytest.mark.parametrize("network", ["match", "caption", "answer", "pretrain"])
def test_images_are_those_of_the_tower(towers, tmp_path, vision, network):
    made = start(towers, tmp_path / "x", vision, settings={"network": network})
    stock = (ViTModel if vision == "vit" else Dinov2Model).from_pretrained(towers / vision).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(made.model.encode_image(pixels).states, stock(pixels).last_hidden_state, **CLOSE)
    assert not [name for name in made.manifest.extra["new"] if name.startswith("vision_model")]


def test_texts_alone_are_those_of_bert_and_its_words_stay(towers, tmp_path):
    made = start(towers, tmp_path / "x", settings={"network": "match"})
    stock, vocab = BertModel.from_pretrained(towers / "bert").eval(), made.tokenizer.get_vocab()
    ids, mask = torch.tensor([[2, 9, 12, 3, 0], [2, 7, 8, 11, 3]]), torch.tensor([[1, 1, 1, 1, 0], [1] * 5])
    with torch.inference_mode():
        ours, theirs = made.model.encode_text(ids, mask).states, stock(ids, mask).last_hidden_state
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **CLOSE)
    words = made.model.get_input_embeddings().weight
    assert len(words) == len(vocab) == stock.config.vocab_size + 2 == made.model.config.text_config.vocab_size
    assert torch.equal(words[:-2], stock.get_input_embeddings().weight) and words[-2:].abs().sum() > 0


@pytest.mark.parametrize(("network", "new"), NEW.items())
def test_what_is_fresh_is_said(towers, tmp_path, network, new):
    said = start(towers, tmp_path / "x", settings={"network": network}).manifest.extra["new"]
    assert said and all(".crossattention." in name or name.startswith(new) for name in said)
    assert {name.split(".")[0] for name in said if ".crossattention." not in name} >= {part.split(".")[0] for part in new}


def test_a_prediction_head_is_taken_along(towers, tmp_path):
    made, masked = start(towers, tmp_path / "x", text="masked", settings={"network": "caption"}), read_folder(towers / "masked")
    state = made.model.state_dict()
    said = state["text_decoder.cls.predictions.bias"]
    assert torch.equal(said[:-2], masked["cls.predictions.bias"]) and len(said) == len(made.tokenizer)
    for name in ("transform.dense.weight", "transform.LayerNorm.bias"):
        assert torch.equal(state[f"text_decoder.cls.predictions.{name}"], masked[f"cls.predictions.{name}"])
    fresh = {name for name in made.manifest.extra["new"] if ".crossattention." not in name}
    assert not fresh


def test_fewer_layers_another_size_and_a_whole_chain(towers, tmp_path):
    settings = {"network": "pretrain", "vision_layers": 2, "text_layers": 2, "fusion_layers": 1}
    made = start(towers, tmp_path / "start", image_size=14, settings=settings)
    own, bert, vit = made.model.state_dict(), read_folder(towers / "bert"), read_folder(towers / "vit")
    query = "attention.self.query.weight"
    for layer, source in ((0, 1), (1, 3)):
        for tower in ("text_encoder", "text_decoder.bert"):
            assert torch.equal(own[f"{tower}.encoder.layer.{layer}.{query}"], bert[f"encoder.layer.{source}.{query}"])
        ours = own[f"vision_model.encoder.layers.{layer}.layer_norm1.weight"]
        assert torch.equal(ours, vit[f"encoder.layer.{source}.layernorm_before.weight"])
    assert made.model.config.crosses("text", 1) and not made.model.config.crosses("text", 0)
    chain = dict(data="shapes:size=40", batch_size=4, max_steps=1, workers=0)
    run_stage("pretrain", QUIET, out=str(tmp_path / "teacher"), model=str(tmp_path / "start"), **chain)
    run_stage("shrink", QUIET, out=str(tmp_path / "small"), model=str(tmp_path / "teacher"), layers={"vision": 1, "text": 1, "decoder": 1})
    taught = dict(model=str(tmp_path / "small"), teacher=str(tmp_path / "teacher"), distillation="dlip")
    done = run_stage("distill", QUIET, out=str(tmp_path / "taught"), **taught, **chain)
    assert done.family == "blip" and load(str(tmp_path / "taught")).model.config.vision_config.image_size == 14


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vision": "clip"}, "not a ViT or DINOv2 model"),
        ({"vision": "bert"}, "not a ViT or DINOv2 model"),
        ({"text": "vit"}, "not a BERT"),
        ({"settings": {"vision_layers": 5}}, "5 layers"),
        ({"settings": {"text_layers": 5}}, "5 layers"),
        ({"settings": {"text_width": 32}}, "follows from the towers"),
        ({"settings": {"no_such": 1}}, "no_such"),
        ({"image_size": 15}, "no multiple"),
        ({"text_projection": "identity"}, "text_projection is identity"),
    ],
)
def test_what_does_not_fit_is_refused(towers, tmp_path, changed, message):
    with pytest.raises(BadInput, match=message):
        start(towers, tmp_path / "x", **changed)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("tower", "name", "message"),
    [
        ("vit", "embeddings.position_embeddings", "lack 1 tensor"),
        ("vit", "encoder.layer.2.layernorm_after.bias", "lack 1 tensor"),
        ("vit", "encoder.layer.2.attention.attention.key.bias", "lack 1 tensor"),
        ("bert", "embeddings.word_embeddings.weight", "lack 2 tensors"),
        ("bert", "encoder.layer.3.output.dense.bias", "lack 2 tensors"),
    ],
)
def test_weights_that_are_missing_are_named(towers, tmp_path, tower, name, message):
    shutil.copytree(towers / tower, tmp_path / tower)
    weights = read_folder(towers / tower)
    del weights[name]
    save_file(weights, tmp_path / tower / "model.safetensors")
    others = {"vit": "vit", "bert": "bert"} | {tower: str(tmp_path / tower)}
    with pytest.raises(BadInput, match=message):
        start(towers, tmp_path / "x", others["vit"], others["bert"], settings={"network": "answer"})


@pytest.mark.parametrize("family", ["blip", "xvlm"])
@pytest.mark.parametrize(
    ("tower", "name", "value"),
    [
        ("vit", "embeddings.cls_token", torch.zeros(1, 1, 33)),
        ("vit", "embeddings.position_embeddings", torch.zeros(32)),
        ("vit", "embeddings.position_embeddings", torch.zeros(1, 17, 32, dtype=torch.int64)),
        ("vit", "encoder.layer.0.attention.attention.query.weight", torch.zeros(64, 32)),
        ("vit", "encoder.layer.0.attention.attention.query.weight", torch.zeros(32, 32, dtype=torch.int64)),
        ("vit", "encoder.layer.4.layernorm_before.weight", torch.ones(32)),
        ("bert", "embeddings.token_type_embeddings.weight", torch.zeros(2, 1)),
        ("bert", "embeddings.token_type_embeddings.weight", torch.zeros(0, 16)),
        ("bert", "embeddings.token_type_embeddings.weight", None),
        ("bert", "embeddings.word_embeddings.weight", torch.zeros(8, 16)),
        ("bert", "encoder.layer.4.output.LayerNorm.weight", torch.ones(16)),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_they_are_folded(towers, tmp_path, family, tower, name, value):
    shutil.copytree(towers / tower, tmp_path / tower)
    weights = read_folder(towers / tower) | {name: value}
    save_file({key: tensor for key, tensor in weights.items() if tensor is not None}, tmp_path / tower / "model.safetensors")
    others = {"vit": "vit", "bert": "bert"} | {tower: str(tmp_path / tower)}
    with pytest.raises(BadInput, match=r"does not fit|not all finite|no place for|lack"):
        start(towers, tmp_path / "x", others["vit"], others["bert"], family=family)
    assert not (tmp_path / "x").exists()


def test_new_tokens_are_fresh_among_the_padding_of_a_bert(towers, tmp_path):
    """As many rows of padding as only its own tokenizer explains, all of them zero."""
    folder, old = tmp_path / "padded", read_folder(towers / "masked")
    shutil.copytree(towers / "masked", folder)
    shutil.copytree(towers / "words", folder, dirs_exist_ok=True)
    values = json.loads((towers / "masked" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 400}))
    padding = 400 - values["vocab_size"]
    for name in [name for name, tensor in old.items() if len(tensor) == values["vocab_size"]]:
        old[name] = torch.cat([old[name], torch.zeros(padding, *old[name].shape[1:])])
    save_file(old, folder / "model.safetensors")
    made = start(towers, tmp_path / "x", text=str(folder), settings={"network": "pretrain"})
    words, vocab = made.model.get_input_embeddings().weight, made.tokenizer.get_vocab()
    assert len(words) == 400 and all(words[vocab[token]].abs().sum() > 0 for token in ("[DEC]", "[ENC]"))
    assert not torch.equal(words[vocab["[DEC]"]], words[vocab["[ENC]"]]) and not words[len(vocab) :].any()


def test_another_vocabulary_is_refused(towers, tmp_path):
    folder = tmp_path / "smaller"
    shutil.copytree(towers / "bert", folder)
    values = json.loads((folder / "config.json").read_text())
    weights = read_folder(folder)
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:-1].contiguous()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": values["vocab_size"] - 1}))
    with pytest.raises(BadInput, match="the tokenizer has"):
        start(towers, tmp_path / "x", text=str(folder))
