"""Averaged encoders and queues: what they follow, what they are compared with, that they are resumed and never deployed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nursery
import pytest
import torch
from compression_cases import CONFIGS, network, tiny_blip, tiny_xvlm
from conftest import SHAPES, SIZES, TRAIN, run_stage
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.gates import attach
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import BlipRetrievalConfig
from efficientvlm.loaded import load
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.losses import draw_negatives
from efficientvlm.objectives.momentum import Features, MomentumContrast, MomentumEncoder, Queue
from efficientvlm.training.state import newest

CLOSE = dict(rtol=1e-5, atol=1e-6)
CASES = {"blip": CONFIGS["blip-retrieval"], "xvlm": tiny_xvlm(heads=["itc", "itm"], decoder_layers=0, embed_dim=8)}


def made(name: str = "blip") -> Any:
    torch.manual_seed(0)
    return network(CASES[name])


def batch(count: int = 4, seed: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 20, (count, 5), generator=draw)
    rows = torch.arange(count)
    pixels = torch.randint(256, (count, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return {"pixels": pixels, "text_ids": ids, "text_mask": torch.ones_like(ids), "image_ids": rows, "caption_ids": 100 + rows}


def of(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return given["pixels"], given["text_ids"], given["text_mask"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_averaged_is_what_features_depend_on(name: str) -> None:
    model = made(name)
    pixels, ids, mask = of(batch())
    (model.embed_images(pixels)[1].sum() + model.embed_texts(ids, mask)[1].sum()).backward()
    reached = {parameter for parameter, value in model.named_parameters() if value.grad is not None}
    assert model.feature_parameters() == reached
    encoder = MomentumEncoder(model, 0.9)
    assert encoder.places.keys() == reached and not any("crossattention" in place for place in encoder.places)
    assert not list(encoder.parameters()), "they are no weights that are learnt"


def test_averages_follow_the_weights() -> None:
    model, given = made(), of(batch())
    for parameter in model.vision_model.parameters():
        parameter.requires_grad_(False)
    encoder = MomentumEncoder(model, 0.9)
    assert not any(name.startswith("vision_model") for name in encoder.places), "a frozen weight is its own average"
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    here = model.embed_images(given[0])[1], model.embed_texts(*given[1:])[1]
    for ours, theirs in zip(encoder(*given), here, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    encoder.follow()
    twin = made()
    twin.load_state_dict({name: value + 0.1 * (model.get_parameter(name) - value) for name, value in before.items()})
    with torch.no_grad():
        twin.vision_model.load_state_dict(model.vision_model.state_dict())
        there = twin.embed_images(given[0])[1], twin.embed_texts(*given[1:])[1]
    for ours, theirs in zip(encoder(*given), there, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert not ours.requires_grad


def test_gates_close_the_same_heads_and_neurons_of_the_averages() -> None:
    """The average of a masked network is that of the sliced one."""
    model, given = made().eval(), of(batch())
    units = model.units()
    keep = torch.arange(len(units)) % 3 != 1
    small = slice_model(model, keep)
    whole, sliced = MomentumEncoder(model, 0.5), MomentumEncoder(small, 0.5)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
        small.load_state_dict(slice_model(model, keep).state_dict())
    whole.follow()
    sliced.follow()
    with attach(model, units) as hooks:
        hooks.set(keep.float())
        masked = whole(*given)
    for ours, theirs, open_ in zip(masked, sliced(*given), whole(*given), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert (ours - open_).abs().max() > 1e-3


def features(first: int, count: int) -> Features:
    rows = torch.arange(first, first + count)
    vectors = rows[:, None] + torch.zeros(3)
    return Features(vectors, -vectors, rows, 1000 + rows)


def test_a_queue_holds_the_latest_pairs() -> None:
    queue = Queue(6, 3, torch.zeros(1))
    assert len(queue.latest().image) == 0 and queue.pointer == 0
    queue.put(features(0, 4))
    assert queue.latest().image_ids.tolist() == [0, 1, 2, 3] and queue.pointer == 4
    queue.put(features(4, 4))
    found = queue.latest()
    assert found.image_ids.tolist() == [6, 7, 2, 3, 4, 5] and found.caption_ids.tolist() == [1006, 1007, 1002, 1003, 1004, 1005]
    assert torch.equal(found.image[:, 0].long(), found.image_ids) and torch.equal(found.text, -found.image) and queue.pointer == 2
    again = Queue(6, 3, torch.zeros(1))
    again.load_state_dict(queue.state_dict())
    assert again.pointer == 2 and again.latest().image_ids.tolist() == found.image_ids.tolist()
    again.fill(seed=0)
    assert again.pointer == 2 and (again.latest().image_ids == -100).all() and again.latest().image.norm(dim=1).allclose(torch.ones(6))


def test_targets_are_shared_by_equal_images_and_captions_and_softened() -> None:
    """By hand, in float64: an image that is in the queue, and a caption that is in the batch twice."""
    model = made()
    contrast = MomentumContrast(model, momentum=0.9, queue=4, alpha=0.4, ramp=10)
    unit = F.normalize(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
    contrast.queue.put(Features(unit[0, :2], unit[1, :2], torch.tensor([2, 77]), torch.tensor([900, 901])))
    given = batch(3)
    given["text_ids"][1], given["caption_ids"][1] = given["text_ids"][0], given["caption_ids"][0]
    keys = contrast.keys(given)
    positives = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]])
    assert torch.equal(keys.same.long(), positives) and keys.queued == 3
    image, text = (F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(n)), dim=-1) for n in (5, 6))
    alpha, temperature, total = 0.4 * 3 / 10, 0.2, 0.0
    assert contrast.alpha(3) == pytest.approx(alpha) and contrast.alpha(50) == 0.4
    for ours, averaged, others in ((image, keys.own.image, keys.of.text), (text, keys.own.text, keys.of.image)):
        soft = (averaged.double() @ others.double().T / temperature).softmax(1)
        wanted = alpha * soft + (1 - alpha) * positives / positives.sum(1, keepdim=True)
        total -= float((wanted * (ours.double() @ others.double().T / temperature).log_softmax(1)).sum() / 3)
    assert float(contrast.loss(image, text, keys, torch.tensor(temperature), 3)) == pytest.approx(total / 2, rel=1e-5)
    assert len(contrast.queue.latest().image) == 2, "the step is compared with the queue as it was"
    contrast.end_step()
    assert contrast.queue.latest().image_ids.tolist() == [2, 77, 0, 1] and contrast.describe(3)["queue"] == 4


def test_a_temperature_lies_in_the_objective_where_the_network_has_none() -> None:
    objective = BlipPretraining(made(), losses=("itc", "itm"), seed=0)
    with torch.no_grad():
        objective.temp.fill_(3.0)
    objective(batch(), 0)["loss"].backward()
    assert float(objective.temp.detach()) == 0.5 and objective.temp.grad is not None
    assert not [name for name in objective.model.state_dict() if "temp" in name]


def test_weights_that_vanish_leave_only_real_negatives() -> None:
    """Without an offset a sharp softmax gives every other pair the weight 0: any of those may be drawn, and no positive."""
    unit = torch.eye(4)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        for chosen in draw_negatives(unit, unit, torch.tensor(0.001), same, draw, offset=0.0):
            assert not same[torch.arange(4), chosen].any()


def test_matching_draws_by_momentum_features_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientvlm.objectives import blip_pretraining

    seen: list[dict[str, Any]] = []

    def watch(*given: Any, **how: Any) -> Any:
        seen.append(how)
        return draw_negatives(*given, **how)

    monkeypatch.setattr(blip_pretraining, "draw_negatives", watch)
    model = made()
    for online in (False, True):
        contrast = MomentumContrast(model, momentum=0.9, queue=4, alpha=0.4)
        BlipPretraining(model, losses=("itc", "itm"), seed=0, contrast=contrast, online=online)(batch(), 0)
    assert [how["offset"] for how in seen] == [1e-4, 0.0] and ["keys" in how for how in seen] == [True, False]


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `finder` of a BLIP that embeds and matches."""
    root = tmp_path_factory.mktemp("finder")
    run_stage("init", out=str(root / "init"), family="blip", size="tiny", data=SHAPES, settings=SIZES)
    vocab = load(str(root / "init")).tokenizer
    config = tiny_blip(BlipRetrievalConfig, question_start_id=vocab.get_vocab()["[ENC]"])
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(vocab), 24
    config.vision_config.hidden_size = config.text_config.encoder_hidden_size = 24
    config.vision_config.num_attention_heads = 3
    torch.manual_seed(0)
    network(config).save_pretrained(root / "hf")
    vocab.save_pretrained(root / "hf")
    run_stage("import", out=str(root / "finder"), model=str(root / "hf"))
    return root


