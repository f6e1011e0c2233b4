"""The package used from a program: stock models become ours, gates learn in a foreign loop, what is written opens again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BlipConfig, BlipForQuestionAnswering, SiglipConfig, SiglipModel

import efficientvlm
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.examples import prune_in_a_loop, prune_with_trainer

LAYERS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**LAYERS, "vocab_size": 30, "max_position_embeddings": 8}
VISION = {**LAYERS, "image_size": 16, "patch_size": 8}


@pytest.mark.parametrize("example", [prune_in_a_loop, prune_with_trainer])
def test_an_example_prunes_a_clip_to_its_budget(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for module in (prune_in_a_loop, prune_with_trainer):
        monkeypatch.setattr(module, "STEPS", 12)
        monkeypatch.setattr(module, "GATE_STEPS", 8)
    example.main(str(tmp_path / "small"))
    assert "parameters became" in capsys.readouterr().out.splitlines()[-1]
    opened = AutoModel.from_pretrained(tmp_path / "small").eval()
    batch = prune_in_a_loop.pairs(0)
    whole, small = (efficientvlm.count_parameters(model) for model in (efficientvlm.of_stock(prune_in_a_loop.clip()), opened))
    assert small["total"] < 0.7 * whole["total"]
    assert opened(**batch, return_loss=True).loss.isfinite()


def test_a_finished_network_says_what_the_gated_one_said() -> None:
    torch.manual_seed(0)
    model = efficientvlm.of_stock(prune_in_a_loop.clip()).eval()
    pruner = efficientvlm.Pruner.of(model, sparsity=0.5, steps=2, head_init=0.0)
    with pytest.raises(RuntimeError, match="final after 2 steps"):
        pruner.finish()
    for step in range(2):
        pruner.begin_step(step)
        pruner.end_step(step)
    assert not pruner.moving and float(pruner.penalty(2)) == 0
    batch = prune_in_a_loop.pairs(0)
    pruner.begin_step(2)
    with torch.no_grad():
        gated = model(**batch).logits_per_image
        small = pruner.finish()
        torch.testing.assert_close(small(**batch).logits_per_image, gated, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(**batch).logits_per_image, gated), "the network itself is whole again"
    pruner.load_state_dict(pruner.state_dict())
    with pytest.raises(TargetMissed):
        efficientvlm.Pruner.of(model, sparsity=0.9, steps=1, min_heads=4, min_neurons=64)


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_sparsity_is_a_part_of_the_network_that_was_whole(budget: str) -> None:
    torch.manual_seed(0)
    model = efficientvlm.of_stock(prune_in_a_loop.clip()).eval()
    for sparsity, more in ((0.3, True), (0.3, False), (0.5, True)):
        pruner = efficientvlm.Pruner.of(model, budget=budget, sparsity=sparsity, steps=1)
        pruner.begin_step(0)
        pruner.end_step(0)
        model, before = pruner.finish(), efficientvlm.count_parameters(model)["total"]
        assert (efficientvlm.count_parameters(model)["total"] < before) is more, "a cut that was made already is counted"


@pytest.mark.parametrize("kind", [SiglipModel, BlipForQuestionAnswering])
def test_a_stock_object_becomes_ours_with_the_same_values(kind: Any) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 29, (2, 8))
    if kind is SiglipModel:
        stock = SiglipModel(SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION))
        asked: dict[str, Any] = {"return_loss": True}
    else:
        text = {**TEXT, "encoder_hidden_size": 16, "bos_token_id": 28, "sep_token_id": 2, "pad_token_id": 0}
        stock, asked = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=VISION)), {"labels": ids}
    ours = efficientvlm.of_stock(stock.eval())
    asked |= {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, found = stock(**asked), ours(**asked)
    assert list(expected) == list(found)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    next(ours.parameters()).data.fill_(7)
    assert not (next(stock.parameters()) == 7).any(), "values are copied"


def test_a_class_that_no_family_opens_is_refused() -> None:
    from transformers import BertConfig, BertModel

    with pytest.raises(BadInput, match="'bert'"):
        efficientvlm.of_stock(
            BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
        )


def test_every_public_name_is_there_and_no_other() -> None:
    for name in efficientvlm.PUBLIC:
        assert getattr(efficientvlm, name).__doc__, name
        assert name in dir(efficientvlm)
    with pytest.raises(AttributeError, match="no attribute 'pruner'"):
        _ = efficientvlm.pruner
