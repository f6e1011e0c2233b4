"""Model families, by the `model_type` of their configuration."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from efficientvlm.errors import BadInput

NAMES = ("xvlm",)


@cache
def get(name: str) -> Any:
    """The family called `name`; :class:`BadInput` lists the known ones."""
    if name == "xvlm":
        from efficientvlm.families.xvlm import XVLM

        return XVLM()
    raise BadInput(f"unknown model family {name!r}", f"known are {', '.join(NAMES)}")


def of_folder(path: Path) -> Any:
    """The family of the checkpoint folder `path`, from its `config.json`."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        name = config["model_type"]
    except FileNotFoundError:
        raise BadInput(f"{path} is not a checkpoint folder", "it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot read {file}", str(error)) from None
    for family in map(get, NAMES):
        if name in family.model_types:
            return family
    known = ", ".join(kind for family in map(get, NAMES) for kind in family.model_types)
    raise BadInput(f"{path} holds a model of type {name!r}", f"this package opens {known}")
