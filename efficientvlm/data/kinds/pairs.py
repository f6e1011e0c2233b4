"""Image-text pairs: a picture with captions and, where known, described regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from efficientvlm.data import phrases
from efficientvlm.data.batch import Batch, keys, stack
from efficientvlm.data.cells import MOST_LISTED, check_length, check_size, is_missing, listed, number, shown
from efficientvlm.data.draw import generator
from efficientvlm.data.items import Box, Pixels, Region
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.masking import mask_tokens
from efficientvlm.data.preprocessing import seen_regions
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import Augment, augment, names_a_side
from efficientvlm.errors import BadInput

PLAIN = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~", ""), "-": " ", "/": " "})
LEAST_VISIBLE = 0.5
TOUCH = 1e-4  # of a patch: less is rounding, not overlap


@dataclass(slots=True)
class PairItem:
    """An image with one or more captions of the whole and, where known, described regions."""

    id: str
    image: Pixels
    captions: list[str]
    regions: list[Region] = field(default_factory=list)


class Described(NamedTuple):
    """What a row says: captions, and entries of regions as they stand there, see :func:`regions_of`."""

    captions: list[str]
    places: list[Any]


class Pairs(Kind[PairItem, Described]):
    """Roles image, caption (a string or a list) and, optionally, regions, image_id.

    A region is `{caption or phrase, bb or box: [x, y, w, h]}`, in pixels of the image from its upper left corner; `caption` may be a list.
    """

    name, holds = "pairs", "captions"
    roles = {
        "image": IMAGE_NAMES,
        **IMAGE_ID,
        "caption": ("caption", "captions", "text", "texts", "sentence", "sentences"),
        "regions": ("regions", "elems"),
    }
    required = ("image", "caption")

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Described:
        return Described(captions_of(values, where, columns), places_of(values, where))

    def check(self, row: Row[Described], pictures: Sequence[Picture]) -> None:
        for place in row.content.places:
            regions_of(place, pictures[0].size, row.where)

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[Described]]) -> PairItem:
        (picture,) = pictures
        placed = [region for (_, places), where in rows for place in places for region in regions_of(place, picture.size, where)]
        regions = seen_regions(placed, picture.how, *(picture.size or (1, 1)))
        return PairItem(key, picture.pixels, _distinct([content for content, _ in rows]), regions)

    def texts(self, contents: Sequence[Described]) -> Iterator[str]:
        yield from _distinct(contents)
        for content in contents:
            yield from phrases_of(content)

    def longest(self, contents: Sequence[Described]) -> list[Described]:
        return [Described([max(content.captions, key=len)], content.places) for content in contents]

    def drawn(self, shapes: Shapes[PairItem], index: int, key: str) -> PairItem:
        scene, image = shapes.picture(index)
        words = shapes.words(index, "pair")
        return PairItem(key, image, shapes.captions(scene, words), phrases.regions(scene, words))

    def contents_at(self, shapes: Shapes[PairItem], index: int) -> list[Described]:
        scene, words = shapes.scene(index)[1], shapes.words(index, "pair")
        captions = shapes.captions(scene, words)
        return [Described(captions, [{"caption": region.phrase} for region in phrases.regions(scene, words)])]


PAIRS = Pairs()


def _distinct(contents: Sequence[Described]) -> list[str]:
    return list(dict.fromkeys(text for content in contents for text in content.captions))


def phrases_of(content: Described) -> list[str]:
    """What the described regions of a row show."""
    return [region.phrase for place in content.places for region in regions_of(place, None, "")]


def captions_of(values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> list[str]:
    """The captions in a row given by role.

    Raises:
        BadInput: none, or one that is no text; names `where`.
    """
    value = listed(values.get("caption"), where, columns["caption"])
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise BadInput(where, f"its {columns['caption']} is no text ({shown(value)})", "a caption is a string or a list of strings")
    check_size(found, where, columns["caption"])
    return [text.strip() for text in found]


def places_of(values: Mapping[str, Any], where: str) -> list[Any]:
    """The entries of a row's regions, their phrases checked; their boxes need the picture's size, see :func:`regions_of`.

    Raises:
        BadInput: not a list, or an entry without a phrase; names `where`.
    """
    value = listed(values.get("regions"), where, "regions")
    if is_missing(value):
        return []
    if not isinstance(value, list):
        raise BadInput(where, f"its regions are no list ({shown(value)})", "a region is {caption: ..., bb: [x, y, w, h]}")
    if len(value) > MOST_LISTED:
        raise BadInput(where, f"it has {len(value):,} regions, at most {MOST_LISTED:,} are read", "spread them over several rows")
    check_length([region.phrase for place in value for region in regions_of(place, None, where)], where, "regions")
    return value


def regions_of(place: Any, size: tuple[int, int] | None, where: str) -> list[Region]:
    """The regions of one entry: its phrase, or each of its phrases, with its box as fractions of an image of `size` (None: the whole)."""
    fields = place if isinstance(place, dict) else {}
    said = fields.get("caption") or fields.get("phrase") or fields.get("text")
    phrases = [said] if isinstance(said, str) else said
    box = fields.get("bb") or fields.get("box") or fields.get("bbox")
    if not isinstance(phrases, list) or not all(isinstance(text, str) and text.strip() for text in phrases):
        raise BadInput(where, f"a region has no caption ({shown(place)})", "a region is {caption: ..., bb: [x, y, w, h]}")
    placed = (0.5, 0.5, 1.0, 1.0) if size is None else _fractions(box, *size, where)
    return [Region(text.strip(), placed) for text in phrases]


def _fractions(box: Any, width: int, height: int, where: str) -> Box:
    numbers = [number(value) for value in box] if isinstance(box, list | tuple) and len(box) == 4 else []
    if numbers and None not in numbers and not any(isinstance(value, str) for value in box):
        x, y, w, h = (float(value) for value in box)
        left, top, right, bottom = max(0.0, x / width), max(0.0, y / height), min(1.0, (x + w) / width), min(1.0, (y + h) / height)
        if right > left and bottom > top:
            return ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    raise BadInput(where, f"a region's box {shown(box)} is not inside the image of {width} x {height}", "a box is [x, y, w, h] in pixels")


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
    masks: bool = True,
) -> Batch:
    """One caption an image, masked and unmasked; `task` selects the milder augmentation of a task; then nothing is masked.

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
    batch: Batch = {"samples": len(items), "pixels": stack(images), "image_ids": keys([item.id for item in items])}
    if task or not masks:
        return batch | _plain_texts(captions, texts, max_tokens)
    draws = [generator(seed, step, item.id, "mask") for item in items]
    return batch | _masked_texts(captions, texts, max_tokens, draws, mask_probability, max_masks)