STEPS = {**TRAIN, "task": "retrieval", "data": SHAPES, "log_every": 1, "max_steps": 5, "queue": 8, "alpha_warmup": 0.5, "eval_limit": 0}


def test_it_is_resumed_exactly_and_never_deployed(finder: Path, tmp_path: Path) -> None:
    settings = {**STEPS, "model": str(finder / "finder")}
    whole = run_stage("finetune", out=str(tmp_path / "whole"), **settings)
    broken = {**settings, "out": str(tmp_path / "broken")}
    assert nursery.finish(nursery.start("finetune", fault=("stops_at", [2]), **broken)) == [75]
    state = newest(tmp_path / "broken" / "training_state")
    assert state is not None
    with safe_open(state / "state.safetensors", "pt") as file:
        names = {name for name in file.keys() if name.startswith("module/contrast.")}
        assert int(file.get_tensor("module/contrast.queue.total")) == 12
    assert any("encoder.text_proj/weight" in name for name in names) and not any("crossattention" in name for name in names)
    run_stage("finetune", **broken)
    before, after = (tmp_path / name / "model.safetensors" for name in ("whole", "broken"))
    assert before.read_bytes() == after.read_bytes()
    assert load_file(before).keys() == load_file(finder / "finder" / "model.safetensors").keys()
    assert whole.extra["contrast"] == {"momentum": 0.995, "queue": 8, "alpha": 0.4, "ramp": 2}
    lines = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert [line["queue"] for line in lines] == [4, 8, 8, 8, 8] and [line["alpha"] for line in lines] == [0, 0.2, 0.4, 0.4, 0.4]
    plain = run_stage("finetune", out=str(tmp_path / "plain"), **{**settings, "momentum": 0})
    assert "contrast" not in plain.extra and (tmp_path / "plain" / "model.safetensors").read_bytes() != after.read_bytes()


