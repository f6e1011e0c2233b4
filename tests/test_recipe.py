"""Recipes are checked completely before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientvlm import recipe as recipes
from efficientvlm.errors import BadInput
from efficientvlm.recipe import load_recipe, validate
from efficientvlm.settings.base import merge, parse
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.idle import refused, said
from efficientvlm.settings.stages import Distill, InitConfig, Prune

CHAIN = """
name: chain
out: runs/chain
defaults: {seed: 7, data: shapes, device: cpu}
stages:
  - {name: student, stage: shrink, model: bundled:teacher, layers: {vision: 2, text: [0, 1]}}
  - {name: distilled, stage: distill, model: "@student", teacher: bundled:teacher, weights: {vision_hidden: 0.5}}
  - {name: small, stage: prune, model: "@distilled", sparsity: 0.3, gates: {lr: 3e-2}}
  - {name: test, stage: eval, model: "@small"}
  - {name: speed, stage: bench, models: ["@student", "@small"]}
  - {name: end, stage: report, models: {small: "@small"}, evals: {small: "@test"}, bench: "@speed"}
"""


def recipe(tmp_path: Path, text: str) -> recipes.Recipe:
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path))


def configs(tmp_path: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return {step.name: step.config for step in validate(recipe(tmp_path, CHAIN), overrides, **options)}


def problems(loaded: recipes.Recipe, *overrides: str) -> list[str]:
    with pytest.raises(BadInput) as error:
        validate(loaded, overrides)
    return [line.strip() for line in error.value.why.strip().splitlines()]


def test_references_defaults_and_nested_settings(tmp_path: Path) -> None:
    steps = validate(recipe(tmp_path, CHAIN))
    assert [(step.name, step.stage) for step in steps][:2] == [("student", "shrink"), ("distilled", "distill")]
    found = {step.name: step.config.model_dump() for step in steps}
    assert found["student"]["layers"] == {"vision": 2, "text": [0, 1]} and found["student"]["seed"] == 7
    assert found["distilled"]["model"] == "runs/chain/student" and found["distilled"]["data"] == "shapes"
    assert isinstance(steps[1].config, Distill) and steps[1].config.weights.vision_hidden == 0.5
    assert isinstance(steps[2].config, Prune) and steps[2].config.gates.lr == 0.03
    assert found["speed"]["models"] == ["runs/chain/student", "runs/chain/small"]
    assert found["end"]["evals"] == {"small": "runs/chain/test.json"} and found["end"]["bench"] == "runs/chain/speed.json"
    assert found["test"]["out"] == "runs/chain/test.json" and found["end"]["out"] == "runs/chain/end"


def test_overrides_reach_one_stage_the_defaults_and_the_folder(tmp_path: Path) -> None:
    found = configs(tmp_path, "small.sparsity=0.6", "small.gates.multiplier_lr=3e-3", "batch_size=8", "data=easy-vqa", out="elsewhere")
    assert found["small"].sparsity == 0.6 and found["small"].gates.multiplier_lr == 0.003 and found["small"].gates.lr == 0.03
    assert found["small"].batch_size == found["distilled"].batch_size == 8 and found["distilled"].data == "easy-vqa"
    assert found["small"].out == "elsewhere/small" and found["small"].model == "elsewhere/distilled"


def test_an_output_of_its_own_is_followed(tmp_path: Path) -> None:
    assert configs(tmp_path, "student.out=/big/disk")["distilled"].model == "/big/disk"


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    text = """
name: bad
defaults: {sed: 1, seed: 0}
stages:
  - {name: a, stage: shrnk, model: x}
  - {name: b, stage: distill, model: "@c", teacher: "@a", data: d, learning_rate: 1, epochs: -1}
  - {name: b, stage: prune, model: m, data: d, gates: {multiplier: 1}}
  - {name: "../up", stage: prune}
  - {stage: eval}
  - {name: last}
