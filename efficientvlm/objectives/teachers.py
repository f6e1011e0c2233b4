"""Teachers: whatever answers a batch with a record that a student's is compared with.

None is part of the module that learns: a teacher is in evaluation mode, has no gradients and is in no training state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from efficientvlm.families.network import Record
from efficientvlm.objectives.losses import Contrast
from efficientvlm.runtime.exchange import Rows

if TYPE_CHECKING:
    from efficientvlm.objectives.objective import Objective

Kept = dict[Hashable, Tensor]


class Teacher(Protocol):
    """Answers a batch: `want` are the taps and outputs to record, `drawn` is what the student drew, so that both see the same."""

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record: ...


class LiveTeacher:
    """A network beside the student, which makes the passes of the student's own losses `hard`."""

    def __init__(self, hard: Objective, model: Any) -> None:
        self.hard, self.model = hard, model.eval().requires_grad_(False)

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        return self.hard.passes(self.model, batch, step, want, drawn).record


class Vectors(Protocol):
    """Vectors that are looked up, as a `checkpoints.store.Store` has them."""

    def vectors(self, ids: Sequence[str]) -> Tensor:
        """Unit vectors [N, E] in float32, on the CPU."""


class StoredTeacher:
    """What a teacher says of single samples, out of stores that `evlm embed` wrote: of images, of sentences, or of both.

    A vector is that of the sample as the teacher's own preprocessing shows it, whatever view of it the student is shown.
    """

    def __init__(self, images: Vectors | None = None, sentences: Vectors | None = None) -> None:
        self.stores = {"image_ids": images, "sentence_ids": sentences}

    def look_up(self, batch: dict[str, Any], ids: str, device: torch.device) -> Tensor | None:
        """Unit vectors [N, E] in float32 of the samples that the batch lists under `ids`, `image_ids` or `sentence_ids`; None without a
        store of them.

        Raises:
            BadInput: a sample of which the store has no vector.
        """
        store = self.stores[ids]
        return store.vectors(batch[ids]).to(device, non_blocking=True) if store else None


class CachedTeacher:
    """What a network says of a sample, computed when the sample is first seen and kept for the next time.

    Only for outputs that depend on nothing but the sample: no augmentation, no drawn negatives or masks. They are kept in float32, in main
    memory; every process keeps those of the samples that it reads. A resumed run starts with nothing kept. Ours.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)


class CachedAnswers(CachedTeacher):
    """`logits` at the tokens of the true answers, by picture, question and answer.

    4 bytes for each entry of the vocabulary and each token of an answer, its first and last included.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kept: Kept = {}

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        """For a `data.kinds.questions.vqa_batch`: `logits` [A, L, V], 0 where an answer is padded."""
        owners = [batch["item_ids"][image] for image in batch["image_index"].tolist()]
        asked = zip(owners, batch["question_texts"], batch["answer_texts"], strict=True)
        keys = [(owner, question, answer) for owner, question, answers in asked for answer, _ in answers]
        mask = batch["answer_mask"].bool()

        def compute(rows: list[int]) -> Sequence[Tensor]:
            some = batch if len(rows) == len(keys) else part(batch, rows)
            logits = self.model.run(some)["logits"]
            return [values[seen] for values, seen in zip(logits, some["answer_mask"].bool(), strict=True)]

        found = torch.cat(look_up(self.kept, keys, compute)).to(mask.device)
        logits = found.new_zeros(*mask.shape, found.shape[-1])
        logits[mask] = found
        return Record(logits=logits)


