"""The one training loop: steps that are pure functions of (seed, step), a metrics line, a resumable state."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from efficientvlm.checkpoint import Output
from efficientvlm.config import Train
from efficientvlm.data.draw import seed_of
from efficientvlm.errors import BadInput, EvlmError, Interrupted
from efficientvlm.files import fsync_dir, write_atomic
from efficientvlm.hardware import autocast, pick_device
from efficientvlm.interrupt import stop_flag
from efficientvlm.progress import Bar, say
from efficientvlm.stopwatch import TEACHER

Batch = dict[str, Any]


@dataclass
class Optimizer:
    """One torch optimizer; `scheduled` ones follow the learning-rate schedule, the others keep their own rate."""

    torch: torch.optim.Optimizer
    scheduled: bool = True
    clipped: bool = True
    base: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.base = [group["lr"] for group in self.torch.param_groups]


def accelerator(device: str) -> Accelerator:
    """Device and process group for this run (`torchrun` sets the group).

    Raises:
        BadInput: `device` is not there.
    """
    chosen = pick_device(device)
    return Accelerator(cpu=chosen.type == "cpu", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])


def adamw(module: nn.Module, options: Train, *, new: Iterable[str] = (), skip: Iterable[str] = ()) -> Optimizer:
    """AdamW (0.9, 0.98) without weight decay on biases, norms and other vectors; tensors of the
    model named in `new` learn `new_lr_mult` times faster.

    `skip` are name prefixes left out (gates and multipliers have optimizers of their own).
    """
    fresh, left_out = set(new), tuple(skip)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not name.startswith(left_out):
            groups.setdefault((parameter.ndim > 1, name.rpartition("model.")[2] in fresh), []).append(parameter)
    settings = [
        {
            "params": members,
            "lr": options.lr * (options.new_lr_mult if is_new else 1),
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (decays, is_new), members in groups.items()
    ]
    return Optimizer(torch.optim.AdamW(settings, betas=(0.9, 0.98), eps=1e-8, fused=True))


def rate(step: int, steps: int, options: Train) -> float:
    """Learning-rate factor at `step` of `steps`: linear warm-up, then the schedule's decay to 0."""
    warm = max(1, round(options.warmup * steps)) if options.warmup else 0
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[options.schedule]


@dataclass
class Spent:
    """What a training run took, interruptions included; `open_line` sums the metrics line that is not written yet."""

    seconds: float = 0.0
    samples: int = 0
    steps: int = 0
    last: dict[str, float] = field(default_factory=dict)
    open_line: dict[str, float] = field(default_factory=dict)


def train(
    objective: nn.Module,
    feed: Callable[[int], Sequence[Batch]],
    optimizers: Sequence[Optimizer],
    *,
    steps: int,
    options: Any,
    output: Output,
    hardware: Accelerator,
    title: str,
    quiet: bool = False,
    after_step: Callable[[int], None] = lambda step: None,
    describe: Callable[[int], dict[str, float]] = lambda step: {},
) -> Spent:
    """Minimise `objective(batch, step)["loss"]` for `steps` steps, from the saved state if `output` holds one.

    `feed(step)` gives the batches of a step; each is one optimizer update. Dropout is seeded by (seed, step, batch), so a resumed run
    equals an uninterrupted one bit for bit on the CPU. `after_step` runs after every step and `describe` adds values to the metrics line.

    Raises:
        Interrupted: stopped by a signal after the state was written.
        EvlmError: a loss that is not finite.
    """
    objective.to(hardware.device)
    spent = restore(output.state_dir, objective, optimizers)
    begun, before = spent.steps, spent.seconds
    module = hardware.prepare_model(objective)
    objective.train()
    cut_metrics(output.metrics, begun)
    if begun:
        say(f"{title}: resuming at step {begun} of {steps}", quiet=quiet)
    meter, note = Meter(spent.open_line), ""
    started = time.monotonic()
    with stop_flag() as flag, Bar(title, steps, start=begun, quiet=quiet or not hardware.is_main_process) as bar:
        for step in range(begun, steps):
            with meter.time("data"):
                batches = feed(step)
            factor = rate(step, steps, options)
            for number, batch in enumerate(batches):
                torch.manual_seed(seed_of(options.seed, step, number, hardware.process_index, "dropout"))
                with meter.time("student"), autocast(hardware.device, options.precision):
                    losses = module({name: _to(value, hardware.device) for name, value in batch.items()}, step)
                check_finite(losses["loss"], "loss", step)
                with meter.time("student"):
                    hardware.backward(losses["loss"])
                with meter.time("optimizer"):
                    update(optimizers, factor, options.clip, step)
                images = len(batch["pixels"]) * hardware.num_processes
                spent.samples += images
                meter.add(losses, images, "" if number == 0 else "region_")
            after_step(step)
            done = spent.steps = step + 1
            spent.seconds = before + time.monotonic() - started
            if done % options.log_every == 0 or done == steps:
                spent.last, speed = meter.line(describe(step))
                note = " ".join(f"{name} {value:.3f}" for name, value in spent.last.items()) + f" · {speed['samples_per_s']:.0f} images/s"
                if hardware.is_main_process:
                    append(output.metrics, {"step": done, "lr_factor": round(factor, 6), **spent.last, **speed})
            bar.update(done, note)
            stop = _any(flag.requested, hardware)
            if stop or done == steps or done % options.save_every == 0:
                spent.open_line = meter.totals
                if hardware.is_main_process:
                    save(output.state_dir, objective, optimizers, spent)
                hardware.wait_for_everyone()
            if stop:
                raise Interrupted(
                    f"stopped at step {done} of {steps}", f"a resumable state is in {output.path}", "run the same command again"
                )
    if flag.requested:  # while the last state was written
        raise Interrupted(f"stopped after step {steps} of {steps}", f"a resumable state is in {output.path}", "run the same command again")
    return spent


