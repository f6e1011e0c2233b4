"""A plan says what a stage would make before it makes it, opens no weights, and finds everything that is wrong at once."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compression_cases import CONFIGS, network
from conftest import PRUNE, SHAPES, SIZES, TRAIN, run_stage
from PIL import Image

from efficientvlm import families
from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.folder import MANIFEST, Output
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.sparsity import Scope
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.data.tokenizer import load_tokenizer, save_tokenizer
from efficientvlm.errors import BadInput
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.loaded import load, shapes
from efficientvlm.objectives import teachers
from efficientvlm.planning import costs
from efficientvlm.planning.checks import preflight
from efficientvlm.planning.forecast import uniform_cut
from efficientvlm.planning.measure import measure, ready
from efficientvlm.planning.plan import Plan, plan
from efficientvlm.recipe import Step, names
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.methods import DistillWeights, TaskWeights
from efficientvlm.training.loop import update
from efficientvlm.training.state import tensors_of


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def step(name: str, stage: str | None = None, **settings: Any) -> Step:
    stage = stage or name
    return Step(name, stage, stage_settings(stage, {"out": f"out/{name}", **settings}))


def said(made: Plan) -> str:
    return "\n".join(f"{problem.stage}: {problem.error}" for problem in made.problems.found)


def steps_of(chain: Path) -> dict[str, Step]:
    """The stages of the session's chain, written elsewhere."""
    return {
        "student": step("student", "shrink", model=str(chain / "init")),
        "distilled": step("distilled", "distill", model="out/student", teacher=str(chain / "init"), data=SHAPES, **TRAIN),
        "pruned": step("pruned", "prune", **{**PRUNE(chain), "model": "out/distilled"}, **TRAIN),
        "teacher": step("teacher", "finetune", model=str(chain / "init"), data=SHAPES, **TRAIN),
    }


@pytest.fixture(scope="module")
def planned(chain: Path) -> Plan:
    return plan(list(steps_of(chain).values()), Control(quiet=True), measure=1)


def test_the_plan_of_a_chain_is_what_the_chain_became(chain: Path, planned: Plan) -> None:
    made = planned
    assert not made.problems.found, said(made)
    assert not Path("out").exists()
    for stage in made.stages:
        real = manifest.read(chain / stage.name)
        assert stage.status == "new" and stage.after and stage.disk
        if stage.name == "pruned":
            assert stage.structure and stage.structure.startswith("uniform cut")
            assert 0.4 <= stage.after["sparsity"] < 0.42
        else:
            assert stage.structure == "exact"
            assert stage.after["parameters"] == real.accounting["parameters"] and stage.after["macs"] == real.accounting["macs"]
            assert stage.disk["output"] == pytest.approx(real.files["model.safetensors"].bytes, rel=0.2)  # few tensors, long names
            assert stage.disk["output"] < real.files["model.safetensors"].bytes
    pruned = made.stages[2]
    assert pruned.before and pruned.after and pruned.schedule
    assert pruned.after["parameters"]["by_tower"]["decoder"] and "decoder" not in pruned.before["parameters"]["by_tower"]
    assert pruned.schedule["steps"] == 6 and pruned.schedule["images"] == 40 and pruned.schedule["images_seen"] == 24
    assert pruned.teacher and pruned.teacher["path"] == str(chain / "teacher")


def test_steps_and_epochs_are_those_of_the_index_plan(chain: Path) -> None:
    (stage,) = plan([step("finetune", model=str(chain / "teacher"), data="easy-vqa", epochs=2, batch_size=64, save_every=50)]).stages
    expected = {"images": 3600, "steps_per_epoch": 56, "steps": 112, "epochs": 2.0, "images_seen": 7168, "saves": 3}
    assert stage.schedule and expected.items() <= stage.schedule.items()


def test_a_recut_is_planned_exactly(chain: Path, tmp_path: Path) -> None:
    settings = {"model": str(chain / "pruned"), "from_gates": str(chain / "pruned"), "data": SHAPES, "sparsity": 0.6, "limit": 40}
    (stage,) = plan([step("cut", "prune", **settings)]).stages
    run_stage("prune", **settings, eval_limit=4, out=str(tmp_path / "cut"))
    real = manifest.read(tmp_path / "cut").accounting
    assert stage.structure == "exact" and stage.after
    assert stage.after["parameters"] == real["parameters"] and stage.after["sparsity"] == real["sparsity"]["achieved"]
    made = plan(
        [*list(steps_of(chain).values())[:3], step("cut", "prune", **{**settings, "model": "out/pruned", "from_gates": "out/pruned"})]
    )
    assert not made.problems.found and 0.6 <= made.stages[-1].after["sparsity"] < 0.62  # type: ignore[index]