def plain(caption: str) -> str:
    """A caption in lower case and without punctuation, as the published code prepares it."""
    return " ".join(caption.lower().translate(PLAIN).split())


def caption_batch(
    items: Sequence[PairItem],
    texts: Texts,
    *,
    seed: int,
    step: int,
    prompt: str = "",
    augment_kind: Augment = "none",
    mirror: bool = True,
    captions_per_image: int | None = None,
    plain_captions: bool = False,
    max_tokens: int | None = None,
) -> Batch:
    """Captions that share the vision pass of their image, behind a `prompt`.

    `captions_per_image` are drawn of each image without replacement (all if there are fewer); by default all are taken, in order.
    `plain_captions` are prepared by :func:`plain`.

    Returns:
        samples, the number of images;
        pixels uint8 `[I, 3, H, W]`; image_index `[C]` (caption → image); text_ids, text_mask `[C, L]`; target_mask `[C, L]`, 1 where a
        token is to be said: behind the prompt, the closing token included; captions, the strings; references (by image, all of its
        captions) and item_ids (by image), plain lists.
    """
    images: list[Pixels] = []
    captions: list[str] = []
    image_index: list[int] = []
    for row, item in enumerate(items):
        rng, chosen = generator(seed, step, item.id, "captions"), item.captions
        if captions_per_image and len(chosen) > captions_per_image:
            chosen = [chosen[i] for i in sorted(rng.permutation(len(chosen))[:captions_per_image].tolist())]
        sided = any(map(names_a_side, chosen))
        images.append(augment(augment_kind, item.image, rng, flip_ok=mirror and not sided, task=True).image)
        captions += [plain(caption) for caption in chosen] if plain_captions else chosen
        image_index += [row] * len(chosen)
    given = texts.ids([prompt])[0] if prompt else []
    ids, mask = texts.batch(captions, max_tokens, prompt=given)
    target = mask.clone()
    target[:, : len(given) + (texts.cls is not None)] = 0
    return {
        "samples": len(items),
        "pixels": stack(images),
        "image_index": torch.tensor(image_index, dtype=torch.int64),
        "text_ids": ids,
        "text_mask": mask,
        "target_mask": target,
        "captions": captions,
        "references": [item.captions for item in items],
        "item_ids": [item.id for item in items],
    }


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
        "image_ids": keys(owners),
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


def _plain_texts(captions: list[str], texts: Texts, max_tokens: int | None) -> Batch:
    text_ids, text_mask = texts.batch(captions, max_tokens)
    return {"text_ids": text_ids, "text_mask": text_mask, "caption_ids": keys(captions), "captions": captions}


def _masked_texts(
    captions: list[str], texts: Texts, max_tokens: int | None, draws: list[np.random.Generator], probability: float, max_masks: int
) -> Batch:
    batch = _plain_texts(captions, texts, max_tokens)
    masked, positions, labels = mask_tokens(batch["text_ids"], batch["text_mask"], texts.tokenizer, draws, probability, max_masks)
    return {**batch, "masked_ids": masked, "masked_positions": positions, "masked_labels": labels}
