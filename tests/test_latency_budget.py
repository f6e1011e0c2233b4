"""Budgets in milliseconds: the table, what units cost by it, what is refused, and that a run keeps to one table. No time here is real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compression_cases import CONFIGS, build
from conftest import SHAPES, TRAIN, run_stage
from doc_pages import script
from pydantic import ValidationError

from efficientvlm import families
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.budgets import cost_of, reachable
from efficientvlm.compression.latency import Check, Curve, LatencyTable, digest_of, rising
from efficientvlm.compression.probe import Probe
from efficientvlm.compression.pruner import Pruner
from efficientvlm.compression.snapping import snap
from efficientvlm.compression.sparsity import Budget
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.errors import BadInput, TargetMissed
from efficientvlm.loaded import Loaded, load
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.report.story import Chapter
from efficientvlm.report.structure import sparsities
from efficientvlm.runtime.hardware import machine_of
from efficientvlm.settings.amounts import amount_of
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.stages import Bench, Prune
from efficientvlm.stages import bench, budgeting, tabling
from efficientvlm.stages.budgeting import TABLE, read_table
from efficientvlm.stages.cutting import scope_of
from efficientvlm.tasks.known import TASKS

ABOUT = {"timed": bench.FORWARD, "model": "0" * 64, "precision": "fp32", "text_length": 12, "image_size": 16}
HERE = {"device": "cpu", "name": "a processor", "cpus": 1, "torch": "2", "threads": 1}


def made_up(network, rest_ms=10.0, **about) -> LatencyTable:
    """A table in which a layer costs a start of 1 ms, and then 0.3 ms a head or 0.01 ms a neuron, more in vision."""
    curves = []
    for name, count in network.config.original_counts().items():
        tower, layer, kind = name.split(".")
        each = (0.01 if kind == "neuron" else 0.3) * (2 if tower == "vision" else 1)
        at = sorted({0, 1, count})
        curves.append(Curve(tower=tower, kind=kind, layers=[int(layer)], counts=at, ms=[(1 + each * n) * (n > 0) for n in at]))
    whole = rest_ms + sum(curve.ms[-1] for curve in curves)
    fields = {**ABOUT, "machine": HERE, "batch": 8, "answers": 0, "rounds": 1, "scale": 1.0, "shapes": digest_of(network), **about}
    return LatencyTable(whole_ms=whole, rest_ms=rest_ms, curves=curves, **fields)


def on_meta(name):
    model, _ = build(name)
    return model.to("meta")


def drawn(model, share, seed):
    return torch.rand(len(model.units()), generator=torch.Generator().manual_seed(seed)) < share


def test_between_two_counts_time_is_linear_and_it_never_falls():
    curve = Curve(tower="a", kind="neuron", layers=[0], counts=[0, 1, 5, 8], ms=[0.0, 1.0, 3.0, 3.0])
    assert curve.at_every_count().tolist() == [0, 1_000_000, 1_500_000, 2_000_000, 2_500_000, 3_000_000, 3_000_000, 3_000_000, 3_000_000]
    assert curve.at_every_count(4).tolist() == [0, 625_000, 1_250_000, 1_875_000, 2_500_000, 2_625_000, 2_750_000, 2_875_000, 3_000_000]
    assert rising(np.array([0.0, 3.0, 1.0, 2.0, 5.0])).tolist() == [0, 2, 2, 2, 5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ms": [0.0, 0.0]},
        {"ms": [0.0, 1e10]},
        {"counts": [1, 2]},
        {"counts": [0, 2, 2], "ms": [0, 1, 2]},
        {"ms": [1.0, 0.5]},
        {"ms": [-1.0, 1.0]},
        {"ms": [0.0]},
        {"more": 1},
    ],
)
def test_a_curve_that_is_none_is_refused(wrong):
    with pytest.raises(ValidationError):
        Curve(**{"tower": "a", "kind": "head", "layers": [0], "counts": [0, 4], "ms": [0.0, 1.0]} | wrong)


@pytest.mark.parametrize("name", ["toy", "xvlm", "xvlm-swin", "xvlm-two-images", "blip-qa"])
def test_every_way_to_ask_for_milliseconds_agrees(name):
    model = on_meta(name)
    cost = cost_of(model, "latency", table=made_up(model))
    removed = ~drawn(model, 0.6, 3)
    order = np.flatnonzero(~removed.numpy())[::2]
    path = cost.path(removed, order)
    gone = removed.clone()
    for step, unit in enumerate(order[:9]):
        assert path[step] == cost.removed(gone)
        gone[unit] = True
    assert (np.diff(path) >= 0).all()
    assert cost.removed(removed) == sum(cost.removed(removed, [tower]) for tower in cost.whole)
    assert int(cost.costs.sum()) == sum(cost.totals.values()) == cost.removed(torch.ones_like(removed))
    assert cost.whole == cost.totals and cost.now == pytest.approx(1e6 * cost.table.whole_ms)
    for unit in np.flatnonzero(removed.numpy())[:5]:
        back = removed.clone()
        back[unit] = False
        assert cost.opening(removed)[unit] == cost.removed(removed) - cost.removed(back)


def test_what_is_left_of_a_network_costs_by_the_same_table():
    model = on_meta("xvlm")
    table = made_up(model)
    cost, keep = cost_of(model, "latency", table=table), drawn(model, 0.5, 1)
    keep[:4] = False
    with torch.device("meta"):
        smaller = slice_model(model, keep)
    again = cost_of(smaller, "latency", table=table)
    assert (again.now, again.rest, again.whole) == (cost.now - cost.removed(~keep), cost.rest, cost.whole)


def test_a_target_is_met_and_no_unit_could_come_back():
    model = on_meta("xvlm")
    cost = cost_of(model, "latency", table=made_up(model))
    to = amount_of("latency", "30ms")
    scope = reachable(model, 0.0, cost, to=to)
    keep = snap(torch.rand(len(scope.units), generator=torch.Generator().manual_seed(0)), scope)
    left = cost.now - cost.removed(~keep)
    assert left <= to < left + cost.opening(~keep)[~keep.numpy()].min()
    with pytest.raises(TargetMissed, match=r"10\.500 ms cannot be reached") as caught:
        reachable(model, 0.0, cost, to=amount_of("latency", "10.5ms"), min_heads=1)
    assert "the least is" in caught.value.why and "10.000 ms are of what no cut removes" in caught.value.why


def test_the_expected_time_is_that_of_the_expected_counts():
    model = on_meta("xvlm")
    cost = cost_of(model, "latency", table=made_up(model))
    scope = reachable(model, 0.1, cost, kinds=["neuron"], towers=["vision", "text"])
    keep = drawn(model, 0.5, 5) | ~torch.from_numpy(scope.active)
    open_ = keep[torch.from_numpy(scope.active)].float().requires_grad_()
    expected = Budget(scope).expected(open_)
    assert expected.item() == pytest.approx(cost.removed(~keep) / sum(cost.whole.values()), abs=1e-6)
    expected.sum().backward()
    slopes = {(unit.tower, float(grad)) for unit, grad in zip(scope.units, open_.grad, strict=True)}
    assert len(slopes) == 2 and all(grad < 0 for _, grad in slopes)
    by_tower = Budget(reachable(model, 0.1, cost, tower_sparsity={"vision": 0.5}))
    assert by_tower.expected(torch.ones(len(model.units()))).tolist() == pytest.approx([0.0] * len(by_tower.names), abs=1e-6)


def test_neurons_in_multiples_cost_what_whole_blocks_do():
    model = on_meta("xvlm-swin")
    cost = cost_of(model, "latency", table=made_up(model), round_to=3)
    scope = reachable(model, 0.5, cost, round_to=3)
    keep = snap(torch.rand(len(scope.units), generator=torch.Generator().manual_seed(2)), scope)
    assert scope.achieved(keep)["all"] >= 0.5
    with torch.device("meta"):
        kept = slice_model(model, keep).config.kept_indices()
    assert all(len(rows) % 3 == 0 or len(rows) == cost.table.by_group()[name].counts[-1] for name, rows in kept.items() if "neuron" in name)


def test_milliseconds_may_be_reached_where_the_multiply_adds_that_stand_in_are_not():
    model = on_meta("xvlm")
    table = made_up(model)
    for kind in ("head", "neuron"):
        most = {}
        for budget in ("macs", "latency"):
            scope = reachable(model, 0.0, cost_of(model, budget, table=table), kinds=[kind])
            most[budget] = scope.achieved(~torch.from_numpy(scope.active))["all"]
        if most["macs"] + 0.02 < most["latency"]:
            break
    wanted = most["macs"] + 0.01
    config = Prune(out="a", model="b", task="none", method="magnitude", budget="latency", sparsity=wanted, kinds=[kind])
    assert scope_of(config, model, table).targets[0].sparsity == wanted
    instead = scope_of(config, model)
    assert (instead.cost.budget, [target.sparsity for target in instead.targets]) == ("macs", [0.0])


def test_a_pruner_of_a_loop_of_ones_own_takes_a_table():
    model, _ = build("clip")
    table = made_up(model)
    pruner = Pruner.of(model, budget="latency", table=table, sparsity=0.5, steps=1)
    pruner.begin_step(0)
    pruner.penalty(0).backward()
    pruner.end_step(0)
    after = cost_of(pruner.finish(), "latency", table=table)
    assert sum(after.totals.values()) <= 0.5 * sum(after.whole.values())
    with pytest.raises(BadInput, match="needs a table"):
        Pruner.of(model, budget="latency", sparsity=0.5, steps=1)


def test_a_table_of_another_network_is_refused():
    table = made_up(on_meta("xvlm"))
    with pytest.raises(BadInput, match="another network"):
        cost_of(on_meta("xvlm-swin"), "latency", table=table)
    with pytest.raises(BadInput, match="another network"):
        cost_of(on_meta("xvlm"), "latency", table=table.model_copy(update={"curves": table.curves[1:]}))


class Ticks:
    """A clock that goes on by a step at each look, or by what modules take."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_with_a_unit_is_timed_where_it_stands(name):
    """Each module that holds weights takes a second, and so does what lies between two of one layer; nothing else does."""
    model, batch = build(name)
    clock = Ticks(1.0)
    with torch.inference_mode(), Probe(model, clock=clock) as probe:
        model.run(batch)
    assert probe.seconds.keys() == set(Anatomy.of(model).groups.names) and min(probe.seconds.values()) > 0
    assert sum(probe.seconds.values()) < clock.now
    model.run(batch)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def loaded_from(model) -> Loaded:
    return Loaded(Path("nowhere"), None, model, None, None)


