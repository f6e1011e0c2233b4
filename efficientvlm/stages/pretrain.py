"""pretrain and distill: X-VLM's losses on image-text pairs, without or with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from efficientvlm import ranks
from efficientvlm.control import Control
from efficientvlm.data.draw import generator
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch, region_batch
from efficientvlm.data.opening import drawn, open_data, usable
from efficientvlm.data.plan import Plan, plan_for
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.manifest import Manifest
from efficientvlm.objectives.efficientvlm import distilled
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.progress import counted, say, telling
from efficientvlm.settings.stages import Distill
from efficientvlm.settings.tasks import PretrainingSettings
from efficientvlm.stages.common import (
    Loaded,
    augmentation,
    data_inputs,
    finished,
    gather_skipped,
    keep_length,
    keep_skipped,
    learning,
    load,
    making,
    open_output,
    pair_problems,
    settings_of,
    texts_of,
    validated,
    which,
    write,
)
from efficientvlm.stages.reading import Reading, all_read, of_texts, titled
from efficientvlm.stages.teaching import doubt
from efficientvlm.training import Batch, accelerator, train

VALIDATION_BATCHES = 16


def run(config: PretrainingSettings, control: Control) -> Manifest:
    """Train `config.model` on image-text pairs; a :class:`Distill` configuration adds the teacher."""
    stage = "distill" if isinstance(config, Distill) else "pretrain"
    with telling(f"loading {config.model}", quiet=control.quiet):
        student = load(config.model)
    for problem in student_problems(config, student):
        raise problem
    keep_length(student, config.max_tokens)
    with telling(f"opening the data {config.data}", quiet=control.quiet):
        sources = {split: open_split(config, split, student.preprocessing) for split in ("train", "val")}
    inputs = {"model": config.model, "teacher": getattr(config, "teacher", None), **data_inputs(config, sources)}
    output = open_output(config, stage, control, inputs)
    if output.up_to_date:
        return finished(output)
    with making(output):
        hardware = accelerator(config.device)
        torch.manual_seed(config.seed)
        texts = texts_of(student)
        teacher = None
        if isinstance(config, Distill):
            with telling(f"loading {config.teacher}", quiet=control.quiet):
                teacher = load(config.teacher)
            for problem in teacher_problems(config, student, teacher):
                raise problem
            doubt(stage, teacher.manifest, student.manifest, None, control.quiet)
            teacher.model.to(hardware.device)
        hard, objective = objectives(config, student, teacher)
        plan = plan_for(sources["train"], config.batch_size, config.seed, ranks.world(), ranks.rank())
        steps = config.max_steps or max(1, round(config.epochs * plan.batches_per_epoch))
        keep_skipped(output, sources, control.quiet)
        reading = of_texts(texts, sources["train"]) if ranks.is_main() else Reading()
        for remark in titled(stage, reading):
            say(remark, quiet=control.quiet)
        with learning(config, output):
            spent = train(
                objective,
                feed_of(config, student, sources["train"], texts, plan),
                objective.optimizers(config, student.manifest.extra.get("new", [])),
                steps=steps,
                options=config,
                output=output,
                hardware=hardware,
                title=stage,
                quiet=control.quiet,
                before_save=lambda: gather_skipped(sources),
            )

        def finish() -> Manifest:
            val = validated(config, lambda: validate(hard, config, sources["val"], texts, control.quiet), control.quiet)
            metrics = {"train": spent.last, "val": val}
            extra = {"reading": all_read(stage, texts, reading, control.quiet)}
            common: dict[str, Any] = {"control": control, "spent": spent, "sources": sources, "metrics": metrics, "extra": extra}
            return write(output, student.family, student.model, student.tokenizer, image_processor=student.image_processor, **common)

        return ranks.on_main(finish, Manifest.model_validate)


def student_problems(config: PretrainingSettings, student: Loaded) -> Iterator[BadInput]:
    """Every reason why `student` cannot be pre-trained as `config` says."""
    if "pretraining" not in student.tasks:
        does = ", ".join(sorted(student.tasks)) or "nothing by itself"
        yield BadInput(
            f"{student.path} cannot be pre-trained", f"it is a {student.family.name} model for {does}", "use an X-VLM before its task"
        )
    elif missing := sorted(set(config.losses) - set(student.model.config.heads)):
        yield BadInput(
            f"{student.path} has no head for {', '.join(missing)}", "", f"leave it out: losses={sorted(student.model.config.heads)}"
        )
    for name in ("batch_size", "eval_batch_size"):
        if getattr(config, name) == 1 and "itm" in config.losses:
            yield BadInput(f"{name} 1", "matching needs another pair as negative", "use 2 or more")


def teacher_problems(config: Any, student: Loaded, teacher: Loaded) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot pre-train `student`."""
    yield from pair_problems(student, teacher)
    if missing := sorted(set(config.losses) - set(getattr(teacher.model.config, "heads", ()))):
        yield BadInput(f"teacher {teacher.path} has no head for {', '.join(missing)}", "", "use the task-agnostic teacher")


