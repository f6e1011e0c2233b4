"""Captions of many pictures: made, filtered where that is asked, and written bit by bit, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efficientvlm.checkpoints.files import resolve, sha256
from efficientvlm.checkpoints.growing import GrowingLines
from efficientvlm.checkpoints.manifest import MANIFEST
from efficientvlm.data.batch import stack
from efficientvlm.data.images import open_image
from efficientvlm.data.items import Pixels
from efficientvlm.data.reading import of_read
from efficientvlm.data.unlabelled import Shown, Unlabelled, ahead
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.interrupt import StopFlag, stop_flag
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.tasks import CaptionQuestion
from efficientvlm.tasks.describing import EVAL_BATCH, Describer, Manner, captions_file, of_prompt
from efficientvlm.tasks.filtering import Judge

FEWEST = 4  # pictures between two states
SHOWN = 5  # pictures that cannot be read and are named
MADE, GIVEN = "made", "given"


class Opened(NamedTuple):
    """A picture as the captioner reads it and as the filter does, or why it cannot be read."""

    pixels: Pixels | None
    judged: Pixels | None
    problem: BadInput | None = None


class Kept:
    """Rows that stay in memory, in the place of :class:`GrowingLines`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.done, self.last, self.counts = 0, "", Counter[str]()

    def add(self, rows: Sequence[dict[str, Any]], done: int, last: str, counts: Counter[str]) -> None:
        self.rows += rows
        self.done, self.last, self.counts = done, last, counts


def label(config: CaptionQuestion, loaded: Loaded) -> dict[str, Any]:
    """Captions of all pictures that `config` names, or that lie in folders and shards that it names.

    Returns:
        `caption` of a single picture. Of several `captions`, or where they are written to the file `out` its name; how many pictures were
        `described` and how many `skipped`, as they cannot be read; with a filter how many captions were `kept` and `dropped`, of those that
        were `made` and of those that the pictures came with (`given`); in all cases the `manner` in which captions were written.

    Raises:
        BadInput: a picture that was named is missing, damaged or huge; a folder or shard without one; a checkpoint that describes nothing,
            a filter that compares nothing; an `out` that is there, or was begun with other settings.
        Interrupted: asked to stop; the same settings go on.
    """
    describer = Describer(loaded, Manner.of(loaded, config))
    judge = Judge.of(config) if config.filter else None
    out = captions_file(config.out) if config.out else None
    if out and not config.force and out.exists() and out.stat().st_size:
        raise BadInput(f"{out} is there already", "captions would take its place", "give --force to replace it, or another --out")
    loaded.model.eval()
    named = [Path(resolve(name)) for name in config.image]
    pictures = Unlabelled(named, captions=judge is not None)
    for remark in (*of_prompt(describer.texts, describer.manner.prompt).remarks, *pictures.remarks):
        say(f"predict: {remark}")
    labeller = Labeller(config, describer, judge, out)
    if out is None:
        kept = Kept()
        labeller.work(pictures, kept)
        labeller.check(pictures, kept)
        if len(config.image) == 1 and not judge and len(pictures) == 1 and named[0].suffix.lower() != ".tar" and not named[0].is_dir():
            return {**kept.rows[0], "manner": describer.manner.said}
        return {"captions": kept.rows, **labeller.summary(kept)}
    with GrowingLines(out, labeller.run(named), resume=config.resume) as lines, stop_flag() as stop:
        if lines.done:
            say(f"predict: goes on behind the first {lines.done:,} of {len(pictures):,} pictures", quiet=config.quiet)
        labeller.work(pictures, lines, stop)
        labeller.check(pictures, lines)
        lines.finish()
    return {**labeller.summary(lines), "out": str(out)}


