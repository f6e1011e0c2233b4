"""Pictures that are to be described: files, those in folders and those in tar shards, read one after another in an order that stays."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from efficientvlm.data.folders import Found, note, sidecar, walk
from efficientvlm.data.images import PICTURES
from efficientvlm.data.kinds.pairs import PAIRS, captions_of
from efficientvlm.data.skips import Skips
from efficientvlm.data.tar import TEXTS, Place, picture_column, read_at, read_index, row_of, samples
from efficientvlm.data.text_tables import opened
from efficientvlm.errors import BadInput, number_of

T = TypeVar("T")
THREADS = 4


class Shown(NamedTuple):
    """A picture: its name, where it is or its bytes or why there is none, and captions that it came with or why they cannot be read."""

    name: str
    content: Path | bytes | BadInput
    captions: list[str] | BadInput
    named: bool = False
    """Whether it was named itself, and not the folder or shard it lies in."""


class _Part(Protocol):
    def __len__(self) -> int: ...
    def after(self, start: int) -> Iterator[Shown]: ...


class Unlabelled:
    """Pictures that are named, in folders or tar shards that are, and in shards in those folders; one after another, from any on.

    With `captions`, NAME.txt beside NAME.jpg holds a caption a line, and so do the `.txt` and the usual keys of the `.json` of a sample in
    a shard. A picture `NAME.jpg` of the shard `a.tar` is called `a.tar/NAME.jpg`.
    """

    def __init__(self, names: Sequence[Path], *, captions: bool = False) -> None:
        """
        Raises:
            BadInput: a folder or shard without a picture, or a shard that cannot be read.
        """
        self.remarks: list[str] = []
        self._parts: list[_Part] = []
        for name in names:
            if name.is_dir():
                self._add_folder(name, captions)
            elif name.suffix.lower() == ".tar":
                self._add_shards([name], captions)
            else:
                self._parts.append(_File(name))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def after(self, start: int) -> Iterator[Shown]:
        """All but the first `start`."""
        for part in self._parts:
            if start < len(part):
                yield from part.after(start)
            start = max(0, start - len(part))

    def _add_folder(self, folder: Path, captions: bool) -> None:
        skips = Skips(str(folder))
        found = walk(folder, skips)
        note(found, skips, shards=True)
        if not found.pictures and not found.shards:
            endings = ", ".join(PICTURES)
            raise BadInput(
                f"{folder} holds no picture", f"looked for are files that end in {endings}, or .tar", "give another folder, or pictures"
            )
        self.remarks += [*skips.notes, *(f"left out {what}: {why}" for what, why in skips.reasons.items())]
        if found.pictures:
            self._parts.append(_Folder(found, captions))
        self._add_shards(found.shards, captions)

    def _add_shards(self, paths: Sequence[Path], captions: bool) -> None:
        shards = [_Shard(path, captions) for path in paths]
        self.remarks += [remark for shard in shards for remark in shard.remarks]
        self._parts += shards


@dataclass
class _File:
    path: Path

    def __len__(self) -> int:
        return 1

    def after(self, start: int) -> Iterator[Shown]:
        yield Shown(str(self.path), self.path, [], named=True)


class _Folder:
    def __init__(self, found: Found, captions: bool) -> None:
        self.found, self.captions = found, captions and bool(found.texts)
        self.stems = Counter(path.with_suffix("") for path in found.pictures) if self.captions else Counter[Path]()

    def __len__(self) -> int:
        return len(self.found.pictures)

    def after(self, start: int) -> Iterator[Shown]:
        for path in islice(self.found.pictures, start, None):
            yield Shown(str(path), path, self._beside(path))

    def _beside(self, path: Path) -> list[str] | BadInput:
        if not self.captions or path.with_suffix("") not in self.found.texts:
            return []
        try:
            return sidecar(path, self.found, self.stems)
        except BadInput as error:
            return error


class _Shard:
    """What a shard holds is looked up once for the count and again to be read, so that only one shard is held in memory."""

    def __init__(self, path: Path, captions: bool) -> None:
        self.path, self.captions = path, captions
        index = read_index(path)
        self.count = len(self._with_pictures(index.members))
        self.remarks: list[str] = []
        if not self.count and not index.broken:
            raise BadInput(f"shard {path}", "it holds no picture", "give another shard")
        if index.broken:
            offset, why = index.broken
            self.remarks.append(f"shard {path}: {why} at byte {offset:,}; what follows is lost")
        others = len(samples(index.members)) - self.count
        if others:
            self.remarks.append(f"shard {path}: {number_of(others, 'sample has', 'samples have')} no picture: passed over")

    def __len__(self) -> int:
        return self.count

    def after(self, start: int) -> Iterator[Shown]:
        members = read_index(self.path).members
        with opened(self.path) as file:
            for key, parts in islice(self._with_pictures(members).items(), start, None):
                pictures = {ending: places for ending, places in parts.items() if picture_column(ending)}
                name = f"{self.path}/{key}{next(iter(pictures))}"
                try:
                    found, _ = row_of(file, self.path, key, pictures)
                    if len(found) > 1:
                        raise BadInput(name, f"the sample has {len(found)} pictures", "describe pictures one a sample")
                    (place,) = found.values()
                    content: bytes | BadInput = read_at(file, place)
                except BadInput as error:
                    content = error
                yield Shown(name, content, self._said(parts, key))

    def _said(self, parts: dict[str, list[Place]], key: str) -> list[str] | BadInput:
        if not self.captions or not any(ending in TEXTS for ending in parts):
            return []
        where = f"{self.path} sample {key}"
        try:
            with opened(self.path) as file:
                _, values = row_of(file, self.path, key, parts)
            column = next((name for name in PAIRS.roles["caption"] if values.get(name)), None)
            return captions_of({"caption": values[column]}, where, {"caption": column}) if column else []
        except BadInput as error:
            return error

    @staticmethod
    def _with_pictures(members: list[tuple[str, int, int]]) -> dict[str, dict[str, list[Place]]]:
        return {key: parts for key, parts in samples(members).items() if any(map(picture_column, parts))}


def ahead(items: Iterator[Shown], size: int, prepare: Callable[[Shown], T]) -> Iterator[list[tuple[Shown, T]]]:
    """Batches of `size`, each with what `prepare` makes of them in threads while the batch before is worked on."""
    with ThreadPoolExecutor(THREADS, "pictures") as pool:
        waiting: deque[list[tuple[Shown, Future[T]]]] = deque()
        while True:
            batch = [(item, pool.submit(prepare, item)) for item in islice(items, size)]
            if batch:
                waiting.append(batch)
            if not waiting:
                return
            if len(waiting) > 1 or not batch:
                yield [(item, made.result()) for item, made in waiting.popleft()]
