"""The generator: pure, true to its words, and as easy-VQA looks."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import efficientvlm
from efficientvlm.data import phrases
from efficientvlm.data.easy_vqa import EasyVQA
from efficientvlm.data.kinds.expressions import EXPRESSIONS
from efficientvlm.data.kinds.labels import classes_of, present_in
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.kinds.sentences import SENTENCES
from efficientvlm.data.kinds.statements import STATEMENTS, about_two
from efficientvlm.data.scenes import COLOURS, LEVELS, SHAPES, Scene, Thing, compositions, draw, sample
from efficientvlm.data.shapes import Shapes, parse
from efficientvlm.errors import BadInput


def thing(colour: str, shape: str, x: float, y: float, side: float = 0.2) -> Thing:
    return Thing(colour, shape, x, y, side, side, COLOURS[colour])


TWO = Scene((thing("red", "circle", 0.2, 0.5), thing("blue", "triangle", 0.8, 0.5)), (250, 250, 250), 0.0)


def test_an_item_is_a_pure_function_of_settings_split_and_index() -> None:
    first, again = Shapes(PAIRS, "train", spec="shapes:seed=3"), Shapes(PAIRS, "train", spec="shapes:seed=3")
    again[11]
    assert np.array_equal(first[7].image, again[7].image)
    assert (first[7].captions, first[7].regions, first[7].id) == (again[7].captions, again[7].regions, again[7].id)
    for other in (Shapes(PAIRS, "val", spec="shapes:seed=3"), Shapes(PAIRS, "train", spec="shapes:seed=4")):
        assert not np.array_equal(other[7].image, first[7].image)
    assert np.array_equal(Shapes(QUESTIONS, "train", spec="shapes:seed=3")[7].image, first[7].image)


def test_generated_content_is_pinned() -> None:
    # If this changes, so does every data set that was named by its settings: raise VERSION in shapes.py.
    item = Shapes(PAIRS, "train")[0]
    assert (
        item.captions[1]
        == "a green circle below a yellow rectangle and a yellow rectangle above a yellow triangle on a pale yellow background"
    )
    assert abs(int(item.image.astype(np.int64).sum()) - 2581670) < 50
    assert Shapes(PAIRS, "train").fingerprint != Shapes(PAIRS, "train", spec="shapes:seed=1").fingerprint
    assert Shapes(PAIRS, "train").fingerprint == Shapes(PAIRS, "val", spec="shapes:difficulty=3").fingerprint


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_scenes_hold_what_the_difficulty_says(difficulty: int) -> None:
    level = LEVELS[difficulty]
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(200):
        scene = sample(rng, level)
        counts[len(scene.things)] += 1
        for one in scene.things:
            x, y, width, height = one.box
            assert x - width / 2 >= -1e-6 and x + width / 2 <= 1 + 1e-6 and y - height / 2 >= -1e-6 and y + height / 2 <= 1 + 1e-6
        for a in scene.things:
            assert all(a is b or abs(a.x - b.x) * 2 > a.width + b.width or abs(a.y - b.y) * 2 > a.height + b.height for b in scene.things)
    assert set(counts) == set(range(level.objects[0], level.objects[1] + 1))


def test_a_box_holds_the_pixels_of_its_shape() -> None:
    rng = np.random.default_rng(0)
    for shape in ("circle", "rectangle", "triangle", "diamond", "cross", "ring"):
        scene = Scene((Thing("red", shape, 0.4, 0.55, 0.5, 0.5, COLOURS["red"]),), (255, 255, 255), 0.0)
        rows, columns = np.nonzero((draw(scene, 64, rng) != 255).any(-1))
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        assert np.abs(found - np.array([0.15, 0.3, 0.65, 0.8])).max() < 1.6 / 64, shape


def test_relations_follow_the_places() -> None:
    found = {(a.colour, name, b.colour) for a, name, b in phrases.related(TWO)}
    assert found == {("red", "left of", "blue"), ("blue", "right of", "red")}
    twins = Scene((*TWO.things, thing("red", "circle", 0.5, 0.1)), TWO.background, 0.0)
    assert all("red" not in (a.colour, b.colour) for a, _, b in phrases.related(twins))


def truth(question: str, scene: Scene) -> str | None:
    """An answer found another way than the generator's: by matching words against the list of shapes."""
    colours, forms = [one.colour for one in scene.things], [one.shape for one in scene.things]
    kinds = [f"{one.colour} {one.shape}" for one in scene.things]
    if match := re.fullmatch(r"how many (.+?)s (?:are there|are in the image)\?", question):
        noun = {"crosse": "cross"}.get(match[1], match[1])
        return str(len(kinds) if noun == "shape" else sum(noun in (f, f"{c} shape") for c, f in zip(colours, forms)))
    if match := re.fullmatch(
        r"(?:is there|does the image|is) (not )?(no )?(?:contain )?(not contain )?(?:an? )?(.+?)(?: in the image| present)?\?", question
    ):
        noun = match[4]
        if " of " in noun or "above" in noun or "below" in noun:
            return None
        there = noun in forms or noun in kinds or noun in [f"{colour} shape" for colour in colours]
        return "yes" if there != bool(match[1] or match[2] or match[3]) else "no"
    return None


