"""CLIP and SigLIP: the same numbers as transformers' classes, folders that open in both, cut networks in fresh processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from clip_folder import byte_pairs, write_clip
from compression_cases import CONFIGS, TEXT, VISION, build, network
from conftest import run_stage
from safetensors.torch import load_file, save_file
from spoiling import edit, spoil_weights
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, SiglipModel

from efficientvlm import families
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.surgery import pad_model, slice_model
from efficientvlm.control import Control
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import load_tokenizer, save_tokenizer
from efficientvlm.errors import BadInput
from efficientvlm.families.clip.config import LEGACY_END, TOWERS, SlicedSiglipConfig
from efficientvlm.families.clip.family import CLIP
from efficientvlm.families.clip.network import Comparing, SlicedCLIPModel, SlicedSiglipModel
from efficientvlm.loaded import load
from efficientvlm.planning.chain import Chain
from efficientvlm.planning.forecast import forecast
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages import import_folder

FAMILY = CLIP()
CLOSE = dict(rtol=1e-5, atol=1e-5)
STOCK = {"clip": CLIPModel, "siglip": SiglipModel}
KEPT = {"vision.0.head": [1, 3], "vision.1.head": [], "text.0.neuron": [], "text.1.head": [2], "vision.1.neuron": [0, 4]}
both = pytest.mark.parametrize("name", STOCK)


def texts(config: Any, stock: bool = False) -> dict[str, Tensor]:
    """Three texts of unequal length that end in the end token; with `stock` as the processor of that model gives them."""
    part = config.text_config
    end = part.vocab_size - 1 if part.eos_token_id == LEGACY_END else part.eos_token_id
    mask = (torch.arange(7) < torch.tensor([7, 3, 5])[:, None]).long()
    ids = torch.randint(4, part.vocab_size - 1, (3, 7), generator=torch.Generator().manual_seed(1))
    ids = ids.scatter(1, mask.sum(1, keepdim=True) - 1, end).masked_fill(mask == 0, part.pad_token_id)
    if stock and isinstance(config, SlicedSiglipConfig):
        return {"input_ids": torch.nn.functional.pad(ids, (0, 5), value=part.pad_token_id)}
    return {"input_ids": ids, "attention_mask": mask} if stock else {"text_ids": ids, "text_mask": mask}


def example(config: Any) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return {"pixels": pixels, **texts(config)}


def stock_inputs(config: Any) -> dict[str, Tensor]:
    return {"pixel_values": example(config)["pixels"], **texts(config, stock=True)}


def cut(name: str) -> Any:
    """A network that lost heads and neurons, some layers all of them."""
    model, _ = build(name)
    return slice_model(model, [u for u in model.units() if u.index in KEPT.get(u.group, [u.index])])


@both
@pytest.mark.parametrize("end", [1, LEGACY_END])
def test_the_numbers_are_those_of_transformers(name, end):
    dense, _ = build(name)
    config = dense.config.copy()
    config.text_config.eos_token_id = end
    ours = network(config).eval()
    ours.load_state_dict(dense.state_dict())
    stock_config = STOCK[name].config_class(text_config=config.text_config.to_dict(), vision_config=config.vision_config.to_dict())
    stock_config.projection_dim = 8
    theirs = STOCK[name](stock_config).eval()
    theirs.set_attn_implementation("eager")
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        record = ours.run(example(config), ours.taps)
        plain = ours.run(example(config))
        expected = theirs(**stock_inputs(config), output_attentions=True, output_hidden_states=True)
    assert sorted(plain) == ["image_features", "logits", "text_features"]
    for what in (record, plain):
        torch.testing.assert_close(what["logits"], expected.logits_per_image, **CLOSE)
        torch.testing.assert_close(what["image_features"], expected.image_embeds, **CLOSE)
        torch.testing.assert_close(what["text_features"], expected.text_embeds, **CLOSE)
    for tower in TOWERS:
        output = expected[f"{tower}_model_output"]
        torch.testing.assert_close(tuple(record[f"{tower}.hidden"]), output.hidden_states, **CLOSE)
        torch.testing.assert_close(tuple(record[f"{tower}.self_attention"]), output.attentions, **CLOSE)


@both
def test_networks_are_called_as_transformers_ones(name):
    """A cut network as the same with zeros in transformers' class: every output, states and maps too, and the loss of training."""
    model = cut(name)
    whole = pad_model(model)
    stock_config = STOCK[name].config_class.from_dict({**whole.config.to_dict(), "model_type": name})
    stock = STOCK[name](stock_config).eval()
    stock.set_attn_implementation("eager")
    stock.load_state_dict(whole.state_dict())
    inputs = stock_inputs(model.config)
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1].flip(3)])
    asked = {"output_attentions": True, "output_hidden_states": True, "return_loss": True}
    with torch.no_grad():
        mine, theirs = (net(**inputs, **asked) for net in (model, stock))
        plain = model(**inputs)
    assert mine.keys() == theirs.keys() and plain.loss is None and plain.vision_model_output.attentions is None
    for key in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        torch.testing.assert_close(mine[key], theirs[key], **CLOSE)
    for tower in TOWERS:
        part, other = mine[f"{tower}_model_output"], theirs[f"{tower}_model_output"]
        for key in ("last_hidden_state", "pooler_output", "hidden_states"):
            torch.testing.assert_close(part[key], other[key], **CLOSE)
        for number, (maps, stock_maps) in enumerate(zip(part.attentions, other.attentions, strict=True)):
            kept = model.config.kept_indices()[f"{tower}.{number}.head"]
            torch.testing.assert_close(maps, stock_maps[:, kept], **CLOSE)