def test_a_table_says_what_a_request_takes():
    """Time passes in the outputs of layers, by their columns, and outside of them."""
    model, batch = build("xvlm")
    clock, done = Ticks(), []

    def call_of(network):
        outputs = {gate.module for unit in network.model.units() for gate in unit.gates}
        modules = [network.model.get_submodule(name) for name in sorted(outputs)]
        for module in modules:
            inner = module.forward

            def forward(x, inner=inner, columns=module.weight.shape[1]):
                clock.now += 0.001 * columns
                return inner(x)

            module.forward = forward

        def call(size):
            clock.now += 0.5
            network.model.run(batch)

        return call

    table = tabling.measure(
        loaded_from(model), call_of, 2, rounds=2, warmup_rounds=1, clock=clock, progress=done.append, machine=HERE, **ABOUT
    )
    assert done == list(range(1, 3 * tabling.ROUND + 1)) and table.scale == pytest.approx(1)
    assert table.rest_ms == pytest.approx(500) and table.batch == 2
    curve = next(curve for curve in table.curves if (curve.tower, curve.kind) == ("vision", "head"))
    assert curve.layers == [0, 1] and curve.counts == [0, 1, 2, 3, 4] and curve.ms == pytest.approx([0, 4, 8, 12, 16])
    assert all(check.predicted_ms == pytest.approx(check.measured_ms) for check in table.checks)
    assert [check.part for check in table.checks] == list(tabling.PARTS)
    assert cost_of(model, "latency", table=table).now == pytest.approx(1e6 * table.whole_ms, rel=1e-6)


