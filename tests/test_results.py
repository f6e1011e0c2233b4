"""Result files: what they replace, and what becomes of a result that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from efficientvlm.checkpoints import files
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.report import pages as page
from efficientvlm.settings.stages import Bench, Report
from efficientvlm.stages import report
from efficientvlm.stages.results import ResultFile

INPUTS = {"models.0": "0" * 64}


def config(out: Path | str) -> Bench:
    return Bench(models=["m"], out=str(out))


def opened(out: Path | str, force: bool = False) -> ResultFile:
    return ResultFile.open(config(out), "bench", INPUTS, force=force)


def put(path: Path, kind: str, elsewhere: Path) -> None:
    if kind == "text":
        path.write_text("mine")
    elif kind == "link":
        elsewhere.write_text("mine")
        path.symlink_to(elsewhere)
    elif kind == "dangling":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")


@pytest.mark.parametrize("kind", ["text", "link", "dangling", "pipe", "folder", "device"])
def test_what_no_stage_wrote_stays(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    put(path, kind, elsewhere)
    before = os.lstat(path), sorted(tmp_path.iterdir())
    for force in (False, True):
        with pytest.raises(BadInput):
            opened(path, force)
        if kind != "text" or not force:
            with pytest.raises(BadInput):
                page.claim(str(path), force)
    assert (os.lstat(path), sorted(tmp_path.iterdir())) == before
    for name in (report.SUMMARY, report.TABLE, report.PICTURE, report.PAGE):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        put(out / name, kind, elsewhere)
        with pytest.raises(BadInput, match=f"no report wrote {name}|it is a"):
            report.claim(out)
        assert stat.S_IFMT(os.lstat(out / name).st_mode) == stat.S_IFMT(before[0].st_mode) and len(list(out.iterdir())) == 1


def test_a_folder_of_a_report_is_known_by_its_summary(tmp_path: Path) -> None:
    made = {"stage": "report", "provenance": {"models": {}, "code": {}, "created": ""}}
    for name in (report.SUMMARY, report.TABLE, report.PICTURE, report.PAGE):
        (tmp_path / name).write_text(json.dumps(made))
        assert report.claim(tmp_path) == tmp_path
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(BadInput, match="notes"):
        report.claim(tmp_path)
    with pytest.raises(BadInput, match="cannot be"):
        report.run(Report(models={"a": "bundled:easy-vqa"}, out=str(tmp_path / "notes" / "x")), Control(quiet=True))


def test_nothing_is_made_before_there_is_a_result(tmp_path: Path) -> None:
    file = opened(tmp_path / "new" / "deep" / "r.json")
    assert list(tmp_path.iterdir()) == []
    timed = {"model": "m", "sha256": "0" * 64, "trained": True}
    measured = {"timed": "what", "precision": "fp32", "text_length": 12, "machine": {"name": "m", "threads": 1}, "models": [timed]}
    written = file.write({**measured, "latency": []})
    left = tmp_path / "new" / "deep" / ".evlm-killed"  # by a process that ended right after it had written the result
    left.mkdir(0o700)
    (left / "record.json").write_text(json.dumps({"program": "efficientvlm", "user": os.geteuid(), "target": "r.json"}))
    again = opened(tmp_path / "new" / "deep" / "r.json")
    assert again.finished == written and [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only file system"), (errno.EACCES, "permission denied")]
)
def test_what_was_measured_is_printed_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, reason: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    early = opened(tmp_path / "r.json")
    monkeypatch.setattr(files, "write_new", refuse)
    with pytest.raises(BadInput, match=reason) as error:
        early.write({"rows": [1]})
    assert error.value.exit_code == 3 and json.loads(capsys.readouterr().out)["rows"] == [1]
    for claim in (
        lambda: opened(tmp_path / "r.json"),
        lambda: page.claim(str(tmp_path / "r.html"), False),
        lambda: report.claim(tmp_path / "o"),
    ):
        with pytest.raises(BadInput, match=reason):
            claim()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["~nobody-at-all/x.json", "x" * 300, "a\0b", "deep/" * 1000 + "x"])
def test_a_path_that_cannot_be_is_refused_before_anything_is_measured(out: str) -> None:
    with pytest.raises(BadInput, match="cannot be written"):
        opened(out)
    with pytest.raises(BadInput, match="cannot be written"):
        page.claim(out, False)
