"""Settings of distillation and of gates: weights of terms, published quirks, how gates learn."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from efficientvlm.settings.base import Strict


class Quirks(Strict):
    """Behaviours of the published release that are known to be wrong; all off."""

    mask_offsets: bool = Field(False, description="fusion gates read rows from 0 instead of their own in full-stack tasks")
    epoch_step: bool = Field(False, description="the sparsity target restarts every epoch")
    gates_in_main_optimizer: bool = Field(False, description="the main AdamW also moves gates and multipliers")
    independent_negatives: bool = Field(False, description="teacher and student draw their own ITM negatives")
    unmasked_padding: bool = Field(False, description="KD terms include padding")
    skip_last_hidden: bool = Field(False, description="the last vision hidden state is not distilled")
    unfrozen_structure: bool = Field(False, description="the structure still moves after it was declared final")
    double_sep: bool = Field(False, description="training answers end in two separators")
    first_token_twice: bool = Field(False, description="closed-list ranking counts the first token twice")


def new_every_time(given: dict[str, Any], weights: str, kept: str) -> list[str]:
    """Settings that a teacher needs whose outputs are to be kept: of all terms only `kept` has a weight, and pictures do not change."""
    streamed = str(given.get("data", "")).startswith("stream:")
    terms = [name for name, weight in given.get(weights, ()) if weight and name != kept]
    wrong = ["data is no stream"] * streamed + ["augment=none"] * (given.get("augment", "none") != "none")
    return wrong + [f"{weights}.{name}=0" for name in terms]


PASSES = {
    "itc_logits": ("itc",),
    "itm_logits": ("itm",),
    "mlm_logits": ("mlm",),
    "fusion_hidden": ("itm", "mlm"),
    "fusion_self_attention": ("itm", "mlm"),
    "fusion_cross_attention": ("itm", "mlm"),
}
"""Distillation term → the losses in whose passes it compares something; any of them will do."""


class DistillWeights(Strict):
    """Weights inside L_KD of the general distillation stage; 0 switches a term off."""

    itm_logits: float = Field(1.0, ge=0)
    mlm_logits: float = Field(1.0, ge=0)
    itc_logits: float = Field(0.0, ge=0, description="not in the published method")
    text_hidden: float = Field(1.0, ge=0)
    text_self_attention: float = Field(1.0, ge=0)
    vision_hidden: float = Field(0.1, ge=0)
    vision_self_attention: float = Field(1.0, ge=0)
    fusion_hidden: float = Field(1.0, ge=0)
    fusion_self_attention: float = Field(1.0, ge=0)
    fusion_cross_attention: float = Field(0.0, ge=0, description="not in the published general stage")


class TaskWeights(Strict):
    """Weights inside L_KD of the VQA stage."""

    logits: float = Field(1.0, ge=0)
    text_hidden: float = Field(1.0, ge=0)
    text_self_attention: float = Field(1.0, ge=0)
    vision_hidden: float = Field(0.2, ge=0)
    vision_self_attention: float = Field(1.0, ge=0)
    fusion_hidden: float = Field(0.5, ge=0)
    fusion_self_attention: float = Field(0.5, ge=0)
    fusion_cross_attention: float = Field(0.5, ge=0)
    text_cross_attention: float = Field(0.5, ge=0, description="of a family whose text tower sees the image")
    decoder_hidden: float = Field(1.0, ge=0)
    decoder_self_attention: float = Field(1.0, ge=0)
    decoder_cross_attention: float = Field(1.0, ge=0)


class RetrievalWeights(Strict):
    """Weights inside L_KD of the retrieval stage; those of fusion apply to matched and to unmatched pairs each."""

    itm_logits: float = Field(1.0, ge=0)
    itc_logits: float = Field(0.0, ge=0, description="not in the published method")
    text_hidden: float = Field(0.33, ge=0)
    text_self_attention: float = Field(0.33, ge=0)
    vision_hidden: float = Field(0.066, ge=0)
    vision_self_attention: float = Field(0.33, ge=0)
    fusion_hidden: float = Field(0.165, ge=0)
    fusion_self_attention: float = Field(0.165, ge=0)
    fusion_cross_attention: float = Field(0.165, ge=0)


PUBLISHED_KD = {"vqa": 0.4, "retrieval": 0.5}
QUESTION_QUIRKS = ("mask_offsets", "double_sep", "first_token_twice")


class Gates(Strict):
    """How gates learn (hard concrete)."""

    lr: float = Field(0.01, gt=0, description="of log α; constant, no schedule")
    multiplier_lr: float = Field(0.01, gt=0, description="of the Lagrange multipliers, which ascend")
    head_init: float = Field(10.0, description="mean of log α of heads at the start")
    neuron_init: float = Field(0.0, description="mean of log α of neurons at the start; 0 starts at 10 % expected sparsity")
    init_std: float = Field(0.01, ge=0, description="spread of log α at the start")
