"""What a training step must not do twice, or at all: the teacher's passes, vision passes, text passes, maps, copies of keys and values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PRUNE, SHAPES, TRAIN, run_stage
from safetensors.torch import load_file
from test_training import stop_at

from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.data.kinds.questions import QUESTIONS, vqa_batch
from efficientvlm.data.opening import open_data
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.families.towers.attention import Sharing, attend
from efficientvlm.families.towers.parts import quick_gelu, take
from efficientvlm.loaded import load
from efficientvlm.objectives.efficientvlm import distilled
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.methods import DistillationQuirks, DistillWeights, RetrievalWeights, TaskWeights

TERMS = {"prune": TaskWeights, "finetune": TaskWeights, "distill": DistillWeights}
NO_QUIRKS = DistillationQuirks()


def only(weights: Any, *names: str) -> Any:
    return weights(**{name: float(name in names) for name in weights.model_fields})


def questions(loaded: Any, step: int = 0, images: int = 4, **settings: Any) -> dict[str, Any]:
    source = open_data(QUESTIONS, SHAPES, "train", image_size=64)
    return vqa_batch([source[i] for i in range(images)], Texts(loaded.tokenizer), seed=0, step=step, **settings)


def method(**changes: Any) -> Any:
    """Settings of distillation."""
    usual = {"kd": 0.4, "quirks": NO_QUIRKS, "temperature": 1.0, "scale_by_temperature": False, "cache_teacher": False}
    return SimpleNamespace(**{**usual, **changes})


def answering(chain: Path, weights: TaskWeights, **settings: Any) -> tuple[Any, Any, Any]:
    student, teacher = load(str(chain / "pruned")), load(str(chain / "teacher"))
    hard = Generation(student.model.train())
    return distilled(hard, teacher.model, method(weights=weights, **settings)), student, teacher


def general(chain: Path, weights: DistillWeights, losses: tuple[str, ...] = ("itc", "itm", "mlm"), **settings: Any) -> Any:
    student, teacher = load(str(chain / "student")), load(str(chain / "init"))
    hard = XvlmPretraining(student.model.train(), losses=losses, seed=0)
    return distilled(hard, teacher.model, method(weights=weights, **settings)), student, teacher


def watch(model: Any, *parts: str) -> tuple[Counter[str], dict[str, list[int]]]:
    """How often each part of `model` runs, and on how many rows."""
    calls: Counter[str] = Counter()
    rows: dict[str, list[int]] = {part: [] for part in parts}

    def count(part: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            calls[part] += 1
            rows[part].append(len(args[0]))

        return hook

    for part in parts:
        model.get_submodule(part).register_forward_pre_hook(count(part))
    return calls, rows


def test_an_image_and_a_question_are_encoded_once_a_step(chain: Path) -> None:
    objective, student, teacher = answering(chain, TaskWeights())
    student.model.config.dropout = 0.0
    batch = questions(student)
    batch["question_texts"][1] = batch["question_texts"][0]
    for model in (student.model, teacher.model):
        calls, rows = watch(model, "vision", "text", "fusion", "decoder")
        objective(batch, 0)["loss"].backward()
        assert calls == dict.fromkeys(rows, 1)
        assert rows["vision"] == [4] and rows["fusion"] == rows["decoder"] == [24]
        assert rows["text"] == [len(batch["distinct_questions"])] and len(batch["distinct_questions"]) < 24


def test_a_distinct_question_stands_for_all_that_ask_it(chain: Path) -> None:
    loaded = load(str(chain / "teacher"))
    batch = questions(loaded, images=8)
    assert torch.equal(batch["question_ids"][batch["distinct_questions"]][batch["distinct_index"]], batch["question_ids"])
    plain = {name: value for name, value in batch.items() if not name.startswith("distinct")}
    want = ["text.hidden", "text.self_attention", "fusion.cross_attention", "decoder.cross_attention"]
    with torch.no_grad():
        one, other = (loaded.model.run(each, want) for each in (batch, plain))
    for name in want:
        for a, b in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["logits"], other["logits"], rtol=1e-5, atol=1e-5)


def test_dropout_falls_on_every_question_by_itself(chain: Path) -> None:
    loaded = load(str(chain / "teacher"))
    assert loaded.model.config.dropout > 0
    _, rows = watch(loaded.model.train(), "text")
    loaded.model.run(questions(loaded))
    assert rows["text"] == [24]


def test_no_map_is_made_that_no_term_compares(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append((args[5] if len(args) > 5 else kwargs.get("maps")) is not None)
        return attend(*args, **kwargs)

    monkeypatch.setattr("efficientvlm.families.towers.attention.attend", spy)
    hidden = [name for name in TaskWeights.model_fields if not name.endswith("attention")]
    objective, student, _ = answering(chain, only(TaskWeights, *hidden))
    objective(questions(student), 0)
    assert made and not any(made)
    made.clear()
    objective, student, _ = answering(chain, only(TaskWeights, "logits", "vision_self_attention"))
    objective(questions(student), 0)
    layers = [load(str(chain / name)).model.config.vision_layers for name in ("pruned", "teacher")]
    assert layers == [2, 4] and sum(made) == 2 + 2  # of the teacher only those that one of the student is compared with


def test_a_map_of_one_layer_leaves_gaps_for_the_others(chain: Path) -> None:
    loaded = load(str(chain / "teacher"))
    batch = questions(loaded)
    whole, part = (loaded.model.run(batch, want) for want in (["vision.self_attention"], ["vision.self_attention.2"]))
    kept = part["vision.self_attention"]
    assert [tensor.numel() > 0 for tensor in kept] == [False, False, True, False]
    torch.testing.assert_close(kept[2], whole["vision.self_attention"][2], rtol=1e-4, atol=1e-6)
    with pytest.raises(BadInput, match=r"vision\.self_attention\.x"):
        loaded.model.run(batch, ["vision.self_attention.x"])


@pytest.mark.parametrize("term", ["text_hidden", "vision_hidden", "fusion_hidden"])
def test_a_teacher_decodes_no_answers_that_no_term_compares(chain: Path, term: str) -> None:
    objective, student, teacher = answering(chain, only(TaskWeights, term))
    calls, _ = watch(teacher.model, "decoder")
    losses = objective(questions(student), 0)
    assert not calls and losses["kd"] > 0


def test_a_teacher_makes_only_the_passes_that_are_compared(chain: Path) -> None:
    batch = None
    for terms, texts, pairs in ((["vision_hidden"], 4, None), (["itm_logits"], 4, 12), (["mlm_logits"], 8, 4), (["fusion_hidden"], 8, 16)):
        objective, student, teacher = general(chain, only(DistillWeights, *terms))
        source = open_data(PAIRS, SHAPES, "train", image_size=64)
        batch = pair_batch([source[i] for i in range(4)], Texts(student.tokenizer), seed=0, step=0)
        _, rows = watch(teacher.model, "vision", "text", "fusion")
        losses = objective(batch, 0)
        assert rows == {"vision": [4], "text": [texts], "fusion": [] if pairs is None else [pairs]}, terms
        assert losses["kd"] > 0 and set(losses) == {"loss", "itc", "itm", "mlm", "kd"}


@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2], [2, 0, 1, 0, 2, 1, 1]])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_share_keys_attend_as_with_copies_of_them(rows: list[int], masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientvlm.families.towers.attention.PADDING", 9.0)
    from efficientvlm.families.towers.attention import Attention

    torch.manual_seed(0)
    index = torch.tensor(rows)
    attention = Attention(8, 6, 2, 4)
    x, states = torch.randn(len(rows), 5, 8), torch.randn(3, 7, 6, requires_grad=True)
    mask = (torch.rand(len(rows), 1, 1, 7) > 0.3).index_fill(3, torch.tensor(0), True) if masked else None
    results = []
    for sharing in (None, Sharing.of(index, 3)):
        maps: list[torch.Tensor] = []
        out = attention(x, attention.project(states), mask, index, maps, sharing)
        fused = attention(x, attention.project(states), mask, index, None, sharing)
        torch.testing.assert_close(out, fused, rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(out.square().sum(), states)
        results.append((out, maps[0], gradient))
    for copied, shared in zip(*results, strict=True):
        torch.testing.assert_close(copied, shared, rtol=1e-5, atol=1e-6)


def test_rows_are_not_shared_where_most_slots_would_be_empty() -> None:
    assert Sharing.of(torch.tensor([0, 0, 0, 0, 1]), 4) is None
    whole = Sharing.of(torch.tensor([0, 0, 1, 1]), 2)
    assert whole is not None and whole.place is None


def test_rows_that_are_taken_and_their_gradient() -> None:
    x = torch.randn(3, 4, 2, requires_grad=True)
    rows = torch.tensor([2, 0, 2, 2])
    weights = torch.randn(4, 2, 4).transpose(1, 2)
    assert torch.equal(take(x, rows), x[rows])
    (ours,) = torch.autograd.grad((take(x, rows) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((x.index_select(0, rows) * weights).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_quick_gelu_and_its_gradient() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    plain = x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(quick_gelu(x), plain)
    with torch.no_grad():
        torch.testing.assert_close(quick_gelu(x), plain)
    (ours,) = torch.autograd.grad(quick_gelu(x).sum(), x)
    (theirs,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(ours, theirs)


def cached_settings(chain: Path, name: str) -> dict[str, Any]:
    retrieval = name == "retrieval"
    terms, kept = (RetrievalWeights, "itc_logits") if retrieval else (TERMS[name], "itc_logits" if name == "distill" else "logits")
    own: dict[str, dict[str, Any]] = {
        "distill": {"model": str(chain / "student"), "teacher": str(chain / "init"), "data": SHAPES, "region_probability": 0},
        "prune": PRUNE(chain),
        "finetune": {"model": str(chain / "pruned"), "teacher": str(chain / "teacher"), "data": SHAPES},
    }
    own["retrieval"] = {**own["distill"], "task": "retrieval"}
    del own["retrieval"]["region_probability"]
    weights = {"weights": only(terms, kept).model_dump()}
    return {**own[name], **TRAIN, "limit": 8, "log_every": 1, "augment": "none", **weights}


@pytest.mark.parametrize("name", ["distill", "prune", "finetune", "retrieval"])
def test_a_cached_teacher_teaches_the_same_over_epochs_and_interruptions(
    name: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cached_settings(chain, name)  # 6 steps are 3 epochs
    stage = "finetune" if name == "retrieval" else name
    run_stage(stage, out=str(tmp_path / "plain"), **settings)
    settings["cache_teacher"] = True
    run_stage(stage, out=str(tmp_path / "cached"), **settings)
    stop_at(monkeypatch, [3])
    with pytest.raises(Interrupted):
        run_stage(stage, out=str(tmp_path / "broken"), **settings)
    run_stage(stage, out=str(tmp_path / "broken"), **settings)
    plain, *others = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "cached", "broken"))
    for other in others:
        assert plain.keys() == other.keys()
        assert all((plain[key] - other[key]).abs().max() < 2e-6 for key in plain)


def test_a_cached_teacher_sees_a_sample_once(chain: Path) -> None:
    objective, student, teacher = answering(chain, only(TaskWeights, "logits"), cache_teacher=True)
    plain, *_ = answering(chain, only(TaskWeights, "logits"))
    student.model.eval(), plain.model.eval()
    _, rows = watch(teacher.model, "vision", "decoder")
    asked = questions(student)["question_texts"]
    for step in (0, 0, 1):
        batch = questions(student, step)
        torch.testing.assert_close(objective(batch, step)["kd"], plain(batch, step)["kd"], rtol=1e-5, atol=1e-6)
    assert questions(student, 1)["question_texts"] != asked
    assert len(rows["decoder"]) == 2 and rows["decoder"][0] == 24 > rows["decoder"][1] > 0


def test_a_cached_teacher_sees_a_picture_and_a_caption_once(chain: Path) -> None:
    objective, student, teacher = general(chain, only(DistillWeights, "itc_logits"), cache_teacher=True)
    plain, *_ = general(chain, only(DistillWeights, "itc_logits"))
    objective.eval(), plain.eval()
    _, rows = watch(teacher.model, "vision", "text", "fusion")
    source, texts = open_data(PAIRS, SHAPES, "train", image_size=64), Texts(student.tokenizer)
    for step, images in enumerate((range(4), range(4), range(2, 6))):
        batch = pair_batch([source[i] for i in images], texts, seed=0, step=step, augment_kind="none")
        torch.testing.assert_close(objective(batch, step)["kd"], plain(batch, step)["kd"], rtol=1e-5, atol=1e-6)
    assert rows["vision"] == [4, 2] and rows["fusion"] == []


REFUSED = [
    ("finetune", {"augment": "light"}, "augment=none"),
    ("finetune", {"data": "stream:data.jsonl"}, "data is no stream"),
    ("finetune", {"teacher": None}, "there is no teacher"),
    ("finetune", {"weights": {}}, r"weights\.text_hidden=0"),
    ("finetune", {"quirks": {"unmasked_padding": True}}, "unmasked_padding=false"),
    ("finetune", {"task": "retrieval", "weights": {}}, r"weights\.itm_logits=0"),
    ("prune", {"weights": {"logits": 1}}, r"weights\.decoder_self_attention=0"),
    ("distill", {"region_probability": 0.5}, "region_probability=0"),
    ("distill", {"weights": {"itc_logits": 1}}, r"weights\.mlm_logits=0"),
]


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        (["itm", "mlm"], {"itc_logits": 1}, "itc_logits needs itc among"),
        (
            ["itc"],
            {"itm_logits": 2, "mlm_logits": 2, "vision_hidden": 2, "fusion_hidden": 2},
            "itm_logits needs itm, mlm.*, fusion_hidden needs",
        ),
        (["itc", "mlm"], {"itc_logits": 1, "fusion_hidden": 2, "itm_logits": 0}, None),
        (["box"], {}, None),
    ],
)
def test_a_weight_needs_the_loss_in_whose_pass_its_term_is_compared(
    losses: list[str], weights: dict[str, float], message: str | None
) -> None:
    given = {"model": "m", "teacher": "t", "data": "d", "out": "o", "losses": losses, "weights": weights}
    if message is None:
        parsed = stage_settings("distill", given)
        stage_settings("distill", parsed.model_dump())
    else:
        with pytest.raises(BadInput, match=message):
            stage_settings("distill", given)


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_a_teacher_is_not_cached_where_it_would_say_something_else(name: str, changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"model": "m", "teacher": "t", "data": "shapes", "out": "o", "augment": "none", "cache_teacher": True}
    good |= {"weights": only(TERMS[name], "itc_logits" if name == "distill" else "logits").model_dump()}
    good |= {"region_probability": 0} if name == "distill" else {}
    assert stage_settings(name, good).cache_teacher
    with pytest.raises(BadInput, match=message):
        stage_settings(name, {**good, **changes})
    assert not stage_settings(name, {**good, **changes, "cache_teacher": False}).cache_teacher


def test_a_teacher_of_retrieval_is_cached_for_contrast() -> None:
    weights = only(RetrievalWeights, "itc_logits").model_dump()
    given = {"model": "m", "teacher": "t", "data": "d", "out": "o", "task": "retrieval", "augment": "none", "weights": weights}
    assert stage_settings("finetune", {**given, "cache_teacher": True}).cache_teacher
