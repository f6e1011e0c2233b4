"""embed: a teacher's vectors of all images or sentences of some data, once, in a store that is looked up by sample id."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from efficientvlm.checkpoints.files import STATE, write_atomic
from efficientvlm.checkpoints.folder import Output
from efficientvlm.checkpoints.manifest import Cost, DataRecord, Manifest, peak_memory_bytes
from efficientvlm.checkpoints.store import FAMILY, INDEX, SENTENCES, read_shard, shard_name, write_index, write_shard
from efficientvlm.control import Control
from efficientvlm.data.ahead import Ahead, how_many, workers_of
from efficientvlm.data.batch import stack
from efficientvlm.data.kinds.images import IMAGES as PICTURES
from efficientvlm.data.kinds.sentences import SENTENCES as TEXTS
from efficientvlm.data.opening import origin, record, usable
from efficientvlm.data.reading import of_read
from efficientvlm.errors import BadInput, Interrupted, number_of
from efficientvlm.families.network import require
from efficientvlm.loaded import Loaded, load, read_as, texts_of
from efficientvlm.objectives.embedding import width_of
from efficientvlm.runtime import ranks
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.runtime.interrupt import StopFlag, stop_flag
from efficientvlm.runtime.memory import enough_memory
from efficientvlm.runtime.progress import Bar, say, telling
from efficientvlm.selection.rules import Array
from efficientvlm.settings.stages import Embed
from efficientvlm.stages.common import finished, gather_skipped, keep_skipped, list_skipped, making, open_output
from efficientvlm.stages.embedder import Embedder
from efficientvlm.stages.imported import Compared, Import, VectorFile, opened_file
from efficientvlm.stages.workspace import Job, Workspace, inputs_of

WORK = "step-1"
"""Where shards lie until all of them are there; named as the states of a stage are that can be resumed."""
SORTED = 16
"""Batches of sentences that are sorted by length together."""
LISTED = 100
"""Samples without a vector that a manifest names."""
NUMBER = "number "
"""What a shard calls a sample that cannot be read by, before its place."""


@dataclass(frozen=True)
class Embedding(Job):
    """The shapes of the teacher whose vectors of length `width` are stored, or the file in which they are already, or both."""

    teacher: Loaded | None
    file: VectorFile | None
    width: int


def prepare(config: Embed, workspace: Workspace) -> Embedding:
    """What is embedded, and by which network.

    Raises:
        BadInput: a checkpoint that has no vectors of images and texts, data of another kind.
    """
    teacher = workspace.checkpoint(config.model) if config.model else None
    kind = TEXTS if config.side == SENTENCES else PICTURES
    with workspace.checking():
        if teacher:
            texts_of(teacher, config.max_tokens)
            require(teacher.model, "embed")
    file = opened_file(config, kind) if config.vectors else None
    width = width_of(teacher.model) if teacher and "embed" in teacher.abilities else file.width if file else 0
    with workspace.checking():
        if file and file.width != width:
            why = f"those of {config.model} have {width}"
            raise BadInput(f"{config.vectors} holds vectors of {file.width} numbers", why, "give those of this model, or leave --model out")
        if file and ranks.launched() > 1:
            raise BadInput("several processes were started", "an import is the work of one", "start a single process")
    source = workspace.data(config, kind, config.split, teacher.preprocessing if teacher and config.side != SENTENCES else None)
    if not len(source):
        why = "of a single file or folder nothing is held out here" if config.split != "train" else "no sample of it is left"
        raise BadInput(
            f"data {config.data} has no {config.side} in split {config.split}", why, "use --split train, or data with that split"
        )
    read = {"model": config.model, "vectors": config.vectors, "ids": config.ids}
    return Embedding(teacher, file, width, inputs=read, data={"data": source})


def run(config: Embed, control: Control) -> Manifest:
    """Embed every sample that has no vector yet, shard by shard, and write the store.

    Of several processes each makes every so manieth shard; a shard follows from its samples alone, so the files are the same for any number
    of processes and however often the run was stopped.

    Raises:
        BadInput: as :func:`prepare`; more than `max_missing` of the samples have no vector.
        Interrupted: asked to stop; the same command goes on.
    """
    job = prepare(config, Workspace(control.quiet))
    source = job.data["data"]
    output = open_output(config, "embed", control, inputs_of(job))
    if output.up_to_date:
        return finished(output)
    with making(output):
        unusable = source.skips.count if hasattr(source, "skips") else 0
        keep_skipped(output, {config.split: source}, control.quiet)
        if job.file:
            taken = take_over(config, control, job, output)
            return gather(config, control, job, output, taken.lost, taken.remarks)
        ranks.together(partial(work, config, control, job, output))
        gather_skipped({config.split: source})

        def lost(keys: Array) -> int:
            return len(source) - len(keys) + unusable  # equal sentences have one key

        return ranks.on_main(partial(gather, config, control, job, output, lost), Manifest.model_validate)


def shards_of(config: Embed, source: Any) -> list[range]:
    """The samples of every shard."""
    return [range(start, min(len(source), start + config.shard_size)) for start in range(0, len(source), config.shard_size)]


def take_over(config: Embed, control: Control, job: Embedding, output: Output) -> Import:
    """Make the shards that are not there from a file, in its order, and compare some vectors with those of the model, if one is given.

    Raises:
        BadInput: rows that do not fit together or to the data, or vectors of another model.
    """
    folder = output.working(WORK)
    try:
        return _taken_over(config, control, job, folder)
    except BadInput:  # there is nothing to go on from
        shutil.rmtree(folder)
        raise


def _taken_over(config: Embed, control: Control, job: Embedding, folder: Path) -> Import:
    assert job.file and config.vectors
    source = job.data["data"]
    with telling(f"comparing {config.vectors} with the data", quiet=control.quiet):
        taken = Import(config, job.file, source)
    compared = Compared({})
    if config.model:
        embedder = Embedder(load(config.model), pick_device(config.device), precision=config.precision, max_tokens=config.max_tokens)
        compared = taken.compared(Shards(config, embedder, source, folder))
    began = time.monotonic()
    with stop_flag() as stop, Bar("embed", job.file.count, quiet=control.quiet) as bar:
        for number, (ids, vectors, missing) in enumerate(taken.shards(config.shard_size)):
            if stop.requested:
                raise stopped(folder)
            compared.look_at(ids, vectors)
            if not (folder / shard_name(number)).exists():
                keep(folder, number, began, ids, vectors, missing)
            began = time.monotonic()
            bar.update(min(job.file.count, (number + 1) * config.shard_size))
    taken.remarks += [compared.told(config.vectors, config.model)] if config.model else []
    for remark in taken.remarks:
        say(f"embed: {remark}", quiet=control.quiet)
    return taken


def whole(path: Path, quiet: bool) -> bool:
    """Whether a shard of an earlier run is there; one that was damaged since is said and removed."""
    if not path.exists():
        return False
    try:
        read_shard(path)
    except BadInput as error:
        say(f"embed: {error.what} ({error.why}): it is made again", quiet=quiet)
        path.unlink()
        return False
    return True


def keep(folder: Path, number: int, began: float, ids: list[str], vectors: Any, missing: dict[str, str]) -> None:
    """Write a shard that was `began` at that time; from now on there is something to go on from. Its bytes do not say how long it took."""
    write_atomic(folder / spent_name(number), f"{time.monotonic() - began:.3f}\n".encode())
    write_shard(folder / shard_name(number), ids, vectors, missing)
    write_atomic(folder / "state.json", b"{}\n")


def spent_name(number: int) -> str:
    """File of the seconds that a shard took."""
    return f"{shard_name(number)}.seconds"


def stopped(folder: Path) -> BaseException:
    """What a run raises that was asked to stop: there is something to go on from, or nothing yet. Several processes stop together."""
    if ranks.launched() == 1 and not (folder / "state.json").exists():
        return KeyboardInterrupt()
    return Interrupted("stopped", "shards that are finished are kept", "run the same command again")


def work(config: Embed, control: Control, job: Embedding, output: Output) -> None:
    """Make the shards of this process that are not there."""
    source, folder = job.data["data"], output.path / STATE / WORK
    folder.mkdir(exist_ok=True)
    share = list(enumerate(shards_of(config, source)))[ranks.rank() :: ranks.launched()]
    lacking = [(number, samples) for number, samples in share if not whole(folder / shard_name(number), control.quiet)]
    device = pick_device(config.device)
    source.workers = how_many(config.workers, device)
    embedder = Embedder(load(str(config.model)), device, precision=config.precision, max_tokens=config.max_tokens)
    shards = Shards(config, embedder, source, folder)
    total = sum(len(samples) for _, samples in share)
    done = total - sum(len(samples) for _, samples in lacking)
    lower = f"lower batch_size (now {config.batch_size})"
    with stop_flag() as stop, Bar("embed", total, start=done, quiet=control.quiet) as bar, enough_memory("embed", lower):
        for number, samples in lacking:
            began = time.monotonic()
            ids, vectors, missing = shards.shard(samples, bar, done, stop)
            done += len(samples)
            keep(folder, number, began, ids, vectors, missing)
    remarks = of_read(embedder.texts)
    if remarks and len(lacking) < len(share):
        remarks.append(f"that is of the {number_of(sum(len(samples) for _, samples in lacking), 'sample')} that were left to do")
    for remark in remarks:
        say(f"embed: {remark}", quiet=control.quiet)


class Shards:
    """Makes the shards of a store, by a network."""

    def __init__(self, config: Embed, embedder: Embedder, source: Any, folder: Path) -> None:
        self.config, self.source, self.embedder, self.folder = config, source, embedder, folder

    def shard(self, samples: range, bar: Bar, done: int, stop: StopFlag) -> tuple[list[str], Any, dict[str, str]]:
        """Ids, vectors [N, E] and what is missing of `samples`, before which `done` are finished.

        Raises:
            Interrupted, KeyboardInterrupt: as :func:`stopped`, asked to stop before the next batch.
        """
        ids: list[str] = []
        found: list[Any] = [np.zeros((0, width_of(self.embedder.model)), np.float16)]
        missing: dict[str, str] = {}
        size = self.config.batch_size * (SORTED if self.config.side == SENTENCES else 1)
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        with Ahead(self.read, batches, workers_of(self.source)) as read:
            for numbers, (names, content, lost) in zip(batches, read, strict=True):
                if stop.requested:
                    raise stopped(self.folder)
                missing |= dict.fromkeys(map(str, lost), "it cannot be read")
                if names:
                    vectors = self.embed(content).astype(np.float16)
                    finite = np.isfinite(vectors).all(1) & (vectors != 0).any(1)
                    missing |= {name: "its vector is not finite" for name, good in zip(names, finite, strict=True) if not good}
                    ids += [name for name, good in zip(names, finite, strict=True) if good]
                    found.append(vectors[finite])
                done += len(numbers)
                bar.update(done)
        return ids, np.concatenate(found), missing

    def read(self, numbers: range) -> tuple[list[str], Any, list[str]]:
        """Ids and pictures (uint8 [B, 3, H, W]) or texts of the samples that can be read, and the numbers of the others."""
        items, lost = usable(self.source, numbers), []
        if len(items) < len(numbers):  # a sample that cannot be read is counted once, however often it is met
            lost = [f"{NUMBER}{number}" for number in numbers if not usable(self.source, [number])]
        names = [item.id for item in items]
        if self.config.side == SENTENCES:
            return names, [item.text for item in items], lost
        return names, stack([item.image for item in items]) if items else None, lost

    def embed(self, content: Any) -> Any:
        """Unit vectors [B, E] of what was read."""
        if self.config.side == SENTENCES:
            return self.embedder.sentences(content, self.config.batch_size)
        return self.embedder.images(content)


def check_missing(config: Embed, output: Output, lost: int, found: int, missing: dict[str, str]) -> None:
    """:class:`BadInput` if no sample has a vector, or too many have none; what was made is kept."""
    first = "; the first: " + ": ".join(next(iter(missing.items()))) if missing else ""
    if not found:
        raise BadInput(f"none of {lost:,} {config.side} has a vector", first.removeprefix("; ") or "none can be read", "mend the data")
    if lost > config.max_missing * (found + lost):
        share = lost / (found + lost)
        why = f"that is {share:.2%}, at most {config.max_missing:.2%} may be missing{first}"
        fix = f"mend the data, or allow it with --set max_missing={min(1.0, round(share + 0.01, 2))}: nothing is embedded again"
        raise BadInput(f"{lost:,} of {found + lost:,} {config.side} have no vector", why, fix)


def gather(
    config: Embed, control: Control, job: Embedding, output: Output, lost_of: Callable[[Array], int], remarks: Sequence[str] = ()
) -> Manifest:
    """Put the shards of all processes together: the index, and the manifest last.

    Args:
        lost_of: of the keys of all vectors how many samples have none.
        remarks: on how vectors and samples were brought together.

    Raises:
        BadInput: too many samples have no vector. What was made is kept.
    """
    source, folder = job.data["data"], output.path / STATE / WORK
    count = -(-(job.file.count if job.file else len(source)) // config.shard_size)
    names = [shard_name(number) for number in range(count)]
    shards = [read_shard(folder / name) for name in names]
    missing = {what: why for shard in shards for what, why in shard.missing.items()}
    keys = np.concatenate([np.zeros(0, np.uint64), *(shard.keys for shard in shards)])
    found, lost = len(keys), lost_of(keys)
    numbered = [what for what in missing if what.startswith(NUMBER)]
    reasons = getattr(getattr(source, "skips", None), "reasons", {})
    if numbered and len(reasons) >= len(numbered):  # else they were read by a run that was stopped, whose names are in `skipped.jsonl`
        missing = reasons | {what: why for what, why in missing.items() if what not in numbered}
    list_skipped(output, {config.split: source}, control.quiet)
    check_missing(config, output, lost, found, missing)
    for name in names:
        os.link(folder / name, output.staging / name)
    write_index(output.staging / INDEX, shards)
    extra = {
        "side": config.side,
        "width": job.width,
        "count": found,
        "missing": lost,
        "missing_samples": dict(list(missing.items())[:LISTED]),
        "origin": origin(source),
        "preprocessing": read_as(job.teacher, config.side, config.max_tokens) if job.teacher and not job.file else "",
        "rows": [len(shard.keys) for shard in shards],
    }
    said = record(source, config.split)
    data = [DataRecord(**said | {"read_as": [*said["read_as"], *remarks]})]
    spent = [float(path.read_text("ascii")) for path in (folder / spent_name(number) for number in range(count)) if path.exists()]
    cost = Cost(seconds=round(sum(spent), 3), samples=found, peak_memory_bytes=peak_memory_bytes())
    manifest = output.manifest(family=FAMILY, data=data, cost=cost, extra=extra)
    done = output.commit(manifest)
    without = f", {number_of(lost, 'sample has', 'samples have')} none" if lost else ""
    say(f"embed: wrote {output.path} · {number_of(found, 'vector')} of {extra['width']} numbers{without}", quiet=control.quiet)
    return done
