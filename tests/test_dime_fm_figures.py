"""The benchmark of DIME-FM: which rows it has, what it publishes, and that rows come out of a whole chain."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from doc_pages import ROOT, script
from test_dime_fm_recipes import taught
from test_flickr8k import world  # noqa: F401

from efficientvlm.checkpoints.files import MANIFEST
from efficientvlm.data.shapes import parse
from efficientvlm.errors import BadInput

PAGE = "docs/dime-fm.md"


@pytest.fixture(scope="module")
def dime_fm() -> Any:
    return script("benchmarks/dime_fm.py")


@pytest.fixture(scope="module")
def publishing() -> Any:
    return script("benchmarks/publish_dime_fm.py")


def of_scenes(model: str, accuracy: float, first: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    part = 1.0 if model == "teacher" else 0.27
    sizes = {"vision_parameters": int(part * 1.6e6), "vision_of_teacher": part, "macs_of_teacher": part}
    kept = {"accuracy": 0.9 * accuracy, "accuracy_of_teacher": accuracy, "r1": 0.6 * first, "r1_of_teacher": first}
    counted = {"data": "shapes:only=20", "images": 500, "classified": 1000, "classified_data": "shapes:size=10000,only=20"}
    timed = {f"batch_{batch}_speedup": 1.0 if model == "teacher" else speed for batch, speed in ((8, 3.0), (32, 3.5))}
    timed |= {"threads": 1, "load": 1.5}
    return {"seed": seed, "model": model, **kept, **sizes, **timed, **counted, "torch": "2", **more}


def every_model(student: float = 0.97, **more: Any) -> list[dict[str, Any]]:
    kept = {"teacher": 1.0, "student": student, "both terms unread": 0.8, "pruned": 0.7}
    return [of_scenes(name, part, part, **({} if name == "teacher" else more)) for name, part in kept.items()]


def of_store(source: str, speed: float) -> dict[str, Any]:
    rates = {"images_per_s": speed, "images_per_s_q1": speed - 1, "images_per_s_q3": speed + 1, "speedup": speed / 100}
    times = {f"{phase}_ms": 5.0 for phase in ("data", "teacher", "student", "optimizer")}
    about = {"batch_size": 64, "threads": 1, "load": 0.5, "torch": "2", "what": "eight layers and two"}
    return {"pair": "scenes", "source": source, **rates, **times, **about}


def of_photos(model: str, recall: float, seed: int = 0) -> dict[str, Any]:
    sentences = "" if model == "teacher" else 15000
    firsts = {"image_to_text_r1": recall / 2, "text_to_image_r1": recall / 3}
    about = {"photos": 3000, "sentences": sentences, "captions_among": 0.5, "torch": "2", "steps": 300, "precision": "bf16"}
    return {"seed": seed, "model": model, "mean_recall": recall, "of_teacher": recall / 0.4, **firsts, **about}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            {"selected": [0.3], "true pairs": [0.2]},
            "trained on true pairs for as many steps: 10.0 points of mean recall more, of one seed.",
        ),
        (
            {"selected": [0.3], "true pairs": [0.2]},
            "That no pairs are needed to reach what pairs give, as the paper says, holds here for `selected` (both terms).",
        ),
        ({"selected": [0.1, 0.1], "true pairs": [0.2, 0.2]}, "does not hold here for `selected` (both terms)."),
        ({"selected": [0.1], "without vl": [0.2]}, "`without vl` against `selected`: 10.0 points of mean recall more, of one seed."),
        (
            {"selected": [0.3, 0.32], "random part": [0.3, 0.31]},
            "equal size: 0.5 points of mean recall more, a tie beside the spread of the",
        ),
        (
            {"selected": [0.3, 0.31], "whole pile": [0.2, 0.21]},
            "Selected sentences against the whole pile: 10.0 points of mean recall more.",
        ),
    ],
)
def test_what_photos_say_of_the_claims(publishing: Any, rows: dict[str, list[float]], said: str) -> None:
    lines = texts([of_photos(name, value, seed) for name, values in rows.items() for seed, value in enumerate(values)])
    assert said in " ".join(publishing.of_photos(publishing.grouped(lines, "model")))


def texts(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{key: str(value) for key, value in record.items()} for record in records]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "`student` keeps 97.0 % of the teacher's accuracy (target: 95 %) and 97.0 % of its R@1 (90 %) with 27.0 %"),
        ({}, "is faster by 94 % of the ratio of multiply-adds at batch 32 (90 %): reached, of one seed."),
        (
            {},
            "(90 %) with 27.0 % of its tower's parameters (29 %), and is faster by 94 % of the ratio of multiply-adds",
        ),
        ({}, "`pruned`, of equal size, against `student`, of the same seeds: 16.2 points of R@1 less, of one seed."),
        ({"student": 0.94}, "94 % of the ratio of multiply-adds at batch 32 (90 %): missed, of one seed."),
        (
            {"vision_of_teacher": 0.3},
            "with 30.0 % of its tower's parameters (29 %), and is faster by 94 % of the ratio of multiply-adds at batch 32 (90 %): missed",
        ),
        ({"batch_32_speedup": 3.0}, "is faster by 81 % of the ratio of multiply-adds at batch 32 (90 %): missed"),
    ],
)
def test_verdicts(publishing: Any, changed: dict[str, Any], said: str) -> None:
    assert said in " ".join(publishing.of_scenes(publishing.grouped(texts(every_model(**changed)), "model")))


def test_what_is_not_measured_and_what_does_not_count_is_said(publishing: Any) -> None:
    lines = texts([of_scenes("teacher", 1.0, 0.7), of_scenes("student", 0.97, 0.95)])
    found = " ".join(publishing.of_scenes(publishing.grouped(lines, "model")))
    assert "`both terms unread`: not measured yet." in found
    assert "Nothing of this counts: the teacher's R@1 is 42.0 %, less than 50." in found and "teacher's accuracy is" not in found
    guessing = texts([of_scenes("teacher", 0.3, 1.0), of_scenes("student", 0.28, 0.95)])
    found = " ".join(publishing.of_scenes(publishing.grouped(guessing, "model")))
    assert "Nothing of this counts: the teacher's accuracy is 27.0 %, less than 50." in found and "teacher's R@1 is" not in found
    some = texts([of_scenes("teacher", 1.0, 1.0), of_scenes("teacher", 0.5, 1.0, seed=1), of_scenes("student", 0.97, 0.95)])
    found = " ".join(publishing.of_scenes(publishing.grouped(some, "model")))
    assert "Seed 1 says little: the teacher's accuracy is 45.0 %, less than 50." in found and "Nothing" not in found


def test_tables_and_plot_are_made_from_the_rows_that_are_there(publishing: Any, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    unmeasured = re.sub(
        r"(<!-- dime-fm-\w+:begin -->\n).*?(<!-- dime-fm-\w+:end -->)", r"\1\2", (ROOT / PAGE).read_text("utf-8"), flags=re.DOTALL
    )
    (tmp_path / PAGE).write_text(unmeasured)
    with pytest.raises(BadInput, match="no CSVs of DIME-FM"):
        publishing.publish(tmp_path)
    append, results = script("benchmarks/published.py").append, tmp_path / "benchmarks/results"
    for record in (of_store("live", 100.0), of_store("images", 150.0), of_store("images and sentences", 210.0)):
        append(results / "dime_fm_store_some-cpu.csv", record)
    publishing.publish(tmp_path)
    page = (tmp_path / PAGE).read_text("utf-8")
    assert "2.10 times as many images a second (target: 2): reached." in page and "| model |" not in page
    for record in [*every_model(), of_scenes("student", 0.95, 0.93, seed=1)]:
        append(results / "dime_fm_scenes_some-cpu.csv", record)
    for record in (of_photos("selected", 0.3), of_photos("selected", 0.32, seed=1), of_photos("teacher", 0.4)):
        append(results / "dime_fm_photos_some-cpu.csv", record)
    written = publishing.publish(tmp_path)
    page = (tmp_path / PAGE).read_text("utf-8")
    assert "of 1,000 test images of `shapes:size=10000,only=20`. R@1, as mean of both ways: among 500 of `shapes:only=20`." in page
    assert (
        "| student | 2 | 86.4 (85.5 to 87.3) | 96.0 (95.0 to 97.0) % | 57.0 (55.8 to 58.2) | 95.0 (93.0 to 97.0) % | 0.43 M, 27.0 % "
        "| 3.00 × / 3.50 × | 81 % / 94 % |" in page
    )
    assert "| selected | 2 | 3,000 | 15,000 | 50.0 % | 31.0 (30.0 to 32.0) | 77.5 % |" in page
    assert page.index("| teacher | 1 | 3,000 |") < page.index("| selected | 2 |") and "for 300 steps, in bf16." in page
    assert written == [tmp_path / PAGE, tmp_path / "docs/dime-fm.png"] and all(path.stat().st_size for path in written)


def shortened(dime_fm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of the recipe of scenes take seconds, and tables lie in `tmp_path`."""
    text = (ROOT / "recipes/dime_fm/scenes.yaml").read_text("utf-8")
    text = re.sub(r"(?<=batch_size: )\d+", "4", re.sub(r"(?<=max_steps: )\d+", "2", text))
    text = re.sub(r"limit: \d+", "limit: 12", re.sub(r"size=\d+", "size=40", text)).replace("vision_layers: 8", "vision_layers: 4")
    (tmp_path / "scenes.yaml").write_text(re.sub(r"sparsity: [\d.]+", "sparsity: 0.2", text))
    for name, value in {"RECIPES": tmp_path, "ROOT": tmp_path}.items():
        monkeypatch.setattr(dime_fm, name, value)
    monkeypatch.setitem(script("benchmarks/scenes.py").TIMED, "rounds", 1)


