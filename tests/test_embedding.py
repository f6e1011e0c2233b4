"""Embeddings are learnt from images and sentences that are no pairs: streams, teachers, what stays as it is, pruning, two processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nursery
import pytest
import torch
from clip_folder import byte_pairs, write_clip
from conftest import QUIET, SHAPES, SIZES, TRAIN, run_stage
from safetensors.torch import load_file
from test_data_files import pictures

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load
from efficientvlm.objectives.embedding import EmbeddingTeacher
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings import idle
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages.recut import settled

DATA: dict[str, Any] = {"data": "shapes:difficulty=2,size=40", "sentences": "shapes:difficulty=2,size=33,seed=7"}
STEPS = {"max_steps": 5, "batch_size": 8, "sentence_batch_size": 6, "log_every": 1, "eval_limit": 4, "eval_sentences": 7, "lr": 1e-3}
COMMON: dict[str, Any] = {**DATA, **STEPS, "distillation": "dime-fm"}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP as `teacher`, and as `student` one with half of its layers of vision."""
    root = tmp_path_factory.mktemp("towers")
    run_stage("import", model=str(write_clip(root / "folder", byte_pairs())), out=str(root / "teacher"))
    run_stage("shrink", model=str(root / "teacher"), out=str(root / "student"), layers={"vision": 1, "text": 2})
    return root


def given(root: Path, **more: Any) -> dict[str, Any]:
    return {**COMMON, "model": str(root / "student"), "teacher": str(root / "teacher"), **more}


def test_a_tower_of_images_learns_and_that_of_texts_stays(towers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = run_stage("distill", out=str(out), **given(towers))
    assert manifest.config["task"] == "embedding"  # the only one that the method knows
    assert set(manifest.metrics["train"]) >= {"kd_vl", "kd_pvl", "kd", "loss"}
    val = manifest.metrics["val"]
    assert (val["images"], val["sentences"]) == (4, 7) and val["text_cosine"] == pytest.approx(1, abs=1e-5)
    assert -1 <= val["image_cosine"] <= 1 and 0 <= val["sentence_agreement"] <= val["sentence_in_five"] <= 1
    assert [record.split for record in manifest.data] == ["train", "val", "sentences"]
    before, after = (load(str(path)).model.state_dict() for path in (towers / "student", out))
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"vision_model", "visual_projection"}


@pytest.mark.slow
def test_streams_of_other_lengths_are_resumed_to_the_bit(towers: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = given(towers, task="embedding", augment="paper", limit=20, save_every=1, max_steps=9)
    nursery.whole("finetune", out=str(whole), **settings)
    assert nursery.finish(nursery.start("finetune", fault=("stops_at", [3]), out=str(parts), **settings)) == [75]
    nursery.whole("finetune", out=str(parts), **settings)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert require_complete(whole).metrics == require_complete(parts).metrics


@pytest.mark.slow
@pytest.mark.parametrize("learn_texts", [False, True])
def test_two_processes_learn_as_one(towers: Path, tmp_path: Path, learn_texts: bool) -> None:
    weights = {"udist": 0.1, "feature_mse": 1.0, "cosine": 0.5, "interactive": 0.2, "affinity": 0.3}
    settings = given(towers, task="embedding", learn_texts=learn_texts, weights=weights, widths=[4])
    for processes in (1, 2):
        nursery.whole("finetune", processes=processes, out=str(tmp_path / str(processes)), **settings)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    for name in one:
        if not name.endswith("k_proj.bias"):  # no gradient but rounding, which Adam makes as large as any other
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=5e-5)
    first, second = (require_complete(tmp_path / name).metrics["train"] for name in ("1", "2"))
    for name in (name for name in first if name.startswith("kd") or name == "loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_both_towers_are_pruned_without_a_label(towers: Path, tmp_path: Path) -> None:
    weights = {"vl": 0.0, "pvl": 0.0, "affinity": 1.0}
    out, again = tmp_path / "pruned", tmp_path / "again"
    settings = given(towers, task="embedding", sparsity=0.4, weights=weights) | {"model": str(towers / "teacher"), "max_steps": 8}
    manifest = run_stage("prune", out=str(out), **settings)
    assert manifest.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.02)
    assert manifest.metrics["train"]["kd_affinity"] and manifest.metrics["val"]["sentences"] == 7
    before, after = (load(str(path)) for path in (towers / "teacher", out))
    kept, whole = after.model.config.kept_indices(), before.model.config.kept_indices()
    assert {name.partition(".")[0] for name in kept if kept[name] != whole[name]} == {"vision", "text"}
    assert run_stage("prune", out=str(again), from_gates=str(out), sparsity=0.3).accounting["sparsity"]["achieved"] < 0.35
    taylor = run_stage("prune", out=str(tmp_path / "taylor"), method="taylor", calibration_batches=2, **settings)
    assert taylor.accounting["sparsity"]["achieved"] == pytest.approx(0.4, abs=0.02)