class Meter:
    """Means of the losses, samples a second and milliseconds by phase between two metrics lines."""

    def __init__(self, totals: dict[str, float]) -> None:
        self.totals = totals
        TEACHER.take()
        self._restart()

    def _restart(self) -> None:
        self.clock = {"data": 0.0, "teacher": 0.0, "student": 0.0, "optimizer": 0.0}
        self.images = self.batches = 0
        self.since = time.monotonic()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Book the block on `phase`, less what the teacher took inside it."""
        began = time.perf_counter()
        yield
        teacher = TEACHER.take()
        self.clock[phase] += time.perf_counter() - began - teacher
        self.clock["teacher"] += teacher

    def add(self, losses: dict[str, Tensor], images: int, prefix: str) -> None:
        """One batch's losses; `prefix` tells the kinds of batches apart."""
        self.images, self.batches = self.images + images, self.batches + 1
        for name, value in losses.items():
            for key, amount in ((prefix + name, float(value.detach())), (f"n:{prefix}{name}", 1)):
                self.totals[key] = self.totals.get(key, 0.0) + amount

    def line(self, more: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """(mean losses and `more`, speed), and start again."""
        means = {name: value / self.totals[f"n:{name}"] for name, value in self.totals.items() if not name.startswith("n:")}
        speed = {"samples_per_s": round(self.images / max(1e-9, time.monotonic() - self.since), 1)}
        speed |= {f"{name}_ms": round(1000 * value / max(1, self.batches), 2) for name, value in self.clock.items()}
        self.totals = {}
        self._restart()
        return means | more, speed


def check_finite(value: Tensor, what: str, step: int) -> None:
    """:class:`EvlmError` if `value` is NaN or infinite."""
    number = float(value.detach())
    if not math.isfinite(number):
        raise EvlmError(f"the {what} is {number} at step {step}", "training diverged", "try a smaller --lr, with --force")


def update(optimizers: Sequence[Optimizer], factor: float, clip: float | None, step: int) -> None:
    """One step of every optimizer: gradients clipped to norm `clip`, learning rates times `factor` where scheduled.

    Raises:
        EvlmError: a gradient that is not finite; no weight has changed then.
    """
    for optimizer in optimizers:
        for group, base in zip(optimizer.torch.param_groups, optimizer.base, strict=True):
            group["lr"] = base * factor if optimizer.scheduled else base
        limit = clip if clip and optimizer.clipped else math.inf
        norm = nn.utils.clip_grad_norm_([p for group in optimizer.torch.param_groups for p in group["params"]], limit)
        check_finite(norm, "gradient norm", step)
    for optimizer in optimizers:
        optimizer.torch.step()
    for optimizer in optimizers:
        optimizer.torch.zero_grad(set_to_none=True)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def save(folder: Path, objective: nn.Module, optimizers: Sequence[Optimizer], spent: Spent) -> None:
    """Write the state of a step as `step-N/` (tensors, then `state.json`), then drop the older ones."""
    target = folder / f"step-{spent.steps:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"module/{name}": value.detach().cpu().contiguous() for name, value in objective.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.torch.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{name}": torch.as_tensor(value).cpu() for name, value in entries.items()}
    save_file(tensors, temporary / "state.safetensors")
    with (temporary / "state.safetensors").open("rb+") as file:
        os.fsync(file.fileno())
    content = {"step": spent.steps, "seconds": spent.seconds, "samples": spent.samples, "last": spent.last, "open_line": spent.open_line}
    write_atomic(temporary / "state.json", json.dumps(content).encode())
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    fsync_dir(folder)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path, objective: nn.Module, optimizers: Sequence[Optimizer]) -> Spent:
    """Load the newest complete state of `folder` into `objective` and `optimizers`; a fresh :class:`Spent` if there is none.

    Raises:
        BadInput: a state that does not fit this model.
    """
    states = sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
    if not states:
        return Spent()
    try:
        content = json.loads((states[-1] / "state.json").read_text("utf-8"))
        tensors = load_file(states[-1] / "state.safetensors")
        objective.load_state_dict({name.removeprefix("module/"): value for name, value in tensors.items() if name.startswith("module/")})
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer/{number}/"):
                    _, _, index, entry = name.split("/")
                    state.setdefault(int(index), {})[entry] = value
            optimizer.torch.load_state_dict({"state": state, "param_groups": optimizer.torch.state_dict()["param_groups"]})
        return Spent(content["seconds"], content["samples"], content["step"], content["last"], content["open_line"])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"cannot resume from {states[-1]}", str(error).splitlines()[0], "use --no-resume to start again") from error


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of `path` beyond `step`, which the resumed run writes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # a line cut short by a crash
    write_atomic(path, "".join(kept).encode())


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _any(flag: bool, hardware: Accelerator) -> bool:
    if hardware.num_processes == 1:
        return flag
    return bool(hardware.reduce(torch.tensor(float(flag), device=hardware.device)).item())