@pytest.mark.parametrize("difficulty", [2, 3, 5])
def test_presence_and_counts_are_true(difficulty: int) -> None:
    source = Shapes(QUESTIONS, "train", spec=f"shapes:difficulty={difficulty}")
    checked = Counter()
    for index in range(150):
        _, scene = source.scene(index)
        for question in source[index].questions:
            expected = truth(question.text, scene)
            if expected is not None:
                checked[expected] += 1
                assert question.answers == [(expected, 1.0)], (question, scene)
    assert checked["yes"] > 100 and checked["no"] > 100


def test_colour_shape_and_relation_answers_are_true() -> None:
    level, seen = LEVELS[3], {}
    for seed in range(60):
        for question in phrases.questions(TWO, np.random.default_rng(seed), level, 10):
            seen[question.text] = question.answers[0][0]
    assert seen["what color is the circle?"] == "red"
    assert seen["what is the blue shape?"] == "triangle"
    assert seen["is the red circle left of the blue triangle?"] == "yes"
    assert seen["is the blue triangle left of the red circle?"] == "no"
    assert seen["is the red circle above the blue triangle?"] == "no"
    assert seen["what color is the shape left of the blue triangle?"] == "red"
    assert seen["what color is the background?"] == "white"


def test_one_object_asks_in_the_words_of_easy_vqa() -> None:
    known = {
        question.text for item_texts in [EasyVQA("train")] for questions in item_texts._all_questions.values() for question in questions
    }
    ours = {q.text for item in (Shapes(QUESTIONS, "train", spec="shapes:difficulty=2")[i] for i in range(800)) for q in item.questions}
    assert ours == known


def test_one_object_pictures_cover_easy_vqa() -> None:
    theirs, ours = EasyVQA("train", limit=300), Shapes(PAIRS, "train", spec="shapes:difficulty=2,size=600")

    def sides(image: np.ndarray) -> tuple[int, int]:
        rows, columns = np.nonzero(np.abs(image.astype(int) - np.median(image.reshape(-1, 3), axis=0)).sum(-1) > 60)
        return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1

    a = np.array([sides(theirs[i].image) for i in range(300)])
    b = np.array([sides(ours[i].image) for i in range(600)])
    low, high = np.percentile(a, [2, 98], axis=0)
    assert (np.percentile(b, 1, axis=0) <= low + 1).all() and (np.percentile(b, 99, axis=0) >= high - 1).all()
    dark = min(int(np.median(theirs[i].image.reshape(-1, 3), axis=0).min()) for i in range(300))
    assert LEVELS[2].darkest <= dark + 1