def refused(stage: str, tmp_path: Path, **settings: Any) -> BadInput:
    with pytest.raises(BadInput) as found:
        run_stage(stage, out=str(tmp_path / "out"), **settings)
    return found.value


def test_what_cannot_be_learnt_is_refused(towers: Path, tmp_path: Path) -> None:
    alone = {name: value for name, value in given(towers, task="embedding").items() if name not in ("teacher", "distillation")}
    assert "no teacher" in refused("finetune", tmp_path, **alone).what
    short = tmp_path / "short"
    run_stage("shrink", model=str(towers / "teacher"), out=str(short))
    other = refused("distill", tmp_path, **given(towers) | {"model": str(short)})
    assert "learn_texts=true" in other.fix and "sentences" in other.what
    assert run_stage("distill", out=str(tmp_path / "both"), **given(towers, learn_texts=True) | {"model": str(short)}).metrics["val"]
    assert "widths 9" in refused("distill", tmp_path, **given(towers, widths=[9])).what
    assert "gates" in refused("prune", tmp_path, **given(towers, learn_texts=False, task="embedding", sparsity=0.2)).why
    assert "stream:" in refused("distill", tmp_path, **given(towers) | {"sentences": "stream:x.jsonl"}).what


@pytest.mark.slow
def test_sentences_that_a_student_reads_otherwise_are_found_out(towers: Path, tmp_path: Path) -> None:
    learnt = tmp_path / "learnt"
    run_stage("distill", out=str(learnt), **given(towers, learn_texts=True, max_steps=20, lr=0.05))
    assert "does not read sentences" in refused("distill", tmp_path, **given(towers) | {"model": str(learnt)}).what


def test_a_plan_counts_what_is_learnt(towers: Path) -> None:
    steps = [
        Step("distilled", "distill", stage_settings("distill", {"out": "a", **given(towers)})),
        Step("pruned", "prune", stage_settings("prune", {"out": "b", **given(towers, task="embedding", sparsity=0.2), "model": "a"})),
    ]
    made = plan(steps, QUIET, measure=1)
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    assert all(stage.memory and stage.time for stage in made.stages)


@pytest.mark.parametrize(("learn_texts", "said"), [(False, True), (True, False)])
def test_terms_that_read_no_sentence_are_said(towers: Path, learn_texts: bool, said: bool) -> None:
    values = {"out": "a", **given(towers, weights={"vl": 0.0, "pvl": 1.0, "cosine": 1.0}, learn_texts=learn_texts)}
    lines = idle.said(stage_settings("distill", values), values)
    assert ("sentences has no effect on what is learnt, as no term with a weight compares sentences" in lines) is said


