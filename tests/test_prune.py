"""The prune stage: budgets met, structure frozen, gates and dense weights good for another cut, quirks as published."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PRUNE, QUIET, SHAPES, SIZES, TRAIN, run_stage
from safetensors.torch import load_file

from efficientvlm import families
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import Gates, attach
from efficientvlm.compression.pruner import Pruner, rise
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.loaded import load
from efficientvlm.objectives.efficientvlm import released_rows
from efficientvlm.objectives.gated import Gated
from efficientvlm.objectives.objective import Objective
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings import idle
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.methods import GateQuirks, VQAPruningQuirks
from efficientvlm.settings.stages import Prune
from efficientvlm.stages.cutting import DENSE, save_tensors
from efficientvlm.training.loop import update

XVLM = families.get("xvlm")


def prune(chain: Path, out: Path, **settings: Any) -> Any:
    run_stage("prune", out=str(out), **{**PRUNE(chain), **TRAIN, **settings})
    return require_complete(out)


def recut(source: Path, out: Path, sparsity: float, **settings: Any) -> Any:
    common = {"data": SHAPES, "limit": 40, "eval_limit": 2}
    run_stage("prune", out=str(out), model=str(source), from_gates=str(source), sparsity=sparsity, **{**common, **settings})
    return require_complete(out)


def test_a_recut_measures_by_the_settings_of_its_task(chain: Path, tmp_path: Path) -> None:
    pruned = chain / "pruned"
    tuned = tmp_path / "tuned"
    shutil.copytree(pruned, tuned)
    manifest = json.loads((tuned / "evlm_manifest.json").read_text())
    manifest["config"] |= {"max_answer_tokens": 5, "quirks": {**manifest["config"]["quirks"], "first_token_twice": True}}
    (tuned / "evlm_manifest.json").write_text(json.dumps(manifest))
    config = recut(tuned, tmp_path / "again", 0.6).config
    assert config["max_answer_tokens"] == 5 and config["quirks"]["first_token_twice"] and not config["quirks"]["double_sep"]
    assert recut(tuned, tmp_path / "other", 0.6, task="vqa", max_answer_tokens=4).config["max_answer_tokens"] == 4


def test_the_output_is_really_small_and_states_its_budget(chain: Path) -> None:
    manifest, student = require_complete(chain / "pruned"), require_complete(chain / "distilled")
    budget, sparsity = manifest.extra["budget"]["all"], manifest.accounting["sparsity"]
    assert budget["target"] == 0.4 and budget["achieved"] == pytest.approx(sparsity["achieved"])
    smallest = 2 * 16 + 1  # elements of a neuron
    assert 0 <= sparsity["achieved"] - 0.4 <= smallest / sparsity["initial"]
    tensors = load_file(chain / "pruned" / "model.safetensors")
    dense = load_file(chain / "pruned" / "dense.safetensors")
    removed = sum(t.numel() for t in dense.values()) - sum(t.numel() for t in tensors.values())
    assert removed == sparsity["initial"] - sparsity["kept"] > 0
    assert sum(t.numel() for t in tensors.values()) == manifest.accounting["parameters"]["total"]
    assert manifest.teacher is not None and student.accounting["sparsity"]["achieved"] == 0


@pytest.mark.parametrize("name", ["dense.safetensors", "gates.safetensors"])
def test_nothing_is_cut_again_from_what_is_not_finite(name: str, chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "pruned", tmp_path / "pruned")
    tensors = load_file(chain / "pruned" / name)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_tensors(tensors, tmp_path / "pruned" / name)
    with pytest.raises(BadInput, match=f"{name} holds NaN or infinite values"):
        recut(tmp_path / "pruned", tmp_path / "out", 0.3)
    assert not (tmp_path / "out").exists()


def test_metrics_show_the_sparsity_on_its_way_to_the_target(chain: Path) -> None:
    lines = [json.loads(line) for line in (chain / "pruned" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["target_sparsity"] == pytest.approx(0.4)
    assert all(0 <= line["expected_sparsity"] < 1 for line in lines)
    assert "lagrangian" in lines[0] and "lagrangian" not in lines[-1]  # the last part of the run trains the final structure
    assert {"data_ms", "teacher_ms", "student_ms", "optimizer_ms"} <= lines[0].keys() and lines[0]["teacher_ms"] > 0


def test_the_structure_is_the_one_snapped_when_the_gates_stopped(chain: Path) -> None:
    folder = chain / "pruned"
    model = load(str(folder)).model
    dense = XVLM.build(model.config.copy(kept=None))
    scope = Scope.of(Anatomy.of(dense), 0.4)
    keep = snap(Gates.from_tensors(scope.units, load_file(folder / "gates.safetensors")).p_open().detach(), scope)
    kept = model.config.kept_indices()
    assert [unit.index in kept[unit.group] for unit in scope.units] == keep.tolist()


def test_recut_without_training_down_and_back_up(chain: Path, tmp_path: Path) -> None:
    more = recut(chain / "pruned", tmp_path / "more", 0.7)
    assert more.accounting["sparsity"]["achieved"] == pytest.approx(0.7, abs=0.01)
    less = recut(tmp_path / "more", tmp_path / "less", 0.2)
    assert less.accounting["sparsity"]["achieved"] == pytest.approx(0.2, abs=0.01)
    again = recut(chain / "pruned", tmp_path / "again", 0.2)
    files = ("model.safetensors", "config.json", "dense.safetensors", "gates.safetensors")
    assert [less.files[name].sha256 for name in files] == [again.files[name].sha256 for name in files]
    assert less.extra["budget"]["all"]["target"] == 0.2


def test_recut_equals_the_dense_weights_under_0_1_gates(chain: Path, tmp_path: Path) -> None:
    recut(chain / "pruned", tmp_path / "cut", 0.5)
    sliced = load(str(tmp_path / "cut")).model
    dense = XVLM.build(sliced.config.copy(kept=None)).eval()
    dense.load_state_dict(load_file(chain / "pruned" / "dense.safetensors"))
    units, kept = dense.units(), sliced.config.kept_indices()
    gates = torch.tensor([float(unit.index in kept[unit.group]) for unit in units])
    batch = sliced.example(2, 7)
    batch["pixels"] = torch.randint(0, 256, batch["pixels"].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), attach(dense, units) as hooks:
        hooks.set(gates)
        torch.testing.assert_close(dense.run(batch)["logits"], sliced.run(batch)["logits"], rtol=1e-5, atol=1e-5)


def test_tensors_are_on_the_disk_before_they_take_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (done.append(name), real(*args))[1])
    save_tensors({"a": torch.ones(2)}, tmp_path / DENSE)
    assert done == ["fsync", "replace", "fsync"] and torch.equal(load_file(tmp_path / DENSE)["a"], torch.ones(2))

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_tensors({"a": torch.zeros(2)}, tmp_path / DENSE)
    assert [path.name for path in tmp_path.iterdir()] == [DENSE] and load_file(tmp_path / DENSE)["a"].sum() == 2


def test_without_dense_weights_only_more_can_go(chain: Path, tmp_path: Path) -> None:
    manifest = prune(chain, tmp_path / "small", keep_dense=False)
    assert "dense.safetensors" not in manifest.files
    with pytest.raises(BadInput, match="is below the") as refused:
        recut(tmp_path / "small", tmp_path / "less", 0.2)
    assert refused.value.exit_code == 3 and not (tmp_path / "less").exists()
    assert recut(tmp_path / "small", tmp_path / "more", 0.6).accounting["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.01)


def test_a_recut_keeps_the_limits_of_the_first_cut(chain: Path, tmp_path: Path) -> None:
    limits = {"min_heads": 1, "round_to": 8, "kinds": ["head", "neuron"], "towers": ["vision", "text"]}
    prune(chain, tmp_path / "first", tower_sparsity={"vision": 0.3}, sparsity=0.1, **limits)
    again = recut(tmp_path / "first", tmp_path / "again", 0.15).config
    assert {name: again[name] for name in limits} == limits and not again["tower_sparsity"]
    free = recut(tmp_path / "first", tmp_path / "free", 0.2, min_heads=0, towers=["vision"]).config
    assert free["min_heads"] == 0 and free["round_to"] == 8 and free["towers"] == ["vision"]
    cut = stage_settings("prune", {"from_gates": str(tmp_path / "first"), "sparsity": 0.15, "out": "cut"})
    (notes,) = (stage.notes for stage in plan([Step("cut", "prune", cut)], QUIET).stages)
    assert any("budgets of single towers (vision 0.3)" in note for note in notes)


def test_what_is_gone_already_is_not_asked_for_again(chain: Path, tmp_path: Path) -> None:
    for settings in ({"sparsity": 0.3}, {"sparsity": 0.3, "budget": "macs"}):
        with pytest.raises(BadInput, match="nothing would be removed") as refused:
            prune(chain, tmp_path / "none", model=str(chain / "pruned"), **settings)
        assert "is gone already" in refused.value.why and not (tmp_path / "none").exists()


def test_a_dry_run_says_what_has_no_effect(chain: Path, tmp_path: Path) -> None:
    def notes(**values: Any) -> list[str]:
        config = stage_settings("prune", {"out": "cut", **values})
        return plan([Step("cut", "prune", config, idle.said(config, values))], QUIET).stages[0].notes

    prune(chain, tmp_path / "first", budget="macs")
    untrained = {"model": str(chain / "teacher"), "task": "none", "method": "magnitude", "text_length": 9}
    assert "text_length has no effect with budget parameters" in notes(**untrained)
    again = notes(from_gates=str(tmp_path / "first"), sparsity=0.6, text_length=9)
    assert not [note for note in again if "no effect" in note], "the budget is that of the first cut, and counts it"


@pytest.mark.parametrize("method", ["magnitude", "taylor", "random"])
def test_importance_criteria_meet_the_same_budget(method: str, chain: Path, tmp_path: Path) -> None:
    manifest = prune(chain, tmp_path / method, method=method)
    assert manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.005)
    assert "gates.safetensors" not in manifest.files
    with pytest.raises(BadInput, match="--method l0"):
        recut(tmp_path / method, tmp_path / "cut", 0.6)


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"towers": ["vision"], "sparsity": 0.2}, lambda units: all(u["kept"] == u["of"] for g, u in units.items() if "vision" not in g)),
        ({"kinds": ["neuron"]}, lambda units: all(u["kept"] == u["of"] for g, u in units.items() if "neuron" not in g)),
        ({"min_heads": 2, "min_neurons": 5}, lambda units: all(u["kept"] >= (5 if "neuron" in g else 2) for g, u in units.items())),
        ({"round_to": 8}, lambda units: all(u["kept"] % 8 == 0 for g, u in units.items() if "neuron" in g)),
    ],
)
def test_limits_hold(settings: dict[str, Any], check: Any, chain: Path, tmp_path: Path) -> None:
    manifest = prune(chain, tmp_path / "out", **settings)
    assert check(manifest.accounting["units"])
    assert manifest.accounting["sparsity"]["achieved"] >= settings.get("sparsity", 0.4)


def test_separate_budgets(chain: Path, tmp_path: Path) -> None:
    manifest = prune(chain, tmp_path / "out", tower_sparsity={"vision": 0.6}, sparsity=0.2)
    by_tower = manifest.accounting["sparsity"]["by_tower"]
    assert by_tower["vision"]["achieved"] == pytest.approx(0.6, abs=0.02)
    rest = [part for tower, part in by_tower.items() if tower != "vision"]
    assert 1 - sum(part["kept"] for part in rest) / sum(part["initial"] for part in rest) == pytest.approx(0.2, abs=0.02)
    assert set(manifest.extra["budget"]) == {"vision", "text+fusion+decoder"}


def test_a_target_that_cannot_be_met_is_refused_before_training(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetMissed, match="cannot be reached") as refused:
        prune(chain, tmp_path / "out", sparsity=0.9, min_neurons=16)
    assert refused.value.exit_code == 4 and not (tmp_path / "out").exists()


def test_a_teacher_that_answers_nothing_is_refused(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot answer questions"):
        prune(chain, tmp_path / "out", teacher=str(chain / "init"))


def test_a_teacher_of_another_width_is_refused(chain: Path, tmp_path: Path) -> None:
    sizes = {**SIZES, "text_width": 32}
    run_stage("init", out=str(tmp_path / "wide"), size="tiny", tokenizer=str(chain / "init"), settings=sizes)
    with pytest.raises(BadInput, match="text width 32 and 16"):
        prune(chain, tmp_path / "out", teacher=str(tmp_path / "wide"))
    with pytest.raises(BadInput, match="has no head for box, itc, itm, mlm"):
        run_stage("distill", out=str(tmp_path / "out"), model=str(chain / "student"), teacher=str(chain / "teacher"), data=SHAPES)
    assert not (tmp_path / "out").exists()


class Inner(Objective):
    """An objective that does nothing but hold a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, step: int) -> dict[str, torch.Tensor]:
        return {"loss": torch.zeros(())}


