"""Files and folders of other projects: every entry accounted for, every damage a message, numbers as there."""

from __future__ import annotations

import argparse
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from efficientvlm.control import Control
from efficientvlm.data.tokenizer import save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.published import read_published
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.weights import read_file, read_folder
from efficientvlm.families.xvlm.family import XVLM
from efficientvlm.families.xvlm.start import from_towers
from efficientvlm.loaded import load
from efficientvlm.settings import layouts
from efficientvlm.settings.stages import ImportConfig, InitConfig
from efficientvlm.stages import import_, init
from efficientvlm.stages.import_folder import licence_of

WIDTH, NEURONS, VOCAB = 64, 10, 70
QUIET = Control(quiet=True)
CLOSE = dict(rtol=1e-5, atol=1e-5)


def published(
    layout: str = "pretrain", vision: int = 3, text: int = 2, fusion: int = 1, decoder: int = 1, vocab: int = VOCAB, swin: bool = False
) -> dict[str, Tensor]:
    """Random tensors under the names of the published code; a Swin has two stages of two layers, and windows of four by four tokens."""
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape) * 0.2

    def linear(name: str, out: int, into: int) -> None:
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    def norm(name: str, width: int = WIDTH) -> None:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    def mlp(name: str, outputs: int) -> None:
        linear(f"{name}.0", 2 * WIDTH, WIDTH)
        norm(f"{name}.1", 2 * WIDTH)
        linear(f"{name}.3", outputs, 2 * WIDTH)

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            linear(f"{name}.self.{part}", WIDTH, WIDTH)
        linear(f"{name}.output.dense", WIDTH, WIDTH)
        norm(f"{name}.output.LayerNorm")

    def bert(name: str, layers: int, first_cross: int) -> None:
        add(f"{name}.embeddings.word_embeddings.weight", vocab, WIDTH)
        add(f"{name}.embeddings.position_embeddings.weight", 20, WIDTH)
        add(f"{name}.embeddings.token_type_embeddings.weight", 2, WIDTH)
        norm(f"{name}.embeddings.LayerNorm")
        state[f"{name}.embeddings.position_ids"] = torch.arange(20)[None]
        for number in range(layers):
            layer = f"{name}.encoder.layer.{number}"
            attention(f"{layer}.attention")
            if number >= first_cross:
                attention(f"{layer}.crossattention")
            linear(f"{layer}.intermediate.dense", NEURONS, WIDTH)
            linear(f"{layer}.output.dense", WIDTH, NEURONS)
            norm(f"{layer}.output.LayerNorm")

    def language_head(name: str, embeddings: str) -> None:
        linear(f"{name}.predictions.transform.dense", WIDTH, WIDTH)
        norm(f"{name}.predictions.transform.LayerNorm")
        add(f"{name}.predictions.bias", vocab)
        state[f"{name}.predictions.decoder.weight"] = state[f"{embeddings}.embeddings.word_embeddings.weight"].clone()
        state[f"{name}.predictions.decoder.bias"] = state[f"{name}.predictions.bias"].clone()

    def swin_tower(name: str) -> None:
        linear(f"{name}.patch_embed.proj", WIDTH // 2, 3 * 4 * 4)
        state[f"{name}.patch_embed.proj.weight"] = state[f"{name}.patch_embed.proj.weight"].view(-1, 3, 4, 4)
        norm(f"{name}.patch_embed.norm", WIDTH // 2)
        for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1)):
            layer, width = f"{name}.layers.{stage}.blocks.{block}", WIDTH // (2 - stage)
            linear(f"{layer}.attn.qkv", 3 * width, width)
            linear(f"{layer}.attn.proj", width, width)
            add(f"{layer}.attn.relative_position_bias_table", 49, 1 + stage)
            state[f"{layer}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
            linear(f"{layer}.mlp.fc1", NEURONS // (2 - stage), width)
            linear(f"{layer}.mlp.fc2", width, NEURONS // (2 - stage))
            norm(f"{layer}.norm1", width)
            norm(f"{layer}.norm2", width)
        state[f"{name}.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
        norm(f"{name}.layers.0.downsample.norm", 2 * WIDTH)
        add(f"{name}.layers.0.downsample.reduction.weight", WIDTH, 2 * WIDTH)
        norm(f"{name}.norm")

    if swin:
        swin_tower("vision_encoder")
        return state | {n: t for n, t in published(layout, 0, text, fusion, decoder, vocab).items() if not n.startswith("vision_encoder")}
    add("vision_encoder.class_embedding", WIDTH)
    state["vision_encoder.position_ids"] = torch.arange(5)[None]
    add("vision_encoder.patch_embed.weight", WIDTH, 3, 8, 8)
    add("vision_encoder.pos_embed.weight", 5, WIDTH)
    norm("vision_encoder.pre_layrnorm")
    norm("vision_encoder.post_layernorm")
    for number in range(vision):
        layer = f"vision_encoder.encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{part}", WIDTH, WIDTH)
        norm(f"{layer}.layer_norm1")
        norm(f"{layer}.layer_norm2")
        linear(f"{layer}.mlp.fc1", NEURONS, WIDTH)
        linear(f"{layer}.mlp.fc2", WIDTH, NEURONS)
    if layout == "captioning":
        bert("text_decoder.bert", text + fusion, text)
        language_head("text_decoder.cls", "text_decoder.bert")
    else:
        two = layout in ("nlvr2", "text_assignment")
        bert("text_encoder.bert" if layout == "pretrain" else "text_encoder", text + (1 + two) * fusion, text)
        for number in range(text + 1, text + 1 + two * fusion, 2):
            for part in ("key.weight", "key.bias", "value.weight", "value.bias"):
                name = "text_encoder.encoder.layer.{}.crossattention.self." + part
                state[name.format(number)] = state[name.format(number - 1)].clone()
    if layout == "pretrain":
        language_head("text_encoder.cls", "text_encoder.bert")
    if layout in ("pretrain", "grounding"):
        mlp("bbox_head", 4)
    if layout == "vqa":
        bert("text_decoder.bert", decoder, 0)
        language_head("text_decoder.cls", "text_decoder.bert")
    if layout == "nlvr2":
        mlp("cls_head", 2)
    if layout == "text_assignment":
        linear("ta_head", 3, WIDTH)
    if layout in ("pretrain", "retrieval", "text_assignment"):
        linear("vision_proj", 16, WIDTH)
    if layout in ("pretrain", "retrieval"):
        linear("text_proj", 16, WIDTH)
        state["temp"] = torch.tensor(0.05)
        mlp("itm_head", 2)
    return state


def pickled(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)  # noqa: TID251  what the published code does
    return path


def safe(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path)
    return path


LAYOUTS = {
    "pretrain": ["itc", "itm", "mlm", "box"],
    "retrieval": ["itc", "itm"],
    "vqa": [],
    "grounding": ["box"],
    "captioning": ["lm"],
    "nlvr2": ["compare"],
    "text_assignment": ["assign"],
}
"""Layout → heads of the network in it."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_entry_is_mapped_or_ignored_for_a_reason(tmp_path, layout):
    state = published(layout)
    config, ours, report = read_published(safe(tmp_path / "x.safetensors", state))
    model = XVLM().build(config)
    model.load_state_dict(ours, strict=True)
    assert report.layout == layout
    ignored = [name for names in report.ignored.values() for name in names]
    assert len(ours) + len(ignored) == len(state) and set(ignored) <= set(state)
    copies = [name for name in ignored if ".crossattention." in name]
    assert len(copies) == (4 if config.fusion_images == 2 else 0)
    assert all(name.endswith("position_ids") or ".predictions.decoder." in name or name in copies for name in ignored)
    # nothing lost or used twice: the values themselves
    assert sorted(t.sum().item() for t in ours.values()) == sorted(t.sum().item() for n, t in state.items() if n not in ignored)
    assert report.assumed == {"vision_heads": 1, "text_heads": 1, "local_attention_depth": 1}
    assert config.layers() == {"vision": 3, "text": 2, "fusion": config.fusion_images, "decoder": layout == "vqa"}
    assert (config.heads, config.image_size, config.patch_size, config.vocab_size) == (LAYOUTS[layout], 16, 8, VOCAB)


def test_a_captioning_file_is_a_pretrained_one_by_other_names(tmp_path):
    state = published("pretrain")
    config, ours, _ = read_published(safe(tmp_path / "x.safetensors", state))
    model = XVLM().build(config)
    model.load_state_dict(ours)
    tuned, _ = model.gain("caption")
    stack = {n.replace("text_encoder.", "text_decoder."): t for n, t in state.items() if n.startswith(("vision_encoder.", "text_encoder."))}
    config, ours, report = read_published(safe(tmp_path / "y.safetensors", stack))
    assert report.layout == "captioning" and config.heads == tuned.config.heads and config.abilities() == {"caption"}
    assert ours.keys() == tuned.state_dict().keys() and all(torch.equal(ours[name], t) for name, t in tuned.state_dict().items())


def test_places_of_the_tensors(tmp_path):
    state = published("pretrain") | {k: v for k, v in published("vqa").items() if k.startswith("text_decoder")}
    _, ours, _ = read_published(safe(tmp_path / "x.safetensors", state))
    layer = "text_encoder.bert.encoder.layer"
    for name, source in {
        "vision.layers.2.attention.out.bias": "vision_encoder.encoder.layers.2.self_attn.out_proj.bias",
        "vision.layers.0.ffn_norm.weight": "vision_encoder.encoder.layers.0.layer_norm2.weight",
        "vision.position_embedding": "vision_encoder.pos_embed.weight",
        "text.layers.1.attention_norm.bias": f"{layer}.1.attention.output.LayerNorm.bias",
        "text.layers.0.ffn.fc2.weight": f"{layer}.0.output.dense.weight",
        "fusion.layers.0.attention.k.weight": f"{layer}.2.attention.self.key.weight",
        "fusion.layers.0.cross_attention.v.weight": f"{layer}.2.crossattention.self.value.weight",
        "fusion.layers.0.cross_attention_norm.weight": f"{layer}.2.crossattention.output.LayerNorm.weight",
        "mlm_head.transform.weight": "text_encoder.cls.predictions.transform.dense.weight",
        "mlm_head.bias": "text_encoder.cls.predictions.bias",
        "decoder.layers.0.cross_attention.q.bias": "text_decoder.bert.encoder.layer.0.crossattention.self.query.bias",
        "decoder.embeddings.word.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        "decoder_head.norm.bias": "text_decoder.cls.predictions.transform.LayerNorm.bias",
        "box_head.3.weight": "bbox_head.3.weight",
        "temp": "temp",
    }.items():
        assert torch.equal(ours[name], state[source]), name


@pytest.mark.parametrize("legacy", [False, True])
def test_containers_prefixes_and_old_names(tmp_path, legacy):
    state = published()
    plain = read_published(safe(tmp_path / "x.safetensors", state))[1]
    old = {
        f"module.{n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": t
        for n, t in state.items()
    }
    old["module.text_encoder.bert.pooler.dense.weight"] = torch.ones(WIDTH, WIDTH)
    old["module.l0_module.vision_head_loga"] = torch.ones(3, 1)
    content = {"model": old, "optimizer": {"state": {}}, "lr_scheduler": {}, "config": {"image_res": 16}, "epoch": 3}
    path = pickled(tmp_path / "x.th", content, _use_new_zipfile_serialization=not legacy)
    _, ours, report = read_published(path)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)
    assert report.ignored["training state, not weights"] == ["optimizer", "lr_scheduler", "config", "epoch"]
    gates = [names for reason, names in report.ignored.items() if "dense" in reason]
    assert gates == [["l0_module.vision_head_loga"]]
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    assert all(tensor.dtype == torch.float32 for tensor in read_published(safe(tmp_path / "h.safetensors", half))[1].values())


def test_settings_say_what_shapes_do_not(tmp_path):
    path = safe(tmp_path / "x.safetensors", published())
    settings = {"vision_heads": 4, "text_heads": 2, "local_attention_depth": 2, "image_size": 32, "answers": ["yes", "no"]}
    config, ours, report = read_published(path, settings=settings)
    assert (config.vision_heads, config.text_heads, config.local_attention_depth, config.image_size) == (4, 2, 2, 32)
    assert report.assumed == {} and ours["vision.position_embedding"].shape == (17, WIDTH)
    XVLM().build(config).load_state_dict(ours, strict=True)
    for wrong, message in {
        "vision_width=8": "vision_width cannot be set",
        "vision_haeds=8": "did you mean vision_heads",
        "vision_heads=3": "shared evenly",
        "vision_heads=0": "greater than or equal to 1",
        "image_size=20": "no multiple of the patch size",
        "local_attention_depth=4": "3 vision layers",
        "kept=1": "unknown key",
    }.items():
        name, _, value = wrong.partition("=")
        with pytest.raises(BadInput, match=message):
            read_published(path, settings={name: int(value)})


def test_narrow_heads_must_be_told(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "WIDTH", 48)
    path = safe(tmp_path / "x.safetensors", published())
    with pytest.raises(BadInput, match="how many vision heads") as error:
        read_published(path)
    assert "settings.vision_heads" in error.value.fix
    assert read_published(path, settings={"vision_heads": 4, "text_heads": 4})[0].vision_width == 48


def drop(state, name):
    del state[name]


def change(state, name):
    state[name] = state[name] + 1


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.update({"text_encoder.bert.encoder.layer.0.adapter.weight": torch.ones(2)}), "unknown meaning.*adapter"),
        (lambda s: s.update({"extra_head.weight": torch.ones(2)}), "unknown meaning.*extra_head"),
        (lambda s: drop(s, "vision_encoder.encoder.layers.1.mlp.fc1.bias"), "lacks 1 tensor.*vision.layers.1.ffn.fc1.bias"),
        (lambda s: drop(s, "vision_encoder.patch_embed.weight"), "patch_embedding"),
        (lambda s: drop(s, "text_proj.bias"), "lacks 1 tensor.*text_proj.bias"),
        (lambda s: change(s, "text_encoder.cls.predictions.decoder.weight"), "differs from"),
        (lambda s: change(s, "text_encoder.cls.predictions.decoder.bias"), "differs from"),
        (lambda s: drop(s, "text_encoder.cls.predictions.bias"), "is there, but not"),
        (lambda s: s.update({"itm_head.0.weight": torch.full((2 * WIDTH, WIDTH), float("nan"))}), "damaged.*itm_head"),
        (lambda s: s.update({"itm_head.0.weight": torch.ones(3, WIDTH)}), "another shape.*itm_head.0.weight"),
        (lambda s: s.update({"vision_encoder.pos_embed.weight": torch.ones(6, WIDTH)}), "no square"),
        (lambda s: s.update({"text_encoder.embeddings.LayerNorm.bias": torch.ones(WIDTH)}), "with and without a prefix"),
        (lambda s: s.update({"vision_encoder.layers.0.blocks.0.attn.qkv.weight": torch.ones(2)}), "stages of"),
        (lambda s: s.update({"vision_encoder.patch_embed.proj.weight": torch.ones(2)}), "unknown meaning"),
        (lambda s: [drop(s, n) for n in list(s) if "crossattention" in n], "none of its text layers has cross-attention"),
        (lambda s: [drop(s, n) for n in list(s) if n.startswith("vision")], "no X-VLM file"),
        (lambda s: s.update({"vision_encoder.position_ids": torch.arange(5).flip(0)[None]}), "does not count from 0"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, spoil, message):
    state = published()
    spoil(state)
    with pytest.raises(BadInput, match=message) as error:
        read_published(safe(tmp_path / "x.safetensors", state))
    assert error.value.exit_code == 3


def test_other_layouts(tmp_path):
    names = [layout.name for layout in layouts.LAYOUTS]
    assert {"auto", *names} == set(get_args(ImportConfig.model_fields["layout"].annotation)) and set(names) == set(LAYOUTS)
    with pytest.raises(BadInput, match="its names are those of retrieval"):
        read_published(safe(tmp_path / "r.safetensors", published("retrieval")), "vqa")
    assert read_published(tmp_path / "r.safetensors", "retrieval")[2].layout == "retrieval"


@pytest.mark.parametrize(
    "content",
    [{}, [torch.ones(2)], {"model": {}}, {"model": "here"}, {"model": {"temp": 0.07}}, {"a": torch.ones(2)}, {1: torch.ones(2)}, 3],
)
def test_files_without_a_model(tmp_path, content):
    with pytest.raises(BadInput, match=r"holds no|no X-VLM file"):
        read_published(pickled(tmp_path / "x.pth", content))


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_pickle_is_run(tmp_path):
    sprung = tmp_path / "sprung"
    for content, name in (
        (Trap(sprung), "mkdir"),
        ({"model": {"temp": torch.tensor(1.0)}, "config": argparse.Namespace()}, "argparse.Namespace"),
    ):
        with pytest.raises(BadInput, match=f"more than tensors.*{name}") as error:
            read_published(pickled(tmp_path / "x.th", content))
        assert "safetensors" in error.value.fix
    assert not sprung.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_bad_input_and_never_a_traceback(tmp_path, kind):
    state = {"vision_encoder.class_embedding": torch.randn(8), "temp": torch.tensor(0.1)}
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.th")
    if kind == "safetensors":
        safe(path, state)
    else:
        pickled(path, {"model": state}, _use_new_zipfile_serialization=kind == "zip")
    good = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(150):
            data = bytearray(good[: draw.randrange(len(good))] if attempt % 3 == 0 else good)
            for _ in range(attempt % 4):
                if data:
                    data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data)
            try:
                read_file(path)
            except BadInput:
                refused += 1
    assert refused > 75
    path.write_bytes(b"")
    with pytest.raises(BadInput):
        read_file(path)
    with pytest.raises(BadInput, match="is not a file"):
        read_file(tmp_path)


def test_what_is_wrong_with_a_file_is_said_in_a_few_words(tmp_path):
    path = pickled(tmp_path / "x.th", {"temp": torch.full((400,), 1.5)})
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(BadInput, match=r"its end is missing: it has only 900 bytes"):
        read_file(path)
    path.write_bytes(b"\x00\x01\x02" * 1000)
    with pytest.raises(BadInput, match=r"its 3,000 bytes do not begin as those of torch.save do"):
        read_file(path)
    path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"its 0 bytes"):
        read_file(path)


def test_changed_weights_are_noticed(tmp_path):
    path = pickled(tmp_path / "x.th", {"temp": torch.full((400,), 1.5)})
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\xc0\x3f" * 4)] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="checksum"):
        read_file(path)


def test_positions_are_resized_bicubically_without_the_first_row():
    table = torch.randn(17, 2)
    assert torch.equal(resize_positions(table, 4), table)
    larger = resize_positions(table, 8)
    assert larger.shape == (65, 2) and torch.equal(larger[0], table[0])

    def cubic(x: float) -> float:
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)

    # point 3 of the finer grid lies at (3 + 0.5) / 2 - 0.5 = 1.25 of the coarser one, point 4 at 1.75
    row, column = (torch.tensor([cubic(at - i) for i in range(4)]) for at in (1.25, 1.75))
    expected = torch.einsum("i,j,ijw->w", row, column, table[1:].view(4, 4, 2))
    torch.testing.assert_close(larger[1:].view(8, 8, 2)[3, 4], expected)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece(["what colour is the circle", "is there a blue square", "two red triangles", "yes no"], VOCAB)


@pytest.fixture(scope="module")
def towers(tmp_path_factory, tokenizer) -> Path:
    """CLIP and BERT folders in the forms they come in; four layers each."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    eyes = CLIPVisionConfig(**size, image_size=32, patch_size=8, layer_norm_eps=1e-4)
    words = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, max_position_embeddings=20
    )
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    clip = CLIPModel(CLIPConfig(vision_config=eyes.to_dict(), text_config=words | ids)).eval()
    bert = BertForMaskedLM(BertConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=20, hidden_dropout_prob=0.2)).eval()
    with torch.no_grad():
        for parameter in (*clip.parameters(), *bert.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    clip.save_pretrained(root / "clip")
    bare = CLIPVisionModel(eyes)
    bare.load_state_dict({name.removeprefix("vision_model."): t for name, t in clip.vision_model.state_dict().items()})
    bare.save_pretrained(root / "clip_vision")
    bert.save_pretrained(root / "bert_mlm")
    bare_bert = BertModel(bert.config)
    bare_bert.load_state_dict(bert.bert.state_dict(), strict=False)
    bare_bert.save_pretrained(root / "bert")
    (root / "bert_old").mkdir()
    (root / "bert_old" / "config.json").write_bytes((root / "bert_mlm" / "config.json").read_bytes())
    old = load_file(root / "bert_mlm" / "model.safetensors")
    renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in old.items()}
    renamed |= {"bert.embeddings.position_ids": torch.arange(20)[None], "cls.seq_relationship.bias": torch.ones(2)}
    save_file(renamed, root / "bert_old" / "model.safetensors")
    for folder in ("bert", "bert_mlm", "bert_old"):
        save_tokenizer(tokenizer, root / folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    return root


def test_whole_towers_compute_what_they_did(towers, tokenizer):
    model, new = from_towers(towers / "clip", towers / "bert_mlm", len(tokenizer), {"text_layers": 4, "fusion_layers": 0, "heads": ["mlm"]})
    assert new == [] and model.config.dropout == 0.2 and model.config.vision_eps == 1e-4
    assert list(model.config.image_mean) == [0.5, 0.4, 0.3] and list(model.config.image_std) == [0.2, 0.2, 0.1]
    clip = CLIPModel.from_pretrained(towers / "clip").eval()
    bert = BertForMaskedLM.from_pretrained(towers / "bert_mlm").eval()
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(5, len(tokenizer), (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        seen = model.encode_image(pixels, keep=frozenset({"hidden"}))
        expected = clip.vision_model(pixels, output_hidden_states=True)
        torch.testing.assert_close(seen.hidden[-1], expected.last_hidden_state, **CLOSE)
        torch.testing.assert_close(seen.states[:, 0], expected.pooler_output, **CLOSE)
        read = model.encode_text(ids, mask).states
        logits = model.mlm_logits(read, torch.arange(4).expand(2, -1))
        expected = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        torch.testing.assert_close(read[mask.bool()], expected.hidden_states[-1][mask.bool()], **CLOSE)
        torch.testing.assert_close(logits, expected.logits[:, :4], **CLOSE)


def test_every_form_of_the_folders_gives_the_same(towers, tokenizer):
    def state(vision: str, text: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return from_towers(towers / vision, towers / text, len(tokenizer))[0].state_dict()

    reference = state("clip", "bert_mlm")
    for other in (state("clip_vision", "bert_mlm"), state("clip", "bert_old")):
        assert all(torch.equal(other[name], tensor) for name, tensor in reference.items())
    headless = state("clip", "bert")
    assert {n for n in reference if not torch.equal(headless[n], reference[n])} <= {n for n in reference if n.startswith("mlm_head.")}


def test_a_folder_in_shards_is_read_whole_or_refused(towers, tmp_path):
    whole = read_folder(towers / "bert")
    parts = {f"model-0000{number}-of-00003.safetensors": dict(list(whole.items())[number - 1 :: 3]) for number in (1, 2, 3)}
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name)
    index = {"weight_map": {tensor: name for name, tensors in parts.items() for tensor in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = read_folder(tmp_path)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    for name in list(parts)[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(BadInput, match=r"is not whole.*names 3 files, and model-00001-of-00003.safetensors is not there \(2 missing\)"):
        read_folder(tmp_path)


def test_layer_choice_and_fresh_tensors(towers, tokenizer):
    model, new = from_towers(towers / "clip", towers / "bert", len(tokenizer), {"vision_layers": 2, "text_layers": 1, "fusion_layers": 1})
    assert model.config.layers() == {"vision": 2, "text": 1, "fusion": 1, "decoder": 0}
    ours = model.state_dict()
    clip, bert = read_folder(towers / "clip"), read_folder(towers / "bert")
    for name, source in {"vision.layers.0": 1, "vision.layers.1": 3}.items():
        assert torch.equal(ours[f"{name}.attention.q.weight"], clip[f"vision_model.encoder.layers.{source}.self_attn.q_proj.weight"])
    for name, source in {"text.layers.0": 1, "fusion.layers.0": 3}.items():
        assert torch.equal(ours[f"{name}.attention.v.bias"], bert[f"encoder.layer.{source}.attention.self.value.bias"])
        assert torch.equal(ours[f"{name}.ffn.fc1.weight"], bert[f"encoder.layer.{source}.intermediate.dense.weight"])
    fresh = ("fusion.layers.0.cross_attention", "vision_proj.", "text_proj.", "temp", "itm_head.", "box_head.", "mlm_head.")
    assert new == sorted(name for name in ours if name.startswith(fresh))


def test_published_layer_choice_of_twelve():
    from efficientvlm.families.pretrained import chosen_layers

    assert list(chosen_layers(Path("clip"), 12, 6)) == [1, 3, 5, 7, 9, 11]
    assert list(chosen_layers(Path("clip"), 12, 12)) == list(range(12))


def test_another_image_size_resizes_positions(towers, tokenizer):
    model, _ = from_towers(towers / "clip", towers / "bert", len(tokenizer), {"image_size": 64})
    table = read_folder(towers / "clip")["vision_model.embeddings.position_embedding.weight"]
    assert torch.equal(model.vision.position_embedding, resize_positions(table, 8))


def test_towers_that_cannot_be_used(towers, tokenizer, tmp_path):
    clip, bert, size = towers / "clip", towers / "bert", len(tokenizer)
    for arguments, message in (
        ((bert, bert, size), "not a CLIP, CLIP vision, DINOv2 or ViT model"),
        ((clip, clip, size), "not a BERT"),
        ((tmp_path, bert, size), "no config.json"),
        ((clip, bert, size + 1), f"tokenizer has {size + 1} tokens"),
        ((clip, bert, size, {"vision_layers": 5}), "5 layers"),
        ((clip, bert, size, {"text_layers": 4}), "6 layers"),
        ((clip, bert, size, {"text_width": 4}), "follows from the towers"),
        ((clip, bert, size, {"image_size": 33}), "no multiple"),
    ):
        with pytest.raises(BadInput, match=message):
            from_towers(*arguments)
    for change, message in (
        ({"hidden_act": "relu"}, "activation"),
        ({"intermediate_size": 9}, "does not fit"),
        ({"num_hidden_layers": "x"}, "config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(json.loads((bert / "config.json").read_text()) | change))
        save_file(read_folder(bert), tmp_path / "model.safetensors")
        with pytest.raises(BadInput, match=message):
            from_towers(clip, tmp_path, size)
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    weights = read_folder(bert)
    for spoiled, message in (
        ({n: t for n, t in weights.items() if n != "encoder.layer.3.output.dense.bias"}, "lack 1 tensor"),
        (weights | {"encoder.layer.0.adapter.weight": torch.ones(1)}, "no place for.*adapter"),
        (weights | {"encoder.layer.3.output.dense.bias": torch.full((32,), float("inf"))}, "not all finite"),
    ):
        save_file(spoiled, tmp_path / "model.safetensors")
        with pytest.raises(BadInput, match=message):
            from_towers(clip, tmp_path, size)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights"):
        from_towers(clip, tmp_path, size)


def test_the_import_stage(tmp_path, tokenizer, capsys):
    save_tokenizer(tokenizer, tmp_path / "tokens")
    path = pickled(tmp_path / "x.th", {"model": published("vqa", vocab=len(tokenizer)), "epoch": 1})
    config = ImportConfig(out=str(tmp_path / "out"), model=str(path), tokenizer=str(tmp_path / "tokens"), settings={"text_heads": 4})
    manifest = import_.run(config, Control())
    said = capsys.readouterr().err
    assert "ignored epoch" in said and "position_ids" in said and "vision_heads=1" in said and "text_heads" not in said
    assert manifest.origin == "imported" and manifest.extra["layout"] == "vqa"
    assert manifest.extra["ignored"]["training state, not weights"] == ["epoch"]
    loaded = load(str(tmp_path / "out"))
    _, expected, _ = read_published(path, settings={"text_heads": 4})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert len(expected) == len(loaded.model.state_dict()) == manifest.extra["tensors"]
    import_.run(config, Control())
    assert "up to date" in capsys.readouterr().err


def test_a_foreign_tokenizer_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tokens")
    path = safe(tmp_path / "x.safetensors", published(vocab=len(tokenizer) + 1))
    with pytest.raises(BadInput, match="not of one vocabulary"):
        import_.run(ImportConfig(out=str(tmp_path / "out"), model=str(path), tokenizer=str(tmp_path / "tokens")), QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "layout, spoil, message",
    [
        ("nlvr2", lambda s: change(s, "text_encoder.encoder.layer.3.crossattention.self.key.weight"), "differs from .*layer.2.cross"),
        ("nlvr2", lambda s: drop(s, "text_encoder.encoder.layer.2.crossattention.self.value.bias"), "is there, but not its twin"),
        ("nlvr2", lambda s: drop(s, "text_encoder.encoder.layer.3.crossattention.self.query.bias"), "lacks 1 tensor"),
        ("nlvr2", lambda s: drop(s, "cls_head.3.bias"), "lacks 1 tensor.*compare_head.3.bias"),
        ("nlvr2", lambda s: s.update({"ta_head.weight": torch.ones(3, WIDTH)}), "has one head"),
        ("nlvr2", lambda s: [drop(s, n) for n in list(s) if ".layer.3." in n], "fusion_layers is 1"),
        ("text_assignment", lambda s: drop(s, "vision_proj.bias"), "lacks 1 tensor.*vision_proj.bias"),
        ("captioning", lambda s: drop(s, "text_decoder.cls.predictions.bias"), "is there, but not its twin"),
        ("captioning", lambda s: change(s, "text_decoder.cls.predictions.decoder.weight"), "differs from"),
        ("captioning", lambda s: s.update({"itm_head.0.weight": torch.ones(2 * WIDTH, WIDTH)}), "does nothing else"),
        ("grounding", lambda s: s.update({"bbox_head.3.weight": torch.ones(5, WIDTH)}), "another shape.*box_head.3.weight"),
        ("grounding", lambda s: s.update({"bbox_head.0.bias": torch.full((2 * WIDTH,), float("nan"))}), "damaged.*bbox_head.0.bias"),
        ("retrieval", lambda s: s.update({"temp": torch.tensor(float("inf"))}), "damaged.*temp"),
    ],
)
def test_a_file_that_will_not_do_leaves_nothing(tmp_path, tokenizer, layout, spoil, message):
    save_tokenizer(tokenizer, tmp_path / "tokens")
    state = published(layout, vocab=len(tokenizer))
    spoil(state)
    config = ImportConfig(out=str(tmp_path / "out"), model=str(pickled(tmp_path / "x.th", state)), tokenizer=str(tmp_path / "tokens"))
    with pytest.raises(BadInput, match=message) as error:
        import_.run(config, QUIET)
    assert error.value.exit_code == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["tokens", "x.th"]


def test_values_are_read_only_of_a_file_whose_names_and_shapes_will_do(tmp_path, tokenizer, monkeypatch):
    """A file of a gigabyte with another vocabulary is refused at once."""
    read: list[bool] = []

    def watched(path: Path, *, values: bool = True) -> Any:
        read.append(values)
        return read_file(path, values=values)

    monkeypatch.setattr("efficientvlm.families.published.read_file", watched)
    save_tokenizer(tokenizer, tmp_path / "tokens")
    whole = published(vocab=len(tokenizer))
    files = {
        "vocabulary": pickled(tmp_path / "v.th", published(vocab=len(tokenizer) + 1)),
        "lacks 1": pickled(tmp_path / "l.th", {name: tensor for name, tensor in whole.items() if name != "temp"}),
        "unknown meaning": pickled(tmp_path / "u.th", {**whole, "adapter.weight": torch.ones(2)}),
        "no X-VLM file": pickled(tmp_path / "n.th", {"weight": torch.ones(2)}),
        "not of the vqa layout": pickled(tmp_path / "w.th", whole),
    }
    for message, path in files.items():
        layout = "vqa" if "vqa" in message else "auto"
        config = ImportConfig(out=str(tmp_path / "out"), model=str(path), tokenizer=str(tmp_path / "tokens"), layout=layout)
        with pytest.raises(BadInput, match=message):
            import_.run(config, QUIET)
    assert not any(read) and not (tmp_path / "out").exists()
    import_.run(config.model_copy(update={"layout": "auto"}), QUIET)
    assert read[-1]


def test_a_file_with_a_swin_tower(tmp_path, tokenizer):
    """Heads, windows and image size follow from its shapes; another image size takes other windows."""
    save_tokenizer(tokenizer, tmp_path / "tokens")
    state = published(vocab=len(tokenizer), swin=True)
    path = safe(tmp_path / "x.safetensors", state)
    for size, window in ((None, 4), (64, 8)):
        settings = {"image_size": size} if size else {}
        config = ImportConfig(out=str(tmp_path / f"{window}"), model=str(path), tokenizer=str(tmp_path / "tokens"), settings=settings)
        manifest = import_.run(config, QUIET)
        made = load(str(tmp_path / f"{window}")).model
        assert (made.config.vision_depths, made.config.vision_window, made.config.image_size) == ([2, 2], window, size or 32)
        assert made.config.sizes().heads["vision"] == (1, 1, 2, 2) and made.config.sizes().widths["vision"] == (32, 32, 64, 64, 64)
        assert len(made.state_dict()) == manifest.extra["tensors"]
        made.run(made.example(2, 5))
    for name, shape, message in (
        ("layers.99999999.blocks.0.norm1.weight", (2,), "unknown meaning"),
        ("layers.0.blocks.99999999.norm1.weight", (2,), "unknown meaning"),
        ("layers.5.blocks.0.norm1.weight", (2,), "stages of"),
        ("layers.1.blocks.1.attn.relative_position_bias_table", (0, 2), "no square window"),
        ("layers.1.blocks.1.attn.relative_position_bias_table", (50, 2), "no square window"),
    ):
        spoilt = {**state, f"vision_encoder.{name}": torch.ones(shape)}
        with pytest.raises(BadInput, match=message):
            read_published(safe(tmp_path / "z.safetensors", spoilt))
    with pytest.raises(BadInput, match="2 tokens on a side"):
        read_published(path, settings={"image_size": 16})
    with pytest.raises(BadInput, match="vision_heads cannot be set"):
        read_published(path, settings={"vision_heads": 4})
    with pytest.raises(BadInput, match="image_size is 36"):
        read_published(path, settings={"image_size": 36})
    state["vision_encoder.layers.0.downsample.bias"] = torch.ones(2)
    with pytest.raises(BadInput, match="without a place"):
        read_published(safe(tmp_path / "y.safetensors", state))


def test_the_init_stage_from_towers(tmp_path, towers):
    config = InitConfig(
        out=str(tmp_path / "out"),
        vision_from=str(towers / "clip"),
        text_from=str(towers / "bert_mlm"),
        tokenizer=str(towers / "bert_mlm"),
        image_size=16,
        settings={"vision_layers": 2},
        seed=3,
    )
    manifest = init.run(config, QUIET)
    loaded = load(str(tmp_path / "out"))
    assert manifest.origin == "imported" and loaded.model.config.vision_layers == 2 and loaded.model.config.image_size == 16
    assert "vision_proj.weight" in manifest.extra["new"] and "mlm_head.bias" not in manifest.extra["new"]
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.4, 0.3]
    again = init.run(config.model_copy(update={"out": str(tmp_path / "again")}), QUIET)
    assert again.files["model.safetensors"] == manifest.files["model.safetensors"]
    with pytest.raises(BadInput, match="tokenizer trained on the data"):
        init.run(config.model_copy(update={"tokenizer": "train"}), QUIET)


def test_a_card_that_is_no_file_names_no_licence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == "mit"
