"""predict: one question about one image file."""

from __future__ import annotations

from typing import Any

from efficientvlm.errors import BadInput
from efficientvlm.loaded import keep_length, load
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.tasks.known import asked_of


def run(
    *, model: str, image: str, question: str, mode: str = "rank", device: str = "auto", top: int = 5, max_tokens: int | None = None
) -> dict[str, Any]:
    """What the task of the checkpoint answers: see `Asked.ask` of each.

    Raises:
        BadInput: an image that is missing, damaged or huge, an empty or too long question, a checkpoint that answers no questions.
    """
    if not question.strip():
        raise BadInput("the question is empty", "", 'ask something, e.g. --question "What colour is it?"')
    if top < 1:
        raise BadInput(f"--top {top} shows nothing", "", "use 1 or more")
    loaded = load(model, exported=True)
    keep_length(loaded, max_tokens)
    task = asked_of(loaded)
    loaded.model.to(pick_device(device))
    return task.ask(loaded, image, question, mode=mode, top=top)