def test_statements_are_true_and_balanced() -> None:
    source = Shapes(STATEMENTS, "train", spec="shapes:difficulty=3")
    labels: dict[str, list[bool]] = {}
    for index in range(600):
        left, right, (said,), _ = about_two(source, index)
        statement, label = said.text, said.label
        labels.setdefault(" ".join(statement.split()[:2]), []).append(label)
        if match := re.fullmatch(r"both images contain an? (.+)", statement):
            assert label == all(
                any(match[1] in (o.shape, f"{o.colour} shape", f"{o.colour} {o.shape}") for o in s.things) for s in (left, right)
            )
    assert 0.45 < np.mean([label for found in labels.values() for label in found]) < 0.55
    for start in ("both images", "at least", "exactly one", "neither image"):
        assert 0.3 < np.mean(labels[start]) < 0.7, start  # the form alone does not tell the answer
    item = source[0]
    assert item.images[0].shape == item.images[1].shape == (64, 64, 3) and not np.array_equal(*item.images)


EXACT = "shapes:difficulty=3,objects=2-4,exact=1"


def has(scene: Scene, noun: str) -> bool:
    return any(noun in (one.shape, f"{one.colour} shape") for one in scene.things)


def test_exact_statements_are_true_and_neither_text_nor_one_image_tells() -> None:
    source = Shapes(STATEMENTS, "train", spec=EXACT)
    labels: dict[object, list[bool]] = {}
    for index in range(700):
        left, right, said, _ = about_two(source, index)
        assert len(said) == 6 and len({statement.text for statement in said}) == 6 and all(2 <= len(s.things) <= 4 for s in (left, right))
        for statement in said:
            noun = re.search(r"(?:contains?|about) an? (.+?)(?: or neither does| and the other does not|$)", statement.text)[1]
            seen = [has(scene, noun) for scene in (left, right)]
            same = statement.text.startswith(("both images", "the images agree"))
            assert statement.label == ((seen[0] == seen[1]) == same), (statement, left, right)
            form = re.sub(r" an? .*", "", statement.text)
            counts = [(side, form, len(scene.things)) for side, scene in (("left", left), ("right", right))]
            for known in ("all", form, noun, ("left", form, seen[0]), ("right", form, seen[1]), ("left", noun, seen[0]), *counts):
                labels.setdefault(known, []).append(statement.label)
    for known, found in labels.items():
        assert abs(np.mean(found) - 0.5) < 4.5 * 0.5 / len(found) ** 0.5, known  # so many standard errors
    assert len(labels) > 60


@pytest.mark.parametrize(("exact", "stated"), [(2, 12), (3, 6)])
def test_simple_statements_are_about_one_picture_and_true(exact: int, stated: int) -> None:
    source = Shapes(STATEMENTS, "train", spec=EXACT.replace("exact=1", f"exact={exact}"))
    labels, denied = [], 0
    for index in range(200):
        left, right, said, _ = about_two(source, index)
        assert len(said) == stated
        for statement in said:
            if match := re.fullmatch(
                r"the (left|right) image contains an? (.+)|there is no (.+) in the (left|right) image", statement.text
            ):
                side, noun = match[1] or match[4], match[2] or match[3]
                labels.append(statement.label)
                denied += not match[1]
                assert statement.label == (has(left if side == "left" else right, noun) == bool(match[1]))
    assert len(labels) == 1200 and 0.45 < np.mean(labels) < 0.55  # with 3 there are no others
    assert denied == 0 if exact == 3 else 500 < denied < 700


