"""Does everything compute on a GPU what it computes on the CPU, and how fast do training steps and answers run there?

python benchmarks/gpu.py [--device cuda] [--size base|tiny] [--seconds 480] [--out CSV]

Three parts, each a number of rows of the CSV, which says which card it was:

- `agreement`: losses and gradients of every objective on tiny networks in fp32 and bf16, beside those of the CPU in fp32. Compared are each
  loss and the gradient of each tensor by ‖difference‖ / ‖CPU‖, of which the worst is told; gradients that are smaller than a hundredth of
  the largest one are measured by that hundredth, since some are 0 but for rounding, as those of the biases of keys. Of three draws of
  weights and batch the worst counts in fp32, the middle one in bf16, where a ReLU or an absolute value close to 0 may turn over. Without
  TF32, fp32 may differ by 1e-4; gradients in bf16 by 5e-2, losses by 1e-2. The script ends with 1 where one does not hold.
- `step`: distillation and pruning steps of an X-VLM with a ViT, one with a Swin, and a BLIP, with the largest batch that fits: images a
  second, milliseconds by phase, and the peak of memory beside what a plan says.
- `latency`: teacher, student of half the layers, and the student without 40 % of its heads and neurons, at batch 1 and 32, beside their
  multiply-adds.

It runs from the source tree, reads no file, and needs no package for data. Networks have random weights, and batches are made of noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from published import ROOT, as_csv, code, csv_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.compression.accounting import count_macs
from efficientvlm.compression.pruner import Pruner
from efficientvlm.compression.surgery import slice_model
from efficientvlm.families.blip.models import MODELS as BLIPS
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.objectives.assignment import TextAssignment
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.comparison import Comparison
from efficientvlm.objectives.gated import Gated
from efficientvlm.objectives.generation import Generation
from efficientvlm.objectives.grounding import Grounding
from efficientvlm.objectives.methods import METHODS as HOW
from efficientvlm.objectives.momentum import MomentumContrast
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.planning import costs
from efficientvlm.planning.live import fullest, valueless
from efficientvlm.runtime.hardware import autocast, machine_of, pick_device, synchronise
from efficientvlm.settings.methods import METHODS

LENGTH, ANSWER = 12, 5
SEEDS = range(3)
BOUNDS = {("fp32", "losses"): 1e-4, ("fp32", "gradients"): 1e-4, ("bf16", "losses"): 1e-2, ("bf16", "gradients"): 5e-2}
TINY = {
    **{"image_size": 32, "patch_size": 8, "vision_width": 32, "vision_layers": 2, "vision_heads": 4, "vision_intermediate": 64},
    **{
        "text_width": 32,
        "text_layers": 2,
        "text_heads": 4,
        "text_intermediate": 64,
        "vocab_size": 60,
        "max_positions": 32,
        "embed_dim": 16,
    },
}
SWIN = {"vision_depths": [2, 2, 18, 2], "vision_layers": 24, "patch_size": 4, "vision_window": 7, "vision_activation": "gelu"}
SWIN |= {"vision_width": 1024, "vision_heads": 32, "vision_intermediate": 4096, "vision_drop_path": 0.0}
TINY_SWIN = {"vision_depths": [4, 4], "vision_layers": 8, "patch_size": 4, "vision_window": 4, "vision_activation": "gelu"}
TINY_SWIN |= {"vision_drop_path": 0.0}
GATES = {"head_init": 2.0, "neuron_init": 2.0}  # some of what is drawn is open, some shut, most between
Batch = dict[str, Any]
Make = Callable[[str], Any]
"""Size → a configuration."""


def xvlm(**changes: Any) -> Make:
    def make(size: str) -> XVLMConfig:
        small = {**TINY, "fusion_layers": 2, "local_attention_depth": 2}
        swin = ({} if size == "base" else TINY_SWIN) if "vision_depths" in changes else {}
        return XVLMConfig(**{**({} if size == "base" else small), "dropout": 0.0, **changes, **swin})

    return make


def blip(network: str) -> Make:
    def make(size: str) -> Any:
        of_size = {"image_size": 224} if size == "base" else TINY
        words = {"[DEC]": 3, "[ENC]": 4, "[SEP]": 5, "[PAD]": 0, "[CLS]": 6}
        vocab = words | {f"word{number}": number for number in range(7, 60 if size != "base" else 30524)}
        return fresh_config(
            size if size == "base" else "tiny",
            {**of_size, "dropout": 0.0, "network": network, "vocab_size": max(vocab.values()) + 1},
            vocab,
        )

    return make


def built(config: Any) -> Any:
    """A network with random weights; vectors too, so that a bias that is lost shows."""
    model = XVLMModel(config) if isinstance(config, XVLMConfig) else BLIPS[type(config)](config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# batches of noise


def pictures(config: Any, count: int) -> Tensor:
    side = config.sizes().image_size
    return torch.randn(count, 3, side, side)


def texts(config: Any, count: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Ids and mask [count, length]; every second text is shorter by three."""
    _, _, _, vocab = config.reads()
    ids, mask = torch.randint(7, vocab, (count, length)), torch.ones(count, length, dtype=torch.long)
    mask[1::2, length - 3 :] = 0
    return ids * mask, mask