@pytest.mark.parametrize(
    ("part", "of", "step", "count"),
    [(1, 3072, 1, 3072), (0.5, 3072, 1, 1537), (0.5, 3072, 16, 1536), (0, 12, 1, 1), (0, 48, 16, 16), (0.5, 5, 8, 5)],
)
def test_counts_that_are_timed(part, of, step, count):
    assert tabling.count_at(part, of, step) == count


@pytest.mark.parametrize(("text", "amount"), {"20ms": 20_000_000, "1.5 s": 1_500_000_000, "250us": 250_000}.items())
def test_amounts_of_time(text, amount):
    assert amount_of("latency", text) == amount


@pytest.mark.parametrize("text", ["20", "20M", "-1ms", "0ms", "ms"])
def test_no_amounts_of_time(text):
    with pytest.raises(ValueError, match=r"no time|not between"):
        amount_of("latency", text)


def test_settings():
    with pytest.raises(ValidationError, match="one model"):
        Bench(models=["a"], table=True)
    with pytest.raises(ValidationError):
        Prune(out="a", model="b", task="none", method="magnitude", budget="latency", to="3M")
    assert Bench(models=["a"], table=True, batch_sizes=[2]).table


@pytest.fixture
def instead(monkeypatch):
    """What stands in for a measurement: made-up milliseconds, and how often it was called."""
    calls = []

    def measure(loaded, call_of, batch, *, rounds, warmup_rounds, round_to, progress, synchronise=None, clock=None, **about):
        calls.append(about["timed"])
        call_of(loaded)  # what is timed can be made
        return made_up(loaded.model, batch=batch, answers=len(loaded.config.answers or []), **about)

    monkeypatch.setattr(tabling, "measure", measure)
    return calls


