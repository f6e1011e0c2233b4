"""Pictures without texts and texts without pictures, from every form of data."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_data_files import jsonl, pictures, png
from test_data_forms import add

from efficientvlm.data.kinds.images import IMAGES
from efficientvlm.data.kinds.sentences import SENTENCES, sentence
from efficientvlm.data.opening import open_data, origin, record
from efficientvlm.errors import BadInput


def said(spec: Path | str, split: str = "test", **more: object) -> list[str]:
    source = open_data(SENTENCES, str(spec), split, **more)  # type: ignore[arg-type]
    return [source[index].text for index in range(len(source))]


def test_pictures_need_no_texts(tmp_path: Path) -> None:
    """A folder as it is, shards with and without texts, a table, and built-in data; ids stay when a folder is moved."""
    names = pictures(tmp_path, 3)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.png").write_bytes(png(77))
    folder = open_data(IMAGES, str(tmp_path), "test", image_size=8)
    assert [folder[index].id for index in range(4)] == sorted([*names, "deep/x.png"])
    assert {folder[index].image.shape for index in range(4)} == {(8, 8, 3)} and list(folder.texts()) == []
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number in range(3):
            add(archive, f"{number}.png", png(10 + number))
        add(archive, "0.txt", b"only one has a text")
    shard = open_data(IMAGES, str(tmp_path / "s.tar"), "test", image_size=8)
    assert len({shard[index].id for index in range(len(shard))}) == 3
    assert len(open_data(IMAGES, jsonl(tmp_path / "d.jsonl", [{"image": name} for name in names]), "test")) == 3
    drawn, easy = open_data(IMAGES, "shapes:size=5", "train", image_size=16), open_data(IMAGES, "easy-vqa", "test", limit=3, image_size=16)
    assert drawn[4].image.shape == easy[2].image.shape == (16, 16, 3) and len(easy) == 3 and easy[0].id.startswith("easy-vqa/")
    assert np.array_equal(drawn[4].image, open_data(IMAGES, "shapes:size=50", "train", image_size=16)[4].image)


def test_a_picture_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    names = pictures(tmp_path, 3)
    (tmp_path / names[1]).write_bytes(b"torn")
    source = open_data(IMAGES, str(tmp_path), "test", image_size=8, max_bad=1)
    assert [item.id for item in source.usable(range(3))] == [names[0], names[2]]  # type: ignore[attr-defined]
    assert record(source, "test")["skipped"] == 1


def test_lines_of_plain_text_are_sentences(tmp_path: Path) -> None:
    """Empty lines are none, whatever ends the lines; every other one is where its number says."""
    text = "\ufeffa red circle\r\n\r\n  zwei blaue Quadrate  \n \t \nпривет, мир\u2028 still this line\nlast"
    (tmp_path / "a.txt").write_bytes(text.encode())
    wanted = ["a red circle", "zwei blaue Quadrate", "привет, мир\u2028 still this line", "last"]
    assert said(tmp_path / "a.txt") == wanted
    source = open_data(SENTENCES, str(tmp_path / "a.txt"), "test")
    assert [contents for (contents,) in source.contents()] == wanted == list(source.texts())
    assert source[0] == sentence("a red circle") and source[0].id != source[1].id
    (tmp_path / "b.txt").write_text("of another file\na red circle\n")
    both = open_data(SENTENCES, str(tmp_path / "{b,a}.txt"), "test")
    assert len(both) == 6 and both[0].text == "of another file" and both[1].id == both[2].id
    assert said(tmp_path) == said(tmp_path / "{a,b}.txt")
    assert both.usable([5, 0])[0].text == "last"  # type: ignore[attr-defined]
    assert len({source.fingerprint, both.fingerprint, open_data(SENTENCES, str(tmp_path / "b.txt"), "test").fingerprint}) == 3


def test_bad_lines_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\xff\xfe is no text\nthree\n" + b"x" * 500_000 + b"\nfive\n" + b"y" * 150_000 + b"\n" + "\u3000\n".encode())
    source = open_data(SENTENCES, str(path), "test", max_bad=4)
    assert [item.text for item in source.usable(range(len(source)))] == ["one", "three", "five"]  # type: ignore[attr-defined]
    assert sorted(source.skips.reasons) == [f"{path} line {number}" for number in (2, 4, 6, 7)]  # type: ignore[attr-defined]
    assert source[3].text in ("one", "three", "five")
    with pytest.raises(BadInput, match="UTF-8"):
        open_data(SENTENCES, str(path), "test", max_bad=0)
    (tmp_path / "u.txt").write_bytes("wide".encode("utf-16"))
    with pytest.raises(BadInput, match="UTF-16"):
        open_data(SENTENCES, str(tmp_path / "u.txt"), "test")
    (tmp_path / "e.txt").write_bytes(b"\n\n")
    with pytest.raises(BadInput, match="no line"):
        open_data(SENTENCES, str(tmp_path / "e.txt"), "test")
    with pytest.raises(BadInput, match="no columns"):
        open_data(SENTENCES, str(path), "test", columns={"sentence": "text"})


def test_lines_are_held_out_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"sentence {number}\n" for number in range(400)))
    train, val = said(path, "train", val_fraction=0.25), said(path, "val", val_fraction=0.25)
    assert len({*train, *val}) == len(train) + len(val) == 400 and 60 < len(val) < 140
    assert said(path, "val", val_fraction=0.0) == [] and len(said(path, "train", val_fraction=0.0)) == 400
    some = said(path, limit=20)
    assert len(some) == 20 and set(some) < set(said(path, limit=30)) < {*train, *val}
    assert origin(open_data(SENTENCES, str(path), "train")) == origin(open_data(SENTENCES, str(path), "val", limit=3))
    (tmp_path / "splits").mkdir()
    for name in ("train", "val"):
        (tmp_path / "splits" / f"{name}.txt").write_text(f"of {name}\n")
    assert (said(tmp_path / "splits", "train"), said(tmp_path / "splits", "val")) == (["of train"], ["of val"])
    with pytest.raises(BadInput, match="no split test"):
        said(tmp_path / "splits")


def test_columns_of_any_table_are_sentences(tmp_path: Path) -> None:
    rows = [{"text": f"t{number}", "image": "nowhere.png"} for number in range(3)]
    assert said(jsonl(tmp_path / "d.jsonl", rows)) == ["t0", "t1", "t2"]
    (tmp_path / "d.csv").write_text("gloss\n" + "\n".join(json.dumps(f"g{number}") for number in range(3)) + "\n")
    assert said(tmp_path / "d.csv", columns={"sentence": "gloss"}) == ["g0", "g1", "g2"]
    assert all(text.strip() for text in said("shapes:size=30"))
    with pytest.raises(BadInput, match="no sentences"):
        said("easy-vqa")


def test_what_samples_come_from_is_one_for_all_parts(tmp_path: Path) -> None:
    names = pictures(tmp_path, 4)
    parts = [open_data(IMAGES, str(tmp_path), split, image_size=size) for split, size in (("train", None), ("val", 8), ("test", None))]
    assert len({origin(part) for part in parts}) == 1
    (tmp_path / names[0]).write_bytes(png(200) + b" more")
    assert origin(open_data(IMAGES, str(tmp_path), "test")) != origin(parts[0])
    shapes = [open_data(IMAGES, spec, "train", image_size=16) for spec in ("shapes", "shapes:size=9", "shapes:difficulty=4")]
    assert origin(shapes[0]) == origin(shapes[1]) != origin(shapes[2])
