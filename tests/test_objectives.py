"""What the objectives minimise, against closed forms written out here."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientvlm.errors import BadInput
from efficientvlm.families.network import Record
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.efficientvlm import distilled, released
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.losses import (
    are_negatives,
    box_losses,
    draw_negatives,
    giou,
    itc_loss,
    matching_loss,
    negative_weights,
    positives,
)
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.terms import attention_mse, compared, hidden_mse, logit_kl, tower_maps
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.settings.methods import PASSES, DistillationQuirks, DistillWeights, RetrievalWeights, TaskWeights

CLOSE = dict(rtol=1e-5, atol=1e-6)
NO_QUIRKS = DistillationQuirks()
LOSSES = ("itc", "itm", "mlm", "box")


def config(**changes: Any) -> XVLMConfig:
    sizes: dict[str, Any] = dict(
        image_size=16,
        patch_size=8,
        vision_width=16,
        vision_layers=4,
        vision_heads=4,
        vision_intermediate=6,
        text_width=16,
        text_layers=2,
        fusion_layers=2,
        text_heads=2,
        text_intermediate=6,
        vocab_size=30,
        max_positions=12,
        embed_dim=8,
        local_attention_depth=2,
        dropout=0.0,
        initializer_range=0.3,
    )
    return XVLMConfig(**{**sizes, **changes})


def build(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return XVLMModel(config(**changes)).eval()


def student_of(vision: list[int], **changes: Any) -> Any:
    """A student's shapes after the given vision layers, every second layer of the other towers."""
    layers = {"vision": vision, "text": [1], "fusion": [1], "decoder": []}
    torch.manual_seed(7)
    return XVLMModel(config(**changes).with_layers(layers)).eval()