def table(dime_fm: Any, part: str, *given: str) -> list[dict[str, str]]:
    """The rows of a part after the script ran twice; the second time nothing is left to do."""
    path = dime_fm.ROOT / dime_fm.csv_of(f"dime_fm_{part}", dime_fm.processor())
    assert dime_fm.main(["--part", part, "--out", str(dime_fm.ROOT / "runs"), *given]) == 0
    before = path.read_text("utf-8")
    assert dime_fm.main(["--part", part, "--out", str(dime_fm.ROOT / "runs"), *given]) == 0 and path.read_text("utf-8") == before
    return list(script("benchmarks/published.py").rows_of(path))


def test_every_seed_has_its_teacher_and_all_students(dime_fm: Any) -> None:
    found = [row.key for row in dime_fm.rows(["scenes"], dime_fm.SEEDS, None)]
    assert len({*found}) == len(found) == len(dime_fm.SEEDS) * len(dime_fm.WHAT)
    assert [key for key in found if key[1] == "teacher"] == [("0", "teacher"), ("1", "teacher"), ("2", "teacher")]


def test_photos_have_three_seeds_where_sentences_are_compared(dime_fm: Any) -> None:
    found = [row.key for row in dime_fm.rows(["photos"], dime_fm.SEEDS, None)]
    assert len({*found}) == len(found) and found[0] == ("0", "teacher")
    several = {name for seed, name in found if seed == "2"}
    assert several == {"selected", "whole pile", "random part", "true pairs"}
    assert {name for _, name in found} - several >= {"without vl", "without pvl", "half of the photos", "a tenth of the photos"}


