"""A network for images of another size: as a published file is read at that size, from stage to stage, planned as it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_cases import CONFIGS, network
from conftest import SHAPES, TRAIN, run_stage
from test_import import published, safe

from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.image_settings import default_settings
from efficientvlm.families.published import read_published
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.loaded import load, resized
from efficientvlm.planning.chain import Planned
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings


@pytest.mark.parametrize("swin, size", [(False, 32), (True, 64)])
def test_a_network_is_resized_as_a_file_is_read_at_that_size(tmp_path: Path, swin: bool, size: int) -> None:
    path = safe(tmp_path / "x.safetensors", published(swin=swin))
    config, state, _ = read_published(path)
    wanted_config, wanted, _ = read_published(path, settings={"image_size": size})
    model = XVLMModel(config)
    model.load_state_dict(state)
    found = model.resized(size)
    assert found.config.to_dict() == wanted_config.to_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.state_dict().items())
    assert model.resized(config.image_size) is model
    with torch.device("meta"):
        described = XVLMModel(config).resized(size)
    assert {name: tensor.shape for name, tensor in described.state_dict().items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }


def test_a_pruned_swin_is_resized() -> None:
    """A head that is gone has no column in the table that is resized."""
    config = CONFIGS["xvlm-swin"]
    config = config.with_kept({"vision.0.head": [0], "vision.3.head": []}).copy(vision_window=4)
    model = XVLMModel(config).eval()
    found = model.resized(2 * config.image_size)
    assert found.config.kept == config.kept and found.config.vision_window == 2 * config.image_size // config.stride
    with torch.no_grad():
        found.run(found.example(1, 5))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("blip")])
def test_a_blip_is_resized_with_what_is_left_of_it(name: str) -> None:
    config = CONFIGS[name].with_kept({"vision.0.head": [0], "vision.1.head": []})
    model = network(config).eval()
    side = config.vision_config.image_size
    assert model.resized(side) is model
    found = model.resized(2 * side)
    assert found.config.kept == config.kept and found.config.sizes().image_size == 2 * side and config.sizes().image_size == side
    table = "vision_model.embeddings.position_embedding"
    ours, theirs = found.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours if key != table)
    assert torch.equal(ours[table][:, 0], theirs[table][:, 0]) and ours[table].shape[1] == 4 * theirs[table].shape[1] - 3
    with torch.no_grad():
        found.run(found.example(1, 5))
    with torch.device("meta"):
        assert network(config).resized(2 * side).state_dict()[table].shape == ours[table].shape


SIDE = 64


def test_a_stage_trains_on_larger_images_and_writes_what_reads_them(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(str(chain / "init"), weights=False).sizes.image_size == SIDE
    settings = {"model": str(chain / "init"), "data": SHAPES, "image_size": SIDE + 16, "out": "larger", **TRAIN}
    later = {"model": "larger", "data": SHAPES, "out": "after", "sparsity": 0.3, **TRAIN}
    steps = [Step(name, name, stage_settings(name, given)) for name, given in (("finetune", settings), ("prune", later))]
    made = plan(steps, Control(quiet=True))
    assert not made.problems.found, made.problems.found
    manifest = run_stage("finetune", **settings)
    tuned = load("larger")
    assert tuned.sizes.image_size == SIDE + 16 and tuned.preprocessing.side == SIDE + 16
    assert json.loads(Path("larger/preprocessor_config.json").read_text("utf-8"))["size"] == {"height": SIDE + 16, "width": SIDE + 16}
    planned: dict[str, Any] = made.stages[0].after or {}
    assert planned["parameters"] == manifest.accounting["parameters"] and planned["macs"] == manifest.accounting["macs"]
    run_stage("prune", **later)
    assert load("after", weights=False).sizes.image_size == SIDE + 16


@pytest.mark.parametrize("size, message", [(50, "no multiple of the patch size"), (8, "no multiple")])
def test_sizes_that_patches_do_not_fill(chain: Path, tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run_stage("finetune", model=str(chain / "init"), data=SHAPES, image_size=size, out=str(tmp_path / "out"), **TRAIN)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_resized(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="patch"):
        network(CONFIGS["clip"]).resized(4097)
    with pytest.raises(BadInput, match="no multiple of the patch size"):
        network(CONFIGS["blip-qa"]).resized(4097)
    settings: dict[str, Any] = {"model": str(chain / "distilled"), "teacher": str(chain / "teacher"), "data": SHAPES, **TRAIN}
    with pytest.raises(BadInput, match="image"):
        run_stage("prune", image_size=2 * SIDE, out=str(tmp_path / "out"), **settings)
    known = load(str(chain / "init"), weights=False)
    cropped = {**default_settings(known.sizes), "size": {"shortest_edge": SIDE}, "do_center_crop": True}
    with pytest.raises(BadInput, match="in a way of its own"):
        resized(Planned(known.path, known.family, known.model, known.tokenizer, known.manifest, cropped), 2 * SIDE)