def pairs(regions: bool = False, length: int = 6) -> dict[str, Any]:
    """Four texts of unequal length with two masked slots each, one of them padding; images, or regions of two images."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(length) < torch.tensor([6, 4, 5, 3])[:, None]).long()
    ids = torch.randint(5, 30, (4, length), generator=generator) * mask
    masked = ids.clone()
    masked[:, 1] = 4
    batch = {
        "pixels": torch.randn(2 if regions else 4, 3, 16, 16, generator=generator),
        "text_ids": ids,
        "text_mask": mask,
        "masked_ids": masked,
        "masked_positions": torch.tensor([[1, 2], [1, 0], [1, 2], [1, 0]]),
        "masked_labels": torch.tensor([[9, 8], [7, -100], [6, 5], [10, -100]]),
    }
    if regions:
        batch |= {
            "image_index": torch.tensor([0, 0, 1, 1]),
            "image_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]]),
            "boxes": torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.75, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]),
            "is_whole_image": torch.tensor([0, 1, 0, 1]),
        }
    return batch


def distillation(student: Any, teacher: Any, losses: Any = LOSSES, kd: float = 0.4, **options: Any) -> Any:
    options = {"weights": DistillWeights(itc_logits=1, fusion_cross_attention=1), **options}
    return distilled(XvlmPretraining(student, losses=losses, seed=0), teacher, method(kd=kd, **options))


def method(**changes: Any) -> Any:
    """Settings of distillation."""
    usual = {"quirks": NO_QUIRKS, "temperature": 1.0, "scale_by_temperature": False, "cache_teacher": False}
    return SimpleNamespace(**{**usual, **changes})


def distances(objective: Distilled, of: dict[str, Any], networks: Any, quirks: DistillationQuirks = NO_QUIRKS) -> dict[str, torch.Tensor]:
    """Every term of a student and a teacher that the two records allow, by tap."""
    taps, (student, teacher) = objective.want, networks
    ours = objective.hard.passes(student, of, 0, taps)
    theirs = objective.hard.passes(teacher, of, 0, taps, ours.drawn).record
    terms = released(objective.terms, quirks)
    return {term.tap: compared(term, ours.record, theirs, objective.maps) for term in terms if term.tap in ours.record}


# distances


@pytest.mark.parametrize("temperature, scale", [(1.0, False), (2.0, False), (2.0, True)])
def test_logit_kl(temperature, scale):
    student, teacher = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([[0.5, 0.0, 1.0], [1.0, -1.0, 0.0]])
    total = 0.0
    for row in range(2):
        p, q = ([math.exp(value / temperature) for value in logits[row].tolist()] for logits in (student, teacher))
        total += sum(b / sum(q) * math.log((b / sum(q)) / (a / sum(p))) for a, b in zip(p, q, strict=True))
    expected = torch.tensor(total / 2 * (temperature**2 if scale else 1))
    torch.testing.assert_close(logit_kl(student, teacher, temperature=temperature, scale=scale), expected)
    torch.testing.assert_close(logit_kl(student[None], teacher[None], temperature=temperature, scale=scale), expected)


def test_logit_kl_of_some_rows():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    valid = torch.tensor([[1, 0, 1], [0, 0, 1]])
    by_row = torch.stack([logit_kl(student[i, j], teacher[i, j]) for i, j in ((0, 0), (0, 2), (1, 2))])
    torch.testing.assert_close(logit_kl(student, teacher, valid=valid), by_row.mean())
    assert logit_kl(student, student).item() == pytest.approx(0, abs=1e-6)
    assert logit_kl(student, teacher, valid=torch.zeros(2, 3)).item() == 0


def test_hidden_mse():
    student = [torch.zeros(1, 2, 3), torch.ones(1, 2, 3)]
    teacher = [torch.full((1, 2, 3), value) for value in (1.0, 9.0, 3.0)]
    assert hidden_mse(student, teacher, [(0, 0), (1, 2)]).item() == pytest.approx(1 + 4)
    teacher[2][0, 1] = 100.0  # a padded token
    assert hidden_mse(student, teacher, [(1, 2)], torch.tensor([[1, 0]])).item() == pytest.approx(4)
    assert hidden_mse(student, teacher, [(1, 2)]).item() == pytest.approx((4 + 99**2) / 2)


def test_attention_mse():
    student, teacher = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    error = (student - teacher).square()
    torch.testing.assert_close(attention_mse([student], [teacher], [(0, 0)]), error.mean() * 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    kept = torch.stack([error[0, :, 0], error[0, :, 1], error[1, :, 0]])
    torch.testing.assert_close(attention_mse([student], [teacher], [(0, 0)], mask=mask), kept.mean() * 5)
    heads = [([0, 1], [2, 0])]
    shared = (student[:, :2] - teacher[:, [2, 0]]).square().mean() * 5
    torch.testing.assert_close(attention_mse([student[:, :2]], [teacher], [(0, 0)], heads), shared)
    torch.testing.assert_close(attention_mse([student], [teacher], [(0, 0)], [([0, 1, 2], [0, 1, 2])]), error.mean() * 5)
    assert attention_mse([student[:, :0]], [teacher], [(0, 0)], [([], [])]).item() == 0
    twice = attention_mse([student, student], [teacher], [(0, 0), (1, 0)])
    torch.testing.assert_close(twice, 2 * error.mean() * 5)


# layer maps


def test_layer_maps_of_the_paper():
    teacher = config(vision_layers=12, text_layers=6, fusion_layers=6, decoder_layers=6)
    student = config(vision_layers=6, text_layers=3, fusion_layers=3, decoder_layers=3)
    maps = tower_maps(student, teacher)
    assert maps["vision"].hidden == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]
    assert maps["vision"].attention == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]
    for tower in ("text", "fusion", "decoder"):
        assert maps[tower].hidden == [(0, 0), (1, 2), (2, 4), (3, 6)]
        assert maps[tower].attention == [(0, 1), (1, 3), (2, 5)]
    assert "decoder" not in tower_maps(config(), teacher)


def test_a_student_imitates_the_layers_it_came_from():
    teacher = config(vision_layers=6)
    student = teacher.with_layers({"vision": [0, 5], "text": [0, 1], "fusion": [0], "decoder": []})
    maps = tower_maps(student, teacher)
    assert maps["vision"].hidden == [(0, 0), (1, 1), (2, 6)] and maps["vision"].attention == [(0, 0), (1, 5)]
    assert maps["text"].hidden == [(0, 0), (1, 1), (2, 2)]
    assert maps["fusion"].attention == [(0, 0)]
    deeper = tower_maps(config(vision_layers=3), config(vision_layers=2))["vision"]
    assert deeper.attention == [(0, 0), (1, 0), (2, 1)]


def test_the_source_of_another_network_is_not_used():
    """A student shrunk in two steps imitates evenly spaced layers of the first teacher, not those its parent was asked for."""
    first = config(vision_layers=12)
    second = first.with_layers({**LAYERS_OF(first), "vision": [0, 2, 4, 6, 8, 10]})
    third = second.with_layers({**LAYERS_OF(second), "vision": [0, 1, 5]})
    assert tower_maps(third, second)["vision"].attention == [(0, 0), (1, 1), (2, 5)]
    assert tower_maps(third, first)["vision"].attention == [(0, 3), (1, 7), (2, 11)]


def LAYERS_OF(config: XVLMConfig) -> dict[str, list[int]]:
    return {tower: list(range(count)) for tower, count in config.layers().items()}


def test_heads_are_paired_by_original_index():
    student = config(kept={"vision.0.head": "1,3", "vision.1.head": "", "fusion.0.cross_head": "1"})
    teacher = config(kept={"vision.0.head": "0,3", "fusion.0.cross_head": "1"})
    maps = tower_maps(student, teacher)
    assert maps["vision"].heads["head"][:2] == [([1], [1]), ([], [])]
    assert maps["fusion"].heads["cross_head"] == [([0], [0]), ([0, 1], [0, 1])]
    assert "cross_head" not in maps["text"].heads


# contrast, negatives, boxes


def test_contrastive_loss():
    image, text = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    logits = [[0.6 / 0.5, 0.0], [0.8 / 0.5, 1 / 0.5]]

    def nll(row: list[float], target: int) -> float:
        return math.log(sum(math.exp(value) for value in row)) - row[target]

    columns = [list(column) for column in zip(*logits, strict=True)]
    rows = (nll(logits[0], 0) + nll(logits[1], 1)) / 2
    expected = (rows + (nll(columns[0], 0) + nll(columns[1], 1)) / 2) / 2
    similar = image @ text.T / 0.5
    assert itc_loss(similar).item() == pytest.approx(expected, rel=1e-5)
    assert itc_loss(similar, torch.eye(2, dtype=torch.bool)).item() == pytest.approx(expected, rel=1e-5)
    spread = sum(nll(line, target) for line in (*logits, *columns) for target in (0, 1)) / 8
    assert itc_loss(similar, torch.ones(2, 2, dtype=torch.bool)).item() == pytest.approx(spread, rel=1e-5)


def test_what_belongs_together():
    batch = {"text_ids": torch.tensor([[1, 5, 2], [1, 6, 2], [1, 5, 2], [1, 7, 2]])}
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    assert torch.equal(positives(batch), same)
    same[1, 3] = same[3, 1] = True
    assert torch.equal(positives(batch | {"image_ids": torch.tensor([1, 2, 3, 2])}), same)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 6))
def test_negatives_are_drawn_again_alike_and_are_never_positives(seed, size):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.nn.functional.normalize(torch.randn(size, 4, generator=generator), dim=-1) for _ in range(2))
    ids = torch.randint(0, size, (size,), generator=generator)
    same = ids[:, None] == ids[None]
    temperature = torch.tensor(0.07)
    draws = [draw_negatives(image, text, temperature, same, torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    for drawn in draws[0]:
        for row, other in enumerate(drawn.tolist()):
            assert other != row
            assert not same[row, other] or bool(same[row].all())


def test_a_pair_without_a_negative_is_left_out_of_matching():
    """Pairs 0 and 1 are of one image, of which 2 has another: all negatives are there; of pairs of one image alone there is none."""
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    assert all(part.all() for part in are_negatives((torch.tensor([2, 2, 0]), torch.tensor([2, 2, 1])), same))
    image_for_text, text_for_image = are_negatives((torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])), same)
    assert image_for_text.tolist() == [False, True, True] and text_for_image.tolist() == [True, False, True]
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    whole = matching_loss(logits, torch.tensor([True, False, True]))
    some = matching_loss(logits, torch.tensor([True, False, True]), torch.tensor([True, True, False]))
    each = [math.log(1 + math.exp(-gap)) for gap in (1.0, 2.0, 3.0)]
    assert float(whole) == pytest.approx(sum(each) / 3) and float(some) == pytest.approx(sum(each[:2]) / 2)


def test_hard_negatives_are_drawn_as_often_as_their_weights_say():
    image, text = torch.eye(3), torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    same = torch.eye(3, dtype=torch.bool)
    for_text, for_image = negative_weights(image, text, torch.tensor(0.5), same)
    expected = math.exp(1.8) / (math.exp(2) + math.exp(1.8) + 1) + 1e-5
    assert for_image[0, 1].item() == pytest.approx(expected, rel=1e-4) and for_image[0, 0].item() == 0
    assert for_text[1, 0].item() == pytest.approx(math.exp(1.8) / (math.exp(1.8) + math.exp(0.2) + 1) + 1e-5, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(3)
    for _ in range(400):
        counts[draw_negatives(image, text, torch.tensor(0.5), same, generator)[1][0]] += 1
    share = for_image[0] / for_image[0].sum()
    assert counts[0] == 0 and (counts / 400 - share).abs().max() < 0.08


def test_without_hard_negatives_any_other_pair_is_drawn_as_often():
    image, text = torch.eye(3), torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    for_text, for_image = negative_weights(image, text, torch.tensor(torch.inf), torch.eye(3, dtype=torch.bool))
    assert torch.allclose(for_text, for_image) and for_text[0, 1] == for_text[0, 2] == for_text[1, 0]
    assert (for_text.diagonal() == 0).all()


def test_giou():
    def one(a: list[float], b: list[float]) -> float:
        return giou(torch.tensor([a]), torch.tensor([b])).item()

    assert one([0.5, 0.5, 0.4, 0.2], [0.5, 0.5, 0.4, 0.2]) == pytest.approx(1)
    # 0.2 x 0.2 squares, half overlapping: IoU 0.02 / 0.06, hull 0.3 x 0.2 is their union
    assert one([0.3, 0.3, 0.2, 0.2], [0.4, 0.3, 0.2, 0.2]) == pytest.approx(1 / 3, rel=1e-5)
    # apart: hull 1.0 x 0.2, union 0.08
    assert one([0.1, 0.1, 0.2, 0.2], [0.9, 0.1, 0.2, 0.2]) == pytest.approx(-(0.2 - 0.08) / 0.2, rel=1e-5)
    # degenerate boxes stay finite and within [-1, 1]
    for a, b in (([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]), ([0.5, 0.5, 0, 0], [0.2, 0.2, 0, 0]), ([0.5, 0.5, 0, 0], [0.5, 0.5, 1, 1])):
        assert -1 <= one(a, b) <= 1
    boxes = torch.zeros(1, 4, requires_grad=True)
    giou(boxes, torch.zeros(1, 4)).sum().backward()
    assert boxes.grad.isfinite().all()


def test_box_losses_leave_whole_images_out():
    predicted = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]])
    target = torch.tensor([[0.4, 0.3, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]])
    l1, overlap = box_losses(predicted, target, torch.tensor([0, 1]))
    assert l1.item() == pytest.approx(0.1, rel=1e-5) and overlap.item() == pytest.approx(2 / 3, rel=1e-5)
    assert [loss.item() for loss in box_losses(predicted, target, torch.tensor([1, 1]))] == [0, 0]


# a whole step


def test_losses_of_a_step():
    model = build()
    objective = XvlmPretraining(model, losses=LOSSES, seed=0)
    losses = objective(pairs(), 5)
    assert set(losses) == {"loss", "itc", "itm", "mlm"}
    torch.testing.assert_close(losses["loss"], losses["itc"] + losses["itm"] + losses["mlm"])
    assert set(objective(pairs(regions=True), 5)) == {"loss", *LOSSES, "giou"}
    only = XvlmPretraining(model, losses=("mlm",), seed=0)(pairs(), 5)
    assert set(only) == {"loss", "mlm"} and only["mlm"].item() == pytest.approx(losses["mlm"].item(), rel=1e-5)
    torch.testing.assert_close(objective(pairs(), 5)["loss"], losses["loss"], rtol=0, atol=0)


def test_mlm_and_itm_against_separate_passes():
    """The one fusion batch gives what each pass by itself gives."""
    model, batch = build(), pairs()
    losses, record, negatives = XvlmPretraining(model, losses=LOSSES, seed=0).passes(model, batch, 0)
    with torch.no_grad():
        images = model.encode_image(batch["pixels"]).states
        masked = model.encode_text(batch["masked_ids"], batch["text_mask"]).states
        fused = model.fuse(masked, batch["text_mask"], model.fusion.context(images)).states
        likelihood = model.mlm_logits(fused, batch["masked_positions"]).log_softmax(-1)
        slots = [(i, j) for i in range(4) for j in range(2) if batch["masked_labels"][i, j] >= 0]
        by_hand = -torch.stack([likelihood[i, j, batch["masked_labels"][i, j]] for i, j in slots]).mean()
        torch.testing.assert_close(losses["mlm"], by_hand, **CLOSE)
        for_text, for_image = negatives
        texts = model.encode_text(batch["text_ids"], batch["text_mask"]).states
        rows = [(i, i) for i in range(4)] + [(i, int(for_text[i])) for i in range(4)] + [(int(for_image[i]), i) for i in range(4)]
        logits = torch.cat(
            [
                model.itm_head(model.fuse(texts[t][None], batch["text_mask"][t][None], model.fusion.context(images[i][None])).states[:, 0])
                for t, i in rows
            ]
        )
        torch.testing.assert_close(record["itm_logits"], logits, **CLOSE)
        truth = torch.tensor([1] * 4 + [0] * 8)
        torch.testing.assert_close(losses["itm"], torch.nn.functional.cross_entropy(logits, truth), **CLOSE)


def test_a_single_pair_has_no_negatives():
    batch = {name: value[:1] for name, value in pairs().items()}
    losses = XvlmPretraining(build(), losses=LOSSES, seed=0)(batch, 0)
    assert set(losses) == {"loss", "itc", "mlm"} and losses["itc"].item() == 0
    assert set(distillation(student_of([1, 3]), build())(batch, 0)) == {"loss", "itc", "mlm", "kd"}


def test_the_temperature_is_clamped():
    model = build()
    for start, end in ((0.9, 0.5), (1e-5, 0.001), (0.07, 0.07)):
        with torch.no_grad():
            model.temp.fill_(start)
        XvlmPretraining(model, losses=("itc",), seed=0)(pairs(), 0)
        assert model.temp.item() == pytest.approx(end)


def test_bfloat16_tensors_are_compared_and_counted_in_float32():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(101, 30)
    mask[0, :29] = 0  # 3001 tokens, which bfloat16 cannot count
    student, teacher = (torch.rand(101, 30, 4, generator=generator).bfloat16() for _ in range(2))
    exact = ((student.double() - teacher.double()).square().mean(-1) * mask).sum() / 3001
    loss = hidden_mse([student], [teacher], [(0, 0)], mask)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    maps = [tensor[:, None] for tensor in (student, teacher)]
    loss = attention_mse([maps[0]], [maps[1]], [(0, 0)], mask=mask)
    torch.testing.assert_close(loss, 4 * exact.float(), rtol=1e-5, atol=0)
    boxes, target = torch.rand(401, 4, generator=generator).bfloat16() / 2 + 0.2, torch.rand(401, 4, generator=generator) / 2 + 0.2
    none_whole = torch.zeros(401, dtype=torch.long)
    torch.testing.assert_close(box_losses(boxes, target, none_whole), box_losses(boxes.float(), target, none_whole), rtol=0, atol=0)


# distillation


@pytest.mark.parametrize("regions", [False, True])
def test_a_copy_of_the_teacher_has_nothing_to_learn(regions):
    teacher = build()
    same = build()
    losses = distillation(same, teacher)(pairs(regions), 0)
    assert losses["kd"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(0.6 * sum(losses[name].item() for name in losses if name not in ("loss", "kd")), rel=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_padding_changes_nothing(regions):
    """Longer padding, other ids in it: the same terms; with the published quirk they move."""
    student, teacher = student_of([1, 3]), build()
    batch = pairs(regions)
    longer = dict(batch)
    for name in ("text_ids", "masked_ids", "text_mask"):
        longer[name] = torch.cat([batch[name], torch.zeros(4, 3, dtype=torch.long)], 1)
    objective = distillation(student, teacher)

    def terms(of: dict[str, Any], quirks: DistillationQuirks) -> dict[str, torch.Tensor]:
        return distances(objective, of, (student, teacher), quirks)

    with torch.no_grad():
        short, padded = terms(batch, NO_QUIRKS), terms(longer, NO_QUIRKS)
        names = {term.tap for term in XvlmPretraining.terms}
        assert set(short) == set(padded) == names
        for name in names:
            torch.testing.assert_close(padded[name], short[name], rtol=1e-4, atol=1e-6)
        quirky = terms(longer, DistillationQuirks(unmasked_padding=True))
        moved = {name for name in names if not torch.allclose(quirky[name], padded[name], rtol=1e-3)}
        assert moved == {name for name in names if not name.startswith(("vision", "itm_logits", "itc"))}


def test_teacher_and_student_see_the_same_negatives_unless_the_quirk_is_on(monkeypatch):
    student, teacher = student_of([1, 3]), build()
    seen: list[Any] = []
    original = XvlmPretraining.passes

    def spy(self, model, *arguments, **options):
        result = original(self, model, *arguments, **options)
        seen.append((model is teacher, result[2], result[1]["itm_logits"]))
        return result

    monkeypatch.setattr(XvlmPretraining, "passes", spy)
    different = 0
    for quirk in (False, True):
        objective = distillation(student, teacher, quirks=DistillationQuirks(independent_negatives=quirk))
        for step in range(6):
            seen.clear()
            objective(pairs(), step)
            (first, ours, _), (second, theirs, _) = seen
            assert (first, second) == (False, True)
            equal = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert equal or quirk
            different += not equal
    assert different > 0


def test_the_last_image_state_is_distilled_unless_the_quirk_is_on():
    student, teacher = student_of([1, 3]), build()
    only = DistillWeights(**{name: 0 for name in DistillWeights.model_fields} | {"vision_hidden": 1})
    with_last, without = (
        distillation(student, teacher, kd=1.0, weights=only, quirks=DistillationQuirks(skip_last_hidden=quirk))(pairs(), 0)["kd"]
        for quirk in (False, True)
    )
    hidden = [net.encode_image(pairs()["pixels"], keep=frozenset({"hidden"})).hidden for net in (student, teacher)]
    torch.testing.assert_close(with_last - without, (hidden[0][2] - hidden[1][4]).square().mean(), **CLOSE)
    first = (hidden[0][0] - hidden[1][0]).square().mean() + (hidden[0][1] - hidden[1][2]).square().mean()
    torch.testing.assert_close(without, first, **CLOSE)


@pytest.mark.parametrize("vision", [[1, 3], [0, 3], [2, 3], [3], [0, 1], [0, 1, 2]])
def test_region_steps_for_any_choice_of_vision_layers(vision):
    """A student whose regions begin elsewhere than the teacher's is compared on whole images there."""
    student, teacher = student_of(vision), build()
    losses = distillation(student, teacher)(pairs(regions=True), 0)
    assert losses["kd"].isfinite() and losses["kd"] > 0
    losses["loss"].backward()
    other = build(5, vision_layers=2, local_attention_depth=1)
    assert distillation(other, build(local_attention_depth=3))(pairs(regions=True), 0)["kd"].isfinite()