@pytest.mark.parametrize(
    ("earlier", "settings"),
    [("finetune", {}), ("prune", {"method": "random"}), ("prune", {"task": "none", "method": "random"})],
)
def test_a_recut_without_gates_is_refused_before_anything_is_trained(chain: Path, earlier: str, settings: dict[str, Any]) -> None:
    known = {} if settings.get("task") else {"data": SHAPES, **TRAIN}
    first = step("first", earlier, model=str(chain / "teacher"), **known, **settings)
    made = plan([first, step("cut", "prune", from_gates="out/first", data=SHAPES, sparsity=0.6)])
    assert said(made) == "cut: out/first has no gates.safetensors: it was not written by prune with --method l0"


@pytest.mark.parametrize(("settings", "refused"), [({}, 0.3), ({"tower_sparsity": {"vision": 0.2}}, 0.1)])
def test_what_is_not_kept_is_not_planned_to_come_back(chain: Path, settings: dict[str, Any], refused: float) -> None:
    first = step("first", "prune", **{**PRUNE(chain), **settings}, keep_dense=False, **TRAIN)
    more = step("more", "prune", from_gates="out/first", sparsity=0.6)
    steps = [
        first,
        more,
        step("less", "prune", from_gates="out/first", sparsity=refused),
        step("last", "prune", from_gates="out/more", sparsity=0.5),
    ]
    made = plan(steps)
    whole = plan([first._replace(config=first.config.model_copy(update={"keep_dense": True})), *steps[1:]])
    assert not whole.problems.found, said(whole)
    less, last = said(made).splitlines()
    assert f"less: sparsity {refused} is below the " in less and "were not kept" in less
    assert "last: sparsity 0.5 is below the 0.6000 of out/more" in last
    assert made.stages[1].disk["output"] < whole.stages[1].disk["output"]  # type: ignore[index]


def test_a_planned_recut_remembers_what_was_cut_before(chain: Path) -> None:
    small = step("small", "prune", model=str(chain / "teacher"), task="none", method="random", sparsity=0.3)
    first = step("first", "prune", model="out/small", data=SHAPES, sparsity=0.4, **TRAIN)
    cuts = [step(name, "prune", from_gates=f"out/{source}", sparsity=0.6) for name, source in (("cut", "first"), ("again", "cut"))]
    made = plan([small, first, *cuts])
    assert not made.problems.found, said(made)
    cut, again = made.stages[2:]
    assert cut.memory == again.memory and cut.after == again.after


def test_a_recut_of_longer_texts_than_are_read_is_refused(chain: Path) -> None:
    made = plan([step("cut", "prune", from_gates=str(chain / "pruned"), sparsity=0.6, max_tokens=9999)])
    assert said(made).startswith("cut: max_tokens 9999: ")


def rewrite(folder: Path) -> None:
    """Make the manifest of `folder` true again, sizes and all."""
    record = manifest.read(folder)
    for name, file in record.files.items():
        file.bytes = (folder / name).stat().st_size
    (folder / MANIFEST).write_bytes(record.dump())


def test_no_weights_are_opened(chain: Path, tmp_path: Path, planned: Plan) -> None:
    expected = [stage.after for stage in planned.stages]
    copied = tmp_path / "copied"
    shutil.copytree(chain, copied)
    for file in [*copied.glob("*/model.safetensors"), *copied.glob("*/dense.safetensors")]:
        whole = file.read_bytes()
        values = 8 + int.from_bytes(whole[:8], "little")  # names and shapes stand before them, and are read
        file.write_bytes(whole[:values] + b"\xff" * (len(whole) - values))
    made = plan(list(steps_of(copied).values()))
    assert not made.problems.found and [stage.after for stage in made.stages] == expected
    with pytest.raises(BadInput, match="NaN or infinite values"):
        run_stage("shrink", model=str(copied / "init"), out="x")
    checked = plan([step("shrink", model=str(copied / "init"))], verify=True)
    assert "model.safetensors has changed" in said(checked)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory of a process")