@both
def test_fresh_weights_are_drawn_as_transformers_draws_them(name):
    config = CONFIGS[name]
    config = config.copy()
    for tower in TOWERS:
        config.part(tower).hidden_size, config.part(tower).intermediate_size, config.part(tower).initializer_factor = 48, 96, 1.0
        config.part(tower).num_attention_heads = 4
    config.text_config.projection_size, config.initializer_factor = 48, 1.0
    stock_config = STOCK[name].config_class.from_dict({**config.to_dict(), "model_type": name})
    torch.manual_seed(0)
    theirs = STOCK[name](stock_config).state_dict()
    ours = network(config).state_dict()
    assert ours.keys() == theirs.keys()
    for tensor, values in ours.items():
        if values.numel() < 500:
            assert not tensor.endswith("bias") or float(values.abs().max()) < 1e-3, tensor
        else:
            assert float(values.std() / theirs[tensor].std()) == pytest.approx(1, abs=0.12), tensor


@both
def test_networks_without_values_run_on_the_meta_device(name):
    with torch.device("meta"):
        model = network(cut(name).config)
        record = model.run(model.example(2, 5, "meta"), model.taps)
    assert record["logits"].shape == (2, 2) and {p.device.type for p in model.parameters()} == {"meta"}
    assert [maps.shape[1] for maps in record["vision.self_attention"]] == [2, 0]


