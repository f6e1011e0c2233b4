"""Settings of DLIP's distillation: a weight for each of its terms, presets of them, and how what differs in size meets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Strict
from efficientvlm.settings.common import Repeatable

PRESETS = {
    "feature": ("image_features", "text_features", "fused_feature", "decoder_state"),
    "logit": ("alignment", "lm_logits", "verdict"),
    "attention": ("fusion_self_attention", "fusion_cross_attention", "decoder_self_attention"),
}
"""Kind of information → the terms that transfer it; each term is of one kind. The verdict on two images is ours."""


class ImageWeights(Strict):
    """Weights of the terms; 0 switches one off."""

    image_features: float = Field(1.0, ge=0, description="image encoder: what images are compared with texts by, else the first token")


class TextWeights(ImageWeights):
    text_features: float = Field(1.0, ge=0, description="text encoder: what texts are compared with images by, else the first token")


class FusedWeights(TextWeights):
    fused_feature: float = Field(1.0, ge=0, description="fusion encoder: the first token's last state, of matched pairs")
    fusion_self_attention: float = Field(1.0, ge=0, description="fusion encoder: its last self-attention maps, of matched pairs")
    fusion_cross_attention: float = Field(1.0, ge=0, description="fusion encoder: its last cross-attention maps, of matched pairs")


class WritingWeights(Strict):
    decoder_state: float = Field(1.0, ge=0, description="decoder: its last states, see the setting of this name")
    lm_logits: float = Field(1.0, ge=0, description="decoder: KL over the vocabulary at the tokens that are said")
    decoder_self_attention: float = Field(1.0, ge=0, description="decoder: its last self-attention maps")


class RetrievalWeights(FusedWeights):
    alignment: float = Field(1.0, ge=0, description="both encoders: the contrast of the student's features with the teacher's, and queues")


class AllWeights(WritingWeights, RetrievalWeights):
    """Weights of all nine terms."""


class AnswerWeights(WritingWeights, FusedWeights):
    """Weights of the terms that answers to questions have."""


class CaptionWeights(WritingWeights, ImageWeights):
    """Weights of the terms that captions have."""


class VerdictWeights(FusedWeights):
    """Weights of the terms that statements about two images have."""

    verdict: float = Field(1.0, ge=0, description="what is concluded: KL over false and true, which none of the nine terms compares")


class DlipQuirks(Strict):
    """Weak spots of the recipe that was replicated, all off."""

    unmasked_padding: bool = Field(False, description="predictions and maps of padding are compared too")
    shrunk_maps: bool = Field(False, description="heads=mean: averages are compared as they are, which are less apart than heads")


class WritingQuirks(DlipQuirks):
    first_token: bool = Field(False, description="the decoder's state is that of its first token, which has seen no word")


class ContrastQuirks(DlipQuirks):
    queued_first: bool = Field(False, description="alignment finds the batch's own keys in the queues already, as wrong partners")


class PretrainingQuirks(WritingQuirks, ContrastQuirks):
    """And all of them."""


class Dlip(Repeatable):
    """DLIP's distillation, whatever the task: its terms beside the task's losses, which keep their weight."""

    kd: float = Field(1.0, ge=0, description="L = task + kd * sum of terms; 0 without a teacher")
    preset: Literal["all", "feature", "logit", "attention"] = Field(
        "all", description="the terms that have weight 1 where no weight is given; those of other kinds have 0"
    )
    weights: Strict = Field(default_factory=Strict)
    adapters: Literal["learned", "text_projection"] = Field(
        "learned",
        description="what brings states of another width together: a projection for each that is not deployed, or, as published, the "
        "networks' own projections of texts, whatever the widths",
    )
    attention_temperature: float = Field(0.05, ge=0, description="a softmax of maps divided by it is compared; 0: maps as they are")
    heads: Literal["map", "mean"] = Field(
        "map", description="each head with one of the teacher's, at equal distance where it has more or fewer; or averages over all heads"
    )
    quirks: DlipQuirks = Field(default_factory=DlipQuirks)
    cache_teacher: Annotated[bool, Aside(same_bits=False)] = Field(
        False,
        description="run the teacher once a sample and keep what it says in memory; for features and alignment, or lm_logits or the "
        "verdict alone",
    )

    @field_validator("weights")
    @classmethod
    def _of_preset(cls, weights: Strict, info: ValidationInfo) -> Strict:
        chosen = PRESETS.get(info.data.get("preset", "all"))
        if chosen is None:
            return weights
        others = type(weights).model_fields.keys() - weights.model_fields_set
        return weights.model_copy(update={name: float(name in chosen) for name in others})


class WritingDlip(Dlip):
    temperature: float = Field(1.0, gt=0, description="of lm_logits")
    scale_by_temperature: bool = Field(False, description="multiply lm_logits by T²")
    decoder_state: Literal["words", "last"] = Field("words", description="words at which its states are compared: all, or the last")
    quirks: WritingQuirks = Field(default_factory=WritingQuirks)


class NLVR2Dlip(Dlip):
    kept, keeps_texts = ("verdict",), True
    weights: VerdictWeights = Field(default_factory=VerdictWeights)
    temperature: float = Field(1.0, gt=0, description="of the verdict")
    scale_by_temperature: bool = Field(False, description="multiply the verdict by T²")


class ContrastDlip(Dlip):
    quirks: ContrastQuirks = Field(default_factory=ContrastQuirks)
    teacher_alpha: float = Field(
        0.4, ge=0, le=1, description="alignment: part of the target that the teacher says; the rest is the true partner's"
    )


class PretrainingDlip(WritingDlip, ContrastDlip):
    quirks: PretrainingQuirks = Field(default_factory=PretrainingQuirks)
    kept = ("image_features", "text_features", "alignment")
    weights: AllWeights = Field(default_factory=AllWeights)


class RetrievalDlip(ContrastDlip):
    kept = ("image_features", "text_features", "alignment")
    weights: RetrievalWeights = Field(default_factory=RetrievalWeights)


class VQADlip(WritingDlip):
    kept, keeps_texts = ("lm_logits",), True
    weights: AnswerWeights = Field(default_factory=AnswerWeights)


class CaptioningDlip(WritingDlip):
    kept, keeps_texts = ("lm_logits",), True
    weights: CaptionWeights = Field(default_factory=CaptionWeights)
