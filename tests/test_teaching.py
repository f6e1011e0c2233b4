"""What is said of a teacher that has nothing to teach."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import QUIET, SHAPES, TRAIN, run_stage

from efficientvlm.checkpoints.manifest import Code, DataRecord, Manifest
from efficientvlm.control import Control
from efficientvlm.data.items import Question
from efficientvlm.stages.teaching import doubts, majority_answer


def made(stage: str = "finetune", accuracy: float | None = None, fingerprint: str = "f", **more: Any) -> Manifest:
    data = [DataRecord(name="mine", split="val", count=4, fingerprint=fingerprint, licence="unknown")]
    metrics = {} if accuracy is None else {"val": {"accuracy": accuracy}}
    return Manifest(stage=stage, family="xvlm", code=Code(version="1"), created="2026-01-01", data=data, metrics=metrics, **more)


def questions(*answers: tuple[str, float], fingerprint: str = "f") -> Any:
    return SimpleNamespace(fingerprint=fingerprint, contents=lambda: iter([[Question("?", list(answers))]]))


def test_a_teacher_that_is_no_better_is_doubted() -> None:
    val = questions(("yes", 1.0), ("no", 0.5), ("yes", 0.5), ("red", 2.0))
    assert majority_answer(val) == ("red", 0.5) and majority_answer(questions()) is None
    assert doubts(made(accuracy=0.9), made(accuracy=0.8), val, asked=True) == []
    (student,) = doubts(made(accuracy=0.7), made(accuracy=0.8), val, asked=True)
    assert student == "the teacher's validation accuracy, 0.7000, is not above the student's own, 0.8000"
    (majority,) = doubts(made(accuracy=0.5), made(), val, asked=True)
    assert majority.endswith("is not above 0.5000, that of always answering 'red'")
    assert len(doubts(made(accuracy=0.3), made(accuracy=0.4), val, asked=True)) == 2


def test_only_the_same_data_are_compared() -> None:
    val = questions(("yes", 1.0), fingerprint="g")
    assert doubts(made(accuracy=0.1), made(accuracy=0.8), val, asked=True) == []
    assert doubts(made(accuracy=0.1, fingerprint="g"), made(accuracy=0.8), val, asked=True)[0].endswith("that of always answering 'yes'")


def test_the_stages_say_so(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {**TRAIN, "max_steps": 1}
    common = {"data": SHAPES, **short}
    run_stage("distill", Control(), out=str(tmp_path / "d"), model=str(chain / "student"), teacher=str(chain / "init"), **common)
    assert "distill: the teacher was never trained: its weights are random; compare with a run without" in capsys.readouterr().err
    teacher = str(chain / "teacher")
    run_stage("finetune", Control(), out=str(tmp_path / "t"), model=teacher, teacher=teacher, **common)
    assert "is not above the student's own" in capsys.readouterr().err


def test_quiet_is_quiet(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"data": SHAPES, **TRAIN, "max_steps": 1}
    run_stage("distill", QUIET, out=str(tmp_path / "d"), model=str(chain / "student"), teacher=str(chain / "init"), **common)
    assert "never trained" not in capsys.readouterr().err
