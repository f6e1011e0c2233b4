"""What a page tells: checkpoints in the order they were made, measurements, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.influence import Reach
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.report.picture import Structure

DAMAGE, NOTE = "problem", "note"


@dataclass
class Chapter:
    """A checkpoint. `manifest` is None where it could not be read; `lines` are those of its metrics file; `parents` are (role, key)."""

    key: Path
    label: str
    place: str
    manifest: Manifest | None
    sha256: str | None
    structure: Structure | None = None
    reach: Reach | None = None
    lines: list[dict[str, float]] = field(default_factory=list)
    parents: list[tuple[str, Path]] = field(default_factory=list)
    problem: str | None = None

    @property
    def anchor(self) -> str:
        """Name of the checkpoint's place in the page."""
        return "stage-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in self.label)


@dataclass(frozen=True)
class Problem:
    """`kind` is `problem` for what is damaged, missing or changed, `note` for what a reader ought to know.

    `unverified` problems are those that `evlm verify` has too.
    """

    kind: str
    text: str
    unverified: bool = False


@dataclass
class Measurement:
    """A result file of eval or bench."""

    name: str
    result: dict[str, Any]


@dataclass
class Story:
    """Everything on the page. `chapters` go from parents to children; `summary` is that of :func:`efficientvlm.report.summary.summarise`.

    `unmeasured` are the labels of pruned and tuned checkpoints of which nobody measured what their inputs do.
    """

    title: str
    place: str
    created: str
    chapters: list[Chapter]
    summary: dict[str, Any] | None
    measurements: list[Measurement]
    problems: list[Problem]
    hashed: bool
    unmeasured: list[str] = field(default_factory=list)

    def chapter(self, key: Path) -> Chapter:
        return next(chapter for chapter in self.chapters if chapter.key == key)

    @property
    def readable(self) -> list[tuple[Chapter, Manifest]]:
        """The checkpoints that could be read."""
        return [(chapter, chapter.manifest) for chapter in self.chapters if chapter.manifest]


def moment(created: str) -> str:
    """An ISO 8601 time for people, to the minute, in UTC."""
    try:
        return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError):
        return created


def origins(story: Story, chapter: Chapter) -> dict[str, list[int]]:
    """Tower → for each layer its number in the network that the chain of `model` parents began with; later towers are left out."""
    chain = [chapter]
    while (parent := next((key for role, key in chain[-1].parents if role != "teacher"), None)) and chain[-1].manifest:
        chain.append(story.chapter(parent))
    numbers: dict[str, list[int]] = {}
    for own in (item.manifest for item in reversed(chain)):
        numbers = _layers(own, numbers) if own else {}
    return numbers


def _layers(manifest: Manifest, before: dict[str, list[int]]) -> dict[str, list[int]]:
    """Tower → the original numbers of its layers after a stage, from those before it."""
    if not before:
        counts: dict[str, int] = {}
        for group in manifest.accounting.get("units") or {}:
            tower, layer, _ = group.split(".")
            counts[tower] = max(counts.get(tower, 0), int(layer) + 1)
        return {tower: list(range(count)) for tower, count in counts.items()}
    chosen = manifest.extra.get("layers") if manifest.stage == "shrink" else None
    if not isinstance(chosen, dict):
        return before
    return {
        tower: [numbers[index] for index in chosen.get(tower, range(len(numbers))) if index < len(numbers)]
        for tower, numbers in before.items()
    }


def unique(problems: Iterable[Problem]) -> list[Problem]:
    """Each problem once, damage first."""
    found = list(dict.fromkeys(problems))
    return [problem for kind in (DAMAGE, NOTE) for problem in found if problem.kind == kind]
