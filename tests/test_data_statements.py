"""Statements about two pictures in every form: NLVR2's own files, lists of two pictures, parquet; pictures that are not two."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from test_data_files import jsonl, pictures, png

from efficientvlm.data.kinds.statements import STATEMENTS, Statement, TwoImageItem, statement_batch
from efficientvlm.data.opening import open_data, open_texts, record
from efficientvlm.data.opening import texts as texts_of_data
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.errors import BadInput


def opened(spec: str, split: str = "test", **options: Any) -> Any:
    return open_data(STATEMENTS, spec, split, image_size=8, **options)


def said(source: Any) -> list[tuple[str, bool, str]]:
    return [(one.text, one.label, one.group) for index in range(len(source)) for one in source[index].statements]


def official(folder: Path, split: str, rows: list[tuple[str, str, str]], where: str, **more: Any) -> None:
    """`rows` of (set-pair-sentence, text, label) as NLVR2 writes them, with their pictures below `where`."""
    lines = []
    for number, (name, text, label) in enumerate(rows):
        lines.append(
            {"identifier": f"{split}-{name}", "sentence": text, "label": label, "left_url": "https://a/b", "synset": "dog", **more}
        )
        (folder / where).mkdir(parents=True, exist_ok=True)
        for side in (0, 1):
            base = "-".join(f"{split}-{name}".split("-")[:3])
            (folder / where / f"{base}-img{side}.png").write_bytes(png(10 + 40 * side + number))
    (folder / f"{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_files_of_nlvr2(tmp_path: Path) -> None:
    dogs = [("850-0-0", "two dogs", "True"), ("850-1-0", "two dogs", "False"), ("850-1-1", "one dog", "False")]
    official(tmp_path, "train", [("7-0-0", "cats", "True")], "images/train/37", directory=37)
    official(tmp_path, "dev", dogs, "dev")
    official(tmp_path, "test1", [("9-0-0", "birds", "False")], "images")
    assert said(opened(str(tmp_path), "train")) == [("cats", True, "train-7-0")]
    source = opened(str(tmp_path), "val")
    assert said(source) == [("two dogs", True, "dev-850-0"), ("two dogs", False, "dev-850-0"), ("one dog", False, "dev-850-1")]
    assert len(source) == 2 and [image.mean().round() for image in source[1].images] != [image.mean().round() for image in source[0].images]
    assert said(opened(str(tmp_path), "test")) == [("birds", False, "test1-9-0")]
    assert said(opened(str(tmp_path / "dev.json"))) == said(source)
    (tmp_path / "dev" / "dev-850-0-img1.png").unlink()
    with (tmp_path / "dev.json").open("a") as file:
        file.write(json.dumps({"identifier": "850", "sentence": "x", "label": "True"}) + "\n{\n")
    source = opened(str(tmp_path), "val", max_bad=3)
    assert len(source) == 1 and record(source, "val")["skipped"] == 3
    told = " ".join(source.skips.lines())
    assert all(part in told for part in ("dev-850-0-img1.png", "split-set-pair-sentence", "is not JSON"))


def test_lists_of_two_pictures(tmp_path: Path) -> None:
    left, right, other = pictures(tmp_path, 3)
    wanted = [("a red dog", True, "7"), ("no dog", False, "no dog")]
    rows = [{"images": [left, right], "sentence": "a red dog", "label": "True", "group": 7}]
    rows += [{"images": [other, left], "sentence": "no dog", "label": 0, "group": None}]
    for spec in (jsonl(tmp_path / "s.jsonl", rows), tmp_path / "s.json", tmp_path / "s.csv", tmp_path / "s.parquet", tmp_path / "b.jsonl"):
        path = Path(spec)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows({**row, "images": json.dumps(row["images"])} for row in rows)
        elif path.suffix == ".parquet":
            features = datasets.Features(
                images=[datasets.Image()], sentence=datasets.Value("string"), label=datasets.Value("bool"), group=datasets.Value("string")
            )
            table = {name: [row[name] for row in rows] for name in ("sentence", "group")}
            table |= {"label": [True, False], "images": [[str(tmp_path / name) for name in row["images"]] for row in rows]}
            table["group"] = ["7", None]
            data = datasets.Dataset.from_dict(table, features=features)
            data = data.map(lambda row: row)  # pictures are stored as bytes
            data.to_parquet(path)
        elif path.name == "b.jsonl":
            inline = [[base64.b64encode((tmp_path / name).read_bytes()).decode() for name in row["images"]] for row in rows]
            jsonl(path, [{**row, "images": pair} for row, pair in zip(rows, inline, strict=True)])
        source = opened(str(path))
        assert said(source) == wanted, path
        assert np.array_equal(source[0].images[0], source[1].images[1]) and not np.array_equal(*source[0].images)
    stream = opened(f"stream:{tmp_path / 's.jsonl'}", "train", shuffle_buffer=1)
    assert [stream[index].statements[0].text for index in range(2)] == ["a red dog", "no dog"]
    named = opened(str(tmp_path / "s.jsonl"), columns={"images": "images", "statement": "sentence", "group": "none"})
    assert said(named)[0] == ("a red dog", True, "a red dog")


@pytest.mark.parametrize("before", ["", "stream:"])
def test_pictures_that_are_not_two_are_refused_by_row(tmp_path: Path, before: str) -> None:
    left, right, other = pictures(tmp_path, 3)
    lists: list[Any] = [[left, right], [left], [left, right, other], [left, left], [left, "missing.png"], "one.png", None]
    spec = before + jsonl(tmp_path / "s.jsonl", [{"images": pair, "sentence": f"s{at}", "label": True} for at, pair in enumerate(lists)])
    source = opened(spec, "train", max_bad=6, val_fraction=0, **({"shuffle_buffer": 7, "seed": 1} if before else {}))
    assert {one.text for index in range(2 if before else len(source)) for one in source[index].statements} == {"s0"}
    if before:
        return
    told = " ".join(source.skips.lines())
    twice = f"one picture is there twice ({tmp_path / left})"
    for part in ("has 1 picture, and takes 2", "has 3 pictures", twice, "missing.png", "no list"):
        assert part in told, part
    (tmp_path / "copy.png").write_bytes((tmp_path / left).read_bytes())
    again = opened(jsonl(tmp_path / "c.jsonl", [{"left": left, "right": "copy.png", "sentence": "s", "label": True}]), max_bad=1)
    with pytest.raises(BadInput, match="no usable sample") as refused:
        again[0]
    assert "one and the same" in refused.value.why
    with pytest.raises(BadInput, match="no column for second_image"):
        opened(jsonl(tmp_path / "one.jsonl", [{"left": left, "sentence": "s", "label": True}]))


def test_a_batch_of_statements() -> None:
    draw = np.random.default_rng(0)
    names = [("both are red", True), ("the left one is red", False), ("one is blue", True)]
    items = []
    for at in range(2):
        left, right = draw.integers(0, 256, (2, 8, 8, 3), np.uint8)
        items.append(TwoImageItem(str(at), (left, right), [Statement(*one, "g") for one in names[at:]]))
    texts = Texts(train_wordpiece([text for text, _ in names], 60), 12)
    batch = statement_batch(items, texts, seed=0, step=0, train=False)
    assert (batch["samples"], batch["pair_index"].tolist(), batch["labels"].tolist()) == (2, [0, 0, 0, 1, 1], [1, 0, 1, 0, 1])
    assert batch["pixels"].shape == batch["second_pixels"].shape == (2, 3, 8, 8) and len(batch["text_ids"]) == 5
    assert np.array_equal(batch["second_pixels"][1].permute(1, 2, 0), items[1].images[1]) and batch["groups"] == ["g"] * 5
    some = statement_batch(items, texts, seed=0, step=0, statements_per_pair=1)
    assert some["pair_index"].tolist() == [0, 1] and torch.equal(some["pixels"], batch["pixels"])
    again = statement_batch(items, texts, seed=0, step=0, statements_per_pair=1, augment_kind="paper")
    assert again["statements"] == some["statements"] and not torch.equal(again["pixels"], some["pixels"])


def test_a_tokenizer_is_trained_on_statements(tmp_path: Path) -> None:
    left, right = pictures(tmp_path, 2)
    spec = jsonl(tmp_path / "s.jsonl", [{"images": [left, right], "sentence": "zebra", "label": True, "words": "okapi"}])
    assert list(texts_of_data(open_texts(spec))) == ["zebra"]
    assert list(texts_of_data(open_texts(spec, columns={"statement": "words"}))) == ["okapi"]
