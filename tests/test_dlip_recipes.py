"""The recipes of DLIP: those at full size, and the small ones of made scenes."""

from __future__ import annotations

from typing import Any

import pytest

from efficientvlm.recipe import Step, load_recipe, names, validate

RECIPES = [name for name in names() if name.startswith("dlip/")]
SCENES = [name for name in RECIPES if name.startswith("dlip/scenes-")]
LARGE = [name for name in RECIPES if name not in SCENES]
GENERAL = ("pretrained", "student", "distilled")
COMMON = ("start", *GENERAL)
MADE = "shapes:difficulty=2,size=64"
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


def steps(name: str, *more: str) -> list[Step]:
    """The recipe `name` on made data."""
    recipe = load_recipe(name)
    own = [f"{stage['name']}.data={MADE}" for stage in recipe.stages if stage.get("data")]
    return validate(recipe, [*own, *([f"data={MADE}"] if "data" in recipe.defaults else []), *more])


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
    assert kinds[:6] == ["init", "pretrain", "shrink", "distill", "finetune", "finetune"] and kinds[6] == "prune"
