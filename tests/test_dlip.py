"""DLIP's distillation: which terms there are in which networks, how what differs in size meets, stages with a student of other width."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nursery
import pytest
import torch
from compression_cases import CONFIGS, network
from conftest import SHAPES, SIZES, TRAIN, run_stage
from safetensors import safe_open
from test_momentum import finder  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.compression.surgery import slice_model
from efficientvlm.compression.widths import resize_model, resolve_sizes
from efficientvlm.errors import BadInput
from efficientvlm.families.checks import check_config
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.family import XVLM
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.distances import alignment, divergence, maps_divergence, of_last_word, of_words
from efficientvlm.objectives.dlip import TABLE, distilled, last_layers, needs
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.losses import Contrast, Queues
from efficientvlm.objectives.terms import Pairing, Term, TowerMap
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.runtime.exchange import Rows
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.dlip import PRESETS, AllWeights
from efficientvlm.settings.methods import METHODS
from efficientvlm.training.state import newest

CLOSE = dict(rtol=1e-5, atol=1e-6)
TASKS = METHODS["dlip"]


def settings(task: str, **changes: Any) -> Any:
    """Of the stage that learns `task` from a teacher by this method."""
    stage = "distill" if task == "pretraining" else "finetune"
    given = {"task": task, "distillation": "dlip", "model": "s", "teacher": "t", "data": "shapes", "out": "o"}
    return stage_settings(stage, {**given, **changes})


def xvlm(seed: int = 0, **changes: Any) -> Any:
    sizes = {"vision_width": 16, "text_width": 16, "vision_layers": 2, "text_layers": 1, "fusion_layers": 2, "embed_dim": 8}
    sizes |= {"vision_heads": 4, "text_heads": 4, "vision_intermediate": 24, "text_intermediate": 24, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    return XVLM().build(XVLMConfig(**{**sizes, "vocab_size": 60, "max_positions": 12, "dropout": 0.0, "initializer_range": 0.3, **changes}))


def pairs(more: int = 0) -> dict[str, Any]:
    """Four pairs, of which two texts are padded, all by `more` tokens besides."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 5:] = mask[3, 4:] = 0
    ids = torch.randint(5, 60, (4, 7), generator=draw) * mask
    ids, mask = F.pad(ids, (0, more)), F.pad(mask, (0, more))
    pixels = torch.randint(256, (4, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return {"pixels": pixels, "text_ids": ids, "text_mask": mask, "image_ids": torch.arange(4), "samples": 4}


# what there is to compare


def test_settings_and_table_name_the_same_terms() -> None:
    names = [row.weight for row in TABLE]
    assert len(names) == 10 and set(names) == {*AllWeights.model_fields, "verdict"} == {name for kind in PRESETS.values() for name in kind}
    assert sum(map(len, PRESETS.values())) == len(names)
    assert all(set(kind.model_fields["weights"].annotation.model_fields) <= set(names) for kind in TASKS.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_terms_of_one_kind_and_weights_go_before_it(preset: str) -> None:
    chosen = settings("pretraining", preset=preset, weights={"alignment": 0.25, "decoder_state": 0.0}).weights.model_dump()
    assert chosen.pop("alignment") == 0.25 and chosen.pop("decoder_state") == 0
    assert {name for name, weight in chosen.items() if weight} == {*PRESETS[preset]} - {"alignment", "decoder_state", "verdict"}
    again = settings("pretraining", preset=preset, weights=settings("pretraining", preset=preset).weights.model_dump())
    assert again.weights == settings("pretraining", preset=preset).weights


def terms_of(hard: Any, teacher: Any, task: str, **changes: Any) -> dict[str, str]:
    """Term → where it is compared."""
    return {term.weight: term.tap for term in distilled(hard, teacher, settings(task, **changes)).terms}  # type: ignore[attr-defined]


def test_every_network_is_compared_where_it_has_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = xvlm(), xvlm(1)
    contrast = {"image_features": "image_feature", "text_features": "text_feature", "alignment": "contrast"}
    fused = {"fused_feature": "hidden", "fusion_self_attention": "self_attention", "fusion_cross_attention": "cross_attention"}
    found = terms_of(XvlmPretraining(student, losses=("itc", "itm", "mlm"), seed=0), teacher, "pretraining")
    assert found == contrast | {name: f"fusion.{kind}@itm_positive" for name, kind in fused.items()}
    said = capsys.readouterr().err
    assert said.startswith("distillation: left out") and "lm_logits (decoder)" in said and said.count("\n") == 1
    blip = network(CONFIGS["blip-pretraining"])
    found = terms_of(BlipPretraining(blip, losses=("itc", "itm", "lm"), seed=0), blip, "pretraining")
    writing = {"decoder_state": "decoder.hidden", "lm_logits": "lm_logits", "decoder_self_attention": "decoder.self_attention"}
    assert found == contrast | writing | {name: f"text.{kind}@itm_positive" for name, kind in fused.items()}
    assert capsys.readouterr().err == ""
    blip = network(CONFIGS["blip-qa"])
    decoder = {"decoder_state": "decoder.hidden", "lm_logits": "logits", "decoder_self_attention": "decoder.self_attention"}
    seeing = {name: f"text.{kind}" for name, kind in fused.items()}
    assert terms_of(Generation(blip), network(CONFIGS["blip-qa"]), "vqa") == decoder | seeing | {"image_features": "vision.hidden"}
    assert "text_features (text encoder)" in capsys.readouterr().err
    blip = network(CONFIGS["blip-caption"])
    assert terms_of(Captions(blip), network(CONFIGS["blip-caption"]), "captioning") == decoder | {"image_features": "vision.hidden"}
    assert capsys.readouterr().err == ""
    with pytest.raises(BadInput, match="nothing to learn"):
        distilled(XvlmPretraining(student, losses=("mlm",), seed=0), teacher, settings("pretraining", losses=["mlm"], preset="logit"))
    hard = Captions(blip)
    with pytest.raises(BadInput, match="text_projection"):
        distilled(hard, blip, settings("captioning", adapters="text_projection"))
    assert distilled(hard, blip, settings("captioning", kd=0)) is hard


# how what differs in size meets


def test_heads_meet_by_the_numbers_that_they_had_and_at_equal_distance() -> None:
    student, teacher = xvlm(text_heads=2), xvlm(1, fusion_layers=3)
    cut = slice_model(teacher, [unit for unit in teacher.units() if unit.group != "fusion.2.head" or unit.index in (0, 3)])
    assert last_layers(student.config, teacher.config)["fusion"].heads["head"][-1] == ([0, 1], [0, 2])
    assert last_layers(student.config, cut.config)["fusion"].heads["head"][-1] == ([0], [0])
    assert last_layers(xvlm().config, cut.config)["fusion"].heads["head"][-1] == ([0, 3], [0, 1])
    assert last_layers(teacher.config, student.config)["fusion"].heads["cross_head"][-1] == ([0, 1, 2, 3], [0, 0, 1, 1])
    found = last_layers(student.config, teacher.config)["fusion"]
    assert found.hidden == [(2, 3)] and found.attention == [(1, 2), (1, 2)]
    early = network(CONFIGS["blip-caption"].copy(cross_layers={"decoder": [0]}))
    met = last_layers(early.config, CONFIGS["blip-caption"])["decoder"]
    assert met.attention == [(1, 1), (0, 1)] and met.heads["cross_head"][0][0] and not met.heads["cross_head"][1][0]


def test_a_head_follows_the_one_that_it_was_cut_out_of() -> None:
    """And so it does where the student has fewer layers, or has lost heads since."""
    teacher = network(CONFIGS["blip-caption"])
    weak = [unit for unit in teacher.units() if unit.kind in ("head", "cross_head") and unit.index == 0]
    with torch.no_grad():
        for site in (site for unit in weak for site in unit.sites):
            teacher.get_parameter(site.tensor).narrow(site.dim, site.start, site.stop - site.start).mul_(0.01)
    sizes = resolve_sizes(teacher.config, {"decoder": 16}, {}, {})
    student, _ = resize_model(teacher, sizes)
    count, total = (net.config.sizes().heads["decoder"][-1] for net in (student, teacher))
    assert (count, total) == (2, 3) and student.config.head_source["decoder.1.head"] == [1, 2]
    met = last_layers(student.config, teacher.config)["decoder"].heads
    assert met["head"][-1] == met["cross_head"][-1] == ([0, 1], [1, 2])
    shallow = student.config.with_layers({"vision": [0], "text": [], "decoder": [1]})
    assert last_layers(shallow, teacher.config)["decoder"].heads["head"][-1] == ([0, 1], [1, 2])
    assert last_layers(student.config.with_kept({"decoder.1.head": [1]}), teacher.config)["decoder"].heads["head"][-1] == ([0], [2])
    copied = type(student.config).from_dict(student.config.to_dict())
    assert copied.head_source == student.config.head_source
    spoilt = student.config.copy(head_source={"decoder.1.head": ["1"]})
    with pytest.raises(BadInput, match="head_source"):
        check_config(spoilt, "config.json")


def pairing(mask: Tensor | None, heads: int = 1, kind: str = "cross_head") -> Pairing:
    return Pairing(TowerMap([(1, 1)], [(0, 0)], {kind: [([*range(heads)], [*range(heads)])]}), mask)


def test_patches_of_a_finer_grid_are_added_up() -> None:
    """A student with a grid of 2, a teacher with one of 4: what four patches have together is what one has."""
    fine = torch.randn(3, 1, 5, 17, generator=torch.Generator().manual_seed(0)).softmax(-1)
    blocks = fine[..., 1:].reshape(3, 1, 5, 2, 2, 2, 2).sum((4, 6)).flatten(3)
    coarse, student = torch.cat([fine[..., :1], blocks], -1), torch.randn(3, 1, 5, 5).softmax(-1)
    term = Term("", "text.cross_attention", maps_divergence)
    how: dict[str, Any] = {"temperature": 0.0, "mean": False, "shrunk": False}
    found = maps_divergence([student], [fine], term, pairing(None), **how)
    torch.testing.assert_close(found, divergence(student, coarse, 0.0).mean(), **CLOSE)
    assert maps_divergence([coarse], [fine], term, pairing(None), **how).abs() < 1e-6
    odd = torch.randn(2, 1, 3, 10).softmax(-1)  # a grid of 3 cannot be divided by 2
    assert maps_divergence([odd], [odd], term, pairing(None), **how).abs() < 1e-6
    assert torch.isfinite(maps_divergence([odd], [torch.randn(2, 1, 3, 5).softmax(-1)], term, pairing(None), **how))


def test_maps_of_which_no_head_is_left_are_not_compared() -> None:
    term, how = Term("", "text.self_attention", maps_divergence), {"temperature": 0.05, "shrunk": False}
    none = torch.zeros(2, 0, 3, 3, requires_grad=True)
    for mean in (False, True):
        assert maps_divergence([none], [torch.ones(2, 1, 3, 3) / 3], term, pairing(None, 0, "head"), mean=mean, **how) == 0


def test_words_are_tokens_that_were_said_and_predict_another() -> None:
    """A prompt of two tokens, three words and the end; one word and the end; the end alone."""
    target = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]])
    predicts = F.pad(target[:, 1:], (0, 1))
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 7, 4, generator=draw) for _ in range(2))
    apart = 1 - F.cosine_similarity(ours, theirs, dim=-1)
    term = Term("", "decoder.hidden", of_words)
    found = [distance(ours, theirs, term, Pairing(TowerMap([], [], {}), predicts)) for distance in (of_words, of_last_word)]
    torch.testing.assert_close(found[0], torch.stack([*apart[0, 3:6], apart[1, 3]]).mean(), **CLOSE)
    torch.testing.assert_close(found[1], torch.stack([apart[0, 5], apart[1, 3]]).mean(), **CLOSE)


