"""Soft labels as a method of distillation: a student of any size learns what its teacher says, not how the teacher gets there."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from efficientvlm.errors import BadInput
from efficientvlm.families.network import Network
from efficientvlm.loaded import Loaded
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.terms import contrast, logits
from efficientvlm.settings.common import Taught


class SoftLabels(Taught):
    """What only this method knows, beside the settings of every stage that may have a teacher."""

    kd: float = Field(0.5, ge=0, le=1, description="L = (1 - kd) * task + kd * L_KD; 0 without a teacher")
    temperature: float = Field(2.0, gt=0, description="divides the logits of teacher and student before they are compared")


def needs(student: Loaded, teacher: Loaded, settings: SoftLabels) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot teach `student`: both read the same tokens and the same pictures; sizes do not matter."""
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        yield BadInput("teacher and student have different tokenizers", f"{teacher.path} and {student.path}", "use another teacher")
    if (student.sizes.image_size, student.preprocessing) != (teacher.sizes.image_size, teacher.preprocessing):
        yield BadInput("teacher and student read different pictures", f"{teacher.path} and {student.path}", "use another teacher")


def distilled(hard: Objective, teacher: Network, settings: SoftLabels) -> Objective:
    """The losses of a task, mixed with the KL divergence of every distribution that the task makes: answers, matching, contrast.

    Use it where teacher and student have no layers or widths in common, or where the terms of a larger method gain nothing.

    Args:
        hard: the losses of the task on the student, with the table of what can be compared.
        teacher: a network that does the same task.
        settings: `kd` and `temperature`.

    Inputs and outputs are those of `objectives.distillation.Distilled`: a batch of the task, to the losses of `hard`, `kd`, and the mixture
    as `loss`. Source: Hinton et al. 2015, whose factor T² keeps the gradients of both parts in proportion.

    Example: `evlm finetune --set distillation=soft_labels --teacher runs/teacher --model runs/student --data easy-vqa --out runs/taught`

    Raises:
        BadInput: the task has no distributions to compare.
    """
    if not settings.kd:
        return hard
    terms = [term for term in hard.terms if term.distance in (logits, contrast)]
    if not terms:
        raise BadInput("soft labels need logits", "the losses of this task offer none to compare", "use another method of distillation")
    weights = {term.weight: 1.0 for term in terms}
    taught = LiveTeacher(hard, teacher)
    return Distilled(hard, taught, terms, kd=settings.kd, weights=weights, maps={}, temperature=settings.temperature, scale=True)