def test_a_model_of_209_million_parameters_is_planned_in_little_memory(chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(chain / "init", folder)
    config = XVLMConfig(image_size=384)
    config.save_pretrained(folder)
    pictures = folder / "preprocessor_config.json"
    pictures.write_text(pictures.read_text("utf-8").replace("64", "384"))
    header, size = {}, 0
    for name, tensor in shapes(families.get("xvlm"), config).state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [size, size + 4 * tensor.numel()]}
        size += 4 * tensor.numel()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)  # a hole: it takes no space
    rewrite(folder)

    def peak() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = peak()
    shrunk = step("small", "shrink", model=str(folder))
    made = plan([shrunk, step("tuned", "finetune", model="out/small", data=SHAPES, **TRAIN)])
    assert peak() - before < 300e6
    assert not made.problems.found, said(made)
    small, tuned = made.stages
    assert small.before and small.before["parameters"]["total"] > 208e6 and small.after
    assert small.after["parameters"]["total"] < 0.6 * small.before["parameters"]["total"]
    assert tuned.memory and tuned.memory["optimizer"] == 2 * tuned.memory["gradients"] > 900e6


def test_every_problem_is_found_at_once(chain: Path, tmp_path: Path, evlm: Any) -> None:
    Output.open(tmp_path / "half", stage="prune", inputs={}, config={})
    shutil.copytree(chain / "init", tmp_path / "other")
    tokenizer = load_tokenizer(chain / "init")
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    words[-1], words[-2] = words[-2], words[-1]
    vocabulary["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(vocabulary)))
    save_tokenizer(tokenizer, tmp_path / "other")
    values = json.loads((tmp_path / "other" / "config.json").read_text())
    other = XVLMConfig.from_dict({**values, "text_heads": 2, "image_size": 32})
    families.get("xvlm").build(other).save_pretrained(tmp_path / "other")
    rewrite(tmp_path / "other")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("rows.jsonl").write_text('{"image": "1.png", "text": "what?", "answer": "car"}\n')
    recipe = {
        "name": "wrong",
        "out": "made",
        "stages": [
            {"name": "first", "stage": "shrink", "model": "half"},
            {"name": "second", "stage": "finetune", "model": str(chain / "init"), "teacher": "other", "data": SHAPES, "out": "mine"},
            {"name": "third", "stage": "finetune", "model": str(chain / "init"), "data": "rows.jsonl", "device": "cuda"},
            {"name": "fourth", "stage": "distill", "model": "@first", "teacher": str(chain / "teacher"), "data": "nowhere.jsonl"},
            {"name": "fifth", "stage": "shrink", "model": str(chain / "init"), "layers": {"vision": 99}},
            {"name": "sixth", "stage": "eval", "model": str(chain / "init"), "data": SHAPES, "answers": "list.txt"},
        ],
    }
    Path("wrong.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = evlm("plan", "wrong.yaml")
    words_wanted = [
        "first: half is not finished",
        "second: teacher and student have different tokenizers",
        "second: teacher and student have other sizes: ",
        "second: teacher and student read images of different size: 32 and 64 px",
        "second: teacher other cannot answer questions",
        "second: mine is not empty",
        "rows.jsonl has no column for question",
        "fourth: no data called nowhere.jsonl",
        "fifth: 99 vision layers",
        "sixth: 'list.txt' does not exist",
    ]
    words_wanted += [] if torch.cuda.is_available() else ["third: device cuda is not available"]
    assert code == 3 and "Traceback" not in err
    for words in words_wanted:
        assert words in err, err
    code, out, silence = evlm("plan", "wrong.yaml", "--json")
    found = json.loads(out)["plan"]["problems"]
    assert code == 3 and silence == "" and len(found) >= len(words_wanted) and {item["exit_code"] for item in found} == {3}
    assert len({item["what"] + item["why"] for item in found}) == len(found)
    assert not Path("made").exists() and [path.name for path in Path("mine").iterdir()] == ["notes.txt"]


def test_a_real_run_stops_at_the_same_checks(chain: Path, evlm: Any) -> None:
    code, _, err = evlm("finetune", "--model", "here", "--teacher", "there", "--data", "easy-vqaa", "--out", "o")
    assert code == 3 and "evlm finetune has 3 problems" in err
    assert "'here' does not exist" in err and "'there' does not exist" in err and "did you mean easy-vqa?" in err
    found = preflight([step("a", "shrink", model="nowhere"), step("b", "shrink", model="out/a"), step("c", "shrink", model="out/b")])
    assert [str(problem.error).partition(":")[0] for problem in found.found] == ["'nowhere' does not exist"]


def test_what_a_run_refuses_is_refused_by_its_dry_run(chain: Path, evlm: Any) -> None:
    prune = ["prune", "--model", chain / "distilled", "--data", SHAPES, "--out", "o", "--set", "parallel=fsdp"]
    export = ["export", "--out", "o", "--model"]
    for line, words in (
        (prune, "prune cannot run with parallel=fsdp"),
        ([*export, chain / "pruned", "--format", "hf"], "transformers has no class for this xvlm network"),
        ([*export, chain / "init", "--format", "onnx", "--data", SHAPES], "not tuned for a task"),
        ([*export, chain / "init", "--format", "onnx"], "is not tuned for a task"),
        ([*export, chain / "pruned", "--format", "onnx", "--data", chain], "has no split test"),
        (["bench", "--out", "o", "--model", chain / "teacher", "--set", "max_tokens=9999"], "max_tokens 9999"),
    ):
        for end in (["--dry-run"], []):
            code, out, err = evlm(*line, *end)
            assert (code, out) == (3, "") and words in err, (line, end)
    assert not Path("o").exists()


def test_a_stream_is_planned_by_its_first_rows(chain: Path, evlm: Any) -> None:
    Image.new("RGB", (16, 16)).save("a.png")
    row = {"image": "a.png", "question": "which?", "answer": "red", "caption": "a red one"}
    region = {"caption": "a red one on the left", "bb": [0, 0, 8, 8]}
    for name, more in (("plain", {}), ("places", {"regions": [region] * 8})):
        Path(f"{name}.jsonl").write_text(json.dumps({**row, **more}))
    Path("answers.txt").write_text("red\n")
    ask = f"finetune --model {chain}/init --answers answers.txt --set kd=0"
    held = []
    for line, data in ((ask, "plain"), (f"pretrain --model {chain}/init", "plain"), (f"pretrain --model {chain}/init", "places")):
        words = f"{line} --data stream:{data}.jsonl --val {data}.jsonl --max-steps 5 --out o --dry-run"
        code, out, err = evlm(*words.split())
        assert code == 0, err
        held.append(json.loads(out)["plan"]["memory"]["activations"])
    assert held[2] > held[1] > 0


def test_an_unreachable_sparsity_alone_exits_4(chain: Path, evlm: Any) -> None:
    line = ["prune", "--model", chain / "distilled", "--data", SHAPES, "--sparsity", 0.95, "--min-heads", 4, "--out", "o", "--dry-run"]
    code, out, err = evlm(*line)
    assert code == 4 and out == "" and "cannot be reached" in err
    code, _, err = evlm(*line, "--set", "device=tpu")
    assert code == 3 and "cannot be reached" in err and "unknown device tpu" in err


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("init --size tiny --data {data}", None),
        ("pretrain --model {chain}/init --data {data}", "memory"),
        ("shrink --model {chain}/init --layers vision=1", "memory"),
        ("distill --model {chain}/student --teacher {chain}/init --data {data}", "schedule"),
        ("prune --model {chain}/distilled --teacher {chain}/teacher --data {data}", "disk"),
        ("prune --from-gates {chain}/pruned --sparsity 0.5", "disk"),
        ("finetune --model {chain}/pruned --teacher {chain}/teacher --data {data}", "schedule"),
        ("eval --model {chain}/teacher --data {data}", "schedule"),
        ("bench --model {chain}/teacher --model {chain}/pruned --model {chain}/student", "schedule"),
    ],
)
def test_every_stage_has_a_dry_run(chain: Path, evlm: Any, line: str, key: str | None) -> None:
    words = line.format(chain=chain, data=SHAPES).split()
    code, out, err = evlm(*words, "--out", "o", "--dry-run")
    assert code == 0, err
    shown = json.loads(out)
    assert shown["stage"] == words[0] and shown["config"]["out"] == "o" and shown["plan"]["status"] == "new"
    assert shown["plan"]["problems"] == [] and (key is None or shown["plan"][key])
    assert f"evlm {words[0]}" in err and not Path("o").exists()
    if words[0] in ("shrink", "eval"):
        code, out, err = evlm(*words, "--out", "o", "--dry-run", "--json")
        again = json.loads(out)
        assert (code, err) == (0, "") and again["config"] == shown["config"]
        for found in (again["plan"], shown["plan"]):  # other programs use the disk too, and a process is never of quite the same size
            found["disks"] = []
            found["memory"] = {part: size for part, size in (found["memory"] or {}).items() if part not in ("process", "total")}
        assert again["plan"] == shown["plan"]


