"""Retrieval: recalls against brute force, matching on balanced pairs, training, pruning, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compression_cases import CONFIGS, network, tiny_xvlm
from conftest import SHAPES, SIZES, TRAIN, run_stage
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm import families
from efficientvlm.checkpoints.folder import fingerprint, require_complete
from efficientvlm.cli import main as cli
from efficientvlm.compression.anatomy import Anatomy
from efficientvlm.compression.gates import attach
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.data.opening import open_data
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.families import footprint
from efficientvlm.loaded import load
from efficientvlm.objectives import xvlm_pretraining
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.efficientvlm import distilled
from efficientvlm.objectives.gated import Gated
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.report import summary as report
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.stages import Targets
from efficientvlm.tasks import recall
from efficientvlm.tasks.known import TASKS
from efficientvlm.tasks.recall import Gallery, drawn_pairs, evaluate
from efficientvlm.tasks.retrieval import evaluate_pairs

XVLM = families.get("xvlm")
QUIET = Control(quiet=True)
MATCHING = {"itm_accuracy", "itm_preferred"}
METRICS = {f"{way}_r{top}" for way in ("image_to_text", "text_to_image") for top in (1, 5, 10)} | {"mean_recall"}


@pytest.fixture(scope="module")
def pairs(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher` and `pruned`, both of retrieval."""
    root = tmp_path_factory.mktemp("pairs")
    run_stage("finetune", out=str(root / "teacher"), model=str(chain / "init"), task="retrieval", data=SHAPES, **TRAIN)
    run_stage("prune", out=str(root / "pruned"), **pruning(chain, root), **TRAIN)
    return root


def pruning(chain: Path, root: Path) -> dict[str, Any]:
    models = {"model": str(chain / "distilled"), "teacher": str(root / "teacher")}
    return {**models, "task": "retrieval", "data": SHAPES, "sparsity": 0.4}


def gallery(seed: int = 0, images: int = 13, most: int = 4) -> Gallery:
    """Random features; image i has 1 to `most` captions, and every third one shares a caption with the image before."""
    draw = torch.Generator().manual_seed(seed)
    own: list[list[int]] = []
    count = 0
    for at in range(images):
        number = int(torch.randint(1, most + 1, (), generator=draw))
        own.append([*range(count, count + number), *([own[-1][0]] if at % 3 == 2 else [])])
        count += number
    said = [caption for captions in own for caption in captions]
    owners = [at for at, captions in enumerate(own) for _ in captions]
    image, text = (torch.nn.functional.normalize(torch.randn(n, 6, generator=draw), dim=1) for n in (images, count))
    states = image[:, None].clone(), text[:, None].clone()
    return Gallery(
        [f"i{at}" for at in range(images)], image, text, own, torch.tensor(said), torch.tensor(owners), *states, torch.ones(count, 1)
    )


