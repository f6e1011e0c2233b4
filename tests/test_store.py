"""Embeddings are made once, found by sample id, and are the same however often the run was stopped and by how many processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import nursery
import pytest
import torch
from clip_folder import byte_pairs, write_clip
from conftest import QUIET, run_stage
from test_data_files import pictures

from efficientvlm.checkpoints import store as stores
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.lineage import verify
from efficientvlm.checkpoints.store import Store
from efficientvlm.data.kinds.images import IMAGES
from efficientvlm.data.kinds.sentences import sentence
from efficientvlm.data.opening import open_data, origin
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.loaded import load, read_as, texts_of
from efficientvlm.objectives.teachers import StoredTeacher
from efficientvlm.stages import embed

SHAPES: dict[str, Any] = {"data": "shapes:size=10", "side": "images", "shard_size": 4, "batch_size": 3, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("teacher")
    run_stage("import", model=str(write_clip(root / "folder", byte_pairs())), out=str(root / "teacher"))
    return str(root / "teacher")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.arrow"))}


def test_vectors_are_the_teachers_and_found_by_id(teacher: str, tmp_path: Path) -> None:
    manifest = run_stage("embed", model=teacher, out=str(tmp_path / "images"), **SHAPES)
    assert [manifest.extra[name] for name in ("side", "width", "count", "missing", "rows")] == ["images", 8, 10, 0, [4, 4, 2]]
    loaded, store = load(teacher), Store.open(tmp_path / "images")
    source = open_data(IMAGES, "shapes:size=10", "train", image_size=loaded.preprocessing)
    items = [source[index] for index in (9, 0, 5, 9)]
    wanted = loaded.model.embed_images(torch.stack([torch.from_numpy(item.image.transpose(2, 0, 1).copy()) for item in items]))[1]
    found = store.vectors([item.id for item in items])
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, atol=1e-3) and torch.allclose(found.norm(dim=1), torch.ones(4))
    batch = {"image_ids": [item.id for item in items]}
    assert torch.equal(StoredTeacher(images=store).look_up(batch, "image_ids", torch.device("cpu")), found)
    assert StoredTeacher(images=store).look_up(batch, "sentence_ids", torch.device("cpu")) is None
    assert store.has([items[0].id, "other"]).tolist() == [True, False]
    with pytest.raises(BadInput, match="no vector of other"):
        store.vectors([items[0].id, "other"])
    names, blocks = [f"shapes/0/train/{number}" for number in range(10)], np.concatenate(list(store.blocks()))
    assert list(store.ids) == names and store.ids[-1] == names[9] and np.array_equal(blocks, store.rows(names))
    assert verify(tmp_path / "images") == [] and store.teacher == manifest.parents[0].sha256
    (tmp_path / "images" / "shard-00001.arrow").write_bytes(b"torn")
    assert any("shard-00001" in problem for problem in verify(tmp_path / "images"))


def test_sentences_are_found_by_what_they_say(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "pile.txt").write_text("a red circle\n\na cat\na red circle\nthe dogs\n")
    asked = {"model": teacher, "data": str(tmp_path / "pile.txt"), "side": "sentences", "device": "cpu"}
    run_stage("embed", out=str(tmp_path / "out"), **asked)
    store, loaded = Store.open(tmp_path / "out"), load(teacher)
    ids, mask = texts_of(loaded).batch(["the dogs"])
    assert torch.allclose(store.vectors([sentence("the dogs").id]), loaded.model.embed_texts(ids, mask)[1], atol=1e-3)
    assert store.count == 4 and store.has([sentence(text).id for text in ("a cat", "a dog")]).tolist() == [True, False]


def test_a_store_that_does_not_fit_is_refused(teacher: str, tmp_path: Path) -> None:
    run_stage("embed", model=teacher, out=str(tmp_path / "out"), **SHAPES)
    store = Store.open(tmp_path / "out")
    source = open_data(IMAGES, "shapes:size=10", "train")
    form = read_as(load(teacher), "images")
    assert store.check(side="images", width=8, teacher=store.teacher, origin=origin(source), preprocessing=form) == []
    for wrong, said in (
        ({"side": "sentences"}, "those of sentences"),
        ({"width": 9}, "of 8 numbers"),
        ({"teacher": "0" * 64}, "another teacher"),
        ({"preprocessing": form.replace("bicubic", "other") + "x"}, "images in another form"),
        ({"origin": origin(open_data(IMAGES, "shapes:size=10,seed=1", "train"))}, "other images"),
    ):
        with pytest.raises(BadInput, match=said):
            store.check(**{"side": "images", **wrong})  # type: ignore[arg-type]
    store.teacher, store.preprocessing = None, ""  # as of an import
    remarks = store.check(side="images", teacher="0" * 64, preprocessing=form)
    assert len(remarks) == 2 and "of which teacher" in remarks[0] and "in what form" in remarks[1]
    with pytest.raises(BadInput, match="holds no embeddings"):
        Store.open(teacher)


@pytest.mark.parametrize("listed", [True, False])
def test_pictures_that_were_replaced_are_other_data(tmp_path: Path, listed: bool) -> None:
    """Of all splits alike, and of a part of the data; of pictures inside a table the table says all."""
    folder = tmp_path / "data"
    names = pictures(folder, 8)
    if listed:
        (folder / "all.csv").write_text("".join(f"{name}\n" for name in ["image", *names]))
    spec = str(folder / "all.csv") if listed else str(folder)
    before = origin(open_data(IMAGES, spec, "train"))
    assert origin(open_data(IMAGES, spec, "val")) == origin(open_data(IMAGES, spec, "train", limit=3)) == before
    (folder / names[5]).write_bytes((folder / names[5]).read_bytes() + b"more")
    assert origin(open_data(IMAGES, spec, "train")) != before


def test_what_cannot_be_embedded_is_left_out(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many are refused; then the same command goes on, once it is allowed, and embeds nothing again."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = pictures(folder, 6)
    (folder / names[2]).write_bytes(b"torn")
    whole = embed.Shards.embed

    def not_finite(self: embed.Shards, content: Any) -> Any:
        vectors = whole(self, content)
        vectors[-1, 0] = np.nan
        return vectors

    with pytest.raises(BadInput, match="no images in split val"):
        run_stage("embed", model=teacher, data=str(folder), split="val", side="images", out=str(tmp_path / "val"))
    monkeypatch.setattr(embed.Shards, "embed", not_finite)
    asked = SHAPES | {"model": teacher, "data": str(folder), "out": str(tmp_path / "out"), "shard_size": 6, "batch_size": 6}
    with pytest.raises(BadInput, match="2 of 6 images have no vector"):
        run_stage("embed", **asked)
    with pytest.raises(BadInput, match="not finished"):
        Store.open(tmp_path / "out")
    monkeypatch.setattr(embed.Shards, "embed", None)
    manifest = run_stage("embed", max_missing=0.4, **asked)
    store = Store.open(tmp_path / "out")
    assert (store.count, store.missing) == (4, 2)
    assert set(manifest.extra["missing_samples"]) == {str(folder / names[2]), names[5]}
    assert store.has(names).tolist() == [True, True, False, True, True, False]
    (line,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert names[2] in line["sample"] and "picture" in line["reason"] and manifest.data[0].skipped == 1


def test_a_run_that_is_stopped_before_its_first_shard_leaves_nothing(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop:
        requested = True

    monkeypatch.setattr(embed, "stop_flag", lambda: nullcontext(Stop()))
    with pytest.raises(KeyboardInterrupt):
        run_stage("embed", model=teacher, out=str(tmp_path / "out"), **SHAPES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("side", "damaged"), [("images", False), ("sentences", False), ("images", True)])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, damaged: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(embed, "say", lambda text, **_: said.append(text))
    (tmp_path / "pile.txt").write_text("".join(f"a dog and {number} cats in a garden\n" for number in range(10)))
    own = {"side": side, "max_tokens": 4, "data": str(tmp_path / "pile.txt")} if side == "sentences" else {}
    settings = SHAPES | own
    run_stage("embed", model=teacher, out=str(tmp_path / "whole"), **settings)
    assert any("10 texts have more" in text for text in said) == (side == "sentences")
    whole, write, written = files(tmp_path / "whole"), embed.write_shard, []

    def stops(path: Path, *content: Any) -> None:
        write(path, *content)
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(embed, "write_shard", stops)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        run_stage("embed", model=teacher, out=str(tmp_path / "parts"), **settings)
    if damaged:
        path = tmp_path / "parts/training_state/step-1/shard-00000.arrow"
        path.write_bytes(path.read_bytes()[:300])
        written[0] = ""
    run_stage("embed", model=teacher, out=str(tmp_path / "parts"), **settings)
    assert any("it is made again" in text for text in said) == damaged
    assert files(tmp_path / "parts") == whole and len(set(written)) == len(written) == 3 + damaged
    assert require_complete(str(tmp_path / "parts")).cost.seconds > 0
    card = (tmp_path / "parts/README.md").read_text("utf-8")
    count = require_complete(str(tmp_path / "parts")).extra["count"]
    assert f"{count} vectors of 8 numbers, of {side}, written by `evlm embed`" in card and "| samples | licence |" in card
    assert any("that is of the 2 samples that were left to do" in text for text in said) == (side == "sentences")
    with pytest.raises(BadInput, match="batch_size"):
        run_stage("embed", QUIET, model=teacher, out=str(tmp_path / "parts"), **settings | {"batch_size": 2})


def test_ids_of_equal_keys_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str) -> None:
    monkeypatch.setattr(stores, "keys_of", lambda ids: np.zeros(len(ids), np.uint64))
    run_stage("embed", model=teacher, out=str(tmp_path / "out"), **SHAPES)
    store, ids = Store.open(tmp_path / "out"), [f"shapes/0/train/{number}" for number in (3, 9, 0)]
    monkeypatch.undo()
    monkeypatch.setattr(stores, "keys_of", lambda ids: np.zeros(len(ids), np.uint64))
    shards = [stores.read_shard(tmp_path / "out" / stores.shard_name(number)) for number in range(3)]
    assert np.array_equal(store.rows(ids), np.stack([shards[0].vectors[3], shards[2].vectors[1], shards[0].vectors[0]]))
    assert not store.has(["shapes/0/train/10"]).any()


@pytest.mark.slow
def test_two_processes_write_the_same_store(teacher: str, tmp_path: Path) -> None:
    nursery.whole("embed", model=teacher, out=str(tmp_path / "one"), **SHAPES)
    nursery.whole("embed", model=teacher, out=str(tmp_path / "two"), processes=2, **SHAPES)
    assert files(tmp_path / "one") == files(tmp_path / "two") and verify(tmp_path / "two") == []


@pytest.mark.slow
def test_the_command_says_what_it_wrote(teacher: str, tmp_path: Path, evlm: Callable[..., tuple[int, str, str]]) -> None:
    words = ["embed", "--model", teacher, "--data", "shapes:size=5", "--side", "images", "--out", tmp_path / "out", "--device", "cpu"]
    code, stdout, stderr = evlm(*words)
    assert code == 0 and stdout.splitlines()[-1] == str(tmp_path / "out") and "5 vectors of 8 numbers" in stderr, stderr
    assert evlm("verify", tmp_path / "out")[0] == 0 and evlm("inspect", tmp_path / "out")[0] == 0
    assert evlm(*words)[0] == 0 and require_complete(tmp_path / "out").extra["count"] == 5
    assert evlm("embed", "--model", teacher, "--data", "stream:x.jsonl", "--side", "images", "--out", tmp_path / "o")[0] == 3
