"""Opens data by name: `easy-vqa`, `shapes[:key=value,...]`, or a path to the user's own."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from efficientvlm.data.items import Item, PairItem, Source, VQAItem
from efficientvlm.errors import BadInput

SPLITS = ("train", "val", "test")
BUILT_IN = ("easy-vqa", "shapes")


def open_vqa(
    spec: str,
    split: str,
    *,
    columns: Mapping[str, str] | None = None,
    val_fraction: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Source[VQAItem]:
    """Images with their questions.

    Args:
        spec: `easy-vqa`, `shapes[:key=value,...]`, or a JSONL or parquet file or a folder.
        split: train, val or test; without a validation file of its own, val is `val_fraction` of the training images, always the same ones.
        columns: role → column of the user's own data.
        limit: at most so many images, drawn with `seed` where the order of the data may mean something.
        image_size: side of the square images; by default 64 for the built-in data, the images' own size otherwise.

    Raises:
        BadInput: unknown data, an unreadable file, a missing column.
    """
    _check(spec, split)
    if spec == "easy-vqa":
        from efficientvlm.data.easy_vqa import EasyVQA

        return EasyVQA(split, val_fraction=val_fraction, limit=limit, image_size=image_size)
    if spec.partition(":")[0] == "shapes":
        from efficientvlm.data.shapes import Shapes

        return _first(Shapes(VQAItem, split, image_size=image_size, spec=spec), limit)
    if not os.path.exists(spec):
        raise _unknown(spec)
    from efficientvlm.data.files import FileVQA

    return FileVQA(spec, split, columns=columns, val_fraction=val_fraction, limit=limit, seed=seed, image_size=image_size)


def open_pairs(
    spec: str,
    split: str,
    *,
    columns: Mapping[str, str] | None = None,
    val_fraction: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
) -> Source[PairItem]:
    """Images with captions and, where the data has them, described regions; arguments as in :func:`open_vqa`.

    Raises:
        BadInput: unknown data, data without captions, an unreadable file, a missing column.
    """
    _check(spec, split)
    if spec == "easy-vqa":
        raise BadInput("data easy-vqa", "it has questions but no captions", "use shapes, or image-text pairs of your own")
    if spec.partition(":")[0] == "shapes":
        from efficientvlm.data.shapes import Shapes

        return _first(Shapes(PairItem, split, image_size=image_size, spec=spec), limit)
    if not os.path.exists(spec):
        raise _unknown(spec)
    from efficientvlm.data.files import FilePairs

    return FilePairs(spec, split, columns=columns, val_fraction=val_fraction, limit=limit, seed=seed, image_size=image_size)


class Subset(Source[Item]):
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: Source[Item], indices: list[int] | range) -> None:
        self.source, self.indices = source, indices

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def licence(self) -> str:
        return self.source.licence

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[self.indices[index]]

    def texts(self) -> Iterator[str]:
        return self.source.texts()

    def answers(self) -> Iterator[tuple[str, float]]:
        """Those of the whole source, like its texts."""
        source: Any = self.source
        return source.answers()


def texts(source: Source[Any]) -> Iterator[str]:
    """Every string of `source` for training a tokenizer, without decoding an image; of `shapes` a sample of 5,000 scenes."""
    return source.texts()


def record(source: Source[Any], split: str) -> dict[str, Any]:
    """What the manifest says about a source: name, split, count of images, fingerprint, licence."""
    return {"name": source.name, "split": split, "count": len(source), "fingerprint": source.fingerprint, "licence": source.licence}


def _first(source: Source[Item], limit: int | None) -> Source[Item]:
    return source if limit is None or limit >= len(source) else Subset(source, range(limit))


def _check(spec: str, split: str) -> None:
    if split not in SPLITS:
        raise BadInput(f"there is no split {split}", "", f"use {', '.join(SPLITS)}")
    if not spec:
        raise BadInput("no data given", "", f"--data takes {', '.join(BUILT_IN)} or a path")


def check_spec(spec: str) -> None:
    """:class:`BadInput` if `spec` is neither built-in data nor a path that exists; nothing is read."""
    if spec.partition(":")[0] not in BUILT_IN and not Path(spec).expanduser().exists():
        raise _unknown(spec)


def _unknown(spec: str) -> BadInput:
    near = difflib.get_close_matches(spec.partition(":")[0], BUILT_IN, n=1, cutoff=0.5)
    known = "built-in are easy-vqa and shapes[:key=value,...]; own data is a .jsonl or .parquet file or a folder"
    return BadInput(f"no data called {spec}", f"there is no such file or folder{f'; did you mean {near[0]}?' if near else ''}", known)
