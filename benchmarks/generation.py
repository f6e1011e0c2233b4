"""How fast does a BLIP of full size write, beside the published way and beside transformers' own class?

python benchmarks/generation.py [--side 384] [--size base] [--rounds 3] [--case 8x3] [--publish]

BLIP's captioner with random weights describes random pictures in 16 tokens behind a prompt of 4, none of which may end before, so that all
ways write the same tokens, which is checked. The ways take turns in one process with one thread:

- `ours`: keys and values of a picture are projected once for all tokens and beams, and read where they lie;
- `published`: the code that BLIP came with, in whose decoder they are projected again at every token and for every beam, and which begins
  with as many copies of the prompt as there are beams; everything else is as in `ours`, the kernels of attention included;
- `ours, plain attention`: as `ours`, attention as products and a softmax, which is how transformers' class has it;
- `transformers`: `generate` of its class on the same tensors; it projects once for every beam and moves the keys and values with the beams.

Seconds are of the processor, as other work on the machine slows the clock on the wall more; a speed-up is the median of ratios within a
round. Rows are written as soon as a case is measured, and those that are there stay.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from published import ROOT, as_csv, code, csv_of, published_rows, rows_of, with_block
from torch import Tensor

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.checkpoints.manifest import now
from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import BlipCaptionConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.families.towers import attention
from efficientvlm.families.towers.decoding import Rules, beam, continued, stepping
from efficientvlm.runtime.hardware import processor
from efficientvlm.script import run_script
from efficientvlm.stages.latency import no_garbage_collection

PAGE = "docs/pipeline.md"
NEW, PROMPT, VOCABULARY, END = 16, (7, 11, 13), 30524, 102
CASES = {"8x3": (8, 3), "1x3": (1, 3), "1x1": (1, 1)}
TARGETS = {("8x3", "published"): 4.0, ("1x3", "published"): 2.3, ("1x1", "published"): 1.7}
TARGETS |= {(case, "transformers"): 1.0 for case in CASES}
"""How many times as fast as each way `ours` should be at least."""
WAYS = ("ours", "published", "ours, plain attention", "transformers")
MIB = 2**20

T = TypeVar("T")


class Way(NamedTuple):
    """Pixels to image states, and these to the tokens written [B, 16]."""

    see: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


class Spent(NamedTuple):
    """Seconds of the processor and on the wall, in all and without the vision tower."""

    cpu: float
    wall: float
    writing_cpu: float
    writing_wall: float


def network(size: str, side: int) -> tuple[Any, Any]:
    """BLIP's captioner with random weights, and transformers' class around the same tensors."""
    settings = {"dropout": 0.0, "image_size": side} if side else {"dropout": 0.0}
    values = fresh_config(size, settings, VOCABULARY).to_dict()
    values["text_config"] |= {"sep_token_id": END, "eos_token_id": END, "pad_token_id": 0}
    config = BlipCaptionConfig.from_dict({**values, "question_start_id": None})
    torch.manual_seed(0)
    ours: Any = MODELS[BlipCaptionConfig](config).eval()
    with torch.device("meta"):
        stock = transformers.BlipForConditionalGeneration(transformers.BlipConfig.from_dict({**config.to_dict(), "model_type": "blip"}))
    stock.load_state_dict(ours.state_dict(), assign=True)
    for name, buffer in list(stock.named_buffers()):
        if buffer.is_meta:  # positions, which no file holds
            owner = stock.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)
    return ours, stock.eval()


def ways(ours: Any, stock: Any, beams: int) -> dict[str, Way]:
    start = ours.config.decoder_start
    rules = Rules(END, END, NEW, least=NEW)

    def see(pixels: Tensor) -> Tensor:
        states: Tensor = ours.encode_image(pixels).states
        return states

    def searched(step: Any, images: int) -> Tensor:
        given = torch.tensor([[start, *PROMPT]]).expand(images, -1)
        return beam(step, given, rules, beams, length_rule="generated").ids[:, 0] if beams > 1 else continued(step, given, rules)

    def once(states: Tensor) -> Tensor:
        return searched(stepping(ours, ours.attended(states)), len(states))

    def again(states: Tensor) -> Tensor:
        return searched(published(ours, states, beams), len(states))

    def plain(states: Tensor) -> Tensor:
        with products():
            return once(states)

    def seen_plainly(pixels: Tensor) -> Tensor:
        with products():
            return see(pixels)

    def theirs(states: Tensor) -> Tensor:
        ids = torch.tensor([[start, *PROMPT]]).expand(len(states), -1)
        lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": beams, "do_sample": False}
        written: Tensor = stock.text_decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=END,
            pad_token_id=0,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
            **lengths,
        )
        return written[:, ids.shape[1] :]

    def seen_by_them(pixels: Tensor) -> Tensor:
        states: Tensor = stock.vision_model(pixel_values=pixels)[0]
        return states

    found = (Way(see, once), Way(see, again), Way(seen_plainly, plain), Way(seen_by_them, theirs))
    return dict(zip(WAYS, found, strict=True))


def published(model: Any, states: Tensor, beams: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Steps as :func:`stepping` has them, of a decoder that projects the picture of every row anew at every token."""
    cache, seen = model.new_cache(), states.repeat_interleave(beams, 0)

    def step(ids: Tensor, goes_on: Tensor | None) -> Tensor:
        nonlocal cache
        first = not cache.length
        if first:
            ids = ids.repeat_interleave(beams, 0)
        elif goes_on is not None:
            begun = len(goes_on) == cache.kv[0][0].shape[0] and goes_on.max() * beams < len(goes_on)  # the first step had a row an image
            cache = cache.select(goes_on * beams if begun and beams > 1 else goes_on)
        logits: Tensor = model.decode(model.attended(seen), ids, None, None, cache)
        return logits[::beams] if first else logits

    return step


