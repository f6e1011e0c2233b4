"""Items to batches: tensors a model takes, with every draw seeded by (seed, step, sample, purpose)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientvlm.data.cells import LONGEST_TEXT
from efficientvlm.data.draw import generator, seed_of
from efficientvlm.data.items import PairItem, Pixels, VQAItem
from efficientvlm.data.masking import mask_tokens
from efficientvlm.data.tokenizer import ends_of, guarded
from efficientvlm.data.transforms import Augment, augment, names_a_side
from efficientvlm.errors import BadInput, shorten

Batch = dict[str, Any]
CACHED_TEXTS = 200_000
AT_A_TIME = 1_000_000  # characters: what a tokenizer makes of them takes about 100 bytes each
LEAST_VISIBLE = 0.5
TOUCH = 1e-4  # of a patch: less is rounding, not overlap


class Texts:
    """Strings to padded token ids, each distinct string tokenised once.

    A text begins with `cls` and ends with `sep`: BERT's [CLS] and [SEP], or the tokens that another tokenizer puts there; `cls` is None
    where it puts nothing in front.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = 40) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.cls, self.sep = ends_of(tokenizer)
        self._head = [] if self.cls is None else [self.cls]
        self.pad: int = tokenizer.pad_token_id
        self._ids: dict[str, list[int]] = {}
        self.special = frozenset(tokenizer.all_special_ids)
        unknown = tokenizer.unk_token_id  # byte-level tokenizers have none, or call the end of a text so
        self.unknown: int | None = None if unknown in (self.cls, self.sep, self.pad) else unknown
        self.read, self.unread = 0, 0
        """Tokens of all distinct strings so far, and how many of them are unknown."""
        self.cut: set[str] = set()
        self.longest = 0
        """Strings that were cut to `max_tokens` (at most 200,000 of them), and the most tokens one of them has."""

    @property
    def start(self) -> int:
        """The token in front of a text, from which a decoder goes on."""
        if self.cls is None:
            raise ValueError("this tokenizer puts nothing in front of a text")
        return self.cls

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each string, without special tokens, not truncated.

        Raises:
            BadInput: a string of more than 100,000 characters, or one on which the tokenizer fails.
        """
        known = self._ids
        new = list({text for text in texts if text not in known})
        if new:
            if len(known) + len(new) > CACHED_TEXTS:
                known = self._ids = {}  # a new one: another thread may be reading the old
                new = list(set(texts))
            for some in _portions(new):
                with guarded("the tokenizer", "check the texts, and the folder of the tokenizer"):
                    encoded = self.tokenizer(some, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
                known.update(zip(some, encoded["input_ids"], strict=True))
                self.read += sum(map(len, encoded["input_ids"]))
                self.unread += sum(ids.count(self.unknown) for ids in encoded["input_ids"])
        return [known[text] for text in texts]

    def identities(self, texts: Sequence[str]) -> list[tuple[int, ...] | None]:
        """What each string is to the tokenizer, equal where case and spacing alone differ; None for a string that it cannot read: one
        that has an unknown or a special token in it, or leaves no token at all."""
        return [tuple(ids) if ids and self.special.isdisjoint(ids) else None for ids in self.ids(texts)]

    def room(self, max_tokens: int | None = None, *, double_sep: bool = False) -> int:
        """Tokens of a text that fit between its ends."""
        return (max_tokens or self.max_tokens) - len(self._head) - 1 - double_sep

    def batch(self, texts: Sequence[str], max_tokens: int | None = None, *, double_sep: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask, both int64 `[B, L]`, padded to the longest; at most `max_tokens`, the closing token always kept.

        `double_sep` closes every text with two separators (a quirk of the published release).
        """
        tail = [self.sep] * (1 + double_sep)
        room = self.room(max_tokens, double_sep=double_sep)
        known = self.ids(texts)
        if max_tokens is None:
            self._note_cut(texts, known, room)
        rows = [[*self._head, *ids[:room], *tail] for ids in known]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        width = int(lengths.max(initial=0))
        mask = np.arange(width) < lengths[:, None]
        out = np.full((len(rows), width), self.pad, np.int64)
        out[mask] = np.fromiter((token for row in rows for token in row), np.int64, int(lengths.sum()))
        return torch.from_numpy(out), torch.from_numpy(mask.astype(np.int64))

    def _note_cut(self, texts: Sequence[str], known: Sequence[list[int]], room: int) -> None:
        for text, ids in zip(texts, known, strict=True):
            if len(ids) > room and len(self.cut) < CACHED_TEXTS:
                self.cut.add(text)
                self.longest = max(self.longest, len(ids) + self.max_tokens - room)


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in lists of at most a million characters, or of one text; :class:`BadInput` for a text that is too long."""
    some: list[str] = []
    size = 0
    for text in texts:
        if len(text) > LONGEST_TEXT:
            why = f"it has {len(text):,} characters, at most {LONGEST_TEXT:,} are read"
            raise BadInput(f"the text '{shorten(text, 40)}' is too long", why, "shorten it")
        if some and size + len(text) > AT_A_TIME:
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    yield some


def pair_batch(
    items: Sequence[PairItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    augment_kind: Augment = "light",
    mirror: bool = True,
    mask_probability: float = 0.25,
    max_masks: int = 8,
    max_tokens: int | None = None,
    task: bool = False,
) -> Batch:
    """One caption an image, masked and unmasked; `task` selects the milder augmentation of a task, and masks nothing.

    Where `mirror` allows it, half of the images are mirrored whose texts name no side; so in all functions here.

    Returns:
        samples, their number;
        pixels uint8 `[B, 3, H, W]`; text_ids, text_mask, masked_ids `[B, L]`; masked_positions, masked_labels `[B, M]` (label -100 where
        padded); image_ids `[B]` (equal for the same image) and caption_ids `[B]` (equal for the same caption), for contrastive targets;
        captions, the list of strings.
    """
    images, captions = [], []
    for item in items:
        rng = generator(seed, step, item.id, "pair")
        caption = item.captions[int(rng.integers(len(item.captions)))]
        images.append(augment(augment_kind, item.image, rng, flip_ok=mirror and not names_a_side(caption), task=task).image)
        captions.append(caption)
    batch: Batch = {"samples": len(items), "pixels": stack(images), "image_ids": _keys([item.id for item in items])}
    if task:
        return batch | _plain_texts(captions, texts, max_tokens)
    draws = [generator(seed, step, item.id, "mask") for item in items]
    return batch | _masked_texts(captions, texts, max_tokens, draws, mask_probability, max_masks)


def region_batch(
    items: Sequence[PairItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    patch_grid: int | tuple[int, int],
    augment_kind: Augment = "light",
    mirror: bool = True,
    regions_per_image: int = 5,
    mask_probability: float = 0.25,
    max_masks: int = 8,
    max_tokens: int | None = None,
) -> Batch:
    """Described regions of images, up to `regions_per_image` each, and the whole image with a caption (X-VLM, multi-grained).

    A region is kept if more than half of it is left after augmentation. Rows of one image follow each other, the whole image last.

    Args:
        patch_grid: rows and columns of patches of the vision tower, or one number for both.

    Returns:
        samples, the number of images;
        pixels uint8 `[I, 3, H, W]`; image_index `[R]` (row → image); image_mask `[R, 1 + patches]` (1 where a patch, in row-major order,
        overlaps the region; index 0, the CLS token, always); boxes float32 `[R, 4]` (centre, size); is_whole_image `[R]`; image_ids `[R]`
        (equal for the same region of the same image); and of the rows' texts all that :func:`pair_batch` gives.
    """
    grid = (patch_grid, patch_grid) if isinstance(patch_grid, int) else patch_grid
    images: list[Pixels] = []
    phrases: list[str] = []
    owners: list[str] = []
    image_index: list[int] = []
    boxes: list[Any] = []
    whole: list[int] = []
    for row, item in enumerate(items):
        rng = generator(seed, step, item.id, "region")
        chosen = [int(i) for i in rng.permutation(len(item.regions))[:regions_per_image]]
        said = [item.regions[i].phrase for i in chosen]
        caption = item.captions[int(rng.integers(len(item.captions)))] if item.captions else None
        sided = any(map(names_a_side, said if caption is None else [*said, caption]))
        corners = np.array([item.regions[i].box for i in chosen], np.float32)
        seen = augment(augment_kind, item.image, rng, corners, flip_ok=mirror and not sided, task=False)
        images.append(seen.image)
        for index, phrase, box, visible in zip(chosen, said, seen.boxes, seen.visible, strict=True):
            if visible > LEAST_VISIBLE:
                phrases.append(phrase)
                owners.append(f"{item.id}#{index}")
                boxes.append(box)
                image_index.append(row)
                whole.append(0)
        if caption is not None:
            phrases.append(caption)
            owners.append(item.id)
            boxes.append((0.5, 0.5, 1, 1))
            image_index.append(row)
            whole.append(1)
    placed = np.array(boxes, np.float32).reshape(-1, 4)
    batch: Batch = {
        "samples": len(items),
        "pixels": stack(images),
        "image_index": torch.tensor(image_index, dtype=torch.int64),
        "image_mask": torch.from_numpy(patches_of(placed, grid)),
        "boxes": torch.from_numpy(placed),
        "is_whole_image": torch.tensor(whole, dtype=torch.int64),
        "image_ids": _keys(owners),
    }
    draws = [generator(seed, step, owner, "region mask") for owner in owners]
    return batch | _masked_texts(phrases, texts, max_tokens, draws, mask_probability, max_masks)


def patches_of(boxes: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.int64]:
    """1 for CLS and for every patch that a box overlaps, `[n, 1 + rows * columns]`; a box has at least the patch of its centre."""
    spans = []
    for axis, count in ((1, grid[0]), (0, grid[1])):
        low = (boxes[:, axis] - boxes[:, axis + 2] / 2) * count
        high = (boxes[:, axis] + boxes[:, axis + 2] / 2) * count
        cell = np.arange(count)
        touched = (low[:, None] < cell + 1 - TOUCH) & (high[:, None] > cell + TOUCH)
        centre = (boxes[:, axis] * count).astype(np.int64).clip(0, count - 1)
        spans.append(touched | (cell == centre[:, None]))
    inside = spans[0][:, :, None] & spans[1][:, None, :]
    return np.concatenate([np.ones((len(boxes), 1), bool), inside.reshape(len(boxes), -1)], 1).astype(np.int64)


def vqa_batch(
    items: Sequence[VQAItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    augment_kind: Augment = "none",
    mirror: bool = True,
    questions_per_image: int = 6,
    train: bool = True,
    max_answer_tokens: int = 10,
    max_tokens: int | None = None,
    double_sep: bool = False,
) -> Batch:
    """Questions that share the vision pass of their image.

    `train` draws `questions_per_image` of each image without replacement (all if there are fewer); otherwise all are taken, in order.

    Returns:
        samples, the number of images;
        pixels uint8 `[I, 3, H, W]`; image_index `[Q]` (question → image); question_ids, question_mask `[Q, L]`; answer_ids, answer_mask
        `[A, La]`; answer_index `[A]` (answer → question); answer_weights float32 `[A]`; distinct_questions `[D]` (rows of question_ids
        without repetition) and distinct_index `[Q]` (question → entry of those); question_texts and answer_texts (by question, the
        accepted answers with weights), plain lists; annotators (by question, 0 where not known); item_ids (by image).
    """
    images: list[Pixels] = []
    questions: list[str] = []
    answers: list[list[tuple[str, float]]] = []
    annotators: list[int] = []
    image_index: list[int] = []
    for row, item in enumerate(items):
        rng = generator(seed, step, item.id, "vqa")
        chosen = item.questions
        if train and len(chosen) > questions_per_image:
            chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:questions_per_image].tolist())]
        sided = any(names_a_side(q.text) or any(names_a_side(answer) for answer, _ in q.answers) for q in chosen)
        images.append(augment(augment_kind, item.image, rng, flip_ok=mirror and not sided, task=True).image)
        questions.extend(question.text for question in chosen)
        answers.extend(question.answers for question in chosen)
        annotators.extend(question.annotators for question in chosen)
        image_index.extend([row] * len(chosen))
    first = {text: row for row, text in reversed(list(enumerate(questions)))}
    entry = {text: number for number, text in enumerate(dict.fromkeys(questions))}
    flat = [(index, answer, weight) for index, accepted in enumerate(answers) for answer, weight in accepted]
    question_ids, question_mask = texts.batch(questions, max_tokens)
    answer_ids, answer_mask = texts.batch([answer for _, answer, _ in flat], max_answer_tokens, double_sep=double_sep)
    return {
        "samples": len(items),
        "pixels": stack(images),
        "image_index": torch.tensor(image_index),
        "question_ids": question_ids,
        "question_mask": question_mask,
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "answer_index": torch.tensor([index for index, _, _ in flat], dtype=torch.int64),
        "answer_weights": torch.tensor([weight for _, _, weight in flat], dtype=torch.float32),
        "distinct_questions": torch.tensor([first[text] for text in entry], dtype=torch.int64),
        "distinct_index": torch.tensor([entry[text] for text in questions], dtype=torch.int64),
        "question_texts": questions,
        "answer_texts": answers,
        "annotators": annotators,
        "item_ids": [item.id for item in items],
    }


def stack(images: Sequence[Pixels]) -> Tensor:
    """Images `[H, W, 3]` of one size as a uint8 tensor `[B, 3, H, W]`."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))


def _keys(names: Sequence[str]) -> Tensor:
    return torch.tensor([seed_of(0, name) for name in names], dtype=torch.int64)


def _plain_texts(captions: list[str], texts: Texts, max_tokens: int | None) -> Batch:
    text_ids, text_mask = texts.batch(captions, max_tokens)
    return {"text_ids": text_ids, "text_mask": text_mask, "caption_ids": _keys(captions), "captions": captions}


def _masked_texts(
    captions: list[str], texts: Texts, max_tokens: int | None, draws: list[np.random.Generator], probability: float, max_masks: int
) -> Batch:
    batch = _plain_texts(captions, texts, max_tokens)
    masked, positions, labels = mask_tokens(batch["text_ids"], batch["text_mask"], texts.tokenizer, draws, probability, max_masks)
    return {**batch, "masked_ids": masked, "masked_positions": positions, "masked_labels": labels}
