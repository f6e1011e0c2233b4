"""Pre-training of BLIP against the numbers of the published code: two steps with their momentum and queues, and two processes."""

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

from efficientvlm.families.blip.config import BlipPretrainingConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.objectives.blip_pretraining import OFFSET, BlipPretraining
from efficientvlm.objectives.losses import negative_weights, positives
from efficientvlm.objectives.momentum import Features, MomentumContrast

FOLDER = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "blip_pretrain_tiny"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER}; name their folder in EVLM_PARITY")
CLOSE = dict(rtol=1e-4, atol=5e-5)  # processors round differently; the second step has gone through an optimizer
PARTS = {
    "blocks": "encoder.layers",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
}
Tensors = dict[str, Tensor]


def numbers(name: str) -> Tensors:
    return load_file(FOLDER / f"{name}.safetensors")


def of(expected: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, **CLOSE)


def ours(name: str) -> str:
    """Our name of a published tensor; what decoder and encoder share is the encoder's."""
    if name.startswith("visual_encoder"):
        name = name.removeprefix("visual_encoder.")
        for theirs, renamed in PARTS.items():
            name = name.replace(theirs, renamed)
        name = f"vision_model.{name}"
        return name.replace("vision_model.norm.", "vision_model.post_layernorm.")
    if name.startswith("text_decoder.bert.") and ".attention." not in name:
        name = name.replace("text_decoder.bert.", "text_encoder.")
    if name == "text_decoder.cls.predictions.decoder.weight":
        return "text_encoder.embeddings.word_embeddings.weight"
    return name.replace("predictions.decoder.bias", "predictions.bias")


def is_momentum(name: str) -> bool:
    return name.partition(".")[0].endswith("_m")


