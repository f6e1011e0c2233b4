"""A pruned model still looks at its inputs, whatever the gates want; where it does not, that is measured and said everywhere."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compression_cases import CONFIGS, build
from conftest import PRUNE, SHAPES, TRAIN, run_stage
from doc_pages import evlm

from efficientvlm.checkpoints import influence
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import Gates
from efficientvlm.compression.surgery import slice_model
from efficientvlm.errors import Diverged, TargetMissed
from efficientvlm.report import pages as page
from efficientvlm.report.story import DAMAGE
from efficientvlm.tasks.influence import draw_inputs, measure, of_anything

BLIND = "the image has no influence on the answer"


@pytest.fixture(scope="module")
def closing(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruning run whose gates close every cross-attention head of fusion."""
    out = tmp_path_factory.mktemp("closing") / "pruned"
    build = Gates.__init__

    def closed(self: Gates, units: Any, **settings: Any) -> None:
        build(self, units, **settings)
        with torch.no_grad():
            self.log_alpha[[unit.kind == "cross_head" and unit.tower == "fusion" for unit in units]] = -4.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gates, "__init__", closed)
        run_stage("prune", out=str(out), **{**PRUNE(chain), **TRAIN})
    return out


class Tokens(list[int]):
    all_special_ids: tuple[int, ...] = (0,)


def prune(chain: Path, out: Path, **settings: Any) -> Any:
    run_stage("prune", out=str(out), **{**PRUNE(chain), **TRAIN, **settings})
    return require_complete(out)


def recut(source: Path, out: Path, **settings: Any) -> Any:
    given = {"data": SHAPES, "limit": 40, "eval_limit": 4, "model": str(source), "from_gates": str(source), **settings}
    run_stage("prune", out=str(out), **given)
    return require_complete(out)


def cross_heads(manifest: Any) -> int:
    return sum(count["kept"] for group, count in manifest.accounting["units"].items() if group.startswith("fusion") and "cross" in group)


def image(manifest: Any) -> float:
    return float(manifest.extra["influence"]["inputs"]["image"]["outputs"]["answer"])


def test_gates_that_would_blind_a_model_leave_it_one_head(closing: Path, tmp_path: Path) -> None:
    manifest = require_complete(closing)
    assert cross_heads(manifest) == 1 and image(manifest) == 1.0 and manifest.extra["cut_off"] is None
    assert manifest.accounting["reach"]["reaches"] == {"image": ["answer"], "text": ["answer"]}
    assert manifest.accounting["reach"]["wasted"] == {"parameters": 0, "macs": 0}
    more = recut(closing, tmp_path / "more", sparsity=0.7)
    assert cross_heads(more) == 1 and image(more) == 1.0
    assert more.accounting["sparsity"]["achieved"] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_other_methods_keep_it_seeing_too(method: str, chain: Path, tmp_path: Path) -> None:
    manifest = prune(chain, tmp_path / "out", method=method, sparsity=0.85, teacher=None, keep_dense=False)
    assert not manifest.accounting["reach"]["cut_off"] and image(manifest) == 1.0
    assert manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.85, abs=0.01)


def test_a_target_that_needs_the_last_path_is_missed(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetMissed, match="the last path of every input stays open"):
        prune(chain, tmp_path / "out", sparsity=0.999)
    assert not (tmp_path / "out").exists()


def test_blindness_that_is_allowed_is_cheap_and_said_everywhere(closing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = recut(closing, tmp_path / "blind", sparsity=0.4, allow_blind=True)
    told = capsys.readouterr().err
    cut = manifest.extra["cut_off"]
    assert cut["pairs"] == [["image", "answer"]] and cut["towers"] == ["vision"] and cut["share"] > 0.5
    assert "WARNING: prune: no path is left from the image to the answer; " in told and "is of vision, which reaches nothing" in told
    assert f"WARNING: prune: {BLIND}" in told
    assert cross_heads(manifest) == 0 and image(manifest) == 0.0 and manifest.extra["influence"]["inputs"]["text"]["outputs"]["answer"] > 0
    kept = manifest.accounting["units"]
    closed = {group for group, count in kept.items() if count["kept"] < count["of"]}
    assert {group for group in closed if "vision" not in group} == {group for group in kept if "fusion" in group and "cross" in group}
    assert manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.01)
    reach = manifest.accounting["reach"]
    assert reach["cut_off"] == {"image": ["answer"]} and reach["dead_towers"] == ["vision"] and reach["wasted"]["parameters"] > 0

    result = run_stage("eval", model=str(tmp_path / "blind"), data=SHAPES, limit=10, out=str(tmp_path / "blind.json"))
    assert result["influence"]["inputs"]["image"] == {"outputs": {"answer": 0.0}, "said": 0.0}
    assert f"WARNING: eval: {BLIND}" in capsys.readouterr().err
    code, out, _ = evlm(["inspect", str(tmp_path / "blind")])
    assert code == 0 and BLIND in out and "influence nothing: vision" in out
    assert BLIND in (tmp_path / "blind" / "README.md").read_text()
    story = page.tell_folder(tmp_path / "blind")
    assert any(BLIND in problem.text for problem in story.problems if problem.kind == DAMAGE)


