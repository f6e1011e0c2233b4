"""How well a checkpoint finds images by texts and texts by images: what every stage that evaluates retrieval uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from efficientvlm.data.collate import Texts, stack
from efficientvlm.data.sources import usable
from efficientvlm.errors import BadInput
from efficientvlm.progress import Bar, say
from efficientvlm.stages.common import Loaded, texts_of
from efficientvlm.tasks.retrieval import encode, evaluate

EVAL_BATCH = 64


def no_retrieval(loaded: Loaded, role: str = "") -> BadInput:
    """What to say of a model that compares no images with texts."""
    does = " and ".join(sorted(loaded.tasks - {"retrieval"})) or "nothing by itself"
    fix = "use an X-VLM with the heads itc and itm, as it is before it answers questions, or a CLIP"
    return BadInput(f"{role} {loaded.path} does no retrieval".lstrip(), f"it is a {loaded.family.name} model for {does}", fix)


def check_able(loaded: Loaded, rerank: int = 0) -> None:
    """:class:`BadInput` for a model whose retrieval cannot be measured, with the candidates reranked or at all."""
    if "retrieval" not in loaded.tasks or not loaded.family.retrieval:
        raise no_retrieval(loaded)
    if rerank and "itm" not in loaded.family.retrieval:
        why = f"{loaded.path} compares images and texts by their features alone"
        raise BadInput(f"rerank {rerank}", why, "leave it out, or use a model that matches, an X-VLM")


def evaluate_pairs(
    loaded: Loaded,
    source: Any,
    *,
    limit: int | None,
    title: str,
    quiet: bool,
    max_tokens: int = 40,
    batch_size: int = EVAL_BATCH,
    rerank: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of :func:`tasks.retrieval.evaluate` over the first `limit` images of `source` and all their captions, with progress."""
    count = min(len(source), limit or len(source))
    if not count:
        say(f"{title}: no images are held out, so nothing was measured; raise val_fraction or give --val", quiet=quiet)
        return {"images": 0}
    model, texts = loaded.model.eval(), texts_of(loaded, max_tokens)
    with Bar(title, count, quiet=quiet) as bar:
        batches = captioned_batches(source, count, batch_size, bar.update)
        gallery = encode(loaded.family, model, batches, partial(Texts.batch, texts), batch_size, count)
        return evaluate(loaded.family, model, gallery, batch_size=batch_size, rerank=rerank, seed=seed)


def captioned_batches(source: Any, count: int, batch_size: int, progress: Any) -> Iterator[tuple[Sequence[str], Tensor, Sequence[Any]]]:
    """Ids, pixels and captions of the first `count` images, in order; images that cannot be read, or have no caption, are left out."""
    found = False
    for start in range(0, count, batch_size):
        if items := [item for item in usable(source, range(start, min(count, start + batch_size))) if item.captions]:
            found = True
            yield [item.id for item in items], stack([item.image for item in items]), [item.captions for item in items]
        progress(min(count, start + batch_size))
    if not found:
        raise BadInput(f"{source.name} has no captions", "retrieval needs at least one image with a text", "use another --data or --split")
