"""Data of the Hugging Face hub, through the `datasets` library: `hub:owner/name[:configuration]`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from efficientvlm.data.splits import by_split, only
from efficientvlm.data.tables import SavedTable, digest_of, one_line
from efficientvlm.errors import BadInput, shorten

PREFIX = "hub:"


class HubTable(SavedTable):
    """One split, downloaded into the cache of `datasets` when it is not there yet."""

    def __init__(self, spec: str, split: str) -> None:
        self.spec, self.split, self.path, self.base = spec, split, Path(spec), Path()
        self._keep(load(spec, split))

    def where(self, row: int) -> str:
        return f"{self.spec} {self.split} row {row}"

    @property
    def _files(self) -> list[Path]:
        return [Path(entry["filename"]) for entry in self._data.cache_files]

    @cached_property
    def digest(self) -> str:
        """Of the files in the cache of `datasets` or, where it keeps none, of the fingerprint that it gives the data."""
        if self._files:
            return digest_of(self._files)
        return hashlib.sha256(str(self._data._fingerprint).encode()).hexdigest()


def open_hub(spec: str, split: str) -> tuple[HubTable, bool]:
    """The rows of one split, and whether the caller must hold out its validation part.

    Raises:
        BadInput: no such data, not reachable, or without the split.
    """
    found = by_split(splits(spec))
    wanted = split if split in found else "train" if split == "val" and "train" in found else ""
    if not wanted:
        have = ", ".join(name for names in found.values() for name in names)
        raise BadInput(f"data {spec} has no split {split}", f"it has {shorten(have) or 'none that is known'}", "use another split")
    return HubTable(spec, only(found[wanted], found[wanted], spec, wanted)), wanted == "train" and "val" not in found


def splits(spec: str) -> list[str]:
    """Names of the splits of `hub:owner/name[:configuration]`."""
    import datasets

    name, configuration = _parts(spec)
    try:
        with _few_attempts():
            return list(datasets.get_dataset_split_names(name, configuration))
    except Exception as error:  # noqa: BLE001  the library, its file systems and its network raise what they like
        raise _unreachable(spec, error) from None


def load(spec: str, split: str, *, streaming: bool = False) -> Any:
    """The `datasets` object of one split, by the name the hub has for it."""
    import datasets

    name, configuration = _parts(spec)
    try:
        with _few_attempts():
            return datasets.load_dataset(name, configuration, split=split, streaming=streaming)
    except Exception as error:  # noqa: BLE001  as above
        raise _unreachable(spec, error) from None


@contextmanager
def _few_attempts() -> Iterator[None]:
    """Questions to the hub are asked twice, not six times over half a minute, and without a line for each; downloads go on as ever.

    The library has no setting for it: their number is the default of a keyword.
    """
    from huggingface_hub.utils import http_backoff

    defaults, logger = http_backoff.__kwdefaults__ or {}, logging.getLogger("huggingface_hub")
    before, level = dict(defaults), logger.level
    defaults.update({"max_retries": 1} if "max_retries" in defaults else {})
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        defaults.update(before)
        logger.setLevel(level)


def _parts(spec: str) -> tuple[str, str | None]:
    name, _, configuration = spec.removeprefix(PREFIX).partition(":")
    if not name or name.count("/") > 1 or any(character.isspace() for character in name):
        raise BadInput(f"data {spec}", "it is no name of the hub", "write hub:owner/name or hub:owner/name:configuration")
    return name, configuration or None


def _unreachable(spec: str, error: BaseException) -> BadInput:
    return BadInput(
        f"data {spec} cannot be opened",
        f"{type(error).__name__}: {one_line(error)}",
        "check the name and the network; without network, give the path of a local copy",
    )
