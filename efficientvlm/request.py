"""What a stage was asked to make, as it stands in `training_state/request.json` and in a manifest: read, and compared with another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efficientvlm import manifest as manifests
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
    """Why two runs, each a mapping with `stage`, `inputs` and `config`, are not the same run; empty if they are."""
    if wanted["stage"] != there["stage"]:
        return [f"stage: {there['stage']} there, {wanted['stage']} now"]
    roles = sorted({*wanted["inputs"], *there["inputs"]})
    changed = [f"input {role} differs" for role in roles if wanted["inputs"].get(role) != there["inputs"].get(role)]
    same = {"out", "max_bad", *roles}  # max_bad decides whether a run stops, not what comes out
    for name in sorted({*wanted["config"], *there["config"]} - same):
        before, now = there["config"].get(name), wanted["config"].get(name)
        if before != now:
            changed.append(f"{name}: {_brief(before)} there, {_brief(now)} now")
    return changed


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
