"""The command that selects sentences: what it writes, counts and refuses, and that a stopped run ends in the same bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from clip_folder import byte_pairs, write_clip
from conftest import run_stage

from efficientvlm.errors import BadInput
from efficientvlm.loaded import load, texts_of
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.selection.pile import Pile
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages import select_sentences

Command = Callable[..., tuple[int, str, str]]
SAID = [f"a {colour} {thing} number {number}" for number in range(60) for colour in ("red", "blue") for thing in ("dog", "cat")]
FOREIGN = ["A  RED dog number 0", "", "abc", "x" * 500, "собака на траве"]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A pile in which something is wrong, and embeddings of it and of 20 images."""
    draw = np.random.default_rng(0)
    lines = [*SAID, *FOREIGN]
    (tmp_path / "pile.txt").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    vectors = draw.standard_normal((len(lines) + 1, 8)).astype(np.float32)
    vectors[7] = np.nan
    np.save(tmp_path / "sentences.npy", vectors)
    np.save(tmp_path / "images.npy", draw.standard_normal((20, 8)).astype(np.float16))
    files = {"sentences": "pile.txt", "images": "images.npy", "sentence_vectors": "sentences.npy"}
    return {name: str(tmp_path / file) for name, file in files.items()} | {"batch_size": 32, "cap": 3, "scripts": ["latin"]}


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parquet.read_table(out / "sentences.parquet").to_pylist()
    return found


def test_every_sentence_is_kept_or_counted(given: dict[str, Any], tmp_path: Path) -> None:
    found = run_stage("select-sentences", **given, min_similarity=0.2, out=str(tmp_path / "out")).metrics["sentences"]
    dropped = found["dropped"]
    assert found["read"] == len(SAID) + len(FOREIGN) + 1 == found["kept"] + sum(dropped.values())
    once = ("duplicate", "empty", "too_short", "too_long", "other_script", "unreadable", "not_finite")
    assert {name: dropped[name] for name in once} == dict.fromkeys(once, 1) and dropped["over_cap"] > 0
    kept = rows(tmp_path / "out")
    images, sentences = (np.load(given[name]).astype(np.float64) for name in ("images", "sentence_vectors"))
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (images, sentences)]
    cosines = unit[1] @ unit[0].T
    for row in kept:
        assert row["sentence"] == SAID[row["row"]] and row["image"] == str(cosines[row["row"]].argmax())
        assert abs(row["similarity"] - cosines[row["row"]].max()) < 1e-5 and row["similarity"] >= 0.2
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)
    assert (tmp_path / "out/sentences.txt").read_text("utf-8").splitlines() == [row["sentence"] for row in kept]
    assert found["images"] == len({row["image"] for row in kept}) and found["kept"] == len(kept)


@pytest.mark.parametrize("rules", [{}, {"per_image": 2, "cap": None, "near": None}, {"total": 9, "cap": None}])
def test_a_run_that_died_goes_on_to_the_same_bytes(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, Any]
) -> None:
    run_stage("select-sentences", **(given | rules), out=str(tmp_path / "whole"))
    monkeypatch.setattr(select_sentences, "SAVE_EVERY", 0.0)
    taken: list[int] = []
    whole = select_sentences.Selection.take

    def dies(self: Any, begin: int, *rest: Any) -> None:
        taken.append(begin)
        whole(self, begin, *rest)
        if len(taken) in (3, 5):
            self.candidates._file.flush()  # written and not put down
            raise KeyboardInterrupt

    monkeypatch.setattr(select_sentences.Selection, "take", dies)
    for _ in range(2):
        with pytest.raises(Exception, match="stopped"):
            run_stage("select-sentences", **(given | rules), out=str(tmp_path / "out"))
    run_stage("select-sentences", **(given | rules), out=str(tmp_path / "out"))
    assert taken == [0, 32, 64, 64, 96, 96, 128, 160, 192, 224]
    for name in ("sentences.txt", "sentences.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out/training_state").exists()


