"""Recipes, settings, options, outputs, results and environments that nobody meant."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack.case import ONE_STEP, Case, kind, words
from attack.damage import SPECIAL, YAML, Draw, changed, damaged, json_text, special, spoil, text
from attack.process import Place
from attack.stock import SHAPES, Stock, picture

WITH_VALUES = words(
    "--seed --device --precision --column --layers --sparsity --kd --lr --split --threads --top --image-size --set --answers"
)
WITHOUT = words("-- -x --help=1 --force --no-resume --json --column --layers --device --precision --dry-run")
VALUES = words("-1 nan inf 1e999 0 None bundled:x bundled:easy-vqa/.. ~nobody/x /proc/self/mem /dev/zero")
OURS = words("README.md config.json metrics.jsonl evlm_manifest.json notes.txt model.safetensors training_state gates.safetensors")
LIKE_OURS = words(".o.staging-1 o.tmp .o.tmp-1 .evlm-x notes .o.lock o~ .o .o.evlm-1 .evlm-o-1")
PLACES = [
    *words("o * ? [ab] a**b . .. o/ o//b ./o ~x $HOME -o é CON o.json o.html /dev/null/x /proc/x q.png/x .hidden %s o\\b {a,b}"),
    *(" ", "n" * 255, "n" * 256, "p/" * 200 + "o", "o\n", "e\u0301", os.fsdecode(b"d\xff"), "o\x1b[31m", "o\u202e"),
]
VARIABLES = words(
    "RANK WORLD_SIZE LOCAL_RANK COLUMNS LINES TERM NO_COLOR EVLM_DEBUG TMPDIR HOME XDG_CACHE_HOME OMP_NUM_THREADS HF_HOME LANG LC_ALL TZ "
    "PYTHONIOENCODING CUDA_VISIBLE_DEVICES MASTER_PORT SOURCE_DATE_EPOCH FORCE_COLOR"
)


@kind
def recipes(draw: Draw, stock: Stock, place: Place) -> Case:
    model = str(stock.get("model/init"))
    recipe: dict[str, Any] = {
        "name": "r",
        "description": "d",
        "out": "runs",
        "defaults": {"seed": 1, "data": SHAPES, "batch_size": 2, "eval_limit": 2, "limit": 8},
        "stages": [
            {"name": "student", "stage": "shrink", "model": model},
            {"name": "tuned", "stage": "finetune", "model": "@student", "max_steps": 1},
            {"name": "cut", "stage": "prune", "model": "@tuned", "task": "none", "method": "magnitude", "sparsity": 0.3},
            {"name": "test", "stage": "eval", "model": "@cut"},
        ],
    }
    path, kind = place.work / "r.yaml", draw.randrange(6)
    content = json.dumps(recipe, indent=1).encode()
    if kind <= 2:
        content = json_text(draw, changed(draw, recipe))
    elif kind == 3:
        content = content.replace(
            draw.choice([b'"d"', b'"runs"', b"0.3", b'"@tuned"', b'"test"', b"1,"]), draw.choice(YAML).encode("utf-8", "surrogatepass"), 1
        )
    else:
        content = damaged(draw, content)
    path.write_bytes(content)
    done = special(draw, path) if kind == 5 and draw.randrange(2) else f"kind {kind}"
    argv = draw.choice(
        [
            ["recipes", "validate", "r.yaml"],
            ["plan", "r.yaml"],
            ["plan", "r.yaml", "--json"],
            ["run", "r.yaml", "-q"],
            ["run", "r.yaml", "-q", "--dry-run"],
            ["recipes", "cat", "r.yaml"],
        ]
    )
    if draw.randrange(6) == 0 and argv[0] in ("plan", "run"):
        argv = [
            *argv,
            "--set",
            f"{draw.choice(['', 'test.', 'tuned.', 'x.'])}{draw.choice(['seed', 'lr', 'data', 'model', 'name', ''])}={text(draw)}",
        ]
    return Case(argv, done, "runs" if argv[0] == "run" else None, printed=content.decode("utf-8", "replace") if "cat" in argv else "")


def _settings() -> list[tuple[str, str]]:
    """Stage and dotted name of every setting."""
    from pydantic import BaseModel

    from efficientvlm.settings.compose import of
    from efficientvlm.settings.stages import STAGES

    found = []
    for stage in STAGES:
        for name, one in of(stage, {}).model_fields.items():
            inner = one.annotation
            nested = inner.model_fields if isinstance(inner, type) and issubclass(inner, BaseModel) else ()
            found += [(stage, f"{name}.{part}") for part in nested] or [(stage, name)]
    return found


def _command(draw: Draw, stock: Stock, stage: str, out: str = "o") -> tuple[list[str], str | None]:
    """A sound, short command of a stage."""

    def model(name: str) -> list[str]:
        return ["--model", str(stock.get(name))]

    def taught(name: str) -> list[str]:
        return [*model(f"model/{name}"), "--teacher", str(stock.get("model/init" if stage == "distill" else "model/teacher"))]

    words_of: dict[str, Callable[[], list[str]]] = {
        "init": lambda: ["--size", "tiny", "--data", SHAPES, "--vocab-size", "64", "-q"],
        "import": lambda: [*model("hf-clip"), "-q"],
        "shrink": lambda: [*model("model/init"), "-q"],
        "pretrain": lambda: [*model("model/init"), "--data", SHAPES, *ONE_STEP],
        "distill": lambda: [*taught("init"), "--data", SHAPES, *ONE_STEP],
        "prune": lambda: [*taught("teacher"), "--data", SHAPES, *ONE_STEP],
        "finetune": lambda: [*taught("init"), "--data", SHAPES, *ONE_STEP],
        "eval": lambda: [*model("model/teacher"), "--data", SHAPES, "--limit", "2", "-q"],
        "bench": lambda: [*model("model/teacher"), "--rounds", "1", "--batch-size", "1", "-q"],
        "export": lambda: [*model("model/teacher"), "--format", "padded", "-q"],
    }
    return [stage, *words_of[stage](), "--out", out], out


@kind
def settings(draw: Draw, stock: Stock, place: Place) -> Case:
    stage, name = draw.choice([pair for pair in _settings() if pair[0] != "report" and pair[1] != "out"])
    argv, out = _command(draw, stock, stage)
    value = text(draw)
    if draw.randrange(8) == 0:
        name = draw.choice([name + ".x", name + "x", "", ".", name.upper(), f"{name}.", "__class__", "model_config"])
    argv += ["--set", f"{name}={value}"]
    if draw.randrange(4) == 0 and stage not in ("eval", "bench"):
        argv.append("--dry-run")
    return Case(argv, f"{stage} {name}={value[:40]!r}", out)


@kind
def options(draw: Draw, stock: Stock, place: Place) -> Case:
    stage = draw.choice(["init", "import", "shrink", "pretrain", "distill", "prune", "finetune", "eval", "bench", "export"])
    argv, out = _command(draw, stock, stage)
    names = [at for at, word in enumerate(argv) if word.startswith("--")]
    at, kind, value = draw.choice(names), draw.randrange(6), text(draw)
    if kind == 0:
        del argv[at]
    elif kind == 1:
        argv.insert(at, draw.choice([*WITHOUT, value]))
    elif kind == 2:
        argv += [draw.choice(WITH_VALUES), value]
    elif kind == 3 and at + 1 < len(argv) and argv[at] != "--out":
        argv[at + 1] = draw.choice(["", *VALUES])
    elif at + 1 < len(argv) and argv[at] != "--out":
        argv[at + 1] = value
    return Case(argv, f"{stage}: {kind}", out)


@kind
def names_of_outputs(draw: Draw, stock: Stock, place: Place) -> Case:
    """Outputs that are links, devices, other people's folders, or have names that mean something elsewhere."""
    stage = draw.choice(["init", "shrink", "finetune", "export", "eval", "bench", "report", "import", "recipes"])
    name = draw.choice(PLACES)
    (place.work / "q.png").write_bytes(picture(1))
    bystander = place.work / draw.choice(LIKE_OURS)
    bystander.mkdir()
    (bystander / "mine").write_text("mine")
    kind = draw.randrange(10)
    path = place.work / "o"
    if kind <= 5:
        name = "o"
        if kind == 0:
            special(draw, path, tuple(kind for kind in SPECIAL if kind not in ("missing", "empty", "sparse")))
        elif kind == 1:
            path.mkdir()
            for one in draw.sample(OURS, 3):
                (path / one).write_text("mine") if draw.randrange(4) else (path / one).mkdir()
        elif kind == 2:
            (place.work / "real").mkdir()
            (place.work / "real/mine").write_text("mine")
            path.symlink_to("real")
        elif kind == 3:
            (path / "training_state").mkdir(parents=True)
            (path / "training_state" / draw.choice(["request.json", "lock", "metrics.jsonl", "answers.txt"])).write_text(
                draw.choice(["mine", "{}", "[]"])
            )
        elif kind == 4:
            shutil.copytree(stock.get("model/student"), path)
            (path / draw.choice(["mine.txt", "gates.safetensors", ".x.tmp-1", "training_state"])).write_text("mine")
        else:
            path.mkdir()
            (place.work / "real").mkdir()
            (place.work / "real/mine").write_text("mine")
            (path / draw.choice(["training_state", "README.md", "metrics.jsonl", "sub", "config.json"])).symlink_to(
                draw.choice(["../real", "../real/mine", "../new"])
            )
    if stage == "report":
        argv = ["report", str(stock.get("model/teacher")), "--out", name]
    elif stage == "recipes":
        argv = ["recipes", "cp", "quickstart", name]  # into a folder, as cp does
    else:
        argv, _ = _command(draw, stock, stage, name)
    forced = draw.randrange(3) == 0
    out = os.path.normpath(name) if kind > 5 or not path.exists() else name
    # An empty folder, and one of ours with --force, may be written; whatever lies there that is not ours may not.
    return Case(
        [*argv, *["--force"] * forced],
        f"{stage} --out {name[:40]!r}, kind {kind}{', forced' * forced}",
        out if out not in (".", "..") else None,
        ("real/quickstart.yaml",) if stage == "recipes" else _replaceable(path, forced),
    )


