"""BLIP from a Hugging Face vision transformer and a BERT, as BLIP itself began: from a ViT of ImageNet and BERT base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import SlicedBlipConfig
from efficientvlm.families.blip.models import MODELS
from efficientvlm.families.blip.names import IMAGE_LAYER, IMAGES, LAYERS, PREDICTIONS
from efficientvlm.families.blip.start import DECODE, ENCODE, fresh_config
from efficientvlm.families.pretrained import (
    AGAIN,
    BIAS,
    LAYER,
    PLACES,
    TYPES,
    WORDS,
    bert_config,
    bert_tensors,
    check_vocabulary,
    chosen_layers,
    fill,
    own_vocabulary,
    renumbered,
)
from efficientvlm.families.vit_files import VitFiles, vit_files

FREE = (
    *("network", "vision_layers", "text_layers", "decoder_layers", "fusion_layers", "image_size", "image_mean", "image_std"),
    *("dropout", "embed_dim", "initializer_range"),
)
FRESH = ("vision_proj.", "text_proj.", "temp", "itm_head.", "cls_head.", f"{PREDICTIONS}.")
TEXTS = {"text": "text_encoder.", "decoder": "text_decoder.bert."}


def from_towers(vision: Path, text: Path, vocab: Mapping[str, int], settings: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """BLIP on the weights of a vision transformer and a BERT, and the names of the fresh tensors (random, from torch's generator).

    Text encoder and decoder both begin with BERT; what attends to images is fresh, as are projections, heads and the tokens [DEC] and
    [ENC]. Fewer layers than a tower has are taken at equal distance, its last included. Another `image_size` resizes the position
    embedding. BERT's first token type goes into its positions, as a BLIP has no types.

    Args:
        vision: folder of a DINOv2 or a ViT, safetensors; a CLIP normalises what its first layer reads, and a BLIP does not.
        text: folder of a `BertModel` or `BertForMaskedLM` (whose prediction head becomes the decoder's), safetensors.
        vocab: token → id of the tokenizer, which must be BERT's own but for [DEC] and [ENC]; embeddings beyond them are padding.
        settings: what the network is for, layers of each tower, image size and whatever else the towers do not decide.

    Raises:
        BadInput: a folder of another architecture or activation, damaged or incomplete weights, more layers than there are, another
            vocabulary, a setting that the towers decide.

    Source: BLIP (Li et al. 2022), section 4.1.
    """
    config, vit, bert = _towers(vision, text, vocab, settings)
    model = MODELS[type(config)](config).eval()
    state = dict(_vision_state(vit, config)) | dict(_text_state(text, bert, model, _new_tokens(text, bert, vocab)))
    return model, fill(model, state, f"{vision} and {text}", lambda name: name.startswith(FRESH) or ".crossattention." in name)


def towers_config(vision: Path, text: Path, vocab: Mapping[str, int], settings: Mapping[str, Any]) -> SlicedBlipConfig:
    """Configuration of what :func:`from_towers` makes; no weights are read.

    Raises:
        BadInput: as :func:`from_towers`, but for the weights.
    """
    return _towers(vision, text, vocab, settings)[0]


def _towers(vision: Path, text: Path, vocab: Mapping[str, int], settings: Mapping[str, Any]) -> tuple[SlicedBlipConfig, VitFiles, Any]:
    """The configuration, what is known of the tower of images, and the configuration of BERT."""
    vit = vit_files(vision, ("vit", "dinov2"), "a ViT or DINOv2 model", ("gelu",), "a BLIP")
    bert, images = bert_config(text, "BLIP"), vit.config
    tokens = len(vocab)
    check_vocabulary(text, bert.vocab_size, tokens - len(_new_tokens(text, bert, vocab)))
    decided = {
        "patch_size": images.patch_size,
        "vision_width": images.hidden_size,
        "vision_heads": images.num_attention_heads,
        "vision_intermediate": vit.neurons,
        "vision_eps": images.layer_norm_eps,
        "text_width": bert.hidden_size,
        "text_heads": bert.num_attention_heads,
        "text_intermediate": bert.intermediate_size,
        "text_eps": bert.layer_norm_eps,
        "vocab_size": max(tokens, bert.vocab_size),
        "max_positions": bert.max_position_embeddings,
    }
    if fixed := sorted({*settings} & {*decided}):
        raise BadInput(f"settings.{fixed[0]} cannot be set", "it follows from the towers", f"what can be set: {', '.join(sorted(FREE))}")
    by_default = {
        "image_size": images.image_size,
        "vision_layers": images.num_hidden_layers,
        "text_layers": bert.num_hidden_layers,
        "dropout": bert.hidden_dropout_prob,
        **vit.statistics(),
    }
    config = fresh_config("base", {**by_default, **settings, **decided}, vocab)
    for tower, layers in config.layers().items():
        if layers:
            chosen_layers(*((vision, images.num_hidden_layers) if tower == "vision" else (text, bert.num_hidden_layers)), layers)
    return config, vit, bert


def _vision_state(vit: VitFiles, config: SlicedBlipConfig) -> Iterator[tuple[str, Tensor]]:
    """The chosen layers and the rest of the tower of images; what attention projects to stands in one matrix."""
    chosen = chosen_layers(vit.folder, vit.config.num_hidden_layers, config.layers()["vision"])
    state = vit.state(chosen, config.vision_config.image_size)
    for ours, roles in _places(len(chosen)):
        if all(role in state for role in roles):  # what is missing is found when the model is filled
            yield ours, torch.cat([state[role] for role in roles])
    for role in ("class_embedding", "position_embedding"):
        if role in state:
            yield f"vision_model.{IMAGES[role]}", state[role].view(1, -1, vit.config.hidden_size)


def _places(layers: int) -> Iterator[tuple[str, list[str]]]:
    """A tensor of ours, and the roles of what it consists of."""
    inside = {":qkv": [f"attention.{part}" for part in "qkv"], ":out": ["attention.out"]}
    beside = {"attention_norm": "attention_norm", "fc1": "ffn.fc1", "fc2": "ffn.fc2", "ffn_norm": "ffn_norm"}
    parts = {f"{IMAGE_LAYER['attention']}.{IMAGE_LAYER[role]}": roles for role, roles in inside.items()}
    parts |= {IMAGE_LAYER[part]: [role] for part, role in beside.items()}
    for kind in ("weight", "bias"):
        yield from ((f"vision_model.{IMAGES[role]}.{kind}", [f"{role}.{kind}"]) for role in ("patch_embedding", "post_norm"))
        for layer in range(layers):
            for part, roles in parts.items():
                yield f"{LAYERS['vision']}.{layer}.{part}.{kind}", [f"layers.{layer}.{role}.{kind}" for role in roles]


def _new_tokens(text: Path, bert: Any, vocab: Mapping[str, int]) -> list[int]:
    """Ids of [DEC] and [ENC], those that BERT was not trained with; where it has no tokenizer of its own, those that it does not embed."""
    known = own_vocabulary(text)
    marks = [(token, vocab[token]) for token in (DECODE, ENCODE)]
    return [number for token, number in marks if (number >= bert.vocab_size if known is None else token not in known)]


def _text_state(folder: Path, bert: Any, model: Any, new: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a BERT in each tower of texts, as far as that has them itself; words and their bias with `new` tokens as the model has."""
    tensors, own, depth = bert_tensors(folder, bert), model.state_dict(), model.config.layers()
    types = tensors.pop(TYPES, None)
    if types is None and bert.type_vocab_size:
        raise BadInput(f"{folder} lacks 1 tensor", TYPES, AGAIN)
    if types is not None and PLACES in tensors:
        tensors[PLACES] = tensors[PLACES] + types[0]
    for name, fresh in ((WORDS, model.get_input_embeddings().weight.detach()), (BIAS, own.get(f"text_decoder.{BIAS}"))):
        if name in tensors and fresh is not None:
            longer = torch.cat([tensors[name], fresh[len(tensors[name]) :]])
            longer[new] = fresh[new]
            tensors[name] = longer
    for tower, prefix in TEXTS.items():
        if depth[tower]:
            kept = renumbered(tensors, LAYER, chosen_layers(folder, bert.num_hidden_layers, depth[tower]))
            yield from ((prefix + name, tensor) for name, tensor in kept.items() if prefix + name in own)
    if depth["decoder"]:
        heads = {name: tensor for name, tensor in tensors.items() if name.startswith("cls.predictions.")}
        yield from ((f"{PREDICTIONS}.{name.removeprefix('cls.predictions.')}", tensor) for name, tensor in heads.items())
