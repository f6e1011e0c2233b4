"""init: a new X-VLM, random at a named size or built from a CLIP vision tower and a BERT text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from efficientvlm import families
from efficientvlm.checkpoint import require_complete
from efficientvlm.config import InitConfig
from efficientvlm.control import Control
from efficientvlm.data.sources import BUILT_IN, open_pairs, open_vqa, texts
from efficientvlm.data.tokenizer import load_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.xvlm_config import XVLMConfig, check_sizes, checked_settings
from efficientvlm.files import resolve
from efficientvlm.manifest import Manifest
from efficientvlm.stages.common import making, open_output, write

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 64,
        "patch_size": 8,
        **dict.fromkeys(("vision_width", "text_width"), 128),
        **dict.fromkeys(("vision_heads", "text_heads"), 4),
        **dict.fromkeys(("vision_intermediate", "text_intermediate"), 512),
        "vision_layers": 4,
        "text_layers": 2,
        "fusion_layers": 2,
        "local_attention_depth": 2,
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
        "text_layers": 3,
        "fusion_layers": 3,
        "max_positions": 128,
    },
    "base": {},
}


def run(config: InitConfig, control: Control) -> Manifest:
    """Write a checkpoint of a fresh model with its tokenizer.

    Raises:
        BadInput: neither a size nor towers, towers that do not fit, an unknown setting.
    """
    if (config.size is None) == (config.vision_from is None) or (config.vision_from is None) != (config.text_from is None):
        raise BadInput("init needs a size or two towers", "", "give --size tiny, or both --vision-from DIR and --text-from DIR")
    if config.text_from and config.tokenizer == "train":
        why = "BERT's word embeddings belong to its own vocabulary"
        raise BadInput("a BERT cannot be used with a tokenizer trained on the data", why, f"give --tokenizer {config.text_from}")
    inputs = {"vision_from": config.vision_from, "text_from": config.text_from}
    if config.tokenizer != "train":
        inputs["tokenizer"] = config.tokenizer
    source = _source(config)
    output = open_output(config, "init", control, {**inputs, "data": f"sha256:{source.fingerprint}" if source else None})
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        tokenizer = train_wordpiece(texts(source), config.vocab_size) if source else load_tokenizer(resolve(config.tokenizer))
        torch.manual_seed(config.seed)
        family = families.get("xvlm")
        changes = dict(config.settings)
        if config.image_size:
            changes["image_size"] = config.image_size
        if config.size:
            values = {**SIZES[config.size], "vocab_size": len(tokenizer), **checked_settings(changes)}
            model = family.build(check_sizes(XVLMConfig(**values)))
            origin: dict[str, Any] = {"origin": "random"}
        else:
            from efficientvlm.families.xvlm_towers import from_towers

            model, new = from_towers(resolve(config.vision_from or ""), resolve(config.text_from or ""), len(tokenizer), changes)
            origin = {"origin": "imported", "extra": {"new": new}}
        return write(output, family, model, tokenizer, control=control, sources={"train": source} if source else {}, **origin)


def _source(config: InitConfig) -> Any:
    if config.tokenizer != "train":
        return None
    if not config.data:
        raise BadInput("no data to train a tokenizer on", "", "give --data, or --tokenizer DIR")
    if config.data == BUILT_IN[0]:
        return open_vqa(config.data, "train")
    try:
        return open_pairs(config.data, "train", columns=config.columns)
    except BadInput:
        if Path(config.data).exists():
            return open_vqa(config.data, "train", columns=config.columns)
        raise