def test_pruned_students_are_compared_on_the_heads_they_have():
    teacher = build()
    kept = {"vision.0.head": "1", "vision.1.head": "", "text.0.head": "1", "fusion.0.cross_head": "0", "fusion.1.head": ""}
    student = build(kept=kept)
    losses = distillation(student, teacher)(pairs(), 0)
    assert losses["kd"].isfinite()
    losses["loss"].backward()


@pytest.mark.parametrize("tower", ["vision", "text", "fusion"])
def test_a_tower_without_layers_has_no_terms(tower):
    empty = {f"{tower}_layers": 0, "local_attention_depth": 0 if tower == "vision" else 2}
    for one, other in ((build(5, **empty), build()), (build(), build(5, **empty))):
        objective = distillation(one, other)
        for batch in (pairs(), pairs(regions=True)):
            losses = objective(batch, 0)
            losses["loss"].backward()
            assert losses["kd"].isfinite() and losses["kd"] > 0
        terms = distances(objective, pairs(), (one, other))
        assert not any(tap.startswith(tower) for tap in terms) and "mlm_logits" in terms


def test_gradients_reach_the_student_only():
    student, teacher = student_of([1, 3]), build()
    objective = distillation(student, teacher).train()
    assert student.training and not teacher.training
    assert not any("teacher" in name for name, _ in objective.named_parameters())
    objective(pairs(regions=True), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    missing = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert missing == set()


def test_weights_count_and_switch_off():
    student, teacher = student_of([1, 3]), build()
    zero = dict.fromkeys(DistillWeights.model_fields, 0.0)
    batch = pairs()
    everything = distillation(student, teacher, kd=1.0)(batch, 0)["kd"]
    parts, compared = [], {term.weight for term in XvlmPretraining.terms}
    assert set(DistillWeights.model_fields) - compared == {"lm_logits", *(name for name in zero if name.startswith("decoder"))}
    for name in filter(compared.__contains__, DistillWeights.model_fields):
        weights = DistillWeights(**zero | {name: 2.0})
        parts.append(distillation(student, teacher, kd=1.0, weights=weights)(batch, 0)["kd"] * (0.1 if name == "vision_hidden" else 1) / 2)
        assert parts[-1] > 0, name
    torch.testing.assert_close(torch.stack(parts).sum(), everything, **CLOSE)
    assert distillation(student, teacher, weights=DistillWeights(**zero)).want == frozenset()


def test_temperature_of_the_logit_terms():
    student, teacher = student_of([1, 3]), build()
    weights = DistillWeights(**dict.fromkeys(DistillWeights.model_fields, 0.0) | {"itm_logits": 1.0, "mlm_logits": 1.0})

    def kd(**options: Any) -> float:
        return distillation(student, teacher, kd=1.0, weights=weights, **options)(pairs(), 0)["kd"].item()

    assert kd(temperature=3.0, scale_by_temperature=True) == pytest.approx(9 * kd(temperature=3.0), rel=1e-4)
    assert kd(temperature=3.0) < kd(temperature=1.0)


# the task


def vqa_batch() -> dict[str, Any]:
    batch = pairs()
    return {
        "pixels": batch["pixels"][:2],
        "image_index": torch.tensor([0, 0, 1, 1]),
        "question_ids": batch["text_ids"],
        "question_mask": batch["text_mask"],
        "answer_ids": torch.tensor([[1, 7, 2, 0], [1, 8, 9, 2], [1, 5, 2, 0], [1, 6, 2, 0], [1, 7, 2, 0]]),
        "answer_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]),
        "answer_index": torch.tensor([0, 0, 1, 2, 3]),
        "answer_weights": torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0]),
    }