@both
def test_several_passes_and_training_keep_their_own_records(name):
    model, _ = build(name)
    one = model.run(example(model.config), {"text.hidden", "vision.self_attention"})
    two = model.run({**example(model.config), "pixels": torch.zeros(1, 3, 16, 16)}, {"vision.self_attention"})
    assert "text.hidden" not in two and len(one["vision.self_attention"][0]) == 2 and len(two["vision.self_attention"][0]) == 1
    (one["logits"].square().mean() + one["text.hidden"][1].mean() + two["vision.self_attention"][0].square().mean()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == set()
    with pytest.raises(BadInput, match=r"text\.cross_attention"):
        model.run(example(model.config), {"text.cross_attention"})
    with pytest.raises(BadInput, match="cannot answer"):
        model.gain("answer")


@both
def test_uint8_pixels_are_normalised_with_the_statistics_of_the_configuration(name):
    model, _ = build(name)
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    batch = example(model.config)
    by_hand = model.run(batch | {"pixels": (pixels / 255 - mean) / std})["logits"]
    torch.testing.assert_close(model.run(batch | {"pixels": pixels})["logits"], by_hand, **CLOSE)


@both
def test_whole_networks_are_written_for_transformers(name, tmp_path):
    model, _ = build(name)
    model.config.answers = ["yes"]
    FAMILY.save(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == (name, [STOCK[name].__name__])
    theirs, info = STOCK[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and type(theirs) is STOCK[name]
    with torch.no_grad():
        expected = model.run(example(model.config))["logits"]
        torch.testing.assert_close(theirs.eval()(**stock_inputs(model.config)).logits_per_image, expected, **CLOSE)
    ours = families.of_folder(tmp_path).load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), model.state_dict().values(), strict=True))
    assert ours.config.answers == ["yes"] and not ours.training


@both
def test_cut_networks_are_written_with_our_type_and_are_what_they_were(name, tmp_path):
    model = cut(name)
    FAMILY.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"evlm_{name}"
    again = families.of_folder(tmp_path).load(tmp_path)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert again.config.kept_indices() == model.config.kept_indices()
    assert again.config.kept_indices()["vision.1.head"] == [] and "vision.1.head" in again.config.kept
    torch.testing.assert_close(again.run(example(model.config))["logits"], model.run(example(model.config))["logits"], rtol=0, atol=0)


