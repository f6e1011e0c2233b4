"""kill -9 at any moment: the same command then ends in the same bits as one that was left alone, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attack.damage import Draw
from attack.judge import incomplete
from attack.process import Ended, Place, Running, Seen, seen
from attack.stock import SHAPES, SHORT, WIDTH, Stock
from efficientvlm.stages import select_sentences

select_sentences.SAVE_EVERY = -1.0  # a state behind every batch, so that kills fall between two of them

Job = Generator[Running, Ended, None]
STEPS = [*SHORT, "--max-steps", "4", "--set", "save_every=1"]
EVENTS = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
    "shutil.copyfile",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FEW = ["--set", "shard_size=3"]
EMBED = ["embed", "--model", "init", "--data", SHAPES, "--limit", "16", "--batch-size", "2", *FEW, "-q"]
SELECT = ["select-sentences", "--sentences", "pile.txt", "--images", "images.npy", "--cap", "3", "--batch-size", "4", "-q"]
UNPAIRED = ["distill", "--task", "embedding", "--model", "student", "--teacher", "init"]
COMMANDS: dict[str, list[str]] = {
    "init": ["init", "--size", "tiny", "--data", SHAPES, "--vocab-size", "64", "-q", "--out", "o"],
    "shrink": ["shrink", "--model", "init", "-q", "--out", "o"],
    "import": ["import", "--model", "hf-clip", "-q", "--out", "o"],
    "pretrain": ["pretrain", "--model", "init", "--data", SHAPES, *STEPS, "--out", "o"],
    "distill": ["distill", "--model", "student", "--teacher", "init", "--data", SHAPES, *STEPS, "--out", "o"],
    "prune": ["prune", "--model", "teacher", "--teacher", "teacher", "--data", SHAPES, *STEPS, "--out", "o"],
    "finetune": ["finetune", "--model", "student", "--teacher", "teacher", "--data", SHAPES, *STEPS, "--out", "o"],
    "eval": ["eval", "--model", "teacher", "--data", SHAPES, "--limit", "4", "-q", "--out", "o"],
    "bench": ["bench", "--model", "teacher", "--rounds", "2", "--batch-size", "1", "-q", "--out", "o"],
    "export padded": ["export", "--model", "teacher", "--format", "padded", "-q", "--out", "o"],
    "report": ["report", "teacher", "--out", "o"],
    "shrink --force": ["shrink", "--model", "init", "--seed", "2", "-q", "--force", "--out", "o"],
    "finetune --force": ["finetune", "--model", "init", "--data", SHAPES, *STEPS, "--force", "--out", "o"],
    "run": ["run", "r.yaml", "-q", "--out", "o"],
    "embed": [*EMBED, "--side", "images", "--out", "o"],
    "embed sentences": [*EMBED, "--side", "sentences", "--out", "o"],
    "embed --import": ["embed", "--import", "images.npy", "--data", "shapes:size=12", *FEW, "--side", "images", "-q", "--out", "o"],
    "select-sentences": [*SELECT, "--sentence-vectors", "said.npy", "--out", "o"],
    "select-sentences --model": [*SELECT, "--model", "init", "--out", "o"],
    "distill embedding": [*UNPAIRED, "--data", SHAPES, "--sentences", SHAPES, *STEPS, "--set", "learn_texts=true", "--out", "o"],
    "export onnx --int8": ["export", "--model", "teacher", "--format", "onnx", "--int8", "--rounds", "0", "-q", "--out", "o"],
}
WITHOUT_PAIRS = tuple(name for name in COMMANDS if name.startswith(("embed", "select-sentences", "distill embedding")))
RECIPE = f"""name: r
defaults: {{data: "{SHAPES}", batch_size: 4, limit: 16, eval_limit: 2, save_every: 1}}
stages:
  - {{name: student, stage: shrink, model: init}}
  - {{name: tuned, stage: finetune, model: "@student", max_steps: 2}}
  - {{name: test, stage: eval, model: "@tuned", limit: 4}}
