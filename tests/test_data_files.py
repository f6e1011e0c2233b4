"""A user's own data: every form, grouping by image, splits, and errors that say what to do."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientvlm.data import images
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PAIRS, PairItem
from efficientvlm.data.kinds.questions import QUESTIONS, VQAItem, question_of
from efficientvlm.data.opening import Source, open_data, record, texts
from efficientvlm.errors import BadInput

ROLES = {role: role for role in ("question", "answer", "weight")}


def png(seed: int, size: tuple[int, int] = (20, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pictures(folder: Path, count: int) -> list[str]:
    (folder / "img").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / "img" / f"{index}.png").write_bytes(png(index))
    return [f"img/{index}.png" for index in range(count)]


def vqa_rows(paths: list[Any], each: int = 2) -> list[dict[str, Any]]:
    return [{"image": path, "question": f"what is {n}?", "answer": f"thing {n}"} for path in paths for n in range(each)]


def explained(caught: pytest.ExceptionInfo[BadInput]) -> str:
    return f"{caught.value} {caught.value.fix}"


def test_jsonl_with_paths_is_grouped_by_image(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "vqa.jsonl", vqa_rows(pictures(tmp_path, 3)))
    source = open_data(QUESTIONS, spec, "test", image_size=8)
    assert len(source) == 3
    item = source[1]
    assert [q.text for q in item.questions] == ["what is 0?", "what is 1?"] and item.questions[1].answers == [("thing 1", 1.0)]
    assert item.image.shape == (8, 8, 3) and item.image.dtype == np.uint8 and item.id == "img/1.png"
    assert np.array_equal(item.image, open_image(tmp_path / "img/1.png", 8))
    assert list(texts(source))[:4] == ["what is 0?", "thing 0", "what is 1?", "thing 1"]


def in_base64(seed: int) -> str:
    return base64.b64encode(png(seed)).decode()


@pytest.mark.parametrize("wrap", [str, lambda text: f"data:image/png;base64,{text}", lambda text: {"bytes": text, "path": None}])
def test_jsonl_with_base64(tmp_path: Path, wrap: Any) -> None:
    spec = jsonl(tmp_path / "vqa.jsonl", vqa_rows([wrap(in_base64(seed)) for seed in range(3)]))
    source = open_data(QUESTIONS, spec, "test")
    assert len(source) == 3 and np.array_equal(source[2].image, open_image(png(2)))


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    data = datasets.Dataset.from_list(rows)
    return data.cast_column("image", datasets.Image()) if "image" in data.column_names else data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_tables_of_datasets(tmp_path: Path, form: str) -> None:
    rows = [{"image": {"bytes": png(seed), "path": "same-name.png"}, "question": "what?", "answer": ["a", "a", "b"]} for seed in (0, 0, 1)]
    data, path = as_dataset(rows), tmp_path / ("d.parquet" if form == "parquet" else "saved")
    if form == "parquet":
        data.to_parquet(path)
    else:
        data.select([2, 1, 0]).select([2, 1, 0]).save_to_disk(path)
    source = open_data(QUESTIONS, str(path), "test")
    assert len(source) == 2, "images are told apart by content, not by a stored name"
    assert len(source[0].questions) == 2 and np.array_equal(source[1].image, open_image(png(1)))
    assert dict(source[1].questions[0].answers) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert len(record(source, "test")["fingerprint"]) == 64


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"pic": [png(0), png(1)], "says": ["red", "blue"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    source = open_data(PAIRS, str(tmp_path / "p.parquet"), "test", columns={"image": "pic", "caption": "says"})
    assert [source[i].captions for i in range(2)] == [["red"], ["blue"]] and source[0].image.shape == (10, 20, 3)
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(BadInput, match=r"empty\.parquet: it has no rows"):
        open_data(PAIRS, str(tmp_path / "empty.parquet"), "test")


@pytest.mark.parametrize(
    ("value", "weight", "expected"),
    [
        (" Red ", None, [("Red", 1.0)]),
        (["yes", "no", "yes", "yes"], None, [("yes", 0.75), ("no", 0.25)]),
        ([{"answer": "a", "answer_confidence": "yes"}] * 9 + [{"answer": "b"}], None, [("a", 0.9), ("b", 0.1)]),
        ({"answer": ["a", "b"], "answer_id": [1, 2]}, None, [("a", 0.5), ("b", 0.5)]),
        ("a", 0.5, [("a", 0.5)]),
        (["a", "b"], [0.9, 0.3], [("a", 0.9), ("b", 0.3)]),
        (True, None, [("yes", 1.0)]),
        (3, None, [("3", 1.0)]),
        (2.5, None, [("2.5", 1.0)]),
    ],
)
def test_answers_and_their_weights(value: Any, weight: Any, expected: list[tuple[str, float]]) -> None:
    found = question_of({"question": "what?", "answer": value, "weight": weight}, "row 1", ROLES).answers
    assert [a for a, _ in found] == [a for a, _ in expected]
    assert [w for _, w in found] == pytest.approx([w for _, w in expected])


@pytest.mark.parametrize(
    ("value", "weight"),
    [
        (None, None),
        ([], None),
        ("", None),
        (["a", ""], None),
        ([{"text": "a"}], None),
        (float("nan"), None),
        ("a", -1),
        (["a", "b"], [1]),
        ("a", "x"),
    ],
)
def test_what_is_no_answer(value: Any, weight: Any) -> None:
    with pytest.raises(BadInput, match=r"row 1: its (answer is no answer|weight is no weight)"):
        question_of({"question": "what?", "answer": value, "weight": weight}, "row 1", ROLES)


def test_pairs_with_captions_and_regions(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 2)
    rows = [
        {
            "image": paths[0],
            "captions": ["a", "b"],
            "regions": [{"caption": ["x", "y"], "bb": [5, 0, 10, 5]}, {"phrase": "z", "box": [15, 5, 50, 50]}],
        },
        {"image": paths[1], "captions": "c"},
        {"image": paths[0], "captions": ["b", "d"]},
    ]
    source = open_data(PAIRS, jsonl(tmp_path / "p.jsonl", rows), "test", image_size=16)
    first, second = source[0], source[1]
    assert first.captions == ["a", "b", "d"] and second.captions == ["c"] and second.regions == []
    assert [(r.phrase, r.box) for r in first.regions] == [
        ("x", (0.5, 0.25, 0.5, 0.5)),
        ("y", (0.5, 0.25, 0.5, 0.5)),
        ("z", (0.875, 0.75, 0.25, 0.5)),  # clipped to the image
    ]
    assert list(texts(source)) == ["a", "b", "d", "x", "y", "z", "c"]


def test_image_id_groups_rows(tmp_path: Path) -> None:
    first, copy = pictures(tmp_path, 2)
    (tmp_path / copy).write_bytes((tmp_path / first).read_bytes())
    rows = [{"image": first, "image_id": 7, "caption": "a"}, {"image": copy, "image_id": 7, "caption": "b"}]
    source = open_data(PAIRS, jsonl(tmp_path / "p.jsonl", rows), "test")
    assert len(source) == 1 and source[0].id == "7" and source[0].captions == ["a", "b"]


@pytest.mark.parametrize(("image", "expected"), [("picture", 2), ("image", 1)])
def test_columns_can_be_named(tmp_path: Path, image: str, expected: int) -> None:
    paths = pictures(tmp_path, 2)
    rows = [{"image": paths[0], "picture": path, "text": "why?", "says": "so", "image_id": None} for path in paths]
    for row in rows:
        del row["image_id"]
    columns = {"image": image, "question": "text", "answer": "says"}
    assert len(open_data(QUESTIONS, jsonl(tmp_path / "v.jsonl", rows), "test", columns=columns)) == expected


def test_a_missing_column_lists_those_found(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "v.jsonl", [{"image": "a.png", "query": "?", "answer": "b"}])
    with pytest.raises(BadInput) as caught:
        open_data(QUESTIONS, spec, "train")
    assert "image, query, answer" in explained(caught) and "--column question=<name>" in explained(caught)
    with pytest.raises(BadInput) as caught:
        open_data(QUESTIONS, spec, "train", columns={"question": "ask"})
    assert "no column ask" in explained(caught) and "query" in explained(caught)
    with pytest.raises(BadInput) as caught:
        open_data(QUESTIONS, spec, "train", columns={"query": "query"})
    assert "no role query" in explained(caught) and "question" in explained(caught)


def keys(source: Source[Any]) -> set[str]:
    return {source[i].id for i in range(len(source))}


def test_the_held_out_images_are_stable(tmp_path: Path) -> None:
    rows = vqa_rows(pictures(tmp_path, 60))
    spec = jsonl(tmp_path / "v.jsonl", rows)
    train, val = (keys(open_data(QUESTIONS, spec, split, val_fraction=0.3)) for split in ("train", "val"))
    assert not train & val and len(train | val) == 60 and 8 <= len(val) <= 28
    assert len(open_data(QUESTIONS, spec, "test")) == 60
    again = jsonl(tmp_path / "shuffled.jsonl", rows[::-1] + vqa_rows([base64.b64encode(png(99)).decode()]))
    assert keys(open_data(QUESTIONS, again, "val", val_fraction=0.3, seed=5)) >= val
    assert not keys(open_data(QUESTIONS, again, "train", val_fraction=0.3)) & val
    assert len(open_data(QUESTIONS, spec, "val", val_fraction=0.0)) == 0


def test_limit_draws_a_sample(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "v.jsonl", vqa_rows(pictures(tmp_path, 30)))
    some = [keys(open_data(QUESTIONS, spec, "test", limit=5, seed=seed)) for seed in (0, 0, 1)]
    assert len(some[0]) == 5 and some[0] == some[1] != some[2]


def test_a_folder_with_a_file_a_split(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 12)
    jsonl(tmp_path / "train.jsonl", vqa_rows(paths[:8]))
    jsonl(tmp_path / "test.jsonl", vqa_rows(paths[8:10]))
    assert (
        len(open_data(QUESTIONS, str(tmp_path), "train", val_fraction=0.4))
        + len(open_data(QUESTIONS, str(tmp_path), "val", val_fraction=0.4))
        == 8
    )
    assert keys(open_data(QUESTIONS, str(tmp_path), "test")) == set(paths[8:10])
    jsonl(tmp_path / "validation.jsonl", vqa_rows(paths[10:]))
    assert keys(open_data(QUESTIONS, str(tmp_path), "val")) == set(paths[10:]) and len(open_data(QUESTIONS, str(tmp_path), "train")) == 8


def test_shards_and_a_saved_dictionary(tmp_path: Path) -> None:
    import datasets

    parts = [
        as_dataset([{"image": {"bytes": png(s), "path": None}, "caption": f"c{s}"} for s in range(a, b)])
        for a, b in ((0, 3), (3, 5), (5, 6))
    ]
    for index, part in enumerate(parts[:2]):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / "hub" / "data" / f"train-0000{index}-of-00002.parquet")
    datasets.DatasetDict(train=parts[0], validation=parts[1], test=parts[2]).save_to_disk(tmp_path / "dict")
    assert len(open_data(PAIRS, str(tmp_path / "hub"), "train", val_fraction=0)) == 5
    found = [open_data(PAIRS, str(tmp_path / "dict"), split) for split in ("train", "val", "test")]
    assert [len(source) for source in found] == [3, 2, 1] and found[2][0].captions == ["c5"]
    with pytest.raises(BadInput, match="no split test: it has train"):
        open_data(PAIRS, str(tmp_path / "hub"), "test")


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 3)
    spec = jsonl(tmp_path / "v.jsonl", vqa_rows(paths))

    def now() -> str:
        return record(open_data(QUESTIONS, spec, "test"), "test")["fingerprint"]

    first = now()
    assert now() == first
    (tmp_path / "img" / "1.png").write_bytes(png(77))
    second = now()
    jsonl(Path(spec), vqa_rows(paths, each=1))
    assert len({first, second, now()}) == 3


def test_transparency_orientation_and_modes(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png")[0].tolist() == [[255, 0, 0]] + [[255, 255, 255]] * 3
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png")[0, 0].tolist() == [10, 20, 30]
    Image.new("L", (3, 2), 9).save(tmp_path / "l.png")
    assert open_image(tmp_path / "l.png")[1, 2].tolist() == [9, 9, 9]
    Image.fromarray(np.full((2, 3), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png")[0, 0].tolist() == [156] * 3
    turned = Image.new("RGB", (4, 2), (0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    assert open_image(tmp_path / "t.jpg").shape == (4, 2, 3)


def test_damaged_and_huge_pictures_name_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pictures(tmp_path, 3)
    (tmp_path / paths[1]).write_bytes(png(1)[:60])
    (tmp_path / paths[2]).write_text("no picture")
    source = open_data(QUESTIONS, jsonl(tmp_path / "v.jsonl", vqa_rows(paths, each=1)), "test", image_size=8)
    assert source[0].image.shape == (8, 8, 3)
    for row in (1, 2):
        with pytest.raises(BadInput, match=rf"v\.jsonl line {row + 1}: .*{row}\.png.* cannot be read"):
            source[row]
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(BadInput, match="20 x 10 pixels"):
        source[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "missing.png", "question": "q", "answer": "a"}, r"line 2: there is no image missing\.png"),
        ({"image": None, "question": "q", "answer": "a"}, "line 2: it has no image"),
        ({"image": "A" * 1200, "question": "q", "answer": "a"}, "line 2: its image is no base64"),
        ({"image": "img/0.png", "question": " ", "answer": "a"}, "line 2: its question is no text"),
        ({"image": "img/0.png", "question": "q"}, "line 2: its answer is no answer"),
    ],
)
def test_a_bad_row_is_named_when_opened(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    good = vqa_rows(pictures(tmp_path, 1), each=1)
    with pytest.raises(BadInput, match=words):
        open_data(QUESTIONS, jsonl(tmp_path / "v.jsonl", [*good, row]), "test")


def test_a_bad_region_is_named(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 1)
    for box in ([30, 0, 5, 5], [0, 0, 0, 5], [0, 0, 5], "all", None):
        spec = jsonl(tmp_path / "p.jsonl", [{"image": paths[0], "caption": "a", "regions": [{"caption": "x", "bb": box}]}])
        with pytest.raises(BadInput, match="line 1: a region's box"):
            open_data(PAIRS, spec, "test")[0]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"image": "a"}\n{oops\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "table.csv").write_text("a,b\n", encoding="utf-8")
    (tmp_path / "void").mkdir()
    cases = {
        "broken.jsonl": "line 2: it is not JSON",
        "empty.jsonl": "no rows",
        "broken.parquet": "parquet",
        "table.csv": "table.csv",
        "void": "no split",
    }
    for name, words in cases.items():
        with pytest.raises(BadInput, match=words):
            open_data(QUESTIONS, str(tmp_path / name), "train")


def test_unknown_data_says_what_there_is() -> None:
    for spec, words in (("shapez:seed=1", "did you mean shapes"), ("nowhere.jsonl", "no such file"), ("", "easy-vqa")):
        with pytest.raises(BadInput) as caught:
            open_data(QUESTIONS, spec, "train")
        assert words in explained(caught)
    with pytest.raises(BadInput, match="no captions"):
        open_data(PAIRS, "easy-vqa", "train")
    with pytest.raises(BadInput, match="no split dev"):
        open_data(QUESTIONS, "easy-vqa", "dev")


def test_built_in_data_opens_by_name() -> None:
    shapes = open_data(PAIRS, "shapes:size=40", "train", limit=7, image_size=16)
    assert len(shapes) == 7 and isinstance(shapes[6], PairItem) and shapes[0].image.shape == (16, 16, 3)
    easy = open_data(QUESTIONS, "easy-vqa", "val", limit=2)
    assert isinstance(easy[1], VQAItem) and easy[1].image.shape == (64, 64, 3)
    said = {"name": "easy-vqa", "split": "val", "count": 2, "fingerprint": easy.fingerprint, "licence": "MIT", "skipped": 0}
    said["read_as"] = ["2 of 400 images, drawn at random (seed 0)"]
    assert record(easy, "val") == said
    assert {"rectangle", "teal", "what color is the shape?"} <= set(texts(open_data(QUESTIONS, "shapes:difficulty=2,size=300", "train")))


@pytest.mark.parametrize("numbers", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), 200, np.int32)])
def test_pixels_without_a_known_white_are_refused(numbers: np.ndarray) -> None:
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "TIFF")
    with pytest.raises(BadInput, match="32 bits"):
        open_image(file.getvalue())