class Labeller:
    """Captions of pictures, batch by batch."""

    def __init__(self, config: CaptionQuestion, describer: Describer, judge: Judge | None, out: Path | None) -> None:
        self.config, self.describer, self.judge, self.out = config, describer, judge, out
        self.first_lost = ""
        self.told = Counter[str]()

    def run(self, named: Sequence[Path]) -> dict[str, Any]:
        """What the captions follow from."""
        loaded, judge = self.describer.loaded, self.judge
        filtering = {"filter": digest(judge.loaded), "threshold": judge.threshold} if judge else {}
        return {"image": [str(name) for name in named], "model": digest(loaded), **self.describer.manner.said, **filtering}

    def work(self, pictures: Unlabelled, lines: GrowingLines | Kept, stop: StopFlag | None = None) -> None:
        """Describe what is not yet in `lines`.

        Raises:
            BadInput: a picture that was named cannot be read; the pictures are no longer those that `lines` were begun with.
            Interrupted: asked to stop.
        """
        total, counts = len(pictures), Counter(lines.counts)
        size = max(FEWEST, min(EVAL_BATCH, self.describer.at_once))
        with Bar("predict", total, start=lines.done, quiet=self.config.quiet or total <= EVAL_BATCH) as bar:
            for batch in ahead(self.rest(pictures, lines), size, self.opened):
                rows = self.rows(batch, counts)
                lines.add(rows, lines.done + len(batch), batch[-1][0].name, Counter(counts))
                note = f"{counts['kept_made'] + counts['kept_given']:,} captions kept" if self.judge else ""
                bar.update(lines.done, note)
                if stop and stop.requested and lines.done < total:
                    what = f"stopped behind {lines.done:,} of {total:,} pictures"
                    raise Interrupted(what, f"what was described lies beside {self.out}", "run the same command again")

    def rest(self, pictures: Unlabelled, lines: GrowingLines | Kept) -> Iterator[Shown]:
        if not lines.done:
            return pictures.after(0)
        rest = pictures.after(lines.done - 1)
        last = next(rest, None)
        if last is None or last.name != lines.last:
            now = last.name if last else "missing"
            why = f"picture number {lines.done:,} was {lines.last}, and is {now}: pictures were added or removed"
            raise BadInput(f"{self.out} was begun with other pictures", why, "give --no-resume to begin anew, or another --out")
        return rest

    def opened(self, shown: Shown) -> Opened:
        """The picture as each network reads it; one that was named has to be readable."""
        if isinstance(shown.content, BadInput):
            return Opened(None, None, shown.content)
        where = "" if isinstance(shown.content, Path) else shown.name
        how = self.describer.loaded.preprocessing
        try:
            pixels = open_image(shown.content, how, where)
            judged = None
            if self.judge:
                same = self.judge.loaded.preprocessing == how
                judged = pixels if same else open_image(shown.content, self.judge.loaded.preprocessing, where)
            return Opened(pixels, judged)
        except BadInput as error:
            if shown.named:
                raise
            return Opened(None, None, error)

    def rows(self, batch: Sequence[tuple[Shown, Opened]], counts: Counter[str]) -> list[dict[str, Any]]:
        """What is written of a batch, and `counts` of it."""
        seen: list[tuple[Shown, Opened]] = []
        for shown, opened in batch:
            if opened.problem:
                why = self.lost(shown.name, opened.problem)
                self.first_lost = self.first_lost or why
                counts["skipped"] += 1
            else:
                seen.append((shown, opened))
        if not seen:
            return []
        names = [shown.name for shown, _ in seen]
        made = self.describer(stack([opened.pixels for _, opened in seen if opened.pixels is not None]), names)
        counts["described"] += len(seen)
        if self.judge is None:
            return [{"image": self.called(name), "caption": caption} for name, caption in zip(names, made, strict=True)]
        captions: list[list[tuple[str, str]]] = []
        for (shown, _), caption in zip(seen, made, strict=True):
            given = shown.captions if isinstance(shown.captions, list) else []
            if isinstance(shown.captions, BadInput):
                self.lost(shown.name, shown.captions, "the captions of ")
                counts["unreadable_captions"] += 1
            captions.append([(MADE, caption), *((GIVEN, text) for text in given)])
        scores = self.judge(
            stack([opened.judged for _, opened in seen if opened.judged is not None]), [[text for _, text in own] for own in captions]
        )
        rows = []
        for name, own, found in zip(names, captions, scores, strict=True):
            for (origin, text), score in zip(own, found, strict=True):
                fits = float(score) >= self.judge.threshold
                counts[f"{'kept' if fits else 'dropped'}_{origin}"] += 1
                if fits:
                    rows.append({"image": self.called(name), "caption": text, "origin": origin, self.judge.score: round(float(score), 4)})
        return rows

    def called(self, name: str) -> str:
        """A picture as a row names it: relative to the file that the row stands in, so that the file is read as data."""
        return os.path.relpath(name, self.out.parent) if self.out and not os.path.isabs(name) else name

    def lost(self, name: str, error: BadInput, what: str = "") -> str:
        """Why `what` of a picture is left out; the first few are said."""
        why = f"{what}{name}: {(error.why or error.what).removeprefix(f'{name}: ')}"
        self.told[what] += 1
        if self.told[what] <= SHOWN:
            say(f"predict: left out {why}")
        return why

    def check(self, pictures: Unlabelled, lines: GrowingLines | Kept) -> None:
        """Say what was left out; :class:`BadInput` where that is all."""
        counts = lines.counts
        if not counts["described"]:
            if isinstance(lines, GrowingLines):
                lines.discard()  # nothing to go on from
            raise BadInput(
                f"none of {len(pictures):,} pictures can be read", f"the first, {self.first_lost}", "give pictures, e.g. PNG or JPEG"
            )
        if counts["skipped"]:
            say(f"predict: {counts['skipped']:,} of {len(pictures):,} pictures cannot be read and were left out")
        if counts["unreadable_captions"]:
            say(f"predict: the captions that {counts['unreadable_captions']:,} pictures came with cannot be read and were left out")
        if self.judge:
            for remark in of_read(self.judge.texts):
                say(f"predict: filter: {remark}")

    def summary(self, lines: GrowingLines | Kept) -> dict[str, Any]:
        counts = lines.counts
        found: dict[str, Any] = {"manner": self.describer.manner.said, "described": counts["described"], "skipped": counts["skipped"]}
        if self.judge:
            found |= {fate: {origin: counts[f"{fate}_{origin}"] for origin in (MADE, GIVEN)} for fate in ("kept", "dropped")}
        return found


def digest(loaded: Loaded) -> str:
    """What tells one checkpoint from another."""
    file = loaded.path / MANIFEST
    return sha256(file) if file.is_file() else hashlib.sha256(str(loaded.path).encode()).hexdigest()