def test_alignment_shares_the_target_among_pairs_that_belong_together() -> None:
    draw = torch.Generator().manual_seed(0)
    image, text, image_t, text_t = (F.normalize(torch.randn(3, 4, generator=draw), dim=-1) for _ in range(4))
    queue = [F.normalize(torch.randn(2, 4, generator=draw), dim=-1) for _ in range(2)]
    same = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1]]).bool()
    temperature, alpha = torch.tensor(0.5), 0.3
    rows = Rows(3)
    nothing = torch.zeros(0, 4)
    queues = Queues(*queue, nothing, nothing, torch.zeros(0).long())
    ours, theirs = Contrast(image, text, temperature, rows, same, queues), Contrast(image_t, text_t, torch.tensor(9.0), rows)
    expected = 0.0
    for feature, taught, keys in ((image, image_t, torch.cat([text_t, queue[1]])), (text, text_t, torch.cat([image_t, queue[0]]))):
        for row in range(3):
            hard = same[row] / same[row].sum()
            target = alpha * (taught[row] @ keys.T / 0.5).softmax(0) + (1 - alpha) * hard
            expected -= float((target * (feature[row] @ keys.T / 0.5).log_softmax(0)).sum()) / 6
    found = alignment(ours, theirs, Term("", "contrast", alignment), pairing(None), alpha=alpha)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        coarse = alignment(ours, theirs, Term("", "contrast", alignment), pairing(None), alpha=alpha)  # type: ignore[arg-type]
    assert coarse == found, "close keys are told apart in bfloat16 too"
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing_but_with_the_quirk() -> None:
    student, teacher = xvlm(), xvlm(1, text_width=24, text_heads=3)
    hard = XvlmPretraining(student, losses=("itc", "itm"), seed=0)
    chosen = settings("retrieval")
    torch.manual_seed(0)
    objective = distilled(hard, teacher, chosen)
    short, long = (objective(pairs(more), 0) for more in (0, 3))
    assert len([name for name in short if name.startswith("kd_")]) == 6
    for name, value in short.items():
        torch.testing.assert_close(long[name], value, rtol=1e-4, atol=1e-5)
    quirky = distilled(hard, xvlm(1), settings("retrieval", quirks={"unmasked_padding": True}))
    assert not torch.allclose(quirky(pairs(), 0)["kd"], quirky(pairs(3), 0)["kd"], rtol=1e-3)


