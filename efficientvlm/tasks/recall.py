"""Image-text retrieval: recalls of both directions by contrast, again after matching has ranked the best anew, and matching accuracy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from efficientvlm.data.draw import generator
from efficientvlm.families.footprint import Footprint, room, spans
from efficientvlm.families.network import Embeds, Matches
from efficientvlm.runtime.progress import Bar, counted

TOP = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
SCORES_AT_ONCE = 1_000_000  # elements of a block of the score matrix; sorting it takes five times as many bytes as it has


@dataclass
class Gallery:
    """Images and captions as a network sees them; equal captions are one, encoded once.

    `image` [I, E] and `text` [C, E] are unit vectors; `own[i]` are the captions of image i (indices below C, each once), `owners` the image
    of every annotated caption, which is caption `said` [A]. `image_states` and `text_states` with `text_mask` are what matching reads, None
    where a network does not match; both are called by numbers.
    """

    ids: list[str]
    image: Tensor
    text: Tensor
    own: list[list[int]]
    said: Tensor
    owners: Tensor
    image_states: Tensor | States | None
    text_states: Tensor | States | None
    text_mask: Tensor
    size: Footprint | None = None
    """Of the network, so that matching is cut into blocks that fit; without it a batch is a block."""


class Collected:
    """Tensors put one after another into one that is long enough from the start, so that they are never there twice."""

    def __init__(self, most: int) -> None:
        """At most `most` rows."""
        self.most, self.count = most, 0
        self._all: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        if self._all is None:
            self._all = rows.new_empty(self.most, *rows.shape[1:])
        self._all[self.count : self.count + len(rows)] = rows
        self.count += len(rows)

    @property
    def tensor(self) -> Tensor:
        assert self._all is not None
        return self._all[: self.count]


class States:
    """Token states of images or texts by number: held where all fit into `most` bytes, else made again for those that are asked for."""

    def __init__(self, count: int, again: Callable[[Tensor], Tensor] | None, most: int) -> None:
        self.count, self.again, self.most = count, again, most
        self.held: Collected | None = Collected(count)

    def add(self, states: Tensor) -> None:
        if self.again is not None and self.count * states[0].nbytes > self.most:
            self.held = None
        if self.held is not None:
            self.held.add(states)

    def __getitem__(self, numbers: Tensor) -> Tensor:
        if self.held is not None:
            return self.held.tensor[numbers]
        assert self.again is not None
        return self.again(numbers)


@torch.inference_mode()
def encode(
    model: Embeds,
    batches: Iterable[tuple[Sequence[str], Tensor, Sequence[Sequence[str]]]],
    tokens: Callable[[list[str]], tuple[Tensor, Tensor]],
    batch_size: int,
    count: int,
    *,
    texts: Iterable[str] = (),
    again: Callable[[Tensor], Tensor] | None = None,
    most: int | None = None,
    title: str = "",
    quiet: bool = True,
) -> Gallery:
    """Every image and every distinct caption once.

    Args:
        batches: ids, pixels [B, 3, H, W] and the captions of some images.
        tokens: distinct captions → ids and mask [C, L], all of one length, so that a batch does not change its rows.
        batch_size: captions at a time.
        count: images, at most.
        texts: what is compared beside captions; these come first.
        again: numbers of images → their pixels. With it, token states that take more than `most` bytes are not held.
        most: bytes of a block of work, by default what the device has room for.
    """
    matches, device = "match" in model.config.abilities(), model.device
    size, most = Footprint.of(model.config), most or room(device)
    at_once = max(1, most // size.encoding)

    def see(pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [model.embed_images(part.to(device)) for part in pixels.split(at_once)]
        states, features = zip(*parts, strict=True)
        return torch.cat(states), torch.cat(features)

    ids: list[str] = []
    image = Collected(count)
    image_states = States(count, again and (lambda numbers: see(again(numbers))[0]), most)
    index = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    own: list[list[int]] = []
    said: list[int] = []
    owners: list[int] = []
    for names, pixels, captions in batches:
        for part in pixels.split(at_once):
            states, feature = see(part)
            image.add(feature.float())
            if matches:
                image_states.add(states)
        for name, given in zip(names, captions, strict=True):
            numbers = [index.setdefault(text, len(index)) for text in given]
            owners += [len(ids)] * len(numbers)
            said += numbers
            own.append(list(dict.fromkeys(numbers)))
            ids.append(name)
    text_ids, text_mask = (tensor.to(device) for tensor in tokens(list(index)))
    text = Collected(len(text_ids))
    step = max(1, min(batch_size, most // (size.question_token * text_ids.shape[1])))

    def read(numbers: Tensor) -> Tensor:
        states: Tensor = model.embed_texts(text_ids[numbers], text_mask[numbers])[0]
        return states

    text_states = States(len(text_ids), again and read, most)
    for start in counted(range(0, len(text_ids), step), f"{title} texts", len(text_ids), quiet):
        states, feature = model.embed_texts(text_ids[start : start + step], text_mask[start : start + step])
        text.add(feature.float())
        if matches:
            text_states.add(states)
    return Gallery(
        ids=ids,
        image=image.tensor,
        text=text.tensor,
        own=own,
        said=torch.tensor(said, device=device),
        owners=torch.tensor(owners, device=device),
        image_states=image_states if matches else None,
        text_states=text_states if matches else None,
        text_mask=text_mask,
        size=size,
    )


@torch.inference_mode()
def evaluate(
    model: Matches,
    gallery: Gallery,
    *,
    batch_size: int,
    rerank: int = 0,
    rerank_by: str = "matching",
    seed: int = 0,
    most: int | None = None,
    title: str = "",
    quiet: bool = True,
) -> dict[str, Any]:
    """Recalls at 1, 5 and 10 as fractions, and the accuracy of matching where the family matches.

    `image_to_text_r5` is the part of the images with one of their captions among the 5 of highest cosine, out of the captions of all;
    `text_to_image_r5` the part of the captions whose image is among the 5 images of highest cosine; `mean_recall` the mean of the six.
    Equal scores rank in the order of the data (in the published code the later one is first). With `rerank` the same follow again as
    `reranked_...`, where the matching logit alone orders the best `rerank` candidates of every query (ALBEF, X-VLM), or with `rerank_by`
    "sum" its sum with the cosine (BLIP). A recall at more than `rerank` is the same as before, and left out; so is the mean then.
    `itm_accuracy` as :func:`matching_accuracy`. `standard_errors` are those of each recall as a mean over its queries. Pairs are matched in
    blocks of at most `most` bytes.
    """
    matched = partial(match, model, gallery, batch_size=batch_size, most=most, title=title, quiet=quiet)
    result: dict[str, Any] = {"images": len(gallery.image), "captions": len(gallery.said)}
    keep = max(rerank, TOP[-1])
    for_image, for_text = best_captions(gallery, keep), best_images(gallery, keep)
    found = recalls(gallery, for_image, for_text)
    queries = dict(zip(DIRECTIONS, (len(gallery.image), len(gallery.said)), strict=True))
    errors = {
        f"{direction}_r{top}": standard_error(found[f"{direction}_r{top}"], queries[direction]) for direction in DIRECTIONS for top in TOP
    }
    result |= found | {"standard_errors": errors}
    if rerank:
        count = len(gallery.text)
        wanted = (_keys_of_captions(gallery, for_image[:, :rerank]), _keys_of_images(gallery, for_text[:, :rerank]))
        keys = torch.cat([part.flatten() for part in wanted]).unique()
        scores = matched(keys // count, keys % count)[:, 1]
        if rerank_by == "sum":
            scores = scores + cosines(gallery, keys // count, keys % count)
        for_image, for_text = (
            reordered(order, scores[torch.searchsorted(keys, part)]) for order, part in zip((for_image, for_text), wanted, strict=True)
        )
        again, beyond = recalls(gallery, for_image, for_text), unmoved(gallery, rerank)
        result |= {f"reranked_{name}": value for name, value in again.items() if name not in beyond}
    if gallery.image_states is not None:
        result |= matching_accuracy(gallery, matched, seed)
    return result


def cosines(gallery: Gallery, images: Tensor, captions: Tensor) -> Tensor:
    """Of pairs [P] by number."""
    parts = zip(images.split(SCORES_AT_ONCE // 256), captions.split(SCORES_AT_ONCE // 256), strict=True)
    return torch.cat([(gallery.image[some] * gallery.text[said]).sum(-1) for some, said in parts])


def unmoved(gallery: Gallery, rerank: int) -> set[str]:
    """The recalls that ranking the best `rerank` candidates of a query anew cannot change, and the mean if there are any."""
    candidates = dict(zip(DIRECTIONS, (len(gallery.said), len(gallery.image)), strict=True))
    found = {f"{direction}_r{top}" for direction in DIRECTIONS for top in TOP if rerank < min(top, candidates[direction])}
    return found | ({"mean_recall"} if found else set())


def best_captions(gallery: Gallery, keep: int) -> Tensor:
    """Annotated captions [I, min(keep, A)] of highest cosine for every image, best first."""
    return nearest(gallery.image, gallery.text, keep, gallery.said)


def best_images(gallery: Gallery, keep: int) -> Tensor:
    """Images [C, min(keep, I)] of highest cosine for every distinct caption, best first."""
    return nearest(gallery.text, gallery.image, keep)


def nearest(queries: Tensor, candidates: Tensor, keep: int, columns: Tensor | None = None) -> Tensor:
    """Candidates [Q, min(keep, N)] of highest cosine for every query, best first; features [Q, E] and [N, E] are unit vectors.

    With `columns` candidates are those numbers of `candidates`. Scores are made a block after another; of each only what is kept is left,
    in memory that is there from the start.
    """
    best = Collected(len(queries))
    for part in queries.split(max(1, SCORES_AT_ONCE // max(1, len(candidates if columns is None else columns)))):
        with torch.autocast(part.device.type, enabled=False):  # in bfloat16 close candidates would be equal
            scores = part @ candidates.T
        scores = scores if columns is None else scores[:, columns]  # equal captions have the same score to the last bit
        best.add(scores.sort(dim=1, descending=True, stable=True).indices[:, :keep])
    return best.tensor


def recalls(gallery: Gallery, for_image: Tensor, for_text: Tensor) -> dict[str, float]:
    """Recalls of both directions and their mean; the candidates are those of :func:`best_captions` and :func:`best_images`."""
    own = gallery.owners[for_image] == torch.arange(len(for_image), device=for_image.device)[:, None]
    right = for_text[gallery.said] == gallery.owners[:, None]
    found = {
        f"{direction}_r{top}": _part(hit[:, :top].any(1)) for direction, hit in zip(DIRECTIONS, (own, right), strict=True) for top in TOP
    }
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def _part(hits: Tensor) -> float:
    """The part of `hits` that is true; counted on the CPU, since not every device has float64."""
    return float(hits.cpu().double().mean())


def reordered(order: Tensor, scores: Tensor) -> Tensor:
    """`order` [Q, K] with its first k entries sorted by `scores` [Q, k], highest first."""
    best = order[:, : scores.shape[1]].gather(1, scores.sort(dim=1, descending=True, stable=True).indices)
    return torch.cat([best, order[:, scores.shape[1] :]], 1)


def _keys_of_captions(gallery: Gallery, order: Tensor) -> Tensor:
    return torch.arange(len(order), device=order.device)[:, None] * len(gallery.text) + gallery.said[order]


def _keys_of_images(gallery: Gallery, order: Tensor) -> Tensor:
    return order * len(gallery.text) + torch.arange(len(order), device=order.device)[:, None]


def match(
    model: Matches,
    gallery: Gallery,
    images: Tensor,
    captions: Tensor,
    *,
    batch_size: int,
    most: int | None = None,
    title: str = "",
    quiet: bool = True,
) -> Tensor:
    """Matching logits [P, 2] (no, yes) of pairs, at most `batch_size` at a time; pairs of one image should follow each other."""
    assert gallery.image_states is not None and gallery.text_states is not None
    seen_by, one = (gallery.size.seen, gallery.size.question(gallery.text_mask.shape[1])) if gallery.size else (0, 0)
    runs = spans(images.tolist(), seen_by, one, most or room(images.device))
    blocks = [(start, min(stop, start + batch_size)) for first, stop in runs for start in range(first, stop, batch_size)]
    logits = Collected(len(images))
    with Bar(f"{title} matching", len(images), quiet=quiet) as bar:
        for start, stop in blocks:
            seen, rows = images[start:stop].unique(return_inverse=True)
            said = captions[start:stop]
            logits.add(model.match(gallery.image_states[seen], rows, gallery.text_states[said], gallery.text_mask[said]).float())
            bar.update(stop)
    return logits.tensor


def standard_error(part: float, count: int) -> float:
    """Of a part that was counted over `count` queries."""
    return math.sqrt(part * (1 - part) / count) if count else 0.0


def matching_accuracy(gallery: Gallery, matched: Callable[[Tensor, Tensor], Tensor], seed: int) -> dict[str, float]:
    """`itm_accuracy` on as many matched as unmatched pairs; empty where every image has the same captions.

    Every image comes once with one of its captions, and once with a caption of another image that is none of its own; both are drawn from
    (seed, id of the image). `itm_preferred` is the part of the images for which the first is the more probable match of the two, wherever
    the network puts its threshold: training sees two unmatched pairs for a matched one. Chance is one half for both.

    Args:
        matched: images and captions [P] by number → logits [P, 2], as :func:`match`.
    """
    pairs = drawn_pairs(gallery, seed)
    images = [at for at, pair in enumerate(pairs) if pair for _ in pair]
    if not images:
        return {}
    device = gallery.said.device
    captions = torch.tensor([caption for pair in pairs if pair for caption in pair], device=device)
    logits = matched(torch.tensor(images, device=device), captions)
    true_pair = torch.arange(len(captions), device=device) % 2 == 0
    true, false = (logits[:, 1] - logits[:, 0]).view(-1, 2).T
    return {"itm_accuracy": _part(logits.argmax(-1) == true_pair.long()), "itm_preferred": _part(true > false)}


def drawn_pairs(gallery: Gallery, seed: int) -> list[tuple[int, int] | None]:
    """For every image a caption of it and one of another image, as numbers of distinct captions; None if all captions are its own."""
    said = gallery.said.tolist()
    times = Counter(said)
    pairs: list[tuple[int, int] | None] = []
    for name, own in zip(gallery.ids, gallery.own, strict=True):
        if not own or sum(times[caption] for caption in own) == len(said):
            pairs.append(None)
            continue
        draw = generator(seed, name, "matching")
        true = own[int(draw.integers(len(own)))]
        while (false := said[int(draw.integers(len(said)))]) in own:
            pass
        pairs.append((true, false))
    return pairs