def pairs(config: Any, count: int) -> Batch:
    ids, mask = texts(config, count)
    places = torch.tensor([[1, 3]]).expand(count, -1)
    labels = ids.gather(1, places)
    known = {"image_ids": torch.arange(count), "caption_ids": torch.arange(count), "samples": count}
    masked = {"masked_ids": ids.scatter(1, places, 8), "masked_positions": places, "masked_labels": labels}
    return {"pixels": pictures(config, count), "text_ids": ids, "text_mask": mask, **masked, **known}


def regions(config: Any, count: int) -> Batch:
    """One image a region; the last is of the whole image."""
    made, tokens = pairs(config, count), 1 + config.patches
    seen = torch.rand(count, tokens) > 0.5
    seen[:, 0] = seen[-1] = True
    whole = torch.arange(count) == count - 1
    boxes = torch.rand(count, 4) * 0.3 + 0.3
    return made | {"image_index": torch.arange(count), "image_mask": seen.long(), "boxes": boxes, "is_whole_image": whole.long()}


def questions(config: Any, count: int) -> Batch:
    (asked, asked_mask), (said, said_mask) = texts(config, count), texts(config, count, ANSWER)
    order = torch.arange(count)
    found = {"pixels": pictures(config, count), "image_index": order, "question_ids": asked, "question_mask": asked_mask}
    return found | {
        "answer_ids": said,
        "answer_mask": said_mask,
        "answer_index": order,
        "answer_weights": torch.ones(count),
        "samples": count,
    }


def captions(config: Any, count: int) -> Batch:
    ids, mask = texts(config, count)
    target = mask.clone()
    target[:, :2] = 0
    found = {"pixels": pictures(config, count), "image_index": torch.arange(count), "text_ids": ids, "text_mask": mask}
    return found | {"target_mask": target, "samples": count}


def statements(config: Any, count: int) -> Batch:
    ids, mask = texts(config, count)
    images = {"pixels": pictures(config, count), "second_pixels": pictures(config, count), "pair_index": torch.arange(count)}
    return images | {"text_ids": ids, "text_mask": mask, "labels": (torch.arange(count) % 4 > 0).long(), "samples": count}


def phrases(config: Any, count: int) -> Batch:
    return questions(config, count) | {"boxes": torch.rand(count, 4) * 0.3 + 0.3}


class Case(NamedTuple):
    """An objective on a network; `task` names the settings of a teacher's terms, and `method` how it teaches, nothing for no teacher."""

    name: str
    make: Make
    hard: Callable[[Any], Objective]
    batch: Callable[[Any, int], Batch]
    task: str = ""
    method: str = "efficientvlm"
    gated: bool = False
    precisions: tuple[str, ...] = ("fp32", "bf16")


def _pretraining(model: Any) -> Objective:
    return XvlmPretraining(model, losses=model.config.heads, seed=0)


def _contrast(model: Any) -> Objective:
    return XvlmPretraining(model, losses=("itc", "itm"), seed=0)


def _blip(model: Any) -> Objective:
    losses = ("itc", "itm", "lm") if model.config.learns() >= {"lm"} else ("itc", "itm")
    contrast = MomentumContrast(model, momentum=0.9, queue=64, alpha=0.4, random=0)
    return BlipPretraining(model, losses=losses, seed=0, contrast=contrast)