@pytest.mark.parametrize("stage", ["finetune", pytest.param("prune", marks=pytest.mark.slow)])
def test_two_processes_compute_what_one_does(stage: str, finder: Path, tmp_path: Path) -> None:
    """With averaged encoders, a teacher by either method, and gates."""
    settings = {**STEPS, "model": str(finder / "finder"), "teacher": str(finder / "finder"), "max_steps": 4, "momentum": 0.5}
    method: dict[str, Any] = {"weights": {"itc_logits": 1.0}, "sparsity": 0.3} if stage == "prune" else {"distillation": "dlip"}
    settings |= method
    run_stage(stage, out=str(tmp_path / "one"), **settings)
    nursery.whole(stage, processes=2, out=str(tmp_path / "two"), **settings)
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "itc", "itm", "kd", "alpha", "queue"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5), name
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel()) < 5e-5
    if stage == "prune":
        achieved = require_complete(tmp_path / "one").accounting["sparsity"]["achieved"]
        assert achieved == pytest.approx(0.3, abs=0.01)


@pytest.mark.slow
def test_spread_parameters_are_averaged_too(finder: Path, tmp_path: Path) -> None:
    settings = {**STEPS, "model": str(finder / "finder"), "max_steps": 3, "momentum": 0.5}
    run_stage("finetune", out=str(tmp_path / "one"), **settings)
    nursery.whole("finetune", processes=2, parallel="fsdp", out=str(tmp_path / "two"), **settings)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel()) < 1e-4


def test_another_network_learns_with_averages_where_that_is_asked(chain: Path, tmp_path: Path) -> None:
    settings = {**STEPS, "model": str(chain / "init"), "max_steps": 2}
    found = run_stage("finetune", out=str(tmp_path / "out"), **settings, momentum=0.9)
    assert found.extra["contrast"]["momentum"] == 0.9
    assert "contrast" not in run_stage("finetune", out=str(tmp_path / "plain"), **settings).extra


def test_a_queue_that_whole_batches_do_not_fill_is_refused(finder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="queue 10") as refused:
        run_stage("finetune", out=str(tmp_path / "out"), **{**STEPS, "model": str(finder / "finder"), "queue": 10})
    assert "multiple of batch_size 4" in refused.value.why and refused.value.fix == "use 8"
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_averages_and_queue(finder: Path, tmp_path: Path) -> None:
    """In memory and in the state on the disk, beside what training holds anyway."""
    from efficientvlm.planning.plan import plan
    from efficientvlm.recipe import Step
    from efficientvlm.settings.compose import stage_settings

    found = []
    for name, more in (("averaged", {}), ("plain", {"momentum": 0.0})):
        settings = {**STEPS, "model": str(finder / "finder"), "out": str(tmp_path / name), **more}
        made = plan([Step(name, "finetune", stage_settings("finetune", settings))])
        found.append(made.stages[0])
    model = load(str(finder / "finder")).model
    elements = sum(model.get_parameter(name).numel() for name in model.feature_parameters()) + 8 * 2 * (8 + 2)
    assert found[0].memory["averages"] == 4 * elements and "averages" not in found[1].memory
    assert found[0].disk["state"] - found[1].disk["state"] == 4 * elements
