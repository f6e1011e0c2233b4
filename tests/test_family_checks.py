"""Configurations that no network can have are refused by every family, as are those that a user asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compression_cases import build, family
from spoiling import edit

from efficientvlm.errors import BadInput
from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.checks import check_config
from efficientvlm.families.loading import image_processor
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.family import XVLM

NAMES = ("xvlm", "clip", "siglip", "blip-qa", "blip-caption", "blip-retrieval", "blip-pretraining")
TRANSFORMERS = {  # its name of what X-VLM calls otherwise, and the part of the configuration it is in
    "image_size": ("vision_config", "image_size"),
    "patch_size": ("vision_config", "patch_size"),
    "vision_layers": ("vision_config", "num_hidden_layers"),
    "text_layers": ("text_config", "num_hidden_layers"),
    "vision_intermediate": ("vision_config", "intermediate_size"),
    "text_heads": ("text_config", "num_attention_heads"),
    "vocab_size": ("text_config", "vocab_size"),
    "max_positions": ("text_config", "max_position_embeddings"),
}
WRONG: list[tuple[str, Any]] = [
    ("image_size", 0),
    ("image_size", -16),
    ("patch_size", 0),
    ("patch_size", 32),
    ("patch_size", [8, 8]),
    ("vision_layers", -1),
    ("text_layers", 10**12),
    ("vision_intermediate", 0),
    ("text_heads", 0),
    ("text_heads", 5),
    ("vocab_size", 0),
    ("max_positions", 0),
    ("rank_top", 0),
    ("image_mean", 0.5),
    ("image_mean", [1.0]),
    ("image_mean", [0.5, 0.5, "x"]),
    ("image_std", [0, 0, 0]),
    ("image_std", [0.5, 0.5, -0.5]),
    ("image_std", [0.5, 0.5, 10**400]),
]


@pytest.mark.parametrize("name", NAMES)
def test_models_are_saved_and_opened_in_silence(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers would draw a bar for each."""
    model, _ = build(name)
    capfd.readouterr()
    family(name).save(model, tmp_path)
    family(name).load(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_stored_sizes_and_statistics(tmp_path: Path, name: str) -> None:
    family(name).save(build(name)[0], tmp_path)
    before = (tmp_path / "config.json").read_text()
    family(name).read_config(tmp_path)
    for field, value in WRONG:
        part, entry = (None, field) if name == "xvlm" else TRANSFORMERS.get(field, (None, field))
        edit(tmp_path, part, **{entry: value})
        with pytest.raises(BadInput, match=r"config\.json|local_attention_depth|text_heads|image_size"):
            family(name).read_config(tmp_path)
        (tmp_path / "config.json").write_text(before)


@pytest.mark.parametrize("family", [XVLM(), BLIP()])
def test_settings_of_a_new_network(family: Any) -> None:
    with pytest.raises(BadInput, match="settings: image_std"):
        family.fresh_config("tiny", {"image_std": [0, 1, 1]}, 50)


HUGE = ("image_size", "vision_layers", "text_layers", "vision_intermediate", "vocab_size", "max_positions")


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_compared_with_the_header_of_the_weights_before_anything_is_read(tmp_path: Path, name: str) -> None:
    """No network is built, so that a stored size takes no memory whatever it is."""
    model, _ = build(name)
    family(name).save(model, tmp_path)
    stored = (tmp_path / "config.json").read_bytes()
    wrong = [(size, value) for size in HUGE for value in (3, 900, 3 * 10**8)]
    refused = 0
    for size, value in wrong:
        (tmp_path / "config.json").write_bytes(stored)
        part, entry = (None, size) if name == "xvlm" else TRANSFORMERS[size]
        edit(tmp_path, part, **{entry: value})
        try:
            config = family(name).read_config(tmp_path)
        except BadInput as error:
            refused += 1
            assert len(str(error)) < 700
        else:
            assert config.sizes() == model.config.sizes() or size in ("vision_layers", "text_layers", "image_size")
    assert refused > len(wrong) - 6  # those that are as they were, or have fewer layers than there are weights for


@pytest.mark.parametrize("name", NAMES)
def test_labels_quantisation_and_text_that_is_none_are_refused(tmp_path: Path, name: str) -> None:
    model, _ = build(name)
    family(name).save(model, tmp_path)
    stored = (tmp_path / "config.json").read_bytes()
    for key, value, reason in (
        ("num_labels", 300_000_000, "num_labels"),
        ("num_labels", -1, "num_labels"),
        ("num_labels", "many", "num_labels"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quantised"),
        ("quantization_config", [1], "quantised"),
        ("answers", ["\ud800"], "UTF-8"),
        ("answers", "red", "answers"),
        ("answers", [1, 2], "answers"),
        ("anything", 10**400, "of that size"),
    ):
        (tmp_path / "config.json").write_bytes(stored)
        edit(tmp_path, **{key: value})
        with pytest.raises(BadInput, match=reason):
            family(name).read_config(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_pointers_to_code_are_said_and_not_carried_on(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = build(name)
    family(name).save(model, tmp_path / "a")
    edit(tmp_path / "a", auto_map={"AutoModel": "attacker/repo--evil.Model"})
    edit(tmp_path / "a", nested={"deep": [{"auto_map": {"AutoConfig": "evil.Config"}, "trust_remote_code": True}]})
    (tmp_path / "a" / "preprocessor_config.json").write_text(
        '{"auto_map": {"AutoImageProcessor": "evil.P"}, "image_mean": [0.5, 0.5, 0.5]}'
    )
    again = family(name).load(tmp_path / "a")
    assert "auto_map" not in str(image_processor(tmp_path / "a"))
    family(name).save(again, tmp_path / "b")
    text = (tmp_path / "b" / "config.json").read_text()
    assert "auto_map" not in text and "evil" not in text and "trust_remote_code" not in text
    assert "points to code (auto_map, trust_remote_code)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, of",
    [
        ({"vision": 5}, {"vision": 6}),
        ({}, {"vision": 4}),
        ({"vision": [9]}, {"vision": 4}),
        ({"vision": [1, 0]}, {"vision": 4}),
        ([1], None),
        (None, 3),
    ],
)
def test_layers_that_a_network_cannot_come_from(source: object, of: object) -> None:
    with pytest.raises(BadInput, match="layer_source"):
        check_config(XVLMConfig(layer_source=source, layer_source_of=of), "config.json")
