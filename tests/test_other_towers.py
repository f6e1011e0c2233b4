"""A teacher with another kind of vision tower: a Swin teaches a ViT, and a ViT a Swin, in every task that compares no vision layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, SIZES, TRAIN, run_stage

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.kinds.pairs import PAIRS, region_batch
from efficientvlm.data.opening import open_data
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load, texts_of
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining, covered

SHORT: dict[str, Any] = {**TRAIN, "max_steps": 2, "data": SHAPES, "eval_limit": 2}
OTHER = {"vision_hidden": 0.0, "vision_self_attention": 0.0, "fusion_cross_attention": 0.0}
FORMS = {
    "vit": {},
    "swin": {"patch_size": 4, "vision_depths": [2, 2], "vision_layers": 4, "vision_window": 4, "image_mean": [0.3, 0.5, 0.6]},
}
both = pytest.mark.parametrize("student, teacher", [("vit", "swin"), ("swin", "vit")])


@pytest.fixture(scope="module")
def towers(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-trained networks `vit` and `swin` with the texts of `chain`, and the same tuned for questions, `vit-vqa` and `swin-vqa`.

    One has 4 by 4 patches of a picture, the other 8 by 8, and each normalises pixels in its own way.
    """
    root = tmp_path_factory.mktemp("towers")
    for name, form in FORMS.items():
        settings = {**SIZES, "image_size": 64, "dropout": 0.0, **form}
        run_stage("init", out=str(root / name), size="tiny", tokenizer=str(chain / "init"), settings=settings)
        run_stage("finetune", out=str(root / f"{name}-vqa"), model=str(root / name), **SHORT)
    return root


@both
def test_through_all_tasks(student: str, teacher: str, towers: Path, tmp_path: Path) -> None:
    model, general = {"model": str(towers / student)}, {"teacher": str(towers / teacher)}
    with pytest.raises(BadInput, match="other sizes") as refused:
        run_stage("distill", out=str(tmp_path / "no"), **model, **general, **SHORT)
    assert "vision width" in refused.value.why and "patch size" in refused.value.why and "vision window" in refused.value.why
    assert refused.value.fix.endswith("--set weights.vision_hidden=0 --set weights.vision_self_attention=0")
    with pytest.raises(BadInput, match="other sizes") as refused:
        run_stage("prune", out=str(tmp_path / "no"), **model, **general, task="retrieval", **SHORT)
    assert all(f"--set weights.{name}=0" in refused.value.fix for name in OTHER) and refused.value.fix.count("=0") == 3
    off = {name: OTHER[name] for name in ("vision_hidden", "vision_self_attention")}
    run_stage("distill", out=str(tmp_path / "distilled"), **model, **general, weights=off, region_probability=1.0, **SHORT)
    run_stage("prune", out=str(tmp_path / "found"), **model, **general, task="retrieval", sparsity=0.4, weights=OTHER, **SHORT)
    asked = {"teacher": str(towers / f"{teacher}-vqa"), "weights": OTHER, "sparsity": 0.4, **SHORT}
    run_stage("prune", out=str(tmp_path / "asked"), model=str(tmp_path / "distilled"), **asked)
    for name in ("distilled", "found", "asked"):
        manifest = require_complete(tmp_path / name)
        assert manifest.metrics["train"]["kd"] > 0 and bool(load(str(tmp_path / name)).model.config.vision_depths) is (student == "swin")
    own, given = load(str(tmp_path / "asked")).model, load(str(towers / f"{teacher}-vqa")).model
    assert own.config.decoder_layers == given.config.decoder_layers, "the decoder comes from the teacher's"


@both
def test_a_teacher_sees_regions_in_its_own_grid_and_pixels_in_its_own_way(student: str, teacher: str, towers: Path) -> None:
    ours, theirs = load(str(towers / student)), load(str(towers / teacher))
    items = [open_data(PAIRS, SHAPES, "train", image_size=64)[at] for at in range(3)]
    grids = {name: 64 // loaded.sizes.patch_size for name, loaded in (("ours", ours), ("theirs", theirs))}
    assert sorted(grids.values()) == [4, 8]
    batches = {name: region_batch(items, texts_of(ours), seed=0, step=0, patch_grid=grid) for name, grid in grids.items()}
    for loaded in (ours, theirs):
        for batch in batches.values():
            own = batches["ours" if loaded is ours else "theirs"]["image_mask"]
            assert torch.equal(covered(loaded.model, batch), own)
    losses = ("itc", "itm", "mlm", "box")
    hard = XvlmPretraining(ours.model.eval(), losses=losses, seed=0)
    want, drawn = frozenset({"itm_logits", "mlm_logits", "itc_logits"}), hard.passes(ours.model, batches["ours"], 0).drawn
    said = LiveTeacher(hard, theirs.model)(batches["ours"], 0, want, drawn)
    mean, spread = (torch.tensor(values)[:, None, None] for values in (theirs.sizes.image_mean, theirs.sizes.image_std))
    normalised = {**batches["theirs"], "pixels": (batches["theirs"]["pixels"] / 255 - mean) / spread}
    alone = XvlmPretraining(theirs.model, losses=losses, seed=0).passes(theirs.model, normalised, 0, want, drawn).record
    for name in ("itm_logits", "mlm_logits", "itc_logits"):
        torch.testing.assert_close(said[name], alone[name], rtol=1e-4, atol=1e-5)


def test_a_teacher_of_other_texts_teaches_by_what_it_says_alone(chain: Path, towers: Path, tmp_path: Path) -> None:
    """Its answer decoder does not fit, so that the student's own comes from its fusion layers; asked for, it is refused."""
    settings = {**SIZES, "image_size": 64, "text_width": 24, "text_heads": 2, "dropout": 0.0}
    run_stage("init", out=str(tmp_path / "narrow"), size="tiny", tokenizer=str(chain / "init"), settings=settings)
    asked = {"model": str(tmp_path / "narrow"), "teacher": str(towers / "swin-vqa"), **SHORT}
    with pytest.raises(BadInput, match="text width 16 and 24, text heads 4 and 2") as refused:
        run_stage("finetune", out=str(tmp_path / "no"), **asked)
    off = {part.partition("=")[0]: 0.0 for part in refused.value.fix.split("weights.")[1:]}
    assert "decoder_hidden" in off and "logits" not in off
    run_stage("finetune", out=str(tmp_path / "tuned"), **asked, weights=off)
    assert require_complete(tmp_path / "tuned").metrics["train"]["kd"] > 0
    with pytest.raises(BadInput, match="decoder_init is teacher"):
        run_stage("finetune", out=str(tmp_path / "no"), **asked, weights=off, decoder_init="teacher")
