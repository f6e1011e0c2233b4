"""What a task is: the samples it reads, how a network learns it, and how it is measured, asked and timed.

A stage asks the task and never its name. `docs/add-a-task.md` says what a new one takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from efficientvlm.data.kinds.kind import Kind
from efficientvlm.data.opening import drawn
from efficientvlm.data.reading import Reading, of_read, of_texts
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.network import refusal
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.objectives.objective import Objective
from efficientvlm.runtime.hardware import autocast
from efficientvlm.runtime.progress import say
from efficientvlm.settings.common import Asking
from efficientvlm.settings.stages import Bench
from efficientvlm.settings.tasks import ABOUT
from efficientvlm.tasks.choices import Choice
from efficientvlm.tasks.influence import Influence, draw_inputs, of_anything
from efficientvlm.training.loop import Batch


def held_out(source: Any, limit: int | None, title: str, quiet: bool) -> Any:
    """`source`, or `limit` images drawn from it; that they were drawn, or that there are none, is said."""
    some = drawn(source, limit)
    if len(some) < len(source):
        say(f"{title}: {len(some):,} of {len(source):,} images, drawn at random", quiet=quiet)
    if not len(some):
        say(f"{title}: no images are held out, so nothing was measured; raise val_fraction or give --val", quiet=quiet)
    return some


def check_question(texts: Texts, question: str, what: str) -> None:
    """Say that tokens of a question, called `what`, are unknown to the network; :class:`BadInput` for one that it would have to cut."""
    own = Texts(texts.tokenizer)
    words, most = len(own.ids([question])[0]), texts.room()
    if words > most:
        raise BadInput(f"the {what} is too long", f"it has {words} tokens, the model reads {most}", "be brief, or raise --max-tokens")
    for remark in of_read(own):
        say(f"predict: {remark}")


def timed_passes(loaded: Loaded, config: Bench, device: torch.device, run: Callable[[Batch], object]) -> Callable[[int], object]:
    """A function of the batch size that gives `run` a batch of the network's example, with random pixels and words."""
    model, draw = loaded.model.to(device).eval(), torch.Generator().manual_seed(config.seed)
    batches = {size: model.example(size, config.text_length, device) for size in config.batch_sizes}
    for batch in batches.values():
        draw_inputs(loaded, batch, draw)

    def answer(size: int) -> object:
        with autocast(device, config.precision):
            return run(batches[size])

    return answer


def gain_untrained(loaded: Loaded, ability: str) -> None:
    """Give `loaded.model` an ability that it has not learnt; :class:`BadInput` where it cannot, and so cannot be timed beside others."""
    try:
        loaded.model, _ = loaded.model.gain(ability)
    except BadInput as error:
        why = error.why or error.what
        raise BadInput(f"{loaded.path} cannot be timed beside the others", why, "time models that do the same thing") from None


