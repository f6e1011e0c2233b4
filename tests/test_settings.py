"""What a setting can be: finite, of a size that means something, and text that can be written."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest
from pydantic import BaseModel

from efficientvlm.errors import MOST_QUOTED, BadInput, printable, shorten
from efficientvlm.settings.base import parse
from efficientvlm.settings.stages import STAGES

NEEDED = {"out": "o", "model": "m", "data": "d", "models": ["m"], "format": "onnx", "teacher": "t", "bench": "b"}


def needed(stage: str) -> dict[str, Any]:
    model = STAGES[stage]
    given = {name: NEEDED[name] for name, field in model.model_fields.items() if field.is_required()}
    return given | ({"models": {"a": "m"}} if stage == "report" else {})


def numbers() -> list[tuple[str, str]]:
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

    return [(stage, name) for stage, model in STAGES.items() for name in inside(model, "")]


def refused(stage: str, values: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as error:
        parse(STAGES[stage], {**needed(stage), **values}, stage)
    return error.value.why


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, "1e999", "inf", "nan"])
def test_no_number_is_infinite_or_none(value: object) -> None:
    assert len(numbers()) > 100
    for stage, name in numbers():
        group, _, rest = name.partition(".")
        given: Any = {"vision": value} if group == "tower_sparsity" else value
        why = refused(stage, {group: {rest: given} if rest else given})
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
    for name, field in STAGES[stage].model_fields.items():
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
