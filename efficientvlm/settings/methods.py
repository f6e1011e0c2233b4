"""Settings of distillation and of gates: weights of terms, published quirks, how gates learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Strict
from efficientvlm.settings.common import Repeatable, Taught
from efficientvlm.settings.dime_fm import DimeFm
from efficientvlm.settings.dlip import CaptioningDlip, NLVR2Dlip, PretrainingDlip, RetrievalDlip, VQADlip


class GateQuirks(Strict):
    """Behaviours of the published release that are known to be wrong, all off: how gates learn."""

    epoch_step: bool = Field(False, description="the sparsity target restarts every epoch")
    gates_in_main_optimizer: bool = Field(False, description="the main AdamW also moves gates and multipliers")
    unfrozen_structure: bool = Field(False, description="the structure still moves after it was declared final")


class DistillationQuirks(Strict):
    """How the teacher is followed."""

    independent_negatives: bool = Field(False, description="teacher and student draw their own ITM negatives")
    unmasked_padding: bool = Field(False, description="KD terms include padding")
    skip_last_hidden: bool = Field(
        False, description="the last hidden state of vision is not distilled, nor in captioning that of the layers that write"
    )


class VQAQuirks(Strict):
    """How answers are learnt and ranked."""

    double_sep: bool = Field(False, description="training answers end in two separators")
    first_token_twice: bool = Field(False, description="closed-list ranking counts the first token twice")
    smoothed_ranking: bool = Field(False, description="closed-list ranking scores answers by the smoothed loss (BLIP)")


class MaskQuirks(Strict):
    """How gates lie."""

    mask_offsets: bool = Field(False, description="fusion gates read rows from 0 instead of their own in full-stack tasks")


class VQAPruningQuirks(VQAQuirks, MaskQuirks):
    """How answers are learnt and ranked, and how gates lie."""


class NLVR2Quirks(DistillationQuirks):
    """And which layers follow which, of two images."""

    second_image: bool = Field(False, description="fusion layers of both images follow the teacher's layers of the second one")


PASSES = {
    "itc_logits": ("itc",),
    "itm_logits": ("itm",),
    "mlm_logits": ("mlm",),
    "lm_logits": ("lm",),
    **dict.fromkeys(("decoder_hidden", "decoder_self_attention", "decoder_cross_attention"), ("lm",)),
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
    lm_logits: float = Field(0.0, ge=0, description="of a network with a decoder, which the published method does not have")
    decoder_hidden: float = Field(0.0, ge=0, description="likewise")
    decoder_self_attention: float = Field(0.0, ge=0, description="likewise")
    decoder_cross_attention: float = Field(0.0, ge=0, description="likewise")


class FusedWeights(Strict):
    """Weights of the layers of a network that fuses texts with images, as they are in the VQA stage."""

    text_hidden: float = Field(1.0, ge=0)
    text_self_attention: float = Field(1.0, ge=0)
    vision_hidden: float = Field(0.2, ge=0)
    vision_self_attention: float = Field(1.0, ge=0)
    fusion_hidden: float = Field(0.5, ge=0)
    fusion_self_attention: float = Field(0.5, ge=0)
    fusion_cross_attention: float = Field(0.5, ge=0)


class TaskWeights(FusedWeights):
    """Weights inside L_KD of the VQA stage."""

    logits: float = Field(1.0, ge=0)
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


class GroundingWeights(FusedWeights):
    """Weights inside L_KD of the grounding stage, for which nothing was published: those of the VQA stage, and boxes."""

    boxes: float = Field(1.0, ge=0, description="L1 and GIoU of the student's boxes and the teacher's")


class CaptioningWeights(Strict):
    """Weights inside L_KD of the captioning stage; of an X-VLM the layers that write are those of text and fusion."""

    logits: float = Field(1.0, ge=0)
    vision_hidden: float = Field(0.1, ge=0)
    vision_self_attention: float = Field(1.0, ge=0)
    text_hidden: float = Field(1.0, ge=0)
    text_self_attention: float = Field(1.0, ge=0)
    fusion_hidden: float = Field(1.0, ge=0)
    fusion_self_attention: float = Field(1.0, ge=0)
    fusion_cross_attention: float = Field(1.0, ge=0)
    decoder_hidden: float = Field(1.0, ge=0)
    decoder_self_attention: float = Field(1.0, ge=0)
    decoder_cross_attention: float = Field(1.0, ge=0)


class NLVR2Weights(Strict):
    """Weights inside L_KD of the stage on statements about two images."""

    logits: float = Field(1.0, ge=0)
    text_hidden: float = Field(1.0, ge=0)
    text_self_attention: float = Field(1.0, ge=0)
    vision_hidden: float = Field(0.033, ge=0)
    vision_self_attention: float = Field(0.33, ge=0)
    fusion_hidden: float = Field(0.165, ge=0)
    fusion_self_attention: float = Field(0.165, ge=0)
    fusion_cross_attention: float = Field(0.165, ge=0)
    text_cross_attention: float = Field(0.165, ge=0, description="of a family whose text tower sees the images")


class Distillation(Repeatable):
    """EfficientVLM's distillation, whatever the task: a mixture of the task's losses with the terms of L_KD."""

    kd: float = Field(0.4, ge=0, le=1, description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher")
    weights: Strict = Field(default_factory=Strict)
    temperature: float = Field(1.0, gt=0)
    scale_by_temperature: bool = Field(False, description="multiply logit terms by T²")
    quirks: DistillationQuirks = Field(default_factory=DistillationQuirks)
    cache_teacher: Annotated[bool, Aside(same_bits=False)] = Field(
        False,
        description="run the teacher once a sample and keep what it says in memory; for logits (of texts), itc_logits or boxes alone",
    )


class PretrainingDistillation(Distillation):
    kept = ("itc_logits",)
    weights: DistillWeights = Field(default_factory=DistillWeights)

    @field_validator("weights")
    @classmethod
    def _of_these_losses(cls, weights: DistillWeights, info: ValidationInfo) -> DistillWeights:
        """A weight that was left at its default is no mistake where its loss is left out: it does nothing there."""
        usual, losses = DistillWeights(), set(info.data.get("losses") or ())
        chosen = [name for name, value in weights if value and value != getattr(usual, name)]
        wrong = [f"{name} needs {' or '.join(PASSES[name])}" for name in chosen if name in PASSES and losses.isdisjoint(PASSES[name])]
        if losses and wrong:
            raise ValueError(f"{', '.join(wrong)} among the losses")
        return weights

    @classmethod
    def _new_every_time(cls, given: dict[str, Any]) -> Iterator[str]:
        yield from super()._new_every_time(given)
        if "box" in (given.get("losses") or ["box"]) and given.get("region_probability"):
            yield "region_probability=0"


class VQADistillation(Distillation):
    kept, keeps_texts = ("logits",), True
    weights: TaskWeights = Field(default_factory=TaskWeights)


class RetrievalDistillation(Distillation):
    kept = ("itc_logits",)
    kd: float = Field(0.5, ge=0, le=1, description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher")
    weights: RetrievalWeights = Field(default_factory=RetrievalWeights)


class GroundingDistillation(Distillation):
    kept = ("boxes",)
    weights: GroundingWeights = Field(default_factory=GroundingWeights)


class CaptioningDistillation(Distillation):
    kept, keeps_texts = ("logits",), True
    kd: float = Field(0.3, ge=0, le=1, description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher")
    weights: CaptioningWeights = Field(default_factory=CaptioningWeights)


class NLVR2Distillation(Distillation):
    kept = ("logits",)
    kd: float = Field(0.2, ge=0, le=1, description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher")
    weights: NLVR2Weights = Field(default_factory=NLVR2Weights)
    quirks: NLVR2Quirks = Field(default_factory=NLVR2Quirks)


METHODS: dict[str, dict[str, type[Taught]]] = {
    "efficientvlm": {
        "pretraining": PretrainingDistillation,
        "vqa": VQADistillation,
        "nlvr2": NLVR2Distillation,
        "retrieval": RetrievalDistillation,
        "grounding": GroundingDistillation,
        "captioning": CaptioningDistillation,
    },
    "dlip": {
        "pretraining": PretrainingDlip,
        "vqa": VQADlip,
        "nlvr2": NLVR2Dlip,
        "retrieval": RetrievalDlip,
        "captioning": CaptioningDlip,
    },
    "dime-fm": {"embedding": DimeFm},
}
"""Method of distillation → task → what only the method knows, on that task."""


class Gates(Strict):
    """How gates learn (hard concrete)."""

    lr: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="of log α, constant; by default 36 by the steps in which gates learn, from 0.01, as published, to 0.1",
    )
    multiplier_lr: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="of the Lagrange multipliers, which ascend; by default 144 by those steps, from 0.01, as published, to 1",
    )
    head_init: float = Field(10.0, description="mean of log α of heads at the start")
    neuron_init: float = Field(0.0, description="mean of log α of neurons at the start; 0 starts at 10 % expected sparsity")
    init_std: float = Field(0.01, ge=0, description="spread of log α at the start")