def test_a_recipe_is_planned_and_what_is_there_is_used(chain: Path, evlm: Any) -> None:
    recipe = {
        "name": "two",
        "stages": [
            {"name": "student", "stage": "shrink", "model": str(chain / "init")},
            {"name": "tuned", "stage": "finetune", "model": "@student", "data": SHAPES, **TRAIN},
            {"name": "test", "stage": "eval", "model": "@tuned", "data": SHAPES, "limit": 4},
        ],
    }
    Path("two.yaml").write_text(yaml.safe_dump(recipe))

    def statuses(*words: str, code: int = 0) -> list[str]:
        found, out, err = evlm("plan", "two.yaml", "--json", *words)
        assert found == code, err
        return [stage["plan"]["status"] for stage in json.loads(out)["stages"]]

    code, out, err = evlm("plan", "two.yaml")
    assert (code, err) == (0, "") and "multiply-adds" in out and "time: not measured" in out and not Path("runs").exists()
    code, out, err = evlm("run", "two.yaml", "--dry-run", "--quiet")
    shown = json.loads(out)
    assert (code, err) == (0, "") and shown["recipe"] == "two" and not Path("runs").exists()
    assert [stage["config"]["out"] for stage in shown["stages"]] == ["runs/two/student", "runs/two/tuned", "runs/two/test.json"]
    assert statuses() == ["new"] * 3
    assert evlm("run", "two.yaml", "--quiet")[0] == 0
    assert statuses() == ["up to date"] * 3
    assert statuses("--set", "tuned.lr=3e-3", code=3) == ["up to date", "cannot run", "cannot run"]
    assert statuses("--set", "tuned.lr=3e-3", "--force") == ["replaces"] * 3
    shutil.rmtree("runs/two/student")
    assert statuses(code=3)[:2] == ["new", "cannot run"]  # the parent would be made anew


