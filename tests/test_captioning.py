"""Captioning: how the next token is chosen, batches, training with a teacher, pruning, measuring, asking, exporting, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nursery
import pytest
import torch
from compression_cases import CONFIGS, network
from conftest import QUIET, SHAPES, SIZES, TRAIN, run_stage
from doc_pages import ROOT, blocks
from PIL import Image
from torch import Tensor

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.batch import uniform
from efficientvlm.data.kinds.pairs import PAIRS, PairItem, caption_batch
from efficientvlm.data.opening import open_data
from efficientvlm.errors import BadInput
from efficientvlm.families.onnx.description import Description
from efficientvlm.families.towers.decoding import Rules, beam, continued, drawn, stepping
from efficientvlm.loaded import load, texts_of
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.self_critical import SelfCritical, mean_of_others
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.base import parse
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.tasks import CaptioningSettings
from efficientvlm.stages import predict
from efficientvlm.tasks import java_metrics, remembered
from efficientvlm.tasks.captioning import Captioning
from efficientvlm.tasks.describing import Describer, Manner

CAPTIONS: dict[str, Any] = {"task": "captioning", "data": SHAPES, "max_length": 24, **TRAIN}


# how the next token is chosen


def table(scores: Tensor) -> Any:
    """Steps whose next-token logits follow from the last token alone: row `t` of `scores` [V, V] behind token t."""

    def step(ids: Tensor, goes_on: Tensor | None) -> Tensor:
        return scores[ids]

    return step


def test_beam_search_finds_the_best_of_all_texts():
    """With as many beams as there are texts, under both rules of length."""
    torch.manual_seed(1)
    words, end, most = 4, 3, 3
    scores = 2 * torch.randn(words, words)
    chances = scores.log_softmax(-1)
    given = torch.tensor([[0, 1], [2, 2]])
    for rule, extra in (("published", 2), ("generated", 0)):
        ids = beam(table(scores), given, Rules(end, 9, most), 27, length_rule=rule).ids[:, 0]  # type: ignore[arg-type]
        for row, start in enumerate((1, 2)):
            found = {}
            for text in itertools.chain.from_iterable(itertools.product(range(words), repeat=length) for length in (1, 2, 3)):
                if end in text[:-1] or (text[-1] != end and len(text) < most):
                    continue
                total = sum(float(chances[a, b]) for a, b in itertools.pairwise((start, *text)))
                length = len(text) - (text[-1] == end) + extra if rule == "published" else len(text)
                found[text] = total / length if length else float("-inf")
            best = max(found, key=found.__getitem__)
            assert ids[row].tolist() == [*best, *[9] * (most - len(best))], rule


def test_a_text_is_as_long_as_the_rules_say():
    scores = torch.full((3, 3), 0.0)
    scores[:, 2] = 5  # the end is always the likeliest
    given = torch.zeros(1, 1, dtype=torch.long)
    for least in range(4):
        rules = Rules(end=2, filler=2, most=4, least=least)
        assert int((continued(table(scores), given, rules)[0] != 2).sum()) == least
        assert int((beam(table(scores), given, rules, 2).ids[0, 0] != 2).sum()) == least
    scores[:, 2] = -50
    assert continued(table(scores), given, Rules(2, 2, 4)).shape == (1, 4)


def test_draws_follow_the_probabilities_and_nothing_else():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().expand(1000, -1)
    even = (torch.arange(1000) + 0.5)[:, None] / 1000

    def shares(**chances: Any) -> list[float]:
        counts = drawn(even, **chances)(scores, 0).bincount(minlength=4)
        return [round(float(count) / 1000, 3) for count in counts]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.002)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.002)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.002)  # the token that reaches it is one of them
    assert shares(top_k=1) == shares(top_p=0.01) == [1, 0, 0, 0]
    flat = probabilities**0.5 / (probabilities**0.5).sum()
    assert shares(temperature=2.0) == pytest.approx(flat.tolist(), abs=0.002)
    one, other = uniform(["a", "b"], 5, 0), uniform(["b"], 5, 0)
    assert torch.equal(one[1:], other) and not torch.equal(one[0], one[1]) and not torch.equal(other, uniform(["b"], 5, 1))


@pytest.mark.parametrize("name", ["xvlm-caption", "blip-caption"])
def test_both_families_describe_with_a_cache_as_without(name):
    torch.manual_seed(0)
    model = network(CONFIGS[name])
    pixels, given, rules = torch.randn(3, 3, 16, 16), torch.tensor([[1, 5]]).expand(3, -1), Rules(2, 0, 8)

    def anew() -> Any:
        before, rows = torch.empty(3, 0, dtype=torch.long), torch.arange(3)

        def step(ids: Tensor, goes_on: Tensor | None) -> Tensor:
            nonlocal before, rows
            if goes_on is not None:
                before, rows = before[goes_on], rows[goes_on]
            before = torch.cat([before, ids], 1)
            return model.run({"pixels": pixels, "image_index": rows, "text_ids": before, "text_mask": torch.ones_like(before)})["logits"]

        return step

    with torch.no_grad():
        cached, whole = (beam(step, given, rules, 3) for step in (stepping(model, model.look(pixels)), anew()))
        assert torch.equal(cached.ids, whole.ids)
        torch.testing.assert_close(cached.scores, whole.scores, rtol=1e-4, atol=1e-5)
        greedy = [continued(step, given, rules) for step in (stepping(model, model.look(pixels)), anew())]
        assert torch.equal(*greedy)
        assert torch.equal(beam(anew(), given, rules, 1).ids[:, 0, : greedy[0].shape[1]] == 2, greedy[0] == 2)


# batches


def test_captions_share_the_vision_pass_of_their_image(chain):
    texts = texts_of(load(str(chain / "init"), weights=False))
    items = [open_data(PAIRS, SHAPES, "train")[number] for number in range(3)]
    batch = caption_batch(items, texts, seed=0, step=0, prompt="a picture of ", captions_per_image=2)
    assert batch["samples"] == len(batch["pixels"]) == 3 and batch["image_index"].tolist() == [0, 0, 1, 1, 2, 2]
    prompt = texts.ids(["a picture of "])[0]
    for ids, mask, target, caption in zip(batch["text_ids"], batch["text_mask"], batch["target_mask"], batch["captions"], strict=True):
        said = texts.ids([caption])[0]
        assert ids[mask.bool()].tolist() == [texts.cls, *prompt, *said, texts.sep]
        assert ids[target.bool()].tolist() == [*said, texts.sep]
    sign = PairItem("x", items[0].image, ["A T-shirt, red/blue (new)!"])
    assert caption_batch([sign], texts, seed=0, step=0, plain_captions=True)["captions"] == ["a t shirt red blue new"]
    whole = caption_batch(items, texts, seed=0, step=0)
    assert len(whole["captions"]) == sum(len(item.captions) for item in items) and whole["references"] == [i.captions for i in items]
    assert whole["target_mask"].sum() == whole["text_mask"].sum() - len(whole["captions"])
    short = caption_batch(items, texts, seed=0, step=0, prompt="a picture of ", max_tokens=len(prompt) + 4)
    assert short["text_ids"].shape[1] == len(prompt) + 4 and bool((short["text_ids"][:, -1] == texts.sep).all())


# stages


@pytest.fixture(scope="module")
def captioners(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher`, `pruned` (with that teacher) and `cut` (`pruned` cut again)."""
    root = tmp_path_factory.mktemp("captioners")
    run_stage("finetune", out=str(root / "teacher"), model=str(chain / "init"), **CAPTIONS)
    run_stage("prune", out=str(root / "pruned"), **pruning(chain, root))
    run_stage("prune", out=str(root / "cut"), from_gates=str(root / "pruned"), sparsity=0.5, eval_limit=4)
    return root


