"""Sound inputs of every kind, made once by the product itself where it makes them; each is made when it is first asked for."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack.process import Place, Running

SIZES = {"width": 16, "heads": 4, "intermediate": 32}
WIDTH = 8
"""Of embeddings."""
SHAPES = "shapes:difficulty=2,size=24"
SHORT = ["--max-steps", "2", "--batch-size", "4", "--limit", "16", "--set", "eval_limit=2", "--set", "log_every=1", "-q"]
SUFFIXES = ("jsonl", "json", "csv", "tsv", "parquet", "tar")
LAYOUTS = (*SUFFIXES, "arrow", "folder", "classes", "coco", "vqav2", "splits", "karpathy")
ANSWERS = ["red", "blue", "green", "a lot", "yes", "no"]
TINY = [f"settings.{tower}_{name}={size}" for tower in ("vision", "text") for name, size in SIZES.items()]
TINY = [word for size in (*TINY, "settings.patch_size=16", f"settings.embed_dim={WIDTH}") for word in ("--set", size)]


class Stock:
    """Folder of sound inputs; :meth:`get` makes what is missing."""

    def __init__(self, root: Path) -> None:
        self.root, self.place = root, Place(root / "making")

    def get(self, name: str) -> Path:
        """Where the input `name` lies, made if need be."""
        path = self.root / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            kind, _, rest = name.partition("/")
            (self._commands if kind == "model" else self._files)(rest or kind, path)
            if not path.exists():
                raise RuntimeError(f"{name} was not made")
        return path

    def copy(self, name: str, target: Path) -> Path:
        source = self.get(name)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copyfile(source, target)
        return target

    def _run(self, argv: list[str], prepare: Callable[[], None] | None = None, allowed: tuple[int, ...] = (0,)) -> None:
        ended = Running(argv, self.place, prepare).wait()
        if ended.code not in allowed:
            raise RuntimeError(f"evlm {' '.join(argv)} ended with {ended.code}: {ended.err[-2000:]}")

    def _commands(self, name: str, path: Path) -> None:
        def model(other: str) -> str:
            return str(self.get(f"model/{other}"))

        out, data = ["--out", str(path)], ["--data", SHAPES]
        argv = {
            "init": lambda: ["init", "--size", "tiny", *data, "--vocab-size", "80", *TINY, "-q"],
            "blip": lambda: ["init", "--family", "blip", "--size", "tiny", *data, "--vocab-size", "80", *TINY, "-q"],
            "clip": lambda: ["import", "--model", str(self.get("hf-clip")), "-q"],
            "teacher": lambda: ["finetune", "--model", model("init"), *data, *SHORT],
            "blip-teacher": lambda: ["finetune", "--model", model("blip"), *data, *SHORT],
            "student": lambda: ["shrink", "--model", model("init"), "-q"],
            "pruned": lambda: ["prune", "--model", model("teacher"), "--teacher", model("teacher"), *data, *SHORT, "--sparsity", "0.4"],
            "onnx": lambda: ["export", "--model", model("teacher"), "--format", "onnx", "--rounds", "0", "-q"],
            "hf-blip": lambda: ["export", "--model", model("blip-teacher"), "--format", "hf", "-q"],
            "eval.json": lambda: ["eval", "--model", model("teacher"), *data, "--limit", "2", "-q"],
            "bench.json": lambda: ["bench", "--model", model("teacher"), "--rounds", "1", "--batch-size", "1", "-q"],
            "half": lambda: self.tune(path.name),
        }[name]()
        if name == "half":
            os.chdir(self.root)
            shutil.copytree(self.get("model/teacher"), self.place.work / "m", dirs_exist_ok=True)
            self._run(argv, stop_at_step(2), (75,))
            shutil.move(self.place.work / path.name, path)
        else:
            self._run([*argv, *out])

    def tune(self, out: str) -> list[str]:
        """The command of an unfinished run; its model is `m` beside it."""
        return ["finetune", "--model", "m", "--data", SHAPES, *SHORT, "--max-steps", "4", "--set", "save_every=1", "--out", out]

    def _files(self, name: str, path: Path) -> None:
        """Made in a process of its own, as pyarrow and transformers start threads."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if name == "hf-clip":
                    hf_clip(path)
                elif name == "answers.txt":
                    path.write_text("\n".join(ANSWERS) + "\n", "utf-8")
                else:
                    write_data(name.rpartition("/")[2], name.startswith("questions"), path)
                code = 0
            finally:
                os._exit(code)
        os.waitpid(child, 0)


def stop_at_step(step: int) -> Callable[[], None]:
    """Ask the process politely to stop once so many steps are done."""

    def prepare() -> None:
        import signal

        from efficientvlm.training import loop as training

        real = training.rate

        def rate(number: int, *rest: Any) -> float:
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(number, *rest)

        training.rate = rate

    return prepare


