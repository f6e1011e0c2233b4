"""What is known of a task where no network is loaded: its own settings, beside those of every stage, and what its figures are called."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Count, Size
from efficientvlm.settings.common import Asking, Learning, Measuring, OnTask
from efficientvlm.settings.methods import VQAPruningQuirks, VQAQuirks

Pictures = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]
"""Files of pictures; of one its name will do."""


class PretrainingSettings(Learning):
    """Image-text pre-training."""

    losses: list[Literal["itc", "itm", "mlm", "box"]] = Field(["itc", "itm", "mlm", "box"], min_length=1)
    region_probability: float = Field(0.5, ge=0, le=1, description="chance of a region step before a general step")
    regions_per_image: Size = Field(5, ge=1)
    mask_probability: float = Field(0.25, gt=0, lt=1, description="part of a text's tokens that MLM hides")
    max_masks: Size = Field(8, ge=1, description="at most so many of them")
    hard_negatives: bool = Field(True, description="matching draws its negatives by similarity, as published; false: any, for a beginner")

    def fullest(self) -> dict[str, Any]:
        """With a region step, if there may be one."""
        return {**super().fullest(), "region_probability": float(self.region_probability > 0)}

    @field_validator("hard_negatives")
    @classmethod
    def _of_matching(cls, hard: bool, info: ValidationInfo) -> bool:
        if not hard and "itm" not in info.data.get("losses", ["itm"]):
            raise ValueError("it needs itm among the losses")
        return hard


class VQASettings(Learning):
    """Visual question answering."""

    quirks: VQAQuirks = Field(default_factory=VQAQuirks)
    questions_per_image: Size = Field(6, ge=1, description="questions that share one vision pass")
    max_answer_tokens: Size = Field(10, ge=3)
    answers: str | None = Field(None, description="file with one answer a line; by default those of the training data")
    min_answer_count: Count = Field(1, ge=1, description="training questions that must accept an answer for it to be in the closed list")
    rank_top: Annotated[Count, Aside()] = Field(128, ge=1, description="candidates kept after the first token")
    decoder_init: Literal["auto", "teacher", "fusion"] = Field("auto", description="where a new answer decoder comes from")


class VQAPruning(VQASettings):
    quirks: VQAPruningQuirks = Field(default_factory=VQAPruningQuirks)


class VQAQuestion(Asking):
    image: Pictures = Field(min_length=1, max_length=1, examples=["picture.png"])
    question: str = Field(examples=["What colour is it?"])
    mode: Literal["rank", "generate"] = "rank"
    top: Count = Field(5, ge=1, description="answers that are shown")

    @field_validator("question")
    @classmethod
    def _says_something(cls, question: str) -> str:
        if not question.strip():
            raise ValueError('it is empty; ask something, e.g. --question "What colour is it?"')
        return question


class VQAEval(Measuring):
    mode: Literal["rank", "generate"] = "rank"
    answers: str | None = None
    rank_top: Count | None = Field(None, ge=1, description="candidates kept after the first token; by default as the model was tuned")
    first_token_twice: bool | None = None


class RetrievalSettings(Learning):
    """Image-text retrieval."""

    hard_negatives: bool = Field(True, description="matching draws its negatives by similarity, as published; false: any")


class RetrievalEval(Measuring):
    rerank: Count = Field(0, ge=0, description="so many candidates of every query are ranked anew by matching; 0: none")


class GroundingSettings(Learning):
    """Grounding: a phrase as a box."""

    phrases_per_image: Size = Field(4, ge=1, description="phrases that share one view of their image; 1, as published, crops around each")


class GroundingEval(Measuring):
    mode: Literal["box", "gradcam"] = Field("box", description="gradcam: where a network that matches looks, without a box head")
    layer: Count | None = Field(None, ge=0, description="gradcam: layer with cross-attention, counted from 0; by default the middle one")
    as_published: bool = Field(False, description="boxes are not cut to their picture, and those that share one row of pixels do not meet")

    @field_validator("layer")
    @classmethod
    def _of_gradcam(cls, layer: int | None, info: ValidationInfo) -> int | None:
        if layer is not None and info.data.get("mode") != "gradcam":
            raise ValueError("it goes with mode gradcam")
        return layer


class GroundingQuestion(Asking):
    image: Pictures = Field(min_length=1, max_length=1, examples=["picture.png"])
    question: str = Field(examples=["the red circle on the left"], description="what is looked for")
    out: str | None = Field(None, description="PNG file for the picture with the box drawn into it")

    @field_validator("question")
    @classmethod
    def _means_something(cls, question: str) -> str:
        if not question.strip():
            raise ValueError('it is empty; say what is looked for, e.g. --question "the red circle on the left"')
        return question


class Untrained(Learning):
    """No task: cut by the weights alone, without training."""


TASKS: dict[str, dict[str, type[OnTask]]] = {
    "pretraining": {"pretrain": PretrainingSettings, "distill": PretrainingSettings, "prune": PretrainingSettings},
    "vqa": {"finetune": VQASettings, "prune": VQAPruning, "eval": VQAEval},
    "retrieval": {"finetune": RetrievalSettings, "prune": RetrievalSettings, "eval": RetrievalEval},
    "grounding": {"finetune": GroundingSettings, "prune": GroundingSettings, "eval": GroundingEval},
    "none": {"prune": Untrained},
}
"""Task → stage that learns or measures it → what only the task knows there."""


class About(NamedTuple):
    """`metrics`: the main ones, the first that was measured counting, and what to call each. `tag` is that of the Hub's pipelines."""

    metrics: dict[str, str]
    tag: str | None = None
    asked: type[Asking] | None = None
    """What `evlm predict` is given, where the task can be put in one question; its `examples` stand in model cards."""


ABOUT = {
    "vqa": About({"accuracy": "accuracy"}, "visual-question-answering", VQAQuestion),
    "retrieval": About({"reranked_mean_recall": "mean recall, reranked", "mean_recall": "mean recall"}),
    "grounding": About({"box_accuracy": "box accuracy"}, asked=GroundingQuestion),
    "pretraining": About({}),
}
