"""Captions of many pictures: made, filtered where that is asked, and written bit by bit, so that a run that was stopped goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.growing import GrowingLines
from efficientvlm.data.batch import stack
from efficientvlm.data.images import open_image
from efficientvlm.data.items import Pixels
from efficientvlm.data.reading import of_read
from efficientvlm.data.unlabelled import Shown, Unlabelled
from efficientvlm.errors import BadInput, number_of
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.interrupt import stop_flag
from efficientvlm.runtime.progress import say
from efficientvlm.settings.tasks import CaptionQuestion
from efficientvlm.tasks.describing import EVAL_BATCH, Describer, Manner, captions_file, of_prompt
from efficientvlm.tasks.filtering import Judge
from efficientvlm.tasks.over_pictures import Kept, OverPictures, digest

FEWEST = 4  # pictures between two states
MADE, GIVEN = "made", "given"


class Seen(NamedTuple):
    """A picture as the captioner reads it, and as the filter does."""

    pixels: Pixels
    judged: Pixels | None


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


class Labeller(OverPictures[Seen]):
    """Captions of pictures, batch by batch."""

    def __init__(self, config: CaptionQuestion, describer: Describer, judge: Judge | None, out: Path | None) -> None:
        super().__init__(out, max(FEWEST, min(EVAL_BATCH, describer.at_once)), shown_above=EVAL_BATCH, quiet=config.quiet)
        self.config, self.describer, self.judge = config, describer, judge

    def run(self, named: Sequence[Path]) -> dict[str, Any]:
        """What the captions follow from."""
        loaded, judge = self.describer.loaded, self.judge
        filtering = {"filter": digest(judge.loaded), "threshold": judge.threshold} if judge else {}
        return {"image": [str(name) for name in named], "model": digest(loaded), **self.describer.manner.said, **filtering}

    def noted(self, counts: Counter[str]) -> str:
        return f"{counts['kept_made'] + counts['kept_given']:,} captions kept" if self.judge else ""

    def read(self, shown: Shown, where: str) -> Seen:
        assert not isinstance(shown.content, BadInput)
        how = self.describer.loaded.preprocessing
        pixels = open_image(shown.content, how, where)
        judged = None
        if self.judge:
            same = self.judge.loaded.preprocessing == how
            judged = pixels if same else open_image(shown.content, self.judge.loaded.preprocessing, where)
        return Seen(pixels, judged)

    def made(self, seen: Sequence[tuple[Shown, Seen]], counts: Counter[str]) -> list[dict[str, Any]]:
        names = [shown.name for shown, _ in seen]
        made = self.describer(stack([opened.pixels for _, opened in seen]), names)
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

    def check(self, pictures: Unlabelled, lines: GrowingLines | Kept) -> None:
        super().check(pictures, lines)
        if count := lines.counts["unreadable_captions"]:
            say(f"predict: the captions that {number_of(count, 'picture')} came with cannot be read and were left out")
        if self.judge:
            for remark in of_read(self.judge.texts):
                say(f"predict: filter: {remark}")

    def summary(self, lines: GrowingLines | Kept) -> dict[str, Any]:
        counts = lines.counts
        found: dict[str, Any] = {"manner": self.describer.manner.said, "described": counts["described"], "skipped": counts["skipped"]}
        if self.judge:
            found |= {fate: {origin: counts[f"{fate}_{origin}"] for origin in (MADE, GIVEN)} for fate in ("kept", "dropped")}
        return found
