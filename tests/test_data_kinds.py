"""A kind of sample is one class: readers ask it for its columns, its content and its pictures, of which a row has none, one or two."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_files import jsonl, pictures, png
from test_data_forms import add

from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.kinds.statements import STATEMENTS
from efficientvlm.data.opening import open_data, record
from efficientvlm.errors import BadInput


class Images(Kind[Pixels, None]):
    name, holds, roles, required = "images", "pictures", {"image": IMAGE_NAMES, **IMAGE_ID}, ("image",)

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> None:
        return None

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[None]]) -> Pixels:
        return pictures[0].pixels

    def texts(self, contents: Sequence[None]) -> Iterator[str]:
        return iter(())

    def drawn(self, shapes: Any, index: int, key: str) -> Pixels:
        pixels: Pixels = shapes.picture(index)[1]
        return pixels


class Sentences(Kind[str, str]):
    name, holds, pictures, roles, required = "sentences", "sentences", (), {"sentence": ("sentence", "text")}, ("sentence",)

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> str:
        if not isinstance(values["sentence"], str):
            raise BadInput(where, "it has no sentence", "write one")
        return values["sentence"]

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[str]]) -> str:
        return rows[0].content

    def texts(self, contents: Sequence[str]) -> Iterator[str]:
        yield from contents


@pytest.mark.parametrize("before", ["", "stream:"])
def test_statements_are_about_two_pictures(tmp_path: Path, before: str) -> None:
    left, right, other = pictures(tmp_path, 3)
    said = [("left is red", True), ("Both are blue ", "false"), ("one", 1), ("two", "maybe"), ("", True)]
    rows = [{"left": left, "right": right if at < 2 else other, "sentence": text, "label": label} for at, (text, label) in enumerate(said)]
    spec = before + jsonl(tmp_path / "s.jsonl", rows)
    source = open_data(STATEMENTS, spec, "train", image_size=8, val_fraction=0, max_bad=2, **({"shuffle_buffer": 1} if before else {}))
    found = [source[index] for index in range(2)]
    assert all(image.shape == (8, 8, 3) for item in found for image in item.images)
    statements = [(one.text, one.label) for item in found for one in item.statements]
    first = [("left is red", True), ("Both are blue", False)]
    assert statements == (first if before else [*first, ("one", True)])
    assert list(source.texts()) == ["left is red", "Both are blue", "one"]
    if not before:
        assert len(source) == 2 and record(source, "train")["skipped"] == 2
        assert not np.array_equal(*found[0].images) and np.array_equal(found[0].images[0], found[1].images[0])


@pytest.mark.parametrize("before", ["", "stream:"])
def test_a_sample_of_a_shard_may_have_several_pictures(tmp_path: Path, before: str) -> None:
    """A picture is of the column that its ending names."""
    said = [("left is red", True), ("both are blue", False)]
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for number, (text, label) in enumerate(said):
            add(archive, f"{number}.json", json.dumps({"sentence": text, "label": label, "left": "no picture"}).encode())
            for side, colour in (("left", 10 + number), ("right", 200 + number)):
                add(archive, f"{number}.{side}.png", png(colour))
        add(archive, "2.left.png", png(1))
        add(archive, "2.json", json.dumps({"sentence": "half of it is missing", "label": True}).encode())
    settings = {"val_fraction": 0, "max_bad": 1} | ({"shuffle_buffer": 1} if before else {})
    source = open_data(STATEMENTS, f"{before}{tmp_path / 's.tar'}", "train", image_size=8, **settings)
    items = [source[number] for number in range(2)]
    assert [(item.statements[0].text, item.statements[0].label) for item in items] == said
    assert not np.array_equal(*items[0].images) and not np.array_equal(items[0].images[0], items[1].images[0])


def test_shapes_draws_statements_and_says_what_it_cannot_draw() -> None:
    source = open_data(STATEMENTS, "shapes:difficulty=2", "train", limit=3, image_size=16)
    assert len(source) == 3 and [image.shape for image in source[2].images] == [(16, 16, 3)] * 2
    assert [one.text for one in next(source.contents())]
    with pytest.raises(BadInput, match="it has no sentences"):
        open_data(Sentences(), "shapes", "train")[0]
    with pytest.raises(BadInput, match="it has questions but no pictures"):
        open_data(Images(), "easy-vqa", "train")


def test_rows_may_have_pictures_alone_or_none(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "d.jsonl", [{"image": path, "text": f"t{at}"} for at, path in enumerate(pictures(tmp_path, 3))])
    images, sentences = (open_data(kind, spec, "test", image_size=8) for kind in (Images(), Sentences()))
    assert [pixels.shape for pixels in (images[0], images[2])] == [(8, 8, 3)] * 2 and list(images.texts()) == []
    assert [sentences[index] for index in range(3)] == ["t0", "t1", "t2"] and images.fingerprint != sentences.fingerprint
    held = open_data(Sentences(), spec, "val", val_fraction=0.99), open_data(Sentences(), spec, "train", val_fraction=0.99, max_bad=3)
    assert sum(map(len, held)) == 3
    stream = open_data(Sentences(), f"stream:{spec}", "train", shuffle_buffer=1)
    assert [stream[index] for index in range(3)] == ["t0", "t1", "t2"] and stream[3] in ("t0", "t1", "t2")
    assert len(open_data(Images(), "shapes:size=4", "train")) == 4
