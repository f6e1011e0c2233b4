"""Every form a user's data can have, read to the same samples; hub and shards without a network."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data_files import jsonl, pictures, png

from efficientvlm.data import hub
from efficientvlm.data.forms import braces
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.opening import check_spec, open_data, open_texts, texts
from efficientvlm.data.tar import LARGEST_TEXT
from efficientvlm.errors import BadInput


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


QUESTION_ROWS = [
    {"image": "img/0.png", "question": 'what, "then"?\nsecond line', "answer": ["a", "a", "b"], "weight": 0.5},
    {"image": "img/0.png", "question": "größe?", "answer": "x", "weight": None},
    {"image": "img/1.png", "question": "and?", "answer": "2", "weight": None},
]
CAPTIONS = [
    {"image": "img/0.png", "caption": ["one", "two"], "regions": [{"caption": "r", "bb": [0, 0, 10, 5]}]},
    {"image": "img/1.png", "caption": "three", "regions": None},
]


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()})
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())


def as_tsv(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ["\t".join(rows[0])]
    for row in rows:
        texts_ = [json.dumps(value) if isinstance(value, list) else str("" if value is None else value) for value in row.values()]
        lines.append("\t".join(text.replace("\n", " ") for text in texts_))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    held = [{**row, "image": (path.parent / row["image"]).read_bytes()} for row in rows]
    lists = {name for row in rows for name, value in row.items() if name == "answer" and isinstance(value, list)}
    held = [{name: [value] if name in lists and isinstance(value, str) else value for name, value in row.items()} for row in held]
    caption = [name for name in held[0] if name == "caption"]
    held = [{name: [value] if name in caption and isinstance(value, str) else value for name, value in row.items()} for row in held]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), path)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def as_tar(path: Path, rows: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            add(archive, f"./{number:03}.png", (path.parent / row["image"]).read_bytes())
            add(archive, f"./{number:03}.json", json.dumps({name: value for name, value in row.items() if name != "image"}).encode())


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    ".jsonl": jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".tsv": as_tsv,
    ".parquet": as_parquet,
    ".tar": as_tar,
}


def written(folder: Path, suffix: str, rows: list[dict[str, Any]], name: str = "data") -> str:
    pictures(folder, 2)
    WRITERS[suffix](folder / f"{name}{suffix}", rows)
    return str(folder / f"{name}{suffix}")


@pytest.mark.parametrize("suffix", WRITERS)
def test_questions_of_every_form_are_the_same(tmp_path: Path, suffix: str) -> None:
    source = open_data(QUESTIONS, written(tmp_path, suffix, QUESTION_ROWS), "test", image_size=8)
    assert len(source) == 2
    first, second = source[0], source[1]
    assert [q.text for q in first.questions] == ['what, "then"?\nsecond line'.replace("\n", " " if suffix == ".tsv" else "\n"), "größe?"]
    assert dict(first.questions[0].answers) == pytest.approx({"a": 1 / 3, "b": 1 / 6}) and first.questions[0].annotators == 3
    assert [q.answers for q in (first.questions[1], second.questions[0])] == [[("x", 1.0)], [("2", 1.0)]]
    assert np.array_equal(second.image, open_image(png(1), 8))
    assert open_data(QUESTIONS, written(tmp_path, suffix, QUESTION_ROWS), "test").fingerprint == source.fingerprint


@pytest.mark.parametrize("suffix", WRITERS)
def test_pairs_of_every_form_are_the_same(tmp_path: Path, suffix: str) -> None:
    source = open_data(PAIRS, written(tmp_path, suffix, CAPTIONS), "test", image_size=8)
    assert [source[i].captions for i in range(2)] == [["one", "two"], ["three"]] and len(source) == 2
    assert [(r.phrase, r.box) for r in source[0].regions] == [("r", (0.25, 0.25, 0.5, 0.5))] and source[1].regions == []
    assert np.array_equal(source[1].image, open_image(png(1), 8))
    assert list(texts(source)) == ["one", "two", "r", "three"]


def test_csv_holds_long_base64_and_reads_it_again(tmp_path: Path) -> None:
    import base64

    rows = [{"image": base64.b64encode(png(seed, (40, 40))).decode(), "caption": f"c {seed}\nd"} for seed in range(3)]
    as_csv(tmp_path / "p.csv", rows)
    source = open_data(PAIRS, str(tmp_path / "p.csv"), "test")
    assert len(rows[0]["image"]) > 1000 and np.array_equal(source[2].image, open_image(png(2, (40, 40))))


def test_image_folder_with_captions_beside(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    for index in range(3):
        (tmp_path / "img" / f"{index}.txt").write_text(f"first {index}\n\nsecond\n", encoding="utf-8")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)  # a loop, if it were followed
    source = open_data(PAIRS, str(tmp_path), "test")
    assert [source[i].captions for i in range(3)] == [[f"first {i}", "second"] for i in range(3)] and source[0].id == "img/0.png"
    with (tmp_path / "img" / "1.txt").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)
    with pytest.raises(BadInput, match=r"img/1\.png: its \.txt has 10,000,001 bytes, at most 10,000,000 are read"):
        open_data(PAIRS, str(tmp_path), "test")
    (tmp_path / "img" / "1.txt").unlink()
    with pytest.raises(BadInput, match=r"img/1\.png: there is no 1\.txt beside it"):
        open_data(PAIRS, str(tmp_path), "test")
    assert len(open_data(PAIRS, str(tmp_path), "test", max_bad=1)) == 2


def test_image_folder_of_classes_and_splits(tmp_path: Path) -> None:
    for split, kind, seed in (("train", "fire_truck", 0), ("train", "cat", 1), ("validation", "cat", 2)):
        (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / split / kind / "1.PNG").write_bytes(png(seed))
    train, val = (open_data(PAIRS, str(tmp_path), split) for split in ("train", "val"))
    assert sorted(train[i].captions[0] for i in range(len(train))) == ["cat", "fire truck"]
    assert len(val) == 1 and np.array_equal(val[0].image, open_image(png(2)))
    with pytest.raises(BadInput, match="no column for question and answer: columns found: image, caption"):
        open_data(QUESTIONS, str(tmp_path), "train")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_image_folder_with_metadata(tmp_path: Path, suffix: str) -> None:
    rows = [{"file_name": row["image"], **{k: v for k, v in row.items() if k != "image"}} for row in QUESTION_ROWS]
    written(tmp_path, suffix, rows, "metadata")
    assert [q.text for q in open_data(QUESTIONS, str(tmp_path), "test")[1].questions] == ["and?"]
    written(tmp_path, suffix, [{"file_name": "img/1.png", "text": "said"}], "metadata")
    assert open_data(PAIRS, str(tmp_path), "test")[0].captions == ["said"]


def test_a_folder_of_mixed_forms_and_one_whose_table_has_another_name(tmp_path: Path) -> None:
    written(tmp_path / "mine", ".csv", CAPTIONS[:1], "train")
    written(tmp_path / "mine", ".tar", CAPTIONS[1:], "test-000")
    for split, said in (("train", [["one", "two"]]), ("test", [["three"]])):
        source = open_data(PAIRS, str(tmp_path / "mine"), split, val_fraction=0)
        assert [source[i].captions for i in range(len(source))] == said
    written(tmp_path / "other", ".jsonl", CAPTIONS, "captions")
    assert open_data(PAIRS, str(tmp_path / "other"), "test")[0].captions == ["one", "two"], "the only table, whatever it is called"
    written(tmp_path / "other", ".csv", CAPTIONS, "others")
    with pytest.raises(BadInput, match=r"cannot use captions\.jsonl, others\.csv as one split"):
        open_data(PAIRS, str(tmp_path / "other"), "train")
    (tmp_path / "said.txt").write_text("a red circle\n", "utf-8")
    with pytest.raises(BadInput, match=r"said\.txt: a file that ends in \.txt is no table") as caught:
        open_data(PAIRS, str(tmp_path / "said.txt"), "train")
    assert "plain text is read where only sentences" in caught.value.fix


def vqav2(folder: Path, *, answers: Callable[[int], list[str]] = lambda q: ["yes"] * 7 + ["no"] * 3) -> Path:
    for part, count in (("train2014", 3), ("val2014", 1)):
        (folder / part).mkdir(parents=True)
        asked, given = [], []
        for image in range(1, count + 1):
            (folder / part / f"COCO_{part}_{image:012}.jpg").write_bytes(png(image))
            for number in range(2):
                identity = image * 1000 + number
                asked.append({"image_id": image, "question": f"is it {number}?", "question_id": identity})
                ten = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers(number), 1)]
                given.append({"question_id": identity, "image_id": image, "multiple_choice_answer": "yes", "answers": ten})
        heads = {"info": {}, "data_type": "mscoco", "data_subtype": part, "license": {}}
        (folder / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({**heads, "questions": asked}))
        (folder / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({**heads, "annotations": given}))
    return folder


def test_two_splits_for_one_part_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "dev", "test"):
        as_jsonl = "".join(json.dumps({"image": path, "caption": name}) + "\n" for path in pictures(tmp_path, 2))
        (tmp_path / f"{name}.jsonl").write_text(as_jsonl)
    with pytest.raises(BadInput, match=r"2 splits for val: it has dev\.jsonl, val\.jsonl"):
        open_data(PAIRS, str(tmp_path), "val")
    assert open_data(PAIRS, str(tmp_path), "test")[0].captions == ["test"]
    (tmp_path / "val.jsonl").unlink()
    assert open_data(PAIRS, str(tmp_path), "val")[0].captions == ["dev"]


def test_the_layout_of_vqav2(tmp_path: Path) -> None:
    folder = vqav2(tmp_path / "vqa")
    train, val = (open_data(QUESTIONS, str(folder), split, image_size=8) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1) and np.array_equal(train[1].image, open_image(png(2), 8))
    question = train[0].questions[1]
    assert question.text == "is it 1?" and question.annotators == 10
    assert [a for a, _ in question.answers] == ["yes", "no"] and [w for _, w in question.answers] == pytest.approx([0.7, 0.3])
    (folder / "v2_OpenEnded_mscoco_test2015_questions.json").write_text('{"questions": []}')
    with pytest.raises(BadInput, match="no annotations"):
        open_data(QUESTIONS, str(folder), "test")
    (folder / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}')
    with pytest.raises(BadInput, match="question_id 1000 has no annotation"):
        open_data(QUESTIONS, str(folder), "val")


def shards(folder: Path, count: int = 4, each: int = 3) -> str:
    folder.mkdir()
    for shard in range(count):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for sample in range(each):
                add(archive, f"{shard}{sample}.png", png(shard * each + sample))
                add(archive, f"{shard}{sample}.txt", f"picture {shard * each + sample}".encode())
    return str(folder)


def test_tar_shards_as_pattern_folder_and_file(tmp_path: Path) -> None:
    folder = shards(tmp_path / "shards")
    for spec, count in ((folder, 12), (f"{folder}/{{001..003}}.tar", 9), (f"{folder}/{{000,002}}.tar", 6), (f"{folder}/*3.tar", 3)):
        source = open_data(PAIRS, spec, "test", image_size=8)
        assert len(source) == count
    assert source[2].captions == ["picture 11"] and np.array_equal(source[2].image, open_image(png(11), 8))
    with pytest.raises(BadInput, match=r"there is no file .*004\.tar"):
        open_data(PAIRS, f"{folder}/{{000..004}}.tar", "test")
    assert len(open_data(PAIRS, folder, "train")) + len(open_data(PAIRS, folder, "val")) == 12


@pytest.mark.parametrize("suffix", [".parquet", ".tar", ".jsonl"])
def test_a_file_of_the_same_size_and_time_is_read_anew(tmp_path: Path, suffix: str) -> None:
    seen = []
    for word in ("old", "new"):
        spec = written(tmp_path, suffix, [{"image": "img/0.png", "caption": word}])
        os.utime(spec, (1_700_000_000, 1_700_000_000))
        source = open_data(PAIRS, spec, "test")
        seen.append((source[0].captions, source.fingerprint))
    assert seen[0][0] == ["old"] and seen[1][0] == ["new"] and seen[0][1] != seen[1][1]


def test_a_compressed_shard_says_to_unpack_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        add(archive, "a.png", png(0))
    with pytest.raises(BadInput) as caught:
        open_data(PAIRS, str(tmp_path / "a.tar"), "test")
    assert "unpack" in caught.value.fix


def test_braces_are_those_of_a_shell() -> None:
    assert list(braces("a{08..11}b")) == ["a08b", "a09b", "a10b", "a11b"]
    assert list(braces("{a,b}-{0..1}")) == ["a-0", "a-1", "b-0", "b-1"] and list(braces("plain")) == ["plain"]
    with pytest.raises(BadInput, match="counts to more"):
        list(braces("{0..999999999}"))


def test_a_name_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "g[1]{a,b}*"
    folder.mkdir()
    for name in ("c[2].tar", "d.tar"):
        with tarfile.open(folder / name, "w") as archive:
            add(archive, f"{name[0]}.png", png(len(name)))
            add(archive, f"{name[0]}.txt", name.encode())
    written(folder, ".parquet", CAPTIONS, "p[3]")

    def captions(pattern: str) -> list[str]:
        source = open_data(PAIRS, f"{folder}/{pattern}", "test")
        return sorted(source[index].captions[0] for index in range(len(source)))

    for pattern in ("{c[2],d}.tar", "*.tar", "[cd]*.tar"):
        assert captions(pattern) == ["c[2].tar", "d.tar"]
    assert captions("p[3].parquet") == captions("*.parquet") == ["one", "three"]
    with pytest.raises(BadInput, match="there is no such file or folder"):
        captions("e.tar")


class Hub:
    """Stands in for the hub: what `datasets` would load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        rows = [{"image": {"bytes": png(seed), "path": None}, "caption": f"c{seed}"} for seed in range(30)]
        self.data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, configuration: ["train", "validation"])
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, configuration) == ("owner/name", "small")
        part = self.data.select(range(20) if split == "train" else range(20, 30))
        return part.to_iterable_dataset() if streaming else part


