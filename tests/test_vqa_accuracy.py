"""VQAv2's accuracy: normalised answers, ten annotators of whom one is left out, and a result that says which measure it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from conftest import run_stage
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_files import jsonl, pictures
from test_data_forms import vqav2

from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.opening import open_data
from efficientvlm.errors import BadInput
from efficientvlm.settings.compose import stage_settings
from efficientvlm.tasks.ranking import evaluate, soft_accuracy
from efficientvlm.tasks.vqa import answer_list
from efficientvlm.tasks.vqa_answers import normalised


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("the  red\tcar\n", "red car"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("it's", "it's"),
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("$5.50", "$5.50"),
        ("U.S.A.", "usa"),
        ("5.", "5"),
        ("what?!", "what"),
        ("a", ""),
    ],
)
def test_answers_are_normalised(answer: str, expected: str) -> None:
    assert normalised(answer) == expected == normalised(expected)


def by_definition(guess: str, given: list[str]) -> float:
    scores = [min(1.0, sum(answer == guess for answer in rest) / 3) for rest in itertools.combinations(given, len(given) - 1)]
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=10, max_size=10))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_soft_accuracy_is_its_definition(given_answers: list[str]) -> None:
    weights = [(answer, given_answers.count(answer) / 10) for answer in dict.fromkeys(given_answers)]
    for guess in ("a", "b", "nothing"):
        assert soft_accuracy(guess, weights, 10) == pytest.approx(by_definition(guess, given_answers), abs=1e-12)


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_steps_of_soft_accuracy(same: int, expected: float) -> None:
    assert soft_accuracy("a", [("a", same / 10), ("b", 1 - same / 10)], 10) == pytest.approx(expected)


def batch(*questions: tuple[list[str], str]) -> dict[str, Any]:
    counted = [[(answer, given.count(answer) / len(given)) for answer in dict.fromkeys(given)] for given, _ in questions]
    return {
        "answer_texts": counted,
        "annotators": [len(given) if len(given) > 1 else 0 for given, _ in questions],
        "guesses": [guess for _, guess in questions],
    }


def test_each_question_has_the_measure_of_its_kind() -> None:
    ten = (["Two", "2", "the 2", *["3"] * 7], "two")  # three annotators mean 2
    few = (["boat", "boat", "ship"], "boat")
    one = (["Red"], "red")
    result = evaluate(lambda b: b["guesses"], [batch(ten), batch(few, one)], lambda text: text.lower())
    assert result["accuracy"] == pytest.approx((0.9 + 2 / 3 + 1) / 3) and result["soft_questions"] == 1
    assert "soft_questions" not in evaluate(lambda b: b["guesses"], [batch(few, one)])
    agreed = (["the cat"] * 10, "cat")  # nobody disagrees: compared as it is, as published
    assert evaluate(lambda b: b["guesses"], [batch(agreed)])["accuracy"] == 0


def test_a_result_says_which_measure_it_is(tmp_path: Path, chain: Path) -> None:
    folder = vqav2(tmp_path / "vqa", answers=lambda q: ["yes", "red"] * 5)
    soft = run_stage("eval", model=str(chain / "teacher"), data=str(folder), split="val")
    assert soft["metric"].endswith("(VQAv2)") and soft["metrics"]["soft_questions"] == soft["metrics"]["questions"] == 2
    rows = [{"image": path, "question": "q?", "answer": "red"} for path in pictures(tmp_path, 2)]
    exact = run_stage("eval", model=str(chain / "teacher"), data=jsonl(tmp_path / "q.jsonl", rows))
    assert "weight of the answer" in exact["metric"] and "VQAv2" not in exact["metric"]
    rows[0]["answer"] = ["red"] * 10
    mixed = run_stage("eval", model=str(chain / "teacher"), data=jsonl(tmp_path / "m.jsonl", rows))
    assert "of the 1 questions without ten" in mixed["metric"]


def test_the_answer_list_leaves_out_rare_answers(tmp_path: Path) -> None:
    rows = [{"image": p, "question": "q?", "answer": a} for p, a in zip(pictures(tmp_path, 4), ("a", "b", "b", ["b", "c"]), strict=True)]
    data = jsonl(tmp_path / "q.jsonl", rows)
    source = open_data(QUESTIONS, data, "test")

    def listed(count: int) -> list[str]:
        return answer_list(stage_settings("finetune", {"out": "x", "model": "y", "data": data, "min_answer_count": count}), source)

    assert listed(1) == ["b", "a", "c"] and listed(3) == ["b"]
    with pytest.raises(BadInput, match="min_answer_count 4 leaves no answer: the most frequent one has 3"):
        listed(4)