TWO = {"fusion_images": 2, "fusion_layers": 4}
CASES = (
    Case("x-vlm pretraining", xvlm(), _pretraining, pairs, "pretraining"),
    Case("x-vlm pretraining, regions", xvlm(), _pretraining, regions, "pretraining"),
    Case("x-vlm pretraining, swin", xvlm(**SWIN), _pretraining, pairs, "pretraining"),
    Case("x-vlm pretraining, method dlip", xvlm(), _pretraining, pairs, "pretraining", "dlip"),
    Case("x-vlm retrieval", xvlm(heads=["itc", "itm"]), _contrast, pairs, "retrieval", gated=True),
    Case("x-vlm vqa", xvlm(decoder_layers=2, heads=[]), Generation, questions, "vqa", gated=True),
    Case("x-vlm captioning", xvlm(heads=["lm"]), Captions, captions, "captioning", gated=True),
    Case("x-vlm nlvr2", xvlm(**TWO, heads=["compare"]), Comparison, statements, "nlvr2", gated=True),
    Case("x-vlm text assignment", xvlm(**TWO, heads=["assign"]), lambda model: TextAssignment(model, seed=0), pairs, precisions=("fp32",)),
    Case("x-vlm grounding", xvlm(heads=["box"]), Grounding, phrases, "grounding", gated=True),
    Case("blip pretraining", blip("pretrain"), _blip, pairs, "pretraining", "dlip"),
    Case("blip retrieval", blip("match"), _blip, pairs, "retrieval", "dlip", gated=True),
    Case("blip vqa", blip("answer"), lambda model: Generation(model, 0.1), questions, "vqa", "dlip", gated=True),
    Case("blip captioning", blip("caption"), lambda model: Captions(model, 0.1), captions, "captioning", "dlip", gated=True),
    Case("blip nlvr2", blip("compare"), Comparison, statements, "nlvr2", "dlip"),
)
"""Every objective but that of self-critical training, whose captions are drawn, so that rounding may change them. The images beside which a
text is assigned are drawn by similarity, which in bf16 may give others."""


def objective_of(case: Case, student: Any, teacher: Any) -> Objective:
    """The losses of `case` with its teacher's terms, under gates if it says so."""
    hard = case.hard(student)
    if case.task:
        hard = HOW[case.method].distilled(hard, teacher, METHODS[case.method][case.task].model_construct())
    return Gated(hard, Pruner.of(student, sparsity=0.4, steps=10, warmup=0.1, **GATES)) if case.gated else hard


# agreement