class Matcher:
    """A network whose matching logit is the dot product of the first state of a text and of an image, its sign changed."""

    device = torch.device("cpu")
    config = SimpleNamespace(abilities=lambda: frozenset({"embed", "match"}))

    def match(self, images: torch.Tensor, rows: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        score = -(images[rows, 0] * texts[:, 0]).sum(-1)
        return torch.stack([-score, score], 1)


def by_hand(found: Gallery, rerank: int) -> dict[str, float]:
    """The recalls from the definition: every query sorted by itself, in plain Python."""
    values: dict[str, list[float]] = {name: [] for name in METRICS - {"mean_recall"}}

    def sort(scores: list[float]) -> list[int]:
        order = sorted(range(len(scores)), key=lambda at: -scores[at])
        return sorted(order[:rerank], key=lambda at: scores[at]) + order[rerank:]  # the matcher reverses

    said, owners = found.said.tolist(), found.owners.tolist()
    scores = (found.image @ found.text.T).tolist()
    for at, row in enumerate(scores):
        order = sort([row[caption] for caption in said])
        for top in (1, 5, 10):
            values[f"image_to_text_r{top}"].append(any(owners[i] == at for i in order[:top]))
    for caption, owner in zip(said, owners, strict=True):
        order = sort([row[caption] for row in scores])
        for top in (1, 5, 10):
            values[f"text_to_image_r{top}"].append(owner in order[:top])
    means = {name: sum(hits) / len(hits) for name, hits in values.items()}
    return {**means, "mean_recall": sum(means.values()) / 6}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rerank", [0, 3, 10, 200])
def test_recalls_are_those_of_the_definition(seed: int, rerank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "SCORES_AT_ONCE", 40)  # blocks of one or two queries
    found = gallery(seed)
    result = evaluate(Matcher(), found, batch_size=5, rerank=rerank)
    assert result["images"] == 13 and result["captions"] == len(found.said)
    assert {name: result[name] for name in METRICS} == pytest.approx(by_hand(found, 0))
    again = {name.removeprefix("reranked_"): value for name, value in result.items() if name.startswith("reranked_")}
    there = {0: set(), 3: {"image_to_text_r1", "text_to_image_r1"}}.get(rerank, METRICS)
    assert again == pytest.approx({name: value for name, value in by_hand(found, rerank).items() if name in there})
    assert rerank < 10 or again["mean_recall"] != result["mean_recall"]
    unchanged = METRICS - there - {"mean_recall"} if rerank else set()
    assert {name: result[name] for name in unchanged} == pytest.approx({name: by_hand(found, rerank)[name] for name in unchanged})


PEAK = """
import resource, sys, torch
from efficientvlm.tasks.recall import Gallery, best_captions, best_images
images, texts = map(int, sys.argv[1:])
image, text = torch.randn(images, 4), torch.randn(texts, 4)
owners = torch.arange(texts) % images
found = Gallery([], image, text, [], torch.arange(texts), owners, None, None, torch.ones(texts, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
best_captions(found, 16), best_images(found, 16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_images_times_texts() -> None:
    """Sixteen times the pairs, whose scores alone would take 160 MB, and the order that they are put into twice as much."""
    small, large = (
        int(subprocess.run([sys.executable, "-c", PEAK, *sizes], capture_output=True, text=True, check=True).stdout)
        for sizes in (("500", "5000"), ("2000", "20000"))
    )
    assert large - small < 30_000, (small, large)


def test_scores_are_float32_in_bf16_too() -> None:
    angles = torch.arange(40) * 1e-3  # cosines that bfloat16 cannot tell apart
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    ids, each = [str(at) for at in range(40)], torch.arange(40)
    close = Gallery(ids, rows.flip(0), rows, [[39 - at] for at in range(40)], each.flip(0), each, None, None, torch.ones(40, 1))
    with torch.autocast("cpu", torch.bfloat16):
        result = evaluate(Matcher(), close, batch_size=8)
    assert result["image_to_text_r1"] == result["text_to_image_r1"] == 1


def test_equal_scores_rank_in_the_order_of_the_data() -> None:
    one = torch.ones(3, 1)
    same = Gallery(["a", "b", "c"], one, one, [[0], [1], [2]], torch.arange(3), torch.arange(3), None, None, one)
    result = evaluate(Matcher(), same, batch_size=2)
    assert result["image_to_text_r1"] == result["text_to_image_r1"] == pytest.approx(1 / 3)
    assert result["image_to_text_r5"] == 1 and "itm_accuracy" not in result


def test_matching_is_measured_on_as_many_wrong_pairs_as_right_ones() -> None:
    found = gallery(1)
    pairs = drawn_pairs(found, seed=3)
    assert all(pair and pair[0] in own and pair[1] not in own for pair, own in zip(pairs, found.own, strict=True))
    assert pairs[:4] == [(1, 11), (4, 7), (2, 3), (7, 16)] and pairs != drawn_pairs(found, seed=4)
    right = preferred = 0
    for at, pair in enumerate(pairs):
        scores = [-float(found.image[at] @ found.text[caption]) for caption in pair or ()]
        right += (scores[0] > 0) + (scores[1] <= 0)
        preferred += scores[0] > scores[1]
    result = evaluate(Matcher(), found, batch_size=4, seed=3)
    assert result["itm_accuracy"] == pytest.approx(right / 26) and result["itm_preferred"] == pytest.approx(preferred / 13)
    found.own = [[0, 1]] * 13
    found.said = found.said % 2
    assert "itm_accuracy" not in evaluate(Matcher(), found, batch_size=4), "nothing is known to be unmatched"


def test_a_batch_does_not_change_the_result(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(pairs / "teacher"))
    source = open_data(PAIRS, SHAPES, "train", limit=11, image_size=loaded.sizes.image_size)
    results = [evaluate_pairs(loaded, source, limit=None, title="", quiet=True, batch_size=size, rerank=4) for size in (3, 3, 11)]
    assert results[0] == results[1] and results[0].keys() == {
        "images",
        "captions",
        "standard_errors",
        "reading",
        *MATCHING,
        *METRICS,
        "reranked_image_to_text_r1",
        "reranked_text_to_image_r1",
    }
    monkeypatch.setitem(footprint.BLOCK, "cpu", 1)  # nothing is held, every image and every pair a block of its own
    small = evaluate_pairs(loaded, source, limit=None, title="", quiet=True, batch_size=4, rerank=4)
    texts = Texts(loaded.tokenizer)
    items = [source[at] for at in range(11)]
    pixels = torch.stack([torch.from_numpy(item.image).permute(2, 0, 1) for item in items])
    batches = [([item.id for item in items], pixels, [item.captions for item in items])]
    one = recall.encode(loaded.model, batches, texts.batch, 64, 11)
    split = [(names[at : at + 4], pixels[at : at + 4], said[at : at + 4]) for names, pixels, said in batches for at in (0, 4, 8)]
    other = recall.encode(loaded.model, split, texts.batch, 5, 20)
    torch.testing.assert_close(one.image, other.image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.text, other.text, rtol=1e-5, atol=1e-5)
    assert len(one.text) == len({caption for item in batches[0][2] for caption in item}) and one.own == other.own
    torch.testing.assert_close(one.image.norm(dim=1), torch.ones(11))
    for metric in METRICS | MATCHING:
        assert results[0][metric] == pytest.approx(results[2][metric], abs=1e-5) == small[metric]


def test_a_tuned_model_keeps_the_heads_of_retrieval_and_counts_no_others(pairs: Path, chain: Path) -> None:
    before, after = require_complete(chain / "init"), require_complete(pairs / "teacher")
    model, source = load(str(pairs / "teacher")).model, load(str(chain / "init")).model
    assert model.config.heads == ["itc", "itm"] and load(str(pairs / "teacher")).abilities >= {"embed", "match"}
    left = sum(p.numel() for name, p in source.named_parameters() if name.startswith(("mlm_head.", "box_head.")))
    assert after.accounting["parameters"]["total"] == before.accounting["parameters"]["total"] - left > 0
    assert after.metrics["val"].keys() == {"images", "captions", "standard_errors", "reading", *MATCHING, *METRICS}
    assert after.metrics["train"].keys() == {"loss", "itc", "itm"}
    assert after.metrics["train"]["loss"] == pytest.approx(after.metrics["train"]["itc"] + after.metrics["train"]["itm"], rel=1e-4)


def test_pruning_reaches_its_sparsity_and_the_slice_is_the_masked_model(pairs: Path) -> None:
    manifest = require_complete(pairs / "pruned")
    sparsity = manifest.accounting["sparsity"]
    assert 0 <= sparsity["achieved"] - 0.4 <= (2 * 16 + 1) / sparsity["initial"] and manifest.config["kd"] == 0.5
    assert set(manifest.accounting["parameters"]["by_tower"]) == {"vision", "text", "fusion", "heads"}
    lines = [json.loads(line) for line in (pairs / "pruned" / "metrics.jsonl").read_text().splitlines()]
    assert {"itc", "itm", "kd", "lagrangian"} <= lines[0].keys() and lines[0]["teacher_ms"] > 0
    sliced = load(str(pairs / "pruned")).model
    dense = XVLM.build(sliced.config.copy(kept=None)).eval()
    dense.load_state_dict(load_file(pairs / "pruned" / "dense.safetensors"))
    units, kept = dense.units(), sliced.config.kept_indices()
    keep = torch.tensor([unit.index in kept[unit.group] for unit in units])
    same_as_masked(dense, slice_model(dense, keep), keep)


@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_sliced(seed: int) -> None:
    torch.manual_seed(seed)
    model = XVLM.build(tiny_xvlm().copy(decoder_layers=0, heads=["itc", "itm"])).eval()
    keep = torch.rand(len(model.units())) > 0.5
    same_as_masked(model, slice_model(model, keep), keep)


def same_as_masked(dense: Any, sliced: Any, keep: torch.Tensor) -> None:
    batch = sliced.example(2, 6)
    batch["pixels"] = torch.randint(0, 256, batch["pixels"].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), attach(dense, dense.units()) as hooks:
        hooks.set(keep.float())
        masked, cut = dense.run(batch), sliced.run(batch)
    for name in ("logits", "image_feature", "text_feature"):
        torch.testing.assert_close(masked[name], cut[name], rtol=1e-5, atol=1e-5)
    assert cut["logits"].shape == (2, 2) and Anatomy.of(sliced).totals != Anatomy.of(dense).totals


def test_a_recut_takes_task_and_data_of_its_run(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["prune", "--from-gates", pairs / "pruned", "--sparsity", 0.6, "--out", tmp_path / "more", "-q", "--set", "eval_limit=3"]
    monkeypatch.setattr(sys, "argv", ["evlm", *map(str, words)])
    assert cli._run() == 0
    manifest = require_complete(tmp_path / "more")
    assert manifest.config["task"] == "retrieval" and manifest.metrics["val"]["images"] == 3
    assert manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.01)
    with pytest.raises(BadInput, match="is not of task vqa"):
        run_stage("prune", out=str(tmp_path / "no"), task="vqa", from_gates=str(pairs / "pruned"), data=SHAPES, sparsity=0.6)


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_importance_criteria_meet_the_same_budget(method: str, pairs: Path, chain: Path, tmp_path: Path) -> None:
    run_stage(
        "prune", out=str(tmp_path / "out"), **{**pruning(chain, pairs), **TRAIN, "max_steps": 2, "method": method, "calibration_batches": 2}
    )
    assert require_complete(tmp_path / "out").accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.005)


def test_an_interrupted_run_ends_in_the_same_bits(pairs: Path, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Gated.after_step

    def stopped(self: Gated, step: int) -> None:
        settle(self, step)
        if step == 3:
            raise KeyboardInterrupt

    settings = {**pruning(chain, pairs), **TRAIN, "save_every": 2, "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch:
        patch.setattr(Gated, "after_step", stopped)
        with pytest.raises(Interrupted):
            run_stage("prune", **settings)
    run_stage("prune", **settings)
    run_stage("prune", **{**settings, "out": str(tmp_path / "whole")})
    ours, whole = require_complete(tmp_path / "out").files, require_complete(tmp_path / "whole").files
    for name in ("model.safetensors", "gates.safetensors", "dense.safetensors", "config.json"):
        assert ours[name].sha256 == whole[name].sha256, name


def test_losses_and_terms_have_the_published_weights(pairs: Path, chain: Path) -> None:
    student, teacher = load(str(chain / "distilled")), load(str(pairs / "teacher"))
    config = stage_settings("finetune", {"out": "x", "model": "x", "data": SHAPES, "task": "retrieval", "weights": {"itm_logits": 2}})
    student.model = student.model.gain("match")[0]
    objective = distilled(TASKS["retrieval"].objective_on(config, student, None), teacher.model, config)
    assert isinstance(objective, Distilled) and objective.kd == 0.5 and objective.model is student.model
    items = [open_data(PAIRS, SHAPES, "train", image_size=student.sizes.image_size)[at] for at in range(4)]
    batch = pair_batch(items, Texts(student.tokenizer), seed=0, step=0, task=True)
    student.model.eval()
    losses = {name: float(value.detach()) for name, value in objective(batch, 0).items()}
    assert losses.keys() == {"loss", "itc", "itm", "kd"} and losses["kd"] > 0
    assert losses["loss"] == pytest.approx(0.5 * (losses["itc"] + losses["itm"]) + 0.5 * losses["kd"], rel=1e-5)


def test_what_belongs_to_another_task_is_refused(chain: Path, pairs: Path, tmp_path: Path) -> None:
    out, common = str(tmp_path / "out"), {"data": SHAPES, "task": "retrieval", **TRAIN}
    with pytest.raises(BadInput, match="cannot compare images with texts"):
        run_stage("finetune", out=out, model=str(chain / "teacher"), **common)
    with pytest.raises(BadInput, match=r"teacher .* cannot compare images with texts"):
        run_stage("prune", out=out, model=str(chain / "init"), teacher=str(chain / "teacher"), **common)
    with pytest.raises(BadInput, match="cannot compare images with texts"):
        run_stage("eval", model=str(chain / "teacher"), data=SHAPES, task="retrieval")
    with pytest.raises(BadInput, match="no captions"):
        run_stage("finetune", out=out, model=str(chain / "init"), **{**common, "data": "easy-vqa"})
    with pytest.raises(BadInput, match="batch_size 1"):
        run_stage("finetune", out=out, model=str(chain / "init"), **{**common, "batch_size": 1})
    run_stage("init", out=str(tmp_path / "wide"), size="tiny", tokenizer=str(chain / "init"), settings={**SIZES, "text_width": 32})
    with pytest.raises(BadInput, match="text width 32 and 16"):
        run_stage("finetune", out=out, model=str(chain / "init"), teacher=str(tmp_path / "wide"), **common)
    answering = {"data": SHAPES, **TRAIN, "max_steps": 1, "model": str(pairs / "teacher"), "out": out}
    with pytest.raises(BadInput, match="cannot answer questions") as refused:
        run_stage("eval", model=str(pairs / "teacher"), data=SHAPES)
    assert refused.value.fix.endswith("or this one with a --teacher that answers questions")
    with pytest.raises(BadInput, match="nor an MLM head"):
        run_stage("finetune", **answering)
    run_stage("finetune", **{**answering, "out": str(tmp_path / "answers")}, teacher=str(chain / "teacher"))
    assert not Path(out).exists()


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("name", ["pretrain", "distill", "finetune"])
def test_negatives_are_drawn_by_similarity_or_not(
    name: str, hard: bool, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, draw = [], xvlm_pretraining.draw_negatives

    def watch(image: Tensor, text: Tensor, temperature: Tensor, *rest: Any) -> Any:
        seen.append(bool(temperature.isinf()))
        return draw(image, text, temperature, *rest)

    monkeypatch.setattr(xvlm_pretraining, "draw_negatives", watch)
    more: dict[str, Any] = {"distill": {"teacher": str(chain / "init")}, "finetune": {"task": "retrieval"}}.get(name, {})
    run_stage(name, out=str(tmp_path / "out"), model=str(chain / "init"), data=SHAPES, hard_negatives=hard, **more, **TRAIN)
    assert seen and set(seen) == {not hard}


def test_a_batch_of_one_image_has_no_negatives(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its matching loss is that of the true pairs alone, finite, and it is said once."""
    student = load(str(chain / "init"))
    items = [open_data(PAIRS, SHAPES, "train", image_size=student.sizes.image_size)[at] for at in range(3)]
    batch = pair_batch(items, Texts(student.tokenizer), seed=0, step=0, task=True)
    objective = XvlmPretraining(student.model.eval(), losses=("itc", "itm"), seed=0)
    one = {**batch, "image_ids": torch.zeros_like(batch["image_ids"])}
    for step in range(2):
        found = objective.passes(student.model, one, step)
        wanted = torch.nn.functional.cross_entropy(found.record["itm_logits"][:3], torch.ones(3, dtype=torch.long))
        torch.testing.assert_close(found.losses["itm"], wanted)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step 0 lacks 6 of 6 negatives" in said
    objective.passes(student.model, batch, 0)
    assert capsys.readouterr().err == ""


def test_negatives_of_no_matching_are_refused() -> None:
    with pytest.raises(BadInput) as refused:
        stage_settings("pretrain", {"out": "o", "model": "m", "data": "d", "losses": ["itc"], "hard_negatives": False})
    assert "hard_negatives: it needs itm among the losses" in refused.value.why


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("retrieval", {"answers": "a.txt", "rank_top": 3, "weights": {"logits": 2}, "quirks": {"double_sep": True}}),
        ("vqa", {"weights": {"itm_logits": 2}, "hard_negatives": False}),
    ],
)
def test_settings_of_another_task_are_refused(task: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as refused:
        stage_settings("finetune", {"out": "o", "model": "m", "data": "d", "task": task, **settings})
    other = {"vqa": "retrieval", "retrieval": "vqa"}[task]
    names = [f"{name}.{part}" for name, value in settings.items() for part in (value if isinstance(value, dict) else ())]
    names += [name for name, value in settings.items() if not isinstance(value, dict)]
    assert all(re.search(rf"{name}: it belongs to task .*{other}", refused.value.why) for name in names)
    assert f"{len(settings)} wrong setting" in refused.value.what
    stage_settings("finetune", {"out": "o", "model": "m", "data": "d", "task": task})


def test_a_clip_is_measured_by_contrast_alone(tmp_path: Path, chain: Path) -> None:
    config = CONFIGS["clip"]
    model = network(config)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=draw)

    def tokens(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[3, 4 + len(text), 1] for text in captions])
        return ids, torch.ones_like(ids)

    batches = [(["a", "b", "c", "d", "e"], pixels, [["x"], ["xx", "xxx"], ["x" * 4], ["x" * 5], ["x" * 6]])]
    found = recall.encode(model, batches, tokens, 4, 5)
    result = evaluate(model, found, batch_size=4)
    assert (
        result.keys() == {"images", "captions", "standard_errors", *METRICS}
        and result["text_to_image_r5"] == 1
        and found.image_states is found.text_states is None
    )


