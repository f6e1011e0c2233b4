"""Checkpoint folders: atomic, idempotent, verifiable. No weights are needed: the files are a few bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from efficientvlm.checkpoints import files, lock
from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints.files import resolve, write_atomic
from efficientvlm.checkpoints.folder import MANIFEST, Output, require_complete
from efficientvlm.checkpoints.lineage import lineage, verify
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.checkpoints.request import compare
from efficientvlm.errors import BadInput
from efficientvlm.settings.compose import stage_settings


def make(
    path: Path, content: str = "weights", stage: str = "init", names: tuple[str, ...] = ("config.json", "model.safetensors"), **options: Any
) -> Manifest:
    """Write a small checkpoint; options are those of Output.open."""
    fields = {key: options.pop(key) for key in ("origin", "data", "metrics", "accounting") if key in options}
    output = Output.open(path, stage=stage, **{"inputs": {}, "config": {"seed": 1, "out": str(path)}, **options})
    assert not output.up_to_date
    for name in names:
        (output.staging / name).parent.mkdir(exist_ok=True)
        (output.staging / name).write_text(f"{content} {name}")
    output.metrics.write_text('{"step": 1}\n')
    return output.commit(output.manifest(family="xvlm", **fields))


def tree(path: Path) -> dict[str, str]:
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


def litter(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.rglob(".*"))


def killed(output: Output) -> Output:
    """What the kernel does when a process dies: its locks are free, the lock file stays."""
    if output._lock._file:
        output._lock._file.close()
        output._lock._file = None
    return output


class Crash(BaseException):
    """Stands for kill -9: nothing may catch it."""


def test_commit_leaves_a_complete_folder(tmp_path: Path) -> None:
    manifest = make(tmp_path / "a", origin="random", names=("config.json", "model.safetensors", "sub/x.txt"))
    assert set(tree(tmp_path / "a")) == {"README.md", MANIFEST, "config.json", "model.safetensors", "metrics.jsonl", "sub/x.txt"}
    assert set(manifest.files) == {"README.md", "config.json", "model.safetensors", "metrics.jsonl", "sub/x.txt"}
    assert require_complete(tmp_path / "a") == manifest
    assert verify(tmp_path / "a") == [] and litter(tmp_path) == []
    mask = os.umask(0o027)
    try:
        output = Output.open(tmp_path / "b", stage="init", inputs={}, config={})
        (output.staging / "model.safetensors").touch(0o600)
        output.commit(output.manifest(family="xvlm"))
    finally:
        os.umask(mask)
    assert (tmp_path / "b" / "model.safetensors").stat().st_mode & 0o777 == 0o640, "readable as the user's umask says"
    assert manifest.seed == 1 and manifest.environment["python"] and manifest.code.version


def test_same_run_is_up_to_date_and_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "parent", origin="random")
    make(tmp_path / "a", inputs={"model": str(tmp_path / "parent")}, config={"lr": 0.1, "model": "one spelling", "out": "a"})
    before = tree(tmp_path)
    output = Output.open(
        tmp_path / "a", stage="init", inputs={"model": f"{tmp_path}/./parent"}, config={"lr": 0.1, "model": "another", "out": "b"}
    )
    assert output.up_to_date
    output.abandon()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"config": {"lr": 0.2}}, "lr: 0.1 there, 0.2 now"),
        ({"config": {"lr": 0.1, "new": None, "epochs": 2}}, "epochs: null there, 2 now"),
        ({"stage": "shrink"}, "stage: init there, shrink now"),
        ({"inputs": {"data": "sha256:" + "1" * 64}}, "input data differs"),
    ],
)
def test_a_different_run_is_refused_unless_forced(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    request = {"stage": "init", "inputs": {"data": "sha256:" + "0" * 64}, "config": {"lr": 0.1}}
    make(tmp_path / "a", **request)
    before = tree(tmp_path)
    with pytest.raises(BadInput, match="finished checkpoint") as error:
        Output.open(tmp_path / "a", **{**request, **change})
    assert reason in error.value.why and "--force" in error.value.fix
    assert tree(tmp_path) == before
    make(tmp_path / "a", "new", names=("config.json",), **{**request, **change}, force=True)
    assert set(tree(tmp_path / "a")) == {"README.md", MANIFEST, "config.json", "metrics.jsonl"}, "stale files must go"
    assert verify(tmp_path / "a") == []


def test_a_setting_that_was_not_known_then_stood_at_its_default() -> None:
    values = {"model": "a", "data": "easy-vqa", "out": "b", "task": "nlvr2", "teacher": "t"}
    wanted = {"stage": "finetune", "inputs": {}, "config": stage_settings("finetune", values).model_dump(mode="json")}
    older = {**wanted, "config": {name: value for name, value in wanted["config"].items() if name not in ("crop_scale", "weights")}}
    assert compare(wanted, older) == []
    for change in ({"crop_scale": [0.5, 1.0]}, {"weights": {**wanted["config"]["weights"], "logits": 2.0}}):
        (told,) = compare({**wanted, "config": wanted["config"] | change}, older)
        assert told.startswith(next(iter(change)))
    (told,) = compare(wanted, {**older, "config": {name: value for name, value in older["config"].items() if name != "model"}})
    assert told.startswith("model: null there")


def test_the_old_checkpoint_stays_complete_while_it_is_being_replaced(tmp_path: Path) -> None:
    make(tmp_path / "a", config={"lr": 1})
    before = {name: text for name, text in tree(tmp_path / "a").items()}
    output = Output.open(tmp_path / "a", stage="init", inputs={}, config={"lr": 2}, force=True)
    output.metrics.write_text("new run\n")
    (output.staging / "config.json").write_text("new")
    assert verify(tmp_path / "a") == []
    output.abandon()
    assert tree(tmp_path / "a") == before and litter(tmp_path) == []


def test_foreign_and_unusable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    make(tmp_path / "a")
    cases = [
        ("notes", "not empty"),
        ("file", "it is a file"),
        ("file/x", "cannot be"),
        ("a", "it is the model"),
        ("a/b", "it is the model"),
    ]
    for out, reason in cases:
        with pytest.raises(BadInput, match=reason):
            Output.open(tmp_path / out, stage="x", inputs={"model": str(tmp_path / "a")}, config={}, force=True)
    with pytest.raises(BadInput, match="installed package"):
        Output.open(files.BUNDLED / "x", stage="x", inputs={}, config={}, force=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


def test_unfinished_state_is_resumed_refused_or_discarded(tmp_path: Path) -> None:
    out = tmp_path / "a"
    first = Output.open(out, stage="prune", inputs={}, config={"lr": 1})
    assert not first.resumable
    (first.state_dir / "step-5").mkdir()
    (first.state_dir / "step-5" / "model.safetensors").write_text("state")
    half = first.state_dir / ".step-00000007.tmp"  # left by a kill between writing a state and giving it its name
    half.mkdir()
    (half / "state.json").write_text("{}")
    assert not first.resumable, "a state is complete when its state.json is there"
    (first.state_dir / "step-5" / "state.json").write_text("{}")
    first.metrics.write_text("5\n")
    first.abandon()
    assert first.resumable, "a saved state survives"
    with pytest.raises(BadInput, match="not finished"):
        require_complete(out)
    with pytest.raises(BadInput, match="unfinished stage of other settings: lr: 1 there, 2 now"):
        Output.open(out, stage="prune", inputs={}, config={"lr": 2})
    again = Output.open(out, stage="prune", inputs={}, config={"lr": 1})
    assert again.resumable and again.metrics.read_text() == "5\n"
    killed(again)
    other = Output.open(out, stage="prune", inputs={}, config={"lr": 2}, force=True)
    assert not other.resumable and not other.metrics.exists()
    (other.state_dir / "s.json").write_text("{}")
    killed(other)
    assert not killed(Output.open(out, stage="prune", inputs={}, config={"lr": 2}, resume=False)).resumable
    Output.open(out, stage="prune", inputs={}, config={"lr": 2}).abandon()
    assert not out.exists()


def test_a_damaged_request_is_no_sign_that_the_folder_is_ours(tmp_path: Path) -> None:
    out = tmp_path / "a"
    output = killed(Output.open(out, stage="prune", inputs={}, config={}))
    (output.state_dir / "state.json").write_text("x")
    good = json.loads((output.state_dir / "request.json").read_text())
    for content in (
        b"\xff\xfe",
        b"{",
        b"[]",
        b'{"stage": 1}',
        b"[" * 100_000,
        *(json.dumps(good | {"replaces": [name]}).encode() for name in ("../../x", 7, "training_state", "training_state/lock", MANIFEST)),
        json.dumps(good | {"inputs": {"model": None}}).encode(),
    ):
        (output.state_dir / "request.json").write_bytes(content)
        for options in ({}, {"resume": False}, {"force": True}):
            with pytest.raises(BadInput, match="cannot be resumed") as error:
                Output.open(out, stage="prune", inputs={}, config={}, **options)
            assert "remove" in error.value.fix
    assert (output.state_dir / "state.json").read_text() == "x"


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "replacing"])
@pytest.mark.parametrize("function", ["replace", "unlink", "rmtree", "fsync"])
def test_a_crash_at_any_point_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, old: bool) -> None:
    """Whatever call is the last one: the old version is complete, or the same command finishes, or the new version is complete."""
    module: Any = {"replace": os, "unlink": Path, "rmtree": shutil, "fsync": os}[function]
    original = getattr(module, function)
    outcomes = set()
    for last in range(40):
        out = tmp_path / f"{last}" / "a"
        out.parent.mkdir()
        if old:
            make(out, "old", config={"lr": 1}, names=("config.json", "model.safetensors", "dense.safetensors"))
        output = Output.open(out, stage="init", inputs={}, config={"lr": 2}, force=old)
        (output.state_dir / "state.json").write_text("at the last step")
        output.metrics.write_text("new\n")
        for name in ("config.json", "model.safetensors"):
            (output.staging / name).write_text(f"new {name}")
        calls = 0

        def dying(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > last:
                raise Crash
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, function, dying)
            try:
                output.commit(output.manifest(family="xvlm"))
                crashed = False
            except Crash:
                crashed = True
        killed(output)
        for staging in out.glob("training_state/staging-*"):  # what the next process finds has another process's number
            staging.rename(staging.with_name(f"staging-{2**22 + 1}"))

        if (out / MANIFEST).exists():
            state = "new" if require_complete(out).config == {"lr": 2} else "old"
            assert verify(out) == []
            assert tree(out)["config.json"] == f"{state} config.json"
        else:
            state = "unfinished"
            with pytest.raises(BadInput, match="not finished"):
                require_complete(out)
        outcomes.add(state)

        again = Output.open(out, stage="init", inputs={}, config={"lr": 2}, force=state == "old")
        assert again.up_to_date == (state == "new")
        if state != "new":
            assert (again.state_dir / "state.json").read_text() == "at the last step", "nothing trained is lost"
            assert again.metrics.read_text() == "new\n"
            (again.staging / "config.json").write_text("new config.json")
            (again.staging / "model.safetensors").write_text("new model.safetensors")
            again.commit(again.manifest(family="xvlm"))
        assert verify(out) == []
        assert set(tree(out)) == {"README.md", MANIFEST, "config.json", "model.safetensors", "metrics.jsonl"}
        assert Output.open(out, stage="init", inputs={}, config={"lr": 2}).up_to_date
        if not crashed:
            break
    assert not crashed and last >= (1 if function == "rmtree" else 2)
    assert outcomes == {"new"} if function == "rmtree" else outcomes >= ({"old", "new"} if old else {"unfinished", "new"})


def test_a_failed_commit_can_be_abandoned_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of the renames: the folder stays ours, and the same command completes it."""
    output = Output.open(tmp_path / "a", stage="init", inputs={}, config={})
    (output.staging / "config.json").write_text("1")
    (output.staging / "model.safetensors").write_text("1")
    replace, calls = os.replace, []

    def full(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
        patch.setattr(os, "replace", full)
        output.commit(output.manifest(family="xvlm"))
    output.abandon()
    assert litter(tmp_path) == []
    make(tmp_path / "a", config={})
    assert verify(tmp_path / "a") == []


def test_nothing_staged_and_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    output = Output.open(tmp_path / "a", stage="init", inputs={}, config={})
    with pytest.raises(ValueError, match="staged no files"):
        output.commit(output.manifest(family="xvlm"))
    (output.staging / "config.json").write_text("1")
    with pytest.raises(ValueError, match="JSON"):
        output.commit(output.manifest(family="xvlm", metrics={"loss": float("nan")}))
    assert not (tmp_path / "a" / MANIFEST).exists()


def chain(root: Path) -> Path:
    make(root / "teacher", origin="random", accounting={"parameters": {"total": 10}})
    make(root / "student", stage="shrink", inputs={"model": str(root / "teacher")}, config={"model": "teacher"})
    make(
        root / "final",
        stage="distill",
        inputs={"model": str(root / "student"), "teacher": str(root / "teacher"), "data": "sha256:" + "5" * 64},
        config={},
    )
    return root / "final"


def test_lineage_follows_parents_and_teacher_and_survives_a_move(tmp_path: Path) -> None:
    final = chain(tmp_path / "runs")
    manifest = require_complete(final)
    assert [parent.path for parent in manifest.ancestors()] == ["../student", "../teacher"]
    assert manifest.teacher and manifest.teacher.role == "teacher" and manifest.inputs["data"] == "5" * 64
    (tmp_path / "runs").rename(tmp_path / "moved")
    node = lineage(tmp_path / "moved" / "final")
    assert [(item.path.name, [(link.role, link.node.path.name) for link in item.parents]) for item in node.walk()] == [
        ("final", [("model", "student"), ("teacher", "teacher")]),
        ("student", [("model", "teacher")]),
        ("teacher", []),
    ]
    assert [item.path.name for item in node.from_the_first()] == ["teacher", "student", "final"]
    assert not any(item.problems() for item in node.walk())
    assert verify(tmp_path / "moved" / "final") == []


@pytest.mark.parametrize("victim", ["final", "student", "teacher"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "metrics.jsonl", MANIFEST])
def test_verify_finds_one_flipped_bit_anywhere_in_the_chain(tmp_path: Path, victim: str, name: str) -> None:
    final = chain(tmp_path)
    path = tmp_path / victim / name
    content = bytearray(path.read_bytes())
    content[content.index(b"l" if name == MANIFEST else content[:1])] ^= 1
    path.write_bytes(content)
    problems = verify(final)
    assert problems and all(victim in problem for problem in problems)


def test_verify_reports_missing_extra_and_gone(tmp_path: Path) -> None:
    final = chain(tmp_path)
    (final / "model.safetensors").unlink()
    (final / "pytorch_model.bin").write_text("")
    (final / "notes.md").write_text("a user's own file is no problem")
    shutil.rmtree(tmp_path / "student")
    found = "\n".join(verify(final))
    assert "model.safetensors is missing" in found and "pytorch_model.bin is not listed" in found
    assert "parent not found at" in found and "notes.md" not in found
    assert len(found.splitlines()) == 3
    with pytest.raises(BadInput, match=r"damaged: model.safetensors is missing"):
        require_complete(final)
    with pytest.raises(BadInput, match="damaged"):
        Output.open(final, stage="distill", inputs={}, config={})


def test_a_bundled_checkpoint_ends_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = tmp_path / "package" / "bundled"
    bundled.mkdir(parents=True)
    make(tmp_path / "old", origin="random")
    make(bundled / "teacher", inputs={"model": str(tmp_path / "old")}, config={}, origin="bundled")
    shutil.rmtree(tmp_path / "old")
    monkeypatch.setattr(files, "BUNDLED", bundled)
    final = make(tmp_path / "final", inputs={"model": "bundled:teacher"}, config={"model": "bundled:teacher"})
    assert final.parents[0].path == "bundled:teacher"
    assert resolve("bundled:teacher") == bundled / "teacher"
    assert verify(tmp_path / "final") == [] and verify("bundled:teacher") == []
    same = make(tmp_path / "same", inputs={"model": str(bundled / "teacher")}, config={})
    assert same.parents == final.parents
    with pytest.raises(BadInput, match="this package has teacher"):
        resolve("bundled:../teacher")
    (bundled / "teacher" / "config.json").write_text("touched")
    assert len(verify(tmp_path / "final")) == 1


def test_a_manifest_that_names_itself_as_parent_does_not_loop(tmp_path: Path) -> None:
    make(tmp_path / "a")
    values = json.loads((tmp_path / "a" / MANIFEST).read_text())
    values["parents"] = [{"role": "model", "path": ".", "sha256": "0" * 64}]
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(values))
    assert any("own ancestor" in problem for problem in verify(tmp_path / "a"))