def test_a_model_embeds_the_sentences_of_a_table(given: dict[str, Any], tmp_path: Path) -> None:
    run_stage("import", model=str(write_clip(tmp_path / "hf", byte_pairs())), out=str(tmp_path / "clip"))
    parquet.write_table(pa.table({"said": [*SAID[:50], None, " "], "number": range(52)}), tmp_path / "pile.parquet")
    settings = {"images": given["images"], "model": str(tmp_path / "clip"), "sentences": str(tmp_path / "pile.parquet"), "near": None}
    settings["max_missing"] = 0.05
    out = tmp_path / "out"
    found = run_stage("select-sentences", **settings, columns={"sentence": "said"}, batch_size=20, out=str(out)).metrics["sentences"]
    assert found["dropped"]["unreadable"] == found["dropped"]["empty"] == 1 and found["read"] == 52
    loaded = load(str(tmp_path / "clip"))
    images = np.load(given["images"]).astype(np.float32)
    for row in rows(out)[:5]:
        vector = loaded.model.embed_texts(*texts_of(loaded).batch([row["sentence"]]))[1].detach().numpy()[0]
        assert abs(float((images @ vector / np.linalg.norm(images, axis=1)).max()) - row["similarity"]) < 1e-5


def test_tokens_are_counted_over_all_runs(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage("import", model=str(write_clip(tmp_path / "hf", byte_pairs())), out=str(tmp_path / "clip"))
    settings = {
        "images": given["images"],
        "model": str(tmp_path / "clip"),
        "sentences": given["sentences"],
        "max_tokens": 4,
        "batch_size": 40,
    }
    whole = run_stage("select-sentences", **settings, out=str(tmp_path / "whole"))
    (remark,) = [text for text in whole.data[0].read_as if "more than 4 tokens" in text]
    monkeypatch.setattr(select_sentences, "SAVE_EVERY", 0.0)
    take, died = select_sentences.Selection.take, []

    def dies(self: Any, begin: int, *rest: Any) -> None:
        if begin == 120 and not died:
            died.append(begin)
            raise KeyboardInterrupt
        take(self, begin, *rest)

    monkeypatch.setattr(select_sentences.Selection, "take", dies)
    with pytest.raises(Exception, match="stopped"):
        run_stage("select-sentences", **settings, out=str(tmp_path / "out"))
    assert run_stage("select-sentences", **settings, out=str(tmp_path / "out")).data[0].read_as == whole.data[0].read_as
    assert remark.split()[0] not in ("0", "1")


def test_sentences_are_found_in_a_store_by_what_they_say(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file with a row a row of the pile; what the store lacks is counted, and one of another teacher is refused."""
    (tmp_path / "some.txt").write_text("\n".join(SAID[:200]))
    vectors = np.load(given["sentence_vectors"])[:200]
    np.save(tmp_path / "some.npy", vectors)
    imported = {"data": str(tmp_path / "some.txt"), "side": "sentences", "vectors": str(tmp_path / "some.npy")}
    run_stage("embed", out=str(tmp_path / "store"), **imported)
    in_file = run_stage("select-sentences", **given, out=str(tmp_path / "file"))
    by_store, searched = given | {"sentence_vectors": str(tmp_path / "store")}, []
    with pytest.raises(BadInput, match="42 of 246 sentences cannot be used: 1 unreadable, 41 without vector"):
        run_stage("select-sentences", **by_store, out=str(tmp_path / "out"))
    monkeypatch.setattr(select_sentences.Selection, "take", lambda self, begin, *rest: searched.append(begin))
    in_store = run_stage("select-sentences", **by_store, max_missing=0.18, out=str(tmp_path / "out"))
    assert not searched and "nobody knows whether images and sentences lie in one space" in in_store.data[0].read_as[0]
    lacking = in_store.metrics["sentences"]["dropped"]
    assert lacking["without_vector"] == len(SAID) - 200 + 1 and "not_finite" not in lacking
    whole, some = (rows(tmp_path / name) for name in ("file", "out"))
    close = {row["sentence"]: row["similarity"] for row in whole}
    assert some and all(row["row"] < 200 for row in some)
    assert all(abs(close.get(row["sentence"], row["similarity"]) - row["similarity"]) < 2e-3 for row in some)
    assert in_file.metrics["sentences"]["dropped"]["not_finite"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_similarity": 1.0}, "none of 246 sentences is kept"),
        ({"images": "pile.txt"}, "is no .npy file"),
        ({"sentences": "binary.txt"}, "no text at all"),
        ({"sentences": "returns.txt"}, "carriage returns"),
        ({"images": "sentences"}, "not a finished checkpoint"),
        ({"images": "narrow.npy"}, "different spaces"),
        ({"sentence_vectors": "images.npy"}, "does not fit"),
        ({"images": "text.npy"}, "cannot be read|holds no embeddings"),
        ({"columns": {"sentence": "said"}}, "has no column said"),
        ({"search": "approximate"}, "faiss is not installed"),
        ({"cap": None}, "how many are kept"),
        ({"model": "bundled:easy-vqa"}, "not both"),
        ({"scripts": ["klingon"]}, "scripts"),
        ({"min_characters": 9, "max_characters": 8}, "less than the least"),
        ({"columns": {"text": "said"}}, "no such role"),
    ],
)
def test_what_cannot_be_is_refused(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    np.save(tmp_path / "narrow.npy", np.ones((4, 5), np.float32))
    (tmp_path / "text.npy").write_text("a dog")
    (tmp_path / "binary.txt").write_bytes(bytes(range(4)) * 50 + b"\0" * 200)
    (tmp_path / "returns.txt").write_bytes(b"a dog\ra cat\rtwo birds")
    (tmp_path / "sentences").mkdir()
    places = ("images", "sentence_vectors", "sentences")
    change = {name: str(tmp_path / value) if name in places else value for name, value in change.items()}
    with pytest.raises(BadInput, match=message):
        run_stage("select-sentences", **(given | change), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_plan_says_memory_and_time_of_both_sizes(given: dict[str, Any], tmp_path: Path) -> None:
    def planned(**settings: Any) -> Any:
        config = stage_settings("select-sentences", {**given, **settings, "out": str(tmp_path / "out")})
        (found,) = plan([Step("select", "select-sentences", config)]).stages
        return found

    small, large = planned(), planned(cap=300)
    assert small.status == "new" and small.schedule == {"images": 20, "sentences": len(SAID) + len(FOREIGN) + 1, "batch_size": 32}
    assert small.memory["images"] == 20 * 8 * 4 and small.time["search"] >= 0 == small.time["embed"]
    assert small.memory["candidates"] < large.memory["candidates"] and small.disk["peak"] < large.disk["peak"]
    assert not (tmp_path / "out").exists()


def test_the_command_tells_what_came_of_it(given: dict[str, Any], tmp_path: Path, evlm: Command) -> None:
    options = ["--sentences", given["sentences"], "--images", given["images"], "--sentence-vectors", given["sentence_vectors"]]
    code, out, err = evlm("select-sentences", *options, "--cap", "1", "--out", str(tmp_path / "out"))
    assert code == 0 and out.rstrip().endswith("out") and "1 duplicate" in err and "sentences are kept, near to 20 images" in err
    code, _, err = evlm("select-sentences", *options, "--cap", "1", "--out", str(tmp_path / "out"))
    assert code == 0 and "up to date" in err
    code, _, err = evlm("select-sentences", *options, "--cap", "2", "--out", str(tmp_path / "out"))
    assert code == 3 and "other settings" in err


@pytest.mark.parametrize("name", ["pile.json", "pile.csv.gz", "pile.arrow"])
def test_a_file_of_another_kind_is_not_taken_for_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('[{"sentence": "a red circle"}]', "utf-8")
    with pytest.raises(BadInput, match="is no pile of sentences"):
        Pile(tmp_path / name)
