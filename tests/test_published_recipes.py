"""The recipes with the paper's settings, planned on a file without its values and on made data in the place of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stand_in import write_stand_in, write_tokenizer

from efficientvlm.control import Control
from efficientvlm.planning import activations
from efficientvlm.planning.checks import preflight
from efficientvlm.planning.plan import Plan, plan
from efficientvlm.recipe import Step, load_recipe, names, validate

FOLDER = "efficientvlm"
SMALL = f"{FOLDER}/scenes-"
RECIPES = [name for name in names() if name.startswith(f"{FOLDER}/") and not name.startswith(SMALL)]
GENERAL = ("pretrained", "student", "distilled")
NARROW = {"vision_width": 64, "vision_heads": 1, "vision_intermediate": 128, "text_width": 64, "text_heads": 1, "text_intermediate": 128}
MADE = "shapes:difficulty=2,size=64"
PUBLISHED: dict[str, dict[str, Any]] = {
    "general": {"distilled": {"kd": 0.4, "lr": 1e-4, "batch_size": 1024, "max_steps": 204795, "clip": 1.0, "weight_decay": 0.01}},
    "vqa": {
        "vqa-teacher": {"epochs": 10, "lr": 5e-5, "image_size": 480, "clip": None},
        "vqa-pruned": {"epochs": 20, "lr": 5e-5, "image_size": 480, "sparsity": 0.35, "kd": 0.4, "freeze_at": 0.5, "rank_top": 128},
    },
    "retrieval": {
        "retrieval-teacher": {"epochs": 10, "lr": 3e-5, "batch_size": 160, "image_size": 384, "clip": None},
        "retrieval-pruned": {"epochs": 10, "lr": 3e-5, "batch_size": 192, "image_size": 384, "sparsity": 0.25, "kd": 0.5},
    },
    "captioning": {
        "words": {"lr": 3e-5, "batch_size": 1024, "max_steps": 9990, "prompt": "", "label_smoothing": 0, "image_size": None},
        "captioning-teacher": {"epochs": 5, "lr": 1e-5, "image_size": 384, "clip": None, "label_smoothing": 0.1},
        "captioning-pruned": {"epochs": 10, "lr": 1e-5, "image_size": 384, "sparsity": 0.25, "kd": 0.3, "beams": 3},
    },
    "nlvr2": {
        "assigning": {"lr": 3e-5, "batch_size": 1024, "max_steps": 9990, "image_size": None},
        "nlvr2-teacher": {"epochs": 10, "lr": 3e-5, "batch_size": 80, "image_size": 384, "clip": None},
        "nlvr2-pruned": {"epochs": 10, "lr": 3e-5, "batch_size": 80, "image_size": 384, "sparsity": 0.25, "kd": 0.2},
    },
    "grounding": {
        "grounding-teacher": {"epochs": 10, "lr": 3e-5, "batch_size": 160, "image_size": 384, "clip": None},
        "grounding-pruned": {"epochs": 10, "lr": 3e-5, "batch_size": 160, "image_size": 384, "sparsity": 0.25},
    },
}
"""Recipe → stage → what the published configuration says."""
MILLIONS = {
    "pretrained": 212.27,
    "student": 120.12,
    "distilled": 120.12,
    "vqa-teacher": 290.59,
    "retrieval-teacher": 210.75,
    "captioning-teacher": 209.79,
    "nlvr2-teacher": 259.98,
}
"""Parameters of the published networks, by arithmetic."""


def steps(name: str) -> list[Step]:
    """The recipe `name` on made data."""
    recipe = load_recipe(name)
    own = [f"{stage['name']}.data={MADE}" for stage in recipe.stages if stage.get("data")]
    return validate(recipe, [*own, *([f"data={MADE}"] if "data" in recipe.defaults else [])])


def planned(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> Plan:
    write_stand_in(folder / "x-vlm.th", **sizes)
    write_tokenizer(folder / "bert-base-uncased")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)  # a step of each stage, which takes some seconds
    made = plan(steps(name), Control(quiet=True))
    assert not made.problems.found, made.problems.found
    assert not Path("runs").exists()
    for stage in made.stages:
        if stage.stage == "prune":
            wanted = PUBLISHED[name.removeprefix(f"{FOLDER}/")][stage.name]["sparsity"]
            assert stage.after and wanted <= stage.after["sparsity"] < wanted + 0.01
    return made


def test_one_is_planned_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow network of the same layers; all of them at full size below."""
    planned(f"{FOLDER}/captioning", tmp_path, monkeypatch, **NARROW)


@pytest.mark.parametrize("name, millions", [(f"{FOLDER}/general", MILLIONS["pretrained"]), ("dlip/general", 252.44)])
def test_nothing_has_to_be_there_for_a_plan(name: str, millions: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)
    made = plan(steps(name), Control(quiet=True))
    first = made.stages[0]
    assert not made.problems.found and not any(tmp_path.iterdir())
    assert first.after and first.after["parameters"]["total"] / 1e6 == pytest.approx(millions, abs=0.01)
    assert "is not there: planned as" in first.notes[0] and "bert-base-uncased is not there" in first.notes[1]
    assert any("does not exist" in str(problem.error) for problem in preflight(steps(name)).found), "it cannot run"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_networks_at_full_size_are_as_large_as_the_published_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in planned(name, tmp_path, monkeypatch).stages:
        if stage.name in MILLIONS:
            assert stage.after and stage.after["parameters"]["total"] / 1e6 == pytest.approx(MILLIONS[stage.name], abs=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_its_settings_are_the_published_ones(name: str) -> None:
    known = {step.name: step.config.model_dump() for step in steps(name)}
    for stage, wanted in PUBLISHED[name.removeprefix(f"{FOLDER}/")].items():
        assert {key: known[stage][key] for key in wanted} == wanted, stage


def test_general_distillation_is_the_same_in_all() -> None:
    """So that what one of them has made is passed over by the others."""
    first, *others = [{step.name: step.config for step in steps(name) if step.name in GENERAL} for name in RECIPES]
    assert set(first) == set(GENERAL) and all(other == first for other in others)