def picture(number: int, format: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    image = Image.new("RGB", (24 + number, 20), (number * 20, 90, 255 - number * 20))
    image.putpixel((number, 3), (1, 2, 3))
    image.save(file, format)
    return file.getvalue()


def rows(questions: bool) -> list[dict[str, Any]]:
    if questions:
        said = [
            {"question": f"what is in picture {n}?", "answer": ANSWERS[n % 4 : n % 4 + 2] if n % 3 else ANSWERS[n % 6]} for n in range(10)
        ]
    else:
        said = [{"caption": [f"thing {n} in red", f"again {n}"] if n % 2 else f"one thing {n}"} for n in range(10)]
    return [{"image": f"img/{n % 8}.png" if questions else f"img/{n}.png", **row} for n, row in enumerate(said)]


def write_data(layout: str, questions: bool, path: Path) -> None:
    """A folder that holds the layout, and `SPEC`: what `--data` is given, relative to the folder."""
    path.mkdir()
    (path / "img").mkdir()
    for n in range(10):
        (path / f"img/{n}.png").write_bytes(picture(n))
    spec = f"d.{layout}" if layout in SUFFIXES else "d"
    write_layout(layout, path / spec, rows(questions), questions)
    (path / "SPEC").write_text(spec)


def write_layout(layout: str, path: Path, said: list[dict[str, Any]], questions: bool) -> None:
    text = "question" if questions else "caption"
    if layout == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in said))
    elif layout == "json":
        path.write_text(json.dumps(said))
    elif layout in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(said[0]), delimiter="\t" if layout == "tsv" else ",")
            writer.writeheader()
            writer.writerows({name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()} for row in said)
    elif layout in ("parquet", "arrow"):
        import datasets

        held = [{**row, "image": {"bytes": (path.parent / row["image"]).read_bytes(), "path": None}} for row in said]
        held = [
            {name: [cell] if name in ("answer", "caption") and isinstance(cell, str) else cell for name, cell in row.items()}
            for row in held
        ]
        table = datasets.Dataset.from_list(held)
        if layout == "parquet":
            table.to_parquet(str(path))
        else:
            table.save_to_disk(str(path))
    elif layout == "tar":
        with tarfile.open(path, "w") as archive:
            for n, row in enumerate(said):
                for name, content in (
                    (f"{n:03}.png", (path.parent / row["image"]).read_bytes()),
                    (f"{n:03}.json", json.dumps(row).encode()),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    elif layout == "folder":
        path.mkdir()
        for n, row in enumerate(said):
            (path / f"{n}.png").write_bytes(picture(n))
            if not questions:
                (path / f"{n}.txt").write_text("\n".join(row["caption"]) if isinstance(row["caption"], list) else row["caption"])
        if questions:
            (path / "metadata.jsonl").write_text("".join(json.dumps({**row, "image": f"{n}.png"}) + "\n" for n, row in enumerate(said)))
    elif layout == "classes":
        for n in range(10):
            (path / f"{'cat' if n % 2 else 'dog'}").mkdir(parents=True, exist_ok=True)
            (path / f"{'cat' if n % 2 else 'dog'}/{n}.jpg").write_bytes(picture(n, "JPEG"))
    elif layout == "splits":
        path.mkdir()
        shutil.copytree(path.parent / "img", path / "img")
        for part in ("train", "val", "test"):
            (path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    elif layout == "coco":
        _coco(path, said, text, questions)
    elif layout == "vqav2":
        _vqav2(path)
    elif layout == "karpathy":
        _karpathy(path, said)
    else:
        raise ValueError(layout)


def _coco(path: Path, said: list[dict[str, Any]], text: str, questions: bool) -> None:
    (path / "annotations").mkdir(parents=True)
    for part in ("train2017", "val2017"):
        (path / part).mkdir()
        for n in range(10):
            (path / f"{part}/{n:012}.jpg").write_bytes(picture(n, "JPEG"))
        images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 24 + n, "height": 20} for n in range(10)]
        captions = [{"id": n * 3 + j, "image_id": n, "caption": f"thing {n} said {j}"} for n in range(10) for j in range(2)]
        (path / f"annotations/captions_{part}.json").write_text(json.dumps({"images": images, "annotations": captions, "info": {}}))


def _vqav2(path: Path) -> None:
    for part in ("train2014", "val2014"):
        (path / part).mkdir(parents=True)
        for n in range(1, 7):
            (path / f"{part}/COCO_{part}_{n:012}.jpg").write_bytes(picture(n, "JPEG"))
        asked = [{"image_id": n, "question": "what is it?", "question_id": 10 * n} for n in range(1, 7)]
        answers = [{"answer": ANSWERS[j % 3], "answer_id": j} for j in range(10)]
        told = [{"image_id": n, "question_id": 10 * n, "answers": answers} for n in range(1, 7)]
        (path / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": asked}))
        (path / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": told}))


def _karpathy(path: Path, said: list[dict[str, Any]]) -> None:
    path.mkdir()
    shutil.copytree(path.parent / "img", path / "images")
    images = [
        {"filename": f"{n}.png", "imgid": n, "split": ("train", "val", "test")[n % 3], "sentences": [{"raw": f"thing {n}", "sentid": n}]}
        for n in range(10)
    ]
    (path / "dataset_flickr8k.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))


def hf_clip(folder: Path) -> None:
    """A tiny CLIP as `save_pretrained` writes it."""
    import torch
    from tokenizers import trainers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    trainer = trainers.BpeTrainer(
        vocab_size=70, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>", show_progress=False
    )
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(["a red circle", "the blue square", "a cat and dogs"] * 5, trainer)
    learnt = json.loads(backend.to_str())["model"]
    tokenizer = CLIPTokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 8}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**common, "max_position_embeddings": 24, "vocab_size": len(tokenizer), **ids}
    torch.manual_seed(3)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=8)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
