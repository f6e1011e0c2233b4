"""X-VLM from a Hugging Face vision tower (CLIP, DINOv2, ViT) and a BERT, with EfficientVLM's layer choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.pretrained import bert_config, bert_tensors, check_vocabulary, chosen_layers, fill, renumbered
from efficientvlm.families.towers.names import bert_name
from efficientvlm.families.vit_files import KINDS, VitFiles, add_patch_bias, vit_files
from efficientvlm.families.xvlm.config import XVLMConfig, check_sizes, checked_settings
from efficientvlm.families.xvlm.names import stack_name
from efficientvlm.families.xvlm.network import XVLMModel

FREE = (
    *("vision_layers", "text_layers", "fusion_layers", "image_size", "image_mean", "image_std", "dropout", "local_attention_depth"),
    *("embed_dim", "heads", "temperature_init", "initializer_range", "text_pooling"),
)
FRESH = ("vision_proj.", "text_proj.", "temp", "itm_head.", "box_head.", "mlm_head.")


def from_towers(vision: Path, text: Path, vocab_size: int, settings: Mapping[str, Any] | None = None) -> tuple[XVLMModel, list[str]]:
    """X-VLM on the weights of a vision transformer and a BERT, and the names of the fresh tensors (random, from torch's generator).

    Fewer layers than a tower has are taken at equal distance, its last included: of 12 for 6, the layers 1, 3, 5, 7, 9, 11 (EfficientVLM).
    The first of BERT's chosen layers make the text tower, the rest fusion, half and half by default; there self-attention and FFN are
    BERT's, cross-attention is fresh like projections, temperature, ITM and box head. Another `image_size` resizes the position embedding.

    Args:
        vision: folder of a CLIP (whole or its images), a DINOv2 or a ViT, safetensors.
        text: folder of a `BertModel` or `BertForMaskedLM` (whose prediction head becomes the MLM head), safetensors.
        vocab_size: tokens of the tokenizer, which must be BERT's own; embeddings beyond them are padding.
        settings: layers of each tower, image size and whatever else the towers do not decide.

    Raises:
        BadInput: a folder of another architecture or activation, damaged or incomplete weights, more layers than there are, another
            vocabulary, a setting that the towers decide.
    """
    config, vit, bert = _towers(vision, text, vocab_size, settings)
    stack = chosen_layers(text, bert.num_hidden_layers, config.text_layers + config.fusion_layers)
    state = _vision_state(vit, config) | _text_state(text, bert, stack, config)
    model = XVLMModel(config).eval()
    return model, fill(model, state, f"{vision} and {text}", lambda name: name.startswith(FRESH) or ".cross_attention" in name)


def towers_config(vision: Path, text: Path, vocab_size: int, settings: Mapping[str, Any] | None = None) -> XVLMConfig:
    """Configuration of what :func:`from_towers` makes; no weights are read.

    Raises:
        BadInput: as :func:`from_towers`, but for the weights.
    """
    return _towers(vision, text, vocab_size, settings)[0]


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


def _towers(vision: Path, text: Path, vocab_size: int, settings: Mapping[str, Any] | None) -> tuple[XVLMConfig, VitFiles, Any]:
    """The configuration, and what is known of the towers that it is of."""
    given = checked_settings(settings or {}, FREE, "follows from the towers")
    vit = vit_files(vision, tuple(KINDS), "a CLIP, CLIP vision, DINOv2 or ViT model", ("quick_gelu", "gelu"), "an X-VLM")
    bert = bert_config(text, "X-VLM")
    check_vocabulary(text, bert.vocab_size, vocab_size)
    config = _config(vit, bert, given)
    chosen_layers(vision, vit.config.num_hidden_layers, config.vision_layers)
    chosen_layers(text, bert.num_hidden_layers, config.text_layers + config.fusion_layers)
    return config, vit, bert


def _config(vit: VitFiles, bert: Any, given: Mapping[str, Any]) -> XVLMConfig:
    images = vit.config
    layers = given.get("vision_layers", images.num_hidden_layers)
    values: dict[str, Any] = {
        "image_size": images.image_size,
        "patch_size": images.patch_size,
        **vit.statistics(),
        "vision_width": images.hidden_size,
        "vision_layers": layers,
        "vision_heads": images.num_attention_heads,
        "vision_intermediate": vit.neurons,
        "vision_eps": images.layer_norm_eps,
        "vision_pre_norm": vit.kind.pre_norm,
        "vision_activation": images.hidden_act,
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


def _vision_state(vit: VitFiles, config: XVLMConfig) -> dict[str, Tensor]:
    """The chosen layers and the rest of the vision tower; the bias of patches, which it has not, in their positions."""
    chosen = chosen_layers(vit.folder, vit.config.num_hidden_layers, config.vision_layers)
    state = vit.state(chosen, config.image_size)
    bias = state.pop("patch_embedding.bias", None)
    if bias is not None and "position_embedding" in state:
        state["position_embedding"] = add_patch_bias(state["position_embedding"], bias)
    return {f"vision.{role}": tensor for role, tensor in state.items()}


def _text_state(folder: Path, bert: Any, chosen: Mapping[int, int], config: XVLMConfig) -> dict[str, Tensor]:
    roles = {str(bert_name(name)): tensor for name, tensor in bert_tensors(folder, bert).items()}
    state = renumbered(roles, "layers.", chosen)
    keep_head = "mlm" in config.heads
    return {stack_name(role, config.text_layers): tensor for role, tensor in state.items() if keep_head or not role.startswith("head.")}