def test_an_interrupted_stage_resumes_and_other_settings_are_refused(chain: Path, tmp_path: Path) -> None:
    wanted = step("shrink", model=str(chain / "init"))
    Output.open("out/shrink", stage="shrink", inputs={"model": str(chain / "init")}, config=wanted.config.model_dump())._unlock()
    before = sorted(path.name for path in Path("out/shrink").rglob("*"))
    assert [stage.status for stage in plan([wanted]).stages] == ["resumes"]
    other = step("shrink", model=str(chain / "init"), layers={"vision": 1})
    assert "unfinished stage of other settings" in said(plan([other]))
    assert [stage.status for stage in plan([other], Control(force=True)).stages] == ["new"]
    assert sorted(path.name for path in Path("out/shrink").rglob("*")) == before
    itself = step("shrink", model=str(chain / "init"), **{"out": str(chain / "init")})
    assert "it is the model this stage reads" in said(plan([itself]))


def test_too_little_space(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    steps = [step("a", "shrink", model=str(chain / "init")), step("b", "finetune", model="out/a", data=SHAPES, **TRAIN)]
    (needed,) = plan(steps).disks
    assert needed["peak"] > needed["left"] > 0
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda folder: usage(10**9, 0, needed["peak"]))
    assert not plan(steps).problems.found
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda folder: usage(10**9, 0, needed["peak"] - 1))
    made = plan(steps)
    assert "too little space" in said(made) and made.problems.exit_code == 3