def pruning(chain: Path, root: Path) -> dict[str, Any]:
    return {"model": str(chain / "student"), "teacher": str(root / "teacher"), "sparsity": 0.4, **CAPTIONS}


def test_a_captioner_is_trained_pruned_and_cut_again(captioners):
    for name in ("teacher", "pruned", "cut"):
        manifest, loaded = require_complete(str(captioners / name)), load(str(captioners / name))
        assert loaded.abilities == {"caption"} and (loaded.config.prompt, loaded.config.caption_tokens) == ("a picture of ", [5, 24])
        val = manifest.metrics["val"]
        assert val["images"] == 4 and val["loss"] > 0 and {"cider_d", "bleu_4", "rouge_l"} <= val.keys()
    pruned = require_complete(str(captioners / "pruned"))
    assert {"caption", "kd", "lagrangian"} <= pruned.metrics["train"].keys() or {"caption", "kd"} <= pruned.metrics["train"].keys()
    assert set(pruned.extra["influence"]["inputs"]) == {"image", "text"}
    assert pruned.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.02)
    assert require_complete(str(captioners / "cut")).accounting["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)


def test_eval_measures_and_writes_what_was_said(captioners, tmp_path):
    asked = {"model": str(captioners / "pruned"), "data": SHAPES, "task": "captioning", "split": "val"}
    out, said = tmp_path / "e.json", tmp_path / "new" / "c.jsonl"
    found = run_stage("eval", **asked, out=str(out), captions=str(said))
    rows = [json.loads(line) for line in said.read_text().splitlines()]
    assert found["metrics"]["images"] == len(rows) and all(row["references"] for row in rows)
    assert found["manner"]["max_length"] == 24 and found["manner"]["length_rule"] == "published"  # as it was tuned
    assert "Penn Treebank" in found["metric"] and 0 <= found["metrics"]["cider_d"] <= 10
    model = load(str(captioners / "pruned"))
    describer, val = Describer(model, Manner.of(model)), open_data(PAIRS, SHAPES, "val")
    first = caption_batch([val[0]], describer.texts, seed=0, step=0)
    assert describer(first["pixels"], ["x"]) == [rows[0]["caption"]]
    assert len(describer.texts.ids([rows[0]["caption"]])[0]) <= 24
    said.unlink()
    again = run_stage("eval", **asked, out=str(out), captions=str(said))  # its file is gone, so that the result is not whole
    assert said.exists() and again["metrics"] == found["metrics"]
    one, other = (run_stage("eval", **asked, decoding="sample", batch_size=size, seed=3)["metrics"] for size in (1, 64))
    assert one == other
    for mine in ("question", "caption"):  # neither another file, nor data with captions
        (tmp_path / "mine.jsonl").write_text(json.dumps({"image": "x.png", mine: "q"}))
        with pytest.raises(BadInput, match="no file of captions"):
            run_stage("eval", **asked, captions=str(tmp_path / "mine.jsonl"))


def test_eval_counts_meteor_and_spice_where_they_are_asked_for(captioners, tmp_path, monkeypatch):
    asked = {"model": str(captioners / "pruned"), "data": SHAPES, "task": "captioning", "split": "val"}
    with pytest.raises(BadInput, match=r"needs pycocoevalcap|needs Java|is not CoreNLP"):
        run_stage("eval", **asked, spice=str(tmp_path))
    checked = []
    monkeypatch.setattr(java_metrics, "check", lambda *what: checked.append(what))
    monkeypatch.setattr(java_metrics, "meteor", lambda said, known: len(said) / 100)
    monkeypatch.setattr(java_metrics, "spice", lambda said, known, folder: len(known) / 200)
    found = run_stage("eval", **asked, meteor=True, spice="corenlp")["metrics"]
    assert checked == [("METEOR",), ("SPICE", "corenlp")]
    assert (found["meteor"], found["spice"]) == (found["images"] / 100, found["images"] / 200)
    assert found["standard_errors"]["cider_d"] >= 0


def test_a_picture_and_a_folder_of_pictures_are_described(captioners, tmp_path, evlm):
    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "torn.png").write_text("no picture")
    (tmp_path / "notes.doc").write_text("x")
    model, out = str(captioners / "cut"), tmp_path / "said.jsonl"
    code, stdout, _ = evlm("predict", "--model", model, "--image", tmp_path / "0.png", "--json")
    assert code == 0 and json.loads(stdout)["caption"]
    code, stdout, stderr = evlm("predict", "--model", model, "--image", tmp_path, "--out", out, "--json")
    found = json.loads(stdout)
    assert code == 0 and found.pop("manner") and found == {"described": 2, "skipped": 1, "out": str(out)}
    found = predict.run(model=model, image=str(tmp_path), device="cpu")
    assert [json.loads(line) for line in out.read_text().splitlines()] == found["captions"]
    assert "torn.png" in stderr and ".doc 1" in stderr
    drawn_once, again, other = (
        predict.run(model=model, image=str(tmp_path / "0.png"), decoding="sample", seed=seed, device="cpu")["caption"] for seed in (1, 1, 2)
    )
    assert drawn_once == again != other
    code, stdout, stderr = evlm("predict", "--model", model, "--image", tmp_path / "0.png", "--decoding", "sample", "--seed", 1, "--json")
    assert code == 0 and json.loads(stdout)["caption"] == drawn_once, stderr
    code, _, stderr = evlm("predict", "--model", model, "--image", tmp_path / "torn.png")
    assert code == 3 and "torn.png" in stderr
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn.png").rename(tmp_path / "torn" / "torn.png")
    for given, what in (
        (("--image", tmp_path / "torn"), "the one picture cannot be read"),
        (("--image", tmp_path / "0.png", "--top-k", 3), "top_k does not go with beam"),
        (("--image", tmp_path / "0.png", "--seed", 3), "goes with decoding sample"),
        (("--image", tmp_path / "0.png", "--beams", 1, "--length-penalty", 2), "goes with several beams"),
        (("--image", tmp_path / "0.png", "--min-length", 30), "min_length 30"),  # it was tuned with 24 at most
    ):
        code, _, stderr = evlm("predict", "--model", model, *given)
        assert code in (2, 3) and what in " ".join(stderr.split()), (given, stderr)


