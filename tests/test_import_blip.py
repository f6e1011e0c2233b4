"""Published BLIP files: every entry accounted for, what is a copy found equal, every damage a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from efficientvlm.control import Control
from efficientvlm.data.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.published import read_published
from efficientvlm.loaded import load
from efficientvlm.settings.stages import ImportConfig
from efficientvlm.stages import import_

QUIET = Control(quiet=True)
LAYOUTS = {"pretrain": "pretrain", "captioning": "caption", "vqa": "answer", "retrieval": "match", "nlvr2": "compare"}
"""Layout → what the network in it is for."""
SIZES = {
    **{"image_size": 16, "patch_size": 8, "vision_width": 64, "vision_layers": 2, "vision_heads": 1, "vision_intermediate": 10},
    **{"text_width": 64, "text_layers": 3, "text_heads": 1, "text_intermediate": 12, "max_positions": 20, "embed_dim": 6},
}
VISION = {
    **{"vision_model.encoder.layers": "visual_encoder.blocks", "self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj"},
    **{"layer_norm": "norm", "vision_model.post_layernorm": "visual_encoder.norm"},
    **{"vision_model.embeddings.class_embedding": "visual_encoder.cls_token"},
    **{"vision_model.embeddings.position_embedding": "visual_encoder.pos_embed"},
    **{"vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj"},
}
TWO = {
    **{"crossattention.first.self": "crossattention.self0", "crossattention.first.output.dense": "crossattention.output.dense0"},
    **{"crossattention.second.self": "crossattention.self1", "crossattention.second.output.dense": "crossattention.output.dense1"},
    **{"crossattention.merge": "crossattention.output.merge_layer"},
}
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
SAYS = "text_decoder.cls.predictions"
POSITIONS = "text_decoder.bert.embeddings.position_ids"


def theirs(name: str) -> str:
    """The published name of one of our tensors."""
    for ours, published in VISION.items():
        name = name.replace(ours, published) if name.startswith("vision_model") or "blocks" in name else name
    for ours, published in TWO.items():
        name = name.replace(ours, published)
    return name


def network(layout: str, vocab: int = 70, **changes: Any) -> Any:
    torch.manual_seed(3)
    return BLIP().build(BLIP().fresh_config("base", {**SIZES, "network": LAYOUTS[layout], **changes}, vocab)).eval()


def published(layout: str, vocab: int = 70, **changes: Any) -> dict[str, Tensor]:
    """A file of the published code: its own names, copies of what is tied, and what only training needs."""
    state = {theirs(name): value.clone() for name, value in network(layout, vocab, **changes).state_dict().items()}
    if layout == "pretrain":
        shared = {name: value for name, value in state.items() if name.startswith("text_encoder.") and ".attention." not in name}
        state |= {name.replace("text_encoder.", "text_decoder.bert."): value.clone() for name, value in shared.items()}
        state |= {f"{SAYS}.decoder.weight": state[WORDS].clone(), f"{SAYS}.decoder.bias": state[f"{SAYS}.bias"].clone()}
    if layout == "retrieval":
        state |= {"temp": torch.tensor(0.04), "idx_queue": torch.full((1, 4), -100), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    if layout in ("pretrain", "retrieval"):
        averaged = [name for name in state if name.startswith(("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj."))]
        state |= {name.replace(".", "_m.", 1): state[name] + 1 for name in averaged}
        state |= {"image_queue": torch.ones(6, 4), "text_queue": torch.ones(6, 4)}
    if layout == "pretrain":
        state["queue_ptr"] = torch.zeros(1, dtype=torch.long)
    for tower in ("text_encoder.", "text_decoder.bert."):
        if any(name.startswith(tower) for name in state):
            state[f"{tower}embeddings.position_ids"] = torch.arange(20)[None]
    return state


def safe(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_entry_is_mapped_or_ignored_for_a_reason(tmp_path, layout):
    state = published(layout)
    config, ours, report = read_published(safe(tmp_path / "x.safetensors", state))
    wanted = network(layout)
    assert (report.layout, report.family) == (layout, "blip") and type(config) is type(wanted.config)
    assert ours.keys() == wanted.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in wanted.state_dict().items())
    ignored = {name for names in report.ignored.values() for name in names}
    named = {theirs(name) for name in ours} - {f"{SAYS}.decoder.weight", f"{SAYS}.decoder.bias"}
    assert ignored | named == set(state) and not ignored & named
    assert report.assumed == {"vision_heads": 1, "text_heads": 1}
    assert config.sizes() == wanted.config.sizes() and config.cross_layers is None
    assert getattr(config, "merging", None) == getattr(wanted.config, "merging", None)
    assert config.contrast_temperature == (0.04 if layout == "retrieval" else None)


def test_what_two_towers_share_may_lie_in_one_of_them(tmp_path):
    """Writers of safetensors keep one copy of tensors that are one."""
    state, wanted = published("pretrain"), network("pretrain").state_dict()
    of_encoder = {n for n in state if n.startswith("text_encoder.") and ".attention." not in n and "position_ids" not in n}
    of_decoder = {name.replace("text_encoder.", "text_decoder.bert.") for name in of_encoder}
    for absent in (of_encoder, of_decoder, {f"{SAYS}.decoder.weight", f"{SAYS}.decoder.bias"}):
        few = {name: value for name, value in state.items() if name not in absent}
        _, ours, _ = read_published(safe(tmp_path / "x.safetensors", few))
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_sizes_that_differ_by_tower(tmp_path):
    """A decoder of another depth, images of another width, cross-attention in some layers."""
    state = published("vqa", decoder_layers=2, vision_width=128, fusion_layers=1)
    config, ours, _ = read_published(safe(tmp_path / "x.safetensors", state))
    assert (config.layers(), config.cross_layers) == ({"vision": 2, "text": 3, "decoder": 2}, {"text": [2], "decoder": [1]})
    assert config.sizes().heads["vision"] == (2, 2)
    BLIP().build(config).load_state_dict(ours, strict=True)


def test_settings_say_what_shapes_do_not(tmp_path):
    path = safe(tmp_path / "x.safetensors", published("vqa"))
    settings = {"vision_heads": 4, "text_heads": 2, "image_size": 32, "answers": ["yes", "no"], "dropout": 0.0}
    config, ours, report = read_published(path, settings=settings)
    assert (config.sizes().heads["vision"], config.sizes().heads["text"], config.answers) == ((4, 4), (2, 2, 2), ["yes", "no"])
    assert report.assumed == {} and ours["vision_model.embeddings.position_embedding"].shape == (1, 17, 64)
    model = BLIP().build(config)
    model.load_state_dict(ours, strict=True)
    wanted = network("vqa").resized(32)
    assert torch.equal(model.vision_model.position_embedding, wanted.vision_model.position_embedding)
    for wrong, message in {
        "vision_width=8": "vision_width cannot be set",
        "vision_haeds=8": "did you mean vision_heads",
        "vision_heads=3": "shared evenly",
        "image_size=20": "no multiple of the patch size",
    }.items():
        name, _, value = wrong.partition("=")
        with pytest.raises(BadInput, match=message):
            read_published(path, settings={name: int(value)})


def change(state: dict[str, Tensor], name: str) -> None:
    state[name] = state[name] + 1


@pytest.mark.parametrize(
    "layout, spoil, message",
    [
        ("captioning", lambda s: s.update({"adapter.weight": torch.ones(2)}), "unknown meaning.*adapter"),
        ("captioning", lambda s: s.update({"visual_encoder.blocks.0.attn.rope": torch.ones(2)}), "unknown meaning.*rope"),
        ("captioning", lambda s: s.update({"text_decoder.bert.pooler.dense.bias": torch.ones(2)}), "without a place.*pooler"),
        ("captioning", lambda s: change(s, f"{SAYS}.decoder.weight"), "differs from"),
        ("captioning", lambda s: s.pop("visual_encoder.blocks.1.mlp.fc1.bias"), "lacks 1 tensor.*vision_model.*fc1.bias"),
        ("captioning", lambda s: s.update({"visual_encoder.pos_embed": torch.ones(1, 6, 64)}), "no square"),
        ("captioning", lambda s: s.update({"visual_encoder.pos_embed": torch.ones(6)}), "incomplete"),
        ("captioning", lambda s: [s.pop(name) for name in [*s] if "crossattention" in name], "none of its text layers"),
        ("captioning", lambda s: [s.pop(name) for name in [*s] if "visual_encoder.blocks" in name], "no layer of its tower of images"),
        ("captioning", lambda s: s.update({f"{SAYS}.bias": torch.full((70,), float("nan"))}), "damaged|differs"),
        ("pretrain", lambda s: change(s, WORDS), "differs from"),
        ("pretrain", lambda s: change(s, "text_decoder.bert.encoder.layer.1.output.dense.weight"), "differs from text_encoder"),
        ("pretrain", lambda s: s.pop("text_decoder.bert.encoder.layer.1.attention.self.key.bias"), "lacks 1 tensor"),
        ("pretrain", lambda s: s.pop("temp"), "lacks 1 tensor.*temp"),
        ("captioning", lambda s: s.update({POSITIONS: torch.arange(20).roll(1)[None]}), "does not count from 0"),
        ("retrieval", lambda s: s.update({"temp": torch.tensor(-1.0)}), "temperature is above 0"),
        ("retrieval", lambda s: s.update({"itm_head.weight": torch.ones(3, 64)}), "another shape.*itm_head"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, layout, spoil, message):
    state = published(layout)
    spoil(state)
    with pytest.raises(BadInput, match=message) as error:
        read_published(safe(tmp_path / "x.safetensors", state))
    assert error.value.exit_code == 3


def test_the_stage(tmp_path, capsys):
    """The tokens that BLIP has beside BERT's are added; a tied matrix stays one; what is ignored is said and noted."""
    tokenizer = train_wordpiece(["a red square is above a blue circle", "what is it?"], 60)
    save_tokenizer(tokenizer, tmp_path / "tokens")
    number = len(tokenizer) + 2
    file = tmp_path / "x.pth"
    torch.save({"model": published("captioning", number), "optimizer": {}, "epoch": 3}, file)  # noqa: TID251  what the published code does
    config = ImportConfig(out=str(tmp_path / "out"), model=str(file), tokenizer=str(tmp_path / "tokens"))
    manifest = import_.run(config, Control())
    said = capsys.readouterr().err
    assert "added to the tokenizer, as published: [DEC], [ENC]" in said and "training state" in said
    made = load(str(tmp_path / "out"))
    ids = load_tokenizer(tmp_path / "out").get_vocab()
    text = made.model.config.text_config
    assert (made.model.config.decoder_start, text.sep_token_id, text.pad_token_id) == (ids["[DEC]"], ids["[SEP]"], ids["[PAD]"])
    assert made.abilities == {"caption"} and manifest.extra["added_tokens"] == ["[DEC]", "[ENC]"]
    head = made.model.text_decoder.cls.predictions
    assert head.output_weight is made.model.text_decoder.bert.embeddings.word.weight
    assert all(torch.equal(value, made.model.state_dict()[name]) for name, value in network("captioning", number).state_dict().items())
    for vocab in (number + 1, number - 2):
        torch.save(published("captioning", vocab), file)  # noqa: TID251  what the published code does
        with pytest.raises(BadInput, match=r"the tokenizer has \d+ tokens|the tokenizer has no \[DEC\]"):
            import_.run(config.model_copy(update={"out": str(tmp_path / f"{vocab}")}), QUIET)
        assert not (tmp_path / f"{vocab}").exists()