class CachedCaptions(CachedTeacher):
    """`logits` at the tokens of captions, by picture and caption.

    4 bytes for each entry of the vocabulary and each token, the first and last and those of the prompt included.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kept: Kept = {}

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        """For a `data.kinds.pairs.caption_batch`: `logits` [C, L, V], 0 where a caption is padded."""
        index, mask = batch["image_index"], batch["text_mask"].bool()
        keys = [(batch["item_ids"][image], caption) for image, caption in zip(index.tolist(), batch["captions"], strict=True)]

        def compute(rows: list[int]) -> Sequence[Tensor]:
            images, image_index = index[rows].unique(return_inverse=True)
            some = {name: batch[name][rows] for name in ("text_ids", "text_mask")}
            logits = self.model.run({"pixels": batch["pixels"][images], "image_index": image_index, **some})["logits"]
            return [values[seen] for values, seen in zip(logits, mask[rows], strict=True)]

        found = torch.cat(look_up(self.kept, keys, compute)).to(mask.device)
        logits = found.new_zeros(*mask.shape, found.shape[-1])
        logits[mask] = found
        return Record(logits=logits)


class CachedVerdicts(CachedTeacher):
    """`logits` of statements, by their two pictures and text: 4 bytes for each of two."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kept: Kept = {}

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        """For a `data.kinds.statements.statement_batch`: `logits` [S, 2]."""
        rows_of = batch["pair_index"]
        keys = [(batch["item_ids"][pair], text) for pair, text in zip(rows_of.tolist(), batch["statements"], strict=True)]

        def compute(rows: list[int]) -> Sequence[Tensor]:
            chosen = torch.tensor(rows, device=rows_of.device)
            pairs, index = rows_of[chosen].unique(return_inverse=True)
            some = {name: batch[name][pairs] for name in ("pixels", "second_pixels")}
            texts = {name: batch[name][chosen] for name in ("text_ids", "text_mask")}
            return list(self.model.run({**some, **texts, "pair_index": index})["logits"])

        return Record(logits=torch.stack(look_up(self.kept, keys, compute)).to(rows_of.device))


class CachedFeatures(CachedTeacher):
    """`itc_logits`, and the features that they are made of, by picture and by caption: 4 bytes for each entry of a feature.

    `temperature` says by what similarities are divided, by default the network's own.
    """

    def __init__(self, model: Any, temperature: Callable[[], Tensor] | None = None) -> None:
        super().__init__(model)
        self.temperature: Callable[[], Tensor] = temperature or (lambda: model.temp.clamp(0.001, 0.5))
        self.images: Kept = {}
        self.texts: Kept = {}

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        """For a `data.kinds.pairs.pair_batch`: similarities [B, B] of the pairs of all processes, divided by the temperature, `contrast`,
        and the features of this process's pairs."""
        pixels, ids, mask = batch["pixels"], batch["text_ids"], batch["text_mask"]

        def images(rows: list[int]) -> Sequence[Tensor]:
            return list(self.model.embed_images(pixels[rows])[1])

        def texts(rows: list[int]) -> Sequence[Tensor]:
            return list(self.model.embed_texts(ids[rows], mask[rows])[1])

        everyone = Rows(len(ids))
        image = torch.stack(look_up(self.images, batch["image_ids"].tolist(), images)).to(ids.device)
        text = torch.stack(look_up(self.texts, batch["captions"], texts)).to(ids.device)
        temperature = self.temperature()
        similar = everyone.gather(image) @ everyone.gather(text).T / temperature
        features = {"image_feature": image, "text_feature": text}
        return Record(itc_logits=similar, contrast=Contrast(image, text, temperature, everyone), **features)


class CachedBoxes(CachedTeacher):
    """`boxes` by picture and phrase: 16 bytes each."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.kept: Kept = {}

    def __call__(self, batch: dict[str, Any], step: int, want: Iterable[str], drawn: Any) -> Record:
        """For a `data.kinds.expressions.expression_batch`: `boxes` [Q, 4]."""
        keys = list(zip(batch["item_ids"], batch["phrases"], strict=True))

        def compute(rows: list[int]) -> Sequence[Tensor]:
            asked = {name: batch[name][rows] for name in ("image_index", "question_ids", "question_mask")}
            return list(self.model.ground({"pixels": batch["pixels"], **asked})["boxes"])

        return Record(boxes=torch.stack(look_up(self.kept, keys, compute)).to(batch["pixels"].device))


def look_up(kept: Kept, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
    """What is kept for `keys`; `compute` gives what is missing, for the positions of the first of equal keys."""
    first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in kept}
    if missing := sorted(first.values()):
        for row, value in zip(missing, compute(missing), strict=True):
            kept[keys[row]] = value.float().cpu().clone()
    return [kept[key] for key in keys]


def part(batch: dict[str, Any], answers: list[int]) -> dict[str, Any]:
    """A batch of some of the answers of a `vqa_batch`, with the questions and pictures that they belong to."""
    rows = torch.tensor(answers, device=batch["answer_index"].device)
    questions, answer_index = batch["answer_index"][rows].unique(return_inverse=True)
    images, image_index = batch["image_index"][questions].unique(return_inverse=True)
    return {
        "pixels": batch["pixels"][images],
        "image_index": image_index,
        **{name: batch[name][questions] for name in ("question_ids", "question_mask")},
        **{name: batch[name][rows] for name in ("answer_ids", "answer_mask")},
        "answer_index": answer_index,
    }