def test_a_plan_knows_the_sizes(chain: Path, pairs: Path, tmp_path: Path) -> None:
    steps = [
        Step(
            "teacher",
            "finetune",
            stage_settings("finetune", dict(out=str(tmp_path / "t"), model=str(chain / "init"), task="retrieval", data=SHAPES, **TRAIN)),
        ),
        Step(
            "pruned",
            "prune",
            stage_settings("prune", dict(out=str(tmp_path / "p"), **{**pruning(chain, pairs), "teacher": str(tmp_path / "t")}, **TRAIN)),
        ),
        Step(
            "more",
            "prune",
            stage_settings("prune", {"out": str(tmp_path / "m"), "from_gates": str(tmp_path / "p"), "sparsity": 0.6}),
        ),
        Step(
            "eval",
            "eval",
            stage_settings("eval", dict(model=str(tmp_path / "p"), task="retrieval", data=SHAPES, rerank=3, out=str(tmp_path / "e.json"))),
        ),
    ]
    made = plan(steps, QUIET, measure=1)
    assert not made.problems.found
    teacher, pruned, more, _ = made.stages
    real = require_complete(pairs / "teacher").accounting
    assert teacher.after is not None and teacher.after["parameters"] == real["parameters"] and teacher.after["macs"] == real["macs"]
    smaller = require_complete(pairs / "pruned").accounting
    assert pruned.after is not None and pruned.after["sparsity"] == pytest.approx(smaller["sparsity"]["achieved"], abs=0.01)
    assert more.after is not None and more.after["sparsity"] == pytest.approx(0.6, abs=0.01) and pruned.time is not None
    wrong = plan([Step("e", "eval", stage_settings("eval", dict(model=str(chain / "teacher"), task="retrieval", data=SHAPES)))], QUIET)
    assert "cannot compare images with texts" in str(wrong.problems.found[0].error)


