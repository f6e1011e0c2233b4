"""What a stage was asked to make, as it stands in `training_state/request.json` and in a manifest: read, and compared with another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints import manifest as manifests
from efficientvlm.checkpoints.files import STATE, fsync_dir, write_new
from efficientvlm.checkpoints.scratch import PROGRAM
from efficientvlm.errors import BadInput
from efficientvlm.settings.compose import asides, of
from efficientvlm.settings.stages import STAGES

REQUEST = "request.json"
UNDER_WAY = "request.json.new"  # while it is being written
BEGINNING = f'{{"program": "{PROGRAM}"'.encode()
SHAPE = {"stage": str, "inputs": dict, "config": dict, "replaces": list, "beside": bool}


def read_request(path: Path) -> dict[str, Any] | None:
    """The request in a file; None if there is none.

    Raises:
        BadInput: it is damaged, or a link.
    """
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink():
            raise BadInput(f"{path} is a link", "no stage makes one", "")
        request = manifests.read_json(path)
        if not isinstance(request, dict) or any(not isinstance(request.get(key), kind) for key, kind in SHAPE.items()):
            raise BadInput(f"{path} is damaged", "it does not describe a stage", "")
        request = {"made": False, "cards": [], **request}
        if not all(isinstance(text, str) for text in (*request["replaces"], *request["inputs"].values())):
            raise BadInput(f"{path} is damaged", "it does not describe a stage", "")
        if not isinstance(request["made"], bool) or not isinstance(request["cards"], list):
            raise BadInput(f"{path} is damaged", "it does not describe a stage", "")
        for name in request["replaces"]:
            if manifests.inside(name).split("/")[0] in (STATE, manifests.MANIFEST):
                raise BadInput(f"{path} is damaged", f"{name} is no file of a checkpoint", "")
    except (BadInput, ValueError) as error:
        folder = path.parent.parent if path.name == REQUEST else path.parent
        why = f"{error.what}: {error.why}" if isinstance(error, BadInput) else f"{path}: {error}"
        fix = f"move or remove {path.parent if path.name == REQUEST else path} yourself, or use another --out"
        raise BadInput(f"{folder} holds an unfinished stage that cannot be resumed", why, fix) from None
    return request


def write_request(state_dir: Path, request: dict[str, Any]) -> None:
    """Write the request of a stage, as a whole."""
    under_way = state_dir / UNDER_WAY
    under_way.unlink(missing_ok=True)
    try:
        write_new(under_way, json.dumps({"program": PROGRAM, **request}).encode())
        os.replace(under_way, state_dir / REQUEST)
    except OSError:
        under_way.unlink(missing_ok=True)
        raise
    fsync_dir(state_dir)


def compare(wanted: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Why two runs, each a mapping with `stage`, `inputs` and `config`, are not the same run; empty if they are.

    Settings that do not change what is learnt do not count: see :func:`beside`. A setting that was not known when the other run began
    stood at its default, which is why the default of a new setting has to be what was done before.
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
    usual = _defaults(wanted["stage"], wanted["config"])
    for name in sorted({*wanted["config"], *there["config"]} - {"out", *roles}):
        before, now = there["config"].get(name, usual.get(name)), wanted["config"].get(name)
        if before != now and not (name in marked and name not in there["config"]):
            yield f"{name}: {_brief(before)} there, {_brief(now)} now", name in marked


def _defaults(stage: str, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage, for its task and method, that may be left out, as JSON has them."""
    if stage not in STAGES:
        return {}
    fields = of(stage, config).model_fields
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items() if not field.is_required()}
    found: dict[str, Any] = json.loads(json.dumps(defaults, default=lambda group: group.model_dump(mode="json")))
    return found


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
