"""What a checkpoint comes from: a graph, however deep and however entangled; what `verify` sees of added, missing and unreadable files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_checkpoint import chain, make

from efficientvlm.checkpoints import files
from efficientvlm.checkpoints.files import sha256
from efficientvlm.checkpoints.lineage import examine, is_read, known_data, lineage, verify
from efficientvlm.checkpoints.manifest import MANIFEST, Code, DataRecord, Manifest, Parent
from efficientvlm.cli import folders
from efficientvlm.errors import BadInput


def generations(root: Path, count: int, *, taught: bool = False) -> Path:
    """Checkpoints that are made one from the other, and taught by it too; they hold no files."""
    previous: Path | None = None
    for number in range(count):
        folder = root / f"{number:04d}"
        folder.mkdir()
        parent = Parent(role="model", path=f"../{previous.name}", sha256=sha256(previous / MANIFEST)) if previous else None
        teacher = parent.model_copy(update={"role": "teacher"}) if parent and taught else None
        data = [DataRecord(name=f"d{number % 5}", split="train", count=1, fingerprint="0", licence="CC0")]
        manifest = Manifest(
            stage="distill",
            family="xvlm",
            parents=[parent] if parent else [],
            teacher=teacher,
            code=Code(version="0"),
            created="x",
            data=data,
        )
        (folder / MANIFEST).write_bytes(manifest.dump())
        (folder / "README.md").write_text("")
        previous = folder
    assert previous
    return previous


def test_a_lineage_grows_with_the_folders_and_not_with_the_ways_through_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = generations(tmp_path, 40, taught=True)  # as a tree it would have 2 to the power of 39 leaves
    assert len(list(lineage(last).walk())) == 40 and examine(last).checkpoints == 40 and verify(last) == []
    assert len(known_data(last, lineage(last).manifest or pytest.fail())) == 5
    folders.inspect(str(last))
    assert capsys.readouterr().out.count("as above") == 39


def test_a_chain_of_a_thousand_generations_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = generations(tmp_path, 1200)
    assert verify(last) == []
    folders.inspect(str(last), json=True)
    told = json.loads(capsys.readouterr().out)
    assert len(told["ancestors"]) == 1199 and told["parents"] == [{"role": "model", "path": str(tmp_path / "1198"), "problem": None}]
    folders.inspect(str(last))
    lines = capsys.readouterr().out.splitlines()
    assert "1199" in lines[0] and sum("distill" in line for line in lines) == 1200
    folders.verify(str(last))
    assert "1200 checkpoints" in capsys.readouterr().out


def test_a_circle_of_manifests_ends(tmp_path: Path) -> None:
    last = generations(tmp_path, 3)
    values = json.loads((tmp_path / "0000" / MANIFEST).read_text())
    values["parents"] = [{"role": "model", "path": "../0002", "sha256": "0" * 64}, {"role": "model", "path": ".", "sha256": "0" * 64}]
    (tmp_path / "0000" / MANIFEST).write_text(json.dumps(values))
    assert len(list(lineage(last).walk())) == len(lineage(last).from_the_first()) == 3
    assert any("is its own ancestor" in problem for problem in verify(last))


@pytest.mark.parametrize(
    "name",
    [
        *("pytorch_model.bin", "x.safetensors", "x.onnx", "x.onnx.data", "x.gguf", "adapter_model.safetensors", "adapter_config.json"),
        *("config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "x.index.json"),
        *("vocab.txt", "merges.txt", "vocab.json", "tokenizer.model", "spiece.model", "added_tokens.json", "special_tokens_map.json"),
        *("chat_template.jinja", "chat_template.json", "modeling_x.py", "x.so", "__pycache__/x.pyc", "sub/model.safetensors"),
    ],
)
def test_an_added_file_that_a_loader_reads_is_a_problem(tmp_path: Path, name: str) -> None:
    make(tmp_path / "a", names=("model.safetensors",))
    (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "a" / name).write_text("")
    assert is_read(name)
    assert verify(tmp_path / "a") == [f"{tmp_path / 'a' / name} is not listed in the manifest"]


def test_any_other_added_file_is_named(tmp_path: Path) -> None:
    make(tmp_path / "a")
    for name in ("notes.md", "eval.json", "sub/picture.png"):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("")
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    (tmp_path / "a" / "training_state").mkdir()
    found = examine(tmp_path / "a")
    assert found.problems == [] and len(found.notes) == 5
    for name in (
        "notes.md was added",
        "eval.json was added",
        "picture.png was added",
        "link was added, a link that is not followed",
        "training_state is",
    ):
        assert any(name in note for note in found.notes), name


def test_a_file_that_cannot_be_read_is_a_problem_of_the_list(tmp_path: Path) -> None:
    final = chain(tmp_path)
    (final / "model.safetensors").unlink()
    os.mkfifo(final / "model.safetensors")
    (tmp_path / "student" / "config.json").unlink()
    (tmp_path / "student" / "config.json").mkdir()
    (tmp_path / "teacher" / "model.safetensors").unlink()
    (tmp_path / "teacher" / "model.safetensors").symlink_to("model.safetensors")
    problems = verify(final)
    assert len(problems) == 3
    for folder in ("final", "student", "teacher"):
        assert any(folder in problem for problem in problems)


def test_control_characters_of_a_manifest_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", stage="\x1b]0;owned\x07", metrics={"val": {"\x1b[31m": "\x9b"}})
    (tmp_path / "a" / "\x1b[2Jx.md").write_text("")
    folders.inspect(str(tmp_path / "a"))
    folders.verify(str(tmp_path / "a"))
    said = capsys.readouterr()
    assert "\\x1b]0;owned\\x07" in said.out and "\\x1b[2Jx.md was added" in said.err
    assert not set("\x1b\x07\x9b") & set(said.out + said.err)


def test_a_large_file_that_was_never_written_is_not_hashed(tmp_path: Path) -> None:
    with (tmp_path / "w.bin").open("wb") as file:
        file.write(b"x" * 5000)
        file.truncate(10**13)  # hours
    with pytest.raises(BadInput, match="empty for the most part"):
        sha256(tmp_path / "w.bin")


@pytest.mark.parametrize("told", [True, False])
def test_a_file_on_a_disk_that_compresses_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "w.bin").write_bytes(content)
    monkeypatch.setattr(files, "LARGE", 1000)
    status, seek = os.stat(tmp_path / "w.bin"), os.lseek
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_mode=status.st_mode, st_size=status.st_size, st_blocks=0))

    def lseek(descriptor: int, offset: int, how: int) -> int:
        if how != os.SEEK_SET and not told:
            raise OSError(errno.EINVAL, "of a file system that knows no holes")
        return seek(descriptor, offset, how)

    monkeypatch.setattr(os, "lseek", lseek)
    assert sha256(tmp_path / "w.bin") == hashlib.sha256(content).hexdigest()