@pytest.mark.parametrize(
    "spec", ["difficulty=1", "difficulty=5", "difficulty=4,alike=2", "difficulty=3,objects=1", "difficulty=5,objects=7-9"]
)
def test_exact_statements_of_other_scenes(spec: str) -> None:
    source = Shapes(STATEMENTS, "train", spec=f"shapes:{spec},exact=1")
    for index in range(20):
        left, right, said, _ = about_two(source, index)
        assert len(said) in (4, 6) and all(
            source.settings.counts[0] <= len(scene.things) <= source.settings.counts[1] for scene in (left, right)
        )
        assert not source.settings.alike or all(max(Counter(o.colour for o in s.things).values()) >= 2 for s in (left, right))


def test_exact_captions_say_one_content_that_belongs_to_one_picture() -> None:
    source = Shapes(PAIRS, "test", spec=EXACT)
    owners: dict[str, int] = Counter()
    for index in range(300):
        _, scene = source.scene(index)
        found = source[index].captions
        assert len(set(found)) == 5
        for caption in found:
            owners[caption] += 1
            assert all(f"{one.colour} {one.shape}" in caption for one in scene.things)
        order = [f"{one.colour} {one.shape}" for one in sorted(scene.things, key=lambda one: one.x)]
        assert re.findall(r"an? (\w+ \w+)(?=,| and| on)", found[0]) == order
    assert sum(count == 1 for count in owners.values()) > 0.97 * len(owners)


def test_what_is_said_of_scenes_in_pixels_is_of_the_size_that_is_asked_for() -> None:
    small, large = (next(Shapes(EXPRESSIONS, "train", parse("shapes:size=2"), image_size=side).contents()) for side in (64, 128))
    assert [(meant.size, meant.box) for meant in large] == [((128, 128), tuple(2 * part for part in meant.box)) for meant in small]


def test_the_splits_share_no_scene() -> None:
    scenes = [
        scene for split in ("train", "val", "test") for i in range(200) for scene in about_two(Shapes(STATEMENTS, split, spec=EXACT), i)[:2]
    ]
    assert len(set(scenes)) == len(scenes)


def test_shapes_that_share_a_colour() -> None:
    source = Shapes(PAIRS, "train", spec="shapes:difficulty=4,objects=3-5,alike=3")
    for index in range(100):
        _, scene = source.scene(index)
        assert max(Counter(one.colour for one in scene.things).values()) >= 3
    for kind in (PAIRS, STATEMENTS):  # what was drawn before is drawn still
        assert np.array_equal(
            np.asarray(getattr(Shapes(kind, "val", spec="shapes:alike=0")[3], "image", 0)), getattr(Shapes(kind, "val")[3], "image", 0)
        )


def test_hidden_pictures_are_gray_and_all_else_is_as_it_was() -> None:
    for hidden in ("left", "right", "all"):
        seen, blind = (Shapes(STATEMENTS, "val", spec=f"{EXACT}{hide}")[5] for hide in ("", f",hide={hidden}"))
        assert seen.statements == blind.statements
        for name, one, other in zip(("left", "right"), seen.images, blind.images):
            assert (other == 128).all() if hidden in (name, "all") else np.array_equal(one, other)
    blind = Shapes(QUESTIONS, "val", spec="shapes:hide=all")[0]
    assert (blind.image == 128).all() and blind.questions == Shapes(QUESTIONS, "val")[0].questions


@pytest.mark.parametrize("level", ["difficulty=4,objects=2", "difficulty=2", "difficulty=5,objects=3-9,alike=3"])
def test_compositions_are_left_out_or_nothing_else_is_shown(level: str) -> None:
    difficulty = parse(f"shapes:{level}").level
    chosen = {" ".join(both) for both in compositions(difficulty)[:8]}
    assert len(chosen) == 8 and len({*compositions(difficulty)}) == difficulty.colours * difficulty.shapes
    seen, unseen = (Shapes(SENTENCES, "train", spec=f"shapes:{level},exact=1,{which}=8") for which in ("without", "only"))
    for source, own in ((seen, lambda kinds: not kinds & chosen), (unseen, lambda kinds: kinds <= chosen)):
        shown = [{phrases.kind(one) for one in source.scene(index)[1].things} for index in range(150)]
        assert all(map(own, shown))
        named = re.compile("|".join(f"{a} {b}" for a, b in compositions(difficulty)))
        assert all(own({*named.findall(source[index].text)}) for index in range(30))
    assert set(present_in(unseen)) == chosen and not set(present_in(seen)) & chosen and set(classes_of(seen)) >= chosen