WRONG = {
    "float64 beyond float32": (torch.full((64,), 1e300, dtype=torch.float64), "not all finite floats"),
    "integers": (torch.ones(64, dtype=torch.int8), "not all finite floats"),
    "complex": (torch.ones(64, dtype=torch.complex64), "not all finite floats"),
    "float8, not a number": (torch.full((64,), float("nan")).to(torch.float8_e5m2), "not all finite floats"),
    "sparse": (torch.ones(64).to_sparse(), "sparse"),
    "without values": (torch.ones(64, device="meta"), "no values"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("layout", ["captioning", "pretrain"])
def test_tensors_that_are_no_weights(tmp_path, kind, layout):
    tensor, why = WRONG[kind]
    with_tensor = {"model": published(layout) | {"visual_encoder.norm.weight": tensor}}
    torch.save(with_tensor, tmp_path / "x.pth")  # noqa: TID251  what the published code does
    with pytest.raises(BadInput) as refused:
        read_published(tmp_path / "x.pth")
    assert why in refused.value.why


@pytest.mark.parametrize("layout", ["pretrain", "retrieval"])
@pytest.mark.parametrize("temperature", [-0.1, float("inf"), 1j])
def test_a_temperature_is_one_in_every_layout(tmp_path, layout, temperature):
    with_it = {"model": published(layout) | {"temp": torch.tensor(temperature)}}
    torch.save(with_it, tmp_path / "x.pth")  # noqa: TID251  what the published code does
    with pytest.raises(BadInput, match="damaged"):
        read_published(tmp_path / "x.pth")


def test_layers_that_do_not_look_at_images_are_told(tmp_path):
    state = {name: value for name, value in published("captioning").items() if "layer.1.crossattention" not in name}
    _, _, report = read_published(safe(tmp_path / "x.safetensors", state))
    assert report.remarks == ["only 2 of 3 layers of decoder attend to images"]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html>\n<p>No such file</p>" + "." * 90, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"]
)
def test_a_text_in_place_of_weights_is_quoted(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput) as refused:
        read_published(tmp_path / name)
    assert text.splitlines()[0] in refused.value.why
