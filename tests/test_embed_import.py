"""Vectors that another program made become a store: by ids or in the order of the data, and nothing that does not fit is taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from clip_folder import byte_pairs, write_clip
from conftest import run_stage

from efficientvlm.checkpoints.lineage import verify
from efficientvlm.checkpoints.store import Store
from efficientvlm.data.kinds.images import IMAGES
from efficientvlm.data.kinds.sentences import sentence
from efficientvlm.data.opening import ids, open_data
from efficientvlm.errors import BadInput
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings

DATA = "shapes:size=7"
IDS = [f"shapes/0/train/{number}" for number in range(7)]
VECTORS = np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32) * 3


def imported(tmp_path: Path, **settings: Any) -> Store:
    run_stage("embed", out=str(tmp_path / "out"), **{"data": DATA, "side": "images", "device": "cpu", "shard_size": 3, **settings})
    return Store.open(tmp_path / "out")


def saved(path: Path, vectors: Any = VECTORS) -> str:
    np.save(path, vectors)
    return str(path)


def table(path: Path, **columns: Any) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


def close(store: Store, names: list[str], vectors: Any) -> bool:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.allclose(store.rows(names), unit, atol=1e-3)


def test_rows_are_found_by_their_ids(tmp_path: Path) -> None:
    order = [4, 0, 6, 1, 3, 2, 5]
    (tmp_path / "ids.txt").write_text("".join(f"{IDS[row]}\n" for row in order))
    store = imported(tmp_path, vectors=saved(tmp_path / "v.npy"), ids=str(tmp_path / "ids.txt"))
    assert close(store, [IDS[row] for row in order], VECTORS) and store.teacher is None and store.preprocessing == ""
    assert (store.count, store.missing, store.width) == (7, 0, 8) and verify(tmp_path / "out") == []
    assert store.manifest.inputs.keys() >= {"vectors", "ids", "data"}


def test_a_table_names_its_rows(tmp_path: Path) -> None:
    columns = {"file_name": IDS, "size": [1.0] * 7, "vec": pa.array(VECTORS.tolist(), pa.list_(pa.float32()))}
    assert close(imported(tmp_path / "lists", vectors=table(tmp_path / "a.parquet", **columns)), IDS, VECTORS)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.reshape(-1).astype(np.float64)), 8)
    path = table(tmp_path / "b.parquet", name=IDS[::-1], embedding=fixed)
    assert close(imported(tmp_path / "fixed", vectors=path, id_column="name"), IDS[::-1], VECTORS)
    in_order = imported(tmp_path / "order", vectors=path)  # none of its columns is called as ids are
    assert close(in_order, IDS, VECTORS) and any("in order" in remark for remark in in_order.manifest.data[0].read_as)


def test_sentences_are_known_by_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "pile.txt").write_text("a  red circle\n\na cat\nthe dogs\na cat\n")
    said = {"text": ["a cat", "the dogs", " a red circle"], "vectors": pa.array(VECTORS[:3].tolist(), pa.list_(pa.float16()))}
    store = imported(tmp_path, vectors=table(tmp_path / "t.parquet", **said), data=str(tmp_path / "pile.txt"), side="sentences")
    assert close(store, [sentence(text).id for text in ("a cat", "the dogs", "a red circle")], VECTORS[:3]) and store.missing == 0
    store = imported(tmp_path / "order", vectors=saved(tmp_path / "v.npy", VECTORS[:4]), data=str(tmp_path / "pile.txt"), side="sentences")
    assert close(store, [sentence(text).id for text in ("a red circle", "a cat", "the dogs")], VECTORS[:3]) and store.count == 4


def test_what_is_no_vector_is_counted_and_left_out(tmp_path: Path) -> None:
    rows: list[Any] = VECTORS.tolist()
    rows[1], rows[3], rows[6] = None, [0.0] * 8, [float("nan"), *rows[6][1:]]
    path = table(tmp_path / "a.parquet", id=IDS, vector=pa.array(rows, pa.list_(pa.float32())))
    with pytest.raises(BadInput, match="3 of 7 images have no vector"):
        imported(tmp_path, vectors=path)
    store = imported(tmp_path, vectors=path, max_missing=0.5)
    assert (store.count, store.missing) == (4, 3) and set(store.manifest.extra["missing_samples"]) == {IDS[1], IDS[3], IDS[6]}
    few = {"vectors": saved(tmp_path / "v.npy", VECTORS[:5]), "ids": saved(tmp_path / "ids.npy", np.array(IDS[:5]))}
    with pytest.raises(BadInput, match="2 of 7 images have no vector"):
        imported(tmp_path / "few", **few)


def bad(tmp_path: Path, name: str) -> dict[str, Any]:
    wide, lists = np.ones((7, 8), np.float32), pa.list_(pa.float32())
    (tmp_path / "few.txt").write_text("\n".join(IDS[:6]))
    (tmp_path / "other.txt").write_text("\n".join([*IDS[:6], "other"]))
    (tmp_path / "twice.txt").write_text("\n".join([*IDS[:6], IDS[2]]))
    (tmp_path / "empty.txt").write_text("\n".join([*IDS[:3], "", *IDS[4:]]))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "torn.npy").write_bytes(b"")
    (tmp_path / "v.csv").write_text("1,2\n")
    ragged = [[1.0] * 8] * 6 + [[1.0] * 7]
    settings: dict[str, dict[str, Any]] = {
        "rows": {"vectors": saved(tmp_path / "1.npy", wide[:6])},
        "few ids": {"vectors": saved(tmp_path / "2.npy"), "ids": str(tmp_path / "few.txt")},
        "unknown": {"vectors": saved(tmp_path / "3.npy"), "ids": str(tmp_path / "other.txt")},
        "twice": {"vectors": saved(tmp_path / "4.npy"), "ids": str(tmp_path / "twice.txt")},
        "empty id": {"vectors": saved(tmp_path / "5.npy"), "ids": str(tmp_path / "empty.txt")},
        "no text": {"vectors": saved(tmp_path / "6.npy"), "ids": str(tmp_path / "bytes.txt")},
        "objects": {"vectors": saved(tmp_path / "7.npy", np.array([[1.0, "x"]] * 7, object))},
        "one axis": {"vectors": saved(tmp_path / "8.npy", np.ones(7, np.float32))},
        "whole numbers": {"vectors": saved(tmp_path / "9.npy", np.ones((7, 8), np.int64))},
        "nothing": {"vectors": str(tmp_path / "torn.npy")},
        "torn": {"vectors": str(tmp_path / "torn.parquet")},
        "csv": {"vectors": str(tmp_path / "v.csv")},
        "ragged": {"vectors": table(tmp_path / "10.parquet", id=IDS, vector=pa.array(ragged, lists))},
        "no lists": {"vectors": table(tmp_path / "11.parquet", id=IDS, x=[1.0] * 7)},
        "two lists": {"vectors": table(tmp_path / "12.parquet", id=IDS, x=pa.array(ragged, lists), y=pa.array(ragged, lists))},
        "no column": {"vectors": table(tmp_path / "13.parquet", id=IDS, x=pa.array(ragged, lists)), "vector_column": "z"},
        "null id": {"vectors": table(tmp_path / "14.parquet", id=[*IDS[:6], None], x=pa.array(ragged, lists))},
        "column of npy": {"vectors": saved(tmp_path / "15.npy"), "id_column": "id"},
        "stray ids": {"ids": "ids.txt", "model": "bundled:easy-vqa"},
        "limit": {"vectors": saved(tmp_path / "16.npy"), "limit": 3},
        "neither": {},
    }
    return settings[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows", "it has 6 vectors, and the data 7 samples"),
        ("few ids", "there are 6 ids"),
        ("unknown", "the data have no other"),
        ("twice", f"two vectors of {IDS[2]}"),
        ("empty id", "line 4"),
        ("no text", "line 1"),
        ("objects", "objects"),
        ("one axis", "holds no embeddings"),
        ("whole numbers", "int64"),
        ("nothing", "cannot be read"),
        ("torn", "cannot be read as parquet"),
        ("csv", "npy or .parquet"),
        ("ragged", "row 7"),
        ("no lists", "holds no embeddings"),
        ("two lists", "x, y"),
        ("no column", "no column z"),
        ("null id", "row 7"),
        ("column of npy", "has no columns"),
        ("stray ids", "goes with vectors"),
        ("limit", "as a whole"),
        ("neither", "give model"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        imported(tmp_path, **bad(tmp_path, name))
    assert not (tmp_path / "out").exists()


def test_some_are_compared_with_those_of_the_model(tmp_path: Path) -> None:
    model = str(tmp_path / "teacher")
    run_stage("import", model=str(write_clip(tmp_path / "folder", byte_pairs())), out=model)
    own = Store.open(imported(tmp_path / "own", model=model).path)
    vectors = saved(tmp_path / "v.npy", own.rows(IDS).astype(np.float32))
    store = imported(tmp_path / "again", model=model, vectors=vectors)
    assert np.array_equal(store.rows(IDS), own.rows(IDS)) and store.teacher == own.teacher
    assert any("of 7 samples the cosine" in remark for remark in store.manifest.data[0].read_as)
    with pytest.raises(BadInput, match="does not hold the vectors of"):
        imported(tmp_path / "other", model=model, vectors=saved(tmp_path / "w.npy"))
    with pytest.raises(BadInput, match="vectors of 5 numbers"):
        imported(tmp_path / "narrow", model=model, vectors=saved(tmp_path / "n.npy", VECTORS[:, :5]))
    config = stage_settings("embed", {"out": str(tmp_path / "x"), "data": DATA, "side": "images", "vectors": vectors})
    made = plan([Step("embed", "embed", config)])
    assert not made.problems.found and made.stages[0].disk and made.stages[0].status == "new"


def test_ids_are_known_without_a_picture(tmp_path: Path) -> None:
    source = open_data(IMAGES, DATA, "train")
    assert list(ids(source)) == IDS == [source[index].id for index in range(7)]
