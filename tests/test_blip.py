"""BLIP's three networks: the same numbers as transformers' classes, folders that open in both, cut networks in fresh processes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
import transformers
from compression_cases import CONFIGS, build, network
from conftest import SHAPES, SIZES, TRAIN, run_stage
from safetensors.torch import save_file
from spoiling import edit, spoil_weights
from torch import Tensor

import efficientvlm
from efficientvlm import families
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.surgery import pad_model, slice_model
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import KINDS, BlipAnswerConfig
from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.blip.network import Blip
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.loaded import load
from efficientvlm.tasks.ranking import generate

FAMILY = BLIP()
CLOSE = dict(rtol=1e-5, atol=1e-5)
NORM, POSITIONS = "vision_model.post_layernorm.weight", "text_encoder.embeddings.position_ids"
NAMES = ("blip-qa", "blip-caption", "blip-retrieval")
KEPT = {
    "vision.0.head": [1, 3],
    "vision.1.head": [],
    "text.0.head": [],
    "text.0.cross_head": [2],
    "text.1.neuron": [],
    "decoder.0.head": [],
    "decoder.1.cross_head": [],
    "decoder.1.neuron": [0, 4],
}
each = pytest.mark.parametrize("name", NAMES)


def whole(name: str, **changes: Any) -> Any:
    """A network with random biases that transformers' class can hold too: images are as wide as text there."""
    config = CONFIGS[name].copy(**changes)
    config.vision_config.hidden_size = config.text_config.encoder_hidden_size = 24
    torch.manual_seed(0)
    model = network(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def stock_of(model: Any) -> Any:
    """Transformers' own network with the weights of `model`."""
    config = transformers.BlipConfig.from_dict({**model.config.to_dict(), "model_type": "blip"})
    stock = getattr(transformers, model.config.stock)(config).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two networks have the same tensors, by name."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def cut(model: Any) -> Any:
    """What is left of `model` when heads and neurons go, in some layers all of them."""
    return slice_model(model, [unit for unit in model.units() if unit.index in KEPT.get(unit.group, [unit.index])])


def texts(config: Any, start: int = 4, lengths: tuple[int, int, int] = (5, 3, 4)) -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts."""
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, config.text_config.vocab_size, (3, 5), generator=torch.Generator().manual_seed(1)) * mask
    ids[:, 0] = start
    return ids, mask


def example(config: Any) -> dict[str, Tensor]:
    """Two images; three texts, two of them on the first image. Questions are of one length: transformers attends to their padding."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    ids, mask = texts(config)
    batch = {"pixels": pixels, "image_index": torch.tensor([0, 1, 0])}
    if config.stock != "BlipForQuestionAnswering":
        return batch | {"text_ids": ids, "text_mask": mask}
    answers, answer_mask = ids, mask
    questions, question_mask = texts(config, 4, (5, 5, 5))
    return batch | {
        "question_ids": questions,
        "question_mask": question_mask,
        "answer_ids": answers.flip(0),
        "answer_mask": answer_mask.flip(0),
        "answer_index": torch.tensor([2, 0, 1]),
    }


def expected(stock: Any, batch: dict[str, Tensor], **capture: bool) -> tuple[Tensor, dict[str, Any]]:
    """Logits and captured outputs by tower, as transformers' modules give them when called one after the other."""
    vision = stock.vision_model(pixel_values=batch["pixels"][batch["image_index"]], **capture)
    image, outputs = vision.last_hidden_state, {"vision": vision}
    start = stock.config.text_config.bos_token_id
    if hasattr(stock, "text_encoder"):
        kind = "question" if "question_ids" in batch else "text"
        ids, mask = batch[f"{kind}_ids"], batch[f"{kind}_mask"]
        ones = torch.ones(image.shape[:2])
        text = stock.text_encoder(ids, attention_mask=mask, encoder_hidden_states=image, encoder_attention_mask=ones, **capture)
        outputs["text"] = text
        if not hasattr(stock, "text_decoder"):
            return stock.itm_head(text.last_hidden_state[:, 0]), outputs
        rows = batch["answer_index"]
        seen, seen_mask, words, word_mask = text.last_hidden_state[rows], mask[rows], batch["answer_ids"], batch["answer_mask"]
    else:
        seen, seen_mask, words, word_mask = image, None, batch["text_ids"], batch["text_mask"]
    words = torch.cat([torch.full_like(words[:, :1], start), words[:, 1:]], 1)
    decoder = stock.text_decoder(words, attention_mask=word_mask, encoder_hidden_states=seen, encoder_attention_mask=seen_mask, **capture)
    return decoder.logits, {**outputs, "decoder": decoder}


@each
def test_the_numbers_are_those_of_transformers(name):
    model = whole(name)
    batch, config = example(model.config), model.config
    want = {tap for tap in model.taps if tap.partition(".")[0] in config.towers and not tap.endswith("features")}
    with torch.no_grad():
        record = model.run(batch, want)
        logits, outputs = expected(stock_of(model), batch, output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(record["logits"], logits, **CLOSE)
        torch.testing.assert_close(model.run(batch)["logits"], logits, **CLOSE)
    for tower in config.towers:
        theirs, images = outputs[tower], batch["image_index"] if tower == "vision" else slice(None)
        ours = record[f"{tower}.hidden"]
        assert len(ours) == len(theirs.hidden_states) == 3
        for mine, other in zip(ours, theirs.hidden_states, strict=True):
            torch.testing.assert_close(mine[images], other, **CLOSE)
        for kind, maps in (("self_attention", theirs.attentions), ("cross_attention", getattr(theirs, "cross_attentions", None))):
            if f"{tower}.{kind}" in want:
                torch.testing.assert_close([m[images] for m in record[f"{tower}.{kind}"]], list(maps), **CLOSE)


def test_features_are_those_of_the_contrastive_head():
    model = whole("blip-retrieval")
    batch = example(model.config)
    with torch.no_grad():
        record = model.run(batch, {"vision.features", "text.features"})
        theirs = stock_of(model)(
            pixel_values=batch["pixels"], input_ids=batch["text_ids"], attention_mask=batch["text_mask"], use_itm_head=False
        )
    torch.testing.assert_close(record["vision.features"] @ record["text.features"].T, theirs.itm_score, **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_that_transformers_generates(beams):
    """Which attends to the padding of questions, and ranks beams by the tokens that were generated."""
    model = whole("blip-qa")
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(5, 20, (4, 5), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]).long()
    stock = stock_of(model)
    theirs = stock.generate(pixel_values=pixels, input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=beams)[:, 1:]
    batch = {"pixels": pixels, "question_ids": ids, "question_mask": mask}
    how = {"cls_id": 4, "sep_id": 2, "max_tokens": 6, "beams": beams, "length_rule": "generated"}
    ours, masked = (generate(model, batch, **how, attends_padding=attends) for attends in (True, False))
    assert torch.equal(masked[0], ours[0]) and not torch.equal(masked, ours)
    for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        length = (other.index(2) if 2 in other else len(other) - 1) + 1
        assert mine[:length] == other[:length]
    assert len({tuple(row) for row in ours.tolist()}) > 1


@each
@pytest.mark.parametrize("state", ["whole", "cut"])
def test_networks_work_as_transformers_ones(name, state):
    """forward, generate, captured outputs: of a cut network as of the same with zeros, in transformers' class.

    Questions are of one length: transformers attends to their padding."""
    ours = whole(name) if state == "whole" else cut(whole(name))
    stock = stock_of(pad_model(ours))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    ids, mask = texts(ours.config, lengths=(5, 5, 5)) if name == "blip-qa" else texts(ours.config)
    more = {"decoder_input_ids": ids, "labels": ids} if name == "blip-qa" else {}
    with torch.no_grad():
        mine, theirs = (
            net(pixel_values=pixels, input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True, **more)
            for net in (ours, stock)
        )
        assert mine.keys() == theirs.keys()
        for key in set(mine) - {"attentions"}:
            torch.testing.assert_close(mine[key], theirs[key], **CLOSE)
        assert [maps.shape[1] for maps in mine["attentions"]] == ([4, 4] if state == "whole" else [2, 0])
        if name != "blip-retrieval":
            asked = {"input_ids": ids} if name == "blip-qa" else {}
            answers = [net.generate(pixel_values=pixels, max_new_tokens=5, **asked) for net in (ours, stock)]
            assert torch.equal(*answers)


@each
def test_fresh_weights_are_drawn_as_transformers_draws_them(name):
    config = CONFIGS[name].copy()
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size, part.num_attention_heads, part.initializer_range = 48, 96, 4, 0.05
    config.text_config.encoder_hidden_size = 48
    torch.manual_seed(0)
    ours = network(config)
    theirs = getattr(transformers, config.stock)(transformers.BlipConfig.from_dict({**config.to_dict(), "model_type": "blip"})).state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for tensor, values in ours.state_dict().items():
        if values.numel() < 500:
            assert not tensor.endswith("bias") or float(values.abs().max()) == 0, tensor
        else:
            assert float(values.std() / theirs[tensor].std()) == pytest.approx(1, abs=0.12), tensor
    tensors = ours.state_dict(keep_vars=True)
    if "decoder" in config.towers:
        words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
        assert tensors["text_decoder.cls.predictions.decoder.weight"] is words


@each
def test_networks_without_values_run_on_the_meta_device(name):
    config = cut(build(name)[0]).config
    with torch.device("meta"):
        model = network(config)
        want = {tap for tap in model.taps if tap.partition(".")[0] in config.towers and not tap.endswith("features")}
        record = model.run(model.example(2, 5, "meta"), want)
    assert record["logits"].is_meta and {p.device.type for p in model.parameters()} == {"meta"}
    assert [maps.shape[1] for maps in record["vision.self_attention"]] == [2, 0]


@each
def test_taps_that_are_not_there_and_questions_it_cannot_answer(name):
    model, batch = build(name)
    absent = {"blip-qa": "text.features", "blip-caption": "text.hidden", "blip-retrieval": "decoder.cross_attention"}[name]
    with pytest.raises(BadInput, match=absent):
        model.run(batch, {absent})
    with pytest.raises(BadInput, match=r"fusion\.hidden"):
        model.run(batch, {"fusion.hidden"})
    if name == "blip-qa":
        assert model.gain("answer") == (model, [])
    else:
        with pytest.raises(BadInput, match="cannot answer questions"):
            model.encode(batch)
        assert "answer" in model.gain("answer")[0].config.abilities()
    with pytest.raises(BadInput, match="cannot find what a phrase means"):
        model.gain("ground")


def test_start_tokens_are_the_configured_ones():
    model = whole("blip-qa")
    batch = example(model.config)
    plain = model.run(batch)["logits"]
    other = {name: ids.clone() for name, ids in batch.items() if name.endswith("_ids")}
    other["answer_ids"][:, 0] = 11
    torch.testing.assert_close(model.run(batch | other)["logits"], plain, rtol=0, atol=0)
    other["question_ids"][:, 0] = 9
    changed = model.run(batch | other)["logits"]
    assert not torch.allclose(changed, plain, atol=1e-3)
    model.config.question_start_id = 9
    torch.testing.assert_close(model.run(batch)["logits"], changed, rtol=0, atol=0)
    model.config.answer_start_id = 12
    moved = model.run(batch)["logits"]
    assert not torch.allclose(moved, changed, atol=1e-3)
    model.config.text_config.bos_token_id = 12
    model.config.answer_start_id = None
    torch.testing.assert_close(model.run(batch)["logits"], moved, rtol=0, atol=0)


def test_padding_changes_nothing():
    """Neither of questions nor of answers, where transformers lets answers attend to the padding of questions."""
    model = whole("blip-qa")
    ids, mask = texts(model.config)
    batch = {**example(model.config), "question_ids": ids, "question_mask": mask}
    logits = model.run(batch)["logits"]
    for row, question in enumerate(batch["answer_index"].tolist()):
        words, length = int(mask[question].sum()), int(batch["answer_mask"][row].sum())
        one = {
            "pixels": batch["pixels"][batch["image_index"][question]][None],
            "question_ids": ids[question, :words][None],
            "question_mask": mask[question, :words][None],
            "answer_ids": batch["answer_ids"][row, :length][None],
            "answer_mask": batch["answer_mask"][row, :length][None],
            "answer_index": torch.tensor([0]),
        }
        torch.testing.assert_close(model.run(one)["logits"][0], logits[row, :length], **CLOSE)


@pytest.mark.parametrize("state", ["whole", "cut"])
def test_padding_changes_nothing_when_called_as_transformers_calls_it(state):
    """Loss and generated answers to a padded question in a batch are those to the question alone."""
    model = whole("blip-qa") if state == "whole" else cut(whole("blip-qa"))
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    ids, mask = texts(model.config)
    answers = texts(model.config, lengths=(5, 5, 5))[0].flip(1)
    with torch.no_grad():
        generated = model.generate(pixel_values=pixels, input_ids=ids, attention_mask=mask, max_new_tokens=5)
        for row, length in enumerate(mask.sum(1).tolist()):
            one = {"pixel_values": pixels[row : row + 1]}
            alone = {**one, "input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
            padded = {**one, "input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
            losses = [model(**given, labels=answers[row : row + 1]).loss for given in (alone, padded)]
            torch.testing.assert_close(*losses, **CLOSE)
            words = model.generate(**alone, max_new_tokens=5)[0]
            assert torch.equal(generated[row, : len(words)], words)


def test_answers_step_by_step_are_those_at_once():
    """With a cache, for rows picked out of the questions, with layers that have no heads."""
    model = cut(build("blip-qa")[0])
    batch = example(model.config)
    rows = batch["answer_index"]
    with torch.no_grad():
        at_once = model.run(batch)["logits"]
        _, context = model.encode(batch)
        torch.testing.assert_close(model.decode(context, batch["answer_ids"], batch["answer_mask"], rows), at_once, **CLOSE)
        cache = model.new_cache()
        first = model.decode(context, batch["answer_ids"][:, :2], None, rows, cache)
        rest = model.decode(context, batch["answer_ids"][:, 2:], None, rows, cache)
    real = batch["answer_mask"].bool()
    torch.testing.assert_close(torch.cat([first, rest], 1)[real], at_once[real], **CLOSE)


def test_gradients_reach_every_weight_of_a_training_step():
    for name in NAMES:
        model, _ = build(name)
        record = model.train().run(example(model.config), {"vision.self_attention"} & model.taps)
        (record["logits"].square().mean() + record["vision.self_attention"][0].square().mean()).backward()
        unused = {parameter for parameter, values in model.named_parameters() if values.grad is None}
        expected = {f"{side}_proj.{part}" for side in ("vision", "text") for part in ("weight", "bias")} if "retrieval" in name else set()
        assert unused == expected, name


@each
def test_whole_networks_are_written_for_transformers(name, tmp_path):
    model = whole(name, answers=["yes"], question_start_id=9)
    FAMILY.save(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("blip", [model.config.stock])
    stock, info = getattr(transformers, model.config.stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same_tensors(stock, model)
    again = families.of_folder(tmp_path).load(tmp_path)
    assert type(again) is type(model) and again.config.answers == ["yes"] and again.config.question_start_id == 9
    torch.testing.assert_close(again.run(example(again.config))["logits"], model.run(example(again.config))["logits"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["blip-qa", "blip-caption"])
@pytest.mark.parametrize("says", [(False, False), (False, True), (True, False)], ids=str)
def test_a_decoder_with_an_output_matrix_of_its_own(name: str, says: tuple[bool, bool], tmp_path: Path) -> None:
    """Transformers ties it to the word embedding unless both configurations say no; a folder keeps both matrices then."""
    config = whole(name).config
    config.tie_word_embeddings, config.text_config.tie_word_embeddings = says
    torch.manual_seed(0)
    stock = getattr(transformers, config.stock)(transformers.BlipConfig.from_dict({**config.to_dict(), "model_type": "blip"})).eval()
    head = stock.text_decoder.cls.predictions
    with torch.no_grad():
        for parameter in (head.decoder.weight, head.bias, head.decoder.bias):
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert (head.decoder.weight is stock.text_decoder.bert.embeddings.word_embeddings.weight) == any(says)
    ours = efficientvlm.of_stock(stock)
    batch = example(ours.config)
    wanted, _ = expected(stock, batch)
    torch.testing.assert_close(ours.run(batch)["logits"], wanted, **CLOSE)
    FAMILY.save(ours, tmp_path)
    again = FAMILY.load(tmp_path)
    assert same_tensors(ours, again) and again.config.ties == any(says)
    opened = type(stock).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(expected(opened, batch)[0], wanted, **CLOSE)
    keep = [unit for unit in ours.units() if unit.kind != "neuron" or unit.index % 2]
    torch.testing.assert_close(
        slice_model(ours, keep).run(batch)["logits"], pad_model(slice_model(ours, keep)).run(batch)["logits"], **CLOSE
    )


@each
def test_cut_networks_are_written_with_our_type(name, tmp_path):
    model = cut(build(name)[0])
    FAMILY.save(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == model.config.model_type and values["architectures"] == [type(model).__name__]
    again = families.of_folder(tmp_path).load(tmp_path)
    assert again.config.kept_indices() == model.config.kept_indices() and again.config.kept_indices()["vision.1.head"] == []
    torch.testing.assert_close(again.run(example(again.config))["logits"], model.run(example(again.config))["logits"], rtol=0, atol=0)


def test_what_transformers_cannot_say_is_written_with_our_type(tmp_path):
    """A decoder of another depth than the encoder; images of another width than text, which the decoder attends to."""
    model = whole("blip-qa")
    assert model.config.is_stock
    config = model.config.with_layers({"vision": [1], "text": [0, 1], "decoder": [1]})
    assert config.layers() == {"vision": 1, "text": 2, "decoder": 1} and not config.is_stock
    assert config.layer_source == {"vision": [1], "text": [0, 1], "decoder": [1]} and config.layer_source_of["text"] == 2
    shallow = network(config).eval()
    FAMILY.save(shallow, tmp_path / "shallow")
    assert FAMILY.load(tmp_path / "shallow").config.layers() == config.layers()
    assert model.config.with_layers({"vision": [1], "text": [1], "decoder": [1]}).is_stock
    wide = build("blip-qa")[0]
    assert not wide.config.is_stock and wide.text_decoder.bert.encoder.layer[0].crossattention.self.key.in_features == 24
    assert wide.text_encoder.encoder.layer[0].crossattention.self.key.in_features == 16
    FAMILY.save(wide, tmp_path / "wide")
    again = FAMILY.load(tmp_path / "wide")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), wide.state_dict().values(), strict=True))
    with pytest.raises(BadInput, match="no text layers"):
        model.config.with_layers({"vision": [1], "text": [], "decoder": [1]})


def test_folders_of_older_versions(tmp_path):
    """Half precision, position ids and tied tensors among the weights, none of our fields, statistics in the image processor."""
    model = whole("blip-qa")
    FAMILY.save(model, tmp_path)
    tensors = {name: tensor.half().clone() for name, tensor in model.state_dict().items()}
    extra = {f"{tower}.embeddings.position_ids": torch.arange(9)[None] for tower in ("text_encoder", "text_decoder.bert")}
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    ours = {field.name for field in fields(BlipAnswerConfig)} - {field.name for field in fields(transformers.BlipConfig)}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if key not in ours}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}))
    loaded = FAMILY.load(tmp_path)
    assert loaded.dtype == torch.float32 and list(loaded.config.image_std) == [1.0, 2.0, 3.0]
    assert loaded.config.question_start_id is None and loaded.config.decoder_start == 3
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: edit(f, "text_config", intermediate_size=9), "mismatched keys"),
        (lambda f: edit(f, "vision_config", num_hidden_layers=4), "missing keys"),
        (lambda f: edit(f, "text_config", num_hidden_layers=1), "unexpected keys"),
        (lambda f: edit(f, "vision_config", num_attention_heads=5), "shared evenly"),
        (lambda f: edit(f, "text_config", num_attention_heads=0), "shared evenly"),
        (lambda f: edit(f, "text_config", is_decoder=False), "is_decoder is false"),
        (lambda f: edit(f, "vision_config", image_size=[16, 24]), "square"),
        (lambda f: edit(f, "vision_config", image_size=17), "no multiple"),
        (lambda f: edit(f, decoder_layers=-2), "-2 decoder layers"),
        (lambda f: edit(f, question_start_id=10**6), "question_start_id is 1000000"),
        (lambda f: edit(f, answer_start_id=-1), "first token of answers is -1"),
        (lambda f: edit(f, "vision_config", hidden_size="wide"), "cannot read"),
        (lambda f: edit(f, text_config=7), "cannot read"),
        (lambda f: edit(f, architectures=["BlipModel"]), "architectures is BlipModel"),
        (lambda f: edit(f, architectures=None), "architectures is None"),
        (lambda f: edit(f, architectures=["BlipForConditionalGeneration"]), "unexpected keys"),
        (lambda f: edit(f, model_type="evlm_blip_vqa", kept={"vision.0.head": "0-1"}), "mismatched keys"),
        (lambda f: edit(f, decoder_layers=1), "unexpected keys"),
        (lambda f: edit(f, kept={"fusion.0.head": "0"}), "unknown groups"),
        (lambda f: edit(f, kept={"decoder.0.head": "0-4"}), "not ascending within"),
        (lambda f: spoil_weights(f, lambda t: t.pop("vision_model.post_layernorm.weight")), "1 missing keys"),
        (lambda f: spoil_weights(f, lambda t: t.update(extra=torch.ones(1))), "first extra"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]), "is damaged or cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot load"),
        (lambda f: spoil_weights(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "only floating-point weights"),
        (lambda f: spoil_weights(f, lambda t: t.update({POSITIONS: torch.tensor([[1, 0]])})), "does not count from 0"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, spoil, message):
    FAMILY.save(whole("blip-qa"), tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message):
        families.of_folder(tmp_path).load(tmp_path)


@each
def test_anatomy_covers_every_prunable_tensor(name):
    for model in (build(name)[0], cut(build(name)[0])):
        tensors = model.state_dict()
        taken: dict[tuple[str, int], int] = {}
        for unit in model.units():
            for site in unit.sites:
                taken[site.tensor, site.dim] = taken.get((site.tensor, site.dim), 0) + site.stop - site.start
        assert all(tensors[tensor].shape[dim] == count for (tensor, dim), count in taken.items())
        parts = (".qkv.", ".query.", ".key.", ".value.", ".fc1.", ".intermediate.", "projection.weight", ".fc2.weight", "dense.weight")
        inside = {n for n in tensors if (".layers." in n or ".layer." in n) and any(part in n for part in parts)}
        assert {tensor for tensor, _ in taken} == inside
        towers = set(model.config.towers) | ({"heads"} if name == "blip-retrieval" else set())
        assert {Blip.tower_of(n) for n in tensors} == towers
        assert sum(map(Blip.is_embedding, tensors)) == 2 * len(model.config.towers) - 1


def test_sizes_and_abilities():
    for name, kind, able in zip(NAMES, KINDS[:3], ({"answer"}, {"caption"}, {"embed", "match", "contrast"}), strict=True):
        config = CONFIGS[name]
        assert type(config) is kind and config.abilities() == able
        sizes = config.sizes()
        assert sizes.heads == {"vision": (4, 4), **{tower: (3, 3) if tower in kind.towers else () for tower in ("text", "decoder")}}
        assert sizes.widths["vision"] == (16, 16, 16) and sizes.vocab_size == 20


def test_a_fresh_base_is_the_published_one():
    config = fresh_config("base", {}, 30524)
    with torch.device("meta"):
        model = network(config)
    assert config.is_stock and config.text_config.num_attention_heads == 12 and config.vision_config.layer_norm_eps == 1e-6
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(361.2e6, rel=0.002)  # published: 361 M
    with pytest.raises(BadInput, match="vision_layer: unknown key, did you mean vision_layers"):
        fresh_config("tiny", {"vision_layer": 2}, 50)
    with pytest.raises(BadInput, match="shared evenly"):
        FAMILY.fresh_config("tiny", {"text_heads": 3}, 50)
    with pytest.raises(BadInput, match="no multiple"):
        FAMILY.fresh_config("tiny", {"patch_size": 9}, 50)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `init`, `teacher`, `student`, `pruned` of a question-answering BLIP with 16 channels."""
    root = tmp_path_factory.mktemp("blip")
    sizes = {**SIZES, "vision_layers": 2, "text_layers": 2, "decoder_layers": 2}
    run_stage("init", out=str(root / "init"), family="blip", size="tiny", data=SHAPES, settings=sizes)
    run_stage("finetune", out=str(root / "teacher"), model=str(root / "init"), data=SHAPES, **TRAIN)
    run_stage("shrink", out=str(root / "student"), model=str(root / "teacher"), layers={"decoder": 2})
    taught = {"model": str(root / "student"), "teacher": str(root / "teacher"), "data": SHAPES, "sparsity": 0.4}
    run_stage("prune", out=str(root / "pruned"), **taught, **TRAIN)
    return root


def test_a_fresh_network_reads_and_writes_with_its_own_tokens(blip):
    made = load(str(blip / "init"))
    vocab, config = made.tokenizer.get_vocab(), made.model.config
    assert config.is_stock and config.question_start_id == vocab["[ENC]"] and config.decoder_start == vocab["[DEC]"]
    assert config.text_config.sep_token_id == vocab["[SEP]"] and len(vocab) == config.text_config.vocab_size
    assert made.tokenizer.decode([vocab["[DEC]"], vocab["[SEP]"]], skip_special_tokens=True) == ""
    assert made.manifest.family == "blip" and made.manifest.origin == "random" and made.abilities == {"answer"}
    with pytest.raises(BadInput, match="no clip is built from towers"):
        run_stage("init", out=str(blip / "x"), family="clip", vision_from="a", text_from="b", tokenizer="b")


def test_a_chain_of_stages(blip):
    teacher, student, pruned = (load(str(blip / name)) for name in ("teacher", "student", "pruned"))
    assert student.model.config.layers() == {"vision": 1, "text": 1, "decoder": 2}
    assert pruned.manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.005)
    macs = [loaded.manifest.accounting["macs"] for loaded in (teacher, student, pruned)]
    assert macs[0]["total"] > macs[1]["total"] > macs[2]["total"] and set(macs[0]["by_tower"]) == {"vision", "text", "decoder"}
    assert sum(macs[2]["by_tower"].values()) == macs[2]["total"]
    assert {"kd", "task"} <= set(pruned.manifest.metrics["train"]) and pruned.model.config.answers == teacher.model.config.answers
    stock = transformers.BlipForQuestionAnswering.from_pretrained(blip / "teacher").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in teacher.model.state_dict().items())
    result = run_stage("bench", models=[str(blip / "teacher"), str(blip / "pruned")], batch_sizes=[2], rounds=1, warmup_rounds=0)
    assert [row["trained"] for row in result["models"]] == [True, True]
    for mode in ("rank", "generate"):
        assert run_stage("eval", model=str(blip / "pruned"), data=SHAPES, limit=2, mode=mode)["metrics"]["questions"] == 20


def test_gates_are_cut_again_and_magnitude_prunes_without_any(blip, tmp_path):
    again = {"from_gates": str(blip / "pruned"), "data": SHAPES, "eval_limit": 2}
    run_stage("prune", out=str(tmp_path / "recut"), sparsity=0.6, **again)
    taught = {"model": str(blip / "student"), "data": SHAPES, "sparsity": 0.5, "method": "magnitude", **TRAIN, "max_steps": 2}
    run_stage("prune", out=str(tmp_path / "magnitude"), **taught)
    for name, sparsity in (("recut", 0.6), ("magnitude", 0.5)):
        assert load(str(tmp_path / name)).manifest.accounting["sparsity"]["achieved"] == pytest.approx(sparsity, abs=0.005)


def test_training_is_resumed_with_tied_tensors(blip, tmp_path):
    from efficientvlm.training.state import Spent, newest, restore, save, tensors_of

    model, other = load(str(blip / "teacher")).model, load(str(blip / "init")).model
    save(tmp_path, tensors_of(model, []), Spent(steps=3))
    assert newest(tmp_path) is not None and restore(tmp_path, other, [], 3).steps == 3
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    tensors = other.state_dict(keep_vars=True)
    words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert tensors["text_decoder.cls.predictions.decoder.weight"] is words


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_transformers_is_imported_and_shrunk(name, blip, tmp_path, capsys):
    vocab = load(str(blip / "init")).tokenizer
    model = whole(name)
    config = model.config.copy()
    config.text_config.vocab_size = len(vocab)
    stock_of(network(config)).save_pretrained(tmp_path / "hf")
    vocab.save_pretrained(tmp_path / "hf")
    edit(tmp_path / "hf", "text_config", num_attention_heads=3)
    run_stage("import", Control(), out=str(tmp_path / "in"), model=str(tmp_path / "hf"))
    assert "vision 4 of 6 columns (config.json)" in capsys.readouterr().err
    run_stage("shrink", out=str(tmp_path / "student"), model=str(tmp_path / "in"))
    loaded = load(str(tmp_path / "student"))
    depth = {tower: 1 if tower in config.towers else 0 for tower in ("vision", "text", "decoder")}
    assert loaded.model.config.layers() == depth
    models = [str(tmp_path / "in"), str(tmp_path / "student")]
    result = run_stage("bench", models=models, batch_sizes=[2], rounds=1, warmup_rounds=0)
    assert result["models"][1]["parameters_timed"] < result["models"][0]["parameters_timed"] and len(result["latency"]) == 2
    what = "captions by beam search" if name == "blip-caption" else "forward pass"  # of answers there is no list to rank
    assert what in result["timed"]
    pruning = {"task": "none", "method": "magnitude", "sparsity": 0.4}
    run_stage("prune", out=str(tmp_path / "pruned"), model=str(tmp_path / "student"), **pruning)
    pruned = load(str(tmp_path / "pruned"))
    dearest = int(Anatomy.of(loaded.model).costs.max()) / loaded.manifest.accounting["sparsity"]["initial"]
    assert 0.4 <= pruned.manifest.accounting["sparsity"]["achieved"] < 0.4 + dearest


def test_the_recipe_runs_scaled_down(tmp_path):
    from efficientvlm.recipe import load_recipe, validate
    from efficientvlm.stages.run import run_stage as run

    short = [
        *(f"{name}.max_steps=2" for name in ("teacher", "distilled", "pruned", "final")),
        "batch_size=2",
        "limit=8",
        "eval_limit=2",
        f"data={SHAPES}",
        "speed.rounds=1",
    ]
    sizes = {**SIZES, "vision_layers": 2, "text_layers": 2}
    steps = validate(load_recipe("blip-shapes"), [*short, f"start.settings={json.dumps(sizes)}"], out=str(tmp_path))
    for step in steps:
        run(step.stage, step.config, Control(quiet=True))
    summary = json.loads((tmp_path / "report" / "summary.json").read_text("utf-8"))
    assert {"teacher", "student", "pruned", "final"} <= set(json.dumps(summary).replace('"', " ").split())
    final = load(str(tmp_path / "final"))
    assert final.manifest.family == "blip" and final.manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.005)


OPEN = {
    "ours": "import efficientvlm; model = efficientvlm.load(folder)",
    # transformers loads its Auto classes in the middle of these imports
    "auto": "import efficientvlm; from transformers import BertModel, AutoModel; model = AutoModel.from_pretrained(folder).eval()",
    "stock": "import transformers; model = getattr(transformers, name).from_pretrained(folder).eval()",
}
PROCESS = """
import sys, torch
from safetensors.torch import load_file
how, *arguments = sys.argv[1:]
for argument in arguments:
    name, folder = argument.split("=")
    {open}
    assert ("efficientvlm" in sys.modules) == (how != "stock")
    saved = load_file(folder + "/../inputs.safetensors")
    x, ids, mask = saved["pixels"], saved["ids"], saved["mask"]
    with torch.no_grad():
        if name == "BlipForQuestionAnswering":
            got = model(pixel_values=x, input_ids=ids, attention_mask=mask, labels=ids).loss
        else:
            out = model(pixel_values=x, input_ids=ids, attention_mask=mask)
            got = out.logits if name == "BlipForConditionalGeneration" else out.itm_score
    assert torch.allclose(got, saved["logits"], rtol=1e-5, atol=1e-5), (got - saved["logits"]).abs().max()
    print(type(model).__name__)
"""


@pytest.mark.slow
def test_folders_open_in_fresh_processes(blip, tmp_path):
    """Cut ones with `load` and with Auto classes once the package is imported; whole ones without the package."""
    from efficientvlm.checkpoints.folder import Output
    from efficientvlm.stages.common import write

    folders: dict[str, list[str]] = {"cut": [], "whole": []}
    tokens = load(str(blip / "init")).tokenizer
    for name in NAMES:
        dense = whole(name)
        config = dense.config.copy()
        config.text_config.vocab_size = len(tokens)
        dense = network(config).eval()
        for state, model in (("cut", cut(dense)), ("whole", dense)):
            folder = tmp_path / f"{name}-{state}" / "model"
            ids, mask = texts(config, config.decoder_start, (5, 5, 5) if name == "blip-qa" else (5, 3, 4))
            inputs = {"pixels": torch.randn(3, 3, 16, 16), "ids": ids, "mask": mask}
            kinds = ("question", "answer") if name == "blip-qa" else ("text",)
            batch = {f"{kind}_{part}": inputs[part] for kind in kinds for part in ("ids", "mask")}
            with torch.no_grad():
                logits = model.run({"pixels": inputs["pixels"], "answer_index": torch.arange(3), **batch})["logits"]
            if name == "blip-qa":  # transformers gives the loss alone
                logits = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            write(Output.open(folder, stage="import", inputs={}, config={}), FAMILY, model, tokens, control=Control(quiet=True))
            save_file({**inputs, "logits": logits}, folder.parent / "inputs.safetensors")
            folders[state].append(f"{config.stock}={folder}")
    programs = {how: (PROCESS.format(open=code), [how, *folders["whole" if how == "stock" else "cut"]]) for how, code in OPEN.items()}
    for how, out in fresh.outputs(programs, tmp_path).items():
        assert out.split() == [("" if how == "stock" else "Sliced") + kind.stock for kind in KINDS[:3]]