def answerer(**changes: Any) -> Any:
    return build(**{"decoder_layers": 2, "heads": [], **changes})


def vqa(student: Any, teacher: Any, quirks: DistillationQuirks = NO_QUIRKS, kd: float = 0.4, weights: TaskWeights | None = None) -> Any:
    hard = Generation(student)
    return distilled(hard, teacher, method(kd=kd, weights=weights or TaskWeights(), quirks=quirks)) if teacher else hard


def test_the_task_loss_alone_and_with_a_teacher():
    student, teacher = answerer(seed=4, vision_layers=2, decoder_layers=1), answerer()
    alone = vqa(student, None)(vqa_batch(), 0)
    assert set(alone) == {"loss", "task"} and alone["loss"] == alone["task"]
    losses = vqa(student, teacher)(vqa_batch(), 0)
    torch.testing.assert_close(losses["loss"], 0.6 * losses["task"] + 0.4 * losses["kd"], **CLOSE)
    torch.testing.assert_close(losses["task"], alone["task"], **CLOSE)
    assert vqa(answerer(), answerer())(vqa_batch(), 0)["kd"].item() == pytest.approx(0, abs=1e-5)
    assert set(vqa(student, teacher, kd=0.0)(vqa_batch(), 0)) == {"loss", "task"}


