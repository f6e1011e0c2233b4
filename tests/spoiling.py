"""Damage done to checkpoint folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def edit(folder: Path, part: str | None = None, **changes: Any) -> None:
    """Change entries of `config.json`, or of the mapping `part` in it."""
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values).update(changes)
    (folder / "config.json").write_text(json.dumps(values))


def spoil_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` have the tensors, and write what it leaves."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