def _replaceable(path: Path, forced: bool) -> tuple[str, ...]:
    """Names below the working folder that `--force` may replace: what our manifest lists, and a result or page that was ours."""
    manifest = path / "evlm_manifest.json"
    if not forced or not manifest.is_file() or path.is_symlink():
        return ()
    try:
        listed = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return ()
    return ("o/evlm_manifest.json", "o/README.md", "o/README.md.old", *(f"o/{name}" for name in listed))


@kind
def results(draw: Draw, stock: Stock, place: Place) -> Case:
    """Result files and checkpoints that a report stage reads."""
    for name in ("eval.json", "bench.json"):
        stock.copy(f"model/{name}", place.work / name)
    done = spoil(draw, place.work / draw.choice(["eval.json", "bench.json"]))
    models = {"a": str(stock.get("model/teacher")), draw.choice(["b", text(draw)[:200]]): str(stock.get("model/student"))}
    recipe = {
        "name": "r",
        "stages": [{"name": "rep", "stage": "report", "models": models, "evals": {"a": "eval.json"}, "bench": "bench.json", "out": "o"}],
    }
    (place.work / "r.yaml").write_text(json.dumps(recipe), "utf-8")
    return Case(["run", "r.yaml", "-q"], done, "o")


@kind
def environments(draw: Draw, stock: Stock, place: Place) -> Case:
    """Variables of the environment that are read, and folders that are not there."""
    name = draw.choice(VARIABLES)
    nowhere = str(place.root / "nowhere/x")
    value = draw.choice(["", "-1", "x", "0", nowhere, "/dev/null", "1e9", "2", "9" * 20, "q.png", os.fsdecode(b"\xff")])
    if name == "EVLM_DEBUG":
        value = "0"
    (place.work / "q.png").write_bytes(picture(1))
    stage = draw.choice(["init", "shrink", "finetune", "eval", "bench", "export"])
    argv, out = _command(draw, stock, stage)
    place.environment[name] = value
    return Case(argv, f"{name}={value!r} {stage}", out)