@pytest.mark.parametrize("tower", ["vision", "text", "fusion"])
def test_a_task_with_a_tower_without_layers(tower):
    empty = {f"{tower}_layers": 0, "local_attention_depth": 0 if tower == "vision" else 2}
    for one, other in ((answerer(seed=4, **empty), answerer()), (answerer(), answerer(seed=4, **empty))):
        losses = vqa(one, other)(vqa_batch(), 0)
        losses["loss"].backward()
        assert losses["kd"].isfinite() and losses["kd"] > 0


def test_without_fusion_layers_no_decoder_is_made():
    with pytest.raises(BadInput, match="without fusion layers"):
        build(fusion_layers=0).gain("answer", answerer())


def test_task_padding_and_quirks():
    student, teacher = answerer(seed=4, vision_layers=2), answerer()
    batch = vqa_batch()
    longer = dict(batch)
    for name in ("question_ids", "question_mask", "answer_ids", "answer_mask"):
        longer[name] = torch.cat([batch[name], torch.zeros(len(batch[name]), 2, dtype=torch.long)], 1)
    short, padded = (vqa(student, teacher)(of, 0) for of in (batch, longer))
    torch.testing.assert_close(padded["kd"], short["kd"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(padded["task"], short["task"], **CLOSE)
    quirky = vqa(student, teacher, DistillationQuirks(unmasked_padding=True))
    assert not torch.allclose(quirky(longer, 0)["kd"], quirky(batch, 0)["kd"], rtol=1e-3)
    zero = TaskWeights(**dict.fromkeys(TaskWeights.model_fields, 0.0) | {"vision_hidden": 1.0})
    hidden = [net.run(batch, {"vision.hidden"})["vision.hidden"] for net in (student, teacher)]
    dropped = [vqa(student, teacher, DistillationQuirks(skip_last_hidden=quirk), 1.0, zero)(batch, 0)["kd"] for quirk in (False, True)]
    torch.testing.assert_close(dropped[0] - dropped[1], (hidden[0][2] - hidden[1][4]).square().mean(), **CLOSE)


# other teachers and students


def test_a_teacher_of_another_width_is_met_through_a_projection_that_learns_and_is_not_deployed():
    student, teacher = build(), build(1, vision_width=24, vision_heads=4)
    hard = XvlmPretraining(student, losses=("itc",), seed=0)
    rows = tuple(term for term in hard.terms if term.weight == "vision_hidden")
    maps, widen = tower_maps(student.config, teacher.config), torch.nn.Linear(16, 24)
    objective = Distilled(
        hard, LiveTeacher(hard, teacher), rows, kd=1.0, weights={"vision_hidden": 1.0}, maps=maps, projections={"vision.hidden": widen}
    )
    losses = objective(pairs(), 0)
    losses["loss"].backward()
    hidden = [net.encode_image(pairs()["pixels"], keep=frozenset({"hidden"})).hidden for net in (student, teacher)]
    expected = sum((widen(ours) - theirs).square().mean() for ours, theirs in zip(*hidden, strict=True))
    torch.testing.assert_close(losses["kd"], expected, **CLOSE)
    assert widen.weight.grad is not None and widen.weight.grad.abs().sum() > 0
    assert any(name.startswith("projections.") for name in objective.state_dict())
    assert student.state_dict().keys() == build().state_dict().keys()


def test_a_teacher_may_be_a_store_of_what_was_said_before():
    student = build()
    hard = XvlmPretraining(student, losses=("itc",), seed=0)
    rows = tuple(term for term in hard.terms if term.weight == "itc_logits")
    with torch.no_grad():
        said = hard.passes(student, pairs(), 0).record["itc_logits"]

    def stored(batch: dict[str, Any], step: int, want: Any, drawn: Any) -> Record:
        assert want == {"itc_logits"}
        return Record(itc_logits=said + 1.0 * torch.eye(4))

    losses = Distilled(hard, stored, rows, kd=0.5, weights={"itc_logits": 1.0}, maps={})(pairs(), 0)
    assert losses["kd"] > 0
    torch.testing.assert_close(losses["loss"], (losses["itc"] + losses["kd"]) / 2, **CLOSE)


def test_the_settings_know_which_losses_a_weight_needs():
    needed: dict[str, set[str]] = {}
    for term in (*XvlmPretraining.terms, *BlipPretraining.terms):
        needed.setdefault(term.weight, set()).add(term.loss)
    assert {name: set(losses) for name, losses in PASSES.items()} == {name: found for name, found in needed.items() if found != {""}}
    assert set(needed) == set(DistillWeights.model_fields)
    assert {term.weight for term in Generation.terms} == set(TaskWeights.model_fields)
    assert set(RetrievalWeights.model_fields) == {name for name in needed if not needed[name] & {"lm"} and name != "mlm_logits"}