@pytest.mark.parametrize("spec", ["", "nowhere", "a\0b", "bundled:", "bundled:nothing", "~nobody-at-all/x", "x" * 5000])
def test_resolve_refuses_with_a_reason(spec: str) -> None:
    with pytest.raises(BadInput) as error:
        resolve(spec)
    assert error.value.what and error.value.why


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("no")))
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and litter(tmp_path) == []
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_a_killed_process_staged_is_removed(tmp_path: Path) -> None:
    first = Output.open(tmp_path / "a", stage="x", inputs={}, config={})
    (first.staging / "half").write_text("")
    stale = first.staging.rename(first.staging.with_name(f"staging-{2**22 + 1}"))
    killed(first)
    for name in (".a.staging-1", ".b.staging-1", ".evlm-abcdefgh"):  # names alone say nothing
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    (tmp_path / "a" / ".notes.tmp-1").write_text("mine")
    output = Output.open(tmp_path / "a", stage="x", inputs={}, config={})
    assert not stale.exists() and litter(tmp_path) == [".a.staging-1", ".b.staging-1", ".evlm-abcdefgh", ".notes.tmp-1"]
    output.abandon()


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    first = Output.open(tmp_path / "a", stage="x", inputs={}, config={})
    before = tree(tmp_path)
    for options in ({}, {"force": True}, {"resume": False}):
        with pytest.raises(BadInput, match=f"being written: by process {os.getpid()} on ") as error:
            Output.open(tmp_path / "a", stage="x", inputs={}, config={}, **options)
        assert "--out" in error.value.fix
    assert tree(tmp_path) == before
    (first.staging / "config.json").touch()
    first.commit(first.manifest(family="xvlm"))
    assert Output.open(tmp_path / "a", stage="x", inputs={}, config={}).up_to_date and litter(tmp_path) == []


