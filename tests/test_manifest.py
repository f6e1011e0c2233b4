"""The manifest file: strict, readable, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientvlm.checkpoints import manifest as manifests
from efficientvlm.checkpoints.files import STATE
from efficientvlm.checkpoints.manifest import MANIFEST, Code, DataRecord, FileRecord, Manifest, Parent, digest, read, schema
from efficientvlm.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent


def example(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "stage": "prune",
        "family": "xvlm",
        "parents": [Parent(role="model", path="../student", sha256="a" * 64)],
        "teacher": Parent(role="teacher", path="bundled:easy-vqa", sha256="b" * 64),
        "config": {"lr": 3e-4, "nested": {"on": True, "none": None}},
        "seed": 3,
        "data": [DataRecord(name="easy-vqa", split="train", count=5, fingerprint="ff", licence="MIT")],
        "code": Code(version="1.2.3", commit=None, dirty=None),
        "environment": {"python": "3.11.7"},
        "files": {"model.safetensors": FileRecord(sha256="c" * 64, bytes=12)},
        "metrics": {"accuracy": 0.97, "text": "é → ✓"},
        "created": "2030-01-01T00:00:00+00:00",
    }
    return Manifest(**{**fields, **changes})


def write(folder: Path, content: bytes | dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(json.dumps(content).encode() if isinstance(content, dict) else content)
    return folder


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    manifest = example()
    again = read(write(tmp_path, manifest.dump()))
    assert again.model_copy(update={"digest": None}) == manifest
    assert again.digest == digest(json.loads(manifest.dump()))
    assert again.dump() == manifest.dump()
    assert [parent.role for parent in again.ancestors()] == ["model", "teacher"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": NaN}', "NaN is not a JSON number"),
        (b'{"seed": -1e999}', "-1e999 is too large a number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"schema_version": 2}', "upgrade|reads version 1"),
        (b'{"schema_version": 1}', "stage: field required"),
        (b'{"schema_version": "1"}', "schema_version"),
    ],
)
def test_damaged_files_are_errors_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as error:
        read(write(tmp_path, content))
    assert str(tmp_path) in error.value.what and error.value.fix


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "3"},
        {"seed": 1.5},
        {"parents": [{"role": "model", "path": "x", "sha256": "short"}]},
        {"parents": {"role": "model"}},
        {"parents": [{"role": "model", "path": "x\0y", "sha256": "0" * 64}]},
        {"accounting": {"units": {"a": {"kept": 1, "of": 2}}}},
        {"accounting": {"units": {"vision.0.head": {"kept": "1", "of": 2}}}},
        {"accounting": {"parameters": 5}},
        {"accounting": {"macs": {"total": "many"}}},
        {"accounting": {"sparsity": {"achieved": "most"}}},
        {"files": {"../outside": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"a/../../b": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"a\\b": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"x": {"sha256": "0" * 64, "bytes": -1}}},
        {"origin": "found on the street"},
        {"cost": {"seconds": -1.0}},
        {"surprise": 1},
    ],
)
def test_wrong_types_and_values_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    values = {**json.loads(example().dump()), **change}
    with pytest.raises(BadInput, match=f"is not a manifest: {next(iter(change))}"):
        read(write(tmp_path, values))


def test_text_that_is_none_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    for change in ({"stage": "\ud800"}, {"config": {"a": [{"b": "\udfff"}]}}):
        path = write(tmp_path, {**json.loads(example().dump()), **change})
        with pytest.raises(BadInput, match="no text that can be written as UTF-8"):
            read(path)


def test_what_a_stage_noted_is_checked_when_it_is_used() -> None:
    made = example().model_copy(update={"config": {"max_tokens": "40", "twice": None}, "extra": {"twice": 2, "max_tokens": 3}})
    assert made.noted("other", int, 7) == 7 and made.noted("twice", int, 7) == 2
    with pytest.raises(BadInput, match="damaged: max_tokens: input should be a valid integer"):
        made.noted("max_tokens", int, None)


def test_a_missing_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a finished checkpoint") as error:
        read(tmp_path)
    assert "evlm import" in error.value.fix
    (tmp_path / STATE).mkdir()
    with pytest.raises(BadInput, match=r"is not finished.*was interrupted, or is at work"):
        read(tmp_path)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BadInput):
        read(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from([*Manifest.model_fields, "other"]), value=values)
def test_any_value_anywhere_is_read_or_refused_politely(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    folder = write(tmp_path_factory.getbasetemp() / "any", {**json.loads(example().dump()), key: value})
    try:
        manifest = read(folder)
    except BadInput:
        return
    assert json.loads(json.dumps(getattr(manifest, key), default=lambda item: item.model_dump())) == value or key in (
        "cost",
        "code",
        "data",
        "files",
    )


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_shows_in_the_digest(tmp_path_factory: pytest.TempPathFactory, position: float, bit: int) -> None:
    content = bytearray(example().dump())
    original = json.loads(content)
    content[int(position * len(content))] ^= 1 << bit
    folder = write(tmp_path_factory.getbasetemp() / "bit", bytes(content))
    try:
        read(folder)
    except BadInput:
        return
    found = json.loads(content)
    assert found == original or digest(found) != found["digest"]


def test_the_published_schema_is_up_to_date() -> None:
    published = json.loads((ROOT / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
    assert published == schema(), "run: evlm inspect --schema > docs/manifest.schema.json"


def test_the_environment_is_known_without_importing_it() -> None:
    told = "print('torch' in m.environment(), bool(m.code()) and 'torch' in sys.modules)"
    script = f"import sys; from efficientvlm.checkpoints import manifest as m; {told}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    assert (manifests.peak_memory_bytes() or 0) > 10_000_000


def test_the_commit_is_recorded_only_in_a_checkout_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed somewhere below an unrelated repository must not take that repository's commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    results, module = tmp_path / "benchmarks" / "results" / "a.csv", tmp_path / "efficientvlm" / "checkpoints" / "a.py"
    for file in (tmp_path / "pyproject.toml", results, module):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    for place, known in (("efficientvlm", True), ("lib/site-packages/efficientvlm", False)):
        monkeypatch.setattr(manifests, "__file__", str(tmp_path / place / "checkpoints" / "manifest.py"))
        manifests.code.cache_clear()
        code = manifests.code()
        assert (code.commit is not None, code.dirty) == ((True, False) if known else (False, None))
    monkeypatch.setattr(manifests, "__file__", str(module))
    for changed, dirty in ((results, False), (module, True)):  # a script that writes figures does not change the code that they are of
        changed.write_text("changed")
        manifests.code.cache_clear()
        assert manifests.code().dirty is dirty
    manifests.code.cache_clear()