def test_sentences_may_name_every_composition(dime_fm: Any) -> None:
    own = dime_fm.Scenes(0, Path("runs")).settings("distilled").sentences
    every = dime_fm.every_composition(own)
    assert parse(own).among and parse(every).among is None and parse(every).seed == parse(own).seed


def test_a_row_of_no_such_name_is_refused(dime_fm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert dime_fm.main(["--part", "scenes", "--row", "teachers", "--list"]) == 3
    assert "there are teacher; student" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_scenes_come_out_of_a_chain(dime_fm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened(dime_fm, tmp_path, monkeypatch)
    found = {record["model"]: record for record in table(dime_fm, "scenes", "--seed", "0")}
    assert list(found) == list(dime_fm.WHAT) and {record["seed"] for record in found.values()} == {"0"}
    assert found["teacher"]["vision_of_teacher"] == "1" and float(found["student"]["vision_of_teacher"]) < 0.6
    assert all(record["data"].endswith("only=20") and float(record["batch_8_speedup"]) > 0 for record in found.values())
    assert all(0 <= float(record[name]) <= 1 for record in found.values() for name in ("accuracy", "r1"))
    assert float(found["pruned"]["sparsity"]) == pytest.approx(0.2, abs=0.03)
    made = tmp_path / "runs/scenes/0"
    assert {path.name for path in made.iterdir()} >= {"distilled", "both-terms", "both-terms-unread", "images", "pruned"}
    read = [json.loads((made / name / MANIFEST).read_text("utf-8"))["config"] for name in ("distilled", "both-terms", "both-terms-unread")]
    assert ["without=" in config["sentences"] for config in read] == [True, False, True]
    assert [config["weights"]["vl"] for config in read] == [0.0, 0.7, 0.7]


@pytest.mark.slow
def test_rows_of_the_store_are_timed_in_turns(dime_fm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shortened(dime_fm, tmp_path, monkeypatch)
    small = dime_fm.Pair("two layers and one", {}, {"layers": {"vision": 1, "text": 2}}, batch=4, rounds=2, warm=1, steps=2)
    monkeypatch.setattr(dime_fm, "PAIRS", {"small": small})
    found = {record["source"]: record for record in table(dime_fm, "store")}
    assert list(found) == ["live", "images", "images and sentences"] and found["live"]["speedup"] == "1"
    assert {record["steps"] for record in found.values()} == {"4"} and float(found["live"]["teacher_ms"]) > 0
    assert float(found["images and sentences"]["teacher_ms"]) < float(found["live"]["teacher_ms"])
    assert all(float(record["images_per_s"]) > 0 for record in found.values())


@pytest.mark.slow
def test_rows_of_photos_come_out_of_a_chain(
    dime_fm: Any,
    world: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, own = taught(world), script("benchmarks/dime_fm_photos.py")
    metrics = dict.fromkeys((*own.METRICS, "mean_recall"), 0.5)
    (folder / "teacher.json").write_text(json.dumps({"metrics": metrics, "fitted_on": 24, "photos": 24, "captions": 20, "sentences": 40}))
    text = (ROOT / "recipes/dime_fm/photos.yaml").read_text("utf-8")
    text = re.sub(r"(?<=max_steps: )\d+", "2", re.sub(r"(?<=batch_size: )\d+", "4", text)).replace("image_size: 84", "image_size: 28")
    (tmp_path / "photos.yaml").write_text(text.replace("embed_dim: 384", "embed_dim: 24").replace("total: 15000", "total: 10"))
    monkeypatch.setattr(own, "RECIPE", tmp_path / "photos.yaml")
    monkeypatch.setattr(dime_fm, "ROOT", tmp_path)
    names = ["teacher", "selected", "true pairs", "random part", "half of the photos", "without vl", "selected, pruned"]
    given = [
        "--seed",
        "0",
        "--photos",
        str(folder),
        "--towers",
        str(world / "towers"),
        *(part for name in names for part in ("--row", name)),
    ]
    found = {record["model"]: record for record in table(dime_fm, "photos", *given, "--precision", "bf16")}
    assert set(found) == set(names) and found["teacher"]["of_teacher"] == "1"
    assert {record["precision"] for name, record in found.items() if name != "teacher"} == {"bf16"}
    assert (found["half of the photos"]["photos"], found["random part"]["sentences"], found["true pairs"]["sentences"]) == (
        "12",
        "10",
        "20",
    )
    assert 0 <= float(found["selected"]["captions_among"]) <= 1 and float(found["selected, pruned"]["sparsity"]) > 0.1
