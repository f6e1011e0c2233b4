"""The tasks by name."""

from __future__ import annotations

from collections.abc import Collection

from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded
from efficientvlm.settings.common import Learning
from efficientvlm.tasks.assignment import Assignment
from efficientvlm.tasks.captioning import Captioning
from efficientvlm.tasks.embedding import Embedding
from efficientvlm.tasks.grounding import Grounding
from efficientvlm.tasks.linear_probe import LinearProbe
from efficientvlm.tasks.nlvr2 import NLVR2
from efficientvlm.tasks.pretraining import Pretraining
from efficientvlm.tasks.retrieval import Retrieval
from efficientvlm.tasks.task import Asked, Learnt, Task
from efficientvlm.tasks.vqa import VQA
from efficientvlm.tasks.zeroshot import Zeroshot

TASKS: dict[str, Task] = {
    "vqa": VQA(),
    "nlvr2": NLVR2(),
    "assignment": Assignment(),
    "retrieval": Retrieval(),
    "grounding": Grounding(),
    "captioning": Captioning(),
    "embedding": Embedding(),
    "zeroshot": Zeroshot(),
    "linear-probe": LinearProbe(),
    "pretraining": Pretraining(),
}
"""In the order in which they stand for a network that does several and was trained for none of them."""


def learnt_by(config: Learning) -> Learnt:
    """The task of a stage that trains.

    Raises:
        BadInput: no network learns it.
    """
    task = TASKS[config.task]
    if not isinstance(task, Learnt):
        raise BadInput(f"task {task.name} is not learnt", "it is measured only", "use evlm eval")
    return task


def preferred(loaded: Loaded) -> list[Task]:
    """All tasks, that which a network was last trained for first."""
    return sorted(TASKS.values(), key=lambda task: task.name != loaded.manifest.config.get("task"))


def measured_of(loaded: Loaded) -> Task | None:
    """The task that a network is measured by; None where it does none that has a main metric."""
    return next((task for task in preferred(loaded) if task.metrics and task.able(loaded)), None)


def asked_of(loaded: Loaded, given: Collection[str], name: str | None = None) -> Asked:
    """The task that is put to a network in one question; where it does several, the one called `name`, the one it was trained for or else
    the first, which asks what is `given`.

    Raises:
        BadInput: it cannot be asked anything, or not this.
    """
    asked = [task for task in preferred(loaded) if isinstance(task, Asked) and name in (None, task.name)]
    if not asked:
        raise BadInput(f"{name} cannot be asked in one question", "", "leave it out")
    able = [task for task in asked if task.able(loaded)]
    if not able:
        raise asked[0].refusal(loaded)
    fitting = [task for task in asked if all(task.asks.has([name]) for name in given)]
    if fitting and not set(fitting) & set(able):
        raise fitting[0].refusal(loaded)
    return next((task for task in able if task in fitting), able[0])
