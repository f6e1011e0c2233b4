"""Stores of embeddings as a plan has them: what their manifests say, or will say. Nothing is looked up: vectors are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints.store import Store


class Known(Store):
    """A store that is there."""

    def vectors(self, ids: Sequence[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(len(ids), self.width), dim=-1)


class Foreseen(Known):
    """A store that an earlier stage will write."""

    made = False

    def __init__(
        self, path: str, *, side: str, width: int, count: int, teacher: str | None, origin: str | None, preprocessing: str
    ) -> None:
        self.path, self.side, self.width, self.count = Path(path), side, width, count
        self.teacher, self.origin, self.preprocessing = teacher, origin, preprocessing

    @property
    def ids(self) -> Any:
        return range(self.count)
