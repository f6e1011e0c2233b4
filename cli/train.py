"""Commands that train: pretrain, distill, prune, finetune."""

from __future__ import annotations

from typing import Annotated

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli.launch import stage

UNITS = "What is removed"


def pretrain(
    model: o.Model = None,
    data: o.DataSpec = None,
    out: o.Out = None,
    column: o.Columns = None,
    val: o.Val = None,
    limit: o.Limit = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    seed: o.Seed = None,
    device: o.Device = None,
    precision: o.Precision = None,
    assignments: o.Set = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train on images and their texts (ITC, ITM, MLM, boxes)."""
    stage("pretrain", locals())


def distill(
    model: o.Model = None,
    teacher: o.Teacher = None,
    data: o.DataSpec = None,
    out: o.Out = None,
    column: o.Columns = None,
    val: o.Val = None,
    limit: o.Limit = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    kd: o.Kd = None,
    temperature: o.Temperature = None,
    cache_teacher: o.CacheTeacher = None,
    seed: o.Seed = None,
    device: o.Device = None,
    precision: o.Precision = None,
    assignments: o.Set = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Pre-train a student with its teacher beside it (hidden states, attention maps, logits)."""
    stage("distill", locals())


def prune(
    model: o.Model = None,
    teacher: o.Teacher = None,
    data: o.DataSpec = None,
    out: o.Out = None,
    task: o.Task = None,
    column: o.Columns = None,
    val: o.Val = None,
    limit: o.Limit = None,
    answers: o.Answers = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Part of the prunable weights to remove, 0 to 1.", rich_help_panel=UNITS)
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="l0, magnitude, taylor or random.", rich_help_panel=UNITS)] = None,
    from_gates: Annotated[
        str | None,
        typer.Option("--from-gates", help="Cut this prune output again, without training.", metavar="DIR", rich_help_panel=UNITS),
    ] = None,
    min_heads: Annotated[int | None, typer.Option("--min-heads", help="Heads every layer keeps.", rich_help_panel=UNITS)] = None,
    min_neurons: Annotated[int | None, typer.Option("--min-neurons", help="Neurons every layer keeps.", rich_help_panel=UNITS)] = None,
    round_to: Annotated[int | None, typer.Option("--round-to", help="Keep neurons in multiples of this.", rich_help_panel=UNITS)] = None,
    allow_blind: Annotated[
        bool | None,
        typer.Option("--allow-blind/--no-allow-blind", help="Let the last path of an input be cut as well.", rich_help_panel=UNITS),
    ] = None,
    keep_dense: Annotated[
        bool | None, typer.Option("--keep-dense/--no-keep-dense", help="Store the unsliced weights for later cuts.", rich_help_panel=UNITS)
    ] = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    kd: o.Kd = None,
    temperature: o.Temperature = None,
    cache_teacher: o.CacheTeacher = None,
    seed: o.Seed = None,
    device: o.Device = None,
    precision: o.Precision = None,
    assignments: o.Set = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Remove attention heads and neurons while the task is learnt; the result is really smaller.

    With --from-gates, --model, --task and --data default to those of that run. With --task none nothing is learnt and no data is needed.
    """
    values, assigned = locals(), [text.partition("=")[0] for text in assignments or []]
    for name, needless in (("model", from_gates), ("data", from_gates or task == "none" or "task" in assigned)):
        if not (values[name] or needless or {name, "from_gates"} & set(assigned)):
            raise typer.BadParameter("it is needed and was not given", param_hint=f"--{name}")
    stage("prune", values)


def finetune(
    model: o.Model = None,
    teacher: o.Teacher = None,
    data: o.DataSpec = None,
    out: o.Out = None,
    task: o.Task = None,
    column: o.Columns = None,
    val: o.Val = None,
    limit: o.Limit = None,
    answers: o.Answers = None,
    epochs: o.Epochs = None,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = None,
    lr: o.Lr = None,
    kd: o.Kd = None,
    temperature: o.Temperature = None,
    cache_teacher: o.CacheTeacher = None,
    seed: o.Seed = None,
    device: o.Device = None,
    precision: o.Precision = None,
    assignments: o.Set = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a task, with or without a teacher, from any stage's output."""
    stage("finetune", locals())