def test_states_of_other_width_meet_through_projections_that_learn_and_are_not_deployed() -> None:
    student, teacher = xvlm(), xvlm(1, text_width=24, text_heads=3)
    hard = XvlmPretraining(student, losses=("itc", "itm"), seed=0)
    objective: Any = distilled(hard, teacher, settings("retrieval", weights={"alignment": 0.5}, kd=2.0))
    (widen,) = objective.projections.values()
    assert isinstance(widen, nn.Linear) and (widen.in_features, widen.out_features) == (16, 24)
    losses = objective(pairs(), 0)
    losses["loss"].backward()
    assert widen.weight.grad is not None and widen.weight.grad.abs().sum() > 0
    torch.testing.assert_close(losses["loss"], losses["itc"] + losses["itm"] + 2 * losses["kd"], **CLOSE)
    parts = [value for name, value in losses.items() if name.startswith("kd_")]
    torch.testing.assert_close(losses["kd"], torch.stack(parts).sum(), **CLOSE)
    assert not any("projections" in name for name in student.state_dict())
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    by_texts: Any = distilled(hard, teacher, settings("retrieval", adapters="text_projection"))
    assert not by_texts.projections
    record = hard.passes(student, pairs(), 0, by_texts.want).record, hard.passes(teacher, pairs(), 0, by_texts.want).record
    states = [net.text_proj(one["fusion.hidden@itm_positive"][-1][:, 0]) for net, one in zip((student, teacher), record, strict=True)]
    torch.testing.assert_close(by_texts(pairs(), 0)["kd_fused_feature"], (1 - F.cosine_similarity(*states)).mean(), **CLOSE)