class FullStack(GateQuirks, VQAPruningQuirks):
    pass


def gated(quirks: GateQuirks, epoch: int = 4) -> tuple[Gated, Scope]:
    sizes = {"vision_layers": 2, "text_layers": 3, "fusion_layers": 3, "vision_heads": 2, "text_heads": 2, "local_attention_depth": 1}
    widths = {"vision_width": 8, "text_width": 8, "vision_intermediate": 6, "text_intermediate": 6, "vocab_size": 16, "image_size": 32}
    model = XVLM.build(XVLMConfig(**sizes, **widths, heads=[]))
    scope = Scope.of(Anatomy.of(model), 0.5)
    gates = Gates(scope.units, head_init=0.0)
    reads = released_rows(scope) if getattr(quirks, "mask_offsets", False) else None
    pruner = Pruner(model, scope, gates, steps=16, warmup_steps=8, epoch=epoch, quirks=quirks, reads=reads)
    return Gated(Inner(model), pruner), scope


def test_no_more_is_asked_for_than_fresh_gates_give_until_the_target_rises() -> None:
    objective, scope = gated(GateQuirks())
    model, fresh = objective.pruner.model, Gates(scope.units, head_init=2.0)

    def pruner(scope: Scope, hold: int) -> Pruner:
        objective.pruner.remove()
        made = objective.pruner = Pruner(model, scope, fresh, steps=20, hold_steps=hold, warmup_steps=10)
        return made

    published = pruner(scope, 0)
    assert [published.target(step).item() for step in (0, 5, 10)] == [0, 0.25, 0.5]
    little = pruner(Scope.of(Anatomy.of(model), 0.001), 6)
    assert little.target(0).item() == little.target(19).item() == pytest.approx(0.001)
    held = pruner(scope, 6)
    begin = held.budget.expected(fresh.p_open()).detach()
    assert 0.01 < begin.item() < 0.2 and held.penalty(6).item() == 0
    torch.testing.assert_close(torch.cat([held.target(step) for step in (0, 6)]), begin.expand(2))
    torch.testing.assert_close(held.target(11), (begin + 0.5) / 2)
    assert held.target(16).item() == held.target(19).item() == 0.5
    assert rise(7, 0.5, 0.5) == {"hold_steps": 4, "warmup_steps": 3} and rise(20, 0, 0.5) == {"hold_steps": 0, "warmup_steps": 10}


