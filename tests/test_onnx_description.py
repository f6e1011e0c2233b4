"""What stands in `onnx.json` is held against the graphs, the folder and itself before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from efficientvlm.errors import BadInput
from efficientvlm.families.onnx.description import ONNX, Description
from efficientvlm.families.onnx.family import Exported

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

Ports = dict[str, dict[str, Any]]
INTEGERS = {"type": "int64", "shape": ["questions", "tokens"]}
QUESTION: Ports = {
    "pixels": {"type": "float32", "shape": ["images", 3, 8, 8]},
    "question_ids": INTEGERS,
    "question_mask": INTEGERS,
    "image_index": {"type": "int64", "shape": ["questions"]},
}
STATES: Ports = {"states": {"type": "float32", "shape": ["images", 3, 8]}}
CACHE = {"type": "float32", "shape": ["sequences", 2, "past", 4]}
ANSWER: Ports = {
    "states": STATES["states"],
    "rows": {"type": "int64", "shape": ["sequences"]},
    "answer_ids": {"type": "int64", "shape": ["sequences", "length"]},
    "past_key_0": CACHE,
    "past_value_0": CACHE,
}
LOGITS: Ports = {"logits": {"type": "int64", "shape": ["sequences", "length", 1]}, "present_key_0": CACHE, "present_value_0": CACHE}
NUMBERS = {"float32": 1, "int64": 7}


def graph(path: Path, inputs: Ports, outputs: Ports, *nodes: tuple[str, str, str]) -> None:
    """A graph of single operations, each (operation, input, output); those that need an axis work on the last."""
    ports = [
        [onnx.helper.make_tensor_value_info(name, NUMBERS[port["type"]], port["shape"]) for name, port in side.items()]
        for side in (inputs, outputs)
    ]
    last = onnx.helper.make_tensor("last", 7, [1], [-1])
    made = [onnx.helper.make_node(op, [source, *["last"] * (op != "Identity")], [output]) for op, source, output in nodes]
    for node in made:
        if node.op_type == "ReduceMean":
            node.attribute.append(onnx.helper.make_attribute("keepdims", 0))
    whole = onnx.helper.make_graph(made, path.stem, *ports, initializer=[last])
    model = onnx.helper.make_model(whole, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    graph(folder / "question.onnx", QUESTION, STATES, ("ReduceMean", "pixels", "states"))
    handed_on = [("Identity", f"past_{part}_0", f"present_{part}_0") for part in ("key", "value")]
    graph(folder / "answer.onnx", ANSWER, LOGITS, ("Unsqueeze", "answer_ids", "logits"), *handed_on)
    sizes = {"image_size": 8, "patch_size": 4, "max_positions": 9, "vocab_size": 9, "widths": {"vision": [4, 4]}, "heads": {"vision": [2]}}
    sizes |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    graphs = {
        "question": {"file": "question.onnx", "inputs": QUESTION, "outputs": STATES, "difference": 0.0},
        "answer": {"file": "answer.onnx", "inputs": ANSWER, "outputs": LOGITS, "difference": 0.0},
    }
    description = {"family": "xvlm", "abilities": ["answer"], "precision": "fp32", "opset": 18, "tolerance": 1e-4, "graphs": graphs}
    (folder / ONNX).write_text(json.dumps(description | {"sizes": sizes, "answers": ["red"]}))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "o"))


def change(folder: Path, spoil: Callable[[Any], Any]) -> None:
    values = json.loads((folder / ONNX).read_text())
    spoil(values)
    (folder / ONNX).write_text(json.dumps(values))


def opened(folder: Path) -> Any:
    return Exported().load(folder)


def test_what_is_right_opens(folder: Path) -> None:
    model = opened(folder)
    assert isinstance(model.config, Description) and set(model.sessions) == {"question", "answer"}
    assert model.config.layers()["decoder"] == 1


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """Sets what stands at `path`."""

    def spoil(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return spoil


def drop(*path: str) -> Callable[[Any], None]:
    def spoil(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return spoil


def swap(values: Any, key: str) -> None:
    question, answer = values["graphs"]["question"], values["graphs"]["answer"]
    question[key], answer[key] = answer[key], question[key]


GRAPH = ("graphs", "question")
WRONG: dict[str, Callable[[Any], Any]] = {
    "no graphs": put("graphs", value={}),
    "graphs a list": put("graphs", value=[]),
    "no question graph": drop("graphs", "question"),
    "no answer graph": drop("graphs", "answer"),
    "graphs of no kind": put("graphs", "question", value=7),
    "files swapped": lambda values: swap(values, "file"),
    "inputs swapped": lambda values: swap(values, "inputs"),
    "outputs swapped": lambda values: swap(values, "outputs"),
    "no file": drop(*GRAPH, "file"),
    "no such file": put(*GRAPH, "file", value="other.onnx"),
    "file elsewhere": put(*GRAPH, "file", value="../o/question.onnx"),
    "absolute file": put(*GRAPH, "file", value="/tmp/question.onnx"),
    "file of no text": put(*GRAPH, "file", value=3),
    "file a folder": put(*GRAPH, "file", value="folder"),
    "file a pipe": put(*GRAPH, "file", value="pipe"),
    "no inputs": put(*GRAPH, "inputs", value={}),
    "input missing": drop(*GRAPH, "inputs", "image_index"),
    "inputs a list": put(*GRAPH, "inputs", value=["pixels"]),
    "input of another type": put(*GRAPH, "inputs", "pixels", "type", value="float16"),
    "no outputs": put(*GRAPH, "outputs", value={}),
    "output more": put(*GRAPH, "outputs", "more", value=INTEGERS),
    "output of another name": lambda values: values["graphs"]["answer"]["outputs"].update(
        words=values["graphs"]["answer"]["outputs"].pop("logits")
    ),
    "no shape": drop(*GRAPH, "inputs", "pixels", "shape"),
    "shape too short": put(*GRAPH, "inputs", "question_ids", "shape", value=["questions"]),
    "shape of another size": put("graphs", "answer", "inputs", "past_key_0", "shape", value=["sequences", 3, "past", 4]),
    "shape negative": put("graphs", "answer", "inputs", "past_key_0", "shape", value=["sequences", -2, "past", 4]),
    "shape huge": put("graphs", "answer", "inputs", "past_key_0", "shape", value=["sequences", 2, "past", 10**12]),
    "states without tokens": put(*GRAPH, "outputs", "states", "shape", value=["images", 8]),
    "logits without tokens": put("graphs", "answer", "outputs", "logits", "shape", value=["sequences", 1]),
    "keys without values": drop("graphs", "answer", "inputs", "past_value_0"),
    "keys not handed on": drop("graphs", "answer", "outputs", "present_key_0"),
    "keys of a layer of no number": lambda values: values["graphs"]["answer"]["inputs"].update(past_key_x=CACHE),
    "keys of three dimensions": put("graphs", "answer", "inputs", "past_key_0", "shape", value=["sequences", 2, "past"]),
    "heads left open": lambda values: [
        values["graphs"]["answer"][side].update({f"{name}_{part}_0": {**CACHE, "shape": ["sequences", "heads", "past", 4]}})
        for side, name in (("inputs", "past"), ("outputs", "present"))
        for part in ("key", "value")
    ],
    "pixels of another size": put("sizes", "image_size", value=16),
    "image size zero": put("sizes", "image_size", value=0),
    "image size huge": put("sizes", "image_size", value=10**6),
    "no sizes": drop("sizes"),
    "no widths": drop("sizes", "widths"),
    "vocabulary as text": put("sizes", "vocab_size", value="9"),
    "vocabulary empty": put("sizes", "vocab_size", value=0),
    "vocabulary huge": put("sizes", "vocab_size", value=10**12),
    "means no numbers": put("sizes", "image_mean", value=["a", "b", "c"]),
    "two means": put("sizes", "image_mean", value=[0.5, 0.5]),
    "deviations zero": put("sizes", "image_std", value=[0, 0, 0]),
    "deviations negative": put("sizes", "image_std", value=[-1, 0.5, 0.5]),
    "rank of none": put("rank_top", value=0),
    "rank negative": put("rank_top", value=-1),
    "rank half": put("rank_top", value=1.5),
    "no answers": put("answers", value=[]),
    "empty answer": put("answers", value=[""]),
    "answers no texts": put("answers", value=[1, 2]),
    "no abilities": put("abilities", value=[]),
    "precision unknown": put("precision", value="fp64"),
    "newer format": put("format_version", value=2),
    "unknown key": put("more", value=1),
    "tokens of an answer": put("max_answer_tokens", value=-1),
    "start token": put("start_token", value="[CLS]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_bad_input(folder: Path, name: str) -> None:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    change(folder, WRONG[name])
    with pytest.raises(BadInput) as caught:
        opened(folder)
    assert caught.value.exit_code == 3 and str(folder) in caught.value.what and caught.value.why and caught.value.fix
    assert "wrong setting" not in caught.value.what or "export it again" in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"tolerance": 1e999}', b'{"tolerance": NaN}', b"[" * 100_000])
def test_a_file_that_is_no_description_is_bad_input(folder: Path, content: bytes) -> None:
    (folder / ONNX).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        opened(folder)
    assert str(folder / ONNX) in caught.value.what


def test_a_number_beyond_all_bounds_is_refused_wherever_it_stands(folder: Path) -> None:
    text = (folder / ONNX).read_text()
    (folder / ONNX).write_text(text.replace('"difference": 0.0', '"difference": 1e999', 1))
    with pytest.raises(BadInput, match="1e999 is too large a number"):
        opened(folder)
