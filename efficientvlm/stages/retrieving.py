"""How well a checkpoint finds images by texts and texts by images: what every stage that evaluates retrieval uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from efficientvlm.data.batch import stack
from efficientvlm.data.opening import drawn, usable
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.progress import Bar, say
from efficientvlm.stages.common import Loaded, texts_of
from efficientvlm.stages.reading import counts_of, of_read
from efficientvlm.tasks.retrieval import encode, evaluate

EVAL_BATCH = 64


def no_retrieval(loaded: Loaded, role: str = "") -> BadInput:
    """What to say of a model that compares no images with texts."""
    does = " and ".join(sorted(loaded.tasks - {"retrieval"})) or "nothing by itself"
    fix = "use a CLIP, a BLIP for retrieval, or an X-VLM with the heads itc and itm, as it is before it answers questions"
    return BadInput(f"{role} {loaded.path} does no retrieval".lstrip(), f"it is a {loaded.family.name} model for {does}", fix)


def check_able(loaded: Loaded, rerank: int = 0) -> None:
    """:class:`BadInput` for a model whose retrieval cannot be measured, with the candidates reranked or at all."""
    if "retrieval" not in loaded.tasks or not loaded.family.retrieval:
        raise no_retrieval(loaded)
    if rerank and "itm" not in loaded.family.retrieval:
        why = f"{loaded.path} compares images and texts by their features alone"
        raise BadInput(f"rerank {rerank}", why, "leave it out, or use a model that matches, an X-VLM or a BLIP")


def evaluate_pairs(
    loaded: Loaded,
    source: Any,
    *,
    limit: int | None,
    title: str,
    quiet: bool,
    batch_size: int = EVAL_BATCH,
    rerank: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of :func:`tasks.retrieval.evaluate` over the images of `source`, or `limit` drawn from it, and their captions."""
    whole, source = len(source), drawn(source, limit)
    count = len(source)
    if count < whole:
        say(f"{title}: {count:,} of {whole:,} images, drawn at random", quiet=quiet)
    if not count:
        say(f"{title}: no images are held out, so nothing was measured; raise val_fraction or give --val", quiet=quiet)
        return {"images": 0}
    model, texts = loaded.model.eval(), texts_of(loaded)
    pictures = Pictures(source, count, batch_size)
    shown: dict[str, Any] = {"title": title, "quiet": quiet}
    with Bar(title, count, quiet=quiet) as bar:
        batches, tokens = pictures.batches(bar.update), partial(Texts.batch, texts)
        gallery = encode(loaded.family, model, batches, tokens, batch_size, count, again=pictures, **shown)
    result = evaluate(loaded.family, model, gallery, batch_size=batch_size, rerank=rerank, seed=seed, **shown)
    for remark in of_read(texts):
        say(f"{title}: {remark}", quiet=quiet)
    return {**result, "reading": counts_of(texts)}


class Pictures:
    """The first `count` images of a source with their captions, in order, and any of them again by number.

    Images that cannot be read, or have no caption, are left out and have no number.
    """

    def __init__(self, source: Any, count: int, batch_size: int) -> None:
        self.source, self.count, self.batch_size = source, count, batch_size
        self.places: list[tuple[int, int]] = []  # where the batch of an image starts, and its place in it
        self._last: tuple[int, list[Any]] | None = None

    def batches(self, progress: Any) -> Iterator[tuple[Sequence[str], Tensor, Sequence[Any]]]:
        """Ids, pixels [B, 3, H, W] and captions."""
        for start in range(0, self.count, self.batch_size):
            if items := self._items(start):
                self.places += [(start, at) for at in range(len(items))]
                yield [item.id for item in items], stack([item.image for item in items]), [item.captions for item in items]
            progress(min(self.count, start + self.batch_size))
        if not self.places:
            why = "retrieval needs at least one image with a text"
            raise BadInput(f"{self.source.name} has no captions", why, "use another --data or --split")

    def __call__(self, numbers: Tensor) -> Tensor:
        """Pixels of images by number."""
        places = [self.places[number] for number in numbers.tolist()]
        return stack([self._items(start)[at].image for start, at in places])

    def _items(self, start: int) -> list[Any]:
        if self._last is None or self._last[0] != start:
            found = usable(self.source, range(start, min(self.count, start + self.batch_size)))
            self._last = start, [item for item in found if item.captions]
        return self._last[1]
