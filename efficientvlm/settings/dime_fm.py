"""Settings of DIME-FM's distillation: weights and temperatures of its terms, and what is compared over the processes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Size, Strict
from efficientvlm.settings.common import Taught


class EmbeddingWeights(Strict):
    """Weights of the terms; 0 switches one off."""

    vl: float = Field(0.7, ge=0, description="L_vl: similarities of images and sentences, both ways")
    pvl: float = Field(0.3, ge=0, description="L_p-vl: similarities of the student's images with the teacher's")
    udist: float = Field(0.0, ge=0, description="L_udist: similarities of images with images")
    feature_mse: float = Field(0.0, ge=0, description="mean squared error of embeddings; 2000 in CLIP-KD")
    cosine: float = Field(0.0, ge=0, description="1 - cosine of embeddings")
    interactive: float = Field(0.0, ge=0, description="interactive contrast: which of the teacher's embeddings is of the same sample")
    affinity: float = Field(0.0, ge=0, description="affinity mimicking: cross-entropy of similarities, both ways; 1 in TinyCLIP")


class Temperatures(Strict):
    """By what similarities are divided, once they are multiplied by `scale`."""

    vl: float = Field(1.0, gt=0)
    pvl: float = Field(3.0, gt=0)
    udist: float = Field(7.0, gt=0)
    interactive: float = Field(1.0, gt=0)
    affinity: float = Field(2.0, gt=0, description="2 makes of a scale of 100 the 50 of TinyCLIP")


class EmbeddingQuirks(Strict):
    """Behaviours of the published release that are known to be wrong, all off."""

    own_batch: bool = Field(False, description="each process compares the samples of its own part of the batch alone")


class DimeFm(Taught):
    """DIME-FM's distillation: similarities of the teacher's images and sentences, which need not belong together."""

    weights: EmbeddingWeights = Field(default_factory=EmbeddingWeights)
    temperatures: Temperatures = Field(default_factory=Temperatures)
    scale: float = Field(100.0, gt=0, description="what cosines are multiplied by; fixed, as published")
    widths: list[Size] = Field(
        default_factory=list,
        description="Matryoshka: the first so many numbers of an embedding are compared too, each width counting alike",
    )
    image_store: str | None = Field(None, description="folder of evlm embed: the teacher's vectors of the images, looked up in its place")
    sentence_store: str | None = Field(None, description="likewise of the sentences")
    max_missing: Annotated[float, Aside()] = Field(
        0.01, ge=0, le=1, description="part of the images, and of the sentences, that a store may lack; they are left out of training"
    )
    quirks: EmbeddingQuirks = Field(default_factory=EmbeddingQuirks)

    teacherless: ClassVar[bool] = True

    @property
    def taught(self) -> bool:
        """Stores of both sides stand for a teacher."""
        return super().taught or bool(self.image_store and self.sentence_store)

    @field_validator("weights")
    @classmethod
    def _something(cls, weights: EmbeddingWeights) -> EmbeddingWeights:
        if not any(weight for _, weight in weights):
            raise ValueError("no term has a weight")
        return weights

    @field_validator("widths")
    @classmethod
    def _distinct(cls, widths: list[int], info: ValidationInfo) -> list[int]:
        if len(set(widths)) < len(widths) or 0 in widths:
            raise ValueError("name each width once, and none of 0")
        return widths


def compares_sentences(config: Any) -> bool:
    """Whether a term with a weight compares images with sentences, or sentences are learnt; `config` is of DIME-FM and of embeddings."""
    return bool(config.learn_texts or config.weights.vl or config.weights.affinity)