def test_folders_of_older_versions(tmp_path):
    """Half precision, position ids among the weights, towers described twice, prefixes doubled, statistics in the image processor."""
    model, _ = build("clip")
    FAMILY.save(model, tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    extra = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in TOWERS}
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    for key in ("kept", "layer_source", "layer_source_of", "answers", "rank_top", "image_mean", "image_std"):
        del values[key]
    old = values | {"text_config_dict": values["text_config"], "vision_config_dict": None}
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}))
    loaded = FAMILY.load(tmp_path)
    assert loaded.dtype == torch.float32 and list(loaded.config.image_std) == [1.0, 2.0, 3.0]
    expected = {name: tensor.float() for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    doubled = {
        n.replace("_model.", "_model.vision_model." if n.startswith("vision") else "_model.text_model."): t for n, t in tensors.items()
    }
    save_file(doubled, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in FAMILY.load(tmp_path).state_dict().items())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: edit(f, "text_config", intermediate_size=9), "mismatched keys"),
        (lambda f: edit(f, "vision_config", num_hidden_layers=4), "missing keys"),
        (lambda f: edit(f, "vision_config", num_hidden_layers=1), "unexpected keys"),
        (lambda f: edit(f, "vision_config", num_attention_heads=5), "not a multiple"),
        (lambda f: edit(f, "vision_config", num_attention_heads=0), "cannot read"),
        (lambda f: edit(f, "vision_config", image_size=[16, 24]), "square"),
        (lambda f: edit(f, "vision_config", hidden_size="wide"), "cannot read"),
        (lambda f: edit(f, text_config=7), "cannot read"),
        (lambda f: edit(f, model_type="clipp"), "clipp"),
        (lambda f: edit(f, model_type="siglip"), "weights do not fit"),
        (lambda f: edit(f, model_type="evlm_clip", kept={"vision.0.head": "0-1"}), "mismatched keys"),
        (lambda f: edit(f, kept={"vision.7.head": "0-1"}), "unknown groups"),
        (lambda f: edit(f, kept={"vision.0.head": "0-4"}), "not ascending within"),
        (lambda f: edit(f, kept=[1]), "cannot read|not a mapping"),
        (lambda f: spoil_weights(f, lambda t: t.pop("logit_scale")), "1 missing keys, first logit_scale"),
        (lambda f: spoil_weights(f, lambda t: t.update(extra=torch.ones(1))), "first extra"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]), "is damaged or cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot load"),
        (lambda f: edit(f, "text_config", eos_token_id=list(range(300))), "the id that ends a text is"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, capfd, spoil, message):
    FAMILY.save(build("clip")[0], tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        families.of_folder(tmp_path).load(tmp_path)
    assert caught.value.fix and "verify" not in caught.value.fix  # it knows only our checkpoints
    assert capfd.readouterr().err == ""


def test_a_siglip_refuses_texts_longer_than_its_positions():
    model, _ = build("siglip")
    ids = torch.ones(2, 13, dtype=torch.long)
    with pytest.raises(BadInput, match="a text of 13 tokens: this SigLIP reads 12"):
        model.encode_text(ids, ids)


@pytest.mark.parametrize("mean", [[1.0], "grey", [True, None, 1]])
def test_an_image_processor_with_other_than_three_channels_is_refused(tmp_path, mean):
    stock = CLIPModel(CLIPModel.config_class(text_config=TEXT, vision_config=VISION))
    stock.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
    with pytest.raises(BadInput, match=r"image processor in .* image_mean"):
        FAMILY.read_config(tmp_path)


def test_a_siglip_without_its_pooling_head_is_refused(tmp_path):
    FAMILY.save(build("siglip")[0], tmp_path)
    edit(tmp_path, "vision_config", vision_use_head=False)
    with pytest.raises(BadInput, match="vision_use_head"):
        FAMILY.load(tmp_path)


@both
def test_anatomy_covers_every_prunable_tensor(name):
    for model in (build(name)[0], cut(name)):
        tensors = model.state_dict()
        taken: dict[tuple[str, int], int] = {}
        for unit in model.units():
            for site in unit.sites:
                taken[site.tensor, site.dim] = taken.get((site.tensor, site.dim), 0) + site.stop - site.start
        assert all(tensors[tensor].shape[dim] == count for (tensor, dim), count in taken.items())
        parts = ("q_proj", "k_proj", "v_proj", "out_proj.weight", "fc1", "fc2.weight")
        inside = {n for n in tensors if ".layers." in n and any(part in n for part in parts)}
        assert {tensor for tensor, _ in taken} == inside
    assert {Comparing.tower_of(n) for n in tensors} == {"vision", "text", "heads"}
    assert sum(map(Comparing.is_embedding, tensors)) == 3


def test_shrinking_keeps_what_is_left_and_says_where_it_came_from(tmp_path):
    model = cut("clip")
    config = model.config.with_layers({"vision": [1], "text": [0, 1]})
    assert config.layers() == {"vision": 1, "text": 2} and model.config.layers() == {"vision": 2, "text": 2}
    assert config.kept_indices()["vision.0.neuron"] == [0, 4] and config.kept_indices()["text.0.neuron"] == []
    assert config.layer_source == {"vision": [1], "text": [0, 1]} and config.layer_source_of == {"vision": 2, "text": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_pairs()


@pytest.fixture(scope="module")
def hugging_face(tokenizer, tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("hf") / "clip", tokenizer)


@pytest.fixture(scope="module")
def imported(hugging_face, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "clip"
    run_stage("import", out=str(out), model=str(hugging_face))
    return out


def test_an_imported_folder_is_complete(hugging_face, imported, tokenizer):
    loaded = load(str(imported))
    extra = loaded.manifest.extra
    assert loaded.manifest.origin == "imported" and extra["licence"] == "mit" and extra["source"] == str(hugging_face)
    assert extra["heads"] == {
        "vision": "4 of 4 columns (config.json)",
        "text": "3 of 8 columns (config.json)",
    }
    assert "licence: mit." in (imported / "README.md").read_text()
    stock = CLIPModel.from_pretrained(hugging_face).state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in loaded.model.state_dict().items())
    assert list(loaded.sizes.image_mean) == [0.5, 0.4, 0.3] and loaded.abilities == {"align", "embed"}
    sentence = "A red  square and dogs?"
    assert loaded.tokenizer(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert sum(loaded.manifest.accounting["macs"]["by_tower"].values()) == loaded.manifest.accounting["macs"]["total"]


def test_image_settings_go_through_every_stage(hugging_face, imported, tmp_path):
    from transformers import AutoProcessor

    before = json.loads((hugging_face / "preprocessor_config.json").read_text())
    run_stage("shrink", out=str(tmp_path / "student"), model=str(imported), layers={"vision": 1})
    for folder in (imported, tmp_path / "student"):
        assert json.loads((folder / "preprocessor_config.json").read_text()) == before
    processor = AutoProcessor.from_pretrained(tmp_path / "student")
    assert type(processor.tokenizer) is CLIPTokenizer and processor.image_processor.size["shortest_edge"] == 20
    assert CLIPModel.from_pretrained(tmp_path / "student").config.vision_config.num_hidden_layers == 1
    result = run_stage("bench", models=[str(imported), str(tmp_path / "student")], batch_sizes=[2], rounds=1, warmup_rounds=0)
    assert result["models"][1]["parameters_timed"] < result["models"][0]["parameters_timed"] and len(result["latency"]) == 2


def test_image_settings_inside_a_processor_and_none_at_all(hugging_face, tmp_path):
    folder = shutil.copytree(hugging_face, tmp_path / "hf")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 0}))  # transformers reads the other file first
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"crop_size": {"height": 24, "width": 24}}}))
    given = {"out": str(tmp_path / "out"), "model": str(folder)}
    (problem,) = plan([Step("import", "import", stage_settings("import", given))]).problems.found
    assert "its pictures are 24 x 24, the model reads 16 x 16" in str(problem.error)
    with pytest.raises(BadInput, match="its pictures are 24 x 24, the model reads 16 x 16"):
        run_stage("import", **given)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    chain, small = Chain(), str(tmp_path / "small")
    forecast(chain, Step("out", "import", stage_settings("import", given)))
    forecast(chain, Step("small", "shrink", stage_settings("shrink", {"model": given["out"], "out": small})))
    planned = chain.open(small, "small")
    run_stage("import", out=str(tmp_path / "out"), model=str(folder))
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == settings
    assert planned.preprocessing == load(given["out"]).preprocessing
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    run_stage("import", out=str(tmp_path / "plain"), model=str(folder))
    plain = json.loads((tmp_path / "plain" / "preprocessor_config.json").read_text())
    assert plain["size"] == {"height": 16, "width": 16} and plain["do_center_crop"] is False


