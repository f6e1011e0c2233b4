"""Files that are not ours: what decides whose a folder is, what is never reached through a link, what is swept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import nested
from test_checkpoint import killed, litter, make, tree

from efficientvlm.checkpoints import scratch
from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.folder import MANIFEST, Output, fingerprint, require_complete
from efficientvlm.checkpoints.lineage import verify
from efficientvlm.errors import BadInput

CHANGES: list[dict[str, Any]] = [{}, {"force": True}, {"resume": False}, {"force": True, "resume": False}]


def everything(root: Path) -> dict[str, str]:
    """What lies where: files with their content, links with their target, folders, devices."""
    found = {}
    for path in sorted(root.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else "special"
        said = os.readlink(path) if kind == "link" else path.read_text() if kind == "file" else ""
        found[path.relative_to(root).as_posix()] = f"{kind} {said}"
    return found


def assert_refused(root: Path, out: Path, match: str | None = None, **options: Any) -> None:
    """Whatever is asked, the folder is refused and everything below `root` stays as it is."""
    before = everything(root)
    for change in CHANGES:
        with pytest.raises(BadInput, match=match if change.get("force") or not match else f"{match}|of other settings"):
            output = Output.open(out, **{"stage": "x", "inputs": {}, "config": {"lr": 9}, **options, **change})
            (output.staging / "model.safetensors").write_text("new")
            output.commit(output.manifest(family="xvlm"))
        assert everything(root) == before


@pytest.mark.parametrize(
    "there",
    [
        {"training_state/optimizer.pt": "mine", "README.md": "mine", "config.json": "mine", "metrics.jsonl": "mine"},
        {"training_state/lock": "mine"},
        {"training_state/lock": "", "notes": "mine"},
        {"training_state/lock": "", "training_state/notes": "mine"},
        {"training_state/request.json.new": "mine"},
        {"training_state/request.json": "{}", "training_state/state.pt": "mine"},
        {"training_state": "a file"},
        {".training_state.done": "mine"},
        {MANIFEST: "{}", "model.safetensors": "mine"},
        {f"{MANIFEST}/x": "mine"},
    ],
)
def test_no_name_makes_a_folder_ours(tmp_path: Path, there: dict[str, str]) -> None:
    for name, content in there.items():
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(content)
    assert_refused(tmp_path, tmp_path / "a")


def test_a_folder_killed_before_its_request_was_written_is_ours(tmp_path: Path) -> None:
    for number, there in enumerate(
        [{}, {"lock": ""}, {"lock": "efficientvlm process 1 on x"}, {"lock": "", "request.json.new": '{"program": "efficientvlm"'}]
    ):
        out = tmp_path / str(number)
        (out / "training_state").mkdir(parents=True)
        for name, content in there.items():
            (out / "training_state" / name).write_text(content)
        make(out)
        assert verify(out) == [] and litter(out) == []


def at_state(out: Path, other: Path) -> None:
    (out / "training_state").symlink_to(other)


def at_lock(out: Path, other: Path) -> None:
    (out / "training_state").mkdir()
    (out / "training_state" / "lock").symlink_to(other / "file")


@pytest.mark.parametrize("link", [at_state, at_lock])
def test_a_link_in_a_free_folder_is_not_followed(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    (tmp_path / "a").mkdir()
    link(tmp_path / "a", tmp_path / "other")
    assert_refused(tmp_path, tmp_path / "a")


@pytest.mark.parametrize(
    ("place", "unfinished"),
    [
        ("sub", False),
        ("metrics.jsonl", False),
        ("README.md", False),
        ("training_state", False),
        (".training_state.done", False),
        ("sub", True),
        ("metrics.jsonl", True),
        ("training_state/step-00000002", True),
        ("training_state/dense.safetensors", True),
        ("training_state/lock", True),
        ("training_state/request.json", True),
    ],
)
def test_nothing_is_reached_through_a_link(tmp_path: Path, place: str, unfinished: bool) -> None:
    """Neither by what an old manifest or a request lists, nor by the names that every stage uses."""
    out, other = tmp_path / "a", tmp_path / "other"
    other.mkdir()
    (other / "x").write_text("mine")
    if unfinished:
        output = killed(Output.open(out, stage="x", inputs={}, config={"lr": 9}))
        request = json.loads((output.state_dir / "request.json").read_text())
        (output.state_dir / "request.json").write_text(json.dumps(request | {"replaces": ["sub/x"]}))
        (out / place).unlink(missing_ok=True)
    else:
        make(out, names=("config.json", "sub/x"), config={"lr": 1})
        if (out / place).is_dir():
            (out / place / "x").unlink()
            (out / place).rmdir()
        (out / place).unlink(missing_ok=True)
    (out / place).symlink_to(other if "." not in place[1:] and "lock" not in place else other / "x")
    if not unfinished and place == "sub":
        assert_refused(tmp_path, out, "link|folder|damaged")
    else:
        assert_refused(tmp_path, out)


def test_inputs_inside_the_output_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "a" / "training_state" / "model")
    (tmp_path / "a" / "training_state" / "answers.txt").write_text("red")
    (tmp_path / "a" / "x.jsonl").write_text("{}")
    inside = str(tmp_path / "a" / "training_state" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "x.jsonl")
    assert_refused(tmp_path, tmp_path / "a", "lies in it", inputs={"model": inside})
    for key, value in {"answers": "training_state/answers.txt", "data": "x.jsonl", "val": "{0..9}.tar"}.items():
        assert_refused(tmp_path, tmp_path / "a", "lies in it", config={key: str(tmp_path / "a" / value)})
    assert_refused(tmp_path, tmp_path / "a", "lies in it", config={"data": str(tmp_path / "link")})
    for pattern in ("*.tar", "{000..003}.tar", "d?.jsonl", "[ab].parquet"):
        assert_refused(tmp_path, tmp_path / "a", "lies in it", config={"data": f"stream:{tmp_path / 'a' / pattern}"})


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    running = Output.open(tmp_path / "a", stage="x", inputs={}, config={})
    (running.staging / "model.safetensors").write_text("of a stage at work")
    for name in ("*", "?", "[ab]", "a**b", "a*"):
        make(tmp_path / name)
        assert verify(tmp_path / name) == []
    running.commit(running.manifest(family="xvlm"))
    assert verify(tmp_path / "a") == []


@pytest.mark.parametrize("made", ["nothing", "parents", "folder"])
def test_a_refused_command_leaves_everything_as_it_was(tmp_path: Path, made: str) -> None:
    out = tmp_path / "b" / "a"
    if made != "nothing":
        (tmp_path / "b").mkdir()
    if made == "folder":
        out.mkdir()
    before = everything(tmp_path)
    for ending in ("abandoned", "killed"):
        output = Output.open(out, stage="x", inputs={}, config={})
        (output.staging / "half").write_text("")
        if ending == "killed":
            killed(output)
            output = Output.open(out, stage="x", inputs={}, config={})
        output.abandon()
        if ending == "abandoned":
            assert everything(tmp_path) == before
        assert out.exists() == (made == "folder")


def test_force_replaces_what_the_manifest_lists_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "a", config={"lr": 1})
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / ".notes.tmp-1").write_text("mine")
    make(tmp_path / "a", "new", config={"lr": 2}, force=True)
    assert tree(tmp_path / "a")["notes.txt"] == tree(tmp_path / "a")[".notes.tmp-1"] == "mine"
    for name in ("gates.safetensors", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "a" / name).write_text("mine")
        assert_refused(tmp_path, tmp_path / "a", f"no stage wrote: {name}")
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "training_state").mkdir()
    (tmp_path / "a" / "training_state" / "diary").write_text("mine")
    assert Output.open(tmp_path / "a", stage="init", inputs={}, config={"lr": 2}).up_to_date
    before = everything(tmp_path)
    with pytest.raises(BadInput, match="holds what no stage wrote"):
        Output.open(tmp_path / "a", stage="init", inputs={}, config={"lr": 3}, force=True)
    assert everything(tmp_path) == before


def test_a_target_that_cannot_be_replaced_is_found_before_the_old_checkpoint_is_touched(tmp_path: Path) -> None:
    make(tmp_path / "a", config={"lr": 1})
    for name in ("skipped.jsonl", "sub"):
        output = Output.open(tmp_path / "a", stage="init", inputs={}, config={"lr": 2}, force=True)
        (tmp_path / "a" / name).write_text("put there while it ran")
        staged = output.staging / ("sub/x" if name == "sub" else name)
        staged.parent.mkdir(exist_ok=True)
        staged.write_text("new")
        with pytest.raises(BadInput, match=r"files of others|cannot be written"):
            output.commit(output.manifest(family="xvlm"))
        output.abandon()
        assert require_complete(tmp_path / "a").config == {"lr": 1} and verify(tmp_path / "a") == []
        assert (tmp_path / "a" / name).read_text() == "put there while it ran"
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "README.md").unlink()
    (tmp_path / "a" / "README.md").mkdir()
    assert_refused(tmp_path, tmp_path / "a", "README.md in it is a folder")


def test_folders_nested_deeply_are_refused_where_folders_are_ours(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with nested(tmp_path / "a"):
        assert "nested more than 100 deep" in verify(tmp_path / "a")[0]
    with nested(tmp_path / "read"), pytest.raises(BadInput, match="nested more than 100 deep"):
        fingerprint(tmp_path / "read")
    output = Output.open(tmp_path / "b", stage="init", inputs={}, config={})
    (output.state_dir / "step-1").mkdir()
    (output.state_dir / "step-1" / "state.json").write_text("{}")
    output.abandon()
    with nested(output.state_dir / "step-1"), pytest.raises(BadInput, match="nested more than 100 deep"):
        Output.open(tmp_path / "b", stage="init", inputs={}, config={})


def test_a_model_card_that_a_person_changed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", config={"lr": 0})
    for number, name in ((1, "README.md.old"), (2, "README.md.old-2")):
        make(tmp_path / "a", config={"lr": number, "as it is": True}, force=True)
        assert "kept" not in capsys.readouterr().err, "one that nobody changed is replaced"
        (tmp_path / "a" / "README.md").write_text(f"words {number}")
        assert require_complete(tmp_path / "a"), "no model depends on it"
        assert [problem for problem in verify(tmp_path / "a") if "README.md has changed" in problem]
        make(tmp_path / "a", config={"lr": number}, force=True)
        assert f"it is kept as {name}" in capsys.readouterr().err
        assert (tmp_path / "a" / name).read_text() == f"words {number}" and verify(tmp_path / "a") == []
    (tmp_path / "a" / "README.md").unlink()
    assert verify(tmp_path / "a") == [f"{tmp_path / 'a' / 'README.md'} is missing"]


@pytest.mark.parametrize(("name", "value"), [("data", "d\udcff.jsonl"), ("temperature", float("inf"))])
def test_what_no_manifest_can_hold_is_refused_before_anything_is_done(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=name):
        Output.open(tmp_path / "a", stage="x", inputs={}, config={name: value})
    with pytest.raises(BadInput, match="not UTF-8"):
        Output.open(tmp_path / "caf\udce9", stage="x", inputs={}, config={})
    assert list(tmp_path.iterdir()) == []


def test_a_private_folder_is_ours_where_the_file_system_knows_no_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.mkdtemp

    def open_to_all(**place: Any) -> str:
        folder = made(**place)
        os.chmod(folder, 0o777)
        return folder

    monkeypatch.setattr("efficientvlm.checkpoints.scratch.tempfile.mkdtemp", open_to_all)
    write_atomic(tmp_path / "result.json", b"new")
    assert (tmp_path / "result.json").read_bytes() == b"new" and litter(tmp_path) == []
    monkeypatch.setattr(scratch, "_lock", lambda *_, **__: None)
    with pytest.raises(OSError, match="a private folder cannot be kept"):
        write_atomic(tmp_path / "other.json", b"new")
    assert litter(tmp_path) == []


def test_private_folders_of_the_dead_are_swept_and_no_others(tmp_path: Path) -> None:
    for instant in ("made", "recorded", "written", "removed"):
        child = os.fork()
        if not child:
            die: Callable[..., None] = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            if instant in ("made", "recorded"):
                setattr(scratch, {"made": "_lock", "recorded": "json"}[instant], type("Dead", (), {"__call__": die, "__getattr__": die})())
            else:
                os.rename = os.replace = die  # type: ignore[assignment]
            if instant == "removed":
                os.replace, Path.rmdir = (lambda *_: None), die  # type: ignore[assignment, method-assign]
            with contextlib.suppress(BaseException):
                write_atomic(tmp_path / "result.json", b"new")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert len(litter(tmp_path)) == 1, instant
        write_atomic(tmp_path / "result.json", b"new")
        assert litter(tmp_path) == [], instant
    alive = os.fork()
    if not alive:
        with scratch.private_folder(tmp_path, tmp_path / "result.json"):
            (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    for name, mode, record in (
        ("no-record", 0o700, None),
        ("other", 0o700, {"program": "other", "user": os.geteuid(), "target": "x"}),
        ("open", 0o755, {"program": "efficientvlm", "user": os.geteuid(), "target": "x"}),
        ("user", 0o700, {"program": "efficientvlm", "user": os.geteuid() + 1, "target": "x"}),
    ):
        folder = tmp_path / f".evlm-{name}"
        folder.mkdir(mode=mode)
        (folder / "notes").write_text("mine")
        if record:
            (folder / "record.json").write_text(json.dumps(record))
    (tmp_path / ".evlm-link").symlink_to(tmp_path / ".evlm-no-record")
    before = everything(tmp_path)
    write_atomic(tmp_path / "result.json", b"new")
    assert everything(tmp_path) == before
    (folder,) = [path for path in tmp_path.glob(".evlm-*/record.json") if json.loads(path.read_text()).get("process") == alive]
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    os.kill(alive, signal.SIGKILL)
    os.waitpid(alive, 0)
    write_atomic(tmp_path / "result.json", b"new")
    assert not folder.exists()