def network() -> Any:
    sizes = json.loads((FOLDER / "config.json").read_text())
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    vision |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    text = {name: sizes[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text |= {"vocab_size": 100, "max_position_embeddings": 40, "layer_norm_eps": 1e-12, "bos_token_id": 98, "sep_token_id": 2}
    text |= {"pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BlipPretrainingConfig(vision_config=vision, text_config=text, image_text_hidden_size=24, question_start_id=99)
    model, state = MODELS[BlipPretrainingConfig](config), dict[str, Tensor]()
    for name, value in numbers("model").items():
        if not is_momentum(name) and "queue" not in name and not name.endswith("position_ids"):
            place = ours(name)
            assert place not in state or torch.equal(state[place], value), name
            state[place] = value
    model.load_state_dict(state, strict=True)
    return model


def momentum_of(published: Tensors) -> Tensors:
    """Our name → published average."""
    found = {}
    for name, value in published.items():
        if is_momentum(name) and not name.endswith("position_ids"):
            first, _, rest = name.partition(".")
            found[ours(f"{first.removesuffix('_m')}.{rest}")] = value
    return found


def objective(over: str = "process", alpha: float = 0.3) -> BlipPretraining:
    model, published = network(), numbers("model")
    contrast = MomentumContrast(model, momentum=0.995, queue=16, alpha=alpha, over=over)
    averages = momentum_of(published)
    assert contrast.encoder.places.keys() == {name for name in averages if ".crossattention." not in name}
    for name, place in contrast.encoder.places.items():
        contrast.encoder.get_buffer(place).copy_(averages[name])
    nobody = torch.full((16,), -100)
    contrast.queue.put(Features(published["image_queue"].T, published["text_queue"].T, nobody, nobody))
    contrast.queue.seen += int(published["queue_ptr"])
    return BlipPretraining(model, losses=("itc", "itm", "lm"), seed=0, contrast=contrast, negatives=over)


def batch_of(prefix: str = "") -> Tensors:
    given = numbers("batch")
    return {
        name: given[f"{prefix}{theirs}"] for name, theirs in (("pixels", "image"), ("text_ids", "text_ids"), ("text_mask", "text_atts"))
    }


def drawn(expected: Tensors) -> tuple[Tensor, Tensor]:
    return expected["itm_neg_image_for_text"], expected["itm_neg_text_for_image"]


TAPS = {
    "vision.hidden": "image_hidden",
    "vision.self_attention": "image_attn",
    "text.hidden": "text_hidden",
    "text.self_attention": "text_self_attn",
    "text.hidden@itm_positive": "fusion_hidden",
    "text.self_attention@itm_positive": "fusion_self_attn",
    "text.cross_attention@itm_positive": "fusion_cross_attn",
    "decoder.hidden": "decoder_hidden",
    "decoder.self_attention": "decoder_self_attn",
    "decoder.cross_attention": "decoder_cross_attn",
}


def step(made: BlipPretraining, batch: Tensors, number: int, expected: Tensors) -> Any:
    """One step against its numbers; gradients are left where they are."""
    contrast = made.contrast
    assert contrast is not None
    made.zero_grad()
    made.begin_step(number)
    found = made.passes(made.model, batch, number, [*TAPS, "text.hidden@itm_negative"], drawn=drawn(expected))
    record, keys = found.record, found.record["keys"]
    for name, theirs in (("itc", "loss_itc"), ("itm", "loss_itm"), ("lm", "loss_lm")):
        agree(found.losses[name], expected[theirs])
    agree(made.total(found.losses), expected["loss_total"])
    agree(record["image_feature"], expected["image_feat"])
    agree(record["text_feature"], expected["text_feat"])
    agree(keys.own.image, expected["image_feat_m"])
    agree(keys.own.text, expected["text_feat_m"])
    temperature = made.model.temp.detach()
    agree(record["image_feature"] @ keys.of.text.T / temperature, expected["sim_i2t"])
    agree(record["text_feature"] @ keys.of.image.T / temperature, expected["sim_t2i"])
    averaged = {"keys": (keys.own.image, keys.own.text), "offset": OFFSET}
    features = record["image_feature"].detach(), record["text_feature"].detach()
    weights = negative_weights(*features, temperature, positives(batch), **averaged)
    agree(weights[0], expected["itm_weights_image_for_text"])
    agree(weights[1], expected["itm_weights_text_for_image"])
    agree(record["itm_logits"], expected["itm_logits"])
    agree(record["lm_logits"], expected["lm_logits"])
    assert torch.equal(record["predicts"][:, :-1], expected["decoder_targets"][:, 1:] != -100)
    made.total(found.losses).backward()
    made.after_step(number)
    agree(contrast.queue.image.T, expected["image_queue"])
    agree(contrast.queue.text.T, expected["text_queue"])
    assert contrast.queue.pointer == int(expected["queue_ptr"])
    return record


def test_two_steps_with_gradients_momentum_and_queues() -> None:
    expected, made = numbers("expected"), objective()
    assert made.contrast is not None
    first = of(expected, "step1.")
    record = step(made, batch_of(), 0, first)
    for tap, theirs in TAPS.items():
        assert f"{theirs}.{len(record[tap]) - 1}" in first
        for number, value in enumerate(record[tap]):
            agree(value, first[f"{theirs}.{number}"])
    agree(record["text.hidden@itm_negative"][4], first["fusion_neg_hidden.4"])
    gradients = of(first, "grad.")
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        agree(made.model.get_parameter(ours(name)).grad, gradient)
    norms = dict(zip(json.loads((FOLDER / "names.json").read_text())["grad_norm_order"], first["grad_norm"].tolist(), strict=True))
    for name, norm in norms.items():
        assert float(made.model.get_parameter(ours(name)).grad.norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name
    averages = momentum_of(of(expected, "step1.momentum_after_step1.") or of(expected, "momentum_after_step1."))
    for name, place in made.contrast.encoder.places.items():
        agree(made.contrast.encoder.get_buffer(place), averages[name])
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.sub_(0.05 * parameter.grad)
    made.contrast.most = 0.4
    step(made, batch_of("step2."), 1, of(expected, "step2."))


def in_process(rank: int, over: str) -> Tensors:
    """The first step of one of two processes, with a batch of its own."""
    expected, made = numbers("expected"), objective(over)
    sides = [drawn(of(expected, f"two_process.rank{side}.")) for side in (0, 1)]
    made.begin_step(0)
    batch = made.aligned(batch_of("" if rank == 0 else "step2."))
    found = made.passes(made.model, batch, 0, drawn=sides[rank])
    made.total(found.losses).backward()
    made.after_step(0)
    assert made.contrast is not None
    queue = made.contrast.queue
    given = {**found.losses, "itm_logits": found.record["itm_logits"], "image_feat_m": found.record["keys"].own.image}
    given |= {"image_queue": queue.image, "text_queue": queue.text, "pointer": torch.tensor(queue.pointer)}
    given |= {"tokens": batch["text_mask"][:, 1:].sum()}
    return given | {f"grad.{name}": value.grad for name, value in made.model.named_parameters() if value.grad is not None}


def test_two_processes_as_published(tmp_path: Path) -> None:
    """Only the queue is gathered; a mean over tokens is here one over those of both processes."""
    every = numbers("expected")
    sides = nursery.at_once(partial(in_process, over="process"), tmp_path)
    tokens = [int(side["tokens"]) for side in sides]
    for rank, found in enumerate(sides):
        expected = of(every, f"two_process.rank{rank}.")
        for name in ("itc", "itm"):
            agree(found[name], expected[f"loss_{name}"])
        agree(found["lm"] * sum(tokens) / 2 / tokens[rank], expected["loss_lm"])
        for name in ("itm_logits", "image_feat_m"):
            agree(found[name], expected[name])
        for name in ("image_queue", "text_queue"):
            agree(found[name].T, expected[name])
        assert found["pointer"] == expected["queue_ptr"]
        means = of(expected, "grad_mean.")
        assert means
        for name, mean in means.items():
            if tokens[0] == tokens[1] or name.startswith(("vision_proj", "text_proj", "itm_head")):
                agree((sides[0][f"grad.{ours(name)}"] + sides[1][f"grad.{ours(name)}"]) / 2, mean)
