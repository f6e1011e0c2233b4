"""Commands that make a model without training it: init, import, shrink."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli.launch import pairs, stage


def init(
    out: o.Out = None,
    family: Annotated[str | None, typer.Option("--family", help="xvlm or blip.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="tiny, small or base: random weights.")] = None,
    vision_from: Annotated[str | None, typer.Option("--vision-from", help="Folder of a CLIP or DINOv2 image model.", metavar="DIR")] = None,
    text_from: Annotated[str | None, typer.Option("--text-from", help="Folder of a BERT model.", metavar="DIR")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Folder of a tokenizer, or train.", metavar="DIR|train")] = None,
    data: o.DataSpec = None,
    column: o.Columns = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Size of a tokenizer that is trained.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Side of the square images in pixels.")] = None,
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
    """Make a new model at random, or an X-VLM from CLIP and BERT folders."""
    stage("init", locals())


def import_(
    model: Annotated[
        str | None, typer.Option("--model", help="Published file, or folder or hub id of a CLIP, SigLIP or BLIP.", metavar="FILE|DIR|NAME")
    ] = None,
    out: o.Out = None,
    tokenizer: o.Tokenizer = None,
    layout: Annotated[str | None, typer.Option("--layout", help="auto, pretrain, retrieval or vqa.")] = None,
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
    """Read a published X-VLM or EfficientVLM file, or a Hugging Face folder of CLIP, SigLIP or BLIP."""
    stage("import", locals())


def shrink(
    model: o.Model = None,
    out: o.Out = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help="How many layers of a tower, or which: vision=6, text=1,3,5.", metavar="TOWER=LAYERS"),
    ] = None,
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
    """Make a student of fewer layers from its teacher's weights; half the layers by default."""
    stage("shrink", {**locals(), "layers": {tower: _layers(text) for tower, text in pairs(layers, "--layers").items()}})


def _layers(text: str) -> Any:
    """`6` is a count, `1,3,5` (or `5,` for a single one) are layers counted from 0."""
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"{text!r} is neither a number of layers nor a list of them", param_hint="--layers")
    return int(text) if "," not in text else [int(number) for number in numbers]