def test_only_last_maps_are_computed() -> None:
    student, teacher = xvlm(), xvlm(1, fusion_layers=3)
    objective: Any = distilled(XvlmPretraining(student, losses=("itc", "itm"), seed=0), teacher, settings("retrieval", preset="attention"))
    kinds = ("self_attention", "cross_attention")
    assert objective.want == {f"fusion.{kind}.1@itm_positive" for kind in kinds}
    assert objective.asked == {f"fusion.{kind}.2@itm_positive" for kind in kinds}


# which teachers will do


def loaded(model: Any, vocabulary: dict[str, int], size: int = 32) -> Any:
    sizes = model.config.sizes()
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary)
    return SimpleNamespace(
        path="runs/x", family=XVLM(), model=model, tokenizer=tokenizer, sizes=sizes._replace(image_size=size), preprocessing=None
    )


def test_a_teacher_of_other_tokens_pictures_or_features_is_refused() -> None:
    words, student = {"a": 0}, xvlm()
    teacher = loaded(xvlm(1, text_width=24, vision_width=24, text_heads=2, vision_layers=3), words)
    assert not list(needs(loaded(student, words), teacher, settings("retrieval")))
    one: dict[str, Any] = {"weights": dict.fromkeys(("image_features", "text_features"), 0.0), "preset": "feature"}
    for other, chosen, what in (
        (loaded(student, {"b": 0}), {}, "other tokenizers|different tokenizers"),
        (loaded(student, words, 64), {}, "different pictures"),
        (loaded(xvlm(embed_dim=4), words), {}, "cannot be aligned"),
        (loaded(xvlm(embed_dim=4), words), {"adapters": "text_projection", "weights": {"alignment": 0.0}}, "text_projection"),
        (loaded(student, words), {**one, "weights": {**one["weights"], "fused_feature": 0.0}}, "no term has a weight"),
    ):
        found = list(needs(other, teacher, settings("retrieval", **chosen)))
        assert len(found) == 1
        with pytest.raises(BadInput, match=what):
            raise found[0]
    assert not list(needs(loaded(xvlm(embed_dim=4), words), teacher, settings("retrieval", weights={"alignment": 0.0})))


