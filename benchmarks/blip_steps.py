"""Seconds of a BLIP's steps with this package and with transformers' own class, the same weights, one process, turn by turn.

    python benchmarks/blip_steps.py [--size base|small] [--batch 8] [--rounds 5]

Prints a JSON line a step: captioning and question answering, a training step (forward and backward) and greedy writing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from efficientvlm.families.blip_config import BlipAnswerConfig, BlipCaptionConfig
from efficientvlm.families.blip_fresh import SIZES, fresh_config
from efficientvlm.families.blip_model import MODELS

TOKENS, NEW = 12, 10


def networks(kind: Any, size: str) -> tuple[Any, Any]:
    """Ours, and transformers' with the same weights."""
    config = kind.from_dict({**fresh_config(size, {"dropout": 0.0}, 30524).to_dict(), "question_start_id": None})
    torch.manual_seed(0)
    ours = MODELS[kind](config)
    stock = getattr(transformers, kind.stock)(transformers.BlipConfig.from_dict({**config.to_dict(), "model_type": "blip"}))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def step(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss: torch.Tensor = model(**inputs).loss
    loss.backward()
    return loss.detach()


def turns(work: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Median seconds of each, and by how much what they give differs."""
    first = {name: run() for name, run in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    mine, theirs = first["ours"].float(), first["stock"].float()
    return {**medians, "speedup": medians["stock"] / medians["ours"], "difference": float((mine - theirs).abs().max())}


def compare(task: str, kind: Any, size: str, batch: int, rounds: int) -> None:
    ours, stock = networks(kind, size)
    side = ours.config.vision_config.image_size
    pixels, ids = torch.randn(batch, 3, side, side), torch.randint(1000, 30000, (batch, TOKENS))
    inputs = {"pixel_values": pixels, "input_ids": ids, "labels": ids}
    asked = {"pixel_values": pixels, "max_new_tokens": NEW, **({"input_ids": ids} if kind is BlipAnswerConfig else {})}
    steps: dict[str, Callable[[Any], torch.Tensor]] = {
        "training": lambda model: step(model.train(), inputs),
        "writing": lambda model: model.eval().generate(**asked),
    }
    for name, run in steps.items():
        result = turns({"ours": partial(run, ours), "stock": partial(run, stock)}, rounds)
        print(json.dumps({"task": task, "step": name, "size": size, "batch": batch, **result}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for task, kind in (("captioning", BlipCaptionConfig), ("question answering", BlipAnswerConfig)):
        compare(task, kind, given.size, given.batch, given.rounds)


if __name__ == "__main__":
    main()
