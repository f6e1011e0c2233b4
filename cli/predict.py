"""predict: ask a model about pictures; what is asked follows from the tasks."""

from __future__ import annotations

from typing import Any

import typer

from efficientvlm.cli import output
from efficientvlm.cli.stages import command
from efficientvlm.errors import BadInput

SHOWN = (
    *(
        "answer",
        "probability",
        "probability_of_true",
        "answers",
        "caption",
        "captions",
        "described",
        "classified",
        "skipped",
        "kept",
        "dropped",
    ),
    *("out", "sheet"),
)
"""What people see of an answer, where it is there."""


def ask(name: str, options: dict[str, Any]) -> None:
    """Answer a question; a value that no task takes is wrong usage, which is said before the model is looked for."""
    from efficientvlm.checkpoints.files import resolve
    from efficientvlm.checkpoints.folder import require_complete
    from efficientvlm.settings.base import problems_with
    from efficientvlm.settings.tasks import ABOUT

    asked = {key: value for key, value in options.items() if key not in ("json", "task") and value is not None}
    asked["quiet"] = options["quiet"] or options["json"]
    asked = {key: value for key, value in asked.items() if (key, value) not in (("resume", True), ("force", False))}
    about = {name: about.asked for name, about in ABOUT.items() if about.asked}
    task = options["task"]
    if task is not None and task not in about:
        raise typer.BadParameter(f"{task!r} is none of {', '.join(about)}", param_hint="--task")
    known = [kind for name, kind in about.items() if task in (None, name)]
    kinds = [kind for kind in known if all(kind.has([key]) for key in asked)]
    if all(lacking := [kind.lacking(asked) for kind in kinds or known]):
        needed = dict.fromkeys(f"--{names[0]}" for names in lacking)
        raise typer.BadParameter("it is needed and was not given", param_hint=" or ".join(needed))
    for key, value in asked.items():
        problems = [problems_with(kind, key, value, among=asked) for kind in kinds]
        if problems and all(problems):
            raise typer.BadParameter(problems[0][0].removeprefix(f"{key}: "), param_hint=f"--{key.replace('_', '-')}")
    require_complete(asked["model"])
    for image in asked.get("image", ()):
        path = resolve(image)
        if path.is_dir() and any(kind.folders for kind in kinds or known):
            continue
        if not path.is_file():
            raise BadInput(f"--image {image} cannot be read", "it is not a file", "give an image file, e.g. PNG or JPEG")
    from efficientvlm.stages import predict as predicting

    output.mapping_result(predicting.run(task=task, **asked), None, as_json=options["json"], keys=SHOWN)


predict = command("predict", ask)