"""


@dataclass
class Reference:
    """What a command left alone leaves: names of its files, the digests of those that two runs agree about, its length and events."""

    names: set[str]
    digests: dict[str, tuple[str, ...]]
    seconds: float
    events: int


@dataclass
class Killed:
    """What became of the kills of one command."""

    kills: int = 0
    at_events: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)
    compared: int = 0


def prepared(name: str, stock: Stock, root: Path) -> Place:
    """A place with what the command reads, and with what `--force` is to replace."""
    place = Place(root)
    argv = COMMANDS[name]
    for word in dict.fromkeys(argv):
        if word in ("init", "student", "teacher") and word != argv[0]:
            shutil.copytree(stock.get(f"model/{word}"), place.work / word)
        elif word == "hf-clip":
            shutil.copytree(stock.get(word), place.work / word)
    if "images.npy" in argv:
        vectors_in(place.work)
    if name == "run":
        shutil.copytree(stock.get("model/init"), place.work / "init")
        (place.work / "r.yaml").write_text(RECIPE)
    if "--force" in argv:
        if not (place.work / "init").exists():
            shutil.copytree(stock.get("model/init"), place.work / "init")
        shutil.copytree(stock.get("model/student"), place.work / "o")
    return place


def vectors_in(folder: Path) -> None:
    """A pile of sentences, and embeddings of it and of some images, as wide as those of the small models."""
    draw = np.random.default_rng(0)
    (folder / "pile.txt").write_text("".join(f"sentence number {number} of a pile\n" for number in range(60)))
    for name, count in (("images", 12), ("said", 60)):
        np.save(folder / f"{name}.npy", draw.standard_normal((count, WIDTH)).astype(np.float32))


def counted(place: Place, deadly: int | None = None) -> Callable[[], None]:
    """Count the events of the file system, and die right before the one that is `deadly`; the count is in the file `events`."""

    def prepare() -> None:
        import sys

        count, root = 0, str(place.root)
        total = os.open(place.root / "events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
                return
            if event != "open" and event not in EVENTS:
                return
            where = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else root
            if where.startswith("/") and not where.startswith(root):
                return
            count += 1
            os.pwrite(total, b"%d" % count, 0)
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def outputs(place: Place, before: Seen) -> dict[str, tuple[str, ...]]:
    """Files of the output, and whatever else is new; of manifests all but what every run has of its own."""
    found = seen(place.work, times=False)
    return {name: what for name, what in found.items() if name not in before or name == "o" or name.startswith("o/")}


def reference(name: str, stock: Stock, root: Path, found: dict[str, Reference]) -> Job:
    """Run a command twice, left alone."""
    seconds, seens, events = 0.0, [], 0
    for number in range(2):
        place = prepared(name, stock, root / f"{name.replace(' ', '')}-{number}")
        before = seen(place.work)
        ended = yield Running(COMMANDS[name], place, counted(place))
        if ended.code:
            raise RuntimeError(f"evlm {' '.join(COMMANDS[name])} ended with {ended.code}: {ended.err[-1500:]}")
        seconds, events = ended.seconds, int((place.root / "events").read_bytes() or 0)
        seens.append(outputs(place, before))
    one, two = seens
    found[name] = Reference(set(one), {key: what for key, what in one.items() if two.get(key) == what}, seconds, events)


def campaign(name: str, draw: Draw, wanted: int, stock: Stock, root: Path, references: dict[str, Reference], into: Killed) -> Job:
    """Kill the command once to three times, let it end, compare; until `wanted` kills have hit."""
    known, hit = references[name], 0
    while hit < wanted:
        place = prepared(name, stock, root / f"{name.replace(' ', '')}-{into.runs}-{draw.randrange(10**6)}")
        inputs, story = seen(place.work), []
        for _ in range(min(wanted - hit, draw.choice([1, 1, 2, 3]))):
            at_event = bool(draw.randrange(2))
            if at_event:
                deadly = draw.randint(1, max(1, known.events))
                running = Running(COMMANDS[name], place, counted(place, deadly))
                story.append(f"event {deadly}")
            else:
                moment = draw.uniform(0, known.seconds)
                running = Running(COMMANDS[name], place)
                story.append(f"{moment:.2f} s")
                doom(running, moment)
            ended = yield running
            if ended.code == -signal.SIGKILL and not ended.stopped:
                hit, into.kills, into.at_events = hit + 1, into.kills + 1, into.at_events + at_event
                if problem := unsound(place.work / "o", "--force" in COMMANDS[name]):
                    into.faults.append(f"{name}, killed at {', '.join(story)}: {problem}")
            else:
                story[-1] += f" (ended before, {ended.code})"
        ended = yield Running(COMMANDS[name], place)
        into.runs += 1
        if problem := different(ended, place, inputs, known):
            into.faults.append(f"{name}, killed at {', '.join(story)}: {problem}")
        into.compared += len(known.digests)
        shutil.rmtree(place.root, ignore_errors=True)


def doom(running: Running, moment: float) -> None:
    """Kill a process after so many seconds; while it is polled."""
    poll = running.poll

    def until() -> Ended | None:
        if time.monotonic() - running.began >= moment:
            running.kill()
        return poll()

    running.poll = until  # type: ignore[method-assign]


def unsound(out: Path, replaces: bool) -> str:
    """What is wrong with an output right after a kill: a manifest means complete, no manifest means not taken for a checkpoint."""
    if (out / "evlm_manifest.json").exists():
        problem = incomplete(out)
        return problem if problem and "state" not in problem else ""
    if out.is_dir() and (names := {path.name for path in out.iterdir()} - {"training_state"}) and not (out / "training_state").exists():
        checkpoints = all((out / name).is_dir() or name.endswith(".json") for name in names)
        return "" if checkpoints else f"no manifest and no state, but {', '.join(sorted(names)[:4])}"
    return ""


def different(ended: Ended, place: Place, inputs: Seen, known: Reference) -> str:
    """How the end after kills differs from that of a command left alone."""
    if ended.code or ended.stopped:
        return f"the same command ends with {ended.code} {ended.stopped}: {' | '.join(ended.err.splitlines()[-3:])[:300]}"
    found = outputs(place, inputs)
    if missing := known.names - set(found):
        return f"missing: {', '.join(sorted(missing)[:4])}"
    if left := set(found) - known.names:
        return f"left behind: {', '.join(sorted(left)[:4])}"
    if other := [name for name, what in known.digests.items() if found[name] != what]:
        return f"other bits: {', '.join(sorted(other)[:4])}"
    changed = [name for name, what in inputs.items() if name != "o" and not name.startswith("o/") and seen(place.work).get(name) != what]
    if changed:
        return f"inputs changed: {', '.join(changed[:4])}"
    if left := [path.name for path in place.tmp.iterdir()]:
        return f"left in TMPDIR: {', '.join(left[:4])}"
    return ""
