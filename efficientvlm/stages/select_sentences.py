"""select-sentences: of a pile of sentences those that a teacher finds near to an image, while they stream by."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from efficientvlm.checkpoints.files import resolve, write_atomic
from efficientvlm.checkpoints.manifest import Cost, DataRecord, Manifest, peak_memory_bytes
from efficientvlm.checkpoints.store import IMAGES
from efficientvlm.control import Control
from efficientvlm.data.reading import cut_off, unknown
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.families.network import require
from efficientvlm.loaded import Loaded, load
from efficientvlm.objectives.embedding import width_of
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.runtime.interrupt import StopFlag, stop_flag
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.runtime.progress import Bar, say, telling
from efficientvlm.selection.candidates import Candidates, Offer
from efficientvlm.selection.pile import Pile, is_repeat, repeats
from efficientvlm.selection.rules import Array, Limits, Rules
from efficientvlm.selection.search import Approximate, Exact, Index, Vectors, faiss_package
from efficientvlm.settings.stages import SelectSentences
from efficientvlm.stages.common import finished, making, open_output
from efficientvlm.stages.embedder import Embedder
from efficientvlm.stages.stored import Said, sentence_vectors, stored_vectors
from efficientvlm.stages.workspace import Job, Workspace, inputs_of

SAVE_EVERY = 20.0  # seconds between two states
WRITTEN_AT_ONCE = 65_536
TEXT, TABLE = "sentences.txt", "sentences.parquet"


@dataclass(frozen=True)
class Selecting(Job):
    """What is selected from, and how. `loaded` are the shapes of the teacher, if it embeds sentences here; `said` their vectors, if not.

    `unknown` is what nobody knows of the teachers.
    """

    pile: Pile
    images: Vectors
    loaded: Loaded | None
    said: Said | None
    rules: Rules
    limits: Limits
    approximate: bool
    unknown: list[str]


def prepare(config: SelectSentences, workspace: Workspace) -> Selecting:
    """What is read.

    Raises:
        BadInput: embeddings that cannot be read or do not fit together, a model that compares nothing, a package that is missing.
    """
    pile = Pile(resolve(config.sentences), config.columns.get("sentence"))
    images = stored_vectors(config.images, IMAGES, workspace, workspace.digest(config.model) if config.model else None)
    loaded, said = None, None
    teachers = {config.images: getattr(images, "teacher", None)}
    if config.model:
        loaded = workspace.checkpoint(config.model)
        require(loaded.model, "embed")
        width, whose = width_of(loaded.model), config.model
    else:
        assert config.sentence_vectors is not None
        said = sentence_vectors(config.sentence_vectors, workspace, getattr(images, "teacher", None))
        width, whose = said.width, config.sentence_vectors
        teachers[whose] = said.teacher
    nameless = " and ".join(spec for spec, teacher in teachers.items() if teacher is None)
    told = f"of {nameless} nobody knows the teacher, so nobody knows whether images and sentences lie in one space"
    if width != images.width:
        why = f"those of {config.images} have {images.width} numbers, those of {whose} {width}"
        raise BadInput("images and sentences lie in different spaces", why, "embed both with the same teacher")
    approximate = config.search == "approximate" or (config.search == "auto" and len(images.ids) > config.exact_up_to)
    if approximate:
        faiss_package()
    names = ("min_characters", "max_characters", "min_words", "max_words", "scripts", "script_share")
    limits = Limits(**{name: getattr(config, name) for name in names})
    rules = Rules(config.per_image, config.cap, config.total, config.near, config.reserve)
    read = {"model": config.model, "images": config.images, "sentences": config.sentences, "sentence_vectors": config.sentence_vectors}
    return Selecting(pile, images, loaded, said, rules, limits, approximate, [told] if nameless else [], inputs=read)


def run(config: SelectSentences, control: Control) -> Manifest:
    """Write the sentences that are kept, with the nearest image of each and the cosine with it.

    Raises:
        BadInput: as :func:`prepare`; no sentence is kept; an `out` of another selection.
        Interrupted: asked to stop; the same command goes on.
    """
    job = prepare(config, Workspace(control.quiet))
    output = open_output(config, "select-sentences", control, inputs_of(job))
    if output.up_to_date:
        return finished(output)
    with making(output):
        began = time.monotonic()
        folder = output.working("step-sentences")
        fix = f"lower batch_size (now {config.batch_size}), or search with clusters (--set search=approximate)"
        with enough_memory("the selection", fix):
            selection = Selection(config, job, folder, control.quiet)
            found = selection.work()
            kept = selection.write(output.staging)
        say(f"select-sentences: {told(found)}", quiet=control.quiet)
        for remark in selection.remarks:
            say(f"select-sentences: {remark}", quiet=control.quiet)
        record = DataRecord(
            name=job.pile.path.name,
            split="sentences",
            count=found["read"],
            fingerprint=output.digests["sentences"],
            licence="unknown",
            read_as=selection.remarks,
        )
        manifest = output.manifest(
            family="sentences",
            data=[record],
            metrics={"sentences": found},
            cost=Cost(seconds=round(time.monotonic() - began, 3), samples=found["read"], peak_memory_bytes=peak_memory_bytes()),
            extra={"images": len(job.images.ids), "search": "approximate" if job.approximate else "exact", "columns": list(kept.names)},
        )
        return output.commit(manifest)


def told(found: dict[str, Any]) -> str:
    """What came of it, in a line."""
    dropped = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in found["dropped"].items() if count)
    return f"{found['kept']:,} of {found['read']:,} sentences are kept, near to {found['images']:,} images; dropped: {dropped or 'none'}"


class Selection:
    """The work of one run, which a later one takes up in the same `folder`."""

    def __init__(self, config: SelectSentences, job: Selecting, folder: Path, quiet: bool) -> None:
        self.config, self.job, self.folder, self.quiet = config, job, folder, quiet
        self.remarks: list[str] = list(job.unknown)
        self.total, self.repeats = self._repeats()
        device = pick_device(config.device)
        with telling("preparing the search among images", quiet=quiet):
            self.index: Index = (
                Approximate(job.images, len(job.images.ids), probes=config.probes, kept=folder / "index")
                if job.approximate
                else Exact(job.images, device)
            )
        self.candidates = Candidates(folder, len(job.images.ids), job.images.width, job.rules)
        self.tokens = Counter(self.candidates.beside)
        """What the tokenizer made of the sentences so far, those of a run that was killed among them."""
        self.embed: Embedder | None = None
        if config.model:
            self.embed = Embedder(load(config.model), device, precision=config.precision, max_tokens=config.max_tokens)
        elif job.said and job.said.count not in (None, self.total):
            why = f"it has {job.said.count:,} vectors, {job.pile.path} has {self.total:,} rows"
            raise BadInput(f"{config.sentence_vectors} does not fit", why, "give the embeddings of this very file, a row a sentence")

    def _repeats(self) -> tuple[int, Array]:
        """Rows of the pile, and bits of those that repeat an earlier one."""
        kept = self.folder / "repeats"
        if not kept.is_file():
            with telling(f"looking for repeated sentences in {self.job.pile.path}", quiet=self.quiet):
                count, bits = repeats(self.job.pile, self.job.limits, self.folder / "keys")
            write_atomic(kept, count.to_bytes(8, "little") + bits.tobytes())
        content = kept.read_bytes()
        return int.from_bytes(content[:8], "little"), np.frombuffer(content[8:], np.uint8)

    def work(self) -> dict[str, Any]:
        """Offer every sentence to the candidates, and choose: how many were read and kept, and of how many images; dropped, by reason.

        Raises:
            BadInput: nothing is kept.
            Interrupted: asked to stop.
        """
        counts, total, size = Counter(self.candidates.counts), self.total, self.config.batch_size
        if self.candidates.done:
            say(f"select-sentences: goes on behind the first {self.candidates.done:,} of {total:,} sentences", quiet=self.quiet)
        rows = self.job.pile.sentences(self.candidates.done)
        saved = time.monotonic()
        with Bar("select-sentences", total, start=self.candidates.done, quiet=self.quiet) as bar, stop_flag() as stop:
            for begin in range(self.candidates.done, total, size):
                self.take(begin, list(islice(rows, size)), counts)
                done = min(total, begin + size)
                if done == total or stop.requested or time.monotonic() - saved > SAVE_EVERY:
                    self.candidates.save(done, counts, self.tokens)
                    saved = time.monotonic()
                bar.update(done)
                self._stop(stop, done)
        self._check_missing(counts)
        choice, held = self.candidates.choose()
        self.candidates.close()
        rules = self.job.rules
        looked_at = total - counts.total()
        behind = "not_among_best" if rules.per_image is not None else "over_cap" if rules.cap is not None else "over_total"
        counts += choice.dropped
        counts[behind] += looked_at - len(held.number)
        if not len(choice.kept):
            shutil.rmtree(self.folder)
            why = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items() if count) or "it is empty"
            raise BadInput(f"none of {total:,} sentences is kept", why, "loosen the limits, or give sentences that say what can be seen")
        order = np.sort(choice.kept)  # rows of candidates, which are in the order of the pile
        self.kept = held.number[order], held.best[order], held.score[order]
        if choice.short:
            places = "images" if rules.by_image else "sentences"
            self.remarks.append(
                f"{choice.short:,} {places} fewer than allowed for want of a larger reserve (now {rules.reserve}): "
                "near-duplicates took the places of candidates"
                if not rules.by_image
                else f"{choice.short:,} {places} may have got fewer sentences than there are for them, as near-duplicates "
                f"used up the reserve (now {rules.reserve})"
            )
        if self.embed:
            tokens = self.tokens
            self.remarks += unknown(tokens["read"], tokens["unread"], "that were read")
            self.remarks += cut_off(tokens["cut"], tokens["longest"], self.embed.texts.max_tokens)
        return {"read": total, "kept": len(order), "images": len(np.unique(self.kept[1])), "dropped": dict(sorted(counts.items()))}

    def _check_missing(self, counts: Counter[str]) -> None:
        """:class:`BadInput` if too many sentences cannot be used; what was found is kept."""
        found = {reason: counts[reason] for reason in ("unreadable", "without_vector", "not_finite") if counts[reason]}
        share, most = sum(found.values()) / max(1, self.total), self.config.max_missing
        if share > most:
            what = f"{sum(found.values()):,} of {self.total:,} sentences cannot be used"
            why = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in found.items())
            fix = f"allow it with --set max_missing={min(1.0, math.ceil(100 * share) / 100):g}: nothing is searched again"
            raise BadInput(what, f"{why}; at most {most:.2%} may be", f"mend the file or embed its sentences, or {fix}")

    def _stop(self, stop: StopFlag, done: int) -> None:
        if stop.requested and done < self.total:
            what = f"stopped behind {done:,} of {self.total:,} sentences"
            raise Interrupted(what, f"what was found lies in {self.folder.parent}", "run the same command again")

    def take(self, begin: int, texts: Sequence[str | None], counts: Counter[str]) -> None:
        """Offer the sentences of the rows from `begin` on; those that cannot be candidates are counted."""
        numbers: list[int] = []
        for number, (text, again) in enumerate(zip(texts, is_repeat(self.repeats, begin, len(texts)), strict=True), begin):
            if reason := "unreadable" if text is None else self.job.limits.refusal(text) or ("duplicate" if again else ""):
                counts[reason] += 1
            else:
                numbers.append(number)
        if not numbers:
            return
        at, said = np.array(numbers), [texts[number - begin] or "" for number in numbers]
        if self.embed:
            reader, longest = self.embed.texts, self.tokens["longest"]
            before = Counter(read=reader.read, unread=reader.unread, cut=len(reader.cut))
            vectors = self.embed.sentences(said)
            self.tokens += Counter(read=reader.read, unread=reader.unread, cut=len(reader.cut)) - before
            self.tokens["longest"] = max(longest, reader.longest)
        else:
            assert self.job.said
            vectors, there = self.job.said.of(at, said)
            counts["without_vector"] += int((~there).sum())
            at = at[there]
        if not len(at):
            return
        usable = np.isfinite(vectors).all(1) & (np.abs(vectors).max(1) > 0)
        counts["not_finite"] += int((~usable).sum())
        at, vectors = at[usable], vectors[usable]
        rules, floor = self.job.rules, self.config.min_similarity
        near = self.index.nearest(vectors, rules.per_image, self.candidates.threshold if rules.per_image else None)
        found = near.best >= 0
        counts["not_found"] += int((~found).sum())
        near_enough = found & (near.score >= floor) if floor is not None else found
        counts["dissimilar"] += int((found & ~near_enough).sum())
        if near.pairs is None:
            best, score = near.best[near_enough], near.score[near_enough]
            offer = Offer(at[near_enough], best, score, best, score)
        else:
            row, image, cosine = (column[near_enough[near.pairs[0]]] for column in near.pairs)
            offer = Offer(at[row], image, cosine, near.best[row], near.score[row])
        self.candidates.offer(offer, lambda numbers: vectors[np.searchsorted(at, numbers)])

    def write(self, folder: Path) -> Any:
        """Put the kept sentences into `folder`, as text and with what is known of them; the schema of the table."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        schema = pa.schema({"sentence": pa.string(), "image": pa.string(), "similarity": pa.float32(), "row": pa.int64()})
        numbers, best, score = self.kept
        with (folder / TEXT).open("w", encoding="utf-8", newline="\n") as file, parquet.ParquetWriter(folder / TABLE, schema) as table:
            texts = self._texts(numbers)
            for begin in range(0, len(numbers), WRITTEN_AT_ONCE):
                part = slice(begin, begin + WRITTEN_AT_ONCE)
                some = list(islice(texts, WRITTEN_AT_ONCE))
                file.writelines(f"{text}\n" for text in some)
                names = [str(self.job.images.ids[int(image)]) for image in best[part]]
                table.write_table(pa.table([some, names, score[part], numbers[part]], schema=schema))
        return schema

    def _texts(self, numbers: Array) -> Iterator[str]:
        """The sentences of those rows of the pile, which is read once more."""
        wanted = iter(numbers.tolist())
        following = next(wanted, None)
        for number, text in enumerate(self.job.pile.sentences()):
            if number == following:
                yield str(text)
                following = next(wanted, None)
                if following is None:
                    return
