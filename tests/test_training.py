"""Training stages: interrupted equals uninterrupted, the metrics file, the schedule, failures that lose nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import queue
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_folder import byte_pairs, write_clip
from conftest import PRUNE, SHAPES, SIZES, TRAIN, run_stage
from safetensors.torch import load_file

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.request import compare
from efficientvlm.control import Control
from efficientvlm.errors import BadInput, Diverged, Interrupted, OutOfMemory, TargetMissed
from efficientvlm.objectives.objective import Objective
from efficientvlm.runtime import progress, waiting
from efficientvlm.runtime.interrupt import sigterm_as_interrupt, stop_flag
from efficientvlm.runtime.memory import enough_memory, out_of_memory
from efficientvlm.runtime.progress import Bar
from efficientvlm.runtime.stopwatch import TEACHER
from efficientvlm.settings.common import Train
from efficientvlm.training import loop as training
from efficientvlm.training.meter import Meter
from efficientvlm.training.state import Spent, restore, save, tensors_of


def stages(root: Path) -> dict[str, dict[str, Any]]:
    return {
        "pretrain": {"model": str(root / "init"), "data": SHAPES},
        "distill": {"model": str(root / "student"), "teacher": str(root / "init"), "data": SHAPES},
        "prune": PRUNE(root),
        "finetune": {"model": str(root / "pruned"), "teacher": str(root / "teacher"), "data": SHAPES},
    }


def stop_at(monkeypatch: pytest.MonkeyPatch, steps: list[int], number: int = signal.SIGTERM) -> None:
    """Send ourselves a signal while the gradients of the given steps are being computed."""
    real = training.rate

    def rate(step: int, *rest: Any) -> float:
        if steps and step == steps[0]:
            steps.pop(0)
            os.kill(os.getpid(), number)
        return real(step, *rest)

    monkeypatch.setattr(training, "rate", rate)


@pytest.mark.parametrize("name", ["pretrain", "distill", "prune", "finetune"])
def test_a_run_interrupted_twice_gives_the_same_bits(name: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)[name], **TRAIN}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_stage(name, out=str(whole), **settings)
    stop_at(monkeypatch, [1, 4])
    for done in (2, 5):
        with pytest.raises(Interrupted) as stopped:
            run_stage(name, out=str(broken), **settings)
        assert stopped.value.exit_code == 75 and f"step {done} of 6" in str(stopped.value)
        assert not (broken / "evlm_manifest.json").exists()
        with pytest.raises(BadInput, match="not finished"):
            require_complete(broken)
    run_stage(name, out=str(broken), **settings)
    assert not (broken / "training_state").exists()
    one, two = require_complete(whole), require_complete(broken)
    assert set(one.files) == set(two.files)
    for file in one.files:
        if file.endswith((".safetensors", "config.json")):
            assert one.files[file].sha256 == two.files[file].sha256, file
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, broken)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [2, 4, 6]
    assert lines[0][-1]["loss"] == lines[1][-1]["loss"]
    assert list(tmp_path.glob(".*")) == []


def test_the_seed_changes_the_result_and_nothing_else_does(chain: Path, tmp_path: Path) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN}
    weights = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_stage("finetune", out=str(tmp_path / out), seed=seed, **settings)
        weights[out] = load_file(tmp_path / out / "model.safetensors")
    same, other = weights["a"], weights["c"]
    assert all(torch.equal(same[name], weights["b"][name]) for name in same)
    assert any(not torch.equal(same[name], other[name]) for name in same)


@pytest.mark.parametrize("name", ["pretrain", "distill"])
def test_frozen_towers_stay_as_they_are(name: str, chain: Path, tmp_path: Path) -> None:
    settings = stages(chain)[name]
    run_stage(name, out=str(tmp_path / "out"), freeze=["vision", "text"], **settings, **TRAIN)
    before, after = load_file(Path(settings["model"], "model.safetensors")), load_file(tmp_path / "out/model.safetensors")
    moved = {tensor for tensor in after if not torch.equal(before[tensor], after[tensor])}
    assert {tensor.split(".")[0] for tensor in moved} == {tensor.split(".")[0] for tensor in after} - {"vision", "text"}


def test_other_settings_do_not_resume_a_state(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "out": str(tmp_path / "out")}
    stop_at(monkeypatch, [2])
    with pytest.raises(Interrupted):
        run_stage("finetune", **settings)
    with pytest.raises(BadInput, match="unfinished stage of other settings"):
        run_stage("finetune", **{**settings, "lr": 0.5})
    run_stage("finetune", Control(quiet=True, resume=False), **settings)
    assert require_complete(tmp_path / "out").metrics["train"]["loss"] > 0


def test_settings_that_change_nothing_learnt_may_change_on_resume(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN}
    run_stage("finetune", out=str(tmp_path / "whole"), **settings)
    stop_at(monkeypatch, [2])
    with pytest.raises(Interrupted):
        run_stage("finetune", out=str(tmp_path / "out"), **settings)
    others = {"eval_limit": 0, "log_every": 3, "save_every": 1, "max_bad": 7, "rank_top": 5, "device": "cpu"}
    made = run_stage("finetune", out=str(tmp_path / "out"), **{**settings, **others})
    assert made.files["model.safetensors"] == require_complete(tmp_path / "whole").files["model.safetensors"]
    assert {change.what: (change.step, change.before, change.now) for change in made.changes} == {
        "eval_limit": (3, 4, 0),
        "log_every": (3, 2, 3),
        "max_bad": (3, None, 7),
        "rank_top": (3, 128, 5),
        "save_every": (3, 200, 1),
    }
    assert all(change.same_bits for change in made.changes) and made.metrics["val"] == {"images": 0}
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()] == [2, 6]


def test_other_instructions_of_the_processor_are_recorded(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "out": str(tmp_path / "out")}
    stop_at(monkeypatch, [2])
    with pytest.raises(Interrupted):
        run_stage("finetune", **settings)
    here = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "others")
    made = run_stage("finetune", **settings)
    changed = {"step": 3, "what": "instructions", "before": here, "now": "others", "same_bits": False}
    assert [change.model_dump() for change in made.changes] == [changed]


def test_another_number_of_threads_is_recorded(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "out": str(tmp_path / "out")}
    stop_at(monkeypatch, [2])
    with pytest.raises(Interrupted):
        run_stage("finetune", **settings)
    try:
        torch.set_num_threads(2)
        made = run_stage("finetune", **settings)
    finally:
        torch.set_num_threads(1)
    assert [change.model_dump() for change in made.changes] == [{"step": 3, "what": "threads", "before": 1, "now": 2, "same_bits": False}]


def test_a_finished_checkpoint_is_up_to_date_with_another_evaluation(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("efficientvlm.stages.learning.train", lambda *_, **__: pytest.fail("trained again"))
    run_stage("prune", Control(), out=str(chain / "pruned"), **PRUNE(chain), **{**TRAIN, "eval_limit": 5})
    said = capsys.readouterr().err
    assert "up to date" in said and "eval_limit: 4 there, 5 now" in said
    with pytest.raises(BadInput, match="finished checkpoint of other settings"):
        run_stage("prune", out=str(chain / "pruned"), **PRUNE(chain), **{**TRAIN, "batch_size": 5})


def test_validation_data_may_change_but_not_come_or_go() -> None:
    """Without any, a part of the training data is held out."""
    one: dict[str, Any] = {"stage": "finetune", "inputs": {"data": "a", "val": "b"}, "config": {"val": "b", "lr": 1}}
    assert compare(one, {**one, "inputs": {"data": "a", "val": "c"}, "config": {"val": "c", "lr": 1}}) == []
    assert compare(one, {**one, "inputs": {"data": "a"}, "config": {"val": None, "lr": 1}}) == ["input val differs"]
    assert compare(one, {**one, "inputs": {"data": "c", "val": "b"}}) == ["input data differs"]
    assert compare(one, {**one, "config": {"val": "b", "lr": 2}}) == ["lr: 2 there, 1 now"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_ran_out_is_known_by_its_errors(error: Exception) -> None:
    with pytest.raises(OutOfMemory, match="out of memory in bench") as said, enough_memory("bench", "lower batch_sizes"):
        raise error
    assert said.value.exit_code == 3 and said.value.fix == "lower batch_sizes"
    assert not out_of_memory(RuntimeError("shape mismatch")) and not out_of_memory(OSError(28, "No space left on device"))


def test_memory_that_ran_out_in_training_keeps_the_state(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "out": str(tmp_path / "out"), "save_every": 2}
    real = training.rate

    def rate(step: int, *rest: Any) -> float:
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(step, *rest)

    monkeypatch.setattr(training, "rate", rate)
    with pytest.raises(OutOfMemory, match="out of memory in training") as said:
        run_stage("finetune", **settings)
    assert "batch_size (now 4), questions_per_image (now 6)" in said.value.fix and "--force" in said.value.fix
    monkeypatch.setattr(training, "rate", real)
    assert run_stage("finetune", **settings).files


def test_a_damaged_state_is_refused(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "out": str(tmp_path / "out")}
    stop_at(monkeypatch, [2])
    with pytest.raises(Interrupted):
        run_stage("finetune", **settings)
    state = next((tmp_path / "out" / "training_state").glob("step-*/state.safetensors"))
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot resume"):
        run_stage("finetune", **settings)


def test_a_loss_that_is_not_finite_stops_the_run(chain: Path, tmp_path: Path) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "out": str(tmp_path / "out")}
    with pytest.raises(Diverged, match="diverged") as error:
        run_stage("finetune", **{**settings, "lr": 1e30, "clip": None})
    assert error.value.exit_code == 3 and error.value.fix == "try a smaller --lr"
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_do_not_replace_the_last_good_state(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**stages(chain)["finetune"], **TRAIN, "save_every": 1}
    run_stage("finetune", out=str(tmp_path / "whole"), **settings)
    real = training.rate
    with monkeypatch.context() as patched:
        patched.setattr(training, "rate", lambda step, *rest: float("nan") if step == 3 else real(step, *rest))
        with pytest.raises(Diverged, match="holds NaN or infinite values at step 3") as error:
            run_stage("finetune", out=str(tmp_path / "out"), **settings)
    assert "the last good state is kept" in error.value.why and "--force" in error.value.fix
    assert [path.name for path in (tmp_path / "out" / "training_state").glob("step-*")] == ["step-00000003"]
    made = run_stage("finetune", out=str(tmp_path / "out"), **settings)
    assert made.files["model.safetensors"] == require_complete(tmp_path / "whole").files["model.safetensors"]


def test_a_finished_stage_is_up_to_date_and_costs_nothing(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("efficientvlm.stages.learning.train", never)
    before = (chain / "pruned" / "evlm_manifest.json").read_bytes()
    run_stage("prune", out=str(chain / "pruned"), **PRUNE(chain), **TRAIN)
    assert (chain / "pruned" / "evlm_manifest.json").read_bytes() == before


@pytest.mark.parametrize(("schedule", "last"), [("linear", 1 / 90), ("cosine", None), ("constant", 1.0)])
def test_rate(schedule: str, last: float | None) -> None:
    options = Train(schedule=schedule, warmup=0.1)  # type: ignore[arg-type]
    factors = [training.rate(step, 100, options) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == 1.0 and factors[10:] == sorted(factors[10:], reverse=True)
    if last is not None:
        assert factors[-1] == pytest.approx(last)
    assert training.rate(0, 10, Train(warmup=0)) == 1.0
    counted = Train(schedule=schedule, warmup_steps=10, warmup=0.5)  # type: ignore[arg-type]
    assert [training.rate(step, 100, counted) for step in range(100)] == factors
    assert training.rate(3, 8, Train(warmup_steps=100)) == 0.04


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_that_ends_above_zero(schedule: Any) -> None:
    options, usual = Train(schedule=schedule, warmup=0, lr_end=0.05), Train(schedule=schedule, warmup=0)
    for step in (0, 10, 99):
        assert training.rate(step, 100, options) == pytest.approx(0.05 + 0.95 * training.rate(step, 100, usual))


def test_rate_falls_after_every_epoch() -> None:
    """Epochs are those of the run, warm-up included: four of 25 steps."""
    options = Train(schedule="exponential", decay=0.5, epochs=4, warmup=0.1)
    factors = [training.rate(step, 100, options) for step in range(100)]
    assert factors[9] == 1.0 and factors[10:] == [1.0] * 15 + [0.5] * 25 + [0.25] * 25 + [0.125] * 25
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])


def test_weight_decay_and_rates_by_kind_of_tensor() -> None:
    layer = torch.nn.Linear(3, 2)
    options = Train(lr=0.1, new_lr_mult=3, weight_decay=0.5, beta2=0.999)
    groups = training.adamw(layer.parameters(), options, fast=[layer.weight]).torch.param_groups
    assert [(g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (pytest.approx(0.3), 0.5, [(2, 3)]),
        (0.1, 0.0, [(2,)]),
    ]
    assert {g["betas"] for g in groups} == {(0.9, 0.999)}


def test_new_tensors_are_those_of_the_model_whatever_holds_it() -> None:
    class Holds(Objective):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.aside, self.model = torch.nn.Linear(5, 2), model

    groups = Holds(torch.nn.Linear(3, 2)).optimizers(Train(lr=0.1, new_lr_mult=3), ["weight"])[0].torch.param_groups
    assert {tuple(p.shape): g["lr"] for g in groups for p in g["params"]} == {(2, 3): pytest.approx(0.3), (2,): 0.1, (2, 5): 0.1}


def test_a_gpu_is_waited_for_only_in_steps_that_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr("efficientvlm.training.meter.synchronise", lambda device: waited.append(device.type))
    monkeypatch.setattr(TEACHER, "settle", TEACHER.settle)  # which a meter replaces, also for the tests that follow
    meter = Meter({}, torch.device("cuda"))
    for step in range(4):
        meter.watch(step == 3)
        with meter.time("student"), TEACHER:
            pass
        meter.add({"loss": 1.0}, 2, "")
        assert len(waited) == (3 if step == 3 else 0)
    assert meter.watched == 1 and meter.images == 8


def test_an_infinite_gradient_changes_nothing() -> None:
    layer = torch.nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    optimizer = training.adamw(layer.parameters(), Train(lr=0.1))
    layer.weight.grad = torch.full_like(layer.weight, float("inf"))
    with pytest.raises(Diverged, match="gradient norm is inf at step 3"):
        training.update([optimizer], 1.0, None, 3)
    assert torch.equal(layer.weight, before)


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in (b'{"step": 6}\n{"ste', b"\xff\x00\x00", b"7", b'{"step": null}'):
        path.write_bytes(b'{"step": 2}\n{"step": 4}\n' + torn)
        training.cut_metrics(path, 4)
        assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_processes_that_torchrun_did_not_start_are_refused(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(BadInput, match="do not find one another") as error:
        run_stage("shrink", model=str(chain / "init"), out=str(tmp_path / "out"))
    assert "torchrun" in error.value.fix and not (tmp_path / "out").exists()


@pytest.fixture
def heeded() -> Iterator[None]:
    """No signal is ignored, whatever the tests were started by."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_python_drops_counts_at_the_next_chance(number: int, heeded: None) -> None:
    """What a handler raises inside a callback goes no further, as it happens during imports."""

    class Thing:
        pass

    with pytest.raises(KeyboardInterrupt):
        with sigterm_as_interrupt():
            thing = Thing()
            callback = weakref.ref(thing, lambda _: signal.raise_signal(number))
            del thing
            assert callback() is None  # the run goes on as if nothing had happened
            with stop_flag():
                raise AssertionError("training started")
    with stop_flag() as flag:  # and it counts once
        assert not flag.requested


