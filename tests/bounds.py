"""The versions that pyproject.toml allows, as lists that pip reads: `python tests/bounds.py oldest|newest|latest|pins`.

oldest: every direct dependency at its lower bound. newest: as it stands there. latest: without the upper bounds, torch's aside. pins: what
is installed now of all that the project needs with its extras, by public versions: the content of constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = ("dev", "onnx", "examples")


def direct(*extras: str) -> dict[str, Requirement]:
    """Name → requirement of the project's own dependencies and of those of `extras`."""
    texts = PROJECT["dependencies"] + [text for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    found = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, texts)}
    return {name: requirement for name, requirement in found.items() if name != PROJECT["name"]}


def bound(requirement: Requirement, sign: str) -> str | None:
    """The version behind `>=` or `<`; None if there is no such bound."""
    return next((part.version for part in requirement.specifier if part.operator == sign), None)


def oldest() -> Iterator[str]:
    for name, requirement in direct("dev", "onnx").items():
        yield f"{name}=={bound(requirement, '>=')}"


def newest() -> Iterator[str]:
    yield from map(str, direct("dev", "onnx").values())


def latest() -> Iterator[str]:
    for name, requirement in direct("dev", "onnx").items():
        yield str(requirement) if name == "torch" else f"{name}>={bound(requirement, '>=')}"


def pins(extras: tuple[str, ...] = EXTRAS) -> Iterator[str]:
    """`name==version` of every distribution that the project and its extras need and that is installed."""
    found: dict[str, str] = {}
    waiting = list(direct(*extras).values())
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed
        found[name] = Version(installed.version).public
        waiting += [Requirement(text) for text in installed.requires or []]
        wanted = [Requirement(text) for text in installed.requires or [] if "extra" in text]
        for extra in requirement.extras:
            waiting += [Requirement(str(one).partition(";")[0]) for one in wanted if one.marker and one.marker.evaluate({"extra": extra})]
    return (f"{name}=={version}" for name, version in sorted(found.items()) if not re.match(r"nvidia-|cuda-|triton", name))


if __name__ == "__main__":
    print("\n".join({"oldest": oldest, "newest": newest, "latest": latest, "pins": pins}[sys.argv[1]]()))
