"""The `easy-vqa` package: 5,000 pictures of one coloured shape with 48,248 questions, grouped by picture."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from efficientvlm.data.draw import generator, some_of
from efficientvlm.data.images import open_image
from efficientvlm.data.items import Pixels, Question
from efficientvlm.data.kinds.questions import QUESTIONS, VQAItem
from efficientvlm.data.preprocessing import Preprocessing, side_of
from efficientvlm.errors import BadInput

NATIVE_SIZE = 64
SPLIT_SEED = 20190719  # fixed: a picture held out for validation in one stage must be held out in all of them


class EasyVQA:
    """One split as a source of :class:`VQAItem`.

    The package has no validation split, so `val_fraction` of the *training pictures* are held out, always the same ones whatever the seed
    of the run. Pictures of a split are decoded on first use into one uint8 array.

    Raises:
        BadInput: an unknown split, or the package is not installed.
    """

    name = "easy-vqa"
    licence = "MIT"

    def __init__(
        self, split: str, *, val_fraction: float = 0.1, limit: int | None = None, image_size: Preprocessing | int | None = None
    ) -> None:
        try:
            import easy_vqa
        except ImportError:
            raise BadInput("data easy-vqa", "the package easy-vqa is not installed", "pip install easy-vqa") from None
        if split not in ("train", "val", "test"):
            raise BadInput(f"easy-vqa has no split {split}", "", "use train, val or test")
        self.split, self.how, self.side = split, image_size or NATIVE_SIZE, side_of(image_size) or NATIVE_SIZE
        if split == "test":
            texts, answers, image_ids = easy_vqa.get_test_questions()
            self._paths = easy_vqa.get_test_image_paths()
        else:
            texts, answers, image_ids = easy_vqa.get_train_questions()
            self._paths = easy_vqa.get_train_image_paths()
        questions: dict[int, list[Question]] = {image_id: [] for image_id in sorted(self._paths)}
        for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
            questions[image_id].append(Question(text, [(answer, 1.0)]))
        self._all_questions = questions
        self._ids = _split(list(questions), split, val_fraction)
        self.notes: list[str] = []
        if limit is not None and limit < len(self._ids):
            self.notes.append(f"{limit:,} of {len(self._ids):,} images, drawn at random (seed 0)")
            self._ids = [self._ids[index] for index in some_of(len(self._ids), limit)]
        self.by_one = True  # pictures are few, and decoded once
        self._pixels: Pixels | None = None
        self._lock = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the questions and pictures of the package's split (train and val share one)."""
        digest = hashlib.sha256()
        for image_id, questions in self._all_questions.items():
            digest.update(Path(self._paths[image_id]).read_bytes())
            digest.update(repr([(question.text, question.answers) for question in questions]).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> VQAItem:
        image_id = self._ids[index]
        return VQAItem(self._key(image_id), self._images()[index], self._all_questions[image_id])

    def ids(self) -> Iterator[str | None]:
        return map(self._key, self._ids)

    def _key(self, image_id: int) -> str:
        return f"easy-vqa/{'test' if self.split == 'test' else 'train'}/{image_id}"

    def texts(self) -> Iterator[str]:
        for questions in self.contents():
            yield from QUESTIONS.texts(questions)

    def contents(self) -> Iterator[list[Question]]:
        for image_id in self._ids:
            yield self._all_questions[image_id]

    def _images(self) -> Pixels:
        if self._pixels is None:
            with self._lock:
                if self._pixels is None:
                    pixels = np.empty((len(self._ids), self.side, self.side, 3), np.uint8)
                    for row, image_id in enumerate(self._ids):
                        pixels[row] = open_image(self._paths[image_id], self.how)
                    self._pixels = pixels
        return self._pixels


def _split(ids: list[int], split: str, val_fraction: float) -> list[int]:
    if split == "test":
        return ids
    order = [ids[i] for i in generator(SPLIT_SEED, "easy-vqa", "val").permutation(len(ids))]
    held_out = round(val_fraction * len(ids))
    return order[:held_out] if split == "val" else order[held_out:]
