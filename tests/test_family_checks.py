"""Configurations that no network can have are refused by every family, as are those that a user asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compression_cases import FAMILIES, build
from spoiling import edit

from efficientvlm import families
from efficientvlm.errors import BadInput
from efficientvlm.families.blip import BLIP
from efficientvlm.families.xvlm import XVLM
from efficientvlm.stages.image_settings import fitted

NAMES = ("xvlm", "clip", "siglip", "blip-qa", "blip-caption", "blip-retrieval")
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
    family, model, _ = build(name)
    capfd.readouterr()
    family.save(model, tmp_path)
    family.load(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_stored_sizes_and_statistics(tmp_path: Path, name: str) -> None:
    FAMILIES[name][0].save(build(name)[1], tmp_path)
    before = (tmp_path / "config.json").read_text()
    family = families.of_folder(tmp_path)
    family.read_config(tmp_path)
    for field, value in WRONG:
        part, entry = (None, field) if name == "xvlm" else TRANSFORMERS.get(field, (None, field))
        edit(tmp_path, part, **{entry: value})
        with pytest.raises(BadInput, match=r"config\.json|local_attention_depth|text_heads|image_size"):
            family.read_config(tmp_path)
        (tmp_path / "config.json").write_text(before)


@pytest.mark.parametrize("family", [XVLM(), BLIP()])
def test_settings_of_a_new_network(family: Any) -> None:
    with pytest.raises(BadInput, match="settings: image_std"):
        family.fresh_config("tiny", {"image_std": [0, 1, 1]}, 50)


@pytest.mark.parametrize("size", [[16, 16], [32, 32], {"shortest_edge": [16]}, None, {}])
def test_image_sizes_of_any_form_are_made_to_fit(size: Any) -> None:
    family, config = FAMILIES["clip"]
    settings = {"size": size, "image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    new = fitted(settings, family.sizes(config))["size"]
    assert new == size if size == [16, 16] else set(new.values()) == {16}
