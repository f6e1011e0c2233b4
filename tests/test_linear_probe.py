"""The linear probe: which penalty is found, what it learns from, and what is refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_zeroshot
from conftest import run_stage
from test_zeroshot import fill

from efficientvlm.errors import BadInput
from efficientvlm.tasks import linear_probe
from efficientvlm.tasks.linear_probe import FITS, Features, fitted, sought

clip = test_zeroshot.clip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours, apart for training and measuring."""
    root = tmp_path_factory.mktemp("colours")
    fill(root / "train", each=12)
    fill(root / "test", each=5, start=5000)
    return root


def test_the_penalty_that_is_found() -> None:
    """Of a curve with one peak the nearest eighth of a decade, in fifteen fits; of a plateau its smallest end."""
    for peak in (-2.3, 0.0, 1.1, 5.9):
        asked: list[float] = []

        def accuracy(c: float, peak: float = peak, asked: list[float] = asked) -> float:
            asked.append(c)
            return -abs(np.log10(c) - peak)

        assert abs(np.log10(sought(accuracy)) - peak) <= 1 / 16 + 1e-9
        assert len(asked) == len(set(asked)) <= FITS == 15
    assert sought(lambda c: 1.0) == 1e-6
    assert np.log10(sought(lambda c: float(c > 0.5))) == pytest.approx(-0.25)  # the first eighth behind 0.5


def test_it_is_scikit_learns_regression_and_the_split_val_is_learnt_from_too(
    clip: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    fits: list[tuple[int, float]] = []
    widths: list[int] = []

    def noted(some: Features, c: float, config: Any) -> Any:
        fits.append((len(some.labels), c))
        widths.append(some.values.shape[1])
        return fitted(some, c, config)

    monkeypatch.setattr(linear_probe, "fitted", noted)
    given: dict[str, Any] = {"model": clip, "data": str(data), "task": "linear-probe", "val_fraction": 0.3}
    found = run_stage("eval", **given)
    held_out = 36 - fits[0][0]
    assert found["c_from"] == "the split val" and 0 < held_out < 36 and {count for count, _ in fits[:-1]} == {36 - held_out}
    assert fits[-1] == (36, found["c"]) and found["metrics"]["training_images"] == 36
    best = max(found["held_out_accuracy"].values())
    assert min(float(c) for c, value in found["held_out_accuracy"].items() if value == best) == pytest.approx(found["c"], rel=1e-4)
    metrics = found["metrics"]
    assert metrics["probe_accuracy"] > 0.9 and metrics["images"] == 15 and metrics["images_learnt_from"] == 0
    assert set(found["influence"]["inputs"]) == {"image"}
    once = run_stage("eval", **given, c=10.0, features="pooled")
    assert once["c_from"] == "given" and fits[-1] == (36, 10) and "held_out_accuracy" not in once
    assert [once[part]["count"] for part in ("train", "held_out")] == [36 - held_out, held_out] and widths[-1] == 16 != widths[0]
    on_val = run_stage("eval", **given | {"split": "val"}, max_iterations=5)
    assert on_val["c_from"] == "10% of the training images" and fits[-1][0] == 36 - held_out and on_val["metrics"]["images"] == held_out


def test_what_is_refused(clip: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"model": clip, "data": str(data), "task": "linear-probe", "c": 1.0}
    with pytest.raises(BadInput, match="15 of 15 images of split test are among those that are learnt from") as same:
        run_stage("eval", **given | {"data": str(data / "test")})
    assert "--train" in same.value.fix
    shutil.copytree(data / "train" / "red", tmp_path / "train" / "red")
    with pytest.raises(BadInput, match="of one class"):
        run_stage("eval", **given, train=str(tmp_path / "train"))
    with pytest.raises(BadInput, match="split train"):
        run_stage("eval", **given, split="train")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else real(name, *rest))
    monkeypatch.setattr(linear_probe, "features", None)
    with pytest.raises(BadInput, match="needs scikit-learn") as missing:
        run_stage("eval", **given)
    assert "efficientvlm[probe]" in missing.value.fix


def test_classes_without_a_training_image_are_never_right(clip: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    for name in ("red", "blue"):
        shutil.copytree(data / "train" / name, tmp_path / "train" / name)
    given: dict[str, Any] = {"model": clip, "data": str(data), "task": "linear-probe", "c": 100.0}
    found = run_stage("eval", **given, train=str(tmp_path / "train"))["metrics"]
    assert found["images_of_unseen_classes"] == 5 and found["classes"] == 3 and found["probe_accuracy"] == pytest.approx(10 / 15)
