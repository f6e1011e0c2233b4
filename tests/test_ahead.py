"""Processes that read pictures: equal bits and counts for any number of them, told faults, and nothing left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import nursery
import pytest
import torch
from conftest import TRAIN, run_stage
from safetensors.torch import load_file
from test_data_files import jsonl, pictures

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data import ahead, ledger
from efficientvlm.data.ahead import Ahead, how_many, usable_batches
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.opening import drawn, open_data
from efficientvlm.data.packing import packed, unpacked
from efficientvlm.data.skips import Skips
from efficientvlm.errors import BadInput, OutOfMemory
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.settings.compose import stage_settings

pytestmark = pytest.mark.skipif(not ahead.forks(), reason="workers are forks")

COUNT = 24
SHORT = {**TRAIN, "val_fraction": 0.2, "save_every": 2, "limit": None, "eval_limit": None, "max_bad": 9}


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures with captions of which some are long or unknown; three of them cannot be read."""
    folder = tmp_path_factory.mktemp("album")
    paths = pictures(folder, COUNT)
    for index in (3, 4, 17):
        (folder / paths[index]).write_bytes(b"")
    said = [f"a red circle {'left of a blue square ' * (index % 5)} ßæ{chr(0x4E00 + index)}" for index in range(COUNT)]
    return jsonl(folder / "pairs.jsonl", [{"image": path, "caption": text} for path, text in zip(paths, said, strict=True)])


def children() -> set[int]:
    """Workers of this process."""
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def counted(out: Path) -> Any:
    """What a run has read and skipped, and its losses."""
    manifest = require_complete(out).model_dump(mode="json")
    assert manifest["extra"]["reading"]["tokens_read"] > manifest["extra"]["reading"]["unknown_tokens_read"] > 0
    skipped = (out / "skipped.jsonl").read_text().splitlines()
    return manifest["data"], manifest["metrics"], sorted(skipped), manifest["extra"]["reading"]


@pytest.mark.parametrize("augment", ["light", "paper"])
def test_weights_and_counts_are_the_same_for_any_number_of_workers(chain: Path, album: str, tmp_path: Path, augment: str) -> None:
    before = children()
    for workers in (0, 1, 2) if augment == "light" else (0, 2):
        out = str(tmp_path / str(workers))
        run_stage("pretrain", out=out, model=str(chain / "init"), data=album, workers=workers, augment=augment, **SHORT)
    one, *others = (tmp_path / str(workers) for workers in (0, 1, 2) if (tmp_path / str(workers)).exists())
    for other in others:
        assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
        assert counted(other) == counted(one)
    assert len(counted(one)[2]) == 3 and children() <= before