def objectives(config: Any, student: Loaded, teacher: Loaded | None) -> tuple[XvlmPretraining, Objective]:
    """The hard losses, and what is minimised: the same, or with `teacher` their mixture with L_KD. Towers in `freeze` are frozen."""
    freeze(student.model, config.freeze)
    hard = XvlmPretraining(student.family, student.model, losses=config.losses, seed=config.seed, hard_negatives=config.hard_negatives)
    if teacher is None:
        return hard, hard
    return hard, distilled(hard, teacher.model, config)


def freeze(model: nn.Module, towers: Sequence[str]) -> None:
    """Take the weights of `towers` out of training; the heads on them still learn.

    Contrast with a frozen vision tower is locked-image tuning (LiT, Zhai et al. 2022): where pretrained towers meet few pairs it learns
    faster, and a step goes back through the text tower alone.
    """
    for tower in towers:
        model.get_submodule(tower).requires_grad_(False)


def open_split(config: Any, split: str, image_size: Preprocessing | None) -> Any:
    """The image-text pairs of `split`, images prepared as `image_size` says."""
    return open_data(PAIRS, **which(config, split), **settings_of(config, "columns", "limit", "max_bad"), image_size=image_size)


def feed_of(config: PretrainingSettings, student: Loaded, source: Any, texts: Texts, plan: Plan) -> Callable[[int], Sequence[Batch]]:
    """Training batches by step."""
    masking = settings_of(config, "mask_probability", "max_masks")
    regions = config.region_probability if "box" in config.losses else 0.0
    grid = student.sizes.image_size // student.sizes.patch_size

    def feed(step: int) -> list[Batch]:
        items = ranks.together(lambda: [source[index] for index in plan.batch(step)])
        settings: dict[str, Any] = {"seed": config.seed, "step": step, **augmentation(config), **masking}
        batches = [pair_batch(items, texts, **settings)]
        described = [item for item in items if item.regions]
        if ranks.any_of(bool(described)) and generator(config.seed, step, "region step").random() < regions:
            some = described or items[:1]  # a process without regions takes part with a whole image
            batches.insert(0, region_batch(some, texts, **settings, regions_per_image=config.regions_per_image, patch_grid=grid))
        return batches

    return feed


@torch.inference_mode()
def validate(objective: XvlmPretraining, config: PretrainingSettings, source: Any, texts: Texts, quiet: bool = False) -> dict[str, Any]:
    """Mean losses, matching accuracy (1 of 3 pairs is positive) and masked-token accuracy on fixed validation batches, with progress.

    A batch of texts in which no token was masked says nothing of masked tokens; where all are so, these metrics are missing.
    """
    model = objective.model.eval()
    device = next(model.parameters()).device
    batch_size = config.eval_batch_size or config.batch_size
    source = drawn(source, config.eval_limit or VALIDATION_BATCHES * config.batch_size)
    count = len(source)
    found: dict[str, list[float]] = {}
    images = 0
    if not count:
        return {"images": 0}
    size = min(batch_size, count)
    for start in counted(range(0, count - size + 1, size), "validate", count, quiet):
        items = usable(source, range(start, start + size))
        if len(items) < min(2, size):
            continue  # matching needs another pair
        images += len(items)
        batch = pair_batch(items, texts, seed=0, step=start, augment_kind="none", **settings_of(config, "mask_probability", "max_masks"))
        losses, record, _ = objective.passes(
            model, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}, start
        )
        values = {name: float(value) for name, value in losses.items()}
        if "itm_logits" in record:
            matched = torch.arange(len(record["itm_logits"]), device=device) < len(items)
            values["itm_accuracy"] = float((record["itm_logits"].argmax(-1) == matched.long()).float().mean())
        if "mlm_logits" in record:
            labels = batch["masked_labels"].to(device)
            masked = labels != -100
            if masked.any():
                values["mlm_accuracy"] = float((record["mlm_logits"].argmax(-1) == labels)[masked].float().mean())
            else:
                del values["mlm"]
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {"images": images, **{name: sum(values) / len(values) for name, values in found.items()}}
