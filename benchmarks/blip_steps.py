"""Seconds of a BLIP's steps with this package and with transformers' own class: the same weights, one process, turn by turn.

    python benchmarks/blip_steps.py [--size base|small] [--images 2] [--texts 4] [--rounds 5]

Prints a JSON line a step: captioning and question answering, each as a training step on `texts` captions or questions an image, and as
greedy writing of one text an image. Transformers' class is given every image as often as there are texts about it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from efficientvlm.families.blip.config import BlipAnswerConfig, BlipCaptionConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.families.blip.start import SIZES, fresh_config

TOKENS, NEW = 12, 10
Step = Callable[[], torch.Tensor]


def trained(model: Any, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    model.train().zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value.detach()


def turns(ours: Step, stock: Step, rounds: int) -> dict[str, float]:
    """Median seconds of each, and by how much what they give differs."""
    mine, theirs = ours().float(), stock().float()
    times: dict[Step, list[float]] = {ours: [], stock: []}
    for _ in range(rounds):
        for run, spent in times.items():
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
    medians = [statistics.median(spent) for spent in times.values()]
    return {"ours": medians[0], "stock": medians[1], "speedup": medians[1] / medians[0], "difference": float((mine - theirs).abs().max())}


def compare(task: str, kind: Any, size: str, images: int, texts: int, rounds: int) -> None:
    config = kind.from_dict({**fresh_config(size, {"dropout": 0.0}, 30524).to_dict(), "question_start_id": None})
    torch.manual_seed(0)
    ours: Any = MODELS[kind](config)
    stock = getattr(transformers, kind.stock)(transformers.BlipConfig.from_dict({**config.to_dict(), "model_type": "blip"}))
    stock.load_state_dict(ours.state_dict())
    pixels = torch.randn(images, 3, config.vision_config.image_size, config.vision_config.image_size)
    ids, rows = torch.randint(1000, 30000, (images * texts, TOKENS)), torch.arange(images).repeat_interleave(texts)
    ids[:, 0] = config.decoder_start
    mask, answers = torch.ones_like(ids), kind is BlipAnswerConfig
    names = {"question": ids, "answer": ids} if answers else {"text": ids}
    batch = {"pixels": pixels, "image_index": rows, "answer_index": torch.arange(len(ids))}
    batch |= {f"{name}_{part}": value for name in names for part, value in (("ids", ids), ("mask", mask))}

    def loss() -> torch.Tensor:
        return F.cross_entropy(ours.run(batch)["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    repeated = {"input_ids": ids, "labels": ids, "attention_mask": mask, "pixel_values": pixels[rows]}
    asked = {"pixel_values": pixels, "max_new_tokens": NEW} | (
        {"input_ids": ids[:images], "attention_mask": mask[:images]} if answers else {}
    )
    about = {"task": task, "size": size, "images": images, "texts": texts}
    result = turns(lambda: trained(ours, loss), lambda: trained(stock, lambda: stock(**repeated).loss), rounds)
    print(json.dumps({**about, "step": "training", **result}), flush=True)
    result = turns(lambda: ours.eval().generate(**asked), lambda: stock.eval().generate(**asked), rounds)
    print(json.dumps({**about, "step": "writing", **result, "texts": 1}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    for name, default in (("images", 2), ("texts", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    for task, kind in (("captioning", BlipCaptionConfig), ("question answering", BlipAnswerConfig)):
        compare(task, kind, given.size, given.images, given.texts, given.rounds)
