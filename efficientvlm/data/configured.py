"""The data that settings name, as training and measuring read them."""

from __future__ import annotations

from typing import Any

from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.opening import is_built_in, open_data
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.stream import PREFIX as STREAM
from efficientvlm.data.stream import check_settings
from efficientvlm.data.transforms import Crop
from efficientvlm.settings.base import settings_of


def open_split(config: Any, kind: Kind[Any, Any], split: str, image_size: Preprocessing | None) -> Any:
    """The samples of `split`, images prepared as `image_size` says; `val` names a validation file of its own.

    What a stage trains on is prepared for the augmentation that follows.
    """
    if split == "train" and image_size is not None and hasattr(config, "augment"):
        image_size = image_size.for_training(config.augment)
    return open_data(kind, **which(config, split), **settings_of(config, "columns", "limit", "max_bad"), image_size=image_size)


def which(config: Any, split: str) -> dict[str, Any]:
    """What to open for `split`: validation data of its own is read whole, and then nothing is held out of the training data.

    Raises:
        BadInput: a stream to train on, without what a stream cannot give.
    """
    if config.data.startswith(STREAM) and split == "train":
        check_settings(config)
        return {"spec": config.data, "split": split, "seed": config.seed, "shuffle_buffer": config.shuffle_buffer}
    if getattr(config, "val", None):
        return {"spec": config.val, "split": "test"} if split == "val" else {"spec": config.data, "split": split, "val_fraction": 0.0}
    return {"spec": config.data, "split": split, "val_fraction": config.val_fraction}


def augmentation(config: Any) -> dict[str, Any]:
    """How training images are changed, as arguments of a collator; those of a user's own are mirrored only when asked for."""
    mirror = config.mirror if config.mirror is not None else is_built_in(config.data)
    return {"augment_kind": Crop(config.crop_scale) if config.augment == "crop" else config.augment, "mirror": mirror}
