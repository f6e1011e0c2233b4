"""Retrieval of BLIP against the numbers of the published code: contrast with momentum, matching, ranking, and two processes."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm.families.blip.config import BlipRetrievalConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.losses import negative_weights, positives
from efficientvlm.objectives.momentum import Features, MomentumContrast
from efficientvlm.tasks import recall

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "blip_tasks_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=1e-5)
QUEUE, EMBED = 16, 24
Tensors = dict[str, Tensor]


def numbers(name: str) -> Tensors:
    return load_file(FOLDER / f"retrieval{name}.safetensors")


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, **CLOSE)


def renamed() -> dict[str, str]:
    """Published name → ours, of what is deployed."""
    pairs = json.loads((FOLDER / "hf_key_map.json").read_text())["retrieval"]["pairs"]
    return {theirs: ours for theirs, ours in pairs if ours}


def network() -> Any:
    settings = json.loads((FOLDER / "config.json").read_text())["retrieval"]
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    vision |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    text = {name: settings[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text |= {"vocab_size": 100, "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "bos_token_id": 98, "sep_token_id": 2}
    text |= {"pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BlipRetrievalConfig(vision_config=vision, text_config=text, image_text_hidden_size=EMBED, question_start_id=99)
    model, published = MODELS[BlipRetrievalConfig](config), numbers("")
    found = model.load_state_dict({ours: published[theirs] for theirs, ours in renamed().items()}, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    return model


def as_published(name: str) -> str:
    """Name of the averaged tensor in published files."""
    first, _, rest = name.partition(".")
    return f"{first}_m.{rest}"


def objective(**how: Any) -> BlipPretraining:
    """The published objective, with its averages and its queue."""
    model, published = network(), numbers("")
    over = how.pop("over", "process")
    contrast = MomentumContrast(model, momentum=0.995, queue=QUEUE, alpha=0.4, over=over)
    names = {ours: theirs for theirs, ours in renamed().items()}
    for name, place in contrast.encoder.places.items():
        contrast.encoder.get_buffer(place).copy_(published[as_published(names[name])])
    ids = published["idx_queue"][0]
    contrast.queue.put(Features(published["image_queue"].T, published["text_queue"].T, ids, torch.full_like(ids, -100)))
    contrast.queue.seen += int(published["ptr_queue"])
    made = BlipPretraining(model, losses=("itc", "itm"), seed=0, contrast=contrast, online=True, **how)
    with torch.no_grad():
        made.temp.copy_(published["temp"])
    return made


def batch_of(prefix: str = "", rows: slice = slice(None)) -> Tensors:
    given = numbers("_batch")
    names = {"pixels": "image", "text_ids": "text_ids", "text_mask": "text_atts", "image_ids": "idx"}
    return {ours: given[f"{prefix}{theirs}"][rows] for ours, theirs in names.items()}


def drawn(expected: Tensors) -> tuple[Tensor, Tensor]:
    return expected["itm_neg_image_for_text"], expected["itm_neg_text_for_image"]


def same_contrast(made: BlipPretraining, found: Any, expected: Tensors) -> None:
    """Features, targets and losses of a step, and its queue afterwards."""
    record, keys = found.record, found.record["keys"]
    agree(record["image_feature"], expected["image_feat"])
    agree(record["text_feature"], expected["text_feat"])
    agree(keys.own.image, expected["image_feat_m"])
    agree(keys.own.text, expected["text_feat_m"])
    hard = keys.same.float()
    agree(hard / hard.sum(1, keepdim=True), expected["sim_targets"])
    agree(found.losses["itc"], expected["loss_itc"])
    made.after_step(0)
    assert made.contrast is not None
    queue = made.contrast.queue
    agree(queue.image.T, expected["image_queue"])
    agree(queue.text.T, expected["text_queue"])
    assert torch.equal(queue.image_ids, expected["idx_queue"][0]) and queue.pointer == int(expected["queue_ptr"])


def test_losses_and_gradients() -> None:
    expected, made, batch = numbers("_expected"), objective(), batch_of()
    same = positives(batch)
    for ours, theirs in zip(
        negative_weights(expected["image_feat"], expected["text_feat"], made.temp.detach(), same, offset=0),
        ("image_for_text", "text_for_image"),
        strict=True,
    ):
        agree(ours, expected[f"itm_weights_{theirs}"])
    made.begin_step(0)
    found = made.passes(made.model, batch, 0, drawn=drawn(expected))
    agree(found.losses["itm"], expected["loss_itm"])
    agree(found.record["itm_logits"], expected["itm_logits"])
    made.total(found.losses).backward()
    same_contrast(made, found, expected)
    names, gradients = renamed(), {name[5:]: value for name, value in expected.items() if name.startswith("grad.")}
    assert len(gradients) == 6
    for name, gradient in gradients.items():
        agree((made.temp if name == "temp" else made.model.get_parameter(names[name])).grad, gradient)


def in_process(rank: int, over: str) -> Tensors:
    """A step of one of two processes, of which each has four pairs."""
    every = numbers("_expected")
    made = objective(over=over, negatives="all")
    batch = batch_of("two_process_", slice(4 * rank, 4 * rank + 4))
    sides = [drawn({name.removeprefix(f"two_process.rank{side}."): value for name, value in every.items()}) for side in (0, 1)]
    made.begin_step(0)
    found = made.passes(made.model, batch, 0, drawn=(torch.cat([one[0] for one in sides]), torch.cat([one[1] for one in sides])))
    made.total(found.losses).backward()
    made.after_step(0)
    assert made.contrast is not None
    keys, queue = found.record["keys"], made.contrast.queue
    hard = keys.same.float()
    same = positives(batch)  # of this process
    given = {"itc": found.losses["itc"], "itm": found.losses["itm"], "itm_logits": found.record["itm_logits"], "same": same}
    given |= {"image_feat": found.record["image_feature"], "image_feat_m": keys.own.image, "targets": hard / hard.sum(1, keepdim=True)}
    given |= {"image_queue": queue.image, "text_queue": queue.text, "ids": queue.image_ids, "pointer": torch.tensor(queue.pointer)}
    gradients = {name: parameter.grad for name, parameter in made.model.named_parameters() if parameter.grad is not None}
    return given | {f"grad.{name}": value for name, value in gradients.items()} | {"grad.temp": made.temp.grad}


def test_two_processes_as_published(tmp_path: Path) -> None:
    """Contrast with the pairs of the own process and the queue, negatives from both, a queue that gets the pairs of both."""
    every, names = numbers("_expected"), renamed()
    sides = nursery.at_once(partial(in_process, over="process"), tmp_path)
    for rank, found in enumerate(sides):
        expected = {name.removeprefix(f"two_process.rank{rank}."): value for name, value in every.items() if f".rank{rank}." in name}
        for ours, theirs in {"itc": "loss_itc", "itm": "loss_itm", "targets": "sim_targets"}.items():
            agree(found[ours], expected[theirs])
        for name in ("itm_logits", "image_feat", "image_feat_m"):
            agree(found[name], expected[name])
        for name in ("image_queue", "text_queue"):
            agree(found[name].T, expected[name])
        assert torch.equal(found["ids"], expected["idx_queue"][0]) and found["pointer"] == expected["queue_ptr"]
        means = {name.removeprefix("grad_mean."): value for name, value in expected.items() if name.startswith("grad_mean.")}
        assert len(means) == 5
        for name, mean in means.items():
            ours = f"grad.{names.get(name, name)}"
            agree((sides[0][ours] + sides[1][ours]) / 2, mean)


def test_two_processes_as_one(tmp_path: Path) -> None:
    """By default they compute what one does with the whole batch."""
    every = numbers("_expected")
    sides = nursery.at_once(partial(in_process, over="all"), tmp_path)
    made, batch = objective(over="all"), batch_of("two_process_")
    chosen = [drawn({name.removeprefix(f"two_process.rank{side}."): value for name, value in every.items()}) for side in (0, 1)]
    made.begin_step(0)
    found = made.passes(made.model, batch, 0, drawn=(torch.cat([one[0] for one in chosen]), torch.cat([one[1] for one in chosen])))
    made.total(found.losses).backward()
    made.after_step(0)
    assert made.contrast is not None
    for loss in ("itc", "itm"):
        agree((sides[0][loss] + sides[1][loss]) / 2, found.losses[loss].detach())
    for side in sides:
        agree(side["image_queue"], made.contrast.queue.image)
        agree(side["text_queue"], made.contrast.queue.text)
    for name, parameter in made.model.named_parameters():
        if parameter.grad is not None:
            agree((sides[0][f"grad.{name}"] + sides[1][f"grad.{name}"]) / 2, parameter.grad)


def test_candidates_are_ranked_anew_by_logit_and_cosine() -> None:
    given, expected, model = numbers("_batch"), numbers("_expected"), network().eval()

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([int(text) for text in texts])
        return given["eval_text_ids"][rows], given["eval_text_atts"][rows]

    parts = [([str(row) for row in range(12)], given["eval_image"], [[str(2 * row), str(2 * row + 1)] for row in range(12)])]
    gallery = recall.encode(model, parts, tokens, 7, 12)
    agree(gallery.image, expected["eval.image_feats"])
    agree(gallery.text, expected["eval.text_feats"])
    images, captions = torch.arange(12).repeat_interleave(24), torch.arange(24).repeat(12)
    logits = recall.match(model, gallery, images, captions, batch_size=50)[:, 1]
    agree(logits.view(12, 24), expected["eval.itm_match_logits"])
    sums = (logits + recall.cosines(gallery, images, captions)).view(12, 24)
    for name, ours in (("scores_i2t", sums), ("scores_t2i", sums.T)):
        scored = expected[f"eval.{name}"] > -100
        agree(ours[scored], expected[f"eval.{name}"][scored])
    published = json.loads((FOLDER / "config.json").read_text())["retrieval"]["eval"]
    assert model.config.rerank_by == "sum"
    found = recall.evaluate(model, gallery, batch_size=50, rerank=published["k_test"], rerank_by="sum")
    for ours, theirs in (("", "itc_only"), ("reranked_", "reranked")):
        for side, direction in (("txt", "image_to_text"), ("img", "text_to_image")):
            for top in (1, 5, 10):
                assert 100 * found[f"{ours}{direction}_r{top}"] == pytest.approx(published["metrics"][theirs][f"{side}_r{top}"])
