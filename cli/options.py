"""The options of all commands, declared once. None always means: not given, so that the defaults of the configuration rule."""

from __future__ import annotations

from typing import Annotated

import typer

RUN, TRAINING, KNOWLEDGE = "How it runs", "Training", "Distillation"

Model = Annotated[str | None, typer.Option("--model", help="Checkpoint folder, or bundled:NAME.", metavar="DIR")]
Models = Annotated[list[str] | None, typer.Option("--model", help="Checkpoint folder, or bundled:NAME. Repeatable.", metavar="DIR")]
Out = Annotated[str | None, typer.Option("--out", help="Folder to write.", metavar="DIR")]
OutFile = Annotated[str | None, typer.Option("--out", help="JSON file for the result.", metavar="FILE")]
DataSpec = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="easy-vqa, shapes[:key=value,...], a file, a folder, a pattern of shards, hub:NAME, or stream: before one.",
        metavar="DATA",
    ),
]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="Where a role is found, e.g. question=text. Repeatable.", metavar="ROLE=NAME")
]
Val = Annotated[str | None, typer.Option("--val", help="Validation data; by default held-out training images.", metavar="DATA")]
Limit = Annotated[int | None, typer.Option("--limit", help="Use only so many images.")]
Task = Annotated[str | None, typer.Option("--task", help="vqa or retrieval.", metavar="TASK")]
Answers = Annotated[str | None, typer.Option("--answers", help="File with one answer a line.", metavar="FILE")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Folder of a tokenizer.", metavar="DIR")]

Teacher = Annotated[str | None, typer.Option("--teacher", help="Checkpoint to learn from.", metavar="DIR", rich_help_panel=KNOWLEDGE)]
Kd = Annotated[float | None, typer.Option("--kd", help="Weight of the distillation terms, 0 to 1.", rich_help_panel=KNOWLEDGE)]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Softens the logits that are compared.", rich_help_panel=KNOWLEDGE)
]
CacheTeacher = Annotated[
    bool | None,
    typer.Option("--cache-teacher/--no-cache-teacher", help="Run the teacher once a sample; memory for time.", rich_help_panel=KNOWLEDGE),
]

Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the images.", rich_help_panel=TRAINING)]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Length in steps, instead of --epochs.", rich_help_panel=TRAINING)]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Images a step, over all processes.", rich_help_panel=TRAINING)]
Lr = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAINING)]

Seed = Annotated[int | None, typer.Option("--seed", help="Every random draw follows from it.", rich_help_panel=RUN)]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, mps, ...", rich_help_panel=RUN)]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32 or bf16.", rich_help_panel=RUN)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting by its name, e.g. weights.text_hidden=0.5.", metavar="KEY=VALUE", rich_help_panel=RUN),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print settings and plan as JSON, and all that is wrong; do nothing.", rich_help_panel=RUN)
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run, or start it anew.", rich_help_panel=RUN)]
Force = Annotated[bool, typer.Option("--force", help="Replace a finished output.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUN)]