def test_head_counts_that_the_file_does_not_say_are_doubted(hugging_face, tmp_path, capsys):
    folder = shutil.copytree(hugging_face, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    del values["text_config"]["num_attention_heads"]  # transformers then takes 8
    (folder / "config.json").write_text(json.dumps(values))
    run_stage("import", Control(), out=str(tmp_path / "out"), model=str(folder))
    said = capsys.readouterr().err
    assert "vision 4 of 4 columns (config.json)" in said and "licence mit" in said
    assert "text 8 of 3 columns (not in config.json, transformers' default, where 64 are usual: check it)" in said


def test_a_name_of_the_hub(hugging_face, tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot(name: str, **_: Any) -> str:
        if name != "someone/clip":
            raise OSError("no connection\nmore")
        commit = tmp_path / "snapshots" / "0123abcd"
        return str(commit if commit.exists() else shutil.copytree(hugging_face, commit))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    manifest = run_stage("import", out=str(tmp_path / "out"), model="someone/clip")
    assert manifest.extra["revision"] == "0123abcd" and manifest.extra["source"] == "someone/clip"
    with pytest.raises(BadInput, match=r"cannot fetch someone/else from the hub: no connection$"):
        run_stage("import", out=str(tmp_path / "other"), model="someone/else")
    assert not (tmp_path / "other").exists()
    with pytest.raises(BadInput, match="does not exist"):
        import_folder.fetch("nowhere")


@pytest.mark.parametrize(
    "spoil, settings, message",
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), {}, "no safetensors"),
        (lambda f: (f / "config.json").unlink(), {}, "no config.json"),
        (lambda f: edit(f, model_type="gpt2"), {}, "gpt2"),
        (lambda f: (f / "tokenizer.json").unlink(), {}, "no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), {}, "damaged"),
        (lambda f: edit(f, "text_config", vocab_size=20), {}, "do not fit"),
        (lambda f: (f / "evlm_manifest.json").write_text("{}"), {}, "checkpoint already"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), {}, "preprocessor_config"),
        (lambda f: None, {"layout": "vqa"}, "published X-VLM files"),
        (lambda f: None, {"settings": {"text_heads": 4}}, "published X-VLM files"),
    ],
)
def test_folders_that_cannot_be_imported_leave_nothing(hugging_face, tmp_path, spoil, settings, message):
    folder = shutil.copytree(hugging_face, tmp_path / "hf")
    spoil(folder)
    with pytest.raises(BadInput, match=message):
        run_stage("import", out=str(tmp_path / "out"), model=str(folder), **settings)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_tokenizer_of_another_vocabulary_is_refused(hugging_face, tmp_path):
    from efficientvlm.data.tokenizer import train_wordpiece

    save_tokenizer(train_wordpiece(["quite another text with words"], 200), tmp_path / "tokens")
    with pytest.raises(BadInput, match=r"the tokenizer has \d+ tokens: the model embeds 47"):
        run_stage("import", out=str(tmp_path / "out"), model=str(hugging_face), tokenizer=str(tmp_path / "tokens"))


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_pruning_without_a_task(imported, tmp_path, method):
    """Cut by the weights alone; what is left are the parent's own tensors, and the folder goes on as any other."""
    run_stage("prune", out=str(tmp_path / "cut"), model=str(imported), task="none", method=method, sparsity=0.4, min_heads=1)
    small, parent = load(str(tmp_path / "cut")), load(str(imported))
    budget = small.manifest.extra["budget"]["all"]
    dearest = int(Anatomy.of(parent.model).costs.max()) / parent.manifest.accounting["sparsity"]["initial"]
    assert 0.4 <= budget["achieved"] < 0.4 + dearest and small.manifest.accounting["sparsity"]["achieved"] == pytest.approx(
        budget["achieved"]
    )
    influence = small.manifest.extra["influence"]  # there are no data: of random pictures and tokens
    assert influence["inputs_drawn_at_random"] and {name: part["outputs"] for name, part in influence["inputs"].items()} == {
        "image": {"itc": 1.0},
        "text": {"itc": 1.0},
    }
    kept = [u for u in parent.model.units() if u.index in small.model.config.kept_indices()[u.group]]
    direct = slice_model(parent.model, kept).state_dict()
    assert all(torch.equal(tensor, direct[name]) for name, tensor in small.model.state_dict().items())
    assert small.image_processor == parent.image_processor and small.manifest.parents[0].role == "model"
    run_stage("shrink", out=str(tmp_path / "less"), model=str(tmp_path / "cut"))
    assert load(str(tmp_path / "less")).model.config.layer_source == {"vision": [1], "text": [1]}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "l0"}, "l0 needs a task"),
        ({"method": "taylor"}, "taylor needs a task"),
        ({"method": "magnitude", "teacher": "x"}, "leave the teacher out"),
        ({"method": "magnitude", "from_gates": "x"}, "leave task out"),
        ({"method": "magnitude", "task": "vqa"}, "data, which was not given"),
        ({"method": "magnitude", "hard_negatives": False}, "hard_negatives: it belongs to task pretraining or retrieval"),
        ({"method": "magnitude", "weights": {"logits": 2}}, "weights: it belongs to task pretraining or vqa"),
    ],
)
def test_settings_that_need_training_are_refused_without_a_task(settings, message):
    with pytest.raises(BadInput, match=message):
        stage_settings("prune", {"model": "m", "out": "o", "task": "none", **settings})


