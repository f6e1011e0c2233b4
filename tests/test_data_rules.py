"""The rules by which a user's data is read: numbers, lists, labels, splits, layouts, limits; and that what is guessed is said."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import nested
from PIL import Image
from test_data_files import jsonl, pictures, png
from test_data_forms import add, as_csv, vqav2

from efficientvlm.data import text_tables
from efficientvlm.data.cells import listed, text_of
from efficientvlm.data.images import open_image
from efficientvlm.data.items import Question, Region
from efficientvlm.data.kinds.pairs import PAIRS, PairItem, pair_batch, region_batch
from efficientvlm.data.kinds.questions import QUESTIONS, VQAItem, answers, vqa_batch
from efficientvlm.data.opening import drawn, notes, open_data, record, usable
from efficientvlm.data.splits import by_split, split_of
from efficientvlm.data.text_tables import csv_rows
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.errors import BadInput


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def said(spec: Any, split: str = "test", **settings: Any) -> list[list[str]]:
    source = open_data(PAIRS, str(spec), split, **settings)
    return [source[index].captions for index in range(len(source))]


def in_folders(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345670.0, "12345670"),
        (1234567.5, "1234567.5"),
        (0.1, "0.1"),
        (-3.0, "-3"),
        (2**60, str(2**60)),
        (1e22, "1e+22"),
        (True, "yes"),
        (float("inf"), None),
        (" a ", "a"),
    ],
)
def test_numbers_keep_their_digits(value: Any, text: str | None) -> None:
    assert text_of(value) == text


def test_numbers_labels_and_decimals_of_tables(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    features = datasets.Features(
        image=datasets.Image(),
        question=datasets.Value("string"),
        answer=datasets.ClassLabel(names=["cat", "dog"]),
        many=datasets.List(datasets.ClassLabel(names=["x", "y"])),
        short=datasets.Value("float32"),
        gap=datasets.Value("float64"),
    )
    rows = [
        {"image": {"bytes": png(n), "path": None}, "question": "?", "answer": n, "many": [n, 0], "short": 0.1, "gap": [None, 7e6][n]}
        for n in (0, 1)
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "d.parquet")
    wanted = {"answer": ["cat", "dog"], "many": ["x", "y"], "short": ["0.1"]}
    for spec in (str(tmp_path / "saved"), str(tmp_path / "d.parquet"), f"stream:{tmp_path / 'd.parquet'}"):
        for column, found in wanted.items():
            source = open_data(QUESTIONS, spec, "train", columns={"answer": column}, val_fraction=0, shuffle_buffer=1)
            items = [source[n] for n in (0, 1)]
            assert sorted({answer for item in items for answer, _ in item.questions[0].answers}) == found
        with pytest.raises(BadInput, match=r"gap is no answer \(None\)|none could be read"):
            open_data(QUESTIONS, spec, "train", columns={"answer": "gap"}, val_fraction=0, shuffle_buffer=1, max_bad=0)[0]
    assert list(answers(open_data(QUESTIONS, str(tmp_path / "saved"), "test", columns={"answer": "gap"}, max_bad=1))) == [("7000000", 1.0)]
    table = pyarrow.table({"image": [png(0)], "caption": pyarrow.array(["c"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "kinds.parquet")
    assert said(tmp_path / "kinds.parquet") == [["c"]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a', \"it's\"]", ["a", "it's"]),
        ('["a", "b"]', ["a", "b"]),
        ("('a', 'b')", ["a", "b"]),
        ("{'b', 'a'}", ["a", "b"]),
        ("[{'answer': 'a'}]", [{"answer": "a"}]),
        ("[1, 2]", [1, 2]),
        ("[]", []),
        ("[a red car]", "[a red car]"),
        ("(a) red", "(a) red"),
        ('("quoted" aside)', '("quoted" aside)'),
        ("a [b]", "a [b]"),
        ("  ", "  "),
    ],
)
def test_text_that_is_plainly_a_list_is_one(text: str, value: Any) -> None:
    assert listed(text, "here", "caption") == value


@pytest.mark.parametrize("text", ["['a' 'b']", "['a', 'b'", "array(['a'])", "['a', nan]", "[1 2 3]", "['a',\n 'b' 'c']"])
def test_a_list_that_cannot_be_read_is_named(text: str) -> None:
    if text == "['a', 'b'":
        text += " ... ]"
    with pytest.raises(BadInput, match=r"here: its caption looks like a list and is none"):
        listed(text, "here", "caption")


def test_lists_as_pandas_writes_them(tmp_path: Path) -> None:
    rows = [{"image": path, "caption": str([f"one {n}", f"two {n}"])} for n, path in enumerate(pictures(tmp_path, 2))]
    as_csv(tmp_path / "d.csv", rows)
    assert said(tmp_path / "d.csv") == [["one 0", "two 0"], ["one 1", "two 1"]] == said(jsonl(tmp_path / "d.jsonl", rows))
    as_csv(tmp_path / "d.csv", [*rows, {"image": "img/0.png", "caption": "['a' 'b']"}])
    with pytest.raises(BadInput, match=r"line 4: its caption looks like a list"):
        said(tmp_path / "d.csv")


def test_quotes_of_tsv_and_csv(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 6)
    quoted = {1: '"quick sale', 3: '24"', 4: '"a ""big"" dog"', 5: '"whole"'}
    texts = [quoted.get(n, f"thing {n}") for n in range(6)]
    (tmp_path / "d.TSV").write_text("\n".join(["image\tcaption", *(f"{path}\t{text}" for path, text in zip(paths, texts, strict=True))]))
    assert said(tmp_path / "d.TSV") == [["thing 0"], ['"quick sale'], ["thing 2"], ['24"'], ['a "big" dog'], ['"whole"']]
    texts[4] = "thing 4"
    (tmp_path / "d.csv").write_text("\n".join(["image,caption", *(f"{path},{text}" for path, text in zip(paths, texts, strict=True))]))
    with pytest.raises(BadInput, match="line 3: a quotation mark opens a cell of 3 lines, of which some are rows themselves"):
        said(tmp_path / "d.csv")
    assert len(said(tmp_path / "d.csv", max_bad=1)) == 5
    (tmp_path / "d.csv").write_text('image,caption\nimg/0.png,plain\nimg/1.png,"a dog, brown\na cat, black"\n')
    assert said(tmp_path / "d.csv") == [["plain"], ["a dog, brown\na cat, black"]]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_cell_of_several_lines_stands_in_any_column(place: int) -> None:
    rows = [["yes", f"img{n}.jpg", "val"] for n in range(6)]
    for row, text in zip(rows[1:], ("two\ndogs", 'in\nthe, "snow"\n', "\n\n", "a, b\nc\nd, e", "end\n"), strict=True):
        row[place] = text
    file = io.StringIO()
    csv.writer(file).writerows([["answer", "image", "split"], *rows])
    found = csv_rows(io.BytesIO(file.getvalue().encode()), "d.csv")
    assert [list(row.values()) for _, _, row in found if isinstance(row, dict)] == rows


def test_the_end_of_a_torn_cell_is_no_row() -> None:
    for lines in ('"big "dogs"\nin snow",2.jpg', '"quick,2.jpg\nc,3.jpg\n24",2.jpg'):
        text = f'caption,image\na,1.jpg\n{lines}\n9" nail,4.jpg\n8" nail,5.jpg\n'
        found = {number: row for _, number, row in csv_rows(io.BytesIO(text.encode()), "d.csv")}
        torn = lines.count("\n") + 3
        assert [number for number, row in found.items() if isinstance(row, BadInput)] == [3, torn]
        assert "may close a cell that a line above opens" in str(found[torn])
        assert found[torn + 1] == {"caption": '9" nail', "image": "4.jpg"}


@pytest.mark.parametrize("column", ["note", "image", "caption"])
def test_text_that_is_not_utf8_counts_where_it_is_read(tmp_path: Path, column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    cells = {"image": pictures(tmp_path, 2), "caption": ["one", "two"], "note": ["", ""]}
    plain = pyarrow.table({**cells, column: [cell.encode() for cell in cells[column][:1]] + [b"\xff"]})
    rows = plain.set_column(plain.schema.get_field_index(column), column, plain[column].chunk(0).view(pyarrow.string()))
    pyarrow.parquet.write_table(rows, tmp_path / "d.parquet")
    stream, spec = open_data(PAIRS, f"stream:{tmp_path}/d.parquet", "train", shuffle_buffer=1), str(tmp_path / "d.parquet")
    if column == "note":
        assert said(spec) == [["one"], ["two"]] and [stream[n].captions for n in range(2)] == [["one"], ["two"]]
        return
    with pytest.raises(BadInput, match=f"{column} is not UTF-8 text"):
        said(spec)
    assert [stream[n].captions for n in range(2)] == [["one"], ["one"]] and "UTF-8" in stream.skips.lines()[0]


def test_a_first_line_of_values_is_no_header(tmp_path: Path) -> None:
    for line in ("1.png\tred\n", f"7\t{'A' * 100_000}\n"):
        (tmp_path / "d.tsv").write_text(line * 2)
        with pytest.raises(BadInput, match="its first line is no header, it has values") as caught:
            said(tmp_path / "d.tsv")
        assert len(str(caught.value)) < 400


def test_an_optional_column_is_left_out(tmp_path: Path) -> None:
    rows = [{"image": path, "question": "q", "answer": "a", "weight": "1.5 kg", "image_id": 7} for path in pictures(tmp_path, 2)]
    spec = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(BadInput, match=r"its weight is no weight \('1\.5 kg'\)") as caught:
        open_data(QUESTIONS, spec, "test", columns={"image_id": ""})
    assert "--column weight=none" in caught.value.fix
    source = open_data(QUESTIONS, spec, "test", columns={"weight": "none", "image_id": ""})
    assert len(source) == 2 and record(source, "test")["read_as"][0] == "columns: image=image, question=question, answer=answer"
    with pytest.raises(BadInput, match="answer cannot be left out"):
        open_data(QUESTIONS, spec, "test", columns={"answer": "none"})
    assert (
        len(open_data(QUESTIONS, jsonl(tmp_path / "d.jsonl", [{**row, "weight": float("nan"), "image_id": None} for row in rows]), "test"))
        == 2
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train2017", "train"),
        ("v2_OpenEnded_mscoco_test-dev2015_questions", "test"),
        ("testdev_balanced", "test"),
        ("my-train-set", "train"),
        ("Validation", "val"),
        ("dev", "val"),
        ("val_2014", "val"),
        ("trainval", None),
        ("train-val", None),
        ("minival", None),
        ("latest", None),
        ("development", None),
        ("test1", "test"),
        ("test12", None),
        ("train-00000-of-00004", "train"),
    ],
)
def test_a_split_is_a_whole_part_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_claims_to_one_split_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train_old.jsonl", "test.jsonl"):
        jsonl(tmp_path / name, [{"image": path, "caption": name} for path in pictures(tmp_path, 1)])
    with pytest.raises(BadInput, match=r"2 splits for train: it has train\.jsonl, train_old\.jsonl"):
        said(tmp_path, "train")
    assert said(tmp_path) == [["test.jsonl"]]
    assert by_split(["train", "train_small", "validation"]) == {"train": ["train"], "val": ["validation"]}
    folder = vqav2(tmp_path / "vqa")
    for part in ("test2015", "test-dev2015"):
        (folder / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text('{"questions": []}')
    assert len(open_data(QUESTIONS, str(folder), "val")) == 1
    with pytest.raises(BadInput, match=r"2 splits for test: .*test-dev2015_questions\.json"):
        open_data(QUESTIONS, str(folder), "test")


def coco(folder: Path) -> Path:
    for part, ids in (("train2017", (1, 2)), ("val2017", (9,))):
        in_folders(folder, *(f"{part}/{n:012}.jpg" for n in ids))
        shown = [{"id": n, "file_name": f"{n:012}.jpg"} for n in ids]
        told = [{"image_id": n, "caption": f"{part} {n} {k}"} for n in ids for k in (0, 1)]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps({"images": shown, "annotations": told}))
        (folder / "annotations" / f"instances_{part}.json").write_text("{}")
    return folder


def test_the_layout_of_coco(tmp_path: Path) -> None:
    folder = coco(tmp_path / "coco")
    assert said(folder, "train", val_fraction=0) == [["train2017 1 0", "train2017 1 1"], ["train2017 2 0", "train2017 2 1"]]
    assert said(folder, "val") == [["val2017 9 0", "val2017 9 1"]] == said(folder / "annotations" / "captions_val2017.json")
    assert "split val is captions_val2017.json" in notes(open_data(PAIRS, str(folder), "val"))
    with pytest.raises(BadInput, match=r"no split test: it has captions_train2017\.json, captions_val2017\.json"):
        said(folder)


def test_metadata_at_the_root_is_obeyed(tmp_path: Path) -> None:
    names = [f"{part}/{kind}/{n}.png" for part in ("train", "val") for kind in ("a", "b") for n in (1, 2)]
    in_folders(tmp_path, *names)
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": f"shows {name}"} for name in names])
    for part in ("train", "val"):
        assert said(tmp_path, part) == [[f"shows {name}"] for name in names if name.startswith(part)]
    jsonl(tmp_path / "train" / "metadata.jsonl", [{"file_name": "a/1.png", "text": "other"}])
    with pytest.raises(BadInput, match=r"train/metadata\.jsonl both say"):
        said(tmp_path, "train")
    (tmp_path / "train" / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(BadInput, match=r"metadata\.csv and metadata\.jsonl both say"):
        said(tmp_path, "train")


def test_pictures_lie_as_deep_as_they_like(tmp_path: Path) -> None:
    with nested(tmp_path / "d") as deepest:
        in_folders(deepest, "cat/1.png", "dog/1.png")
        assert said(tmp_path / "d") == [["cat"], ["dog"]]
        for kind in ("cat", "dog"):
            (deepest / kind / "1.png").unlink()
            (deepest / kind).rmdir()


def test_folder_names_are_captions_only_where_they_are_plainly_classes(tmp_path: Path) -> None:
    in_folders(tmp_path / "ok", "fire_truck/1.png", "cat/1.JPG", "cat/2.png")
    source = open_data(PAIRS, str(tmp_path / "ok"), "test")
    assert said(tmp_path / "ok") == [["cat"], ["cat"], ["fire truck"]]
    assert notes(source) == ["the captions are the names of 2 folders: cat, fire truck"] == record(source, "test")["read_as"][1:]
    for number, (names, why) in enumerate(
        (
            (("x/train2017/1.png", "x/cat/1.png"), "train2017 is no name of a class"),
            (("images/1.png", "cat/1.png"), "images is no name of a class"),
            (("0001/1.png", "0002/1.png"), "0001 is no name of a class"),
            (("cat/1.png", "dog/small/1.png"), "different depths"),
            (("cat/1.png", "2.png"), "2.png lies in no folder of a class"),
            (("cat/1.png", "cat/2.png"), "all lie in one folder, cat"),
        )
    ):
        in_folders(tmp_path / str(number), *names)
        with pytest.raises(BadInput, match=why):
            said(tmp_path / str(number))


def test_links_are_followed_once_and_said(tmp_path: Path) -> None:
    in_folders(tmp_path / "real", "a/1.png", "b/1.png")
    in_folders(tmp_path / "d", "c/1.png")
    for kind in "ab":
        (tmp_path / "d" / kind).symlink_to(tmp_path / "real" / kind)
    (tmp_path / "d" / "c" / "round").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "c" / "film.mp4").write_bytes(b"")
    source = open_data(PAIRS, str(tmp_path / "d"), "test")
    assert said(tmp_path / "d") == [["a"], ["b"], ["c"]]
    assert notes(source)[0] == "2 linked folders were followed" and "1 linked folder was not followed" in notes(source)[1]
    assert ".mp4 1" in notes(source)[2]


def test_stray_files_hide_no_data(tmp_path: Path) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    jsonl(tmp_path / "hub" / "data" / "train-0.jsonl", [{"image": str(tmp_path / path), "caption": "c"} for path in pictures(tmp_path, 1)])
    assert said(tmp_path / "hub", "train", val_fraction=0) == [["c"]]
    assert "dataset_infos.json: no list of rows, passed over" in notes(open_data(PAIRS, str(tmp_path / "hub"), "train", val_fraction=0))
    in_folders(tmp_path / "parts", "train/1.png", "test/1.png", "car/1.png")
    for part in ("train", "test"):
        jsonl(tmp_path / "parts" / part / "annotations.jsonl", [{"image": "1.png", "caption": part}])
    assert said(tmp_path / "parts") == [["test"]] and said(tmp_path / "parts", "train", val_fraction=0) == [["train"]]
    assert notes(open_data(PAIRS, str(tmp_path / "parts"), "test")) == ["car: passed over, as other folders are named after splits"]
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "00000.tar", "w") as archive:
        add(archive, "0.jpg", png(0))
        add(archive, "0.txt", b"c")
    (tmp_path / "web" / "00000.parquet").write_bytes(b"")
    (tmp_path / "web" / "00000_stats.json").write_text("{}")
    assert said(tmp_path / "web") == [["c"]]
    assert notes(open_data(PAIRS, str(tmp_path / "web"), "test")) == ["2 files that img2dataset wrote beside its shards were passed over"]


def shard(path: Path, *members: tuple[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            add(archive, name, content)
    return str(path)


def test_shards_in_any_order_and_names_that_are_there_twice(tmp_path: Path) -> None:
    members = [(f"{n}.png", png(n)) for n in range(3)] + [(f"./{n}.txt", f"\ufeffone {n}\r\n\r\ntwo\n".encode()) for n in range(3)]
    assert said(shard(tmp_path / "a.tar", *members)) == [[f"one {n}", "two"] for n in range(3)]
    twice = shard(tmp_path / "b.tar", *members, ("1.png", png(9)), ("1.txt", b"other"))
    with pytest.raises(BadInput, match=r"sample 1: there are 2 files \.png of this name"):
        said(twice)
    with pytest.raises(BadInput, match=r"sample 1: it has 2 pictures, \.png and \.jpg"):
        said(shard(tmp_path / "c.tar", *members, ("1.JPG", png(9))))
    with pytest.raises(BadInput, match="the files of a sample follow each other"):
        open_data(PAIRS, f"stream:{tmp_path / 'a.tar'}", "train", max_bad=0)
    in_folders(tmp_path / "d", "1.png", "1.jpg", "2.png")
    for n in (1, 2):
        (tmp_path / "d" / f"{n}.TXT").write_text("c")
    with pytest.raises(BadInput, match="2 pictures and 1 file of captions have its name"):
        said(tmp_path / "d")
    assert said(tmp_path / "d", max_bad=2) == [["c"]]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "seen"),
    [
        (1, 0, b"\xa0", [0], [255, 255, 255, 255]),
        (2, 0, b"\x1b", [1], [0, 255, 170, 255]),
        (4, 0, b"\x0f\x37", [3], [0, 255, 255, 119]),
        (8, 0, b"\x00\x05\x09\xff", [5], [0, 255, 9, 255]),
        (16, 0, struct.pack(">4H", 0, 5, 65535, 300), [300], [0, 0, 255, 255]),
        (8, 2, bytes([1, 2, 3, 255, 0, 0, 9, 9, 9, 0, 0, 0]), [255, 0, 0], [1, 255, 9, 0]),
        (16, 2, struct.pack(">12H", 256, 0, 0, 65535, 0, 0, 1, 1, 1, 0, 0, 0), [65535, 0, 0], [1, 255, 0, 0]),
    ],
)
def test_a_colour_that_is_declared_transparent_is_white(depth: int, colour: int, row: bytes, key: list[int], seen: list[int]) -> None:
    head = struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    assert open_image(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))[0, :, 0].tolist() == seen


@pytest.mark.parametrize("mode", ["LAB", "LA", "PA", "CMYK", "YCbCr"])
def test_modes_of_other_formats(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (3, 2)).save(out, "TIFF")
    assert open_image(out.getvalue()).shape == (2, 3, 3)


def test_what_is_no_plain_file_or_too_large_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("d.jsonl", "d.json", "d.csv", "d.parquet", "d.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BadInput, match="it is a pipe"):
            said(tmp_path / name)
    in_folders(tmp_path / "f", "cat/1.png", "dog/1.png")
    os.mkfifo(tmp_path / "f" / "cat" / "0.png")
    (tmp_path / "f" / "cat" / "2.png").symlink_to("/dev/zero")
    source = open_data(PAIRS, str(tmp_path / "f"), "test", max_bad=2)
    assert len(source) == 2 and source.skips.count == 2 and len(source.fingerprint) == 64  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="is no file"):
        said(jsonl(tmp_path / "p.jsonl", [{"image": "d.csv", "caption": "c"}]))
    monkeypatch.setattr(text_tables, "free_memory", lambda: 10)
    (tmp_path / "l.json").write_text("[" + " " * 20 + "]")
    with pytest.raises(BadInput, match="half of the free memory") as caught:
        said(tmp_path / "l.json")
    assert "JSON lines" in caught.value.fix


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_row_is_bounded_and_costs_itself_only(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tables, "LARGEST_ROW", 500)
    monkeypatch.setattr(text_tables, "SKIPPED_AT_ONCE", 64)
    paths = pictures(tmp_path, 3)
    mark = "\t" if suffix == ".tsv" else ","
    lines = [
        json.dumps({"image": path, "caption": text}) if suffix == ".jsonl" else f"{path}{mark}{text}"
        for path in paths
        for text in ("a", "b" * 2000)
    ]
    (tmp_path / f"d{suffix}").write_text("\n".join(lines if suffix == ".jsonl" else [f"image{mark}caption", *lines]) + "\n")
    with pytest.raises(BadInput, match=r"line [23]: .*a row at most 500"):
        said(tmp_path / f"d{suffix}")
    assert said(tmp_path / f"d{suffix}", max_bad=3) == [["a"]] * 3


def test_texts_and_lists_of_a_row_have_bounds(tmp_path: Path) -> None:
    paths = pictures(tmp_path, 1)
    for row, why in (
        ({"question": "q" * 200_000, "answer": "a"}, "its question has 200,000 characters"),
        ({"question": "q", "answer": [f"a{n}" for n in range(2000)]}, "its answer lists 2,000"),
    ):
        with pytest.raises(BadInput, match=why) as caught:
            open_data(QUESTIONS, jsonl(tmp_path / "d.jsonl", [{"image": paths[0], **row}]), "test")
        assert len(str(caught.value)) < 500


def test_damaged_tables_end_in_three_lines(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"image": ["1.png"], "caption": ["c"]}).save_to_disk(tmp_path / "s")
    state = json.loads((tmp_path / "s" / "state.json").read_text())
    (tmp_path / "s" / "state.json").write_text(json.dumps(state | {"_data_files": []}))
    with pytest.raises(BadInput, match="datasets cannot open it"):
        said(tmp_path / "s")
    member = tarfile.TarInfo("x")
    member.type = tarfile.GNUTYPE_LONGNAME
    (tmp_path / "long.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) * 3000 + bytes(1024))
    with pytest.raises(BadInput):
        said(tmp_path / "long.tar")
    with pytest.raises(BadInput, match="there is no file"):
        said("{0.." + "9" * 5000 + "}.tar")
    if os.name == "posix":
        in_folders(tmp_path / "f", os.fsdecode(b"cat/caf\xe9.png"), os.fsdecode(b"cat/caf\xe8.png"), "dog/1.png")
        assert sorted(said(tmp_path / "f")) == [["cat"], ["cat"], ["dog"]]


def test_limits_are_drawn_and_said(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "d.jsonl", [{"image": path, "caption": str(n)} for n, path in enumerate(pictures(tmp_path, 40))])
    some = open_data(PAIRS, spec, "test", limit=8)
    chosen = [int(some[n].captions[0]) for n in range(8)]
    assert chosen == sorted(chosen) and max(chosen) > 20 and notes(some) == ["8 of 40 images, drawn at random (seed 0)"]
    assert {item.captions[0] for item in usable(drawn(open_data(PAIRS, spec, "test"), 8), range(8))} == {str(n) for n in chosen}
    (tmp_path / "img" / f"{chosen[3]}.png").write_bytes(b"")
    assert len(usable(drawn(open_data(PAIRS, spec, "test", max_bad=1), 8), range(8))) == 7, "nothing stands in for what is measured"
    for source in (open_data(QUESTIONS, "easy-vqa", "test", limit=5), open_data(PAIRS, "shapes:size=500", "test", limit=5)):
        assert len(source) == 5 and "drawn at random" in record(source, "test")["read_as"][-1]
    assert notes(open_data(PAIRS, f"stream:{spec}", "train", limit=5)) == ["the first 5 rows of each pass: a stream cannot be drawn from"]


def test_a_stream_looks_beyond_its_first_rows(tmp_path: Path) -> None:
    (path,) = pictures(tmp_path, 1)
    rows: list[dict[str, Any]] = [{"image": path, "other": 1} for _ in range(300)] + [{"image": path, "caption": f"c{n}"} for n in range(9)]
    stream = open_data(PAIRS, f"stream:{jsonl(tmp_path / 'd.jsonl', rows)}", "train", max_bad=1000)
    assert stream[700].captions[0].startswith("c")
    asked = [{"image": path, "question": "q", "answer": "a"} for _ in range(1100)]
    asked[1050]["weight"] = 0.5
    spec = f"stream:{jsonl(tmp_path / 'q.jsonl', asked)}"
    late = open_data(QUESTIONS, spec, "train", shuffle_buffer=1)
    assert {late[n].questions[0].answers[0][1] for n in range(1090)} == {1.0}
    assert "column weight comes first in" in notes(late)[0]
    named = open_data(QUESTIONS, spec, "train", shuffle_buffer=1, columns={"weight": "weight"})
    assert named[1050].questions[0].answers == [("a", 0.5)] and not notes(named)


@pytest.fixture(scope="module")
def words() -> Texts:
    return Texts(train_wordpiece(["a car on the road turning clockwise what is it"], 100))


@pytest.mark.parametrize("kind", ["pairs", "regions", "questions"])
def test_pictures_are_mirrored_only_when_asked_for(words: Texts, kind: str) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :4] = 255

    def mirrored(text: str, mirror: bool) -> bool:
        makers: dict[str, Callable[..., Any]] = {
            "pairs": lambda **draw: pair_batch([PairItem("x", image, [text])], words, **draw),
            "regions": lambda **draw: region_batch(
                [PairItem("x", image, ["a car"], [Region(text, (0.5, 0.5, 1, 1))])], words, patch_grid=4, **draw
            ),
            "questions": lambda **draw: vqa_batch([VQAItem("x", image, [Question(text, [("a car", 1.0)])])], words, **draw),
        }
        seen = [makers[kind](seed=0, step=step, augment_kind="light", mirror=mirror)["pixels"][0, 0] for step in range(20)]
        return any(bool(pixels[:, -4:].float().mean() > pixels[:, :4].float().mean()) for pixels in seen)

    assert mirrored("a car", True) and not mirrored("a car", False) and not mirrored("turning clockwise", True)


def test_data_of_ones_own_is_not_mirrored() -> None:
    from efficientvlm.data.configured import augmentation
    from efficientvlm.settings.stages import Finetune, Pretrain

    assert augmentation(Pretrain(out="o", model="m", data="shapes:size=9"))["mirror"]
    assert augmentation(Finetune(out="o", model="m", data="easy-vqa"))["mirror"]
    assert not augmentation(Finetune(out="o", model="m", data="mine.jsonl"))["mirror"]
    assert augmentation(Finetune(out="o", model="m", data="mine.jsonl", mirror=True))["mirror"]
