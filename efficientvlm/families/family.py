"""What a family of models is: how its networks are made, opened and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from efficientvlm.families.loading import open_model, read_json

SMALLER: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        **dict.fromkeys(("vision_width", "text_width"), 128),
        **dict.fromkeys(("vision_heads", "text_heads"), 4),
        **dict.fromkeys(("vision_intermediate", "text_intermediate"), 512),
        "vision_layers": 4,
        "text_layers": 2,
        "embed_dim": 64,
        "max_positions": 64,
        "initializer_range": 0.06,
        "dropout": 0.0,
    },
    "small": {
        "image_size": 160,
        **dict.fromkeys(("vision_width", "text_width"), 384),
        **dict.fromkeys(("vision_heads", "text_heads"), 6),
        **dict.fromkeys(("vision_intermediate", "text_intermediate"), 1536),
        "vision_layers": 12,
        "max_positions": 128,
    },
    "base": {},
}
"""What fresh networks of every family that is made at random have in common, by size; base is that of the family."""


class Family:
    """Nothing else in the toolkit branches on the family."""

    name: ClassVar[str]
    models: ClassVar[Mapping[Any, Any]]
    """Configuration → model class of ours, which transformers' Auto classes should know as well."""
    model_types: ClassVar[tuple[str, ...]]
    """Every `model_type` of a `config.json` that this family opens."""
    extra_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that a vocabulary made for this family has besides BERT's five; only families that `init` makes need it."""

    fresh_config: Callable[[str, Mapping[str, Any], int | Mapping[str, int]], Any]
    """Only of a family that `init` makes: the configuration of a new network of a size (tiny, small, base) with changed settings.

    The vocabulary maps tokens to ids, or is just their number where nothing is going to be read. :class:`BadInput` for an unknown setting,
    or sizes that do not fit together.
    """

    towers_config: Callable[[Path, Path, Mapping[str, int], Mapping[str, Any], bool], Any]
    """Only of a family that `init` builds from pretrained towers: the configuration of that network; no weights are read.

    Called with the folders of a tower of images and of a BERT, the vocabulary (token → id), changed settings, and whether vectors of texts
    are to be those of the BERT itself. :class:`BadInput` for towers, a vocabulary or settings that do not fit.
    """

    from_towers: Callable[[Path, Path, Mapping[str, int], Mapping[str, Any], bool], tuple[Any, list[str]]]
    """With the same, which `towers_config` found to fit: the network, and the names of its fresh tensors, drawn from torch's generator."""

    def read_config(self, path: Path) -> Any:
        """The configuration of checkpoint folder `path`, a :class:`structure.Structure`; no weights are read.

        Raises:
            BadInput: what is there is of no network of this family, or its sizes do not fit together.
        """
        raise NotImplementedError

    translate: Callable[[Any], tuple[Any, dict[str, Any]]]
    """Only of a family of published files: configuration and state of the network in a :class:`published.Published`.

    :class:`BadInput` for an entry of unknown meaning, one that is missing or of another shape, or a setting that the file decides.
    """

    def build(self, config: Any) -> Any:
        """A model with fresh weights of the (possibly sliced) shapes in `config`."""
        return self.models[type(config)](config)

    def load(self, path: Path) -> Any:
        """The model in checkpoint folder `path`, in float32, evaluation mode; :class:`BadInput` if weights and sizes do not fit."""
        config = self.read_config(path)
        return open_model(self.models[type(config)], path, config)

    def save(self, model: Any, folder: Path) -> None:
        """Write `config.json` and safetensors weights; with stock class names where transformers' own classes can open them."""
        model.save_pretrained(folder)
        if stock := model.config.opened_by:
            file = folder / "config.json"
            values = read_json(file) | {"model_type": stock[0], "architectures": [stock[1]]}
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
