"""The recipes of DLIP: those at full size, planned on a file without its values, and the small ones of made scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stand_in import write_blip_stand_in, write_tokenizer

from efficientvlm.control import Control
from efficientvlm.planning import activations
from efficientvlm.planning.plan import Plan, plan
from efficientvlm.recipe import Step, load_recipe, names, validate

RECIPES = [name for name in names() if name.startswith("dlip/")]
SCENES = [name for name in RECIPES if name.startswith("dlip/scenes-")]
LARGE = [name for name in RECIPES if name not in SCENES and name != "dlip/photos"]  # that one is in test_flickr8k.py
GENERAL = ("pretrained", "student", "distilled")
COMMON = ("start", *GENERAL)
MADE = "shapes:difficulty=2,size=64"
NARROW = {"vision_width": 128, "vision_heads": 2, "vision_intermediate": 128, "text_width": 128, "text_heads": 2, "text_intermediate": 128}
HALF = ["student.preset=null", "student.width={vision: 64, text: 64}", "student.layers={vision: 12, text: 6, decoder: 6}"]
REPLICATED: dict[str, Any] = {
    "distillation": "dlip",
    "epochs": 20,
    "batch_size": 1152,
    "lr": 5e-4,
    "weight_decay": 0.02,
    "warmup_steps": 3000,
    "schedule": "exponential",
    "decay": 0.9,
    "max_tokens": 30,
    "clip": None,
    "kd": 1.0,
    "queue": None,
    "alpha": 0.4,
    "alpha_warmup": 0.1,
}
"""Of before any task: two of twenty epochs are a tenth, and a queue has 57,600 pairs by default."""
TUNED: dict[str, dict[str, Any]] = {
    "retrieval-teacher": {"image_size": 384, "lr": 1e-5, "epochs": 6, "batch_size": 256, "weight_decay": 0.05, "warmup": 0.0},
    "retrieval-student": {"image_size": 384, "lr": 5e-5, "epochs": 6, "teacher": None},
    "captioning-teacher": {"image_size": 384, "lr": 1e-5, "epochs": 5, "label_smoothing": 0.1, "prompt": "a picture of "},
    "vqa-teacher": {"image_size": 480, "lr": 2e-5, "epochs": 10, "label_smoothing": 0.1, "rank_top": 128},
}
MILLIONS = {"pretrained": 252.44, "distilled": 51.71, "retrieval-teacher": 223.74, "captioning-teacher": 223.97, "vqa-teacher": 361.48}
"""Parameters of the published networks, and of the student in their layout, by arithmetic."""


def steps(name: str, *more: str) -> list[Step]:
    """The recipe `name` on made data."""
    recipe = load_recipe(name)
    own = [f"{stage['name']}.data={MADE}" for stage in recipe.stages if stage.get("data")]
    return validate(recipe, [*own, *([f"data={MADE}"] if "data" in recipe.defaults else []), *more])


def planned(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str, **sizes: int) -> Plan:
    write_blip_stand_in(folder / "model_base_capfilt_large.pth", **sizes)
    write_tokenizer(folder / "bert-base-uncased")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)  # a step of each stage, which takes some seconds
    made = plan(steps(name, *more), Control(quiet=True))
    assert not made.problems.found, made.problems.found
    assert not Path("runs").exists()
    return made


@pytest.mark.parametrize("name", [LARGE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE[1:])])
def test_it_is_planned_without_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrower network of the same layers."""
    for stage in planned(name, tmp_path, monkeypatch, *HALF, **NARROW).stages:
        if stage.stage == "prune":
            assert stage.after and 0.3 <= stage.after["sparsity"] < 0.31


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_networks_at_full_size_are_as_large_as_the_published_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in planned(name, tmp_path, monkeypatch).stages:
        if stage.name in MILLIONS:
            assert stage.after and stage.after["parameters"]["total"] / 1e6 == pytest.approx(MILLIONS[stage.name], abs=0.01)


@pytest.mark.parametrize("name", LARGE)
def test_its_settings_are_those_that_are_public(name: str) -> None:
    known = {step.name: step.config.model_dump() for step in steps(name)}
    for stage, wanted in {"distilled": REPLICATED, **TUNED}.items():
        assert stage not in known or {key: known[stage][key] for key in wanted} == wanted, stage


@pytest.mark.parametrize("recipes, shared", [(LARGE, GENERAL), (SCENES, COMMON)], ids=["full size", "scenes"])
def test_what_comes_before_the_task_is_the_same_in_all(recipes: list[str], shared: tuple[str, ...]) -> None:
    """So that what one of them has made is passed over by the others."""
    first, *others = [{step.name: step.config for step in steps(name) if step.name in shared} for name in recipes]
    assert set(first) == {*shared} and all(other == first for other in others)


@pytest.mark.parametrize("name", SCENES)
def test_scenes_have_to_be_looked_at(name: str) -> None:
    """Two shapes or more, in words that name their places; a student of half the width, which is pruned in the end."""
    data = load_recipe(name).defaults["data"]
    assert "difficulty=3" in data and "objects=2" in data
    kinds = [step.stage for step in validate(load_recipe(name))]
    assert kinds[:10] == ["init", *["pretrain"] * 4, "shrink", "distill", "finetune", "finetune", "prune"]