def test_the_old_checkpoint_is_up_to_date_while_another_process_replaces_it(tmp_path: Path) -> None:
    make(tmp_path / "a", config={})
    new = Output.open(tmp_path / "a", stage="init", inputs={}, config={}, force=True)
    assert Output.open(tmp_path / "a", stage="init", inputs={}, config={}).up_to_date
    assert (new.state_dir / "request.json").is_file(), "the state of the process at work is left alone"
    new.abandon()
    assert not new.state_dir.exists()


@pytest.mark.parametrize("system", ["no module", "no locks"])
def test_nothing_is_left_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    if system == "no module":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="the disk is full"):
        patch.setattr(checkpoint, "write_request", full)
        Output.open(tmp_path / "a", stage="x", inputs={}, config={})
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "a")


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        Output.open(tmp_path / "a", stage="x", inputs={}, config={})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "a" / "training_state" / "lock").is_file()
    make(tmp_path / "a", stage="x", config={})
    assert litter(tmp_path) == []


def test_a_full_disk_is_told_while_the_folder_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(BadInput, match="the disk is full"):
        patch.setattr(os, "fsync", full)
        Output.open(tmp_path / "a", stage="x", inputs={}, config={})
    make(tmp_path / "a")


def test_the_card_names_sizes_results_and_every_licence_of_the_chain(tmp_path: Path) -> None:
    record = {"name": "shapes", "split": "train", "count": 1200, "fingerprint": "ab", "licence": "CC0 | own"}
    from efficientvlm.checkpoints.manifest import DataRecord

    make(tmp_path / "parent", origin="random", data=[DataRecord(**record)])
    make(
        tmp_path / "a",
        stage="finetune",
        inputs={"model": str(tmp_path / "parent")},
        config={"task": "vqa"},
        metrics={"vqa": {"accuracy": 0.97654}},
        accounting={"parameters": {"total": 1234567, "by_tower": {"vision": 1000}}, "sparsity": {"achieved": 0.4}},
    )
    card = (tmp_path / "a" / "README.md").read_text()
    for part in (
        "1,234,567",
        "0.9765",
        "| shapes | train | 1,200 | CC0 \\| own |",
        "pipeline_tag: visual-question-answering",
        "evlm predict --model a",
    ):
        assert part in card
    assert card.startswith("---\n") and "None" not in card


def test_the_card_shows_foreign_text_as_text(tmp_path: Path) -> None:
    from efficientvlm.checkpoints.manifest import DataRecord

    evil = "MIT\r\n\r\n# Trust me\n<img src=x onerror=alert(1)> [click](http://x) `rm` **now** \x1b[31m\u202e| _all_"
    record = DataRecord(name=evil, split=evil, count=1, fingerprint="ab", licence=evil)
    output = Output.open(tmp_path / "a\n# b`<b>", stage="import", inputs={}, config={})
    (output.staging / "config.json").write_text("1")
    extra = {"source": evil, "licence": evil}
    output.commit(output.manifest(family=evil, data=[record], metrics={evil: evil}, extra=extra))
    card = (output.path / "README.md").read_bytes().decode()
    assert not set("\r\x1b\u202e") & set(card) and "<img" not in card and "[click]" not in card and "**now**" not in card
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert len(headings) == 4 and headings[1:] == ["## Results", "## Data and licences", "## Use"]
    assert "&lt;img src=x onerror=alert(1)&gt;" in card and "\\_all\\_" in card, "it is still told"
