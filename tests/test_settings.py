"""What a setting can be: finite, of a size that means something, and text that can be written."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest
from pydantic import BaseModel, Field

from efficientvlm.errors import MOST_QUOTED, BadInput, number_of, printable, shorten
from efficientvlm.settings.common import Learning, Taught
from efficientvlm.settings.compose import asides, of, stage_settings, tasks_of, variants
from efficientvlm.settings.methods import METHODS, GateQuirks
from efficientvlm.settings.stages import STAGES
from efficientvlm.settings.tasks import TASKS

NEEDED = {
    "out": "o",
    "model": "m",
    "data": "d",
    "models": ["m"],
    "format": "onnx",
    "teacher": "t",
    "bench": "b",
    "side": "images",
    "sentences": "s",
    "images": "i",
}


def needed(stage: str) -> dict[str, Any]:
    given: dict[str, Any] = {name: NEEDED[name] for name in of(stage, {}).lacking({})}
    return given | ({"models": {"a": "m"}} if stage == "report" else {})


def numbers() -> list[tuple[str, str | None, str]]:
    """Every setting of every stage that holds a float somewhere, groups under dotted names."""

    def inside(model: type[BaseModel], prefix: str) -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += inside(kind, f"{prefix}{name}.")
            elif "float" in str(kind):
                names.append(prefix + name)
        return names

    return [(stage, task, name) for stage in STAGES for task in tasks_of(stage) or [None] for name in inside(of(stage, {"task": task}), "")]


def refused(stage: str, values: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as error:
        stage_settings(stage, {**needed(stage), **values})
    return error.value.why


def test_settings_are_those_of_stage_task_and_method() -> None:
    vqa, pairs = (stage_settings("finetune", {**needed("finetune"), "task": task}) for task in ("vqa", "retrieval"))
    assert (vqa.kd, pairs.kd) == (0.4, 0.5) and vqa.rank_top == 128 and not hasattr(pairs, "rank_top")
    assert vqa.quirks.model_dump().keys() - pairs.quirks.model_dump().keys() == {"double_sep", "first_token_twice", "smoothed_ranking"}
    pruning = stage_settings("prune", needed("prune") | {"quirks": {"mask_offsets": True}})
    assert pruning.quirks.mask_offsets and not pruning.quirks.epoch_step and not pruning.quirks.double_sep
    assert type(vqa) is of("finetune", {}) and isinstance(vqa, STAGES["finetune"])
    assert "rank_top" in asides("finetune") and not asides("no stage of ours")


@pytest.mark.parametrize(
    ("stage", "given", "problems"),
    [
        ("finetune", {"task": "retrieval", "answers": "a"}, ["answers: it belongs to task vqa"]),
        ("finetune", {"task": "retrieval", "weights": {"decoder_hidden": 1}}, ["weights.decoder_hidden: it belongs to task vqa"]),
        ("finetune", {"quirks": {"epoch_step": True}}, ["quirks.epoch_step: unknown key"]),
        ("finetune", {"schedule": "cosine", "decay": 0.5}, ["decay: it goes with schedule exponential"]),
        ("eval", {"rerank": 3}, ["rerank: it belongs to task retrieval"]),
        ("distill", {"los": ["itc"]}, ["los: unknown key, did you mean losses?"]),
        (
            "prune",
            {"task": "vqq", "answers": "a", "sparsity": 3},
            ["task: input should be 'pretraining', 'vqa'", "sparsity: input"],
        ),
        ("prune", {"task": ["vqa"]}, ["task: input should be"]),
        (
            "prune",
            {"task": "none", "method": "random", "teacher": "t", "kd": 1},
            ["teacher: no method of dist", "kd: it belongs to task pretraining"],
        ),
        ("finetune", {"distillation": "dim", "kd": 3, "answers": 1}, ["answers: input should be", "distillation: input should be"]),
    ],
)
def test_a_setting_of_another_task_is_unknown_and_it_is_said_whose_it_is(stage: str, given: dict[str, Any], problems: list[str]) -> None:
    found = refused(stage, {"data": "d", **given}).strip().splitlines()
    assert [line.strip()[: len(problem)] for line, problem in zip(found, problems, strict=True)] == problems


class Counting(Learning):
    digits: int = Field(3, ge=1)


class Chorus(Taught):
    voices: int = 2
    quirks: GateQuirks = Field(default_factory=GateQuirks)


def test_a_task_and_a_method_are_one_entry_of_a_table_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "counting", {"finetune": Counting, "prune": Counting})
    given = needed("finetune") | {"task": "counting", "digits": 4}
    assert stage_settings("finetune", given).digits == 4
    assert "teacher: no method of distillation knows" in refused("finetune", {**given, "teacher": "t"})
    assert "digits: it belongs to task counting" in refused("finetune", {"digits": 4})
    assert any(kind.has(["digits"]) for kind in variants("prune"))
    learnt = ", ".join(f"'{task}'" for task, stages in TASKS.items() if "finetune" in stages and task != "counting")
    assert f"input should be {learnt} or 'counting'" in refused("finetune", {"task": 0})
    monkeypatch.setitem(METHODS, "chorus", {"counting": Chorus, "vqa": Chorus})
    sung = stage_settings("finetune", {**given, "teacher": "t", "voices": 5})
    assert (sung.distillation, sung.voices, sung.digits) == ("chorus", 5, 4)
    asked = stage_settings("finetune", needed("finetune") | {"distillation": "chorus", "quirks": {"epoch_step": True, "double_sep": True}})
    assert asked.voices == 2 and not hasattr(asked, "kd") and asked.quirks.epoch_step and asked.quirks.double_sep
    assert "voices: it belongs to distillation chorus" in refused("finetune", {"voices": 3})
    assert "kd: it belongs to distillation efficientvlm or distillation dlip" in refused("finetune", {"distillation": "chorus", "kd": 1})
    methods = {task: sum(task in tasks for tasks in METHODS.values()) for task, stages in TASKS.items() if "finetune" in stages}
    assert methods["vqa"] == 3 and len(list(variants("finetune"))) == sum(max(1, known) for known in methods.values())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, "1e999", "inf", "nan"])
def test_no_number_is_infinite_or_none(value: object) -> None:
    assert len(numbers()) > 100
    for stage, task, name in numbers():
        group, _, rest = name.partition(".")
        given: Any = {"vision": value} if group == "tower_sparsity" else value
        why = refused(stage, {group: {rest: given} if rest else given} | ({"task": task} if task else {}))
        assert name in why.replace("tower_sparsity.vision", "tower_sparsity"), (stage, name)


def test_numbers_in_free_groups_are_finite_too() -> None:
    assert "no finite number" in refused("init", {"settings": {"a": [{"b": math.inf}]}})
    assert "of that size" in refused("init", {"settings": {"a": 10**5000}})
    assert "a date is neither" in refused("init", {"settings": {"a": datetime.date(2001, 1, 1)}})
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    assert "levels deep" in refused("init", {"settings": {"a": nested}})


@pytest.mark.parametrize("stage", STAGES)
def test_text_that_is_no_utf8_is_refused_in_every_setting(stage: str) -> None:
    for name, field in of(stage, {}).model_fields.items():
        kind = str(field.annotation)
        if name == "columns" or "dict" in kind:
            assert "UTF-8" in refused(stage, {name: {"a": "b\udcff"}})
            assert "UTF-8" in refused(stage, {name: {"a\udcff": "b"}})
        elif "list" in kind:
            assert "UTF-8" in refused(stage, {name: ["d\udcff"]})
        elif "str" in kind:
            assert f"{name}: 'd\\udcff.jsonl'" in refused(stage, {name: "d\udcff.jsonl"})


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("bench", "threads", 2**63),
        ("bench", "batch_sizes", [2**40]),
        ("bench", "batch_sizes", [0]),
        ("init", "image_size", 2**31),
        ("init", "vocab_size", 10**12),
        ("finetune", "seed", 2**63),
        ("finetune", "max_steps", "9" * 30),
        ("finetune", "epochs", 1e300),
        ("shrink", "layers", {"vision": 10**20}),
    ],
)
def test_numbers_that_would_fill_the_memory_are_refused(stage: str, name: str, value: object) -> None:
    assert name in refused(stage, {name: value})


def test_what_is_shown_obeys_nothing_and_is_short() -> None:
    assert printable("\x1b]0;owned\x07 caf\u00e9 \u9ec4\n\u202e\udcff\x9b") == "\\x1b]0;owned\\x07 caf\u00e9 \u9ec4\n\\u202e\\udcff\\x9b"
    assert shorten("a\nb") == "a b" and len(shorten("x" * 10**6)) == MOST_QUOTED
    assert shorten("a" * 150 + "b" * 150).startswith("aaa") and shorten("a" * 150 + "b" * 150).endswith("bbb")
    error = BadInput("x" * 10**6, "\n".join(["y z " * 10**5] * 1000), "caf\x1b")
    assert len(error.what) == MOST_QUOTED and len(error.why) < 60_000 and "and 950 more" in error.why and error.fix == "caf\\x1b"


def test_one_thing_is_not_called_several() -> None:
    assert [number_of(count, "text") for count in (0, 1, 2000)] == ["0 texts", "1 text", "2,000 texts"]
    assert [number_of(count, "class has", "classes have") for count in (1, 2)] == ["1 class has", "2 classes have"]


def test_the_target_is_full_within_the_gate_phase() -> None:
    assert stage_settings("prune", {**needed("prune"), "sparsity_hold": 0.4, "sparsity_warmup": 0.6}).sparsity_warmup == 0.6
    with pytest.raises(BadInput, match="longer than the gate phase"):
        stage_settings("prune", {**needed("prune"), "sparsity_hold": 0.6})