class Task:
    """A task that can be measured."""

    name: str
    kind: Kind[Any, Any]
    """What a sample is. Tasks of one kind read the same data."""
    needs: tuple[str, ...]
    """Abilities of a network that does this; see `families.network.ABILITIES`."""
    final = True
    """Whether a network that has learnt it is made for use; else for learning another task."""
    also: tuple[str, ...] = ()
    """Metrics that are kept beside the main ones where forms of one model are compared."""

    @property
    def metrics(self) -> dict[str, str]:
        """Main metrics and what to call them; the first that was measured counts."""
        return ABOUT[self.name].metrics if self.name in ABOUT else {}

    def able(self, loaded: Loaded) -> bool:
        """Whether a network does this as it is."""
        return loaded.abilities.issuperset(self.needs)

    def remedy(self, loaded: Loaded) -> str:
        """What to do about a network that is not able; empty where another one is to be used."""
        return ""

    def refusal(self, loaded: Loaded, role: str = "") -> BadInput:
        """What to say of a network that is not able, which is `role` of the stage."""
        lacking = next(ability for ability in self.needs if ability not in loaded.abilities)
        return refusal(loaded.config, lacking, f"{role} {loaded.path}".lstrip(), fix=self.remedy(loaded))

    def files(self, config: Any) -> dict[str, str | None]:
        """Role → file that its settings name."""
        return {}

    def reads(self, config: Any) -> dict[str, Any]:
        """Role → settings of further data that :meth:`evaluate` reads, which gets them as `others`, by role."""
        return {}

    def check(self, config: Any, loaded: Loaded) -> None:
        """:class:`BadInput` for a network that cannot be measured as `config` of the eval stage says."""
        if not self.able(loaded):
            raise self.refusal(loaded)

    def evaluate(self, config: Any, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        """What the eval stage writes down: `metric` in words, how it was measured, `influence` and `metrics`.

        A task that :meth:`reads` further data has an argument `others` besides: role → samples.

        Raises:
            BadInput: nothing to measure on.
        """
        raise NotImplementedError

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        """The metrics of `loaded`, asked as it was tuned, on all of `source`."""
        raise NotImplementedError

    def reading_of_measuring(self, config: Any, loaded: Loaded, source: Any) -> Reading:
        """What the tokenizer makes of the texts that :meth:`evaluate` reads."""
        return of_texts(texts_of(loaded), source)

    def bytes_of_measuring(self, config: Any, loaded: Loaded, source: Any) -> int:
        """Bytes that :meth:`evaluate` holds beside weights."""
        return 0

    def also_writes(self, config: Any) -> list[str]:
        """Files that :meth:`evaluate` writes beside its result."""
        return []

    def exported(self, loaded: Loaded) -> dict[str, Any]:
        """What the description of exported graphs says of how they are asked."""
        return {}

    def choices(self, loaded: Loaded, source: Any, count: int, seed: int) -> list[Choice]:
        """What `loaded` says of the first `count` pictures of `source`, or without one of random ones, always taking what is likeliest.

        Export compares forms of a network by it; none where a network says nothing that can be compared like this.
        """
        return []


class Beside(NamedTuple):
    """Samples that a task learns from beside its own, as an independent stream: `batch_size` of them a step, over all processes.

    `config` has the settings of data that say where they are.
    """

    kind: Kind[Any, Any]
    config: Any
    batch_size: int


class Learnt(Task):
    """A task that a network can learn."""

    own_losses = True
    """Whether there is something to learn without a teacher."""
    grows: tuple[str, ...] = ()
    """Settings with which the memory of a step grows, besides those of every task."""

    def problems(self, config: Any, student: Loaded) -> Iterator[BadInput]:
        """Every reason why `student` cannot learn this as `config` says."""
        yield from ()

    def teacher_problems(self, config: Any, teacher: Loaded) -> Iterator[BadInput]:
        """Every reason why `teacher` has nothing to say on this task."""
        if not self.able(teacher):
            yield self.refusal(teacher, "teacher")

    def stores(self, config: Any) -> dict[str, str]:
        """Role → folder of embeddings (`checkpoints.store`) that the settings name, in which a teacher's answers are looked up."""
        return {}

    def fitting(
        self,
        config: Any,
        student: Loaded,
        teacher: Loaded | None,
        digest: str | None,
        stores: Mapping[str, Any],
        sources: dict[str, Any],
        note: Callable[[str], None],
    ) -> dict[str, Any]:
        """The training data `sources`, by role, without the samples that `stores` lack, and what is not known or left out is noted.

        Args:
            digest: that of the teacher's manifest, by which a store names it; None without a teacher.

        Raises:
            BadInput: a store is of another teacher or of other data, or too much is missing.
        """
        return sources

    def taught_by(self, config: Any, teacher: Any, stores: Mapping[str, Any]) -> Any:
        """What a method of distillation is given as the teacher: its network (None where stores stand for it), or what asks it."""
        return teacher

    def adapt(self, config: Any, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """The student's network with what the task needs, and the names of its tensors that play a new part; :class:`BadInput` if it
        cannot be."""
        if not self.able(student):
            raise self.refusal(student)
        return student.model, []

    def changes(self, added: int) -> str:
        """What :meth:`adapt` did, in words: `added` parameters are there more, or fewer."""
        return f"{'added' if added > 0 else 'left behind'}: {added:+,} parameters"

    def configure(self, config: Any, student: Loaded, source: Any) -> None:
        """Note in the student's configuration what its training data decide."""

    def reading(self, config: Any, student: Loaded, sources: dict[str, Any]) -> Reading:
        """What the tokenizer makes of the texts, once the student is configured."""
        return of_texts(texts_of(student, config.max_tokens), sources["train"])

    def objective(self, config: Any, student: Loaded) -> Objective:
        """The task's own losses."""
        raise NotImplementedError

    def objective_on(self, config: Any, student: Loaded, source: Any) -> Objective:
        """The same where it depends on the training data `source` beyond the batches."""
        return self.objective(config, student)

    def notes(self, config: Any, student: Loaded, source: Any) -> dict[str, Any]:
        """What the manifest says of how it was learnt beyond the settings, where these leave something to the network or to the data."""
        return {}

    def elements_beside(self, config: Any, student: Loaded, source: Any) -> int:
        """Elements that the objective keeps beside the network, in memory and in the training state, and does not learn."""
        return 0

    def batches(self, config: Any, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        """Training batches of one step; each is one update, and says how many samples it holds.

        A process of its own may make them, ahead of their use: they follow from what is given here alone, what is noted in objects is lost
        (but for what `texts` and sources count), and no other process of the run can be asked. See :meth:`settled`.
        """
        raise NotImplementedError

    def settled(self, batches: Sequence[Batch], step: int) -> Sequence[Batch]:
        """What all processes of a run learn together of the batches that each has made; they may ask one another here."""
        return batches

    def beside(self, config: Any) -> dict[str, Beside]:
        """Role → samples of another kind that are learnt from at the same time, in an order and number of their own."""
        return {}

    def completed(
        self, config: Any, student: Loaded, batches: list[Batch], beside: Mapping[str, Sequence[Any]], texts: Texts, step: int
    ) -> list[Batch]:
        """`batches` with the samples of :meth:`beside` at this step, by role; called where there are any, and like :meth:`batches`."""
        raise NotImplementedError

    def freeze(self, config: Any, student: Loaded) -> None:
        """Take out of training what is not to be learnt: the weights of the towers in `freeze`; the heads on them still learn.

        Contrast with a frozen vision tower is locked-image tuning (LiT, Zhai et al. 2022): where pretrained towers meet few pairs it
        learns faster, and a step goes back through the text tower alone.
        """
        for name, parameter in student.model.named_parameters():
            if student.model.tower_of(name) in config.freeze:
                parameter.requires_grad_(False)

    def begin(self, config: Any, student: Loaded, teacher: Loaded | None, sources: Mapping[str, Any]) -> None:
        """What is to be found out before training begins, with all weights there; :class:`BadInput` if there is no use in it."""

    def validate(self, config: Any, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        """Metrics on held-out data at the end of a training stage."""
        raise NotImplementedError

    def validate_on(self, config: Any, student: Loaded, teacher: Loaded | None, sources: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
        """The same where it takes more: the teacher, and all that is read, by role."""
        return self.validate(config, student, sources["val"], quiet)

    def influence(self, config: Any, student: Loaded, source: Any) -> Influence:
        """What the inputs do to the outputs, on some of the held-out samples."""
        return of_anything(student)

    def bytes_of_cached_teacher(self, config: Any, teacher: Loaded, source: Any, images_seen: int) -> int:
        """Bytes that a cached teacher comes to keep in one process, at most, over a run that reads `images_seen` images, some again."""
        raise NotImplementedError


class Asked(Task):
    """A task that can be put to a network in one question."""

    timed_as: str = ""
    """What is timed, in words."""

    @property
    def asks(self) -> type[Asking]:
        """What a question consists of; the options of evlm predict follow from it."""
        asked = ABOUT[self.name].asked
        assert asked is not None
        return asked

    def ask(self, config: Any, loaded: Loaded) -> dict[str, Any]:
        """The answer to a question, which `config` is (of :attr:`asks`), as evlm predict shows it."""
        raise NotImplementedError

    def timed(self, loaded: Loaded, config: Bench, device: torch.device, among: Sequence[Loaded], quiet: bool) -> Callable[[int], object]:
        """A function of the batch size that answers prepared random questions; a network that cannot yet is made able, in memory.

        `among` are all models that are timed beside it.
        """
        raise NotImplementedError

    def make_able(self, loaded: Loaded) -> None:
        """Let a network that has not learnt the task do it untrained, in memory; :class:`BadInput` where that cannot be."""
        if not self.able(loaded):
            raise self.refusal(loaded)

    def bytes_of_timing(self, loaded: Loaded, config: Bench) -> int:
        """Bytes that a call of :meth:`timed` holds beside weights; `loaded` is able."""
        return 0

    def can_be_timed(self, models: Sequence[Loaded]) -> bool:
        """Whether this is what is timed of `models`; where no task is, it is the forward pass."""
        return False