"""
    found = problems(recipe(tmp_path, text))
    for expected in (
        "defaults: sed: unknown key, did you mean seed?",
        "a: stage: unknown stage 'shrnk', did you mean shrink?",
        "b: @c is no earlier stage; earlier are a",
        "b: learning_rate: unknown key",
        "b: epochs: input should be greater than 0",
        "b: there are two stages of this name",
        "b: gates.multiplier: unknown key, did you mean multiplier_lr?",
        "../up: a stage needs a name of letters, digits, - and _",
        "stage 5: a stage needs a name of letters, digits, - and _",
        "last: stage: missing",
    ):
        assert any(line.startswith(expected) for line in found), (expected, found)
    assert len(found) == 10


def test_overrides_that_would_change_nothing_are_problems(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, CHAIN)
    assert problems(loaded, "sparsity=0.5") == [
        "--set sparsity=0.5: every stage sets sparsity itself, write for example --set small.sparsity=0.5"
    ]
    assert problems(loaded, "xyzzy=1") == ["defaults: xyzzy: unknown key: no stage of this recipe has it"]
    assert problems(loaded, "small.sparsty=0.5") == ["small: sparsty: unknown key, did you mean sparsity?"]
    with pytest.raises(BadInput, match="not key=value"):
        validate(loaded, ["small.sparsity"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a mapping"),
        ("- a\n- b\n", "not a mapping"),
        ("just text", "not a mapping"),
        ("name: a\nname: b\n", "line 2: the key name is there twice"),
        ("name: a\nstages:\n  - {name: x, stage: eval, model: a, model: b}\n", "line 3: the key model is there twice"),
        ("name: [1, 2\n", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['echo no']\n", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "references with"),
        ("1: a\n", "is not a text"),
        ("{{}: 1}\n", "not valid YAML|is not a text"),
        ("name: a\n", "stages: field required"),
        ("name: a\nstages: []\n", "stages"),
        ("name: a\nstages: [1]\n", "stages.0"),
        ("name: a\nstage: []\nstages: [{}]\n", "unknown key, did you mean stages"),
        ("name: 2030-13-45\nstages: [{}]\n", "not valid YAML|name"),
        ("a: " + "[" * 3000, "nested too deeply|not valid YAML"),
        ("name: \x07\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as error:
        recipe(tmp_path, text)
    assert "some.yaml" in error.value.what


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2**20 + 1))
    (tmp_path / "folder.yaml").mkdir()
    for name in ("latin.yaml", "huge.yaml", "folder.yaml", "missing.yaml", "nul\0.yaml"):
        with pytest.raises(BadInput, match=r"cannot be read|is too large"):
            load_recipe(str(tmp_path / name))
    with pytest.raises(BadInput, match="there is no recipe 'quikstart'") as error:
        load_recipe("quikstart")
    assert error.value.fix == "did you mean quickstart?"


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab@:-[]{},&*!|> \n\t'\"0.~", max_size=60))
def test_any_text_is_read_or_refused_politely(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(f"name: x\nstages: [{{name: a, stage: eval}}]\ndefaults:\n  {text}", encoding="utf-8")
    try:
        validate(load_recipe(str(path)))
    except BadInput as error:
        assert error.what and error.why


@pytest.mark.parametrize("name", recipes.names())
def test_the_recipes_of_the_package_are_valid(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.name == name.replace("/", "-") and loaded.description
    assert validate(loaded)


@pytest.mark.parametrize("name", ["../../ESC", "/tmp/x", "..", "a/b", ".hidden", "", "x" * 100_000, "a\nb", "a\\b"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="name: ") as error:
        recipe(tmp_path, yaml.safe_dump({"name": name, "stages": [{"name": "a", "stage": "init"}]}))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("out", ["/", "..", ".", "a/../..", "../beside", "~", "~/runs", "/elsewhere"])
def test_who_wrote_a_recipe_does_not_choose_a_place_outside_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="not inside the working folder"):
        recipe(tmp_path, f"name: a\nout: {out!r}\nstages: [{{name: a, stage: init}}]\n")
    mine = recipe(tmp_path, f"name: a\nout: runs/../x\nstages: [{{name: a, stage: shrink, model: m, out: {out!r}}}]\n")
    assert "not inside the working folder" in problems(mine)[0]
    (step,) = validate(mine, [f"a.out='{out}'"])
    assert step.config.model_dump()["out"] == out


def test_outputs_do_not_overlap(tmp_path: Path) -> None:
    text = """