def test_a_report_shows_the_mean_recall(pairs: Path, tmp_path: Path) -> None:
    results = {}
    test = {"data": SHAPES, "split": "train", "task": "retrieval", "limit": 6}
    for label in ("teacher", "pruned"):
        results[label] = run_stage("eval", model=str(pairs / label), **test, out=str(tmp_path / f"{label}.json"))
        inputs = results[label]["influence"]["inputs"]
        assert inputs["image"]["outputs"] == {"itc": 1.0, "itm": 1.0} and min(inputs["text"]["outputs"].values()) > 0
    assert require_complete(pairs / "pruned").extra["influence"]["inputs"].keys() == {"image", "text"}
    bench = run_stage("bench", models=[str(pairs / "teacher"), str(pairs / "pruned")], rounds=1, warmup_rounds=0, batch_sizes=[1])
    models = {label: (require_complete(pairs / label), fingerprint(str(pairs / label))) for label in results}
    summary = report.summarise(models, results, bench, Targets(accuracy=0.1))
    text = report.text(summary)
    assert summary["models"]["pruned"]["accuracy"] == results["pruned"]["metrics"]["mean_recall"]
    assert "mean recall: shapes" in text and "6 images and" in text and "pruned / teacher: mean recall" in text
    out = {"out": str(tmp_path / "report"), "models": {label: str(pairs / label) for label in results}}
    run_stage("report", **out, evals={label: str(tmp_path / f"{label}.json") for label in results})
    assert "mean recall, training data, evaluated" in (tmp_path / "report" / "report.html").read_text()
    reranked = run_stage("eval", model=str(pairs / "pruned"), **test, rerank=3)
    with pytest.raises(BadInput, match="cannot be compared"):
        report.summarise(models, {"teacher": results["teacher"], "pruned": reranked}, None)
