"""Pretrained towers out of Python packages: matrices found by the nodes that use them, and folders that transformers opens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from efficientvlm.errors import BadInput
from efficientvlm.examples import towers

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402


def exported(path: Path) -> dict[str, np.ndarray]:
    """An ONNX file as exporters write a vision transformer, of which only names matter; the tensors by their original names."""
    rng = np.random.default_rng(0)
    weights = {
        "embeddings.cls_token": rng.normal(size=(1, 1, 4)),
        "encoder.layer.0.attention.attention.query.weight": rng.normal(size=(4, 4)),
        "encoder.layer.0.mlp.fc1.weight": rng.normal(size=(6, 4)),
        "encoder.layer.0.mlp.fc1.bias": rng.normal(size=6),
        "embeddings.position_embeddings": rng.normal(size=(1, 5, 4)),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    stored, nodes = {"decoder.weight": np.ones(3, np.float32)}, []
    for number, (name, value) in enumerate(weights.items()):
        if name.endswith("position_embeddings"):
            stored |= {"onnx::Reshape_8": value[:, 1:], "onnx::Concat_9": value[:, :1]}
        elif value.ndim == 2:
            stored[f"onnx::MatMul_{number}"] = np.ascontiguousarray(value.T)
            place = "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/0", "layer.0")
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"y{number}"], name=f"{place}/MatMul"))
        else:
            stored[f"backbone.{name}"] = value
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "network", [], [], tensors)), path)
    return weights


def test_matrices_are_found_by_the_nodes_that_use_them(tmp_path):
    weights = exported(tmp_path / "x.onnx")
    found = towers.backbone(tmp_path / "x.onnx")
    assert set(found) == {*weights, "embeddings.mask_token"}
    for name, value in weights.items():
        assert np.array_equal(found[name].numpy(), value), name


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(towers.TOWERS, towers.VISION, ("no_such_package", "x.onnx"))
    with pytest.raises(BadInput, match="no_such_package") as caught:
        towers.write_towers(tmp_path / "towers")
    assert "examples" in caught.value.fix and not (tmp_path / "towers").exists()


def test_a_file_of_another_network_leaves_no_folder(tmp_path, monkeypatch):
    exported(tmp_path / "x.onnx")
    monkeypatch.setattr(towers, "packaged", lambda package, file: tmp_path / "x.onnx")
    with pytest.raises(BadInput, match=r"weights do not fit config\.json"):
        towers.write_towers(tmp_path / "towers")
    assert list((tmp_path / "towers").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not all(find_spec(package) for package, _ in towers.TOWERS.values()), reason="needs the extra examples")
def test_the_packages_hold_what_they_should(tmp_path):
    vision, text = towers.write_towers(tmp_path)
    assert towers.write_towers(tmp_path) == [vision, text]
    assert AutoModel.from_pretrained(vision).config.model_type == "dinov2"
    words, bert = AutoTokenizer.from_pretrained(text), AutoModel.from_pretrained(text)
    assert len(words) == bert.config.vocab_size == 30522
    said = ["a red apple", "a piece of fruit", "a fire truck"]
    batch = words(said, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    apple, fruit, truck = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert apple @ fruit > apple @ truck + 0.2