stages:
  - {name: a, stage: shrink, model: m, out: o}
  - {name: b, stage: shrink, model: m, out: o/b}
  - {name: c, stage: eval, model: m, data: d, out: "x/../o/e.json"}
  - {name: d, stage: shrink, model: m, out: ./o/}
  - {name: e, stage: prune, model: m, data: d, towers: []}
"""
    assert problems(recipe(tmp_path, text)) == [
        "e: towers: it has no entries, and takes at least 1",
        "d: out: a writes to ./o/ too",
        "b: out: it is inside the output of a",
        "c: out: it is inside the output of a",
    ]


def test_a_default_that_every_stage_overrides_is_looked_at_too(tmp_path: Path) -> None:
    text = "defaults: {model: [[1]], seed: -1}\nstages: [{name: a, stage: shrink, model: m, seed: 1}]\n"
    found = problems(recipe(tmp_path, text))
    assert [line[:22] for line in found] == ["defaults: model: input", "defaults: seed: input "]


def test_a_recipe_of_many_wrong_stages_is_a_short_message(tmp_path: Path) -> None:
    loaded = recipe(
        tmp_path, "stages:\n" + "".join(f"  - {{name: s{number}, stage: nope, model: '@{'x' * 500}'}}\n" for number in range(900))
    )
    with pytest.raises(BadInput) as error:
        validate(loaded)
    assert "900 problems" in error.value.what and len(error.value.why) < 20_000 and "and 851 more" in error.value.why
    with pytest.raises(BadInput, match="stages: it has 20000 entries, and takes at most 1000"):
        recipe(tmp_path, "stages:\n" + "  - {a: b}\n" * 20_000)


@pytest.mark.parametrize(
    "text",
    [
        *("!!int ''", "!!float ''", "!!int '+'", "!!timestamp x", "!!bool x", "!!set [a]", "!!map [1]", '"\\UFFFFFFFF"', "2001-99-99"),
        *("1" + ":59" * 5000 + ".5", "9" * 5000, "[" * 3000, "!!binary '\u00e9'", "!!omap 1", "!!pairs [[1]]", "!!str {a: 1}"),
        *("<<: 1", "!!python/name:os.system x"),
    ],
)
def test_what_the_yaml_library_fails_on_is_bad_input_at_every_door(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput):
        validate(recipe(tmp_path, f"description: {text}\nstages: [{{name: a, stage: init}}]\n"))
    with pytest.raises(BadInput):
        parse(InitConfig, merge({"out": "o"}, [f"seed={text}"]), "init")


def test_a_recipe_has_a_limit_and_is_a_file(tmp_path: Path) -> None:
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(8_000_000_000)
    os.symlink("/dev/zero", tmp_path / "device.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, reason in (("sparse", "too large"), ("device", "a device"), ("pipe", "nobody writes")):
        with pytest.raises(BadInput, match=reason):
            load_recipe(str(tmp_path / f"{name}.yaml"))


def test_many_keys_are_read_in_linear_time(tmp_path: Path) -> None:
    keys = 20_000
    text = "description: {" + ", ".join(f"k{number}: 1" for number in range(keys)) + "}\nstages: [{name: a, stage: init}]\n"
    with pytest.raises(BadInput, match="description"):
        recipe(tmp_path, text)
    with pytest.raises(BadInput, match="k5 is there twice"):
        recipe(tmp_path, text.replace("k7:", "k5:"))


def test_numbers_with_an_exponent_are_numbers() -> None:
    assert merge({}, ["lr=3e-4", "name=e4", "many=1E3"]) == {"lr": 3e-4, "name": "e4", "many": 1000.0}


UNTRAINED = """
name: cut
out: runs/cut
defaults: {lr: 1e-3, device: cuda, data: shapes, teacher: null}
stages:
  - {name: small, stage: prune, model: bundled:easy-vqa, task: none, method: magnitude%s}
  - {name: tuned, stage: finetune, model: "@small", kd: 0.2, epochs: 2}
