"""The recipes of DIME-FM, planned on made data."""

from __future__ import annotations

from pathlib import Path

import pytest
from clip_folder import byte_pairs, write_clip

from efficientvlm.control import Control
from efficientvlm.data.shapes import parse
from efficientvlm.planning import activations
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import load_recipe, validate

MADE = "shapes:difficulty=2,size=64"


def test_a_student_of_scenes_has_seen_no_pair_and_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("dime_fm/scenes")
    own = [f"{stage['name']}.{role}={MADE}" for stage in recipe.stages for role in ("data", "sentences") if stage.get(role)]
    distilled = next(stage for stage in recipe.stages if stage["name"] == "distilled")
    taught = next(stage for stage in recipe.stages if stage["name"] == "teacher")
    assert len({distilled["data"], distilled["sentences"], taught["data"]}) == 3  # nothing is seen or read together
    tests = [parse(stage["data"]) for stage in recipe.stages if stage["stage"] == "eval"]
    hidden, learnt = tests[0].among, [parse(stage["data"]).among for stage in recipe.stages if stage.get("distillation")]
    assert hidden and len(hidden) >= 20 and {test.among for test in tests} == {hidden} and parse(taught["data"]).among is None
    assert len(learnt) == 2 and all(seen and not seen & hidden for seen in (*learnt, parse(distilled["sentences"]).among))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)  # a step of each stage, which takes some seconds
    made = plan(validate(recipe, own), Control(quiet=True))
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    after = {stage.name: stage.after for stage in made.stages if stage.after}
    vision = {name: found["parameters"]["by_tower"]["vision"] for name, found in after.items()}
    assert vision["distilled"] <= 0.29 * vision["teacher"]
    assert vision["pruned"] == pytest.approx(vision["distilled"], rel=0.02)


def test_the_published_settings_are_planned_without_weights_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in of a CLIP, whose student has the published tower of images all the same."""
    write_clip(tmp_path / "clip-vit-large-patch14", byte_pairs())
    (tmp_path / "sentences.txt").write_text("a red circle\nthe blue square\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)
    made = plan(
        validate(load_recipe("dime_fm/vitb32_from_vitl14"), ["student.image_size=224", f"distilled.data={MADE}"]), Control(quiet=True)
    )
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    distilled = next(stage for stage in made.stages if stage.name == "distilled")
    assert distilled.after and 87e6 < distilled.after["parameters"]["by_tower"]["vision"] < 88e6
