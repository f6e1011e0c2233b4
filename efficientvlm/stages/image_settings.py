"""`preprocessor_config.json`: how images are brought to the form a model reads, kept as it was given through every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efficientvlm.families.base import Sizes

FILE = "preprocessor_config.json"


def default_settings(sizes: Sizes) -> dict[str, Any]:
    """Of a square, bicubically resized, normalised image, as CLIP's processor reads it."""
    size = {"height": sizes.image_size, "width": sizes.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(sizes.image_mean),
        "image_std": list(sizes.image_std),
    }


def fitted(settings: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """`settings` whose images have the size and channel statistics that the model reads; unchanged where they had."""
    changed = dict(settings)
    last = "crop_size" if settings.get("do_center_crop") else "size"
    if _sides(settings.get(last)) not in ([sizes.image_size], [sizes.image_size] * 2):
        for name in ("size", "crop_size"):
            if name in settings or name == last:
                changed[name] = _resized(settings.get(name), sizes.image_size)
    for name, values in (("image_mean", sizes.image_mean), ("image_std", sizes.image_std)):
        if settings.get(name) != list(values):
            changed[name] = list(values)
    return changed


def write_settings(settings: dict[str, Any] | None, sizes: Sizes, folder: Path) -> None:
    """Put `settings`, or the default ones, into `folder`."""
    chosen = default_settings(sizes) if settings is None else fitted(settings, sizes)
    (folder / FILE).write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")


def _sides(size: Any) -> list[Any]:
    """The numbers of a size, which transformers reads as a mapping, as (height, width) or as one number."""
    return list(size.values()) if isinstance(size, dict) else size if isinstance(size, list) else [size]


def _resized(size: Any, side: int) -> Any:
    if isinstance(size, dict) and size:
        return dict.fromkeys(size, side)
    return side if isinstance(size, int) else {"height": side, "width": side}
