"""Commands that use a model: eval, bench, predict, export."""

from __future__ import annotations

from typing import Annotated

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli import output
from efficientvlm.cli.launch import stage
from efficientvlm.errors import BadInput

Mode = Annotated[str | None, typer.Option("--mode", help="rank: choose from the answer list; generate: write freely.")]
Answer = Annotated[str, typer.Option("--mode", help="rank: choose from the answer list; generate: write freely.")]


def evaluate(
    model: o.Model = None,
    data: o.DataSpec = None,
    out: o.OutFile = None,
    task: o.Task = None,
    split: Annotated[str | None, typer.Option("--split", help="train, val or test.")] = None,
    column: o.Columns = None,
    limit: o.Limit = None,
    answers: o.Answers = None,
    mode: Mode = None,
    rerank: Annotated[
        int | None, typer.Option("--rerank", help="Retrieval: so many candidates of a query are ranked anew by matching.", metavar="K")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Images at a time.")] = None,
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
    """Measure a task's metrics; nothing is trained."""
    stage("eval", locals())


def bench(
    model: o.Models = None,
    out: o.OutFile = None,
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", help="Repeatable; 1 and 8 by default.")] = None,
    text_length: Annotated[int | None, typer.Option("--text-length", help="Tokens a question.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Timed rounds; the models take turns.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="Processor threads.")] = None,
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
    """Measure latency and size of one or more models side by side."""
    values = {**locals(), "models": model, "batch_sizes": batch_size}
    del values["model"], values["batch_size"]
    stage("bench", values)


def export(
    model: o.Model = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="onnx: graphs; padded: zeros in the original shapes; hf: transformers' own classes.",
            metavar="FORM",
        ),
    ] = None,
    out: o.Out = None,
    int8: Annotated[bool | None, typer.Option("--int8", help="ONNX with int8 weights; what they cost and gain is measured.")] = None,
    data: o.DataSpec = None,
    split: Annotated[str | None, typer.Option("--split", help="What accuracy is measured on: val or test.")] = None,
    column: o.Columns = None,
    limit: o.Limit = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Timed rounds; 0 times nothing.")] = None,
    seed: o.Seed = None,
    assignments: o.Set = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = True,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write a checkpoint as ONNX graphs or for stock transformers, compared with torch."""
    stage("export", locals())


def predict(
    model: Annotated[str, typer.Option("--model", help="Checkpoint folder, or bundled:NAME.", metavar="DIR")],
    image: Annotated[str, typer.Option("--image", help="Image file.", metavar="FILE")],
    question: Annotated[str, typer.Option("--question", help="The question.", metavar="TEXT")],
    mode: Answer = "rank",
    top: Annotated[int, typer.Option("--top", help="How many answers to show.", min=1)] = 5,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest question; by default as tuned.", min=4)] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps, ...")] = "auto",
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer a question about an image file."""
    from efficientvlm.checkpoint import require_complete
    from efficientvlm.files import resolve

    if mode not in ("rank", "generate"):
        raise typer.BadParameter(f"{mode!r} is neither rank nor generate", param_hint="--mode")
    if not question.strip():
        raise typer.BadParameter("it is empty", param_hint="--question")
    require_complete(model)
    if not resolve(image).is_file():
        raise BadInput(f"--image {image} cannot be read", "it is not a file", "give an image file, e.g. PNG or JPEG")
    from efficientvlm.stages import predict as predicting

    result = predicting.run(model=model, image=image, question=question, mode=mode, device=device, top=top, max_tokens=max_tokens)
    output.mapping_result(result, None, as_json=json, keys=("answer", "answers"))
