"""Samples that cannot be used: refused, or skipped and counted up to a limit; never a hang, a traceback or a leak."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import run_stage
from PIL import Image
from test_data_files import jsonl, pictures, png
from test_data_forms import WRITERS, as_csv, shards, vqav2, written

from efficientvlm.data.images import MAX_PIXELS, open_image
from efficientvlm.data.kinds.pairs import PAIRS, PairItem
from efficientvlm.data.kinds.questions import QUESTIONS, VQAItem
from efficientvlm.data.opening import open_data, record, usable
from efficientvlm.data.skips import LONGEST_LINE, Skips
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.objectives.objective import Objective
from efficientvlm.stages.common import keep_skipped

OPEN = {kind.name: partial(open_data, kind) for kind in (QUESTIONS, PAIRS)}
COUNT = 12


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def bomb(side: int = 15_200) -> bytes:
    """A PNG that unpacks to 231 megapixels, in a few hundred kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compressobj(9)
    line = bytes(1 + side)
    packed = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def large() -> bytes:
    return bomb()


BROKEN: dict[str, Callable[[], bytes]] = {
    "corrupt": lambda: png(1)[:40] + b"\0" * 20 + png(1)[60:],
    "truncated jpeg": lambda: jpeg()[:700],
    "empty": lambda: b"",
    "no picture": lambda: b"<html>not found</html>",
    "another program's": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


def rows_of(kind: str, paths: list[str]) -> list[dict[str, Any]]:
    text = {"question": "q?", "answer": "a"} if kind == "questions" else {"caption": "c"}
    return [{"image": path, **text} for path in paths]


def opened(kind: str, folder: Path, **settings: Any) -> Any:
    return OPEN[kind](jsonl(folder / "d.jsonl", rows_of(kind, [f"img/{i}.png" for i in range(COUNT)])), "test", image_size=8, **settings)


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_picture_that_cannot_be_read(tmp_path: Path, kind: str, broken: str) -> None:
    pictures(tmp_path, COUNT)
    (tmp_path / "img" / "4.png").write_bytes(BROKEN[broken]())
    with pytest.raises(BadInput, match=r"d\.jsonl line 5: .*4\.png: it cannot be read as a picture"):
        opened(kind, tmp_path)[4]
    source, again = (opened(kind, tmp_path, max_bad=1) for _ in range(2))
    stand_in = source[4]
    assert isinstance(stand_in, VQAItem if kind == "questions" else PairItem) and stand_in.id != "img/4.png"
    assert source.skips.count == 1 and source[4].id == stand_in.id and source.skips.count == 1
    assert [again[i].id for i in (7, 4)] == ["img/7.png", stand_in.id], "what stands in does not depend on what was read before"
    assert [item.id for item in usable(source, [3, 4, 5])] == ["img/3.png", "img/5.png"], "when measuring, nothing stands in"
    assert record(source, "test")["skipped"] == 1 and "line 5" in source.skips.lines()[0]


@pytest.mark.parametrize("kind", OPEN)
def test_the_limit_is_kept(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, COUNT)
    for index in (2, 5, 9):
        (tmp_path / "img" / f"{index}.png").write_bytes(b"")
    source = opened(kind, tmp_path, max_bad=2)
    with pytest.raises(BadInput) as caught:
        usable(source, range(COUNT))
    assert caught.value.what.startswith("3 samples of data") and "2 may be skipped" in caught.value.why
    assert all(f"line {row}" in caught.value.why for row in (3, 6, 10)) and "max_bad" in caught.value.fix
    for index in range(COUNT):
        (tmp_path / "img" / f"{index}.png").write_bytes(b"")
    with pytest.raises(BadInput, match="no usable sample"):
        usable(opened(kind, tmp_path, max_bad=100), range(COUNT))


@pytest.mark.parametrize("kind", OPEN)
def test_by_default_one_in_a_hundred(tmp_path: Path, kind: str) -> None:
    path = pictures(tmp_path, 1)
    rows = rows_of(kind, path * 298) + rows_of(kind, ["missing.png", "gone.png"])
    assert OPEN[kind](jsonl(tmp_path / "d.jsonl", rows), "test").skips.count == 2
    with pytest.raises(BadInput, match="3 samples of data") as caught:
        OPEN[kind](jsonl(tmp_path / "d.jsonl", rows[:296] + rows_of(kind, ["missing.png"] * 3)), "test")
    assert "2 may be skipped" in caught.value.why
    with pytest.raises(BadInput, match=r"line 99: there is no image missing\.png"):
        OPEN[kind](jsonl(tmp_path / "d.jsonl", rows[:98] + rows[298:299]), "test")


def bad_rows(kind: str) -> list[Any]:
    """Rows of every kind of mistake, each on its own line."""
    good = {"image": "img/0.png", "question": "q", "answer": "a", "caption": "c"}
    text = "question" if kind == "questions" else "caption"
    rows: list[Any] = [{**good, text: value} for value in (None, "", "  ", 3, [""], {"a": 1})]
    rows += [{**good, "image": value} for value in (None, "", 7, [], "missing.png", "x" * 300, "a\0b", "../loop/loop", "A" * 1200)]
    if kind == "questions":
        rows += [{**good, "answer": value} for value in (None, "", [], ["a", None], {"x": 1}, float("nan"), 10**400)]
        rows += [{**good, "weight": value} for value in (-1, "much", [1, 2], True)]
    else:
        rows += [{**good, "regions": value} for value in (1, "all", [1], [{"bb": [0, 0, 1, 1]}])]
    return rows


@pytest.mark.parametrize("kind", OPEN)
def test_every_bad_row_is_found_when_the_data_is_opened(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    bad = bad_rows(kind)
    lines = [json.dumps(row).encode() for row in [{"image": "img/0.png", "question": "q", "answer": "a", "caption": "c"}, *bad]]
    lines += [b"{oops", b"[1]", b'"text"', b'{"question": "\xff\xfe"}', b'{"caption": "\\ud800"}', b"[" * 100_000]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    total = len(lines) - 1
    source = OPEN[kind](str(tmp_path / "d.jsonl"), "test", max_bad=total)
    assert source.skips.count == total and len(source) == 1
    named = {int(reason.partition(" line ")[2]) for reason in source.skips.reasons}
    assert named == set(range(2, len(lines) + 1))
    with pytest.raises(BadInput, match=f"{total} samples"):
        OPEN[kind](str(tmp_path / "d.jsonl"), "test", max_bad=total - 1)


@pytest.mark.parametrize("kind", OPEN)
def test_bad_rows_of_csv(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, 1)
    as_csv(tmp_path / "d.csv", rows_of(kind, ["img/0.png"] * 3))
    good = (tmp_path / "d.csv").read_bytes()
    (tmp_path / "d.csv").write_bytes(good + b"one cell\r\n" + b"img/0.png,\xff,\xff\r\n"[: None if kind == "questions" else -7] + b"\r\n")
    source = OPEN[kind](str(tmp_path / "d.csv"), "test", max_bad=2)
    assert source.skips.count == 2 and "cells, the header" in source.skips.lines()[0]
    (tmp_path / "d.csv").write_bytes(b"a,a\n1,2\n")
    with pytest.raises(BadInput, match="no header of distinct column names"):
        OPEN[kind](str(tmp_path / "d.csv"), "test")
    (tmp_path / "d.csv").write_bytes(good + b'"never closed\n')
    with pytest.raises(BadInput, match="it is not CSV"):
        OPEN[kind](str(tmp_path / "d.csv"), "test")


def test_a_quote_that_is_not_closed_costs_one_row(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    suffix, mark = ".csv", ","
    lines = [f"img/0.png{mark}caption {i}" for i in range(300)]
    lines[3] = f'img/0.png{mark}"over two\nlines"'
    for line, text in ((90, '"never closed'), (200, '"closed by another row'), (201, '"good"'), (299, '"at the end')):
        lines[line] = f"img/0.png{mark}{text}"
    (tmp_path / f"d{suffix}").write_text("\n".join([f"image{mark}caption", *lines]) + "\n")
    source = open_data(PAIRS, str(tmp_path / f"d{suffix}"), "test", image_size=8, max_bad=3)
    named = [int(reason.partition(" line ")[2]) for reason in source.skips.reasons]
    assert source.skips.count == 3 and named == [93, 203, 302], "one more than the row, for the row of two lines"
    said = [f"caption {i}" for i in range(300) if i not in (90, 200, 299)]
    said[3], said[200 - 1] = "over two\nlines", "good"
    assert source[0].captions == said
    (tmp_path / f"d{suffix}").write_text(f'image{mark}"caption\nimg/0.png{mark}c\n')
    with pytest.raises(BadInput, match="no header"):
        open_data(PAIRS, str(tmp_path / f"d{suffix}"), "test")


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("suffix", WRITERS)
def test_missing_columns_and_empty_splits_of_every_form(tmp_path: Path, kind: str, suffix: str) -> None:
    spec = written(tmp_path, suffix, [{"image": "img/0.png", "something": "else"}])
    with pytest.raises(BadInput, match=r"has no column for .*columns found: .*something"):
        OPEN[kind](spec, "test")
    if suffix in (".json", ".jsonl", ".csv", ".tar"):
        empty = {".json": b"[]", ".csv": b"image,caption\n", ".tar": b"\0" * 10240}.get(suffix, b"")
        (tmp_path / f"data{suffix}").write_bytes(empty)
        with pytest.raises(BadInput, match="no rows"):
            OPEN[kind](spec, "test")


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".tar"])
def test_one_id_for_two_pictures_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    rows = [{**row, "image_id": 7} for row in rows_of(kind, ["img/0.png", "img/1.png", "img/0.png"])]
    with pytest.raises(BadInput, match="image_id 7 is another picture than in"):
        OPEN[kind](written(tmp_path, suffix, rows), "test")
    source = OPEN[kind](written(tmp_path, suffix, rows[::2]), "test")
    assert len(source) == 1, "the same row twice is no mistake"
    rows = [{**row, "image_id": None} for row in rows]
    assert len(OPEN[kind](written(tmp_path, ".jsonl", rows), "test")) == 2, "without an id a picture is known by its path"


def test_a_broken_shard_names_its_place_and_costs_what_is_lost(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards", count=2, each=20)
    shard = tmp_path / "shards" / "001.tar"
    whole = shard.read_bytes()
    header = whole.index(b"112.png")
    for damaged in (whole[: len(whole) // 2], whole[:header] + b"\x01" * 512 + whole[header + 512 :]):
        shard.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"shard .*001\.tar: .* at byte [\d,]+"):
            open_data(PAIRS, folder, "test")
        source = open_data(PAIRS, folder, "test", max_bad=40)
        assert 20 < len(source) < 35 and source.skips.count >= 3, "the rest of the shard is counted, not its one error"
        assert [item.captions for item in usable(source, [0, len(source) - 1])] and record(source, "test")["skipped"]
    shard.write_bytes(b"no archive at all, " * 100)
    with pytest.raises(BadInput, match="cannot be read as a tar file"):
        open_data(PAIRS, folder, "test")


def test_vqav2_without_pictures_or_questions(tmp_path: Path) -> None:
    folder = vqav2(tmp_path / "vqa")
    (folder / "train2014" / f"COCO_train2014_{2:012}.jpg").unlink()
    with pytest.raises(BadInput, match=r"question 3: there is no image train2014/COCO_train2014_000000000002\.jpg"):
        open_data(QUESTIONS, str(folder), "train")
    assert len(open_data(QUESTIONS, str(folder), "train", max_bad=2)) == 2
    questions = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    for content, words in (
        ('{"questions": 1}', "no list called questions"),
        ("[", "not JSON"),
        ('{"questions": [1]}', "no question_id"),
        ('{"questions": []}', "no rows"),
    ):
        questions.write_text(content)
        with pytest.raises(BadInput, match=words):
            open_data(QUESTIONS, str(folder), "val")


@pytest.mark.parametrize(
    ("mode", "colour", "format"),
    [("CMYK", (0, 255, 255, 0), "JPEG"), ("P", 0, "PNG"), ("RGBA", (255, 0, 0, 255), "PNG"), ("I;16", 65535, "PNG"), ("1", 1, "PNG")],
)
def test_colour_modes_become_rgb(tmp_path: Path, mode: str, colour: Any, format: str) -> None:
    image = Image.fromarray(np.full((9, 7), 65535, np.uint16)) if mode == "I;16" else Image.new(mode, (7, 9), colour)
    if mode == "P":
        image.putpalette([255, 0, 0])
    image.save(tmp_path / "a", format)
    found = open_image(tmp_path / "a")
    wanted = (255, 255, 255) if mode in ("I;16", "1") else (255, 0, 0)
    assert found.shape == (9, 7, 3) and np.abs(found.astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("tag", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path: Path, tag: int) -> None:
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = tag
    image.save(tmp_path / "a.png", exif=exif)
    found = open_image(tmp_path / "a.png")
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[tag]
    assert found.shape[:2] == ((4, 8) if tag < 5 else (8, 4)) and found[corner].tolist() == [255] * 3


def test_a_bomb_is_refused_by_its_header_alone(tmp_path: Path, large: bytes) -> None:
    """Reading it a hundred times takes neither its 231 megabytes nor more memory than the first time."""
    assert len(large) < 1_000_000
    pictures(tmp_path, 3)
    (tmp_path / "img" / "1.png").write_bytes(large)
    (tmp_path / "img" / "2.png").write_bytes(jpeg()[:700])
    spec = jsonl(tmp_path / "d.jsonl", rows_of("pairs", [f"img/{i}.png" for i in range(3)]))
    code = f"""
import resource
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.opening import open_data
source = open_data(PAIRS, {spec!r}, "test", image_size=8, max_bad=2)
source[0]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for _ in range(100):
    assert source[1].id == source[2].id == "img/0.png"
print(peak() - before, source.skips.count)
print(*source.skips.reasons.values())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    first, second = done.stdout.splitlines()
    grown, count = map(int, first.split())
    assert grown < 20_000 and count == 2, "kilobytes"
    assert f"it has more than {MAX_PIXELS:,} pixels" in second


def test_what_was_skipped_survives_a_restart(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    first = Skips("x", 3)
    first.add(BadInput("a", "why"))
    first.keep_in(log)
    first.add(BadInput("b", "why not"))
    first.add(BadInput("a", "why"))
    log.write_text(log.read_text() + '{"sample": "c", "re')
    second = Skips("x", 3)
    second.add(BadInput("a", "why"))
    second.keep_in(log)
    assert second.count == 2 and second.reasons == {"a": "why", "b": "why not"}
    second.add(BadInput("d", "no"))
    with pytest.raises(BadInput, match="4 samples"):
        second.add(BadInput("e", "no"))


def test_a_list_of_what_was_skipped_is_read_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "skipped.jsonl"
    log.write_text('{"sample": "a", "reason": "why"}\n')
    with log.open("r+b") as file:
        file.truncate(50 * LONGEST_LINE)
    skips = Skips("x", 3)
    tracemalloc.start()
    try:
        skips.keep_in(log)
        assert tracemalloc.get_traced_memory()[1] < 20 * LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert skips.reasons == {"a": "why"}


def test_what_was_skipped_of_other_data_is_not_counted(tmp_path: Path) -> None:
    image = pictures(tmp_path, 1)[0]
    specs = {
        name: jsonl(tmp_path / f"{name}.jsonl", [{"image": path, "caption": name} for path in (image, *bad)])
        for name, bad in {"a": ["no.png", "none.png"], "b": ["gone.png"], "c": ["gone.png"]}.items()
    }
    output: Any = SimpleNamespace(state_dir=tmp_path, mine=True)

    def counted(name: str) -> int:
        source: Any = open_data(PAIRS, specs[name], "test", max_bad=2)
        keep_skipped(output, {"val": source}, quiet=True)
        return int(source.skips.count)

    assert [counted(name) for name in "abca"] == [2, 1, 1, 2]
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": image, "caption": "mended"}))
    assert counted("c") == 0


def test_a_sample_counts_once_even_if_its_reason_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientvlm.data.skips.REMEMBERED", 3)
    skips = Skips("x", 10)
    skips.keep_in(tmp_path / "skipped.jsonl")
    for _ in range(5):
        for number in range(5):
            skips.add(BadInput(f"sample {number}", "bad"))
    assert skips.count == 5 and len(skips.reasons) == 3 and skips.lines()[-1] == "and 2 more"
    skips.keep_in(tmp_path / "skipped.jsonl")
    assert skips.count == 5 and len(skips.reasons) == 5
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
def test_a_run_goes_on_without_a_bad_picture_and_resumes_to_the_same_weights(tmp_path: Path, chain: Path, monkeypatch: Any) -> None:
    pictures(tmp_path, 20)
    (tmp_path / "img" / "6.png").write_bytes(b"")
    rows = [{"image": f"img/{i}.png", "question": "q?", "answer": f"a{i % 3}"} for i in range(20)]
    data = jsonl(tmp_path / "d.jsonl", [*rows, {"image": "img/0.png", "question": "", "answer": "x"}])
    settings = {"model": str(chain / "init"), "data": data, "val": data, "max_bad": 3, "max_steps": 12, "batch_size": 4, "save_every": 1}
    whole = run_stage("finetune", out=str(tmp_path / "whole"), **settings)
    assert [(record.split, record.skipped) for record in whole.data] == [("train", 2), ("val", 2)]
    assert whole.metrics["val"]["images"] == 19, "when measuring, nothing stands in for a bad picture"
    listed = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["split"], entry["sample"].rpartition(" ")[2]) for entry in listed] == [
        ("train", "21"), ("train", "7"), ("val", "21"), ("val", "7")
    ]  # fmt: skip

    def stop(self: Objective, step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(BadInput, match=r"2 samples of data .* cannot be used: 1 may be skipped"):
        run_stage("finetune", out=str(tmp_path / "stopped"), **{**settings, "max_bad": 1})
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Objective, "after_step", stop)
        run_stage("finetune", out=str(tmp_path / "stopped"), **settings)
    resumed = run_stage("finetune", out=str(tmp_path / "stopped"), **settings)
    assert resumed.files["model.safetensors"].sha256 == whole.files["model.safetensors"].sha256
    assert [record.skipped for record in resumed.data] == [2, 2]
    assert resumed.config["max_bad"] == 3
    assert (tmp_path / "stopped" / "skipped.jsonl").read_text() == (tmp_path / "whole" / "skipped.jsonl").read_text()