def test_a_cut_by_milliseconds_says_what_it_counted(chain, tmp_path, instead, evlm):
    """By the command line: a table is measured, and one that is given is read; the page draws both."""
    file, source = tmp_path / "table.json", chain / "teacher"
    code, _, _ = evlm("bench", "--model", source, "--table", "--batch-size", 8, "--rounds", 1, "--out", file, "--quiet")
    assert code == 0 and len(instead) == 1
    table = read_table(file)
    whole, to = table.whole_ms, round(0.8 * table.whole_ms, 3)
    common = ("prune", "--model", source, "--task", "none", "--set", "method=magnitude", "--budget", "latency", "--quiet")
    assert evlm(*common, "--table", file, "--to", f"{to}ms", "--out", tmp_path / "cut")[0] == 0 and len(instead) == 1
    manifest = require_complete(tmp_path / "cut")
    cost = manifest.extra["cost"]
    assert (cost["budget"], cost["unit"], cost["to"]) == ("latency", "ns", round(to * 1e6))
    assert cost["before"] == pytest.approx(whole * 1e6) and cost["after"] <= cost["to"] and cost["table"]["batch"] == 8
    assert manifest.inputs["table"] and read_table(tmp_path / "cut") == table and TABLE in manifest.files
    kept = sum(part["kept"] for part in cost["by_tower"].values())
    assert cost["rest"] + kept == cost["after"]
    page = sparsities([Chapter(tmp_path / "cut", "cut", "cut", manifest, None)])
    assert (cost["whole"], cost["part"]) == (cost["before"], pytest.approx(0.8, abs=1e-3))
    assert "what was asked is 0.80 of the" in page and "ms of the uncut one when the table was made" in page
    assert "ms kept" in page and f"{kept / 1e6:,.6g}" in page
    assert evlm(*common, "--sparsity", 0.3, "--out", tmp_path / "again")[0] == 0 and len(instead) == 2
    assert read_table(tmp_path / "again").batch == 8
    code, _, said = evlm(*common, "--to", "1ms", "--out", tmp_path / "none")
    assert code == 4 and "1.000 ms cannot be reached" in said and "the least is" in said and not (tmp_path / "none").exists()
    code, _, said = evlm(*common, "--table", file, "--to", f"{whole + 1}ms", "--out", tmp_path / "none")
    assert code == 3 and "the network has" in said


