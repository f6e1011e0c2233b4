"""Versions: every dependency is bounded on both sides, and the pinned set is whole and lies within the bounds."""

from __future__ import annotations

import bounds
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PINNED = {
    requirement.name: bounds.bound(requirement, "==")
    for line in (bounds.ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
    for requirement in [Requirement(line)]
}
MINOR = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "onnx", "onnxruntime", "onnxscript")
"""Packages whose minor releases rename what is used: bounded by the next minor after the newest that was run."""
DIRECT = bounds.direct(*bounds.EXTRAS)


@pytest.mark.parametrize("name", DIRECT)
def test_a_dependency_has_both_bounds_and_its_pin_lies_between(name: str) -> None:
    low, high = (bounds.bound(DIRECT[name], sign) for sign in (">=", "<"))
    assert low and high and PINNED[name]
    pinned = Version(PINNED[name])
    assert Version(low) <= pinned < Version(high)
    following = f"{pinned.major}.{pinned.minor + 1}" if name in MINOR or name == "ruff" else f"{pinned.major + 1}"
    assert Version(high) == Version(following)


def test_the_pins_are_public_versions_of_all_that_is_installed() -> None:
    assert all(version and Version(version).local is None for version in PINNED.values())
    installed = dict(line.split("==") for line in bounds.pins(("dev", "onnx")))
    if others := [name for name in installed if PINNED.get(name) not in (None, installed[name])]:
        pytest.skip(f"this environment has other versions than the pinned ones: {', '.join(others[:3])}, ...")
    missing = {line.partition("==")[0] for line in bounds.pins()} - set(PINNED)
    assert not missing, f"make pins: {sorted(missing)}"
