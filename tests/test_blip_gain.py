"""BLIPs that go from one task to another: what each of their towers begins with, pruned ones and shallow ones too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compression_cases import build, tiny_blip
from test_blip import cut, example, whole

from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.surgery import pad_model
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import BlipAnswerConfig, BlipCaptionConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.objectives.terms import tower_maps

CLOSE = dict(rtol=1e-5, atol=1e-5)
STATES = {"whole": whole, "cut": lambda name: cut(build(name)[0])}
every = pytest.mark.parametrize("state", STATES)


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.run(example(model.config))["logits"]
    return logits


@every
@pytest.mark.parametrize(("name", "there", "back"), [("blip-caption", "answer", "caption"), ("blip-caption", "match", "caption")])
def test_a_captioner_becomes_another_and_one_again(state, name, there, back):
    """What its decoder was is the text encoder now, which reads images as it did; of the way back its head alone is not left."""
    model = STATES[state](name)
    other, new = model.gain(there)
    assert other.config.layers()["text"] == 2 and {name for name in other.state_dict() if name.startswith("text_encoder.")} <= {*new}
    again, _ = other.gain(back)
    assert again.config.kept_indices() == model.config.kept_indices()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if there == "answer" or ".predictions." not in key or key.endswith("decoder.weight"):
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=0)
    assert torch.equal(said(again), said(model)) == (there == "answer")


@every
@pytest.mark.parametrize("ability", ["answer", "caption"])
def test_a_matcher_begins_to_write_with_what_read(state, ability):
    model = STATES[state]("blip-retrieval")
    other, new = model.gain(ability)
    decoder, text = other.text_decoder.bert.state_dict(), model.text_encoder.state_dict()
    same = {name for name, tensor in decoder.items() if tensor.shape == text[name].shape and torch.equal(tensor, text[name])}
    fits = ability == "caption" or state == "whole"  # else images are narrower than the texts that a question is
    assert {name for name in decoder if fits or ".crossattention." not in name} <= same
    assert fits == (set(decoder) == same) and all(f"text_decoder.bert.{name}" in new for name in decoder)
    head = other.text_decoder.cls.predictions
    assert head.output_weight is other.text_decoder.bert.embeddings.word.weight and float(head.dense.weight.detach().std()) > 0
    torch.testing.assert_close(said(other), said(pad_model(other)), **CLOSE)


@every
def test_an_answerer_goes_on_with_what_read_its_images(state):
    model = STATES[state]("blip-qa")
    matcher, new = model.gain("match")
    assert {name.partition(".")[0] for name in new} == {"itm_head", "vision_proj", "text_proj"}
    seen = example(matcher.config)
    with torch.no_grad():
        states = matcher.run(seen)["states"]
        asked = {"question_ids": seen["text_ids"], "question_mask": seen["text_mask"], "image_index": seen["image_index"]}
        torch.testing.assert_close(model.encode({"pixels": seen["pixels"], **asked})[0]["states"], states, **CLOSE)
    captioner, new = model.gain("caption")
    assert new and all(".crossattention." in name for name in new)
    ours, read = captioner.state_dict(), model.state_dict()
    for name, tensor in ours.items():
        source = name.replace("text_decoder.bert.", "text_encoder.") if ".crossattention." in name else name
        assert torch.equal(tensor, read[source]), name


def test_layers_without_cross_attention_and_of_other_depth():
    few = build("blip-qa-crossing-once")[0]
    assert few.gain("caption")[0].config.cross_layers == {"decoder": [1]} and few.gain("match")[0].config.cross_layers == {"text": [1]}
    shallow = type(few)(few.config.with_layers({"vision": [0, 1], "text": [0, 1], "decoder": [1]}))
    captioner, new = shallow.gain("caption")  # nothing of that depth attends to images
    assert captioner.config.layers() == {"vision": 2, "text": 0, "decoder": 1} and captioner.config.text_config.num_hidden_layers == 1
    assert new and said(captioner).isfinite().all()
    answers = captioner.gain("answer")[0].config
    assert answers.layers() == {"vision": 2, "text": 1, "decoder": 1} and answers.decoder_layers is None


def test_where_layers_were_in_a_teacher_goes_with_them():
    shallow = whole("blip-caption").config.with_layers({"vision": [1], "text": [], "decoder": [0]})
    answerer, _ = MODELS[BlipCaptionConfig](shallow).gain("answer")
    assert answerer.config.layer_source == {"vision": [1], "text": [0], "decoder": [0]}
    assert answerer.config.layer_source_of == {"vision": 2, "text": 2, "decoder": 2}
    maps = tower_maps(answerer.config, whole("blip-qa").config)
    assert [maps[tower].attention for tower in ("vision", "text", "decoder")] == [[(0, 1)], [(0, 0)], [(0, 0)]]


def test_an_answer_decoder_comes_from_a_teacher_that_fits():
    student, teacher = whole("blip-retrieval"), whole("blip-qa")
    deep = type(teacher)(teacher.config.copy(decoder_layers=4))
    taught, new = student.gain("answer", deep, "auto")
    assert taught.config.layers() == {"vision": 2, "text": 2, "decoder": 2} and taught.config.is_stock and not new
    for layer, source in enumerate((1, 3)):
        ours, theirs = (net.text_decoder.bert.encoder.layer[at].state_dict() for net, at in ((taught, layer), (deep, source)))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(taught.text_decoder.cls.predictions.dense.weight, deep.text_decoder.cls.predictions.dense.weight)
    assert student.gain("answer", deep, "fusion")[1]
    narrow = tiny_blip(BlipAnswerConfig).copy()
    narrow.text_config.intermediate_size = 6
    other = type(teacher)(narrow)
    assert student.gain("answer", other, "auto")[1]
    for given, words in ((other, "another width"), (None, "no --teacher")):
        with pytest.raises(BadInput, match=words):
            student.gain("answer", given, "teacher")


@pytest.mark.parametrize(("name", "ability"), [("blip-qa", "caption"), ("blip-caption", "answer"), ("blip-retrieval", "caption")])
def test_shapes_alone_tell_what_a_network_becomes(name, ability):
    model, new = STATES["cut"](name).gain(ability)
    with torch.device("meta"):
        shapes, named = STATES["cut"](name).gain(ability)
    assert shapes.device.type == "meta" and named == new
    assert {key: tensor.shape for key, tensor in shapes.state_dict().items()} == {key: t.shape for key, t in model.state_dict().items()}
    assert Anatomy.of(model).units and model.config.kept_indices()["vision.0.head"] == [1, 3]
