"""eval, bench, predict, report and run on tiny models: random weights, at most two steps of training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficientvlm import recipe
from efficientvlm.control import Control
from efficientvlm.data.kinds.questions import QUESTIONS, vqa_batch
from efficientvlm.data.opening import open_data
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.loaded import load
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.stages import Bench, InitConfig, Report
from efficientvlm.stages import bench, evaluate, init, learning, predict, report, run
from efficientvlm.tasks import vqa
from efficientvlm.tasks.vqa import example

QUIET, FORCE = Control(quiet=True), Control(quiet=True, force=True)
DATA = "shapes:difficulty=2,size=60"
TINIER: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 16,
    "vision_width": 32,
    "text_width": 32,
    "vision_heads": 2,
    "text_heads": 2,
    "vision_intermediate": 24,
    "text_intermediate": 24,
    "vision_layers": 2,
    "text_layers": 1,
    "fusion_layers": 1,
    "initializer_range": 0.3,  # an untrained model of small weights gives every question the same answer
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start`, task-agnostic, and `vqa`, tuned for two steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    init.run(InitConfig(out=str(root / "start"), size="tiny", data=DATA, settings=TINIER), QUIET)
    settings: dict[str, Any] = {"data": DATA, "limit": 8, "batch_size": 4, "max_steps": 2, "eval_limit": 2, "rank_top": 5, "device": "cpu"}
    learning.run(stage_settings("finetune", {"out": str(root / "vqa"), "model": str(root / "start"), **settings}), QUIET)
    torch.set_num_threads(before)
    return root


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluation(folder: Path, **changes: Any) -> Any:
    return stage_settings("eval", {"model": str(folder / "vqa"), "data": DATA, "limit": 4, "device": "cpu", **changes})


def by_hand(model: Path, *, twice: bool, limit: int = 4) -> tuple[float, list[str]]:
    """Accuracy and answers when every candidate of every question is scored alone, one token after the other."""
    loaded = load(str(model))
    source, texts = open_data(QUESTIONS, DATA, "test", limit=limit, image_size=32), Texts(loaded.tokenizer)
    hits, given = 0.0, []
    for number in range(limit):
        item = source[number]
        for question in item.questions:
            item_alone = type(item)(item.id, item.image, [question])
            batch = vqa_batch([item_alone], texts, seed=0, step=0, train=False)
            scores = {}
            for answer in loaded.model.config.answers:
                ids = torch.tensor([[texts.cls, *texts.ids([answer])[0], texts.sep]])
                with torch.no_grad():
                    _, context = loaded.model.encode(batch)
                    logits = loaded.model.decode(context, ids, None)[0].log_softmax(-1)
                steps = [float(logits[at, int(ids[0, at + 1])]) for at in range(ids.shape[1] - 1)]
                scores[answer] = sum(steps) + twice * steps[0]
            best = max(scores, key=lambda answer: scores[answer])
            hits += min(1.0, sum(weight for text, weight in question.answers if text == best))
            given.append(best)
    return hits / len(given), given


@pytest.mark.parametrize("twice", [True, False])
def test_accuracy_is_that_of_scoring_every_answer_by_hand(folder: Path, twice: bool) -> None:
    result = evaluate.run(evaluation(folder, rank_top=1000, first_token_twice=twice), QUIET)
    accuracy, given = by_hand(folder / "vqa", twice=twice)
    assert result["metrics"]["questions"] == len(given) > 20 and len(set(given)) > 3
    assert result["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)


def test_a_result_says_what_was_measured(folder: Path) -> None:
    result = evaluate.run(evaluation(folder, split="val"), QUIET)
    listed = load(str(folder / "vqa")).model.config.answers
    assert (result["data"]["split"], result["data"]["count"], result["metrics"]["images"]) == ("val", 4, 4)
    assert (result["mode"], result["answers"], result["top"], result["first_token_twice"]) == ("rank", len(listed), 5, False)
    assert set(result["provenance"]["inputs"]) == {"model", "data"} and "accuracy" in result["metric"]
    json.dumps(result, allow_nan=False)


def test_generation_and_answers_of_a_file(folder: Path, tmp_path: Path) -> None:
    written = evaluate.run(evaluation(folder, mode="generate", limit=1), QUIET)
    assert written["mode"] == "generate" and "top" not in written and 0 <= written["metrics"]["accuracy"] <= 1
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    assert written["manner"] == {"decoding": "greedy", "max_length": 11}
    searched = evaluate.run(evaluation(folder, mode="generate", limit=1, beams=3, length_rule="generated", max_length=6), QUIET)
    assert searched["manner"] == {"decoding": "beam", "max_length": 6, "beams": 3, "length_rule": "generated"}
    with pytest.raises(BadInput, match=r"max_length 1000.*has \d+ positions"):
        evaluate.run(evaluation(folder, mode="generate", max_length=1000), QUIET)
    smoothed = evaluate.run(evaluation(folder, limit=1, rank_smoothing=0.3), QUIET)
    assert smoothed["rank_smoothing"] == 0.3 and "rank_smoothing" not in evaluate.run(evaluation(folder, limit=1), QUIET)
    few = evaluate.run(evaluation(folder, answers=str(tmp_path / "answers.txt"), limit=1), QUIET)
    assert few["answers"] == few["top"] == 2 and "answers" in few["provenance"]["inputs"]
    (tmp_path / "answers.txt").write_text("\n")
    with pytest.raises(BadInput, match="no answers"):
        evaluate.run(evaluation(folder, answers=str(tmp_path / "answers.txt")), QUIET)


def test_bf16_evaluates_too(folder: Path) -> None:
    assert evaluate.run(evaluation(folder, precision="bf16", limit=1), QUIET)["precision"] == "bf16"


def test_a_finished_result_is_returned_without_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "result.json"
    first = evaluate.run(evaluation(folder, out=str(out), limit=1), QUIET)
    assert json.loads(out.read_text()) == first and [path.name for path in out.parent.iterdir()] == ["result.json"]
    before = out.stat().st_ino, out.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(vqa, "evaluate_on", lambda *_, **__: pytest.fail("it was evaluated again"))
        relative = Path(*[".."] * len(Path.cwd().parts[1:]), *(folder / "vqa").parts[1:])  # another name of the same checkpoint
        assert evaluate.run(evaluation(folder, out=str(out), limit=1, model=str(relative)), QUIET) == first
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == before
    with pytest.raises(BadInput, match="limit: 1 there, 2 now"):
        evaluate.run(evaluation(folder, out=str(out), limit=2), QUIET)
    with pytest.raises(BadInput, match="input data differs"):
        evaluate.run(evaluation(folder, out=str(out), limit=1, data=DATA + ",seed=1"), QUIET)
    assert evaluate.run(evaluation(folder, out=str(out), limit=2), FORCE)["metrics"]["images"] == 2
    assert evaluate.run(evaluation(folder, out=str(out), limit=2), QUIET)["metrics"]["images"] == 2


def test_foreign_files_are_never_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    for content in ("[1]", '{"stage": "eval"}', "not JSON", '{"stage": "bench", "provenance": {"inputs": {}, "config": {}}}'):
        out.write_text(content)
        with pytest.raises(BadInput):
            evaluate.run(evaluation(folder, out=str(out)), FORCE)
        assert out.read_text() == content
    with pytest.raises(BadInput, match="it is a folder"):
        evaluate.run(evaluation(folder, out=str(tmp_path)), QUIET)
    with pytest.raises(BadInput, match="cannot be written"):
        evaluate.run(evaluation(folder, out=str(out / "below.json")), QUIET)


def test_what_answers_no_questions_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="cannot answer questions"):
        evaluate.run(evaluation(folder, model=str(folder / "start")), QUIET)
    with pytest.raises(BadInput, match="unknown device"):
        evaluate.run(evaluation(folder, device="abacus"), QUIET)


def speed(folder: Path, *names: str, **changes: Any) -> Bench:
    models = [str(folder / name) for name in names]
    return Bench(**{"models": models, "batch_sizes": [1, 2], "rounds": 2, "warmup_rounds": 1, "threads": 1, "device": "cpu", **changes})


def test_bench_times_every_model_at_every_batch_size(folder: Path) -> None:
    result = bench.run(speed(folder, "vqa", "start", "vqa"), QUIET)
    labels = [str(folder / "vqa"), str(folder / "start"), str(folder / "vqa") + " (2)"]
    assert [(row["model"], row["batch"]) for row in result["latency"]] == [(label, size) for size in (1, 2) for label in labels]
    assert all(row["median_ms"] > 0 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in result["latency"])
    assert [record["trained"] for record in result["models"]] == [True, False, True]
    assert len({record["answers"] for record in result["models"]}) == 1
    assert result["models"][0]["parameters_timed"] == result["models"][1]["parameters_timed"]  # the same shape, its decoder added
    assert result["machine"]["threads"] == 1 and result["machine"]["name"] and result["precision"] == "fp32"
    json.dumps(result, allow_nan=False)


def test_bench_reads_questions_without_padding(folder: Path) -> None:
    loaded = load(str(folder / "vqa"))
    texts = Texts(loaded.tokenizer)
    one, again = (example(loaded.sizes.image_size, texts, 3, 7, 0, torch.device("cpu")) for _ in range(2))
    other = example(loaded.sizes.image_size, texts, 3, 7, 1, torch.device("cpu"))
    assert one["pixels"].shape == (3, 3, 32, 32) and one["pixels"].dtype == torch.uint8
    assert one["question_ids"].shape == (3, 7) and bool(one["question_mask"].all()) and not bool((one["question_ids"] == texts.pad).any())
    assert (one["question_ids"][:, 0] == texts.cls).all() and (one["question_ids"][:, -1] == texts.sep).all()
    assert torch.equal(one["pixels"], again["pixels"]) and torch.equal(one["question_ids"], again["question_ids"])
    assert not torch.equal(one["question_ids"], other["question_ids"])


def test_bench_keeps_finished_timings_unless_forced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "speed.json")
    first = bench.run(speed(folder, "vqa", out=out), QUIET)
    assert bench.run(speed(folder, "vqa", out=out), Control()) == first
    assert "earlier timings" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"models\.1 differs"):
        bench.run(speed(folder, "vqa", "start", out=out), QUIET)
    assert bench.run(speed(folder, "vqa", out=out), FORCE)["latency"] != first["latency"]


def test_timings_of_another_machine_stay_what_they_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a finished recipe can be run again, and planned, elsewhere."""
    out = str(tmp_path / "speed.json")
    first = bench.run(speed(folder, "vqa", out=out), QUIET)
    monkeypatch.setattr("efficientvlm.runtime.hardware.processor", lambda: "Another CPU")
    assert [stage.status for stage in plan([Step("speed", "bench", speed(folder, "vqa", out=out))]).stages] == ["up to date"]
    assert bench.run(speed(folder, "vqa", out=out), Control()) == first
    assert f"of another machine ({first['machine']['name']} with {torch.backends.cpu.get_cpu_capability()}, " in capsys.readouterr().err
    assert bench.run(speed(folder, "vqa", out=out), FORCE)["machine"]["name"] == "Another CPU"