# stages

NARROW = {**SIZES, "vision_width": 12, "text_width": 24, "vision_heads": 3, "text_heads": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def narrow(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of other widths than `chain` has, without dropout."""
    root = tmp_path_factory.mktemp("narrow")
    layers = {"vision_layers": 2, "text_layers": 1, "fusion_layers": 1}
    run_stage("init", out=str(root / "narrow"), size="tiny", tokenizer=str(chain / "init"), settings={**NARROW, **layers})
    return root / "narrow"


SHORT: dict[str, Any] = {**TRAIN, "max_steps": 4, "log_every": 1, "data": SHAPES, "distillation": "dlip"}


@pytest.fixture(scope="module")
def blips(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher` and `student`, narrower and shallower, of a BLIP before any task, without dropout."""
    root = tmp_path_factory.mktemp("blips")
    sizes = {**SIZES, "dropout": 0.0, "network": "pretrain"}
    run_stage("init", out=str(root / "teacher"), family="blip", size="tiny", data=SHAPES, settings=sizes)
    run_stage("shrink", out=str(root / "student"), model=str(root / "teacher"), layers={"vision": 2}, width={"vision": 8, "text": 8})
    return root


@pytest.mark.slow
def test_interrupted_and_spread_over_processes_it_is_the_same_run(blips: Path, tmp_path: Path) -> None:
    """All nine terms. Projections lie in the training state; contrast spans the pairs of all processes."""
    chosen = {**SHORT, "model": str(blips / "student"), "teacher": str(blips / "teacher"), "batch_size": 8, "queue": 16}
    whole, broken, two = (str(tmp_path / name) for name in ("whole", "broken", "two"))
    run_stage("distill", out=whole, **chosen)
    assert nursery.finish(nursery.start("distill", fault=("stops_at", [1]), out=broken, **chosen)) == [75]
    state = newest(Path(broken, "training_state"))
    assert state is not None
    with safe_open(state / "state.safetensors", "pt") as file:
        assert sum(name.startswith("module/projections.") for name in file.keys()) == 4  # of the fused feature and the decoder's states
    nursery.whole("distill", out=broken, **chosen)
    assert Path(whole, "model.safetensors").read_bytes() == Path(broken, "model.safetensors").read_bytes()
    nursery.whole("distill", processes=2, out=two, **chosen)
    one, both = (require_complete(out).metrics["train"] for out in (whole, two))
    assert both == pytest.approx(one, rel=1e-4, abs=1e-5) and {f"kd_{name}" for name in AllWeights.model_fields} <= one.keys()


def test_it_teaches_every_stage_of_a_task(chain: Path, narrow: Path, tmp_path: Path) -> None:
    taught = {**SHORT, "task": "vqa", "teacher": str(chain / "teacher"), "decoder_init": "fusion"}
    run_stage("prune", out=str(tmp_path / "pruned"), model=str(narrow), sparsity=0.4, heads="mean", **taught)
    assert require_complete(tmp_path / "pruned").accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.05)
    spoken = {"preset": "logit", "augment": "none"}
    for cached in (False, True):
        run_stage("finetune", out=str(tmp_path / str(cached)), model=str(tmp_path / "pruned"), cache_teacher=cached, **spoken, **taught)
    live, kept = (require_complete(tmp_path / name).metrics["train"] for name in ("False", "True"))
    assert kept == pytest.approx(live, rel=1e-5) and "kd_lm_logits" in kept and "kd_image_features" not in kept
    with pytest.raises(BadInput, match=r"weights.image_features=0"):
        settings("vqa", cache_teacher=True, augment="none")
    shutil.rmtree(tmp_path / "pruned")


def test_cached_features_align_as_those_of_a_teacher_that_runs(chain: Path, narrow: Path, finder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of an X-VLM, and of a BLIP, whose temperature lies in the objective and whose queue has keys of earlier steps."""
    dual = dict.fromkeys(("fused_feature", "fusion_self_attention", "fusion_cross_attention"), 0.0)
    taught = {**SHORT, "task": "retrieval", "weights": dual, "augment": "none"}
    for name, student, teacher in (("xvlm", narrow, chain / "init"), ("blip", finder / "finder", finder / "finder")):
        for cached in (False, True):
            out = str(tmp_path / f"{name}-{cached}")
            run_stage("finetune", out=out, model=str(student), teacher=str(teacher), cache_teacher=cached, **taught)
        live, kept = (require_complete(tmp_path / f"{name}-{cached}").metrics["train"] for cached in (False, True))
        assert kept == pytest.approx(live, rel=1e-4, abs=1e-5) and {"kd_alignment", "kd_image_features", "kd_text_features"} <= kept.keys()


def test_a_blip_learns_retrieval_from_one_of_its_kind_beside_a_queue(finder: Path, tmp_path: Path) -> None:  # noqa: F811
    taught = {**SHORT, "task": "retrieval", "model": str(finder / "finder"), "teacher": str(finder / "finder"), "queue": 8}
    kd = []
    for quirk in (False, True):
        run_stage("finetune", out=str(tmp_path / str(quirk)), quirks={"queued_first": quirk}, **taught)
        kd.append(require_complete(tmp_path / str(quirk)).metrics["train"])
    assert {f"kd_{name}" for name in settings("retrieval").weights.model_dump()} <= kd[0].keys()
    assert kd[1]["kd_alignment"] > kd[0]["kd_alignment"], "more wrong partners"