def applied(objective: Gated, scope: Scope, group: str) -> torch.Tensor:
    """The gates that the modules of `group` last saw."""
    tower, layer, kind = group.split(".")
    module = {"head": "attention.out", "cross_head": "cross_attention.out", "neuron": "ffn.fc2"}[kind]
    vector = objective.pruner.hooks._vectors[f"{tower}.layers.{layer}.{module}"]
    return vector if kind == "neuron" else vector.view(2, -1)[:, 0]


def test_fusion_gates_are_their_own_unless_the_quirk_is_on() -> None:
    """Released code: fusion layers read the concatenated text and fusion masks from row 0 (facts of the release)."""
    clean, scope = gated(GateQuirks())
    quirky, _ = gated(FullStack(mask_offsets=True))
    quirky.pruner.gates.load_state_dict(clean.pruner.gates.state_dict())
    clean({}, 0)
    quirky({}, 0)
    for group in ("vision.0.head", "text.1.neuron", "fusion.2.cross_head"):
        assert (group.startswith("fusion")) != torch.equal(applied(clean, scope, group), applied(quirky, scope, group))
    released = {
        "fusion.0.head": "text.0.head",
        "fusion.0.cross_head": "text.1.head",
        "fusion.1.head": "text.2.head",
        "fusion.1.cross_head": "fusion.0.head",
        "fusion.2.head": "fusion.0.cross_head",
        "fusion.2.cross_head": "fusion.1.head",
        "fusion.0.neuron": "text.0.neuron",
        "fusion.2.neuron": "text.2.neuron",
    }
    for group, source in released.items():
        assert torch.equal(applied(quirky, scope, group), applied(clean, scope, source)), group