@contextmanager
def products() -> Iterator[None]:
    """Inside the block attention is products and a softmax."""
    fused = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, maps: Any = None) -> Tensor:
        return fused(q, k, v, mask, dropout, [])

    attention.attend = attend
    try:
        yield
    finally:
        attention.attend = fused


def timed(way: Way, pixels: Tensor) -> tuple[Spent, Tensor]:
    clocks = time.process_time, time.perf_counter
    began = [clock() for clock in clocks]
    states = way.see(pixels)
    between = [clock() for clock in clocks]
    ids = way.write(states)
    ended = [clock() for clock in clocks]
    (cpu, wall), (writing_cpu, writing_wall) = ([end - start for end, start in zip(ended, at, strict=True)] for at in (began, between))
    return Spent(cpu, wall, writing_cpu, writing_wall), ids


def held(run: Callable[[], T]) -> tuple[float | None, T]:
    """MiB that `run` needs at most beside what was there, None where the system does not tell; and what it returns."""
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _field(status, "VmRSS")
    except (OSError, AttributeError):
        return None, run()
    made = run()
    return (_field(status, "VmHWM") - before) / 1024, made


def _field(status: Path, name: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:")).split()[1])


def measure(ours: Any, stock: Any, case: str, rounds: int) -> list[dict[str, Any]]:
    """A row a way; :class:`BadInput` where one writes something else than the others."""
    images, beams = CASES[case]
    side = ours.config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    every = ways(ours, stock, beams)
    spent: dict[str, list[Spent]] = {name: [] for name in every}
    memory: dict[str, float | None] = {}
    written: dict[str, Tensor] = {}
    load = os.getloadavg()[0]
    with torch.inference_mode(), no_garbage_collection():
        for number in range(rounds):
            names = list(every)[number % len(every) :] + list(every)[: number % len(every)]
            for name in names:
                peak, (seconds, written[name]) = held(partial(timed, every[name], pixels))
                memory[name] = max(filter(None, (memory.get(name), peak)), default=None)
                spent[name].append(seconds)
        for name, ids in written.items():
            if not torch.equal(ids, written[WAYS[0]]):
                raise BadInput(f"{name} writes something else than {WAYS[0]}", f"case {case}", "mend the script or the package")
    return [row(case, name, spent, memory[name], ours, load) for name in every]


def row(case: str, name: str, spent: dict[str, list[Spent]], memory: float | None, model: Any, load: float) -> dict[str, Any]:
    images, beams = CASES[case]
    own, mine = spent[name], spent[WAYS[0]]
    cpu, wall, writing_cpu, writing_wall = (statistics.median(part) for part in zip(*own, strict=True))
    slower = [(theirs.cpu / ours.cpu, theirs.writing_cpu / ours.writing_cpu) for theirs, ours in zip(own, mine, strict=True)]
    whole, writing = (statistics.median(part) for part in zip(*slower, strict=True))
    target = TARGETS.get((case, name))
    return {
        "case": case,
        "way": name,
        "images": images,
        "beams": beams,
        "new_tokens": NEW,
        "image_size": model.config.vision_config.image_size,
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "writing_cpu_seconds": writing_cpu,
        "writing_wall_seconds": writing_wall,
        "tokens_per_cpu_second": images * NEW / cpu,
        "peak_mib": memory,
        "ours_is_faster": whole,
        "ours_writes_faster": writing,
        "target": target,
        "reached": None if target is None else int(whole >= target),
        "rounds": len(own),
        "threads": torch.get_num_threads(),
        "load": load,
        "processor": processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": code(),
        "date": now()[:10],
    }


def publish(root: Path = ROOT) -> list[Path]:
    """Write the block of the page below `root` from the CSV there; the files written.

    Raises:
        BadInput: no CSV or more than one, or a page without the two markers.
    """
    rows, name = published_rows(root, "generation")
    page = root / PAGE
    text = table(rows, name)
    write_atomic(page, with_block(page.read_text("utf-8"), "generation", text).encode())
    return [page]


def table(rows: Sequence[dict[str, str]], name: Path) -> str:
    """Every case as a line of a table in Markdown."""
    lines = ["| pictures × beams | " + " | ".join(WAYS) + " |", "| --- |" + " --- |" * len(WAYS)]
    for case in CASES:
        own = {row["way"]: row for row in rows if row["case"] == case}
        if own:
            lines.append(f"| {case.replace('x', ' × ')} | " + " | ".join(cell(own[way]) for way in WAYS) + " |")
    last = rows[-1]
    where = f"{last['processor']}, one thread, torch {last['torch']}, transformers {last['transformers']}, on {last['date']}"
    said = f"Processor time of the vision tower and {last['new_tokens']} tokens at {last['image_size']} px, how many times as long as"
    said += f" `ours` that is (in brackets: without the vision tower), tokens a second, and peak memory beside the weights; {where}."
    return "\n".join([*lines, "", f"{said} All figures: [{name.name}](../{name.as_posix()})."])


def cell(row: dict[str, str]) -> str:
    times = "" if row["way"] == WAYS[0] else f", {float(row['ours_is_faster']):.2f}× ({float(row['ours_writes_faster']):.2f}×)"
    memory = f", {float(row['peak_mib']):,.0f} MiB" if row["peak_mib"] else ""
    return f"{float(row['cpu_seconds']):.2f} s{times}, {float(row['tokens_per_cpu_second']):.1f} tokens/s{memory}"


def run(path: Path, size: str, side: int, rounds: int, cases: Sequence[str]) -> list[Path]:
    """Measure the cases that are not in the CSV `path` yet; the files written."""
    torch.set_num_threads(1)
    there: list[dict[str, Any]] = [*rows_of(path)]
    missing = [case for case in cases if not any(old["case"] == case for old in there)]
    if missing:
        ours, stock = network(size, side)
        for case in missing:
            there += measure(ours, stock, case, rounds if CASES[case][0] == 1 else max(1, rounds // 3))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, as_csv(there))
            for new in there[-len(WAYS) :]:
                print(f"{case} {new['way']}: {new['cpu_seconds']:.2f} s, {new['ours_is_faster']:.2f}x", flush=True)
    return [path]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / csv_of("generation", processor()), help="the CSV")
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="base")
    parser.add_argument("--side", type=int, default=384, help="side of the pictures in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="a third of them where there are several pictures")
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="pictures x beams; it may be given twice")
    parser.add_argument("--publish", action="store_true", help="write the table of the page from the CSV only")
    options = parser.parse_args()
    given = (options.out, options.size, options.side, options.rounds, options.case or tuple(CASES))
    return run_script(lambda: publish() if options.publish else run(*given))


if __name__ == "__main__":
    raise SystemExit(main())