@pytest.mark.parametrize("name", ["finetune", "distill"])
def test_the_memory_of_a_cached_teacher(name: str, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, Any] = {"finetune": TaskWeights, "distill": DistillWeights}
    only = {"logits", "itc_logits"}
    weights = {term: float(term in only) for term in kinds[name].model_fields}
    roles = {"finetune": ("pruned", "teacher"), "distill": ("student", "init")}[name]
    models = dict(zip(("model", "teacher"), (str(chain / role) for role in roles), strict=True))
    more = {"questions_per_image": 99} if name == "finetune" else {"region_probability": 0}
    short = {"batch_size": 8, "epochs": 1, "augment": "none", "eval_limit": 4}
    caching = step(name, **models, data=SHAPES, weights=weights, cache_teacher=True, **more, **short)
    (found,) = plan([caching]).stages
    assert found.memory is not None
    kept: list[Any] = []
    monkeypatch.setattr(teachers, "look_up", spied(teachers.look_up, kept))
    run_stage(name, **caching.config.model_dump())
    real = sum(value.numel() * value.element_size() for cache in {id(c): c for c in kept}.values() for value in cache.values())
    assert 0 < real <= found.memory["teacher cache"] <= 1.5 * real
    parts = {part: count for part, count in found.memory.items() if part != "total"}
    assert found.memory["total"] == sum(parts.values())
    monkeypatch.setattr("efficientvlm.planning.costs.main_memory", lambda: real - 1)
    (problem,) = plan([step(name, **{**caching.config.model_dump(), "out": "out/other"})]).problems.found
    assert problem.error.what == "cache_teacher takes too much memory"
    assert not plan([step(name, **{**caching.config.model_dump(), "out": "out/other", "cache_teacher": False})]).problems.found


def spied(look_up: Any, kept: list[Any]) -> Any:
    def spy(cache: Any, *args: Any) -> Any:
        kept.append(cache)
        return look_up(cache, *args)

    return spy


