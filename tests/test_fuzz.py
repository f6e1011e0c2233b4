"""Damaged files of every kind that is read: whatever their bytes, the answer is what they hold or a :class:`BadInput`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_files import jsonl, pictures, png
from test_data_forms import CAPTIONS, QUESTION_ROWS, WRITERS, vqav2

from efficientvlm import families, recipe
from efficientvlm.checkpoints import manifest
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.opening import open_data, texts, usable
from efficientvlm.errors import BadInput
from efficientvlm.families.structure import kept_indices
from efficientvlm.stages.recut import read_tensors

FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = settings(FUZZ, max_examples=30)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("9" * 400) | st.just(10**400)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@contextmanager
def refused_or_read() -> Iterator[None]:
    """Any exception but BadInput, warnings of a crash included, fails the test; so does an error that says nothing."""
    try:
        yield
    except BadInput as error:
        assert error.what and len(str(error)) < 20_000


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few of its bytes replaced, dropped, doubled or cut off; now and then bytes of no origin."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        end = at + draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["replace", "drop", "double", "cut", "flip"]))
        if kind == "replace":
            content = content[:at] + draw(st.binary(max_size=12)) + content[end:]
        elif kind == "drop":
            content = content[:at] + content[end:]
        elif kind == "double":
            content = content[:end] + content[at:]
        elif kind == "flip":
            content = content[:at] + bytes(255 - byte for byte in content[at : at + 1]) + content[at + 1 :]
        else:
            content = content[:at]
    return content


@st.composite
def changed(draw: st.DrawFn, values: Any) -> Any:
    """JSON with one value, somewhere, replaced by another or left out."""
    if isinstance(values, dict) and values and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(values)))
        if draw(st.integers(0, 5)) == 0:
            return {name: value for name, value in values.items() if name != key}
        return {**values, key: draw(changed(values[key]))}
    if isinstance(values, list) and values and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(values) - 1))
        return [*values[:at], draw(changed(values[at])), *values[at + 1 :]]
    return draw(VALUES)


def broken_json(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a JSON file: damaged as bytes, or well formed with a wrong value."""
    return damaged(content) | changed(json.loads(content)).map(lambda values: json.dumps(values).encode("utf-8", "surrogatepass"))


@given(data=st.data())
@FUZZ
def test_manifests(tmp_path: Path, chain: Path, data: st.DataObject) -> None:
    (tmp_path / manifest.MANIFEST).write_bytes(data.draw(broken_json((chain / "pruned" / manifest.MANIFEST).read_bytes())))
    with refused_or_read():
        manifest.read(tmp_path)


@given(data=st.data())
@FUZZ
def test_configurations_of_models(tmp_path: Path, chain: Path, data: st.DataObject) -> None:
    (tmp_path / "config.json").write_bytes(data.draw(broken_json((chain / "pruned" / "config.json").read_bytes())))
    with refused_or_read():
        family = families.of_folder(tmp_path)
        family.read_config(tmp_path)


@given(
    st.text(alphabet="0123456789-, ", max_size=20) | st.just("0-999999999999") | st.text(max_size=20) | VALUES,
    st.text(max_size=6) | st.just("vision.0.head"),
)
@FUZZ
def test_ranges_of_kept_units(ranges: Any, group: str) -> None:
    with refused_or_read():
        kept = kept_indices({"vision.0.head": 4, "vision.0.neuron": 9}, {group: ranges})
        assert all(0 <= index < 4 for index in kept["vision.0.head"])


RECIPE = {
    "name": "mine",
    "defaults": {"seed": 1, "lr": 0.001},
    "stages": [
        {"name": "start", "stage": "init", "size": "tiny", "data": "shapes", "settings": dict(SIZES)},
        {"name": "tuned", "stage": "finetune", "model": "@start", "data": "easy-vqa", "weights": {"logits": 0.5}, "columns": {"a": "b"}},
        {"name": "test", "stage": "eval", "model": "@tuned", "data": "easy-vqa"},
    ],
}


@given(broken_json(json.dumps(RECIPE).encode()))
@FUZZ
def test_recipes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with refused_or_read():
        recipe.validate(recipe.load_recipe(str(tmp_path / "r.yaml")), [])


@given(data=st.data())
@FUZZ
def test_stored_gates(tmp_path: Path, chain: Path, data: st.DataObject) -> None:
    from efficientvlm.compression.gates import Gates

    (tmp_path / "gates.safetensors").write_bytes(data.draw(damaged((chain / "pruned" / "gates.safetensors").read_bytes())))
    with refused_or_read():
        Gates.from_tensors([], read_tensors(SimpleNamespace(path=tmp_path), "gates.safetensors"))


FORMS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "questions": (partial(open_data, QUESTIONS), QUESTION_ROWS),
    "pairs": (partial(open_data, PAIRS), CAPTIONS),
}


def read_whole(opened: Callable[..., Any], spec: str) -> None:
    """Open, read every text and picture, strictly and with all mistakes allowed."""
    for max_bad in (0, 10**6):
        with refused_or_read():
            source = opened(spec, "test", image_size=8, max_bad=max_bad)
            list(texts(source))
            usable(source, range(len(source)))
            assert len(source.fingerprint) == 64


def read_stream(opened: Callable[..., Any], spec: str) -> None:
    with refused_or_read():
        stream = opened(f"stream:{spec}", "train", image_size=8, max_bad=10**6, shuffle_buffer=2)
        list(texts(stream))
        [stream[index] for index in range(5)]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix != ".parquet"])
@given(data=st.data())
@FEW
def test_data_files(tmp_path: Path, suffix: str, kind: str, data: st.DataObject) -> None:
    opened, rows = FORMS[kind]
    pictures(tmp_path, 2)
    path = tmp_path / f"d{suffix}"
    if suffix in (".jsonl", ".json") and data.draw(st.booleans()):
        rows = data.draw(changed(rows))
        if suffix == ".json" or not isinstance(rows, list):
            path.write_text(json.dumps(rows), "utf-8", "surrogatepass")
        else:
            jsonl(path, rows)
    else:
        WRITERS[suffix](path, rows)
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_whole(opened, str(path))
    if suffix != ".json":
        read_stream(opened, str(path))


@pytest.mark.parametrize("kind", FORMS)
@given(data=st.data())
@settings(FEW, max_examples=12)
def test_parquet_files(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    opened, rows = FORMS[kind]
    pictures(tmp_path, 2)
    path = tmp_path / "d.parquet"
    WRITERS[".parquet"](path, rows)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    read_whole(opened, str(path))
    read_stream(opened, str(path))


@given(data=st.data())
@FEW
def test_the_layout_of_vqav2(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "vqa"
    if not folder.exists():
        vqav2(folder)
        for path in folder.glob("*.json"):
            path.with_suffix(".whole").write_bytes(path.read_bytes())
    for path in folder.glob("*train2014*.whole"):
        path.with_suffix(".json").write_bytes(data.draw(broken_json(path.read_bytes())))
    with refused_or_read():
        source = open_data(QUESTIONS, str(folder), "train", image_size=8, max_bad=10**6)
        usable(source, range(len(source)))


@pytest.mark.filterwarnings("ignore")  # what Pillow mutters about damaged headers
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@given(data=st.data())
@FUZZ
def test_pictures(format: str, data: st.DataObject) -> None:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png(1))).save(out, format)
    with refused_or_read():
        assert open_image(data.draw(damaged(out.getvalue())), 8).shape == (8, 8, 3)
