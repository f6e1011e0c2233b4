"""The one training loop: steps that are pure functions of (seed, step), a metrics line, a resumable state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from efficientvlm.checkpoints.folder import Output
from efficientvlm.data.batch import on_device
from efficientvlm.data.draw import seed_of
from efficientvlm.errors import Diverged, Interrupted
from efficientvlm.families.weights import finite
from efficientvlm.runtime import ranks
from efficientvlm.runtime.hardware import autocast, pick_device
from efficientvlm.runtime.interrupt import stop_flag
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.common import Train
from efficientvlm.training.conditions import changes, conditions, described
from efficientvlm.training.feed import Feed
from efficientvlm.training.meter import Meter
from efficientvlm.training.state import Spent, append, cut_metrics, restore, save, tensors_of

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainable(nn.Module):
    """What the loop minimises: a module from a batch and the number of a step to its losses, `loss` being the one that counts."""

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Scalar losses by name."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """What follows the update of step number `step`; a resumed run does not call it again."""

    def describe(self, step: int) -> dict[str, float]:
        """More values for the metrics line of a step."""
        return {}


Batch = dict[str, Any]
DIVERGED = "training diverged", "try a smaller --lr"


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
    from accelerate import Accelerator  # here: stages that train nothing import this file too
    from accelerate.utils import DistributedDataParallelKwargs

    ranks.start()
    chosen = pick_device(device)
    settings = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=chosen.type == "cpu", kwargs_handlers=[settings])


def adamw(
    parameters: Iterable[nn.Parameter], options: Train, *, fast: Iterable[nn.Parameter] = (), biases: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """AdamW (0.9, `beta2`) without weight decay on norms and other vectors, nor on `biases`, which may be tables of them.

    Those in `fast` learn `new_lr_mult` times faster.
    """
    new, spared = {id(parameter) for parameter in fast}, {id(parameter) for parameter in biases}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in spared
            groups.setdefault((decays, id(parameter) in new), []).append(parameter)
    settings = [
        {
            "params": members,
            "lr": options.lr * (options.new_lr_mult if is_new else 1),
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (decays, is_new), members in groups.items()
    ]
    return Optimizer(torch.optim.AdamW(settings, betas=(0.9, options.beta2), eps=1e-8, fused=True))


def rate(step: int, steps: int, options: Train) -> float:
    """Learning-rate factor at `step` of `steps`: linear warm-up, then the schedule's decay (epochs count from the start)."""
    warm = max(1, round(options.warmup * steps)) if options.warmup else 0
    warm = warm if options.warmup_steps is None else options.warmup_steps
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if options.schedule == "exponential":
        return float(options.decay ** int(step * options.epochs / steps))
    left = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[options.schedule]
    return options.lr_end + (1 - options.lr_end) * left


