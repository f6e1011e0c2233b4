"""What in the JSON files of a model folder makes other programs run code. Nothing here does, and nothing made here passes it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CODE = {"auto_map", "custom_pipelines", "trust_remote_code", "code_revision", "attn_implementation", "_attn_implementation"}
HARMLESS: tuple[Any, ...] = (None, False, "", "eager", "sdpa", {}, [])


def pointers(value: Any) -> Iterator[str]:
    """Those of :data:`CODE` in `value`, at any depth, that name something."""
    if isinstance(value, dict):
        yield from (name for name in CODE & set(value) if value[name] not in HARMLESS)
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from pointers(part)


def without_code(value: Any) -> Any:
    """`value` without any of :data:`CODE`, at any depth."""
    if isinstance(value, dict):
        return {name: without_code(part) for name, part in value.items() if name not in CODE}
    return [without_code(part) for part in value] if isinstance(value, list) else value