"""


def test_settings_that_do_nothing_are_refused_where_nothing_is_trained_and_said_elsewhere(tmp_path: Path) -> None:
    steps = validate(recipe(tmp_path, UNTRAINED % ""))  # a default may be meant for the other stages
    assert [list(step.notes) for step in steps] == [[], ["kd has no effect without a teacher"]]
    captions = "name: c\nstages: [{name: c, stage: finetune, task: captioning, model: bundled:easy-vqa-pretrained, data: shapes, %s}]"
    for chosen, wanted in (
        (
            "self_critical: true, samples: 2, smoothing: published",
            "smoothing has no effect with self_critical",
        ),
        ("smoothing: published, samples: 2", "samples has no effect without self_critical"),
    ):
        assert [list(step.notes) for step in validate(recipe(tmp_path, captions % chosen))] == [[wanted]]
    loaded = recipe(tmp_path, UNTRAINED % ", epochs: 3, min_heads: 1, batch_size: 64")
    assert problems(loaded, "small.device=cuda", "small.clip=2") == [
        "small: clip: it has no effect, as nothing is trained with task none",
        "small: device: it has no effect, as nothing is trained with task none",
        "small: epochs: it has no effect, as nothing is trained with task none",
    ]


@pytest.mark.parametrize(
    ("stage", "values", "idle"),
    [
        ("shrink", {"model": "m", "precision": "bf16", "device": "cpu"}, ["precision"]),
        ("shrink", {"model": "m", "device": "cuda"}, ["device"]),
        ("init", {"tokenizer": "t", "vocab_size": 99, "size": "tiny"}, ["vocab_size"]),
        (
            "pretrain",
            {"model": "m", "data": "d", "losses": ["itc"], "max_masks": 2, "regions_per_image": 2},
            ["max_masks", "regions_per_image"],
        ),
        ("finetune", {"model": "m", "data": "d", "val": "v", "val_fraction": 0.5, "shuffle_buffer": 7}, ["shuffle_buffer", "val_fraction"]),
        ("finetune", {"model": "m", "data": "stream:d", "teacher": "t", "kd": 0.1, "shuffle_buffer": 7}, []),
        ("prune", {"model": "m", "data": "d", "method": "random", "freeze_at": 0.5}, ["freeze_at"]),
        ("prune", {"model": "m", "data": "d", "freeze_at": 0.5, "calibration_batches": 3}, ["calibration_batches"]),
        ("eval", {"model": "m", "data": "d", "mode": "generate", "rank_top": 5}, ["rank_top"]),
        ("export", {"model": "m", "format": "hf", "rounds": 3}, ["rounds"]),
    ],
)
def test_settings_that_have_no_effect_beside_others(stage: str, values: dict[str, Any], idle: list[str]) -> None:
    config = stage_settings(stage, {**values, **({} if stage == "eval" else {"out": "o"})})
    assert [line.split()[0] for line in said(config, config.model_fields_set)] == idle
    assert refused(config, config.model_fields_set) == []


def test_a_cut_from_learnt_gates_needs_no_training() -> None:
    values = {"model": "m", "data": "d", "out": "o", "from_gates": "m", "lr": 1, "eval_limit": 3, "teacher": "t", "min_heads": 1}
    config = stage_settings("prune", {**values, "task": "vqa", "questions_per_image": 2, "rank_top": 3})
    assert [line.partition(":")[0] for line in refused(config, config.model_fields_set)] == ["lr", "questions_per_image", "teacher"]


def test_a_stage_that_is_no_name_is_a_problem_beside_overrides(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nstages:\n  - {name: a, stage: [1, x], model: m}\n  - {name: b, stage: shrink, model: m}\n")
    with pytest.raises(BadInput, match="stage"):
        validate(load_recipe(str(tmp_path / "r.yaml")), ["x.name=null"])
