"""The recipes of DIME-FM, planned on made data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_flickr8k import COLOURS, captions, world  # noqa: F401

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.control import Control
from efficientvlm.data.shapes import parse
from efficientvlm.examples.photo_teacher import write_vectors
from efficientvlm.planning import activations
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import load_recipe, validate
from efficientvlm.stages.run import module_of

MADE = "shapes:difficulty=2,size=64"


def test_a_student_of_scenes_has_seen_no_pair_and_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("dime_fm/scenes")
    own = [f"{stage['name']}.{role}={MADE}" for stage in recipe.stages for role in ("data", "sentences") if stage.get(role)]
    of = {kind: [stage for stage in recipe.stages if stage["stage"] == kind] for kind in ("init", "finetune", "distill", "prune", "eval")}
    taught, learnt, tests = (
        [parse(stage["data"]) for kind in kinds for stage in of[kind]] for kinds in (("init", "finetune"), ("distill", "prune"), ("eval",))
    )
    read = [parse(stage["sentences"]) for kind in ("distill", "prune") for stage in of[kind]]
    seeds = [{each.seed for each in some} for some in (taught, learnt, read, tests)]
    assert sum(map(len, seeds)) == len(set.union(*seeds)) == 4  # nothing is seen or read together
    hidden = tests[0].among
    assert hidden and len(hidden) >= 20 and {test.among for test in tests} == {hidden}
    assert len(learnt) == len(read) == 2 and all(each.among and not each.among & hidden for each in (*learnt, *read))
    assert all(each.among is None for each in taught if each.difficulty == learnt[0].difficulty)
    named = [parse(stage["data"]).counts for stage in of["eval"] if stage["task"] == "zeroshot"]
    assert named == [(1, 1)] * 3  # of two shapes in a picture either name would be right
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)  # a step of each stage, which takes some seconds
    made = plan(validate(recipe, own), Control(quiet=True))
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    after = {stage.name: stage.after for stage in made.stages if stage.after}
    vision = {name: found["parameters"]["by_tower"]["vision"] for name, found in after.items()}
    assert vision["distilled"] <= 0.29 * vision["teacher"]
    assert vision["pruned"] == pytest.approx(vision["distilled"], rel=0.02)


def test_the_published_settings_are_planned_without_weights_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the published CLIP is there, by its shapes."""
    (tmp_path / "sentences.txt").write_text("a red circle\nthe blue square\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "training", lambda run, images: 0)
    made = plan(validate(load_recipe("dime_fm/vitb32_from_vitl14"), [f"distilled.data={MADE}"]), Control(quiet=True))
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    teacher, distilled = (next(stage for stage in made.stages if stage.name == name) for name in ("teacher", "distilled"))
    assert teacher.after and teacher.after["parameters"]["total"] == 427_616_513  # of the published one
    assert distilled.after and 87e6 < distilled.after["parameters"]["by_tower"]["vision"] < 88e6


def taught(world: Path) -> Path:  # noqa: F811
    """The folder of photos with what a teacher says of them, and a pile of sentences."""
    ids = [f"0-{number}" for number in range(24)]
    write_vectors(world / "photos/vectors.parquet", ids, np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32))
    pile = [text for colour in COLOURS for text in captions(colour)] + [f"nothing that is seen, number {number}" for number in range(20)]
    (world / "photos/pile.txt").write_text("\n".join(pile) + "\n", "utf-8")
    return world / "photos"


SHORT = ["batch_size=4", "start.image_size=28", "start.settings.embed_dim=24", "selected.total=20", "distilled.sentence_batch_size=4"]
SHORT += ["pruned.sentence_batch_size=4", *(f"{stage}.max_steps=3" for stage in ("distilled", "pruned", "pairs"))]
"""With these the recipe of photos takes seconds on stand-ins for towers and photos."""


@pytest.mark.slow
def test_photos_are_learnt_from_vectors_of_another_program(
    world: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taught(world)
    monkeypatch.chdir(world)
    steps = validate(load_recipe("dime_fm/photos"), SHORT, out=str(tmp_path))
    made = plan(steps, Control(quiet=True))
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    for step in steps:
        module_of(step.stage).run(step.config, Control(quiet=True))
    texts = (tmp_path / "selected/sentences.txt").read_text("utf-8").splitlines()
    assert 0 < len(texts) <= 20
    student, pruned = (require_complete(tmp_path / name).accounting["parameters"]["by_tower"] for name in ("distilled", "pruned"))
    assert pruned["vision"] < student["vision"] and pruned["text"] == student["text"]
    found = json.loads((tmp_path / "pairs-val.json").read_text("utf-8"))["metrics"]
    assert found["images"] == 8 and found["mean_recall"] > 0