def test_tables_that_do_not_fit_are_refused_or_said(chain, tmp_path, instead, capsys):
    source = load(str(chain / "teacher"))
    task = bench.timed_of([source])
    fields = {"timed": task.timed_as, "image_size": source.sizes.image_size, "answers": len(source.config.answers)}
    table = made_up(source.model, **fields)
    common = {"model": str(chain / "teacher"), "task": "none", "method": "magnitude", "budget": "latency", "sparsity": 0.3}

    def cut(name, **changes):
        file = tmp_path / f"{name}.json"
        file.write_bytes(budgeting.as_json(table.model_copy(update=changes)))
        run_stage("prune", out=str(tmp_path / name), table=str(file), **common)
        return capsys.readouterr().err

    assert "of another machine (name a processor" in cut("machine")
    assert "(device a toaster" in cut("device", machine={**HERE, "device": "a toaster"})
    here = {**machine_of(torch.device("cpu")), "threads": 1}
    assert "another machine" not in cut("here", machine=here)
    assert "of another machine (instructions of 1999)" in cut("older", machine={**here, "instructions": "of 1999"})
    assert "the pruned model has" in cut("answers", answers=3)
    check = Check(part=0.5, measured_ms=9.0, predicted_ms=6.0)
    assert "not to be trusted: with 0.50 of the units a request took 9.00 ms, by the table 6.00 ms" in cut("noisy", checks=[check])
    assert "not to be trusted" not in cut("calm", checks=[check.model_copy(update={"measured_ms": 7.0})])
    for name, changes in {"shapes": {"shapes": "1" * 64}, "timed": {"timed": "a walk"}, "image": {"image_size": 7}}.items():
        with pytest.raises(BadInput, match=r"another (network|request)"):
            cut(name, **changes)
    (tmp_path / "broken.json").write_text(json.dumps({"stage": "bench", "table": {"timed": 3}}))
    for file in ("broken.json", "missing.json"):
        with pytest.raises(BadInput, match=r"latency table|no such|not there|does not exist"):
            run_stage("prune", out=str(tmp_path / "never"), table=str(tmp_path / file), **common)
    assert not instead