def gradients(case: Case, device: torch.device, precision: str, seed: int, count: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step, on the CPU, of the same weights and batch wherever they are computed."""
    torch.manual_seed(seed)
    config = case.make("tiny")
    student, teacher, batch = built(config).to(device), built(config).to(device), case.batch(config, count)
    objective = objective_of(case, student, teacher).to(device).train()
    with autocast(device, precision):
        losses = objective({name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}, 3)
    losses["loss"].backward()
    found = {name: parameter.grad.float().cpu() for name, parameter in objective.named_parameters() if parameter.grad is not None}
    return {name: value.detach().float().cpu() for name, value in losses.items()}, found


def off(found: dict[str, Tensor], expected: dict[str, Tensor], least: float) -> dict[str, float]:
    """‖difference‖ / ‖expected‖ of every tensor; those of norm below `least` are measured by it.

    A teacher's term is nearly nothing where both networks nearly agree, and its rounding is as large as that of the outputs that it
    compares.
    """
    assert found.keys() == expected.keys(), f"other tensors: {sorted(found.keys() ^ expected.keys())}"
    return {name: float((found[name] - value).norm() / value.norm().clamp(min=least)) for name, value in expected.items()}


def agreement(device: torch.device, cases: tuple[Case, ...] = CASES) -> Iterator[dict[str, Any]]:
    """A row a case, precision and kind of number."""
    for case in cases:
        each: dict[tuple[str, str], list[dict[str, float]]] = {}
        for seed in SEEDS:
            losses, expected = gradients(case, torch.device("cpu"), "fp32", seed)
            floor = 1e-2 * float(torch.stack([value.norm() for value in expected.values()]).max())
            for precision in case.precisions:
                found = gradients(case, device, precision, seed)
                each.setdefault((precision, "losses"), []).append(off(found[0], losses, 1e-3 * float(losses["loss"])))
                each.setdefault((precision, "gradients"), []).append(off(found[1], expected, floor))
        for (precision, kind), draws in each.items():
            chosen = max if precision == "fp32" else statistics.median
            worst, whose = max((chosen([draw[name] for draw in draws]), name) for name in draws[0])
            bound = BOUNDS[precision, kind]
            row = {
                "case": case.name,
                "precision": precision,
                "what": f"{kind}, worst of {len(draws[0])}",
                "value": worst,
                "unit": "relative",
            }
            yield row | {"bound": bound, "holds": int(worst <= bound), "note": whose}


# steps


class Timed:
    """A teacher, and the seconds that it took."""

    def __init__(self, inner: Any, device: torch.device) -> None:
        self.inner, self.device, self.seconds = inner, device, 0.0

    def __call__(self, *given: Any) -> Any:
        synchronise(self.device)
        began = time.perf_counter()
        answer = self.inner(*given)
        synchronise(self.device)
        self.seconds += time.perf_counter() - began
        return answer


@dataclass
class Bare:
    """A network where a plan asks for one that was loaded."""

    model: Any


class Run(NamedTuple):
    objective: Objective
    optimizer: torch.optim.Optimizer
    teacher: Timed
    batch: Batch


STEPS = (
    ("x-vlm, vit", xvlm(), xvlm(decoder_layers=6, heads=[])),
    ("x-vlm, swin", xvlm(**SWIN), xvlm(**SWIN, decoder_layers=6, heads=[])),
    ("blip", blip("pretrain"), blip("answer")),
)
"""Name, the network that is distilled before any task, and the one that is pruned on questions."""


def stages(name: str, general: Make, tuned: Make) -> Iterator[tuple[str, Case]]:
    method = "dlip" if name == "blip" else "efficientvlm"
    yield "distill", Case(name, general, _blip if name == "blip" else _pretraining, pairs, "pretraining", method)
    yield "prune", Case(name, tuned, Generation, questions, "vqa", method, gated=True)


def half(model: Any) -> Any:
    """A network of every second layer, with fresh weights."""
    config = model.config
    layers = {tower: config.choose(tower, (count + 1) // 2) for tower, count in config.layers().items() if count}
    smaller = config.with_layers(layers)
    return type(model)(smaller)


def distilled_part(objective: Any) -> Any:
    return objective.inner if isinstance(objective, Gated) else objective


def ready(case: Case, size: str, device: torch.device, count: int) -> Run:
    torch.manual_seed(0)
    with device:
        teacher = built(case.make(size))
        student = half(teacher)
    objective = objective_of(case, student, teacher).to(device).train()
    inner = distilled_part(objective)
    inner.teacher = timed = Timed(inner.teacher, device)
    optimizer = torch.optim.AdamW((p for p in objective.parameters() if p.requires_grad), lr=1e-5, fused=device.type == "cuda")
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in case.batch(teacher.config, count).items()}
    return Run(objective, optimizer, timed, batch)


def step(run: Run, device: torch.device, number: int) -> dict[str, float]:
    """Seconds of the phases of one step."""
    marks = []

    def mark() -> None:
        synchronise(device)
        marks.append(time.perf_counter())

    run.teacher.seconds = 0.0
    mark()
    with autocast(device, "bf16"):
        loss = run.objective(run.batch, number)["loss"]
    mark()
    loss.backward()
    mark()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    mark()
    forward, backward, update = (later - sooner for sooner, later in pairwise(marks))
    return {"teacher": run.teacher.seconds, "student": forward - run.teacher.seconds, "backward": backward, "optimizer": update}


def largest(case: Case, size: str, device: torch.device, most: int) -> int:
    """The largest power of two of images that a step fits into the card's memory with, at most `most`."""
    count, fits = 4, 0
    while count <= most:
        run = None
        try:
            run = ready(case, size, device, count)
            for number in range(2):
                step(run, device, number)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            del run
            if device.type == "cuda":
                torch.cuda.empty_cache()
        fits, count = count, 2 * count
    return fits


def planned(case: Case, size: str, device: torch.device, count: int) -> int:
    """Bytes that a plan states for the step: what is kept, and activations from the step on tensors without values."""
    torch.manual_seed(0)
    with torch.device("meta"):
        teacher = built(case.make(size))
        student = half(teacher)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = [valueless(Bare(model), device, fake).model for model in (student, teacher)]  # type: ignore[arg-type]
    gates = len(student.units()) if case.gated else 0
    kept = costs.memory(student, teacher, gates=gates, training=True)["total"]
    objective = objective_of(case, *shapes)
    return kept + fullest(objective, [case.batch(teacher.config, count)], fake, device=device, precision="bf16")


def steps(device: torch.device, size: str, rounds: int, most: int, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Rows of every network and stage; what time does not suffice for is left out and said."""
    for name, general, tuned in STEPS:
        for stage, case in stages(name, general, tuned):
            about = {"case": f"{name}, {stage}", "precision": "bf16"}
            if left() < 0:
                yield about | {"what": "not run", "note": "no time was left"}
                continue
            count = largest(case, size, device, most)
            if not count:
                yield about | {"what": "not run", "note": "not even 4 images fit"}
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = ready(case, size, device, count)
            spent = [step(run, device, number) for number in range(rounds + 2)][2:]
            seconds = statistics.median(sum(each.values()) for each in spent)
            yield about | {"what": "images in a batch", "value": count, "unit": "images"}
            yield about | {"what": "speed", "value": count / seconds, "unit": "images/s"}
            for phase in spent[0]:
                yield about | {"what": f"time of {phase}", "value": 1e3 * statistics.median(each[phase] for each in spent), "unit": "ms"}
            del run
            if device.type == "cuda":
                yield about | {"what": "peak memory", "value": torch.cuda.max_memory_allocated() / 2**20, "unit": "MiB"}
                torch.cuda.empty_cache()
            try:
                yield about | {"what": "planned memory", "value": planned(case, size, device, count) / 2**20, "unit": "MiB"}
            except RuntimeError as error:  # a plan on another version of torch must not cost the rows that follow
                yield about | {"what": "not planned", "note": str(error).splitlines()[0]}


# latency


def timed(model: nn.Module, batch: Batch, device: torch.device, rounds: int) -> float:
    """Median seconds of a pass."""
    run: Any = model
    seconds = []
    for _ in range(rounds + 3):
        synchronise(device)
        began = time.perf_counter()
        with torch.inference_mode(), autocast(device, "bf16"):
            run.run(batch)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def latency(device: torch.device, size: str, rounds: int, batches: tuple[int, ...], left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    for name, _, tuned in STEPS:
        if left() < 0:
            yield {"case": name, "precision": "bf16", "what": "not run", "note": "no time was left"}
            continue
        torch.manual_seed(0)
        with device:
            teacher = built(tuned(size)).eval()
            student = half(teacher).eval()
        units = student.units()
        keep = torch.rand(len(units), generator=torch.Generator().manual_seed(0)) >= 0.4
        models = {"teacher": teacher, "student": student, "sliced": slice_model(student, keep).to(device).eval()}
        macs = {which: count_macs(model, text_length=LENGTH)["total"] for which, model in models.items()}
        for count in batches:
            batch = teacher.example(count, LENGTH, device)
            seconds = {which: timed(model, batch, device, rounds) for which, model in models.items()}
            for which, value in seconds.items():
                row = {"case": f"{name}, {which}, batch {count}", "precision": "bf16"}
                yield row | {"what": "latency", "value": 1e3 * value, "unit": "ms"}
                yield row | {"what": "faster than the teacher", "value": seconds["teacher"] / value, "unit": "times"}
                yield row | {"what": "multiply-adds of the teacher's", "value": macs["teacher"] / macs[which], "unit": "times fewer"}


COLUMNS = ("part", "case", "precision", "what", "value", "unit", "bound", "holds", "note", "device", "torch", "size", "commit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--size", default="base", choices=("base", "tiny"), help="of the networks of steps and latency")
    parser.add_argument("--seconds", type=float, default=480, help="after which no further row is begun")
    parser.add_argument("--out", type=Path, help="the CSV; by default that of the device among the results")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps and passes")
    parser.add_argument("--most", type=int, default=1024, help="images in a batch that are tried at most")
    asked = parser.parse_args()
    began = time.monotonic()

    def left() -> float:
        return asked.seconds - (time.monotonic() - began)

    device = pick_device(asked.device)
    for library in (torch.backends.cuda.matmul, torch.backends.cudnn):
        library.allow_tf32 = False
    machine = machine_of(device)
    target = asked.out or ROOT / csv_of("gpu", str(machine["name"]))
    same = {"device": f"{machine['device']}: {machine['name']}", "torch": machine["torch"], "commit": code()}
    batches = (1, 32) if asked.size == "base" else (1, 2)
    parts = {
        "agreement": (agreement(device), "tiny"),
        "latency": (latency(device, asked.size, asked.rounds, batches, left), asked.size),
        "step": (steps(device, asked.size, asked.rounds, asked.most, left), asked.size),
    }
    rows: list[dict[str, Any]] = []
    for part, (found, size) in parts.items():
        for row in found:
            row = {"part": part, "size": size, **row, **same}
            rows.append({column: row.get(column) for column in COLUMNS})
            write_atomic(target, as_csv(rows))
            value = f"{row['value']:.5g} {row['unit']}" if "value" in row else ""
            print(f"{part}: {row['case']}, {row['precision']}: {row['what']} {value} {row.get('note', '')}".rstrip(), flush=True)
    wrong = [row for row in rows if row["holds"] == 0]
    print(f"{len(rows)} rows in {target}, {time.monotonic() - began:.0f} s; {len(wrong)} of them out of bounds", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