def test_a_finished_stage_is_up_to_date_for_another_number_of_workers(chain: Path, album: str, tmp_path: Path, capsys: Any) -> None:
    for workers in (0, 2):
        run_stage("pretrain", out=str(tmp_path / "out"), model=str(chain / "init"), data=album, workers=workers, **SHORT)
    result = {"model": str(chain / "pruned"), "data": "shapes:difficulty=2,size=90", "task": "vqa", "batch_size": 2}
    found = [run_stage("eval", **result, workers=workers)["metrics"] for workers in (0, 2)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_another_number(chain: Path, album: str, tmp_path: Path) -> None:
    settings = {"model": str(chain / "init"), "data": album, **SHORT, "max_steps": 8}
    nursery.whole("pretrain", out=str(tmp_path / "whole"), workers=0, **settings)
    codes = nursery.finish(nursery.start("pretrain", out=str(tmp_path / "out"), workers=2, fault=("stops_at", [3, 9]), **settings))
    assert codes == [75]
    nursery.whole("pretrain", out=str(tmp_path / "out"), workers=1, **settings)
    assert counted(tmp_path / "out")[2] == counted(tmp_path / "whole")[2]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    ours, whole = (counted(tmp_path / name)[3] for name in ("out", "whole"))
    assert ours.pop("read_from_step") == 4 and ours.keys() == whole.keys() and ours["texts"] == whole["texts"]
    (change,) = require_complete(tmp_path / "out").changes
    assert (change.what, change.before, change.now, change.same_bits) == ("workers", 2, 1, True)


@pytest.mark.slow
def test_two_processes_with_workers_equal_two_without(chain: Path, album: str, tmp_path: Path) -> None:
    settings = {"model": str(chain / "init"), "data": album, "processes": 2, "region_probability": 1.0, **SHORT}
    for workers in (0, 2):
        nursery.whole("pretrain", out=str(tmp_path / str(workers)), workers=workers, **settings)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "2"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert counted(tmp_path / "0")[2] == counted(tmp_path / "2")[2]


def test_a_sample_too_many_is_told_as_without_workers(chain: Path, album: str, tmp_path: Path) -> None:
    said = []
    for workers in (0, 2):
        settings = {"model": str(chain / "init"), "data": album, "workers": workers, **SHORT, "max_bad": 1}
        with pytest.raises(BadInput) as caught:
            run_stage("pretrain", out=str(tmp_path / str(workers)), **settings)
        state = tmp_path / str(workers) / "training_state"
        said.append((str(caught.value), caught.value.fix, state.is_dir() and sorted(path.name for path in state.iterdir())))
    assert said[0] == said[1] and "2 samples of data" in said[0][0]
    lone = jsonl(Path(album).with_name("lone.jsonl"), [{"image": f"img/{at}.png", "caption": "c"} for at in (3, 4)])
    for workers in (0, 1):
        source: Any = open_data(PAIRS, lone, "test", max_bad=9)
        source.workers = workers
        with pytest.raises(BadInput, match="no usable sample"):
            list(usable_batches(source, range(0, 2, 1), 2))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_and_the_run_goes_on_later(chain: Path, album: str, tmp_path: Path) -> None:
    settings = {"model": str(chain / "init"), "data": album, **SHORT, "max_steps": 8}
    out = str(tmp_path / "out")
    assert nursery.finish(nursery.start("pretrain", out=out, workers=2, fault=("loses_a_worker_at", 5), **settings)) == [3]
    what, why, fix = (tmp_path / "out.error-0").read_text().splitlines()
    assert what == "a process that reads pictures was killed" and "Killed" in why and "with fewer workers" in fix and "None" not in fix
    nursery.whole("pretrain", out=out, workers=2, **settings)
    nursery.whole("pretrain", out=str(tmp_path / "whole"), workers=0, **settings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def killed_meanwhile(*_: Any) -> Any:
    """In the place of what fetches a tensor from a worker."""
    os.kill(max(children()), signal.SIGKILL)
    raise ConnectionResetError


def not_fetched(*_: Any) -> Any:
    raise EOFError


@pytest.mark.parametrize(("fetch", "told"), [(killed_meanwhile, OutOfMemory), (not_fetched, EOFError)])
def test_a_worker_that_dies_while_its_result_is_fetched_is_told(fetch: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_storage_fd", fetch)
    with pytest.raises(told), enough_memory("reading", "lower batch_size"), Ahead(torch.zeros, range(3, 9), 1) as found:
        list(found)


LONG = """
import sys, torch
from conftest import run_stage, TRAIN
torch.set_num_threads(1)
run_stage("pretrain", **{**TRAIN, "max_steps": 100000, "eval_limit": 0, "limit": None, "save_every": 100000,
          "out": sys.argv[1], "model": sys.argv[2], "data": sys.argv[3], "workers": 2, "max_bad": 9})
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process(chain: Path, album: str, tmp_path: Path, number: signal.Signals) -> None:
    """The signal goes to the whole group, as a terminal and a batch system send it; SIGKILL to the run alone."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    out = tmp_path / "out"
    command = [sys.executable, "-c", LONG, str(out), str(chain / "init"), album]
    run = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n")) and time.monotonic() - began < 90:
        time.sleep(0.1)
    workers = nursery.members(run.pid) - {run.pid}
    assert len(workers) == 2
    if number == signal.SIGKILL:
        run.kill()
    else:
        os.killpg(run.pid, number)
    run.wait(60)
    began = time.monotonic()
    while nursery.members(run.pid) and time.monotonic() - began < 10:
        time.sleep(0.1)
    assert not nursery.members(run.pid)
    if number != signal.SIGKILL:
        assert (out / "training_state").is_dir() and "Traceback" not in run.stderr.read().rpartition("Interrupted")[2]  # type: ignore[union-attr]


@dataclass
class Thing:
    name: str
    parts: tuple[np.ndarray, ...]
    more: dict[str, Any]


def test_what_goes_from_one_process_to_another_comes_back_as_it_was() -> None:
    thing = Thing("é", (np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1], np.zeros((0, 4), np.uint8)), {"a": torch.tensor(7)})
    value = [thing, (True, None, "text"), {"b": torch.arange(5).bool(), "c": [torch.ones(2, 2, dtype=torch.bfloat16)]}]
    buffer, rest = packed(value)
    back = unpacked(buffer, rest)
    assert back[0].name == "é" and back[1] == (True, None, "text") and np.array_equal(back[0].parts[0], thing.parts[0])
    assert back[0].parts[1].shape == (0, 4) and back[0].parts[0].dtype == np.float32
    assert back[0].more["a"].item() == 7 and back[0].more["a"].shape == () and torch.equal(back[2]["b"], value[2]["b"])
    assert torch.equal(back[2]["c"][0], value[2]["c"][0]) and back[2]["c"][0].dtype == torch.bfloat16
    assert thing.parts[0].shape == (2, 3)


def test_results_come_in_order_and_what_is_counted_is_counted_once() -> None:
    skips = Skips("data", limit=5)
    drawn_before = torch.random.get_rng_state()

    def make(job: int) -> np.ndarray:
        if job % 3 == 0:
            skips.add(BadInput(f"sample {job % 6}", "it is bad"))
        return np.full(3, job)

    with Ahead(make, range(9), 3) as results:
        assert [int(result[0]) for result in results] == list(range(9))
    assert skips.count == 2 and list(skips.reasons) == ["sample 0", "sample 3"]
    assert torch.equal(torch.random.get_rng_state(), drawn_before)
    with Ahead(make, range(9), 2) as results:
        next(results)
        running = children()
    assert len(running) >= 2 and not children() & running and ledger.told() == []


def test_a_fault_of_ours_in_a_worker_stays_one_and_death_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: int) -> int:
        raise KeyError(job)

    with pytest.raises(KeyError), Ahead(broken, range(4), 2) as results:
        list(results)

    def dies(job: int) -> int:
        if job == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    with (
        pytest.raises(OutOfMemory, match="reads pictures was killed"),
        enough_memory("a test", "nothing"),
        Ahead(dies, range(9), 2) as results,
    ):
        list(results)
    monkeypatch.setattr(ahead, "forks", lambda: False)
    with pytest.raises(BadInput, match="only on Linux"):
        how_many(2, torch.device("cpu"))
    assert how_many("auto", torch.device("cpu")) == how_many(0, torch.device("cpu")) == 0


def test_a_kill_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are fetched over sockets that have no file."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
    killed = os.fork()
    if killed == 0:
        with Ahead(lambda job: np.zeros(1000, np.uint8), iter(range(50)), 1) as results:
            assert len(next(results)) == 1000
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(killed, 0)[1] == signal.SIGKILL and list(tmp_path.iterdir()) == []


def test_auto_takes_the_cores_that_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST", 8)
    monkeypatch.setattr(ahead, "cores", lambda: 4)
    assert how_many("auto", torch.device("cpu")) == 3 and how_many("auto", torch.device("cuda")) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert how_many("auto", torch.device("cpu")) == 0 and how_many(5, torch.device("cpu")) == 5
    monkeypatch.undo()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert ahead.cores() == 1


@pytest.mark.parametrize("value", [-1, "some", 1.5, 1000, True])
def test_workers_are_a_number_or_auto(value: Any) -> None:
    with pytest.raises(BadInput, match=r"workers: it is .*(auto, or a number|no switch)"):
        stage_settings("finetune", {"model": "m", "data": "d", "out": "o", "workers": value})


def test_a_stream_is_read_by_workers_as_by_one_process(album: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(album).read_text().splitlines()]
    spec = f"stream:{jsonl(Path(album).with_name('stream.jsonl'), rows)}"
    found = []
    for workers in (0, 2):
        source: Any = open_data(PAIRS, spec, "train", shuffle_buffer=5, image_size=8)
        with Ahead(lambda index: source[index], range(40), workers) as items:
            found.append(([(item.id, item.image.sum()) for item in items], len(source), source.skips.reasons))
    assert found[0] == found[1] and found[0][1] == 40 and len(found[0][2]) == 3


def test_a_part_of_a_source_is_read_by_its_workers(album: str) -> None:
    source: Any = open_data(PAIRS, album, "test", max_bad=9, image_size=8)
    some: Any = drawn(source, 9)
    some.workers = 2
    assert source.workers == 2
    ids = [item.id for items in usable_batches(some, range(0, 9, 2), 9) for item in items]
    some.workers = 0
    assert ids == [item.id for items in usable_batches(some, range(0, 9, 2), 9) for item in items]