@pytest.mark.parametrize("difficulty", sorted(LEVELS))
def test_every_colour_and_form_is_left_whatever_is_left_out(difficulty: int) -> None:
    level = LEVELS[difficulty]
    for count in range(level.colours * (level.shapes - 1) + 1):
        left = parse(f"shapes:difficulty={difficulty},without={count}").among or {*compositions(level)}
        assert {colour for colour, _ in left} == {*list(COLOURS)[: level.colours]} and {shape for _, shape in left} == {
            *SHAPES[: level.shapes]
        }


def test_fingerprints_tell_the_new_settings_apart_and_leave_older_ones_as_they_were() -> None:
    bundled = Path(efficientvlm.__file__).parent / "bundled" / "easy-vqa-pretrained" / "evlm_manifest.json"
    known = json.loads(bundled.read_text("utf-8"))["data"][0]
    assert Shapes(PAIRS, "train", spec=known["name"], image_size=64).fingerprint == known["fingerprint"]
    specs = (
        "shapes",
        "shapes:exact=1",
        "shapes:hide=all",
        "shapes:objects=2,alike=2",
        "shapes:objects=2",
        "shapes:only=5",
        "shapes:without=5",
    )
    assert len({Shapes(PAIRS, "train", spec=spec).fingerprint for spec in specs}) == len(specs)
    assert len({Shapes(PAIRS, "train", spec=spec).origin for spec in specs}) == len(specs)


def test_size_and_limits_of_the_specification() -> None:
    source = Shapes(QUESTIONS, "train", spec="shapes:size=50,objects=2-4,difficulty=1", image_size=32)
    assert len(source) == 50 and len(Shapes(QUESTIONS, "val", spec="shapes:size=50")) == 5
    assert source[0].image.shape == (32, 32, 3) and source[0].image.dtype == np.uint8
    with pytest.raises(IndexError):
        source[50]
    assert {len(source.scene(i)[1].things) for i in range(50)} == {2, 3, 4}
    for objects in range(1, 10):
        crowded = Shapes(PAIRS, "train", spec=f"shapes:objects={objects},difficulty=5")
        assert crowded[0].captions and len(crowded[0].regions) == len(crowded.scene(0)[1].things)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shapes:dificulty=2", "did you mean difficulty"),
        ("shapes:difficulty=9", "not in 1 to 5"),
        ("shapes:objects=4-2", "no range"),
        ("shapes:size=many", "no whole number"),
        ("shapes:objects", "no whole number"),
        ("shapes:exact=4", "not in 0 to 3"),
        ("shapes:hide=both", "use all, left, right"),
        ("shapes:alike=2", "write objects=2-3"),
        ("shapes:objects=1,alike=4", "write objects=4-4"),
        ("shapes:without=17", "each of them is to be left use 16 at most"),
        ("shapes:only=25", "use 24 at most"),
        ("shapes:only=5,without=5", "leave one of them out"),
        ("shapes:withot=5", "did you mean without"),
    ],
)
def test_a_wrong_specification_is_explained(spec: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(spec)
    assert words in f"{caught.value} {caught.value.fix}"


def test_one_picture_has_no_left_one_to_hide() -> None:
    with pytest.raises(BadInput, match="captions have no left picture"):
        Shapes(PAIRS, "train", spec="shapes:hide=left")


def test_drawn_statements_know_no_compositions() -> None:
    with pytest.raises(BadInput, match="which without and only do not choose"):
        Shapes(STATEMENTS, "train", spec=f"{EXACT},without=5")
