"""A finished checkpoint in memory, and how its texts and pictures are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efficientvlm import families
from efficientvlm.checkpoints import files
from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.checkpoints.store import IMAGES
from efficientvlm.data.preprocessing import FILE, Preprocessing
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import guarded, load_tokenizer, require_ids
from efficientvlm.errors import BadInput
from efficientvlm.families import loading
from efficientvlm.families.image_settings import default_settings, preprocessing_of
from efficientvlm.families.onnx.description import is_exported
from efficientvlm.families.onnx.family import Exported
from efficientvlm.families.structure import Described, Sizes

SHORTEST = 3  # first and last token, and one between them


@dataclass
class Loaded:
    """A finished checkpoint in memory."""

    path: Path
    family: Any
    model: Any
    """A :class:`families.network.Network` that is a module of torch, or what stands for one, an `Askable`; of the abilities it says."""
    tokenizer: Any
    manifest: Manifest

    @property
    def config(self) -> Described:
        config: Described = self.model.config
        return config

    @property
    def sizes(self) -> Sizes:
        return self.config.sizes()

    @property
    def image_processor(self) -> dict[str, Any] | None:
        """The settings in its `preprocessor_config.json`, which what is made of it keeps."""
        return loading.image_processor(self.path)

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become what it reads; :class:`BadInput` if its files contradict one another, or say what is not followed here."""
        return preprocessing_of(self.image_processor, self.sizes, self.path)

    @property
    def abilities(self) -> frozenset[str]:
        """What it can do as it is; see `families.network.ABILITIES`."""
        return self.config.abilities()


@dataclass
class Resized(Loaded):
    """A checkpoint whose network was made for images of another size, which are squeezed to a square of it."""

    @property
    def image_processor(self) -> dict[str, Any] | None:
        return default_settings(self.sizes)


def resized(loaded: Loaded, image_size: int | None) -> Loaded:
    """`loaded` for images of `image_size` pixels on a side; None: as it is.

    Raises:
        BadInput: its family does not say how, or its images are not squeezed to a square.
    """
    if image_size in (None, loaded.sizes.image_size):
        return loaded
    if loaded.preprocessing != Preprocessing.squash(loaded.sizes.image_size):
        why = f"{FILE} in {loaded.path} resizes or crops them in a way of its own"
        raise BadInput(f"image_size is {image_size}", why, "leave it out, or use a model whose images are squeezed to a square")
    return Resized(loaded.path, loaded.family, loaded.model.resized(image_size), loaded.tokenizer, loaded.manifest)


def load(spec: str, *, weights: bool = True, exported: bool = False) -> Loaded:
    """The checkpoint `spec` names, checked against its manifest.

    Args:
        weights: False gives a model on the meta device, of the shapes in `config.json`; no weight file is opened.
        exported: whether a folder of ONNX graphs will do: it can be asked and measured, and nothing else.

    Raises:
        BadInput: an unfinished or damaged folder, or a tokenizer that does not fit the model.
    """
    manifest = checkpoint.require_complete(spec)
    path = files.resolve(spec)
    family = Exported() if exported and is_exported(path) else families.of_folder(path)
    model = family.load(path) if weights else shapes(family, family.read_config(path))
    tokenizer = load_tokenizer(path)
    require_ids(tokenizer, model.config.sizes().vocab_size, path)
    return Loaded(path, family, model, tokenizer, manifest)


def shapes(family: Any, config: Any) -> Any:
    """A model of the shapes in `config` on the meta device, which holds no values and takes no memory."""
    with torch.device("meta"):
        return family.build(config).eval()


def check_precision(loaded: Loaded, precision: str) -> None:
    """:class:`BadInput` where another precision is asked of ONNX graphs than fp32, which stands for their own."""
    if is_exported(loaded.path) and precision != "fp32":
        raise BadInput(f"{loaded.path} does not run in {precision}", "ONNX graphs compute in their own precision", "leave --precision out")


def texts_of(loaded: Loaded, max_tokens: int | None = None) -> Texts:
    """Texts as token ids for this model, at most as long as :func:`text_length` says."""
    return Texts(loaded.tokenizer, text_length(loaded, max_tokens))


def read_as(loaded: Loaded, side: str, max_tokens: int | None = None) -> str:
    """In what form a network reads `images`, or `sentences` of at most `max_tokens`, so that what was kept of it can be compared."""
    return repr(loaded.preprocessing) if side == IMAGES else f"at most {texts_of(loaded, max_tokens).max_tokens} tokens"


def text_length(loaded: Loaded, asked: int | None = None) -> int:
    """Tokens of the longest text, its first and last included: as asked, as the model was tuned, as is usual, or all positions.

    Raises:
        BadInput: more are asked for than it has positions.
    """
    positions, config, manifest = loaded.sizes.max_positions, loaded.config, loaded.manifest
    if asked is not None and asked > positions:
        raise BadInput(f"max_tokens {asked}", f"{loaded.path} has {positions} positions for tokens", f"use at most {positions}")
    tuned = config.max_tokens or manifest.noted("max_tokens", int | None, None)
    return max(SHORTEST, min(asked or tuned or getattr(config, "usual_tokens", None) or positions, positions))


def decoded(loaded: Loaded, texts: Texts, ids: list[int]) -> str:
    """Generated tokens as text; an unknown one is shown, so that what is left is not taken for what was said."""
    left_out = texts.special - {texts.unknown}
    with guarded(f"the tokenizer in {loaded.path}", "check it with `evlm verify`"):
        return str(loaded.tokenizer.decode([token for token in ids if token not in left_out])).strip()


def keep_length(loaded: Loaded, asked: int | None) -> None:
    """Note in the model's configuration how long the texts are that it reads from now on, in what is written of it too."""
    loaded.config.max_tokens = text_length(loaded, asked)


def longest(loaded: Loaded, texts: list[str], most: int) -> int:
    """Tokens of the longest of `texts` with its ends, at most `most`."""
    read = texts_of(loaded, most)
    return int(read.batch(texts)[0].shape[1]) if texts else 2
