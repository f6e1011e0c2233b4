"""predict: ask a model about an image file."""

from __future__ import annotations

from typing import Annotated

import typer

from efficientvlm.cli import options as o
from efficientvlm.cli import output
from efficientvlm.errors import BadInput


def predict(
    model: Annotated[str, typer.Option("--model", help="Checkpoint folder, or bundled:NAME.", metavar="DIR")],
    image: Annotated[str, typer.Option("--image", help="Image file.", metavar="FILE")],
    question: Annotated[str, typer.Option("--question", help="The question.", metavar="TEXT")],
    mode: Annotated[str, typer.Option("--mode", help=o.MODE)] = "rank",
    top: Annotated[int, typer.Option("--top", help="How many answers to show.", min=1)] = 5,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Longest question; by default as tuned.", min=4)] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps, ...")] = "auto",
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Answer a question about an image file."""
    from efficientvlm.checkpoints.files import resolve
    from efficientvlm.checkpoints.folder import require_complete

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