def test_the_target_rises_once_unless_the_quirk_is_on() -> None:
    clean, _ = gated(GateQuirks())
    quirky, _ = gated(GateQuirks(epoch_step=True), epoch=8)
    steps = range(0, 24, 4)
    assert [float(clean.pruner.target(step)) for step in steps] == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.5])
    assert [float(quirky.pruner.target(step)) for step in steps] == pytest.approx([0, 0.25, 0, 0.25, 0, 0.25])


def test_a_frozen_structure_neither_moves_nor_pays() -> None:
    objective, scope = gated(GateQuirks())
    assert "lagrangian" in objective({}, 0)
    keep = torch.arange(len(scope.units)) % 2 == 0
    objective.pruner.settle(keep)
    losses = objective({}, 1)
    assert set(losses) == {"loss"}
    assert torch.equal(applied(objective, scope, "vision.0.neuron"), keep[scope_slice(scope, "vision.0.neuron")].float())
    resumed, _ = gated(GateQuirks())
    resumed.load_state_dict(objective.state_dict())
    assert set(resumed({}, 1)) == {"loss"}, "a state says that the structure is final"
    loose, _ = gated(GateQuirks(unfrozen_structure=True))
    loose.pruner.settle(keep)
    assert "lagrangian" in loose({}, 1)


@pytest.mark.parametrize("quirk", [False, True])
def test_gates_and_multipliers_learn_with_optimizers_of_their_own(quirk: bool) -> None:
    objective, _ = gated(GateQuirks(gates_in_main_optimizer=quirk))
    config = Prune(
        out="x", model="x", data="x", lr=1e-3, quirks={"gates_in_main_optimizer": quirk}, gates={"lr": 0.5, "multiplier_lr": 0.5}
    )
    chosen = objective.optimizers(config, [])
    before = objective.pruner.gates.log_alpha.detach().clone()
    objective({}, 4)["loss"].backward()
    update(chosen, 1.0, None, 0)
    line = objective.describe(4)
    gap = line["expected_sparsity"] - line["target_sparsity"]
    assert float(objective.pruner.budget.lambda1.detach()) * gap > 0.1 * abs(gap)  # ascends: the multiplier takes the sign of the gap
    objective({}, 4)["loss"].backward()
    update(chosen, 1.0, None, 1)
    assert float((objective.pruner.gates.log_alpha.detach() - before).abs().max()) > 0.1


def scope_slice(scope: Scope, group: str) -> slice:
    places = [at for at, unit in enumerate(scope.units) if unit.group == group]
    return slice(places[0], places[-1] + 1)