def test_clip_trains_on_no_task_yet(imported, tmp_path):
    with pytest.raises(BadInput, match="cannot answer questions"):
        run_stage("finetune", out=str(tmp_path / "out"), model=str(imported), data="shapes:size=10", max_steps=1)
    assert not (tmp_path / "out").exists()


def test_texts_begin_and_end_as_their_tokenizer_says(tokenizer, tmp_path):
    texts = Texts(tokenizer, 5)
    ids, mask = texts.batch(["a red circle", "dogs and a cat and the square"])
    assert ids[0].tolist() == tokenizer("a red circle")["input_ids"]
    assert ids[1, 0] == tokenizer.bos_token_id and ids[1, 4] == tokenizer.eos_token_id and mask.sum() == 10
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is CLIPTokenizer and again("dogs, red")["input_ids"] == tokenizer("dogs, red")["input_ids"]
    old = tmp_path / "old"
    old.mkdir()
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert load_tokenizer(old)("dogs, red")["input_ids"] == tokenizer("dogs, red")["input_ids"]


def test_texts_of_a_tokenizer_that_puts_nothing_in_front(tmp_path):
    """As SigLIP's: a unigram model, an end token, which also pads."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    save_tokenizer(made, tmp_path)
    texts = Texts(load_tokenizer(tmp_path), 4)
    assert texts.cls is None and texts.batch(["ab", "abab"])[0].tolist() == [[2, 3, 1, 1], [2, 3, 2, 1]]
    assert texts.batch(["ab", "abab"])[1].sum(1).tolist() == [3, 4]
    backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="</s>"), tmp_path / "endless")
    with pytest.raises(BadInput, match="0 behind it"):
        load_tokenizer(tmp_path / "endless")


OPEN = {
    "ours": "import efficientvlm; model = efficientvlm.load(folder)",
    "auto": "import efficientvlm; from transformers import AutoModel; model = AutoModel.from_pretrained(folder).eval()",
    "stock": "from transformers import AutoModel; model = AutoModel.from_pretrained(folder).eval()",
}
PROCESS = """
import sys, torch
from safetensors.torch import load_file
how, *folders = sys.argv[1:]
for folder in folders:
    {open}
    assert ("efficientvlm" in sys.modules) == (how != "stock")
    saved = load_file(folder + "/../inputs.safetensors")
    with torch.no_grad():
        got = model(**{{name: saved[name] for name in saved if name != "logits"}}).logits_per_image
    assert torch.allclose(got, saved["logits"], rtol=1e-5, atol=1e-5), (got, saved["logits"])
    print(type(model).__name__)
