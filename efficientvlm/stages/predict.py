"""predict: one question, which the task of the model says the parts of."""

from __future__ import annotations

from typing import Any

from efficientvlm.errors import BadInput
from efficientvlm.loaded import keep_length, load
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.settings.base import parse
from efficientvlm.tasks.known import asked_of


def run(*, model: str, task: str | None = None, **asked: Any) -> dict[str, Any]:
    """What the task of the checkpoint answers, or `task`, see `Asked.ask` of each; `asked` are the settings that it asks for, `Asked.asks`.

    Raises:
        BadInput: an image that is missing, damaged or huge, an empty or too long question, a checkpoint that answers no questions.
    """
    loaded = load(model, exported=True)
    chosen = asked_of(loaded, asked, task)
    if lacking := chosen.asks.lacking({"model": model, **asked}):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in lacking)
        raise BadInput(f"{options} was not given", f"{model} is asked by it", "give it")
    config = parse(chosen.asks, {"model": model, **asked}, "evlm predict")
    keep_length(loaded, config.max_tokens)
    loaded.model.to(pick_device(config.device))
    return chosen.ask(config, loaded)
