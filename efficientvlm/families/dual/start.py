"""A dual encoder out of two: the texts of a teacher, and a backbone of transformers for the images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.clip.config import SiglipTexts
from efficientvlm.families.dual.backbones import BACKBONES, CLS, POOLER
from efficientvlm.families.dual.config import DualConfig, DualSiglipConfig
from efficientvlm.families.dual.family import filled, images_of
from efficientvlm.families.dual.network import MODELS, TOWER
from efficientvlm.families.headers import header_shapes
from efficientvlm.families.loading import image_statistics, open_config, read_json
from efficientvlm.families.weights import read_folder

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESSORS = {"vit": "ViTImageProcessor"}
BESIDE = ("classifier.", "head.", "decoder.", "embeddings.mask_token")
"""What names of tensors begin with that a backbone's folder has for its own task."""
NEW = "visual_projection."


def with_backbone(teacher: Any, folder: Path, image_size: int | None = None, *, values: bool = True, seed: int = 0) -> Any:
    """A network with the texts of `teacher` and the images of the backbone in `folder`, projected to the width of the teacher's features.

    The projection is fresh. Images are of the size that the teacher reads unless another is asked for; the backbone's tables are resampled.

    Args:
        teacher: a CLIP, SigLIP or dual encoder.
        folder: of a ViT, DINOv2, Swin or ConvNeXt of transformers, with or without the head of a task.
        values: False gives a network on the meta device; no weight file is read but for its header.
        seed: of what is drawn.

    Raises:
        BadInput: the folder holds something else, or something that is not followed; a teacher without texts that are embedded alone.
    """
    config, needed = backbone_config(teacher.config, folder)
    wanted = image_size or teacher.config.sizes().image_size
    resized = config.with_images(wanted, None)
    if not values:
        with torch.device("meta"):
            return MODELS[type(resized)](resized).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[type(config)](config)
    texts = {
        name: tensor for name, tensor in teacher.state_dict().items() if name in model.state_dict() and not name.startswith((TOWER, NEW))
    }
    found = _below(read_folder(folder), needed)
    images, left = images_of(model, found)
    strangers = [name for name in left if not name.startswith((*BESIDE, "pooler."))]
    return filled(model, texts | images, strangers, folder, fresh=(NEW,)).for_images(wanted, None)


def backbone_config(teacher: Any, folder: Path) -> tuple[Any, str]:
    """Configuration of :func:`with_backbone`, of the backbone's own images; and what names in its files begin with."""
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{folder} is not a model folder", "it has no config.json", "give the folder of a backbone in transformers' format")
    written = read_json(file)
    kind = BACKBONES.get(str(written.get("model_type")))
    if kind is None:
        why = f"its model_type is {shorten(written.get('model_type'))}"
        raise BadInput(f"{folder} is not a backbone that is known", why, f"give one of {', '.join(BACKBONES)}")
    if not hasattr(teacher, "text_config") or "embed" not in teacher.abilities() or not hasattr(teacher, "stock"):
        why = f"a {teacher.model_type} has no texts that are embedded alone"
        raise BadInput("the teacher's texts cannot be taken", why, "give a CLIP, a SigLIP or a dual encoder")
    part = kind.check(open_config(kind.config_class, written, file), str(file))
    shapes, prefix = header_shapes(folder), f"{written['model_type']}."
    prefix = prefix if any(name.startswith(prefix) for name in shapes) else ""
    pools = shapes.get(f"{prefix}pooler.dense.weight") == (part.hidden_size,) * 2 if kind.pooling == POOLER else False
    pools = pools and part.pooler_act == "tanh"
    mean, std = image_statistics(folder, {}, IMAGENET, PROCESSORS.get(str(written["model_type"]), "BitImageProcessor")).values()
    values: dict[str, Any] = {
        "vision_config": part,
        "text_config": teacher.copy().text_config,
        "projection_dim": teacher.feature_width,
        "image_mean": mean,
        "image_std": std,
        "image_pooling": kind.pooling if pools or kind.pooling != POOLER else CLS,
        **{name: _texts(getattr(teacher, name)) for name in ("kept", "head_source")},
        **{name: getattr(teacher, name) for name in ("max_tokens",)},
    }
    return (DualSiglipConfig if isinstance(teacher, SiglipTexts) else DualConfig)(**values), prefix


def _texts(named: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `named` says of groups of texts."""
    return {group: found for group, found in (named or {}).items() if group.startswith("text.")} or None


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