def test_a_batch_that_the_processes_cannot_share(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    wanted = {"model": str(chain / "teacher"), "data": SHAPES, **TRAIN}
    (fine,) = plan([step("finetune", **wanted)]).stages
    assert fine.memory and fine.memory["exchange"] == fine.memory["gradients"]
    assert "2 processes cannot share it equally" in said(plan([step("finetune", **{**wanted, "batch_size": 5})]))


def test_spread_parameters_take_less_memory(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    wanted = {"model": str(chain / "teacher"), "data": SHAPES, **TRAIN}
    copies, spread = plan([step("copies", "finetune", **wanted), step("spread", "finetune", **wanted, parallel="fsdp")]).stages
    assert copies.memory and spread.memory
    assert spread.memory["optimizer"] == pytest.approx(copies.memory["optimizer"] / 4, abs=8)
    assert spread.memory["weights"] == copies.memory["weights"] and spread.memory["total"] < copies.memory["total"]


def test_frozen_towers_take_no_gradients_and_learn_in_the_next_stage(chain: Path) -> None:
    frozen = step("frozen", "pretrain", model=str(chain / "init"), data=SHAPES, freeze=["vision"], **TRAIN)
    after = step("after", "pretrain", model="out/frozen", data=SHAPES, **TRAIN)
    first, second = (found.memory for found in plan([frozen, after]).stages)
    assert first and second and first["weights"] == second["weights"]
    vision = load(str(chain / "init")).model.vision
    assert second["gradients"] - first["gradients"] == 4 * sum(parameter.numel() for parameter in vision.parameters())


def test_a_stage_with_a_wrong_setting_does_not_hide_what_is_wrong_behind_it(chain: Path) -> None:
    wrong = step("wrong", "pretrain", model=str(chain / "init"), data=SHAPES, **{**TRAIN, "batch_size": 1})
    behind = step("behind", "shrink", model="out/wrong", layers={"vision": 99})
    found = said(plan([wrong, behind]))
    assert "batch_size 1" in found and "vision" in found and "cannot be planned" not in found


def test_towers_of_a_model_that_cannot_be_pretrained_are_not_looked_for(tmp_path: Path) -> None:
    run_stage("init", out=str(tmp_path / "blip"), family="blip", size="tiny", data=SHAPES, settings={**SIZES, "decoder_layers": 2})
    refused = plan([step("pretrain", model=str(tmp_path / "blip"), data=SHAPES, freeze=["vision"], **TRAIN)])
    assert "cannot be pre-trained" in said(refused) and [found.status for found in refused.stages] == ["cannot run"]


def test_two_recuts_with_other_columns_are_planned_apart(chain: Path) -> None:
    rows = [{"image": "1.png", "question": "q?", "text": "other?", "answer": "car"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (64, 64)).save("1.png")
    settings = {"model": str(chain / "pruned"), "from_gates": str(chain / "pruned"), "data": "rows.jsonl", "val": "rows.jsonl"}
    made = plan([step("a", "prune", **settings), step("b", "prune", **settings, columns={"question": "nowhere"})])
    assert [problem.stage for problem in made.problems.found] == ["b"] and "nowhere" in said(made)


def test_formulas_are_those_of_a_real_step(planned: Plan) -> None:
    """Bytes of gradients and of the saved state after one step are those that were planned, but for a few counters."""
    for stage in planned.stages[1:]:
        assert stage.run and stage.memory and stage.disk
        objective, optimizers, feed = ready(stage.run, torch.device("cpu"))
        (batch, *_) = feed(0)
        objective(batch, 0)["loss"].backward()
        gradients = sum(4 * p.numel() for p in objective.parameters() if p.grad is not None)
        assert stage.memory["gradients"] * 0.95 < gradients <= stage.memory["gradients"] + stage.memory.get("gates", 0)  # no box was seen
        update(optimizers, 0.1, 1.0, 0)
        state = tensors_of(objective, [optimizer.torch for optimizer in optimizers])
        exact = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        counters = 4 * len(state) + 64 + stage.memory.get("gates", 0)
        assert stage.disk["state"] * 0.95 < exact <= stage.disk["state"] + counters


def test_time_is_measured_on_real_steps(planned: Plan) -> None:
    made = planned
    assert made.stages[0].time is None
    for stage in made.stages[1:]:
        assert stage.time and stage.memory and stage.schedule
        assert stage.time["seconds"] == pytest.approx(6 * stage.time["seconds_per_step"], abs=0.1)
        assert stage.time["seconds_per_step"] > 0 and stage.memory["activations"] > 4 * 64 * 64
        parts = {key: value for key, value in stage.memory.items() if key != "total"}
        assert stage.memory["total"] == sum(parts.values())
    assert made.seconds and not Path("out").exists()
    state = torch.get_rng_state()
    assert made.stages[3].run and measure(made.stages[3].run, 1, total=2)["steps"] == 1
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_a_uniform_cut_meets_the_target_in_every_family(name: str, sparsity: float) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = network(config)
    scope = Scope.of(Anatomy.of(model), sparsity)
    keep = uniform_cut(scope)
    assert sparsity <= scope.achieved(keep)["all"] < sparsity + 0.2  # a head of these networks is a tenth of them
    with torch.device("meta"):
        cut = slice_model(model, keep)
    assert all(tensor.is_meta for tensor in cut.state_dict().values())


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_a_uniform_cut_keeps_the_same_part_of_every_layer(sparsity: float) -> None:
    sizes = {"vision_width": 64, "text_width": 64, "vision_intermediate": 200, "text_intermediate": 200, "vision_heads": 8, "text_heads": 8}
    config = XVLMConfig(**sizes, vision_layers=3, text_layers=2, fusion_layers=2, vocab_size=20)
    scope = Scope.of(Anatomy.of(shapes(families.get("xvlm"), config)), sparsity)
    keep = uniform_cut(scope)
    assert sparsity <= scope.achieved(keep)["all"] < sparsity + 0.01
    for group, part in scope.anatomy.groups.slices.items():
        count = part.stop - part.start
        assert abs(int(keep[part].sum()) / count - (1 - sparsity)) <= 1 / count + 0.1, group


def test_init_is_planned_with_its_real_vocabulary(chain: Path) -> None:
    (stage,) = plan([step("init", size="tiny", data=SHAPES, settings=SIZES)]).stages
    assert stage.after and stage.after["parameters"] == manifest.read(chain / "init").accounting["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if not name.startswith("flickr8k") and ("/" not in name or "/scenes-" in name)])
def test_every_packaged_recipe_can_be_planned(name: str, evlm: Any) -> None:
    """Those that need no files of a user's own."""
    code, out, err = evlm("plan", name, "--json")
    expected = re.compile(
        r"matching: step \d+ lacks |distillation: left out, as these networks and losses have nothing of the kind: text_features "
    )
    assert code == 0 and all(expected.match(line) for line in err.splitlines()), err
    assert json.loads(out)["plan"]["problems"] == [] and not Path("runs").exists()


def test_problems_of_one_stage_are_found_together(chain: Path, tmp_path: Path, evlm: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, err = evlm(*f"finetune --model {chain}/pruned --teacher nobody --data nothing.jsonl --out mine --dry-run".split())
    assert code == 3 and "has 3 problems" in err
    assert "'nobody' does not exist" in err and "no data called nothing.jsonl" in err and "mine is not empty" in err


def test_a_place_that_takes_no_files(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: namedtuple("Usage", "total free")(0, 0))
    made = plan([step("student", "shrink", model=str(chain / "init"), out="out")])
    assert "out cannot be written" in said(made) and "too little space" not in said(made)
