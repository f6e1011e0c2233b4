"""What a command may not do, whatever it was given."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attack.process import Ended, Place, Seen, seen

ALLOWED = (0, 2, 3, 4, 75)
LONGEST = 20_000
ESCAPES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
KINDS = ("hang", "memory", "crash", "exit 1", "unclear", "long", "outside", "half an output", "leftovers", "not finite")
"""Every fault has one of these kinds; the first that applies is counted."""


@dataclass(frozen=True)
class Fault:
    kind: str
    detail: str


def judged(
    ended: Ended, place: Place, before: Seen, out: str | None, mutable: tuple[str, ...] = (), said: Sequence[str] = ()
) -> list[Fault]:
    """All that is wrong with how a command ended.

    Args:
        before: what lay in the working folder.
        out: name of the output below it, which may be new.
        mutable: names below it that may change.
        said: texts that may be printed as they are: words of the user's own, and a file's where it is asked for.
    """
    return [*_end(ended, said), *_files(ended, place, before, out, mutable), *_left(place)]


def _end(ended: Ended, said: Sequence[str]) -> list[Fault]:
    if ended.stopped:
        return [Fault("memory" if "MB" in ended.stopped else "hang", ended.stopped)]
    tail = " | ".join(ended.err.strip().splitlines()[-3:])[:400]
    if ended.code < 0 or "panicked at" in ended.err or "Fatal Python error" in ended.err:
        return [Fault("crash", f"exit code {ended.code}: {tail}")]
    if ended.code not in ALLOWED or "Traceback (most recent" in ended.err or "error: unexpected" in ended.err:
        return [Fault("exit 1", f"exit code {ended.code}: {tail}")]
    faults = []
    if ended.code in (3, 4) and not re.search(r"^error: \S", ended.err, re.MULTILINE):
        faults.append(Fault("unclear", f"exit code {ended.code} without an error: {tail}"))
    if len(ended.err) > LONGEST:
        faults.append(Fault("long", f"{len(ended.err)} letters of errors: {ended.err[:200]!r}"))
    printed = ended.out
    for text in sorted(said, key=len, reverse=True):
        printed = printed.replace(text, "") if text else printed
    if found := ESCAPES.search(printed + ended.err):
        faults.append(Fault("unclear", f"a control character is printed: {found[0]!r}"))
    if ended.code == 0 and (constants := _not_finite(ended.out)):
        faults.append(Fault("not finite", f"the result holds {constants[0]}"))
    return faults


def _not_finite(text: str) -> list[str]:
    """NaN and infinities in a result, if it is JSON."""
    found: list[str] = []
    try:
        json.loads(text, parse_constant=found.append)
    except (ValueError, RecursionError):
        return []
    return found


def _within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + os.sep) for place in places)


def _files(ended: Ended, place: Place, before: Seen, out: str | None, mutable: tuple[str, ...]) -> list[Fault]:
    after, ours = seen(place.work), (out,) if out else ()
    changed = [name for name, what in before.items() if after.get(name) != what and not _within(name, mutable)]
    new = [name for name in after if name not in before]
    faults = []
    if changed:
        word = ", ".join(f"{name} is {'changed' if name in after else 'gone'}" for name in changed[:3])
        faults.append(Fault("outside", word))
    if strays := [name for name in new if not _within(name, (*ours, *mutable)) and not _leads_to(name, ours)]:
        faults.append(Fault("outside", f"new beside the output: {', '.join(strays[:3])}"))
    made = [name for name in new if _within(name, ours)]
    finished = ended.code in (0, 75)
    if made and not finished and not _resumable(place.work, ours[0]):
        faults.append(Fault("half an output", f"exit code {ended.code} left {', '.join(sorted(made)[:4])}"))
    if ended.code == 0 and ours and f"{ours[0]}/training_state" not in before and (problem := incomplete(place.work / ours[0])):
        faults.append(Fault("half an output", problem))
    if hidden := [name for name in made if finished and os.path.basename(name).startswith(".") and name != ours[0]]:
        faults.append(Fault("leftovers", f"left in the output: {', '.join(hidden[:4])}"))
    return faults


def _leads_to(name: str, ours: tuple[str, ...]) -> bool:
    return any(place.startswith(name + os.sep) for place in ours)


def _resumable(work: Path, out: str) -> bool:
    return any((work / out).glob("**/training_state/step-*/state.json"))


def incomplete(out: Path) -> str:
    """What is wrong with a finished output, if it is a checkpoint: a file that is not as its manifest says, or one too many."""
    manifest = out / "evlm_manifest.json"
    if manifest.is_symlink() or not manifest.is_file() or manifest.stat().st_size > 1 << 26:
        return f"{out.name} has a state and no manifest" if (out / "training_state").exists() else ""
    recorded = json.loads(manifest.read_text("utf-8"))["files"]
    for name, record in recorded.items():
        path = out / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
            return f"{name} is not what the manifest says"
    return ""


def _left(place: Place) -> list[Fault]:
    left = sorted(path.name for path in place.tmp.iterdir())
    left += sorted(str(path.relative_to(place.home)) for path in place.home.iterdir() if path.name not in (".cache", ".config"))
    return [Fault("leftovers", f"left in TMPDIR or HOME: {', '.join(left[:4])}")] if left else []
