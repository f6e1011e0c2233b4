"""Seeded draws: every random decision has its own generator, named by what it is for.

A draw depends on (seed, key) only, so it is the same after a resume, in another process and on another machine.
"""

from __future__ import annotations

import hashlib

import numpy as np

Key = str | int


def _digest(seed: int, key: tuple[Key, ...], size: int) -> int:
    parts = [f"{int(seed)}"]
    for part in key:
        parts.append(f"s{part}" if isinstance(part, str) else f"i{int(part)}")
    return int.from_bytes(hashlib.blake2b("\x1f".join(parts).encode("utf-8", "surrogateescape"), digest_size=size).digest(), "little")


def generator(seed: int, *key: Key) -> np.random.Generator:
    """The generator of the draw named `key`, e.g. `generator(seed, step, item.id, "augment")`; a file may have any name, UTF-8 or not."""
    return np.random.Generator(np.random.Philox(key=_digest(seed, key, 16)))


def some_of(count: int, limit: int, seed: int = 0) -> list[int]:
    """`limit` of `count` indices in their order, drawn at random: a smaller limit gives a part of what a larger one does."""
    return sorted(generator(seed, "limit").permutation(count)[:limit].tolist())


def seed_of(seed: int, *key: Key) -> int:
    """A stable 63-bit integer for the draw named `key`, for generators that are not NumPy's."""
    return _digest(seed, key, 8) >> 1
