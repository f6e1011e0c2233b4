"""What a teacher says of a sample, computed when the sample is first seen and kept for the next time.

Only for outputs that depend on nothing but the sample: no augmentation, no drawn negatives or masks. They are kept in float32, in main
memory; every process keeps those of the samples that it reads. A resumed run starts with nothing kept. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientvlm.exchange import Rows
from efficientvlm.families.base import Record

Kept = dict[Hashable, Tensor]


class CachedAnswers:
    """`logits` of a `teacher` at the tokens of the true answers, by picture, question and answer.

    4 bytes for each entry of the vocabulary and each token of an answer, its first and last included.
    """

    def __init__(self, family: Any, teacher: Any) -> None:
        self.family, self.teacher = family, teacher
        self.kept: Kept = {}

    def __call__(self, batch: dict[str, Any]) -> Record:
        """For a `data.collate.vqa_batch`: `logits` [A, L, V], 0 where an answer is padded."""
        owners = [batch["item_ids"][image] for image in batch["image_index"].tolist()]
        asked = zip(owners, batch["question_texts"], batch["answer_texts"], strict=True)
        keys = [(owner, question, answer) for owner, question, answers in asked for answer, _ in answers]
        mask = batch["answer_mask"].bool()

        def compute(rows: list[int]) -> Sequence[Tensor]:
            some = batch if len(rows) == len(keys) else part(batch, rows)
            logits = self.family.forward(self.teacher, some)["logits"]
            return [values[seen] for values, seen in zip(logits, some["answer_mask"].bool(), strict=True)]

        found = torch.cat(look_up(self.kept, keys, compute)).to(mask.device)
        logits = found.new_zeros(*mask.shape, found.shape[-1])
        logits[mask] = found
        return Record(logits=logits)


class CachedFeatures:
    """`image_feature` and `text_feature` of a `teacher`, by picture and caption: 4 bytes for each of their entries."""

    def __init__(self, family: Any, teacher: Any) -> None:
        self.family, self.teacher = family, teacher
        self.images: Kept = {}
        self.texts: Kept = {}

    def __call__(self, batch: dict[str, Any]) -> Record:
        """For a `data.collate.pair_batch`: unit vectors [B, E] of the pairs of all processes, and `temp`."""
        pixels, ids, mask = batch["pixels"], batch["text_ids"], batch["text_mask"]

        def images(rows: list[int]) -> Sequence[Tensor]:
            return list(self.family.image_features(self.teacher, pixels[rows])[1])

        def texts(rows: list[int]) -> Sequence[Tensor]:
            return list(self.family.text_features(self.teacher, ids[rows], mask[rows])[1])

        everyone = Rows(len(ids))
        image = torch.stack(look_up(self.images, batch["image_ids"].tolist(), images)).to(ids.device)
        text = torch.stack(look_up(self.texts, batch["captions"], texts)).to(ids.device)
        temperature = self.teacher.temp.clamp(0.001, 0.5)
        return Record(image_feature=everyone.gather(image), text_feature=everyone.gather(text), temp=temperature)


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
