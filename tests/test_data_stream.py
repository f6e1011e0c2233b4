"""Streams: growing indices, the same samples after a resume and in several processes, and what they must be told."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import run_stage
from test_data_files import jsonl, pictures, png
from test_data_forms import CAPTIONS, QUESTION_ROWS, add, as_csv, as_parquet, shards, written

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.configured import which
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.kinds.questions import QUESTIONS, answers
from efficientvlm.data.opening import open_data, texts
from efficientvlm.data.plan import IndexPlan, StreamPlan, plan_for
from efficientvlm.data.stream import Stream, check_settings
from efficientvlm.data.stream_rows import read_file
from efficientvlm.errors import BadInput
from efficientvlm.settings.compose import stage_settings

COUNT = 30


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def pairs(folder: Path, count: int = COUNT) -> str:
    paths = pictures(folder, count)
    return jsonl(folder / "p.jsonl", [{"image": path, "caption": f"c{n}"} for n, path in enumerate(paths)])


def captions(stream: Any, indices: Any) -> list[str]:
    return [stream[index].captions[0] for index in indices]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".tar"])
def test_every_form_can_be_streamed(tmp_path: Path, suffix: str) -> None:
    source = open_data(QUESTIONS, f"stream:{written(tmp_path, suffix, QUESTION_ROWS)}", "train", image_size=8, shuffle_buffer=1)
    items = [source[index] for index in range(3)]
    asked = [str(row["question"]).replace("\n", " " if suffix == ".tsv" else "\n") for row in QUESTION_ROWS]
    assert [item.questions[0].text for item in items] == asked
    assert dict(items[0].questions[0].answers) == pytest.approx({"a": 1 / 3, "b": 1 / 6})
    assert np.array_equal(items[2].image, open_image(png(1), 8)) and items[0].id == items[1].id != items[2].id
    said = open_data(PAIRS, f"stream:{written(tmp_path, suffix, CAPTIONS)}", "train", shuffle_buffer=1)
    assert said[0].captions == ["one", "two"] and said[0].regions[0].box == (0.25, 0.25, 0.5, 0.5)
    assert list(texts(said)) == ["one", "two", "r", "three"]


def test_an_address_is_read_like_a_file(tmp_path: Path) -> None:
    rows = [{"image": (tmp_path / path).as_posix(), "caption": "c"} for path in pictures(tmp_path, 2)]
    spec = jsonl(tmp_path / "p.jsonl", rows)
    stream = open_data(PAIRS, f"stream:file://{spec}", "train", shuffle_buffer=1)
    assert np.array_equal(stream[1].image, open_image(png(1)))
    with pytest.raises(BadInput, match="cannot be opened"):
        open_data(PAIRS, f"stream:file://{tmp_path}/none.jsonl", "train")
    with pytest.raises(BadInput, match="cannot be streamed"):
        open_data(PAIRS, f"stream:file://{tmp_path}/none.zip", "train")


class Line(io.RawIOBase):
    """A remote file whose connection breaks after some bytes."""

    def __init__(self, content: bytes, whole: int, error: Exception) -> None:
        self._content, self._whole, self._error = io.BytesIO(content), whole, error

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._content.seek(offset, whence)

    def tell(self) -> int:
        return self._content.tell()

    def read(self, size: int = -1) -> bytes:
        if self.tell() >= self._whole:
            raise self._error
        return self._content.read(min(size, 4096))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".tar"])
@pytest.mark.parametrize("error", [OSError("connection reset"), RuntimeError("payload")])
def test_a_connection_that_breaks_is_no_damaged_file(
    tmp_path: Path, suffix: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipping the rest would train a resumed run on other data."""
    rows = [{"image": f"img/{i % 2}.png", "caption": f"words that fill a row {i}"} for i in range(300)]
    content = Path(written(tmp_path, suffix, rows)).read_bytes()
    line = Line(content, len(content) + 1, error)
    monkeypatch.setattr("fsspec.open", lambda name, mode: SimpleNamespace(open=lambda: line))
    assert len(list(read_file(f"https://far/data{suffix}"))) == 300
    line = Line(content, 0 if suffix == ".parquet" else len(content) // 2, error)
    with pytest.raises(BadInput, match="the stream broke off") as caught:
        list(read_file(f"https://far/data{suffix}"))
    assert "resumes" in caught.value.fix and str(error) in caught.value.why


def test_a_pass_holds_every_sample_and_the_next_has_another_order(tmp_path: Path) -> None:
    spec = f"stream:{pairs(tmp_path)}"
    stream = open_data(PAIRS, spec, "train", shuffle_buffer=8)
    seen = captions(stream, range(4 * COUNT))
    assert set(seen[: COUNT + 8]) == {f"c{n}" for n in range(COUNT)} and seen[:COUNT] != [f"c{n}" for n in range(COUNT)]
    assert seen[:COUNT] != seen[COUNT : 2 * COUNT] and len(stream) == 4 * COUNT
    assert captions(open_data(PAIRS, spec, "train", shuffle_buffer=8, seed=1), range(COUNT)) != seen[:COUNT]
    assert set(captions(open_data(PAIRS, spec, "train", limit=5), range(50))) == {f"c{n}" for n in range(5)}


def test_a_resumed_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    spec = f"stream:{pairs(tmp_path)}"
    (tmp_path / "img" / "7.png").write_bytes(b"damaged")
    whole = captions(open_data(PAIRS, spec, "train", shuffle_buffer=8), range(100))
    resumed = open_data(PAIRS, spec, "train", shuffle_buffer=8)
    assert captions(resumed, range(61, 100)) == whole[61:]
    assert captions(resumed, range(5)) == whole[:5], "a step back reads it anew"
    assert resumed.skips.count == 1 and "c7" not in whole


def test_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    spec = f"stream:{pairs(tmp_path)}"
    source = open_data(PAIRS, spec, "train", shuffle_buffer=8)
    alone = plan_for(source, 6, 0)
    ranks = [plan_for(open_data(PAIRS, spec, "train"), 6, 0, world=2, rank=rank) for rank in range(2)]
    assert isinstance(alone, StreamPlan) and isinstance(plan_for(list(range(9)), 3, 0), IndexPlan)
    for step in (0, 1, 30):
        assert ranks[0].batch(step) + ranks[1].batch(step) == alone.batch(step) == list(range(6 * step, 6 * step + 6))
    with pytest.raises(BadInput, match="multiple of 4"):
        try:
            StreamPlan(6, 4)
        except BadInput as error:
            raise BadInput(error.fix) from None


def test_bad_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = Path(pairs(tmp_path))
    lines = path.read_text().splitlines()
    lines[3], lines[9], lines[12] = "{oops", '{"image": "img/9.png"}', '{"image": "gone.png", "caption": "c"}'
    path.write_text("\n".join(lines))
    stream = open_data(PAIRS, f"stream:{path}", "train", shuffle_buffer=4)
    assert len(captions(stream, range(90))) == 90 and stream.skips.count == 3
    with pytest.raises(BadInput, match="3 samples"):
        captions(open_data(PAIRS, f"stream:{path}", "train", max_bad=2), range(90))
    with pytest.raises(BadInput, match="line 4: it is not JSON"):
        captions(open_data(PAIRS, f"stream:{path}", "train", max_bad=0, shuffle_buffer=1), range(90))
    path.write_text('{"image": "gone.png", "caption": "c"}\n' * 10)
    with pytest.raises(BadInput, match="none could be read"):
        open_data(PAIRS, f"stream:{path}", "train")[0]
    path.write_text("")
    with pytest.raises(BadInput, match="no rows"):
        open_data(PAIRS, f"stream:{path}", "train")


def test_a_damaged_shard_is_noticed_in_a_stream(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", count=2, each=20)
    first = tmp_path / "shards" / "000.tar"
    whole = first.read_bytes()
    header = whole.index(b"012.png")
    for damaged in (whole[: len(whole) // 2], whole[: len(whole) // 2 + 100], whole[:header] + b"\x01" * 512 + whole[header + 512 :]):
        first.write_bytes(damaged)
        stream = open_data(PAIRS, f"stream:{folder}/*.tar", "train", shuffle_buffer=4)
        assert len(set(captions(stream, range(60)))) > 20 and stream.skips.count == 1
        assert "000.tar: it is damaged after sample" in stream.skips.lines()[0]
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as archive:
        add(archive, "a.png", png(0))
        add(archive, "a.json", json.dumps({"caption": "zipped"}).encode())
    assert open_data(PAIRS, f"stream:{tmp_path}/z.tar.gz", "train", shuffle_buffer=1)[0].captions == ["zipped"]


def test_damaged_files_break_off_with_a_reason(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    as_parquet(tmp_path / "p.parquet", CAPTIONS[:1])
    (tmp_path / "p.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-20])
    with pytest.raises(BadInput, match="cannot be read as parquet after row 0"):
        open_data(PAIRS, f"stream:{tmp_path}/p.parquet", "train")
    as_csv(tmp_path / "p.csv", [{"image": "img/0.png", "other": "c"}])
    with pytest.raises(BadInput, match="no column for caption"):
        open_data(PAIRS, f"stream:{tmp_path}/p.csv", "train")


def test_what_a_stream_must_be_told(tmp_path: Path) -> None:
    spec = f"stream:{pairs(tmp_path)}"
    given = {"out": "x", "model": "y", "data": spec}
    with pytest.raises(BadInput) as caught:
        check_settings(stage_settings("finetune", given))
    assert caught.value.fix == "give --max-steps N, --val DATA, --answers FILE" and "no list of answers" in caught.value.why
    with pytest.raises(BadInput) as caught:
        check_settings(stage_settings("finetune", {**given, "task": "retrieval"}))
    assert caught.value.fix == "give --max-steps N, --val DATA" and "answers" not in caught.value.why
    check_settings(stage_settings("finetune", {**given, "task": "retrieval", "max_steps": 3, "val": spec}))
    with pytest.raises(BadInput, match="is a stream") as caught:
        which(stage_settings("eval", {"model": "x", "data": spec, "split": "train", "task": "retrieval"}), "train")
    assert caught.value.fix == "measure on a file or folder"
    with pytest.raises(BadInput) as caught:
        check_settings(stage_settings("pretrain", {**given, "max_steps": 3}))
    assert caught.value.fix == "give --val DATA"
    with pytest.raises(BadInput, match="it has no test split"):
        open_data(PAIRS, spec, "test")
    with pytest.raises(BadInput, match="not known in advance"):
        list(answers(open_data(QUESTIONS, f"stream:{written(tmp_path / 'q', '.jsonl', QUESTION_ROWS)}", "train")))
    with pytest.raises(BadInput, match="no data called"):
        open_data(PAIRS, "stream:nowhere.jsonl", "train")


def test_stages_train_on_streams_and_list_what_they_skipped(tmp_path: Path, chain: Path) -> None:
    data = Path(pairs(tmp_path))
    (tmp_path / "img" / "3.png").write_bytes(b"")
    val = jsonl(tmp_path / "val.jsonl", [{"image": f"img/{n}.png", "caption": f"c{n}"} for n in range(4, 8)])
    short: dict[str, Any] = {"max_steps": 12, "batch_size": 4, "shuffle_buffer": 4, "data": f"stream:{data}"}
    manifest = run_stage("pretrain", out=str(tmp_path / "out"), model=str(chain / "init"), val=val, **short)
    train = manifest.data[0]
    assert (train.name, train.count, train.skipped) == (f"stream:{data}", 48, 1) and manifest.metrics["val"]["images"] == 4
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["split"] == "train" and "line 4" in json.loads(line)["sample"]
    assert require_complete(str(tmp_path / "out")).files["skipped.jsonl"]

    found = run_stage("finetune", out=str(tmp_path / "found"), model=str(chain / "init"), task="retrieval", val=val, **short)
    assert found.data[0].skipped == 1 and found.metrics["val"]["images"] == 4
    asked = jsonl(tmp_path / "q.jsonl", [{"image": f"img/{n}.png", "question": "q?", "answer": "red"} for n in range(4, 20)])
    (tmp_path / "answers.txt").write_text("red\nblue\n")
    extra = {"answers": str(tmp_path / "answers.txt"), "val": asked, "kd": 0, "limit": 12}
    tuned = run_stage("finetune", out=str(tmp_path / "vqa"), model=str(chain / "init"), **{**short, "data": f"stream:{asked}"}, **extra)
    assert tuned.metrics["val"]["images"] == 12 and not (tmp_path / "vqa" / "skipped.jsonl").exists()


def test_a_stream_has_no_boolean_trap(tmp_path: Path) -> None:
    stream = open_data(PAIRS, f"stream:{pairs(tmp_path, 3)}", "train")
    assert isinstance(stream, Stream) and len(stream) == 0 and len(stream.fingerprint) == 64