def test_data_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch)
    train, val = (open_data(PAIRS, "hub:owner/name:small", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 10) and val[0].captions == ["c20"] and np.array_equal(train[3].image, open_image(png(3)))
    with pytest.raises(BadInput, match="no split test"):
        open_data(PAIRS, "hub:owner/name:small", "test")
    stream = open_data(PAIRS, "stream:hub:owner/name:small", "train", shuffle_buffer=1)
    assert [stream[i].captions for i in range(3)] == [["c0"], ["c1"], ["c2"]]


def test_the_hub_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for spec in ("hub:owner/name", "stream:hub:owner/name"):
        with pytest.raises(BadInput, match="ConnectionError: Couldn't reach") as caught:
            open_data(QUESTIONS, spec, "train")
        assert "local copy" in caught.value.fix
    with pytest.raises(BadInput, match="no name of the hub"):
        open_data(QUESTIONS, "hub:a/b/c", "train")
    with pytest.raises(BadInput, match="data of the hub is given as hub:owner/name"):
        check_spec("owner/name")


def test_texts_for_a_tokenizer_come_from_any_form(tmp_path: Path) -> None:
    assert "größe?" in set(texts(open_texts(written(tmp_path, ".csv", QUESTION_ROWS))))
    assert set(texts(open_texts(written(tmp_path, ".tar", CAPTIONS)))) == {"one", "two", "three", "r"}
    for kind in ("boat", "car"):
        (tmp_path / "f" / kind).mkdir(parents=True)
        (tmp_path / "f" / kind / "1.png").write_bytes(png(0))
    assert set(texts(open_texts(str(tmp_path / "f")))) == {"boat", "car"}
    bad = jsonl(tmp_path / "bad.jsonl", [{"image": "img/0.png", "caption": ""}])
    with pytest.raises(BadInput, match="its caption is no text"):
        open_texts(bad)
    asked = jsonl(tmp_path / "asked.jsonl", [{"image": "img/0.png", "question": "", "answer": "a"}])
    with pytest.raises(BadInput, match="its question is no text"):
        open_texts(asked)


@pytest.mark.parametrize(
    ("content", "name", "why"),
    [
        ("image,question,answer\nx.png,what,red\n".encode("utf-16"), "a.csv", "it is UTF-16 text"),
        ("image,question,answer\nx.png,what,red\n".encode("utf-16-le"), "a.csv", "it is UTF-16 text"),
        (b"image;question;answer\nx.png;what;red\n", "a.csv", "separated by semicolons, commas are read"),
        (b"image,question,answer\nx.png,what,red\n", "a.tsv", "separated by commas, tabs are read"),
        (b"", "a.tar.gz", "compressed tar"),
        (b"no parquet", "a.parquet", "cannot be read as parquet"),
    ],
)
def test_files_of_a_neighbouring_form_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, name: str, why: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=why) as caught:
        open_data(QUESTIONS, str(tmp_path / name), "test")
    assert caught.value.fix and capfd.readouterr() == ("", "")


def test_the_hub_is_asked_twice_and_not_for_half_a_minute() -> None:
    from huggingface_hub.utils import http_backoff

    before = dict(http_backoff.__kwdefaults__)
    with hub._few_attempts():
        assert http_backoff.__kwdefaults__["max_retries"] == 1 < before["max_retries"]
    assert http_backoff.__kwdefaults__ == before