def test_a_hangup_asks_for_a_stop_unless_it_is_to_be_ignored(heeded: None) -> None:
    with stop_flag() as flag:
        signal.raise_signal(signal.SIGHUP)
    assert flag.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with sigterm_as_interrupt(), stop_flag() as flag:
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not flag.requested


def test_empty_variables_of_a_launcher_count_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert training.accelerator("cpu").num_processes == 1


@pytest.mark.parametrize(
    ("others", "threads", "own", "chosen"),
    [(0, "2", {}, None), (2, "2", {}, "PASSIVE"), (2, "1", {}, None), (2, "2", {"GOMP_SPINCOUNT": "9"}, None), (2, "", {}, "PASSIVE")],
)
def test_threads_sleep_while_they_wait_only_beside_others(
    others: int, threads: str, own: dict[str, str], chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tmp_path / "loadavg"
    load.write_text(f"0.00 0.00 0.00 {others + 1}/321 4711\n")
    monkeypatch.setattr(waiting, "LOAD", load)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    environment = {"OMP_NUM_THREADS": threads, **own}
    monkeypatch.setattr(os, "environ", environment)
    waiting.choose()
    assert environment.get("OMP_WAIT_POLICY") == chosen


def test_losses_are_shown_from_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("distill", 100) as bar:
        for done in (1, 2, 3):
            bar.update(done, f"loss {done}")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("distill 1/100") and said[0].endswith("loss 1")


def test_what_takes_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(progress, "say", lambda text: told.put(text))
    with progress.telling("opening the data x"):
        pass
    assert told.empty()
    monkeypatch.setattr(progress, "PATIENCE", 0.001)
    with progress.telling("opening the data x"):
        assert told.get(timeout=60) == "opening the data x …"
    with progress.telling("opening the data x", quiet=True):
        pass


def test_work_goes_on_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    progress.say("half done")
    with Bar("finetune", 2) as bar:
        bar.update(1, "loss 1")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files is Linux's")
def test_a_restored_state_keeps_no_file_open(tmp_path: Path) -> None:
    """Or a removed state would keep its place on the disk."""
    model = torch.nn.Linear(300, 300)
    save(tmp_path, tensors_of(model, []), Spent(steps=3))
    assert restore(tmp_path, torch.nn.Linear(300, 300), [], 3).steps == 3
    assert "state.safetensors" not in Path("/proc/self/maps").read_text()


def test_texts_of_unknown_words_alone_end_without_figures_of_masked_tokens(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_data_files import jsonl, pictures

    pictures(tmp_path, 8)
    jsonl(tmp_path / "d.jsonl", [{"image": f"img/{n}.png", "caption": "♠♠"} for n in range(8)])
    settings = {**TRAIN, "max_steps": 1, "data": str(tmp_path / "d.jsonl"), "val": str(tmp_path / "d.jsonl")}
    metrics = run_stage("pretrain", Control(), out=str(tmp_path / "o"), model=str(chain / "init"), **settings).metrics["val"]
    assert metrics["images"] == 4 and "itc" in metrics and not {"mlm", "mlm_accuracy"} & set(metrics)
    assert "validate: 4 of 8 images, drawn at random (eval_limit, whole batches of 4)" in capsys.readouterr().err


def test_weights_that_give_no_finite_figures_are_no_result(chain: Path, tmp_path: Path) -> None:
    settings = {**TRAIN, "max_steps": 1, "data": SHAPES, "weight_decay": 2.0**53, "model": str(chain / "init")}
    with pytest.raises(Diverged, match=r"validation data .* no finite number"):
        run_stage("pretrain", out=str(tmp_path / "o"), **settings)
    assert list((tmp_path / "o/training_state").glob("step-*/state.json")) and not (tmp_path / "o/evlm_manifest.json").exists()


def test_what_is_finished_opens_no_weights(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, data and hashes say that nothing is left to do."""
    again: list[tuple[str, dict[str, Any]]] = [
        ("finetune", {"out": str(chain / "teacher"), "model": str(chain / "init"), "data": SHAPES, **TRAIN}),
        ("shrink", {"out": str(chain / "student"), "model": str(chain / "init")}),
        ("distill", {"out": str(chain / "distilled"), **stages(chain)["distill"], **TRAIN}),
        ("prune", {"out": str(chain / "pruned"), **PRUNE(chain), **TRAIN}),
        ("init", {"out": str(chain / "init"), "size": "tiny", "data": SHAPES, "settings": SIZES}),
    ]
    write_clip(tmp_path / "folder", byte_pairs())
    new: list[tuple[str, dict[str, Any]]] = [
        ("prune", {"out": str(tmp_path / "cut"), "from_gates": str(chain / "pruned"), "sparsity": 0.5, "eval_limit": 2}),
        ("export", {"out": str(tmp_path / "padded"), "model": str(chain / "pruned"), "format": "padded"}),
        ("eval", {"out": str(tmp_path / "eval.json"), "model": str(chain / "pruned"), "data": SHAPES, "limit": 2}),
        ("prune", {"out": str(tmp_path / "scored"), "model": str(chain / "init"), **UNTRAINED, "sparsity": 0.2}),
        ("bench", {"out": str(tmp_path / "bench.json"), "models": [str(chain / "teacher"), str(chain / "init")], **ONCE}),
        ("import", {"out": str(tmp_path / "imported"), "model": str(tmp_path / "folder")}),
    ]
    for name, settings in new:
        run_stage(name, **settings)
    without_weights(monkeypatch)
    for name, settings in (*again, *new):
        run_stage(name, **settings)


UNTRAINED = {"task": "none", "method": "random"}
ONCE = {"rounds": 1, "warmup_rounds": 0, "batch_sizes": [1], "threads": 1}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "finetune": ("finetune", {"model": "init", "data": SHAPES, "freeze": ["ears"]}, "freeze names ears"),
    "shrink": ("shrink", {"model": "init", "layers": {"vision": 99}}, "99 vision layers"),
    "prune": ("prune", {"model": "init", "data": SHAPES, "sparsity": 0.9, "min_heads": 4}, "cannot be reached"),
    "recut": ("prune", {"from_gates": "pruned", "sparsity": 0.95, "min_heads": 4}, "cannot be reached"),
    "untrained": ("prune", {"model": "init", **UNTRAINED, "sparsity": 0.9, "min_heads": 4}, "cannot be reached"),
    "eval": ("eval", {"model": "init", "data": SHAPES, "limit": 2}, "cannot answer questions"),
    "bench": ("bench", {"models": "init", "text_length": 500}, "questions of 500 tokens are too long"),
    "export": ("export", {"model": "pruned", "format": "padded", "data": SHAPES}, "--data does not go with"),
    "import": ("import", {"model": "init"}, "is a checkpoint already"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_for_its_settings_opens_no_weights(what: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings, words = REFUSED[what]
    places = {key: str(chain / settings[key]) for key in ("model", "from_gates", "models") if key in settings}
    settings = {**settings, **places, "out": str(tmp_path / "out")}
    if "models" in settings:
        settings["models"] = [settings["models"]]
    without_weights(monkeypatch)
    with pytest.raises((BadInput, TargetMissed), match=words):
        run_stage(name, **settings)
    assert not (tmp_path / "out").exists()


def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("loaded", "stages.import_folder"):
        monkeypatch.setattr(f"efficientvlm.{module}.families", SimpleNamespace(of_folder=shapes_alone))


def shapes_alone(path: Path) -> Any:
    """The family of a folder, of which nothing but shapes may be asked."""
    from efficientvlm import families

    family = families.of_folder(path)
    return SimpleNamespace(**{name: getattr(family, name) for name in dir(family) if name != "load" and not name.startswith("__")})
