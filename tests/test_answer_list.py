"""The file of a closed list of answers."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from efficientvlm.data.answer_list import as_input, read_answers
from efficientvlm.data.kinds.pairs import places_of
from efficientvlm.data.kinds.questions import question_of
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.planning.checks import path_problems
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings


def test_lines_are_answers_once_each_without_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red\n\n blue \nred\n", encoding="utf-8-sig")
    assert read_answers(tmp_path / "a.txt") == ["red", "blue"]
    (tmp_path / "b.txt").write_bytes("one\u2028two\r\nthr\x85ee\x1c!\rfour".encode())
    assert read_answers(tmp_path / "b.txt") == ["one\u2028two", "thr\x85ee\x1c!", "four"]
    assert as_input(str(tmp_path / "a.txt")) == str(tmp_path / "a.txt") and as_input(None) is None


def test_what_is_no_list_of_answers_is_refused_before_anything_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_bytes(b"\n \n")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "giant.txt").open("wb") as file:
        file.truncate(200_000_000_000)
    os.mkfifo(tmp_path / "pipe")
    given = [
        "latin.txt",
        "empty.txt",
        "folder",
        "giant.txt",
        "pipe",
        "/dev/zero",
        "/proc/self/mem",
        "nothing.txt",
        "~nobody-here/x",
        "..",
        "~",
    ]
    for name in given:
        step = Step("eval", "eval", stage_settings("eval", {"model": "bundled:easy-vqa", "data": "shapes:size=20", "answers": name}))
        (error,) = path_problems(step, set())
        assert isinstance(error, BadInput), name


def test_a_pipe_is_read_once_and_known_by_what_was_in_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("red\nblue\n"))
    writer.start()
    while (given := as_input_or_none(tmp_path / "pipe")) is None:
        pass
    writer.join()
    assert given.startswith("sha256:") and given == as_input(str(tmp_path / "pipe"))
    assert read_answers(tmp_path / "pipe") == ["red", "blue"] == read_answers(tmp_path / "pipe")


def as_input_or_none(path: Path) -> str | None:
    """None as long as the writer has not opened the pipe yet."""
    try:
        return as_input(str(path))
    except BadInput:
        return None


def test_texts_are_bounded_before_a_tokenizer_sees_them(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("red\n" + "x" * 100_001)
    with pytest.raises(BadInput, match=r"line 2 has 100,001 characters"):
        read_answers(tmp_path / "long.txt")
    columns = {"question": "question", "answer": "answer"}
    for row, words in (
        ({"question": "q", "answer": [f"a{n}" for n in range(20_000)]}, "lists 20,000"),
        ({"question": "x" * 10**8, "answer": "a"}, "100,000,000 characters"),
        ({"question": "q", "answer": "x" * 100_001}, "100,001 characters"),
        ({"question": "q", "answer": [f"{n}" + "x" * 99_000 for n in range(20)]}, "characters in all"),
    ):
        with pytest.raises(BadInput, match=words):
            question_of(row, "row 1", columns)
    for caption in ("x" * 100_001, ["x" * 99_000] * 20):
        with pytest.raises(BadInput, match="its regions has"):
            places_of({"regions": [{"caption": caption, "bb": [0, 0, 1, 1]}]}, "row 1")
    assert places_of({"regions": []}, "row 1") == []


def test_a_tokenizer_reads_a_part_at_a_time_and_nothing_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(train_wordpiece(["red blue"], 60))
    given = [f"red {'blue ' * n}" for n in range(60)]
    whole = texts.ids(given)
    sizes: list[int] = []
    read = texts.tokenizer

    def watched(some: list[str], **options: object) -> object:
        sizes.append(sum(map(len, some)))
        return read(some, **options)

    monkeypatch.setattr("efficientvlm.data.texts.AT_A_TIME", 1000)
    again = Texts(read)
    again.tokenizer = watched
    assert again.ids(given) == whole and again.read == texts.read and len(sizes) > 5 and max(sizes) <= 1000
    for text in ("x" * 100_001, "y" * 10**8):
        with pytest.raises(BadInput, match="is too long") as caught:
            again.ids(["red", text])
        assert len(str(caught.value)) < 300