def test_graphs_describe_as_the_network_does(captioners, tmp_path, monkeypatch, capsys):
    onnx = tmp_path / "onnx"
    made = run_stage("export", model=str(captioners / "pruned"), format="onnx", data=SHAPES, split="val", rounds=0, out=str(onnx))
    assert made.metrics["onnx_fp32"]["cider_d"] == pytest.approx(made.metrics["torch_fp32"]["cider_d"])
    description = json.loads((onnx / "onnx.json").read_text())
    assert description["prompt"] == "a picture of " and description["caption_tokens"] == [5, 24]
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "red.png")
    said = [predict.run(model=str(path), image=str(tmp_path / "red.png"), device="cpu") for path in (onnx, captioners / "pruned")]
    assert said[0] == said[1]
    (block,) = (block for block in blocks(ROOT / "docs" / "export.md") if "caption_tokens" in block.text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "describer-onnx").symlink_to(onnx)
    exec(compile(block.text.replace("picture.png", "red.png"), block.where, "exec"), {})
    greedy = predict.run(model=str(captioners / "pruned"), image="red.png", decoding="greedy", device="cpu")
    assert capsys.readouterr().out.strip() == greedy["caption"]
    given = description["graphs"]["image"]["outputs"]
    given.pop(next(name for name in given if name.startswith("key")))
    with pytest.raises(BadInput, match="graph image gives key"):
        parse(Description, description, "onnx.json")


