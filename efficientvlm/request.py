"""What a stage was asked to make, as it stands in `training_state/request.json` and in a manifest: read, and compared with another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientvlm import manifest as manifests
from efficientvlm.config import asides
from efficientvlm.errors import BadInput

REQUEST = "request.json"
SHAPE = {"stage": str, "inputs": dict, "config": dict, "replaces": list, "beside": bool}


def read_request(state_dir: Path, lenient: bool) -> dict[str, Any] | None:
    """The request in a state folder; None if there is none, or with `lenient` if it cannot be used.

    Raises:
        BadInput: it is damaged.
    """
    path = state_dir / REQUEST
    if not path.exists():
        return None
    try:
        request = manifests.read_json(path)
        if not isinstance(request, dict) or any(not isinstance(request.get(key), kind) for key, kind in SHAPE.items()):
            raise BadInput(f"{path} is damaged", "it does not describe a stage", "use --force to drop it, or another --out")
        for name in request["replaces"]:
            manifests.inside(str(name))
    except (BadInput, ValueError) as error:
        if lenient:
            return None
        what = f"{state_dir.parent} holds an unfinished stage that cannot be resumed"
        raise BadInput(what, str(error), "use --no-resume to start it anew") from None
    return request


def compare(wanted: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Why two runs, each a mapping with `stage`, `inputs` and `config`, are not the same run; empty if they are.

    Settings that do not change what is learnt do not count: see :func:`beside`.
    """
    if wanted["stage"] != there["stage"]:
        return [f"stage: {there['stage']} there, {wanted['stage']} now"]
    return [text for text, aside in _changes(wanted, there) if not aside]


def beside(wanted: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """What differs between two runs for which :func:`compare` finds nothing: settings that do not change what is learnt."""
    return [text for text, aside in _changes(wanted, there) if aside]


def _changes(wanted: dict[str, Any], there: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Every difference, and whether it leaves alone what is learnt."""
    marked = asides(wanted["stage"])
    roles = {*wanted["inputs"], *there["inputs"]}
    for role in sorted(roles):
        before, now = there["inputs"].get(role), wanted["inputs"].get(role)
        if before != now:  # validation data in the place of none: then nothing is held out of the training data any more
            yield f"input {role} differs", role in marked and None not in (before, now)
    for name in sorted({*wanted["config"], *there["config"]} - {"out", *roles}):
        before, now = there["config"].get(name), wanted["config"].get(name)
        if before != now and not (name in marked and name not in there["config"]):
            yield f"{name}: {_brief(before)} there, {_brief(now)} now", name in marked


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
