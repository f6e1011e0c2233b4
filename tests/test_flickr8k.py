"""The recipe for photos with captions: on stand-ins for the pretrained towers and the photos, and how its figures are published."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUIET
from datasets import Dataset, Image
from doc_pages import ROOT, evlm, script
from PIL import Image as Pictures
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.tokenizer import save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.recipe import load_recipe, validate
from efficientvlm.settings.base import Strict
from efficientvlm.stages.run import module_of

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "white": (240, 240, 240)}


def short(name: str) -> list[str]:
    """Overrides with which a recipe takes seconds on the photos of `world`."""
    prefix = "captions-" if name.endswith("-captions") else ""
    steps = {"aligned": 3, f"{prefix}teacher": 4, f"{prefix}distilled": 2, f"{prefix}pruned": 3, f"{prefix}final": 2, f"{prefix}no-kd": 7}
    sizes = ["aligned.batch_size=8", f"{prefix}teacher.batch_size=8", "batch_size=4", "data=photos", "start.image_size=28"]
    return [
        *(f"{stage}.max_steps={count}" for stage, count in steps.items()),
        *sizes,
        f"{prefix}pruned.round_to=1",
        f"{prefix}cut.round_to=1",
    ]


def captions(colour: str) -> list[str]:
    return [f"a {colour} wall", f"a wall that is {colour}", f"someone painted it {colour}", f"{colour} all over", f"nothing but {colour}"]


def photos(path: Path, count: int, seed: int) -> None:
    """A parquet file in the layout of the photos: `image`, five `captions`, `image_id`."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        pixels = (np.array(COLOURS[colour]) + rng.integers(-25, 15, (20, 26, 3))).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Pictures.fromarray(pixels).save(file, "JPEG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "captions": captions(colour), "image_id": f"{seed}-{number}"})
    path.parent.mkdir(exist_ok=True)
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `towers` of as many layers as the real ones, and `photos`."""
    root = tmp_path_factory.mktemp("flickr8k")
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 4}
    Dinov2Model(Dinov2Config(**size, num_hidden_layers=12, image_size=42, patch_size=7)).save_pretrained(root / "towers" / "dinov2-small")
    tokenizer = train_wordpiece([text for colour in COLOURS for text in captions(colour)], 100)
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "num_hidden_layers": 6, "intermediate_size": 96}
    BertModel(BertConfig(**size, **words)).save_pretrained(root / "towers" / "minilm")
    save_tokenizer(tokenizer, root / "towers" / "minilm")
    photos(root / "photos" / "train.parquet", 24, 0)
    photos(root / "photos" / "val.parquet", 8, 1)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flickr8k", "flickr8k-captions"])
def test_the_recipe_is_planned_on_any_photos(name: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    sets = [part for override in short(name) for part in ("--set", override)]
    code, out, err = evlm(["plan", name, *sets, "--json"])
    assert code == 0, err
    stages = {stage["name"]: stage for stage in json.loads(out)["stages"]}
    assert list(stages) == [stage["name"] for stage in load_recipe(name).stages]
    code, _, err = evlm(["plan", name])
    assert code == 3 and "flickr8k" in err, "without data= it is the folder flickr8k, which is not there"


@pytest.mark.parametrize(("name", "prefix"), [("flickr8k", ""), ("flickr8k-captions", "captions-")])
def test_both_students_are_trained_alike(name: str, prefix: str) -> None:
    steps: dict[str, Any] = {step.name.removeprefix(prefix): step.config for step in validate(load_recipe(name))}
    method, plain = [steps[name] for name in ("distilled", "pruned", "final")], steps["no-kd"]
    assert sum(config.max_steps for config in method) == plain.max_steps and plain.teacher is None
    for key in ("lr", "new_lr_mult", "batch_size", "max_tokens", "augment", "data", "seed", "hard_negatives", "captions_per_image"):
        assert not hasattr(plain, key) or {getattr(config, key) for config in method} == {getattr(plain, key)}, key
    assert steps["cut"].model == steps["distilled"].model == steps["student"].out
    assert (steps["cut"].sparsity, steps["cut"].round_to) == (steps["pruned"].sparsity, steps["pruned"].round_to) == (0.4, 16)


def run(config: Strict, stage: str) -> Any:
    return module_of(stage).run(config, QUIET)


@pytest.mark.slow
def test_the_recipe_from_towers_to_published_figures(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    steps = validate(load_recipe("flickr8k"), short("flickr8k"))
    for step in steps:
        run(step.config, step.stage)
    runs = world / "runs" / "flickr8k"
    for name in ("pruned", "final", "cut", "no-kd"):
        assert abs(require_complete(runs / name).accounting["sparsity"]["achieved"] - 0.4) < 0.005, name
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "own-data.md", tmp_path / "docs")
    publisher = script("benchmarks/flickr8k.py")
    path, page = publisher.publish(runs, tmp_path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["teacher", "no-kd", "method"] and {row["images"] for row in rows.values()} == {"8"}
    assert [rows[name]["steps"] for name in rows] == ["7", "7", "7"] and {row["captions"] for row in rows.values()} == {"40"}
    assert rows["method"]["mean_recall"] == f"{json.loads((runs / 'final-val.json').read_text())['metrics']['mean_recall']:.6g}"
    assert publisher.table(list(rows.values())) in page.read_text("utf-8")

    other = json.loads((runs / "no-kd-val.json").read_text())
    other["provenance"]["inputs"]["model"] = "0" * 64
    (runs / "no-kd-val.json").write_text(json.dumps(other))
    with pytest.raises(BadInput, match="out of date"):
        publisher.publish(runs, tmp_path)


@pytest.mark.slow
def test_the_recipe_of_captions_to_published_figures(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    for step in validate(load_recipe("flickr8k-captions"), short("flickr8k-captions")):
        run(step.config, step.stage)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "own-data.md", tmp_path / "docs")
    publisher = script("benchmarks/flickr8k.py")
    path, page = publisher.publish(world / "runs" / "flickr8k-captions", tmp_path, publisher.FIGURES["captions"])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["teacher", "no-kd", "method"] and {row["images"] for row in rows} == {"8"}
    assert float(rows[1]["sparsity"]) == pytest.approx(float(rows[2]["sparsity"]), abs=0.005)
    assert publisher.caption_table(rows) in page.read_text("utf-8")


@pytest.mark.slow
def test_the_recipe_of_a_blip_to_published_figures(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    steps = {"aligned": 3, "teacher": 4, "method": 3, "no-kd": 3}
    small = ["student.width={vision: 12, text: 12}", "student.neurons={vision: 24, text: 24}", "aligned.batch_size=8", "batch_size=4"]
    sets = [*(f"{stage}.max_steps={count}" for stage, count in steps.items()), *small, "data=photos", "start.image_size=28"]
    for step in validate(load_recipe("dlip/photos"), sets):
        run(step.config, step.stage)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "dlip.md", tmp_path / "docs")
    publisher, runs = script("benchmarks/flickr8k.py"), world / "runs" / "dlip-photos"
    path, page = publisher.publish(runs, tmp_path, publisher.FIGURES["dlip"])
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["teacher", "no-kd", "method"] and [row["steps"] for row in rows] == ["7", "3", "3"]
    assert {row["images"] for row in rows} == {"8"} and rows[1]["parameters"] == rows[2]["parameters"]
    for name, result in (("mean_recall", "method-retrieval"), ("cider_d", "method-captions")):
        assert rows[2][name] == f"{json.loads((runs / f'{result}.json').read_text())['metrics'][name]:.6g}"
    counted = require_complete(runs / "method").accounting["parameters"]
    assert int(rows[2]["parameters_without_embeddings"]) == counted["without_embeddings"] < counted["total"]
    assert publisher.both_table(rows) in page.read_text("utf-8")


@pytest.mark.parametrize("task", ["retrieval", "captions", "dlip"])
def test_the_published_table_is_that_of_the_csv(task: str) -> None:
    publisher, published = script("benchmarks/flickr8k.py"), script("benchmarks/published.py")
    figures = publisher.FIGURES[task]
    block = published.block_of((ROOT / figures.page).read_text("utf-8"), figures.recipe)
    found = [path for path in (ROOT / "benchmarks" / "results").glob(f"{figures.recipe.replace('-', '_')}_*.csv") if path.name in block]
    if not found:
        assert block.strip() == "Nothing has been measured yet."
        return
    rows = published.rows_of(found[0])
    assert publisher.block(rows, found[0].relative_to(ROOT), figures) == block.strip()
    assert {(row["data"].split()[-1], row["images"], row["training_images"]) for row in rows} == {("val", "1000", "6091")}  # Flickr8k's
