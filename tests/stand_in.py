"""Published files of an X-VLM and of a BLIP without their values: a view of one number under every name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from efficientvlm.families.blip.family import BLIP
from efficientvlm.families.blip.names import LAYERS
from efficientvlm.families.blip.published import STACKS, VISION, VISION_LAYER
from efficientvlm.families.blip.start import fresh_config
from efficientvlm.families.towers.names import BERT, BERT_LAYER, CLIP, CLIP_LAYER
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.families.xvlm.names import published_name
from efficientvlm.families.xvlm.network import XVLMModel

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def names(config: XVLMConfig) -> Iterator[str]:
    """The names of a pre-training file with a CLIP ViT."""
    yield from (f"vision_encoder.{name}" for name in CLIP if not name.startswith("embeddings."))
    for number in range(config.vision_layers):
        yield from (f"vision_encoder.encoder.layers.{number}.{part}.{kind}" for part in CLIP_LAYER for kind in ("weight", "bias"))
    yield from (f"text_encoder.{'' if name.startswith('cls.') else 'bert.'}{name}" for name in BERT)
    for number in range(config.text_layers + config.fusion_layers):
        layer = f"text_encoder.bert.encoder.layer.{number}"
        yield from (f"{layer}.{part}.{kind}" for part in BERT_LAYER for kind in ("weight", "bias"))
    yield from (f"{part}_proj.{kind}" for part in ("vision", "text") for kind in ("weight", "bias"))
    yield from (f"{head}.{number}.{kind}" for head in ("itm_head", "bbox_head") for number in (0, 1, 3) for kind in ("weight", "bias"))
    yield "temp"


def write_stand_in(path: Path, **sizes: int) -> Path:
    """X-VLM-base with a CLIP ViT, or one of other `sizes`, as a file of a few hundred kilobytes."""
    config = XVLMConfig(**sizes)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in XVLMModel(config).state_dict().items()}
    found = {name: ours for name in names(config) if (ours := published_name(name, config.text_layers)) in shapes}
    assert {*found.values()} == {*shapes}
    torch.save({name: torch.zeros(()).expand(shapes[str(ours)]) for name, ours in found.items()}, path)  # noqa: TID251  as published
    return path


def write_tokenizer(folder: Path, tokens: int = XVLMConfig.vocab_size) -> Path:
    """A vocabulary of BERT's size, of which hardly a word is one."""
    folder.mkdir()
    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    words += [f"unused{number}" for number in range(tokens - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


def write_blip_stand_in(path: Path, **sizes: int) -> Path:
    """The pre-training file of BLIP-base, or of one of other `sizes`."""
    config = fresh_config("base", {"network": "pretrain", "image_size": 224, **sizes}, sizes.get("vocab_size", 30524))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in BLIP().build(config).state_dict().items()}
    outside = {ours: theirs for theirs, ours in VISION.items()}
    parts = {ours: theirs for theirs, ours in VISION_LAYER.items()}
    found = {}
    for name, shape in shapes.items():
        inner = name.removeprefix("vision_model.")
        called = f"visual_encoder.{outside[inner]}" if inner in outside else name
        if name.startswith(place := f"{LAYERS['vision']}."):
            number, part = name.removeprefix(place).split(".", 1)
            part, _, kind = part.rpartition(".")
            called = f"{STACKS['vision']}.{number}.{parts[part]}.{kind}"
        found[called] = torch.zeros(()).expand(shape)
    torch.save({"model": found}, path)  # noqa: TID251  as published
    return path