def test_a_plan_and_latencies(captioners, chain):
    steps = [
        Step("pruned", "prune", stage_settings("prune", {"out": "a", **pruning(chain, captioners)})),
        Step("test", "eval", stage_settings("eval", {"model": "a", "data": SHAPES, "task": "captioning", "split": "val"})),
        Step("timed", "bench", stage_settings("bench", {"models": [str(captioners / "teacher"), "a"]})),
    ]
    made = plan(steps, QUIET)
    assert not made.problems.found and all(stage.memory for stage in made.stages)
    timed = run_stage("bench", models=[str(captioners / "cut"), str(chain / "init")], rounds=1, warmup_rounds=0, batch_sizes=[2])
    assert timed["timed"] == Captioning.timed_as and [model["trained"] for model in timed["models"]] == [True, False]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(chain, captioners, tmp_path):
    run_stage("init", out=str(tmp_path / "calm"), size="tiny", data=SHAPES, settings=SIZES | {"dropout": 0.0})
    settings = {**pruning(chain, captioners), "model": str(tmp_path / "calm"), "max_steps": 3, "log_every": 1}
    run_stage("prune", out=str(tmp_path / "one"), **settings)
    nursery.whole("prune", processes=2, out=str(tmp_path / "two"), **settings)
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    for ours, theirs in zip(map(json.loads, one), map(json.loads, two), strict=True):
        for name in ("loss", "caption", "kd"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name


def test_a_teacher_that_is_remembered_says_the_same(chain, captioners):
    student, teacher = load(str(chain / "student")), load(str(captioners / "teacher"))
    hard = Captions(student.model.gain("caption")[0])
    items, texts = [open_data(PAIRS, SHAPES, "train", image_size=student.preprocessing)[number] for number in range(3)], texts_of(student)
    batch = caption_batch(items, texts, seed=0, step=0, prompt="a picture of ")
    live, kept = LiveTeacher(hard, teacher.model), hard.cached(teacher.model)
    mask = batch["text_mask"].bool()
    with torch.inference_mode():
        wanted = live(batch, 0, {"logits"}, None)["logits"]
        for _ in range(2):
            torch.testing.assert_close(kept(batch, 0, {"logits"}, None)["logits"][mask], wanted[mask])


def test_a_blip_that_captions_learns_and_is_pruned(chain, tmp_path):
    tokenizer = load(str(chain / "init"), weights=False).tokenizer
    config = CONFIGS["blip-caption"].copy()
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(tokenizer), 40
    config.text_config.bos_token_id, config.text_config.sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    network(config).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    run_stage("import", model=str(tmp_path / "hf"), out=str(tmp_path / "blip"))
    run_stage("prune", out=str(tmp_path / "pruned"), model=str(tmp_path / "blip"), teacher=str(tmp_path / "blip"), sparsity=0.3, **CAPTIONS)
    manifest = require_complete(str(tmp_path / "pruned"))
    assert manifest.family == "blip" and {"caption", "kd"} <= manifest.metrics["train"].keys()
    found = run_stage("eval", model=str(tmp_path / "pruned"), data=SHAPES, task="captioning", split="val")
    assert found["metrics"]["images"] == 4


# self-critical training


def critic(model: Any, **changes: Any) -> SelfCritical:
    """Rewarded is every token 7 that is said."""
    rules = Rules(end=2, filler=2, most=5)
    return SelfCritical(
        model, lambda said, known: [float(text.count("7")) for text in said], lambda ids: " ".join(map(str, ids)), [1, 5], rules, **changes
    )


def test_samples_are_told_apart_by_their_reward():
    torch.manual_seed(0)
    model = network(CONFIGS["xvlm-caption"])
    batch = {"pixels": torch.randn(3, 3, 16, 16), "references": [["x"]] * 3, "item_ids": ["a", "b", "c"]}
    objective = critic(model, samples=8, baseline="samples")
    rows = torch.arange(3).repeat_interleave(8)
    ids = objective.sampled(model, batch, rows, 0)
    assert torch.equal(ids, objective.sampled(model, batch, rows, 0)) and not torch.equal(ids, objective.sampled(model, batch, rows, 1))
    some = {**batch, "pixels": batch["pixels"][1:], "item_ids": ["b", "c"]}
    apart = objective.sampled(model, some, torch.arange(2).repeat_interleave(8), 0)
    assert torch.equal(apart, ids[8:, : apart.shape[1]])  # of an image, whatever is described beside it
    found = objective.log_probability(model, batch, rows, ids)
    step, last, total = stepping(model, model.look(batch["pixels"]), rows), torch.tensor([[1, 5]]).expand(24, -1), []
    for number in range(ids.shape[1]):
        scores = step(last, None)[:, -1].log_softmax(-1)
        last = ids[:, number : number + 1]
        total.append(scores.gather(1, last)[:, 0])
    lengths = [text.index(2) + 1 if 2 in text else len(text) for text in ids.tolist()]
    wanted = torch.stack([torch.stack(total, 1)[row, :length].mean() for row, length in enumerate(lengths)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    others = mean_of_others(torch.tensor([1.0, 2.0, 6.0]), 3)
    assert others.tolist() == [4.0, 3.5, 1.5]


@pytest.mark.parametrize("baseline", ["greedy", "samples"])
def test_a_network_learns_to_say_what_is_rewarded(baseline):
    torch.manual_seed(0)
    model = network(CONFIGS["xvlm-caption"]).train()
    batch = {"pixels": torch.randn(2, 3, 16, 16), "references": [["x"]] * 2, "item_ids": ["a", "b"]}
    objective, rewards = critic(model, samples=6, baseline=baseline), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(40):
        losses = objective(batch, step)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(losses["reward"]))
    assert model.training and sum(rewards[-5:]) > sum(rewards[:5]) + 5


def test_self_critical_training_goes_on_from_a_captioner(captioners, tmp_path):
    settings: dict[str, Any] = {
        **CAPTIONS,
        "model": str(captioners / "cut"),
        "self_critical": True,
        "samples": 2,
        "max_steps": 2,
        "log_every": 1,
    }
    run_stage("finetune", out=str(tmp_path / "o"), **settings)
    manifest = require_complete(str(tmp_path / "o"))
    assert {"self_critical", "reward", "baseline_reward"} <= manifest.metrics["train"].keys() and manifest.metrics["val"]["images"] == 4
    made = plan([Step("o", "finetune", stage_settings("finetune", {"out": "a", **settings}))], QUIET)
    assert not made.problems.found and made.stages[0].memory
    taught = {**settings, "teacher": str(captioners / "teacher"), "out": str(tmp_path / "p")}
    with pytest.raises(BadInput, match="self_critical with a teacher"):
        run_stage("finetune", **taught)
    with pytest.raises(BadInput, match="two samples or more"):
        run_stage("finetune", **{**settings, "out": str(tmp_path / "p"), "samples": 1, "baseline": "samples"})


# what is refused


def test_refusals(chain, captioners, tmp_path):
    init, out = str(chain / "init"), str(tmp_path / "o")
    with pytest.raises(BadInput, match="cannot describe images") as refused:
        run_stage("finetune", **{**CAPTIONS, "model": str(chain / "teacher"), "out": out})
    assert "answers questions" in refused.value.why
    with pytest.raises(BadInput, match="cannot describe images") as refused:
        run_stage("eval", model=init, data=SHAPES, task="captioning")
    assert "--task captioning" in refused.value.fix
    with pytest.raises(BadInput, match="prompt"):
        run_stage("finetune", **{**CAPTIONS, "model": init, "out": out, "prompt": "a picture of a thing " * 20})
    with pytest.raises(BadInput, match="max_length 4"):
        run_stage("finetune", **{**CAPTIONS, "model": init, "out": out, "max_length": 4, "min_length": 1})
    with pytest.raises(BadInput, match="less than min_length"):
        run_stage("finetune", **{**CAPTIONS, "model": init, "out": out, "max_length": 4})
    with pytest.raises(BadInput, match="max_length 500"):
        run_stage("eval", model=str(captioners / "cut"), data=SHAPES, task="captioning", max_length=500)
    with pytest.raises(BadInput, match="beams does not go with greedy"):
        run_stage("eval", model=str(captioners / "cut"), data=SHAPES, task="captioning", decoding="greedy", beams=5)
    assert not Path(out).exists()


def test_a_prompt_without_words_is_said():
    from efficientvlm.tasks.describing import of_prompt

    texts = SimpleNamespace(unknown=1, ids=lambda given: [[1, 7]])
    assert "unknown to the tokenizer" in of_prompt(texts, "ein Bild").remarks[0]  # type: ignore[arg-type]
    assert not of_prompt(texts, "").remarks  # type: ignore[arg-type]


def test_a_report_shows_cider_as_a_number(captioners, tmp_path):
    models = {"teacher": str(captioners / "teacher"), "cut": str(captioners / "cut")}
    asked = {"data": SHAPES, "task": "captioning", "split": "val"}
    evals = {label: str(tmp_path / f"{label}.json") for label in models}
    for label, model in models.items():
        run_stage("eval", model=model, out=evals[label], **asked)
    bench = str(tmp_path / "bench.json")
    run_stage("bench", models=list(models.values()), rounds=1, warmup_rounds=0, batch_sizes=[1], out=bench)
    text = run_stage("report", out=str(tmp_path / "report"), models=models, evals=evals, bench=bench)["text"]
    row = next(line for line in text.splitlines() if line.strip().startswith("CIDEr-D"))
    assert "%" not in row and "latency: image tensors to captions by beam search" in " ".join(text.split())
    run_stage("eval", model=models["cut"], out=str(tmp_path / "other.json"), decoding="greedy", **asked)
    with pytest.raises(BadInput):  # captions that were written in another manner are of another test
        run_stage("report", out=str(tmp_path / "other"), models=models, evals={**evals, "cut": str(tmp_path / "other.json")}, bench=bench)


def test_the_memory_of_a_cached_teacher_is_that_of_every_caption(chain, monkeypatch):
    teacher, source = load(str(chain / "init"), weights=False), open_data(PAIRS, SHAPES, "train")
    config = parse(CaptioningSettings, {"model": "m", "data": "d", "out": "o", "task": "captioning", "prompt": ""}, "test")
    captions = [caption for contents in source.contents() for content in contents for caption in content.captions]
    wanted = int(texts_of(teacher).batch(captions)[1].sum()) * teacher.sizes.vocab_size * 4
    assert remembered.bytes_of_captions(config, teacher, source, 10**6) == wanted
    monkeypatch.setattr(remembered, "SAMPLED_TEXTS", 10)
    assert remembered.bytes_of_captions(config, teacher, source, 10**6) == pytest.approx(wanted, rel=0.2), "a part stands for all"
