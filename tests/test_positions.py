"""Where a patch lies, at the start of a new tower of images."""

import math

import pytest
import torch
from conftest import QUIET, run_stage

from efficientvlm import load
from efficientvlm.errors import BadInput
from efficientvlm.families.towers.vit import Vit, waves

NEW = {"size": "tiny", "data": "shapes:size=20", "vocab_size": 200}


def test_waves_are_sines_and_cosines_of_column_and_row():
    table = waves(3, 8).reshape(3, 3, 2, 2, 2)  # row, column, (column, row), (sine, cosine), rate
    for row in range(3):
        for column in range(3):
            for which, place in enumerate((column, row)):
                for number, rate in enumerate((1.0, 0.01)):
                    found = table[row, column, which, :, number].tolist()
                    assert found == pytest.approx([math.sin(place * rate), math.cos(place * rate)], abs=1e-6)


@pytest.mark.parametrize("family", ["xvlm", "clip", "blip"])
def test_positions_are_as_strong_as_patches_and_tell_places(tmp_path, family):
    run_stage("init", QUIET, out=str(tmp_path / "new"), family=family, positions="sincos", **NEW)
    (tower,) = [module for module in load(tmp_path / "new").modules() if isinstance(module, Vit)]
    found = tower.position_embedding.detach().flatten(0, -2)
    assert not found[0].any() and tower.class_token
    shown = torch.nn.functional.conv2d(torch.randn(512, 3, *tower.patch_embedding.kernel_size), tower.patch_embedding.weight)
    assert found[1:].std().item() == pytest.approx(shown.std().item(), rel=0.1)
    side = math.isqrt(len(found) - 1)
    assert torch.allclose(found[1:] / found[1:].std(), waves(side, found.shape[1]) / waves(side, found.shape[1]).std(), atol=1e-5)


def test_positions_follow_from_no_seed(tmp_path):
    found = []
    for seed in (0, 1):
        run_stage("init", QUIET, out=str(tmp_path / str(seed)), seed=seed, positions="sincos", **NEW)
        table = load(tmp_path / str(seed)).vision.position_embedding.detach()
        found.append(table / table.std())
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"vision_width": 126, "vision_heads": 2}}, "width 126"),
        ({"settings": {"vision_depths": [2, 2], "vision_layers": 4, "vision_window": 4}}, "relative to others"),
        ({"size": None, "vision_from": "a", "text_from": "b", "tokenizer": "b"}, "has learnt its own"),
    ],
)
def test_what_has_no_such_start_is_refused(tmp_path, changed, message):
    with pytest.raises(BadInput, match=message):
        run_stage("init", QUIET, out=str(tmp_path / "new"), positions="sincos", **NEW | changed)
    assert not (tmp_path / "new").exists()