def test_bench_leaves_threads_as_they_were_and_runs_in_bf16(folder: Path) -> None:
    torch.set_num_threads(2)
    bench.run(speed(folder, "vqa", rounds=1, batch_sizes=[1], precision="bf16"), QUIET)
    assert torch.get_num_threads() == 2


def test_bench_refuses_what_it_cannot_time(folder: Path) -> None:
    with pytest.raises(BadInput, match="too long"):
        bench.run(speed(folder, "vqa", text_length=65), QUIET)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_bench_times_the_forward_pass_where_nothing_is_answered(folder: Path) -> None:
    result = bench.run(speed(folder, "start", rounds=1, batch_sizes=[1]), QUIET)
    assert "forward pass" in result["timed"] and result["models"][0]["trained"]


def test_predict_ranks_answers(folder: Path, picture: str) -> None:
    ask: dict[str, Any] = {"model": str(folder / "vqa"), "image": picture, "question": "what color is the shape?", "device": "cpu"}
    result = predict.run(**ask)
    probabilities = [entry["probability"] for entry in result["answers"]]
    assert len(probabilities) == result["candidates"] == 5 and sum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True) and result["answer"] == result["answers"][0]["answer"]
    assert predict.run(**ask, top=2)["answers"] == result["answers"][:2]
    assert predict.run(**ask, mode="generate")["manner"] == {"decoding": "greedy", "max_length": 11}