def test_what_was_not_measured_is_said(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prune(chain, tmp_path / "out", eval_limit=0)
    assert manifest.extra["influence"] == {"not_measured": "eval_limit is 0"}
    code, out, _ = evlm(["inspect", str(tmp_path / "out")])
    assert code == 0 and "the influence of the inputs was not measured: eval_limit is 0" in out
    story = page.tell_folder(tmp_path / "out")
    assert story.unmeasured[-1] == "out"
    run_stage("report", out=str(tmp_path / "report"), models={"tuned": str(tmp_path / "out")})
    said = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "No problem was found." not in said and "whether its inputs have any influence was not measured of tuned" in said
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "out", old)
    values = json.loads((old / "evlm_manifest.json").read_text())
    del values["extra"]["influence"], values["accounting"]["reach"], values["digest"]
    (old / "evlm_manifest.json").write_text(json.dumps(values))
    code, out, _ = evlm(["inspect", str(old)])
    assert code == 0 and "influence of its inputs: not measured" in out


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "toy"])
def test_without_data_random_inputs_tell(name: str) -> None:
    """For every kind of network; one that has lost all heads that a text or a picture is read through says nothing of it."""
    model, _ = build(name)
    anatomy = Anatomy.of(model)
    closed = {unit.group for unit in anatomy.units} - set(anatomy.reach.groups)
    blind = slice_model(model, torch.tensor([unit.group in closed for unit in anatomy.units]))
    found = []
    for network in (model, blind):
        sizes = network.config.sizes()
        loaded: Any = SimpleNamespace(model=network, sizes=sizes, tokenizer=Tokens(range(20)))
        inputs = of_anything(loaded)["inputs"]
        found.append({what for what, part in inputs.items() if any(part["outputs"].values())})
    reached = {pair.input for pair in anatomy.reach.pairs(closed)}
    images = {"left image", "right image"} if name.endswith("-two-images") else {"image"}
    assert found == [{*images, "text"}, reached]


@pytest.mark.parametrize("name", ["xvlm", "xvlm-two-images", "clip"])
def test_what_is_timed_is_drawn(name: str) -> None:
    """Every picture and every word between the first and the last one, however short a text is; the same from the same seed."""
    model, _ = build(name)
    loaded: Any = SimpleNamespace(model=model, tokenizer=Tokens(range(20)))
    for length in (1, 2, 6):
        plain, one, two = (model.example(3, length) for _ in range(3))
        for batch in (one, two):
            assert draw_inputs(loaded, batch, torch.Generator().manual_seed(0))
        (ids,) = (name for name in one if name.endswith("_ids") and not name.startswith("answer"))
        assert all(len(one[name].unique()) > 100 for name in one if "pixels" in name)
        assert torch.equal(one[ids][:, [0, -1]], plain[ids][:, [0, -1]]) and torch.equal(one[ids], two[ids])
        assert length < 3 or (len(one[ids][:, 1:-1].unique()) > 3 and not bool((one[ids][:, 1:-1] == plain[ids][0, 0]).any()))
        rest = [name for name in plain if name != ids and "pixels" not in name]
        assert all(torch.equal(one[name], plain[name]) for name in rest)


def test_measure_compares_bits_of_every_output() -> None:
    draw = torch.Generator().manual_seed(0)
    batch = {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(5, 2, generator=draw), "c": torch.ones(5, 1)}
    batch["a"][1] = batch["a"][0]  # the sample after the next is taken

    def run(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
        return {"sum": batch["a"] + batch["b"][:, :1], "first": batch["a"][:, :1]}, ["x" if v > 0 else "y" for v in batch["b"][:, 0]]

    inputs = {"a": ("a",), "b": ("b",), "c": ("c",)}
    found = measure(run, batch, inputs)
    assert found == measure(run, batch, inputs, batch_size=2)
    assert found["samples"] == 5 and found["inputs"]["c"] == {"not_measured": "all samples have the same"}
    assert found["inputs"]["a"] == {"outputs": {"sum": 1.0, "first": 1.0}, "said": 0.0}
    assert found["inputs"]["b"]["outputs"] == {"sum": 1.0, "first": 0.0} and found["inputs"]["b"]["said"] > 0
    with pytest.raises(Diverged, match="of some samples sum are no finite numbers"):
        measure(run, batch | {"b": batch["b"] * math.nan}, {"a": ("a",)})
    record = influence.Influence.model_validate(found)
    assert record.without() == [("b", "first")] and record.unheard() == ["a"] and list(record.gaps()) == ["c"]
    assert record.summary().startswith("a 0%, b ") and record.summary().endswith("c not measured of 5 answers")
