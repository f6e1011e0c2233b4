"""open_clip's folders: names and shapes of its CLIP, features computed from the files alone, and what does not fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_folder import byte_pairs, write_clip
from compression_cases import build
from conftest import QUIET, run_stage
from safetensors.torch import load_file, save_file

from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.export import open_clip

LAYER = {
    **{f"{norm}.{kind}": (16,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")},
    **{"attn.in_proj_weight": (48, 16), "attn.in_proj_bias": (48,), "attn.out_proj.weight": (16, 16), "attn.out_proj.bias": (16,)},
    **{"mlp.c_fc.weight": (6, 16), "mlp.c_fc.bias": (6,), "mlp.c_proj.weight": (16, 6), "mlp.c_proj.bias": (16,)},
}
"""What open_clip 3.3 calls the tensors of a layer of 16 columns and 6 neurons."""
IMAGES = {
    "visual.class_embedding": (16,),
    "visual.positional_embedding": (5, 16),
    "visual.conv1.weight": (16, 3, 8, 8),
    "visual.proj": (16, 8),
    **{f"visual.{norm}.{kind}": (16,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
}
TEXTS = ("logit_scale", "token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection")


def written(folder: Path) -> Any:
    model, _ = build("clip")
    folder.mkdir(exist_ok=True)
    open_clip.write(model, Preprocessing(16, 16, True), folder, "the test")
    return model


def test_names_and_shapes_are_open_clips(tmp_path: Path) -> None:
    written(tmp_path)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / open_clip.WEIGHTS).items()}
    images = {f"visual.transformer.resblocks.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()}
    texts = {f"transformer.resblocks.{layer}.{name}" for layer in range(2) for name in LAYER}
    assert {name: shape for name, shape in found.items() if name.startswith("visual.")} == IMAGES | images
    assert {name for name in found if not name.startswith("visual.")} == {*TEXTS} | texts
    values = json.loads((tmp_path / open_clip.CONFIG).read_text())
    vision, text = (values["model_cfg"][f"{tower}_cfg"] for tower in ("vision", "text"))
    assert values["model_cfg"]["embed_dim"] == 8 and values["model_cfg"]["quick_gelu"] is True
    assert (vision["head_width"], int(vision["width"] * vision["mlp_ratio"]), text["heads"], text["eos_id"]) == (4, 6, 3, 1)
    assert values["preprocess_cfg"]["resize_mode"] == "shortest"


def test_features_follow_from_the_files(tmp_path: Path) -> None:
    model = written(tmp_path)
    assert open_clip.difference(model, tmp_path) < 1e-5
    weights = load_file(tmp_path / open_clip.WEIGHTS)
    for name in ("visual.proj", "transformer.resblocks.1.attn.in_proj_weight"):
        save_file({**weights, name: weights[name].flip(0).contiguous()}, tmp_path / open_clip.WEIGHTS)
        assert open_clip.difference(model, tmp_path) > 1e-3, name


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
def test_open_clip_opens_it(tmp_path: Path) -> None:
    import open_clip as theirs

    model = written(tmp_path)
    byte_pairs().save_pretrained(tmp_path)
    opened = theirs.create_model_and_transforms(f"local-dir:{tmp_path}")[0].eval()
    pixels, ids = torch.randn(2, 3, 16, 16), torch.tensor([[5, 7, 1, 0], [9, 4, 6, 1]])
    ids = torch.nn.functional.pad(ids, (0, 8))
    with torch.no_grad():
        record = model.run({"pixels": pixels, "text_ids": ids, "text_mask": torch.ones_like(ids)})
        torch.testing.assert_close(opened.encode_image(pixels, normalize=True), record["image_features"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(opened.encode_text(ids, normalize=True), record["text_features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "dual-vit", "xvlm"])
def test_other_networks_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="through another package"):
        open_clip.check(build(name)[0].config, Preprocessing(16, 16, True), "this")


@pytest.mark.parametrize("how", [Preprocessing(16, None), Preprocessing(16, 20, True), Preprocessing(16, 16, True, resample=0)])
def test_pictures_that_open_clip_would_read_otherwise_are_refused(how: Preprocessing) -> None:
    with pytest.raises(BadInput, match="reads pictures as open_clip does not"):
        open_clip.check(build("clip")[0].config, how, "this")


def test_the_command_writes_a_narrower_student_and_refuses_a_pruned_one(tmp_path: Path, evlm: Any) -> None:
    write_clip(tmp_path / "clip", byte_pairs())
    settings = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"shortest_edge": 16}}))
    run_stage("import", QUIET, model=str(tmp_path / "clip"), out=str(tmp_path / "teacher"))
    run_stage("shrink", QUIET, model=str(tmp_path / "teacher"), width={"vision": 8}, out=str(tmp_path / "student"))
    code, _, err = evlm("export", "--model", tmp_path / "student", "--format", "open_clip", "--out", tmp_path / "out")
    assert code == 0 and "open_clip's CLIP, computed from what was written, differs by" in err, err
    assert {open_clip.WEIGHTS, open_clip.CONFIG, "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert evlm("verify", tmp_path / "out")[0] == 0
    cut = dict(task="none", method="magnitude", sparsity=0.4)
    run_stage("prune", QUIET, model=str(tmp_path / "student"), out=str(tmp_path / "cut"), **cut)
    code, _, err = evlm("export", "--model", tmp_path / "cut", "--format", "open_clip", "--out", tmp_path / "none")
    assert code == 3 and "does not fit open_clip" in err and "their width is fixed" in err and not (tmp_path / "none").exists()