def test_a_teacher_embeds_no_sentence_that_is_not_compared(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, times, embed = [0], [], EmbeddingTeacher.sentences

    def counted(teacher: EmbeddingTeacher, batch: dict[str, Any]) -> torch.Tensor:
        asked[0] += 1
        return embed(teacher, batch)

    monkeypatch.setattr(EmbeddingTeacher, "sentences", counted)
    for number, vl in enumerate((0.0, 1.0)):
        asked[0] = 0
        run_stage("distill", out=str(tmp_path / str(number)), **given(towers, weights={"vl": vl, "pvl": 1.0}))
        times.append(asked[0])
    assert times[1] - times[0] == STEPS["max_steps"] and times[0]  # what is measured reads them all the same


def test_a_store_stands_in_for_the_teacher_and_another_is_refused(towers: Path, tmp_path: Path) -> None:
    stores = {side: str(tmp_path / side) for side in ("images", "sentences")}
    for side, data in (("images", "shapes:difficulty=2,size=40"), ("sentences", DATA["sentences"])):
        run_stage("embed", model=str(towers / "teacher"), data=data, side=side, out=stores[side])
    live, kept = tmp_path / "live", tmp_path / "kept"
    settings = given(towers, augment="none", val_fraction=0.0)
    run_stage("distill", out=str(live), **settings)
    run_stage("distill", out=str(kept), image_store=stores["images"], sentence_store=stores["sentences"], **settings)
    one, two = (require_complete(path).metrics["train"] for path in (live, kept))
    assert one["kd_vl"] == pytest.approx(two["kd_vl"], rel=0.05, abs=1e-3) and one != two  # vectors are stored in half precision
    assert require_complete(kept).inputs.keys() >= {"image_store", "sentence_store"}
    swapped = {"image_store": stores["sentences"], "sentence_store": stores["images"]}
    assert "vectors of" in refused("distill", tmp_path, **settings | swapped).what
    of_another = settings | {"teacher": str(live), "image_store": stores["images"]}
    assert "another teacher" in refused("distill", tmp_path, **of_another).what
    harder = settings | {"data": "shapes:difficulty=3,size=40", "image_store": stores["images"]}  # whose pictures have the same names
    assert "other images" in refused("distill", tmp_path, **harder).what
    cut = settings | {"max_tokens": 5, "sentence_store": stores["sentences"]}
    assert "in another form" in refused("distill", tmp_path, **cut).what


def stores_of(towers: Path, out: Path, data: str, sentences: str = DATA["sentences"]) -> dict[str, str]:
    for side, some in (("images", data), ("sentences", sentences)):
        run_stage("embed", model=str(towers / "teacher"), data=some, side=side, out=str(out / side))
    return {"image_store": str(out / "images"), "sentence_store": str(out / "sentences")}


def test_samples_that_a_store_lacks_are_counted_before_training(towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = stores_of(towers, tmp_path, "shapes:difficulty=2,size=36", "shapes:difficulty=2,size=30,seed=7")
    settings = given(towers, max_steps=12) | stores
    few = refused("distill", tmp_path, **settings)
    assert "no vector of 4 of 40 samples" in few.what and "max_missing=0.1" in few.fix
    run_stage("distill", out=str(tmp_path / "out"), **settings, max_missing=0.1)
    images, _, sentences = require_complete(tmp_path / "out").data
    assert any("4 of 40 samples have no vector" in note for note in images.read_as)
    assert any("3 of 33 samples have no vector" in note for note in sentences.read_as)
    config = stage_settings("distill", {"out": "x", **settings, "max_missing": 0.1})
    assert not plan([Step("distilled", "distill", config)], QUIET, measure=1).problems.found
    config = stage_settings("distill", {"out": "x", **settings})
    assert "no vector of 4" in plan([Step("distilled", "distill", config)], QUIET).problems.found[0].error.what


def test_stores_of_both_sides_stand_for_the_teacher(towers: Path, tmp_path: Path) -> None:
    """The network need not be at hand; what is learnt is the same to the bit, and the held-out images that the store knows are measured."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = pictures(folder, 14)
    stores = stores_of(towers, tmp_path, str(folder))
    settings = given(towers) | stores | {"data": str(folder), "val_fraction": 0.3, "batch_size": 4}
    alone = {name: value for name, value in settings.items() if name != "teacher"}
    for name, some in (("with", settings), ("without", alone)):
        run_stage("distill", out=str(tmp_path / name), **some)
    one, two = (tmp_path / name / "model.safetensors" for name in ("with", "without"))
    assert one.read_bytes() == two.read_bytes()
    live, stored = (require_complete(tmp_path / name).metrics["val"] for name in ("with", "without"))
    assert stored["images"] > 0 and stored == pytest.approx(live, abs=2e-3)
    assert require_complete(tmp_path / "without").teacher is None
    half = refused("distill", tmp_path, **{name: value for name, value in alone.items() if name != "image_store"})
    assert "no teacher" in half.what and "image_store" in half.fix
    torn = folder / names[3]  # known to the store: another picture that it knows is seen in its place
    torn.write_bytes(bytes(torn.stat().st_size))
    assert run_stage("distill", out=str(tmp_path / "torn"), **alone, max_bad=1).metrics["train"]


def test_a_cut_by_gates_that_stores_taught_measures_by_them() -> None:
    stores = {"image_store": "images", "sentence_store": "sentences"}
    taught = {"out": "pruned", "model": "m", **DATA, "task": "embedding", "distillation": "dime-fm", "widths": [4], **stores}
    earlier: Any = SimpleNamespace(config=stage_settings("prune", taught).model_dump(mode="json"))
    again = settled(stage_settings("prune", {"out": "again", "from_gates": "pruned"}), earlier)
    assert again.taught and (again.image_store, again.sentence_store, again.widths) == ("images", "sentences", [4])


@pytest.mark.slow
def test_what_stores_taught_is_cut_again_without_the_teacher(towers: Path, tmp_path: Path) -> None:
    stores = stores_of(towers, tmp_path, DATA["data"]) | {"teacher": None}
    out, again = tmp_path / "pruned", tmp_path / "again"
    settings = given(towers, task="embedding", sparsity=0.3, learn_texts=True) | stores | {"model": str(towers / "teacher"), "max_steps": 4}
    assert run_stage("prune", out=str(out), **settings).metrics["val"]["images_without_vector"] == 4
    cut = run_stage("prune", out=str(again), from_gates=str(out), sparsity=0.2)
    assert cut.metrics["val"]["images_without_vector"] == 4 and cut.inputs.keys() >= {"image_store", "sentence_store"}


def test_a_plan_knows_stores_that_earlier_stages_write(towers: Path, tmp_path: Path) -> None:
    teacher, (images, texts) = str(towers / "teacher"), (str(tmp_path / side) for side in ("images", "sentences"))
    (tmp_path / "pile.txt").write_text("a red circle\nthe blue square\n")

    def planned(measure: int = 0, pile: str = "pile.txt", **change: Any) -> Any:
        common = given(towers) | {"image_store": images, "sentence_store": texts, **change}
        every: dict[str, tuple[str, dict[str, Any]]] = {
            "images": ("embed", {"model": teacher, "data": DATA["data"], "side": "images", "out": images}),
            "sentences": ("embed", {"model": teacher, "data": DATA["sentences"], "side": "sentences", "out": texts}),
            "selected": ("select-sentences", {"sentences": str(tmp_path / pile), "images": images, "model": teacher, "out": "s"}),
            "distilled": ("distill", common | {"out": str(tmp_path / "d")}),
            "learnt": ("distill", common | {"sentences": "s", "sentence_store": None, "out": str(tmp_path / "l")}),
            "alone": ("distill", {name: value for name, value in common.items() if name != "teacher"} | {"out": str(tmp_path / "a")}),
        }
        steps = [Step(name, stage, stage_settings(stage, values)) for name, (stage, values) in every.items()]
        return plan(steps, QUIET, measure=measure)

    made = planned(measure=1)
    assert not made.problems.found, [problem.as_dict() for problem in made.problems.found]
    assert [stage.status for stage in made.stages] == ["new"] * 6 and all(stage.memory and stage.disk for stage in made.stages)
    assert any("all sentences" in note for note in made.stages[4].notes)
    (tmp_path / "corpus").write_text("a red circle\nthe blue square\n")  # as a selection reads it, and no other stage
    of_another = planned(pile="corpus")
    assert not of_another.problems.found and any("will be selected of" in note for note in of_another.stages[4].notes)
    wrong = planned(image_store=texts)
    (problem,) = wrong.problems.found  # what two stages have in common is told once
    assert problem.stage == "distilled" and "vectors of" in problem.error.what
    stores_of(towers, tmp_path, DATA["data"])
    again = planned()
    assert not again.problems.found and [stage.status for stage in again.stages][:2] == ["up to date"] * 2


def test_sentences_that_cannot_be_read_stand_in_front(towers: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(f"{'a ' * 75_000}\n" * 8 + "a red circle\nthe blue square\n" * 20, "utf-8")
    settings = given(towers) | {"sentences": str(tmp_path / "long.txt"), "max_bad": 20}
    assert run_stage("distill", out=str(tmp_path / "out"), **settings).metrics["val"]["text_cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", ["xvlm", pytest.param("blip", marks=pytest.mark.slow)])
def test_a_network_that_fuses_is_student_and_teacher_too(family: str, tmp_path: Path) -> None:
    """Its fusion does not learn; sentences are read as the teacher reads them, or learnt."""
    sizes = {**SIZES, "dropout": 0.0} | ({"network": "match"} if family == "blip" else {})
    run_stage(
        "init",
        out=str(tmp_path / "teacher"),
        family=family,
        size="tiny",
        data=SHAPES,
        settings={**sizes, "vision_layers": 2, "text_layers": 2},
    )
    run_stage("shrink", model=str(tmp_path / "teacher"), out=str(tmp_path / "small"), layers={"vision": 1, "text": 2})
    common = {**TRAIN, "max_steps": 2, "task": "embedding", "teacher": str(tmp_path / "teacher"), "data": SHAPES, "sentences": SHAPES}
    for learnt in (False, True):
        out = tmp_path / str(learnt)
        manifest = run_stage("finetune", model=str(tmp_path / "small"), out=str(out), learn_texts=learnt, **common)
        before, after = (load_file(path / "model.safetensors") for path in (tmp_path / "small", out))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        towers = {load(str(out)).model.tower_of(name) for name in changed}
        assert manifest.metrics["val"]["image_cosine"] and "vision" in towers and ("text" in towers) == learnt