def train(
    objective: Trainable,
    feed: Feed,
    optimizers: Sequence[Optimizer],
    *,
    steps: int,
    options: Any,
    output: Output,
    hardware: Accelerator,
    title: str,
    quiet: bool = False,
    before_save: Callable[[], None] = lambda: None,
) -> Spent:
    """Minimise `objective(batch, step)["loss"]` for `steps` steps, from the saved state if `output` holds one.

    `feed` gives the batches of a step; each is one optimizer update. Dropout is seeded by (seed, step, batch, process), so a resumed
    run equals an uninterrupted one bit for bit on the CPU. Over several processes the losses are means over all of them, and so are the
    gradients; the main process writes. `before_save` runs on every process before a state is saved.

    Raises:
        Interrupted: stopped by a signal after the state was written.
        Diverged: a loss, gradient or weight that is not finite; the last good state stays.
    """
    objective.to(hardware.device)
    torches = [optimizer.torch for optimizer in optimizers]
    spent = restore(output.state_dir, objective, torches, steps)
    begun, before = spent.steps, spent.seconds
    spent.begun = begun
    now = conditions(options, output.stage, hardware.device) | {"workers": feed.workers}
    changed = changes(spent.conditions, now, output.stage, begun, steps)
    spent.conditions, spent.changes = now, spent.changes + [change.model_dump() for change in changed]
    sharded = sharding_of(options)
    if sharded:
        sharded.shard(objective, torches, hardware.device)
    module = objective if sharded else hardware.prepare_model(objective)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.forward_sync_buffers = False  # all processes change buffers alike
    clip_gradients = sharded.clip_gradients if sharded else nn.utils.clip_grad_norm_
    objective.train()
    ranks.on_main(lambda: cut_metrics(output.metrics, begun))
    if begun:
        say("\n  ".join([f"{title}: resuming at step {begun} of {steps}", *map(described, changed)]), quiet=quiet)
    meter = Meter(spent.open_line, hardware.device)
    started = time.monotonic()
    if feed.workers and begun < steps:
        say(f"{title}: pictures are read by {feed.workers} process{'es' * (feed.workers > 1)} beside this one (workers)", quiet=quiet)
    with stop_flag() as flag, feed.begun(begun, steps), Bar(title, steps, start=begun, quiet=quiet) as bar:
        for step in range(begun, steps):
            logged = (step + 1) % options.log_every == 0 or step + 1 == steps
            meter.watch(logged)
            with meter.time("data"):
                batches = feed(step)
            factor = rate(step, steps, options)
            for number, batch in enumerate(batches):
                torch.manual_seed(seed_of(options.seed, step, number, hardware.process_index, "dropout"))
                with meter.time("student"), autocast(hardware.device, options.precision):
                    losses = module(on_device(batch, hardware.device), step)
                values = averages(losses)
                check_finite(values["loss"], "loss", step)
                with meter.time("student"):
                    hardware.backward(losses["loss"])
                    if sharded:
                        sharded.average_scalars(objective)
                with meter.time("optimizer"):
                    update(optimizers, factor, options.clip, step, clip_gradients)
                samples = batch["samples"] * hardware.num_processes
                spent.samples += samples
                meter.add(values, samples, "" if number == len(batches) - 1 else "region_")
            objective.after_step(step)
            done = spent.steps = step + 1
            spent.seconds = before + time.monotonic() - started
            shown, speed = meter.means(), {"samples_per_s": meter.rate()}
            if logged:
                spent.last, speed = meter.line(objective.describe(step))
                line = {"step": done, "lr_factor": round(factor, 6), **spent.last, **speed}
                ranks.on_main(lambda line=line: append(output.metrics, line))  # type: ignore[misc]
                shown = spent.last
            note = " ".join(f"{name} {value:.3f}" for name, value in shown.items()) + f" · {speed['samples_per_s']:.0f} images/s"
            bar.update(done, note)
            stop = ranks.any_of(flag.requested)
            if stop or done == steps or done % options.save_every == 0:
                before_save()
                spent.open_line = meter.totals
                tensors = tensors_of(objective, torches)
                ranks.on_main(lambda tensors=tensors: keep(output, tensors, spent))  # type: ignore[misc]
            if stop:
                raise Interrupted(
                    f"stopped at step {done} of {steps}", f"a resumable state is in {output.path}", "run the same command again"
                )
    if sharded:
        sharded.gather(objective)
    if ranks.any_of(flag.requested):  # while the last state was written
        raise Interrupted(f"stopped after step {steps} of {steps}", f"a resumable state is in {output.path}", "run the same command again")
    return spent


def averages(losses: dict[str, Tensor]) -> dict[str, float]:
    """The means of scalar losses over the processes."""
    return dict(zip(losses, ranks.averaged(torch.stack([value.detach().float() for value in losses.values()])).tolist(), strict=True))


def check_finite(number: float, what: str, step: int) -> None:
    """:class:`Diverged` if `number` is NaN or infinite."""
    if not math.isfinite(number):
        raise Diverged(f"the {what} is {number} at step {step}", *DIVERGED)


def keep(output: Output, tensors: Mapping[str, Tensor], spent: Spent) -> None:
    """Save a state; :class:`Diverged` if a weight, or what an optimizer keeps, is NaN or infinite: the state before is worth more."""
    for name, value in tensors.items():
        if value.is_floating_point() and not finite(value):
            raise Diverged(f"{name.partition('/')[2]} holds NaN or infinite values at step {spent.steps - 1}", *DIVERGED)
    save(output.state_dir, tensors, spent)


def sharding_of(options: Any) -> Any:
    """The module that spreads a run over its processes, if that is asked for."""
    if options.parallel != "fsdp" or ranks.world() == 1:
        return None
    from efficientvlm.training import sharding  # FSDP takes half a second to import

    return sharding


def update(
    optimizers: Sequence[Optimizer],
    factor: float,
    clip: float | None,
    step: int,
    clip_gradients: Callable[[list[nn.Parameter], float], Any] = nn.utils.clip_grad_norm_,
) -> None:
    """One step of every optimizer: gradients clipped to norm `clip`, learning rates times `factor` where scheduled.

    `clip_gradients` takes parameters and the norm allowed, and returns the norm there was.

    Raises:
        Diverged: a gradient that is not finite; no weight has changed then.
    """
    for optimizer in optimizers:
        for group, base in zip(optimizer.torch.param_groups, optimizer.base, strict=True):
            group["lr"] = base * factor if optimizer.scheduled else base
        limit = clip if clip and optimizer.clipped else math.inf
        norm = clip_gradients([p for group in optimizer.torch.param_groups for p in group["params"]], limit)
        check_finite(float(norm), "gradient norm", step)
    for optimizer in optimizers:
        optimizer.torch.step()
    for optimizer in optimizers:
        optimizer.torch.zero_grad(set_to_none=True)