def test_predict_says_what_it_does_not_know(folder: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    predict.run(model=str(folder / "vqa"), image=picture, question="какой цвет")
    assert "100.0 % of the tokens that were read are unknown to the tokenizer (2 of 2)" in capsys.readouterr().err


def test_predict_explains_what_it_cannot_read(folder: Path, picture: str, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(Path(picture).read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    ask: dict[str, Any] = {"model": str(folder / "vqa"), "image": picture, "question": "what is it?"}
    for changes, why in (
        ({"image": str(tmp_path / "none.png")}, "no file"),
        ({"image": str(tmp_path / "broken.png")}, "cannot be read as a picture"),
        ({"image": str(tmp_path / "text.png")}, "cannot be read as a picture"),
        ({"question": " \n"}, "empty"),
        ({"question": "red " * 100}, "too long"),
        ({"top": 0}, "top: input should be greater"),
        ({"model": str(folder / "start")}, "cannot answer questions"),
        ({"device": "abacus"}, "unknown device"),
    ):
        with pytest.raises(BadInput, match=why):
            predict.run(**{**ask, **changes})


CHAIN = """
defaults: {{device: cpu, data: "{data}"}}
stages:
  - {{name: student, stage: shrink, model: "{root}/start", layers: {{vision: 1}}}}
  - {{name: tuned, stage: finetune, model: "@student", limit: 8, batch_size: 4, max_steps: 1, eval_limit: 2}}
  - {{name: before, stage: eval, model: "{root}/vqa", limit: 2}}
  - {{name: after, stage: eval, model: "@tuned", limit: 2}}
  - {{name: speed, stage: bench, models: ["{root}/vqa", "@student", "@tuned"], rounds: 1, warmup_rounds: 0, batch_sizes: [1, 8]}}
  - name: report
    stage: report
    models: {{teacher: "{root}/vqa", student: "@student", tuned: "@tuned"}}
    evals: {{teacher: "@before", tuned: "@after"}}
    bench: "@speed"
"""


@pytest.fixture
def steps(folder: Path, tmp_path: Path) -> list[recipe.Step]:
    file = tmp_path / "chain.yaml"
    file.write_text(CHAIN.format(data=DATA, root=folder))
    return recipe.validate(recipe.load_recipe(str(file)), out=str(tmp_path / "runs"))


def test_a_recipe_with_data_that_cannot_be_meant_runs_no_stage(steps: Any, tmp_path: Path) -> None:
    tuned = steps[1]._replace(config=steps[1].config.model_copy(update={"data": "shapes:dificulty=2"}))
    with pytest.raises(BadInput, match="unknown key dificulty"):
        run.run_recipe([steps[0], tuned], Control())
    assert not (tmp_path / "runs").exists()


def test_a_recipe_runs_to_its_report_and_then_has_nothing_to_do(steps: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run.run_recipe(steps, Control(json=True))
    shown = capsys.readouterr()
    assert shown.out == "" and f"[5/6] bench → {tmp_path}/runs/speed.json" in shown.err.splitlines()
    assert [(stage["name"], stage["up_to_date"]) for stage in first["stages"]] == [(step.name, False) for step in steps]
    text = first["result"]["text"]
    assert text == (tmp_path / "runs/report/summary.txt").read_text().rstrip("\n") and "tuned / teacher: parameters" in text
    assert "–" in text and "* not trained" in text  # the student
    with Image.open(tmp_path / "runs/report/structure.png") as image:
        assert image.format == "PNG" and image.width > 1000
    page = (tmp_path / "runs/report/report.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>") and "accuracy, tuned / teacher" in page and "3 measurements in full" in page
    summary = json.loads((tmp_path / "runs/report/summary.json").read_text())
    accuracy = json.loads((tmp_path / "runs/after.json").read_text())["metrics"]["accuracy"]
    assert summary["models"]["tuned"]["accuracy"] == accuracy and summary["models"]["student"]["accuracy"] is None
    assert set(summary["models"]["student"]["latency"]) == {"1", "8"} and summary["models"]["student"]["layers"]["vision"] == 1
    json.dumps(first, allow_nan=False)

    second = run.run_recipe(steps, QUIET)
    assert [stage["up_to_date"] for stage in second["stages"]] == [True] * 5 + [False]
    assert second["result"]["text"] == text


def test_an_interrupted_recipe_goes_on_where_it_was(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = run.module_of

    def stopped(stage: str) -> Any:
        def fails(config: Any, control: Any) -> Any:
            raise Interrupted("stopped at step 1 of 1")

        calls.append(stage)
        return SimpleNamespace(run=fails) if stage == "finetune" and calls.count("finetune") == 1 else original(stage)

    monkeypatch.setattr(run, "module_of", stopped)
    with pytest.raises(Interrupted):
        run.run_recipe(steps[:2], QUIET)
    again = run.run_recipe(steps[:2], QUIET)
    assert calls == ["shrink", "finetune", "shrink", "finetune"]
    assert [stage["up_to_date"] for stage in again["stages"]] == [True, False] and again["result"]["stage"] == "finetune"


@pytest.mark.parametrize(
    "wrong", [{"data": True}, {"metrics": []}, {"provenance": {"inputs": {}, "config": {}}}, {"metrics": {"questions": 3}}]
)
def test_a_changed_result_is_refused_before_a_report_is_made(folder: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    out = tmp_path / "e.json"
    whole = evaluate.run(evaluation(folder, out=str(out), limit=1), QUIET)
    out.write_text(json.dumps({**whole, **wrong}))
    with pytest.raises(BadInput, match=r"damaged|no figure"):
        report.run(Report(out=str(tmp_path / "r"), models={"vqa": str(folder / "vqa")}, evals={"vqa": str(out)}), QUIET)
    assert not (tmp_path / "r").exists()


def test_stages_are_found_by_name() -> None:
    assert run.module_of("eval") is evaluate and run.module_of("report") is report


def test_a_report_needs_finished_stages_and_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    models = {"vqa": str(folder / "vqa")}
    with pytest.raises(BadInput, match="there is no result"):
        report.run(Report(out=str(tmp_path / "r"), models=models, evals={"vqa": str(tmp_path / "none.json")}), QUIET)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"other files: notes\.txt"):
        report.run(Report(out=str(tmp_path / "taken"), models=models), QUIET)
    with pytest.raises(BadInput):
        report.run(Report(out=str(tmp_path / "r"), models={"vqa": str(tmp_path)}), QUIET)
    assert not (tmp_path / "r").exists()
    assert report.run(Report(out=str(tmp_path / "r"), models=models), QUIET)["files"]