def test_a_run_goes_on_and_is_cut_again_by_its_own_table(chain, tmp_path, instead, monkeypatch):
    """Learnt gates: one measurement, kept with the state, in the checkpoint, and used by the re-cut."""
    from efficientvlm.stages import prune

    settings = {**TRAIN, "model": str(chain / "distilled"), "data": SHAPES, "sparsity": 0.4, "budget": "latency", "save_every": 2}
    settings["requests"] = {"rounds": 3}
    out = tmp_path / "pruned"
    trained = prune.Pruning.train
    monkeypatch.setattr(prune.Pruning, "train", lambda *given: trained(*given) and (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(BaseException) as stopped:
        run_stage("prune", out=str(out), **settings)
    assert type(stopped.value).__name__ in ("Interrupted", "KeyboardInterrupt") and len(instead) == 1
    monkeypatch.setattr(prune.Pruning, "train", trained)
    run_stage("prune", out=str(out), **settings)
    assert len(instead) == 1, "what goes on measures nothing anew"
    manifest = require_complete(out)
    assert manifest.extra["budget"]["all"]["achieved"] >= 0.4 and manifest.extra["budget"]["all"]["expected"] >= 0
    common = {"from_gates": str(out), "limit": 40, "eval_limit": 2}
    run_stage("prune", out=str(tmp_path / "cut"), sparsity=0.6, **common)
    again = require_complete(tmp_path / "cut")
    assert len(instead) == 1 and read_table(tmp_path / "cut") == read_table(out)
    assert again.config["budget"] == "latency" and again.extra["budget"]["all"]["achieved"] >= 0.6
    run_stage("prune", out=str(tmp_path / "other"), sparsity=0.6, requests={"batch_size": 2}, **common)
    assert len(instead) == 2 and read_table(tmp_path / "other").batch == 2
    requests = require_complete(tmp_path / "other").config["requests"]
    assert requests == {**manifest.config["requests"], "batch_size": 2}, "the others stay as they were"


def test_a_recipe_that_is_finished_is_planned_as_such(chain, tmp_path, instead):
    file, cut = tmp_path / "table.json", tmp_path / "cut"
    common = {"model": str(chain / "teacher"), "task": "none", "method": "magnitude", "budget": "latency", "sparsity": 0.3}
    settings = {"time": ("bench", {"models": [str(chain / "teacher")], "table": True, "batch_sizes": [8], "rounds": 1, "out": str(file)})}
    settings["cut"] = ("prune", {**common, "table": str(file), "out": str(cut)})
    steps = [Step(name, stage, stage_settings(stage, values)) for name, (stage, values) in settings.items()]
    for made in ("new", "up to date"):
        planned = plan(steps, Control(quiet=True))
        assert not planned.problems.found and [stage.status for stage in planned.stages] == [made, made]
        for stage, values in settings.values():
            run_stage(stage, **values)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch": 0}, "batch"),
        ({"precision": "fp3"}, "precision"),
        ({"text_length": -3}, "text_length"),
        ({"machine": {}}, "machine says nothing of device, name, threads, torch"),
        ({"whole_ms": 0.0}, "layers and rest take"),
        ({"rest_ms": 500.0}, "layers and rest take"),
        ({"curves": "twice"}, "two curves"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(wrong, said, tmp_path):
    values = made_up(on_meta("toy")).model_dump(mode="json")
    values |= {"curves": [*values["curves"], values["curves"][0]]} if wrong.get("curves") else wrong
    (tmp_path / "table.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match=said):
        read_table(tmp_path / "table.json")


def test_what_a_run_refuses_a_plan_refuses(chain, tmp_path):
    source = load(str(chain / "teacher"))
    file = tmp_path / "walk.json"
    file.write_bytes(budgeting.as_json(made_up(source.model, timed="a walk", image_size=source.sizes.image_size)))
    common = {"model": str(chain / "teacher"), "task": "none", "method": "magnitude", "budget": "latency", "sparsity": 0.3, "out": "cut"}
    for more, said in (({"table": str(file)}, "another request"), ({"requests": {"device": "cuda"}}, "layers cannot be timed")):
        if more.get("requests") and torch.cuda.is_available():
            continue
        made = plan([Step("cut", "prune", stage_settings("prune", {**common, **more}))], Control(quiet=True))
        assert [problem for problem in made.problems.found if said in str(problem.as_dict())]


def test_a_network_without_a_task_is_budgeted_by_its_forward_pass():
    """A BLIP of pre-training would become another network, to describe images: its table is of what it is."""
    model = on_meta("blip-pretraining")
    family = families.get("blip")
    loaded = Loaded(Path("x"), family, model, None, None)
    assert bench.tabled(loaded, TASKS["captioning"]) is None and bench.tabled(loaded, None) is None
    able = Loaded(Path("x"), family, on_meta("blip-caption"), None, None)
    assert bench.tabled(able, TASKS["captioning"]) is TASKS["captioning"]


def test_the_least_time_that_is_named_can_be_asked_for():
    model = on_meta("xvlm")
    cost = cost_of(model, "latency", table=made_up(model, rest_ms=10.0004561))
    with pytest.raises(TargetMissed) as caught:
        reachable(model, 0.0, cost, to=amount_of("latency", "1us"))
    (least,) = re.findall(r"the least is ([\d.]+) ms", caught.value.why)
    assert reachable(model, 0.0, cost, to=amount_of("latency", f"{least}ms"))


def test_a_plan_measures_nothing(chain, tmp_path, instead, evlm):
    words = ("prune", "--model", chain / "teacher", "--task", "none", "--set", "method=magnitude", "--out", tmp_path / "cut", "--dry-run")
    code, out, _ = evlm(*words, "--to", "20ms")
    assert code == 0 and "is measured when the stage runs" in out and not instead and not (tmp_path / "cut").exists()


@pytest.mark.slow
def test_the_benchmark_compares_what_was_asked_with_what_is_timed(tmp_path, instead):
    """Of a tiny network; the table is made up, the rows are those of the CSV."""
    figures = script("benchmarks/latency_budget.py")
    way = figures.Way(rounds=1, table_rounds=1)
    figures.SHAPES["image_size"] = 32
    (path,) = figures.run(tmp_path / "work", ["0.8", "sparsity=0.3"], "tiny", way, tmp_path)
    whole, part, share = script("benchmarks/published.py").rows_of(path)
    assert [row["target"] for row in (whole, part, share)] == ["whole", "0.8", "sparsity=0.3"]
    table = read_table(way.folder(tmp_path / "work", "tiny") / "table.json")
    assert float(part["asked_ms"]) == pytest.approx(0.8 * table.whole_ms, rel=1e-4)
    assert float(part["table_ms"]) <= float(part["asked_ms"]) and float(share["sparsity_of_ms"]) >= 0.3
    assert all(float(row["measured_over_asked"]) > 0 and row["clock"] == "wall" for row in (whole, part, share))
