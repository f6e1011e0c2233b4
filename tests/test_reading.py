"""What the tokenizer cannot read, what is cut and what is outside the list is counted and said, and is never right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, run_stage
from PIL import Image

from efficientvlm.control import Control
from efficientvlm.data import reading
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.tasks import Answered
from efficientvlm.tasks.answering import Answerer
from efficientvlm.tasks.ranking import evaluate

UNREAD = ["10°", "20°", "红", "蓝", "😀", "£5", "[SEP]", "\u200b", "  ", ""]


def texts() -> Texts:
    return Texts(train_wordpiece(["what colour is it", "red blue 10 20 5 t-shirt yes no"], 80))


def test_what_cannot_be_read_is_nobody() -> None:
    assert texts().identities(UNREAD) == [None] * len(UNREAD)
    same = texts().identities(["Red", "red", " RED ", "t-shirt", "t - shirt"])
    assert None not in same and len(set(same)) == 2


def batch(*answers: list[tuple[str, float]], guesses: list[str], annotators: int = 0) -> dict[str, Any]:
    return {"answer_texts": list(answers), "guesses": guesses, "annotators": [annotators] * len(answers)}


def measured(*batches: dict[str, Any], **options: Any) -> dict[str, Any]:
    def as_read(text: str) -> str | None:
        (ids,) = words.identities([text])
        return None if ids is None else words.tokenizer.decode(list(ids))

    words = texts()
    return evaluate(lambda b: b["guesses"], batches, as_read, **options)


def test_an_answer_that_cannot_be_read_is_never_right() -> None:
    whole = [[(text, 1.0)] for text in UNREAD]
    assert measured(batch(*whole, guesses=UNREAD))["accuracy"] == 0
    assert measured(batch(*whole, guesses=["10", "20", "red", "red", "", "5", "red", "", "", ""]))["accuracy"] == 0
    assert measured(batch([("Red", 1.0)], guesses=["red"]))["accuracy"] == 1


def test_soft_accuracy_counts_unread_answers_as_given_by_others() -> None:
    ten = [("10°", 0.5), ("red", 0.3), ("no", 0.2)]
    assert measured(batch(ten, ten, guesses=["10°", "Red"], annotators=10))["accuracy"] == pytest.approx(0.9 / 2)
    assert measured(batch([("10°", 1.0)], guesses=["10°"], annotators=10))["accuracy"] == 0


def test_questions_that_cannot_be_answered_the_majority_and_the_error_of_the_mean() -> None:
    found = measured(
        batch(*([(text, 1.0)] for text in ("red", "Red", "blue", "10°")), guesses=["red", "no", "blue", "no"]), can_say=lambda t: t == "red"
    )
    assert found["accuracy"] == 0.5 and found["majority_accuracy"] == 0.5 and found["unanswerable"] == 2
    assert found["standard_error"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert measured(batch([("red", 1.0)], guesses=["red"]))["standard_error"] is None


def test_cut_answers_are_counted_and_those_that_become_alike_are_named() -> None:
    answers = ["it is red", "it is red no", "it is red blue", "yes", "£"]
    found = reading.of_answers(texts(), answers, 3)
    assert found.counts == {"answers": 5, "unread_answers": 1, "cut_answers": 2, "alike_after_the_cut": 3}
    said = "\n".join(found.remarks)
    assert "'£'" in said and "'it is red', 'it is red no', 'it is red blue'" in said and "max_answer_tokens" in said
    assert not reading.of_answers(texts(), answers[:4], 30).remarks


class Source:
    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def texts(self) -> Any:
        return iter(self.lines)


def test_texts_are_looked_at_up_to_a_number_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SAMPLE", 3)
    found = reading.of_texts(texts(), Source("red", "blue", "红 red", "蓝"))
    assert found.counts == {"texts": 3, "tokens": 4, "unknown_tokens": 1, "cut_texts": 0}
    assert "25.0 % of the tokens in the first 3 texts" in found.remarks[0]
    assert reading.of_texts(texts(), Source("red", "red", "blue")).remarks == []


@pytest.fixture(scope="module")
def degrees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answers the chain's tokenizer reads or not, and a list with all of them."""
    root = tmp_path_factory.mktemp("degrees")
    answers = ["10°", "20°", "红", "red", "a red circle", "yes", "no"]
    with open(root / "q.jsonl", "w", encoding="utf-8") as file:
        for number in range(14):
            Image.new("RGB", (32, 32), (number * 9, 90, 250)).save(root / f"{number}.png")
            file.write(json.dumps({"image": f"{number}.png", "question": "how warm is it?", "answer": answers[number % 7]}) + "\n")
    (root / "all.txt").write_text("\n".join(answers), encoding="utf-8")
    (root / "none.txt").write_text("红\n蓝\n", encoding="utf-8")
    return root


def test_eval_counts_and_says_it(chain: Path, degrees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": str(chain / "teacher"), "data": str(degrees / "q.jsonl"), "answers": str(degrees / "all.txt")}
    run_stage("eval", Control(), **settings)
    said = capsys.readouterr().err
    assert "3 of 7 answers cannot be read by the tokenizer ('10°', '20°', '红')" in said
    assert "42.9 % of the questions cannot be answered (6 of 14)" in said and "% of the tokens that were read are unknown" in said
    result = run_stage("eval", **settings)
    assert result["answers"] == 4 and result["metrics"]["unanswerable"] == 6
    assert result["metrics"]["reading"]["unread_answers"] == 3 and result["metrics"]["reading"]["unknown_tokens"] > 0
    with pytest.raises(BadInput, match="no answer can be read"):
        run_stage("eval", **{**settings, "answers": str(degrees / "none.txt")})


def test_generated_unknown_tokens_are_shown_not_dropped(chain: Path) -> None:
    answer = Answerer(load(str(chain / "teacher")), Answered(mode="generate"))
    (ids,) = answer.texts.ids(["red"])
    broken = answer.decoded([*ids, answer.texts.unknown or 0, answer.texts.sep])
    assert broken != "red" and answer.as_read(broken) is None and answer.as_read("RED") == "red" == answer.decoded([*ids, answer.texts.sep])
    assert not answer.can_say("red " * 30) and answer.can_say("red")


def test_training_and_its_plan_say_it_before(chain: Path, degrees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model": str(chain / "init"),
        "data": str(degrees / "q.jsonl"),
        "answers": str(degrees / "all.txt"),
        "out": str(tmp_path / "out"),
        "max_steps": 1,
        "batch_size": 4,
        "max_answer_tokens": 3,
        "val_fraction": 0.5,
    }
    made = plan([Step("finetune", "finetune", stage_settings("finetune", settings))])
    manifest = run_stage("finetune", Control(), **settings)
    said = capsys.readouterr().err
    for part in ("3 of 7 answers cannot be read", "1 of 7 answers have more than 1 tokens and are cut", "unknown to the tokenizer"):
        assert part in said.partition("finetune 1/1")[0] and any(part in note for note in made.stages[0].notes)
    counted = manifest.extra["reading"]
    assert counted["cut_answers"] == 1 and counted["unknown_tokens_read"] > 0 and counted["questions"] > 0


def test_pretraining_counts_too(chain: Path, tmp_path: Path) -> None:
    settings = {"model": str(chain / "init"), "data": SHAPES, "out": str(tmp_path / "out"), "max_steps": 1, "batch_size": 4}
    counted = run_stage("pretrain", **settings).extra["reading"]
    assert counted["texts"] > 0 and counted["unknown_tokens"] == counted["unknown_tokens_read"] == 0 < counted["tokens_read"]
