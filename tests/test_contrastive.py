"""CLIP and SigLIP are trained on pairs by contrast alone, from the start or further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compression_cases import network as build
from compression_cases import tiny_clip, tiny_siglip
from conftest import SHAPES, run_stage
from torch.nn import functional as F

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load
from efficientvlm.objectives.contrastive import Contrastive

SMALL = {"vision_width": 16, "text_width": 16, "vision_heads": 4, "text_heads": 4, "patch_size": 16, "embed_dim": 8}
SMALL |= {"vision_intermediate": 32, "text_intermediate": 32}
STEPS = {"max_steps": 4, "batch_size": 4, "eval_limit": 4, "limit": 40, "task": "retrieval", "data": SHAPES}


def batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=draw)
    ids = torch.randint(4, 20, (4, 5), generator=draw)
    ids[:, -1] = 1
    keys = {"image_ids": torch.tensor([1, 2, 3, 4]), "caption_ids": torch.tensor([5, 6, 7, 6])}
    return {"pixels": pixels, "text_ids": ids, "text_mask": torch.ones_like(ids), **keys}


@pytest.mark.parametrize("config", [tiny_clip(), tiny_siglip()], ids=["clip", "siglip"])
def test_the_loss_is_the_published_one_but_for_what_is_the_same(config: Any) -> None:
    torch.manual_seed(0)
    model, given = build(config), batch()
    logits = model.run(given)["logits"].detach()
    alone = Contrastive(model)({**given, "caption_ids": torch.arange(4) + 10}, 0)["itc"]
    torch.testing.assert_close(alone, model.loss(logits))
    same = torch.eye(4).bool()
    same[1, 3] = same[3, 1] = True
    if config.model_type == "evlm_clip":
        targets = same / same.sum(1, keepdim=True)
        expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    else:
        expected = -F.logsigmoid(torch.where(same, logits, -logits)).sum() / 4
    torch.testing.assert_close(Contrastive(model)(given, 0)["itc"], expected)


def test_a_clip_is_made_trained_taught_and_pruned(tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("start", "teacher", "short", "taught", "pruned")}
    run_stage("init", out=places["start"], family="clip", size="tiny", data=SHAPES, settings=SMALL)
    run_stage("finetune", out=places["teacher"], model=places["start"], **STEPS)
    assert load(places["teacher"]).model.logit_scale.item() <= 4.6053
    run_stage("shrink", out=places["short"], model=places["teacher"])
    weights = {"itc_logits": 1.0}
    run_stage("finetune", out=places["taught"], model=places["short"], teacher=places["teacher"], weights=weights, **STEPS)
    assert {"itc", "kd"} <= set(require_complete(places["taught"]).metrics["train"])
    pruned = run_stage("prune", out=places["pruned"], model=places["taught"], sparsity=0.3, **STEPS)
    assert pruned.accounting["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.03) and "mean_recall" in pruned.metrics["val"]
    with pytest.raises(BadInput, match="momentum and queue"):
        run_stage("finetune", out=str(tmp_path / "o"), model=places["start"], momentum=0.9, **STEPS)
