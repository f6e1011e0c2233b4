"""X-VLM from a Hugging Face CLIP or DINOv2 vision tower and a BERT, with EfficientVLM's layer choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, CLIPConfig, CLIPVisionConfig, Dinov2Config

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.data.tokenizer import load_tokenizer
from efficientvlm.errors import BadInput, number_of, shorten
from efficientvlm.families.loading import image_statistics, open_config, read_json
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.weights import floats, read_folder
from efficientvlm.families.xvlm.config import XVLMConfig, check_sizes, checked_settings
from efficientvlm.families.xvlm.dinov2 import MEAN, STD, add_patch_bias, check_dinov2, dinov2_state, dinov2_values
from efficientvlm.families.xvlm.names import bert_name, clip_name, stack_name
from efficientvlm.families.xvlm.network import XVLMModel
from efficientvlm.runtime.progress import say

MOST_PADDING = 128  # embeddings are padded to a multiple of 8, 64 or 128
FREE = (
    *("vision_layers", "text_layers", "fusion_layers", "image_size", "image_mean", "image_std", "dropout", "local_attention_depth"),
    *("embed_dim", "heads", "temperature_init", "initializer_range", "text_pooling"),
)


def from_towers(vision: Path, text: Path, vocab_size: int, settings: Mapping[str, Any] | None = None) -> tuple[XVLMModel, list[str]]:
    """X-VLM on the weights of a CLIP or DINOv2 ViT and a BERT, and the names of the fresh tensors (random, from torch's generator).

    Fewer layers than a tower has are taken at equal distance, its last included: of 12 for 6, the layers 1, 3, 5, 7, 9, 11 (EfficientVLM).
    The first of BERT's chosen layers make the text tower, the rest fusion, half and half by default; there self-attention and FFN are
    BERT's, cross-attention is fresh like projections, temperature, ITM and box head. Another `image_size` resizes the position embedding.

    Args:
        vision: folder of a `CLIPModel`, `CLIPVisionModel` or `Dinov2Model`, safetensors.
        text: folder of a `BertModel` or `BertForMaskedLM` (whose prediction head becomes the MLM head), safetensors.
        vocab_size: tokens of the tokenizer, which must be BERT's own; embeddings beyond them are padding.
        settings: layers of each tower, image size and whatever else the towers do not decide.

    Raises:
        BadInput: a folder of another architecture or activation, damaged or incomplete weights, more layers than there are, another
            vocabulary, a setting that the towers decide.
    """
    config, vit, bert = towers_config(vision, text, vocab_size, settings)
    chosen = _chosen(vision, vit.num_hidden_layers, config.vision_layers)
    stack = _chosen(text, bert.num_hidden_layers, config.text_layers + config.fusion_layers)
    state = _vision_state(vision, vit, chosen, config) | _text_state(text, stack, config)
    model = XVLMModel(config).eval()
    return model, _fill(model, state, vision, text)


def towers_config(vision: Path, text: Path, vocab_size: int, settings: Mapping[str, Any] | None = None) -> tuple[XVLMConfig, Any, Any]:
    """Configuration of what :func:`from_towers` makes, and those of the vision tower and of BERT; no weights are read.

    Raises:
        BadInput: as :func:`from_towers`, but for the weights.
    """
    given = checked_settings(settings or {}, FREE, "follows from the towers")
    vit, bert = _vision_config(vision), _bert_config(text)
    padding = bert.vocab_size - vocab_size
    if padding < 0 or (padding and padding >= MOST_PADDING and not _own_tokenizer_has(text, vocab_size)):
        why = f"BERT in {text} embeds {bert.vocab_size}, and its embeddings mean nothing for other tokens"
        raise BadInput(f"the tokenizer has {vocab_size} tokens", why, f"use BERT's own: --tokenizer {text}")
    if padding:
        say(f"init: BERT embeds {padding} more tokens than its tokenizer has; they are padding, stay, and are never read")
    config = _config(vision, vit, bert, given)
    _chosen(vision, vit.num_hidden_layers, config.vision_layers)
    _chosen(text, bert.num_hidden_layers, config.text_layers + config.fusion_layers)
    return config, vit, bert


def check_kept(config: XVLMConfig) -> None:
    """:class:`BadInput` unless texts can be projected to themselves."""
    if "itc" not in config.heads:
        raise BadInput("there is no projection of texts", f"heads are {', '.join(config.heads)}", "have itc among the heads")
    if config.embed_dim != config.text_width:
        why = f"embed_dim is {config.embed_dim}, texts are {config.text_width} wide"
        raise BadInput("texts cannot be projected to themselves", why, f"set embed_dim to {config.text_width}")


def as_texts_are(model: XVLMModel) -> list[str]:
    """Project texts to themselves; the names of the tensors that are no longer random."""
    with torch.no_grad():
        model.text_proj.weight.copy_(torch.eye(len(model.text_proj.weight)))
        model.text_proj.bias.zero_()
    return ["text_proj.weight", "text_proj.bias"]


def _own_tokenizer_has(folder: Path, tokens: int) -> bool:
    """Whether the tokenizer in BERT's own folder, if there is one, is of `tokens` tokens."""
    try:
        return len(load_tokenizer(folder, bert=True)) == tokens
    except BadInput:
        return False


def _config(vision: Path, vit: Any, bert: Any, given: Mapping[str, Any]) -> XVLMConfig:
    layers = given.get("vision_layers", vit.num_hidden_layers)
    dino = isinstance(vit, Dinov2Config)
    statistics = ((MEAN, STD), "BitImageProcessor") if dino else ((CLIP_MEAN, CLIP_STD), "CLIPImageProcessor")
    values: dict[str, Any] = {
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        **image_statistics(vision, {}, *statistics),
        "vision_width": vit.hidden_size,
        "vision_layers": layers,
        "vision_heads": vit.num_attention_heads,
        "vision_eps": vit.layer_norm_eps,
        **(dinov2_values(vit) if dino else {"vision_intermediate": vit.intermediate_size}),
        "local_attention_depth": max(1, layers // 3),
        "vocab_size": bert.vocab_size,
        "max_positions": bert.max_position_embeddings,
        "type_vocab_size": bert.type_vocab_size,
        "text_width": bert.hidden_size,
        "text_layers": bert.num_hidden_layers // 2,
        "fusion_layers": bert.num_hidden_layers - bert.num_hidden_layers // 2,
        "text_heads": bert.num_attention_heads,
        "text_intermediate": bert.intermediate_size,
        "text_eps": bert.layer_norm_eps,
        "dropout": bert.hidden_dropout_prob,
    }
    return check_sizes(XVLMConfig(**{**values, **given}))


def _chosen(folder: Path, available: int, wanted: int) -> dict[int, int]:
    """Layer of the tower → layer of ours that it becomes."""
    if not 0 < wanted <= available:
        raise BadInput(f"{wanted} layers from {folder}", f"it has {available}", f"ask for 1 to {available} in all")
    return {(i + 1) * available // wanted - 1: i for i in range(wanted)}


def _vision_state(folder: Path, vit: Any, chosen: Mapping[int, int], config: XVLMConfig) -> dict[str, Tensor]:
    """The chosen layers and the rest of the vision tower, positions resized to the images of `config`."""
    if isinstance(vit, Dinov2Config):
        found, bias, strangers = dinov2_state(folder, vit)
        _no_strangers(folder, strangers)
    else:
        found, bias = _clip_state(folder), None
    state = _renumbered(found, "vision", chosen)
    table = state.get("vision.position_embedding")
    if table is not None and vit.image_size != config.image_size and len(table) == 1 + (vit.image_size // vit.patch_size) ** 2:
        state["vision.position_embedding"] = table = resize_positions(table, config.image_size // config.patch_size)
    if table is not None and bias is not None:
        state["vision.position_embedding"] = add_patch_bias(table, bias)
    return state


def _clip_state(folder: Path) -> dict[str, Tensor]:
    tensors = read_folder(folder)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _no_strangers(folder, [n for n in own if n.startswith(("embeddings.", "encoder.")) and not clip_name(n)])
    return {f"vision.{ours}": tensor for name, tensor in own.items() if (ours := clip_name(name))}


def _text_state(folder: Path, chosen: Mapping[int, int], config: XVLMConfig) -> dict[str, Tensor]:
    tensors = {name.removeprefix("bert."): tensor for name, tensor in read_folder(folder).items()}
    if "cls.predictions.bias" not in tensors and "cls.predictions.decoder.bias" in tensors:
        tensors["cls.predictions.bias"] = tensors["cls.predictions.decoder.bias"]
    plain = {name: ours for name in tensors if (ours := bert_name(name)) and "cross_attention" not in ours}
    _no_strangers(folder, [n for n in tensors if n.startswith(("embeddings.", "encoder.")) and n not in plain])
    keep_head = "mlm" in config.heads
    stack = {f"text.{ours}": tensors[name] for name, ours in plain.items() if not ours.startswith("head.")}
    state = _renumbered(stack, "text", chosen)
    state = {stack_name(name.removeprefix("text."), config.text_layers): tensor for name, tensor in state.items()}
    head = {stack_name(ours, 0): tensors[name] for name, ours in plain.items() if ours.startswith("head.") and keep_head}
    return state | head


def _renumbered(state: Mapping[str, Tensor], tower: str, chosen: Mapping[int, int]) -> dict[str, Tensor]:
    """`state` with only the chosen layers, under their new numbers."""
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        _, layered, rest = name.partition(f"{tower}.layers.")
        number, _, tail = rest.partition(".")
        if not layered:
            kept[name] = tensor
        elif int(number) in chosen:
            kept[f"{tower}.layers.{chosen[int(number)]}.{tail}"] = tensor
    return kept


def _no_strangers(folder: Path, names: list[str]) -> None:
    names = [name for name in names if not name.endswith("position_ids")]
    if names:
        raise BadInput(
            f"{folder} has {number_of(len(names), 'tensor')} X-VLM has no place for",
            ", ".join(sorted(names)[:5]),
            "use a plain CLIP, DINOv2 or BERT",
        )


def _fill(model: XVLMModel, state: Mapping[str, Tensor], vision: Path, text: Path) -> list[str]:
    """Copy `state` into `model`; names of the tensors that it does not hold and that no tower has."""
    own = model.state_dict()
    new = sorted(set(own) - set(state))
    fresh = ("vision_proj.", "text_proj.", "temp", "itm_head.", "box_head.", "mlm_head.")
    missing = [name for name in new if not name.startswith(fresh) and ".cross_attention" not in name]
    if missing:
        raise BadInput(f"{vision} and {text} lack {number_of(len(missing), 'tensor')}", ", ".join(missing[:5]), "fetch them again")
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            needed = list(own[name].shape) if name in own else "nothing"
            raise BadInput(
                "a tower does not fit its config.json",
                f"{name} has shape {list(tensor.shape)}, {needed} is needed",
                "save or download the model again",
            )
        if (found := floats(tensor)) is None:
            raise BadInput("the weights of a tower are damaged", f"{name} is not all finite floats", "fetch them again")
        own[name].copy_(found)
    return new


def _vision_config(folder: Path) -> Any:
    kind = _kind(folder, ("clip", "clip_vision_model", "dinov2"), "a CLIP, CLIP vision or DINOv2 model")
    if kind == "dinov2":
        config = _read_config(Dinov2Config, folder)
        check_dinov2(folder, config)
        return config
    config = _read_config(CLIPConfig if kind == "clip" else CLIPVisionConfig, folder)
    config = config.vision_config if kind == "clip" else config
    if config.hidden_act != "quick_gelu" or config.num_channels != 3:
        raise BadInput(f"CLIP in {folder}", f"its activation is {config.hidden_act}, X-VLM's is quick_gelu", "use a CLIP of OpenAI's kind")
    return config


def _bert_config(folder: Path) -> Any:
    _kind(folder, ("bert",), "a BERT")
    config = _read_config(BertConfig, folder)
    if config.hidden_act != "gelu":
        raise BadInput(f"BERT in {folder}", f"its activation is {config.hidden_act}, X-VLM's is gelu", "use a BERT with gelu")
    return config


def _kind(folder: Path, wanted: tuple[str, ...], what: str) -> str:
    if not (folder / "config.json").exists():
        why = "it has no config.json"
        raise BadInput(f"{folder} is not a model folder", why, "give the folder of a model in transformers' format")
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in wanted:
        raise BadInput(f"{folder} is not {what}", f"its model_type is {shorten(kind)}", f"give a folder of {what}")
    return str(kind)


def _read_config(kind: Any, folder: Path) -> Any:
    file = folder / "config.json"
    return open_config(kind, read_json(file), file)