"""


@pytest.mark.slow
def test_folders_open_in_fresh_processes(tmp_path):
    """Cut ones with `load` and with Auto classes once the package is imported; whole ones without the package."""
    from efficientvlm.checkpoints.folder import Output
    from efficientvlm.data.tokenizer import train_wordpiece
    from efficientvlm.stages.common import write

    folders: dict[str, list[str]] = {"cut": [], "whole": []}
    tokens = train_wordpiece(["a"], 16)
    for name in STOCK:
        for kind, model in (("cut", cut(name)), ("whole", build(name)[0])):
            folder = tmp_path / f"{name}-{kind}" / "model"
            inputs = stock_inputs(model.config)
            with torch.no_grad():
                logits = model.run(example(model.config))["logits"]
            write(Output.open(folder, stage="import", inputs={}, config={}), FAMILY, model, tokens, control=Control(quiet=True))
            save_file({**inputs, "logits": logits}, folder.parent / "inputs.safetensors")
            folders[kind].append(str(folder))
    programs = {how: (PROCESS.format(open=code), [how, *folders["whole" if how == "stock" else "cut"]]) for how, code in OPEN.items()}
    for how, out in fresh.outputs(programs, tmp_path).items():
        ours = [SlicedCLIPModel.__name__, SlicedSiglipModel.__name__]
        assert out.split() == (["CLIPModel", "SiglipModel"] if how == "stock" else ours)
