"""init: a new model, random at a named size, or built from a pretrained vision transformer and a BERT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from efficientvlm import families
from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.control import Control
from efficientvlm.data.opening import open_texts, texts
from efficientvlm.data.tokenizer import load_tokenizer, require_ids, train_wordpiece, with_special
from efficientvlm.errors import BadInput
from efficientvlm.families.towers.vit import Vit
from efficientvlm.loaded import shapes
from efficientvlm.settings.stages import InitConfig
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.workspace import Beginning, Workspace, inputs_of


def run(config: InitConfig, control: Control) -> Manifest:
    """Write a checkpoint of a fresh model with its tokenizer.

    Raises:
        BadInput: neither a size nor towers, towers that do not fit, an unknown setting.
    """
    job = prepare(config, Workspace(control.quiet))
    output = open_output(config, "init", control, inputs_of(job))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        tokenizer = tokenizer_of(config, job.data.get("data"))
        torch.manual_seed(config.seed)
        family, values = blueprint(config, tokenizer.get_vocab())
        if config.size:
            model = family.build(values)
            if config.positions == "sincos":
                place(model)
            origin: dict[str, Any] = {"origin": "random"}
        else:
            model, new = family.from_towers(*towers_of(config), tokenizer.get_vocab(), changed(config), keeps_texts(config))
            origin = {"origin": "imported", "extra": {"new": new}}
        sources = {"train": job.data["data"]} if job.data else {}
        return write(output, family, model, tokenizer, control=control, sources=sources, **origin)


def prepare(config: InitConfig, workspace: Workspace) -> Beginning:
    """What a new model is made of; its tokenizer is not trained before its shapes are asked for."""
    check(config)
    source = text_source(config)

    def network() -> tuple[Any, Any, Any, list[str]]:
        tokenizer = tokenizer_of(config, source)
        family, values = blueprint(config, tokenizer.get_vocab())
        model = shapes(family, values)
        if config.positions == "sincos":
            with torch.device("meta"):
                place(model)
        return family, model, tokenizer, []

    towers = {"vision_from": config.vision_from, "text_from": config.text_from}
    if source is None:
        return Beginning(network, inputs={**towers, "tokenizer": config.tokenizer})
    return Beginning(network, inputs=towers, data={"data": source})


def text_source(config: InitConfig) -> Any:
    """The data that a tokenizer is trained on, if one is."""
    if config.tokenizer != "train":
        return None
    if not config.data:
        raise BadInput("no data to train a tokenizer on", "", "give --data, or --tokenizer DIR")
    return open_texts(config.data, columns=config.columns)


def check(config: InitConfig) -> None:
    """:class:`BadInput` unless `config` says exactly one thing to start from, and its family can."""
    if (config.size is None) == (config.vision_from is None) or (config.vision_from is None) != (config.text_from is None):
        raise BadInput("init needs a size or two towers", "", "give --size tiny, or both --vision-from DIR and --text-from DIR")
    if config.vision_from and not hasattr(families.get(config.family), "from_towers"):
        why = "a vision transformer and a BERT make an X-VLM or a BLIP"
        raise BadInput(f"no {config.family} is built from towers", why, "give --size instead")
    if config.text_from and config.tokenizer == "train":
        why = "BERT's word embeddings belong to its own vocabulary"
        raise BadInput("a BERT cannot be used with a tokenizer trained on the data", why, f"give --tokenizer {config.text_from}")
    if config.positions == "sincos" and not config.size:
        raise BadInput("positions are sincos", "a trained tower of images has learnt its own", "give --size, or leave it out")
    if config.text_projection == "identity" and not config.text_from:
        raise BadInput("text_projection is identity", "random texts have no vectors that are worth keeping", "give --text-from DIR")


def place(model: Any) -> None:
    """Positions of its patches as sines and cosines.

    Raises:
        BadInput: they have none of their own, or a width that four does not divide.
    """
    towers = [module for module in model.modules() if isinstance(module, Vit)]
    if not towers:
        raise BadInput("positions are sincos", "this tower of images knows where a patch lies relative to others only", "leave it out")
    for tower in towers:
        tower.place_()


def changed(config: InitConfig) -> dict[str, Any]:
    """The settings that were asked for."""
    return {**config.settings, **({"image_size": config.image_size} if config.image_size else {})}


def tokenizer_of(config: InitConfig, source: Any) -> Any:
    """The tokenizer, trained on `source` if there is one, with the tokens that the family wants besides."""
    more = families.get(config.family).extra_tokens
    if source is None:
        folder = resolve(config.tokenizer)
        tokenizer = with_special(load_tokenizer(folder, bert=True), more)
        require_ids(tokenizer, len(tokenizer), folder)
        return tokenizer
    return with_special(train_wordpiece(texts(source), config.vocab_size - len(more)), more)


def towers_of(config: InitConfig) -> tuple[Path, Path]:
    """The folders of the tower of images and of BERT."""
    return resolve(config.vision_from or ""), resolve(config.text_from or "")


def keeps_texts(config: InitConfig) -> bool:
    """Whether vectors of texts are to be those of the BERT itself."""
    return config.text_projection == "identity"


def blueprint(config: InitConfig, vocab: Mapping[str, int]) -> tuple[Any, Any]:
    """Family and configuration of the new model; no weights are read.

    Args:
        vocab: token → id.

    Raises:
        BadInput: sizes or towers that do not fit together, an unknown setting.
    """
    family = families.get(config.family)
    if config.size:
        return family, family.fresh_config(config.size, changed(config), vocab)
    return family, family.towers_config(*towers_of(config), vocab, changed(config), keeps_texts(config))
