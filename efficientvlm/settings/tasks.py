"""Settings of the stages that learn a task."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from efficientvlm.settings.base import Aside, Count, Size
from efficientvlm.settings.common import Data, Stage, Train
from efficientvlm.settings.methods import PUBLISHED_KD, QUESTION_QUIRKS, Quirks, RetrievalWeights, TaskWeights, new_every_time

QUESTIONS_ONLY = ("weights", "questions_per_image", "max_answer_tokens", "answers", "min_answer_count", "rank_top", "decoder_init")


class TaskStage(Stage, Data, Train):
    model: str
    teacher: str | None = None
    task: Literal["vqa", "retrieval"] = "vqa"
    kd: float = Field(
        default_factory=lambda given: PUBLISHED_KD.get(given.get("task"), 0.4),
        ge=0,
        le=1,
        description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher; 0.5 by default for retrieval",
    )
    temperature: float = Field(1.0, gt=0)
    scale_by_temperature: bool = False
    weights: TaskWeights = Field(default_factory=TaskWeights, description="of VQA")
    retrieval_weights: RetrievalWeights = Field(default_factory=RetrievalWeights)
    hard_negatives: bool = Field(True, description="of retrieval: matching draws its negatives by similarity, as published; false: any")
    quirks: Quirks = Field(default_factory=Quirks)
    questions_per_image: Size = Field(6, ge=1, description="questions that share one vision pass")
    max_tokens: Size | None = Field(None, ge=4, description="longest text; by default as tuned, else as published or all positions")
    max_answer_tokens: Size = Field(10, ge=3)
    answers: str | None = Field(None, description="file with one answer a line; by default those of the training data")
    min_answer_count: Count = Field(1, ge=1, description="training questions that must accept an answer for it to be in the closed list")
    rank_top: Annotated[Count, Aside()] = Field(128, ge=1, description="candidates kept after the first token")
    decoder_init: Literal["auto", "teacher", "fusion"] = Field("auto", description="where a new answer decoder comes from")
    cache_teacher: Annotated[bool, Aside(same_bits=False)] = Field(
        False, description="run the teacher once a sample and keep what it says in memory; for logits (VQA) or itc_logits alone"
    )

    @field_validator("cache_teacher")
    @classmethod
    def _teacher_repeats_itself(cls, cache: bool, info: ValidationInfo) -> bool:
        if cache and not info.data.get("teacher"):
            raise ValueError("there is no teacher")
        if info.data.get("task") == "retrieval":
            wrong = new_every_time(info.data, "retrieval_weights", "itc_logits")
        else:
            wrong = new_every_time(info.data, "weights", "logits")
            wrong += ["quirks.unmasked_padding=false"] if "quirks" in info.data and info.data["quirks"].unmasked_padding else []
        if cache and wrong:
            raise ValueError(f"what the teacher says does not repeat itself unless {', '.join(wrong)}")
        return cache

    @field_validator(*QUESTIONS_ONLY, "retrieval_weights", "hard_negatives")
    @classmethod
    def _of_this_task(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        task = "vqa" if name in QUESTIONS_ONLY else "retrieval"
        usual = cls.model_fields[name].get_default(call_default_factory=True, validated_data={})
        if info.data.get("task", task) != task and value != usual:
            raise ValueError(f"it belongs to task {task}")
        return value

    @field_validator("quirks")
    @classmethod
    def _quirks_of_this_task(cls, quirks: Quirks, info: ValidationInfo) -> Quirks:
        wrong = [name for name in QUESTION_QUIRKS if getattr(quirks, name)]
        if wrong and info.data.get("task", "vqa") != "vqa":
            raise ValueError(f"{', '.join(wrong)} belong to task vqa")
        return quirks
