"""Latency: turns, warm-up, clock and ratios, with calls that take as long as they are told."""

from __future__ import annotations

import gc

import pytest
import torch

from efficientvlm.runtime import hardware
from efficientvlm.runtime.hardware import machine_of, processor
from efficientvlm.stages import latency
from efficientvlm.stages.bench import unique


class Clock:
    """Time that passes only inside the calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def call(self, label: str, *seconds: float):
        """A call that takes each of `seconds` in turn, times the batch size."""
        count = 0

        def run(size: int) -> None:
            nonlocal count
            self.order.append((label, size))
            self.now += seconds[count % len(seconds)] * size
            count += 1

        return run


def test_models_take_turns_and_the_order_rotates() -> None:
    clock = Clock()
    calls = {label: clock.call(label, 0.01) for label in "abc"}
    latency.latency(calls, [1, 8], rounds=3, warmup_rounds=1, clock=clock)
    first = "".join(label for label, size in clock.order if size == 1)
    assert first == "cab" + "abc" + "bca" + "cab"
    assert [size for _, size in clock.order] == [1] * 12 + [8] * 12


def test_warm_up_is_not_counted_and_progress_is() -> None:
    clock, done = Clock(), []
    calls = {"a": clock.call("a", 9.0, 9.0, 0.5, 0.5, 0.5)}
    (row,) = latency.latency(calls, [1], rounds=3, warmup_rounds=2, clock=clock, progress=done.append)
    assert row["median_ms"] == row["p90_ms"] == pytest.approx(500) and done == [1, 2, 3, 4, 5]
    clock = Clock()
    (row,) = latency.latency({"a": clock.call("a", 9.0)}, [2], rounds=1, warmup_rounds=0, clock=clock)
    assert row["median_ms"] == pytest.approx(18_000) and row["samples_per_s"] == pytest.approx(1 / 9)


def test_percentiles_are_of_one_model() -> None:
    clock = Clock()
    seconds = [0.001 * (number + 1) for number in range(11)]
    (row,) = latency.latency({"a": clock.call("a", *seconds)}, [1], rounds=11, warmup_rounds=0, clock=clock)
    assert (row["p10_ms"], row["median_ms"], row["p90_ms"]) == pytest.approx((2, 6, 10))


def test_a_speed_up_is_the_median_of_ratios_within_a_round() -> None:
    """The machine is ten times slower in some rounds; ratios within a round do not feel it, a ratio of medians would."""
    clock = Clock()
    calls = {"slow": clock.call("slow", 1.0, 10.0, 1.0, 10.0), "fast": clock.call("fast", 0.5, 4.0, 0.4, 5.0)}
    slow, fast = latency.latency(calls, [1], rounds=4, warmup_rounds=0, clock=clock)
    assert (slow["speedup"], slow["speedup_q1"], slow["speedup_q3"]) == (1, 1, 1)
    assert fast["speedup"] == pytest.approx(2.25)  # of 2, 2.5, 2.5, 2
    assert (fast["speedup_q1"], fast["speedup_q3"]) == pytest.approx((2.0, 2.5))


def test_the_device_is_waited_for_inside_the_measured_time() -> None:
    clock = Clock()
    pending = 0.0

    def call(size: int) -> None:
        nonlocal pending
        pending += 0.2

    def wait() -> None:
        nonlocal pending
        clock.now, pending = clock.now + pending, 0.0

    (row,) = latency.latency({"a": call}, [1], rounds=2, warmup_rounds=1, clock=clock, synchronise=wait)
    assert row["median_ms"] == pytest.approx(200)


def test_no_garbage_collector_inside_and_restored_after() -> None:
    seen = []
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        latency.latency({"a": lambda size: seen.append(gc.isenabled()) or 1 / 0}, [1], rounds=1, warmup_rounds=0)
    assert seen == [False] and gc.isenabled()


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2
    with pytest.raises(ValueError), latency.threads(other) as count:
        assert count == torch.get_num_threads() == other
        raise ValueError
    assert torch.get_num_threads() == before
    with latency.threads(None) as count:
        assert count == before


def test_the_machine_is_named(tmp_path, monkeypatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Fast CPU @ 3 GHz\n")
    monkeypatch.setattr(hardware, "CPUINFO", file)
    assert machine_of(torch.device("cpu"))["name"] == "Fast CPU @ 3 GHz"
    assert machine_of(torch.device("cpu"))["instructions"] == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "none")
    assert processor()


def test_the_same_model_twice_has_two_labels() -> None:
    assert unique(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
