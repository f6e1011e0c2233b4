"""A teacher of photos that is no network of this package: its matrix, the pile of sentences, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_flickr8k import COLOURS, photos

from efficientvlm.errors import BadInput
from efficientvlm.examples import photo_teacher

WORDNET = (
    "  1 This software and database is being provided to you\n"
    '00001740 00 a 01 able 0 005 = 05200169 n 0000 | having the necessary means or skill to do something; "able to swim"\n'
    "00002098 00 a 01 unable 0 002 = 05200169 n 0000 | not having the necessary means or skill  \n"
)
FORTUNES = "A day for firm decisions!  Or is it that nobody knows?\n%\nShort.\n%\nAlways remember\n\tthat you are unique.\n%\n"


def test_sentences_come_out_of_three_kinds_of_files(tmp_path: Path) -> None:
    for name, text in (("data.adj", WORDNET), ("fortunes", FORTUNES), ("plain.txt", "The first line of a text.\nshort\n")):
        (tmp_path / name).write_text(text, "utf-8")
    assert list(photo_teacher.sentences_in(tmp_path / "data.adj")) == [
        "having the necessary means or skill to do something",
        "not having the necessary means or skill",
    ]
    fortunes = ["A day for firm decisions!", "Or is it that nobody knows?", "Always remember that you are unique."]
    assert list(photo_teacher.sentences_in(tmp_path / "fortunes")) == fortunes
    assert list(photo_teacher.sentences_in(tmp_path / "plain.txt")) == ["The first line of a text."]


def test_a_pile_has_three_sentences_beside_every_caption(tmp_path: Path) -> None:
    others = [f"nothing that is seen, number {number}" for number in range(8)]
    (tmp_path / "others.txt").write_text("\n".join(others) + "\n", "utf-8")
    captions = ["a dog  runs", "a cat"]
    found = photo_teacher.pile(captions, [tmp_path / "others.txt"], 0)
    assert len(found) == 8 and {"a dog runs", "a cat"} <= set(found) and found == photo_teacher.pile(captions, [tmp_path / "others.txt"], 0)
    with pytest.raises(BadInput, match="8 sentences beside 3 captions"):
        photo_teacher.pile(["a", "b", "c"], [tmp_path / "others.txt"], 0)


def test_the_matrix_brings_photos_to_their_captions() -> None:
    rng = np.random.default_rng(0)
    features, hidden = rng.standard_normal((80, 6)).astype(np.float32), rng.standard_normal((6, 4)).astype(np.float32)
    captions = [[f"{number} one", f"{number} two"] for number in range(80)]
    vectors = (features @ hidden).repeat(2, 0) + 0.01 * rng.standard_normal((160, 4)).astype(np.float32)
    matrix, strength = photo_teacher.fit(features, vectors, captions)
    assert strength in photo_teacher.STRENGTHS
    assert photo_teacher.judged(matrix(features), vectors, captions)["image_to_text_r10"] > 0.9


def test_a_caption_of_two_photos_counts_for_both() -> None:
    eye = np.eye(3, dtype=np.float32)
    found = photo_teacher.judged(eye, eye[[0, 1, 0]], [["a"], ["b"], ["a"]])
    assert found["image_to_text_r1"] == pytest.approx(2 / 3) and found["text_to_image_r1"] == pytest.approx(2 / 3)


def test_files_of_which_no_caption_of_a_photo_takes_part_in_its_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "given/train.parquet", 40, 0)
    photos(tmp_path / "given/val.parquet", 8, 1)
    (tmp_path / "others.txt").write_text("\n".join(f"nothing that is seen, number {number}" for number in range(400)), "utf-8")

    def said(texts: list[str], folder: Path) -> Any:
        return np.array([[colour in text for colour in COLOURS] for text in texts], np.float32) + 0.1

    def seen(images: list[dict[str, Any]]) -> Any:
        return np.stack([np.asarray(photo_teacher.opened(image), np.float32).mean((0, 1)) for image in images])

    monkeypatch.setattr(photo_teacher, "sentence_vectors", said)
    monkeypatch.setattr(photo_teacher, "features_of", seen)
    given = tmp_path / "given/train.parquet", tmp_path / "given/val.parquet", [tmp_path / "others.txt"], tmp_path / "towers"
    out = photo_teacher.make(*given, tmp_path / "out")
    own, vectors = pq.read_table(out / "train.parquet"), pq.read_table(out / "vectors.parquet")
    assert own["image_id"].to_pylist() == vectors["image_id"].to_pylist() and len(own) == 20
    about = json.loads((out / "teacher.json").read_text("utf-8"))
    assert (about["fitted_on"], about["photos"], about["captions"], about["sentences"]) == (20, 20, 100, 400)
    assert about["metrics"]["image_to_text_r10"] == 1 and len((out / "pile.txt").read_text("utf-8").splitlines()) == 400
    assert pq.read_table(out / "val.parquet")["image_id"].to_pylist() == [f"1-{number}" for number in range(8)]
    photo_teacher.make(*given, tmp_path / "out", seed=1)  # another half is fitted on
    photo_teacher.make(*given, tmp_path / "alone", seed=1)
    assert (out / "vectors.parquet").read_bytes() == (tmp_path / "alone/vectors.parquet").read_bytes()
    with pytest.raises(BadInput, match="holds no photos"):
        photo_teacher.make(tmp_path / "others.txt", *given[1:], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "why"),
    [({"image": {"bytes": None, "path": "a"}}, "no bytes"), ({"captions": []}, "no list of texts"), ({"image_id": None}, "no image_id")],
)
def test_a_row_that_lacks_something_is_named(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    good = {"image": {"bytes": b"x", "path": "a"}, "captions": ["a"], "image_id": "1"}
    pq.write_table(pa.Table.from_pylist([good, good | change]), tmp_path / "photos.parquet")
    with pytest.raises(BadInput, match="row 2") as caught:
        photo_teacher.photos_of(tmp_path / "photos.parquet")
    assert why in caught.value.why
    with pytest.raises(BadInput, match="photo a cannot be read"):
        photo_teacher.opened(good["image"])
    with pytest.raises(BadInput, match=r"nowhere.* cannot be read"):
        list(photo_teacher.sentences_in(tmp_path / "nowhere"))


def test_a_package_or_a_tower_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="there is no"):
        photo_teacher.sentence_vectors(["a"], tmp_path / "minilm")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BadInput, match="is not installed"):
        photo_teacher.efficientnet()
