"""Checkpoints, tokenizers, states, graphs and imported models of which something is wrong."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile

from attack.case import ONE_STEP, Case, kind
from attack.damage import YAML, Draw, changed, damaged, dump, json_text, seal, special, spoil
from attack.process import Place
from attack.stock import SHAPES, Stock, picture


def use(draw: Draw, model: str, what: str, task: str = "vqa") -> Case:
    """A command that reads the checkpoint `model`."""
    vqa, data = task == "vqa", ["--data", SHAPES]
    commands: list[tuple[list[str], str | None]] = [
        (["inspect", model, *draw.choice([[], ["--json"], ["--units"]])], None),
        (["verify", model], None),
        (["report", model, "--out", "r.html"], "r.html"),
        (["eval", "--model", model, *data, "--task", task, "--limit", "2", "--json", "-q"], None),
        (["bench", "--model", model, "--rounds", "1", "--batch-size", "1", "--threads", "1", "-q", "--json"], None),
        (["shrink", "--model", model, "-q", "--out", "o"], "o"),
        (["export", "--model", model, "--format", draw.choice(["padded", "hf"]), "--out", "o", "-q"], "o"),
        (["finetune", "--model", model, *data, "--task", task, *ONE_STEP, "--out", "o"], "o"),
        (["finetune", "--model", model, *data, "--task", task, *ONE_STEP, "--out", "o", "--dry-run"], None),
        (["prune", "--model", model, "--task", "none", "--method", "magnitude", "--sparsity", "0.5", "-q", "--out", "o"], "o"),
    ]
    if vqa:
        asked = ["predict", "--model", model, "--image", "q.png", "--question", "what is it?", "--json"]
        commands += [(asked, None), ([*asked, "--mode", "generate"], None)]
    argv, out = draw.choice(commands)
    return Case(argv, what, out)


@kind
def files_of_a_checkpoint(draw: Draw, stock: Stock, place: Place) -> Case:
    name = draw.choice(["teacher", "teacher", "teacher", "pruned", "clip"])
    folder = stock.copy(f"model/{name}", place.work / "m")
    (place.work / "q.png").write_bytes(picture(1))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    often = [path for path in files if path.name in ("config.json", "model.safetensors", "tokenizer.json")]
    target = draw.choice([*files, *often])
    done = spoil(draw, target)
    sealed = draw.random() < 0.7
    if sealed:
        seal(folder)
    return use(draw, "m", f"{name}/{target.name}: {done}{', sealed' * sealed}", "retrieval" if name == "clip" else "vqa")


@kind
def manifests(draw: Draw, stock: Stock, place: Place) -> Case:
    folder = stock.copy(f"model/{draw.choice(['teacher', 'pruned'])}", place.work / "m")
    (place.work / "q.png").write_bytes(picture(1))
    path = folder / "evlm_manifest.json"
    values = json.loads(path.read_text())
    part = draw.choice(list(values))
    if draw.randrange(8):
        path.write_text(dump(changed(draw, values, (part,))))
        seal(folder)
    else:
        spoil(draw, path)
    return use(draw, "m", f"manifest, {part}")


@kind
def tokenizers(draw: Draw, stock: Stock, place: Place) -> Case:
    name = draw.choice(["teacher", "clip"])
    folder = stock.copy(f"model/{name}", place.work / "m")
    (place.work / "q.png").write_bytes(picture(1))
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    part = draw.choice([part for part in values if values[part] is not None])
    path.write_bytes(json_text(draw, changed(draw, values, (part,))))
    if draw.randrange(3) == 0:
        shutil.rmtree(folder.parent / "t", ignore_errors=True)
        folder.rename(folder.parent / "t")
        return Case(["init", "--size", "tiny", "--tokenizer", "t", "--out", "o", "-q"], f"tokenizer of init, {part}", "o")
    seal(folder)
    return use(draw, "m", f"{name}/tokenizer.json, {part}", "retrieval" if name == "clip" else "vqa")


@kind
def gates_and_dense_weights(draw: Draw, stock: Stock, place: Place) -> Case:
    folder = stock.copy("model/pruned", place.work / "m")
    shutil.copytree(stock.get("model/teacher"), place.work / "t")
    target = folder / draw.choice(["gates.safetensors", "dense.safetensors", "gates.safetensors", "evlm_manifest.json", "config.json"])
    done = spoil(draw, target)
    if draw.random() < 0.7:
        seal(folder)
    argv = [
        "prune",
        "--from-gates",
        "m",
        "--sparsity",
        draw.choice(["0.2", "0.5", "0.9"]),
        "--out",
        "o",
        "-q",
        "--set",
        "eval_limit=2",
        "--limit",
        "8",
    ]
    return Case(argv, f"{target.name}: {done}", "o")


@kind
def states_of_unfinished_runs(draw: Draw, stock: Stock, place: Place) -> Case:
    folder = stock.copy("model/half", place.work / "half")
    shutil.copytree(stock.get("model/teacher"), place.work / "m")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    target = draw.choice([*files, *(path for path in files if path.name.startswith(("state.", "request")))])
    kind, name = draw.randrange(8), target.relative_to(folder)
    if kind == 0:
        extra = target.parent / draw.choice(["step-99999999", "step-x", "step--1", "state.json", "lock", ".x", "step-00000009"])
        done = f"beside it {extra.name}"
        if not extra.exists():
            extra.write_bytes(b"{}") if draw.randrange(2) else extra.mkdir()
    else:
        done = spoil(draw, target)
    more = draw.choice([[], [], [], ["--no-resume"], ["--force"], ["--seed", "3"]])
    return Case([*stock.tune("half"), *more], f"{name}: {done} {' '.join(more)}", "half", ("half",))


@kind
def graphs(draw: Draw, stock: Stock, place: Place) -> Case:
    folder = stock.copy("model/onnx", place.work / "m")
    (place.work / "q.png").write_bytes(picture(1))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    target = draw.choice([*files, *[folder / "onnx.json"] * 6])
    done = spoil(draw, target)
    if draw.random() < 0.8:
        seal(folder)
    asked = ["predict", "--model", "m", "--image", "q.png", "--question", "what is it?", "--json"]
    argv = draw.choice(
        [
            asked,
            asked,
            asked,
            ["inspect", "m"],
            ["verify", "m"],
            ["report", "m", "--out", "r.html"],
            ["eval", "--model", "m", "--data", SHAPES, "--limit", "2", "-q", "--json"],
            ["bench", "--model", "m", "--rounds", "1", "--batch-size", "1", "-q"],
        ]
    )
    return Case(argv, f"{target.name}: {done}", "r.html" if "r.html" in argv else None)


@kind
def imported_folders(draw: Draw, stock: Stock, place: Place) -> Case:
    folder = stock.copy("hf-clip", place.work / "hf")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    target = draw.choice(files)
    done = spoil(draw, target)
    if target.name == "README.md" and target.is_file() and not target.is_symlink() and draw.randrange(2):
        target.write_text(f"---\nlicense: {draw.choice(YAML)}\n---\n", errors="surrogateescape")
    more = draw.choice([[], [], ["--dry-run"], ["--layout", "vqa"]])
    return Case(["import", "--model", "hf", "--out", "o", "-q", *more], f"{target.name}: {done}", "o")


@kind
def imported_files(draw: Draw, stock: Stock, place: Place) -> Case:
    """Files of weights that are none: pickles that would write a file, archives, other people's tensors."""
    bait = b"cposix\nsystem\n(S'touch pwned'\ntR."
    content = draw.choice(
        [
            b"\x80\x02" + bait,
            bait,
            _zip(bait),
            b"",
            b"\x80\x04N.",
            _zip(b"\x80\x02}q\0."),
            _tar("x", bait),
            (stock.get("model/init") / "model.safetensors").read_bytes(),
        ]
    )
    if draw.randrange(2):
        content = damaged(draw, content)
    name = f"w.{draw.choice(['th', 'pth', 'pt', 'bin', 'safetensors', 'ckpt', 'npz', ''])}"
    (place.work / name).write_bytes(content)
    if draw.randrange(5) == 0:
        special(draw, place.work / name)
    shutil.copytree(stock.get("model/init"), place.work / "t")
    return Case(["import", "--model", name, "--tokenizer", "t", "--out", "o", "-q"], f"import {name}", "o")


def _zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _tar(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()
