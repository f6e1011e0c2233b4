"""`preprocessor_config.json`: how images are brought to the form a model reads, kept as it was given through every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efficientvlm.data import preprocessing
from efficientvlm.data.preprocessing import FILE, Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.families.checks import check_channels
from efficientvlm.families.structure import Sizes

CLOSE = 1e-4


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


def preprocessing_of(settings: dict[str, Any] | None, sizes: Sizes, folder: Path, kind: str | None = None) -> Preprocessing:
    """What `settings` of the model in `folder` do, squeezing to a square if there are none.

    Args:
        kind: the class of transformers that reads them where they do not name one.

    Raises:
        BadInput: they are not followed here, or the model reads images of other size or statistics.
    """
    if settings is None:
        return Preprocessing.squash(sizes.image_size)
    where = f"{folder}: {FILE}"
    pairs = zip((sizes.image_mean, sizes.image_std), preprocessing.statistics(settings, where, kind), strict=True)
    for name, (ours, given) in zip(("image_mean", "image_std"), pairs, strict=True):
        check_channels(name, given, where)
        if any(abs(a - b) > CLOSE * max(1, abs(b)) for a, b in zip(ours, given, strict=True)):
            why = f"config.json has {list(ours)}, this {list(given)}, for pixels of 0 to 1"
            raise BadInput(f"{where}: {name} contradicts config.json", why, "make them equal")
    return preprocessing.read(settings, sizes.image_size, where, kind)


def resized_settings(settings: dict[str, Any] | None, before: Sizes, after: Sizes) -> dict[str, Any] | None:
    """`settings` of a network of sizes `before` for one of sizes `after`: every length in proportion, and the statistics of that one."""
    if settings is None:
        return None

    def scaled(size: Any) -> Any:
        if isinstance(size, dict):
            return {name: scaled(value) for name, value in size.items()}
        return max(1, round(size * after.image_size / before.image_size)) if isinstance(size, int) and not isinstance(size, bool) else size

    changed = dict(settings)
    if before.image_size != after.image_size:
        changed |= {name: scaled(settings[name]) for name in ("size", "crop_size") if name in settings}
    if (before.image_mean, before.image_std) != (after.image_mean, after.image_std):
        changed |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        changed |= {"image_mean": list(after.image_mean), "image_std": list(after.image_std)}
    return changed


def write_settings(settings: dict[str, Any] | None, sizes: Sizes, folder: Path) -> None:
    """Put `settings`, or the default ones, into `folder`."""
    chosen = default_settings(sizes) if settings is None else settings
    (folder / FILE).write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
