"""Search: the pictures that fit a text best, or the texts that fit a picture best, and a sheet of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints.files import resolve
from efficientvlm.data.answer_list import read_answers
from efficientvlm.data.folders import pictures_of
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PairItem
from efficientvlm.data.reading import of_read
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput, number_of
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.tasks import RetrievalQuestion
from efficientvlm.tasks.galleries import Pictures
from efficientvlm.tasks.pictures import picture_path, write_picture
from efficientvlm.tasks.recall import Gallery, cosines, encode, match, nearest
from efficientvlm.tasks.sheets import MOST_COLUMNS, MOST_ROWS, drawable, of_pictures, of_texts

BATCH = 64
RERANK = 32
SHOWN = 3  # pictures that cannot be read and are named


class Files(Pictures):
    """Picture files, without captions."""

    def __init__(self, paths: Sequence[Path], preprocessing: Any, batch_size: int) -> None:
        super().__init__(None, len(paths), batch_size)
        self.paths, self.preprocessing = paths, preprocessing
        self.lost: dict[Path, BadInput] = {}

    def ahead(self, starts: range) -> Iterator[list[PairItem]]:
        yield from (self.items(start) for start in starts)

    def read(self, numbers: range) -> list[PairItem]:
        """Those that can be read; the others are kept with what is wrong."""
        found = []
        for path in (self.paths[number] for number in numbers):
            try:
                found.append(PairItem(str(path), open_image(path, self.preprocessing), []))
            except BadInput as error:
                self.lost[path] = error
        return found

    def nothing(self) -> BadInput:
        first = next(iter(self.lost.values()))
        if len(self.paths) == 1:
            return first
        return BadInput(
            f"none of {len(self.paths):,} pictures can be read", f"the first: {first.why or first.what}", "give pictures, e.g. PNG"
        )


@torch.inference_mode()
def search(config: RetrievalQuestion, loaded: Loaded) -> dict[str, Any]:
    """The best matches of every text among pictures; where `image` names a single file, the best matches of it among the texts.

    Candidates are found by the cosine of features. Where the network matches, the first `rerank` of them come in the order of the matching
    logit, or of its sum with the cosine, as `evlm eval --rerank` measures it, and the others behind them.

    Returns:
        `answers`, best first, each with `text`, `image`, `similarity` (cosine), and where it was matched `score` (the logit of a match) and
        `probability` of a match; `rerank_by`, what orders these; `pictures` and `texts`, how many were searched; `unreadable`, the
        pictures that were left out; `out`.

    Raises:
        BadInput: no picture that can be read, no text, an `out` that cannot be written.
    """
    texts, wanted = texts_of(loaded), asked_texts(config)
    places = [Path(resolve(name)) for name in config.image]
    named, remarks = pictures_of(places)
    files = Files(list(dict.fromkeys(path for path, _ in named)), loaded.preprocessing, BATCH)
    out = picture_path(config.out, files.paths) if config.out else None
    for remark in remarks:
        say(f"predict: {remark}")
    shown: dict[str, Any] = {"title": "predict", "quiet": config.quiet or len(files.paths) <= BATCH}
    model = loaded.model.eval()
    with Bar("predict pictures", files.count, quiet=shown["quiet"]) as bar:
        tokens = partial(Texts.batch, texts)
        gallery = encode(model, files.batches(bar.update), tokens, BATCH, files.count, texts=wanted, again=files, **shown)
    for remark in [*of_read(texts), *said_of_lost(files)]:
        say(f"predict: {remark}")
    one = len(files.paths) == 1 and not any(place.is_dir() for place in places)
    queries, candidates = (gallery.image, gallery.text) if one else (gallery.text, gallery.image)
    matching = "match" in loaded.abilities
    rerank = (max(RERANK, config.top) if config.rerank is None else config.rerank) if matching else 0
    order = nearest(queries, candidates, max(config.top, rerank))
    rows = []
    by = config.rerank_by or loaded.model.config.rerank_by
    for query, (best, logits) in enumerate(ranked(model, gallery, order, rerank, by, one, shown)):
        for at, candidate in enumerate(best.tolist()[: config.top]):
            image, text = (query, candidate) if one else (candidate, query)
            row: dict[str, Any] = {"text": wanted[text], "image": gallery.ids[image]}
            row["similarity"] = round(float(gallery.image[image] @ gallery.text[text]), 4)
            if at < len(logits):
                row |= {"score": round(float(logits[at, 1]), 4), "probability": round(float(logits[at].softmax(0)[1]), 4)}
            rows.append(row)
    found = {
        "answers": rows,
        "rerank_by": by if rerank else None,
        "pictures": len(gallery.ids),
        "texts": len(wanted),
        "unreadable": [str(path) for path in files.lost],
    }
    return {**found, "out": write_picture(sheet(rows, one), out)} if out else found


def asked_texts(config: RetrievalQuestion) -> list[str]:
    """What is looked for, each once."""
    listed = read_answers(Path(resolve(config.texts)), "text") if config.texts else []
    return list(dict.fromkeys([*(text.strip() for text in config.text or []), *listed]))


def said_of_lost(files: Files) -> list[str]:
    """That pictures were left out, how many, and why the first of them."""
    lines = [f"left out {path}: {error.why or error.what}" for path, error in list(files.lost.items())[:SHOWN]]
    return [*lines, f"{len(files.lost):,} of {len(files.paths):,} pictures cannot be read and were left out"] if lines else []


def ranked(
    model: Any, gallery: Gallery, order: Tensor, rerank: int, by: str, one: bool, shown: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """Candidates [K] of every query, best first, and logits [k, 2] of the first of them; `order` [Q, K] is that of the cosine.

    Args:
        rerank: so many are matched, at most; none where a network does not match.
        by: whether the matching logit orders them, or its `sum` with the cosine.
        one: whether the query is the one picture, and candidates are texts.
    """
    first = order[:, :rerank]
    if not rerank:
        return [(best, order.new_empty(0, 2)) for best in order]
    queries = torch.arange(len(first), device=order.device).repeat_interleave(first.shape[1])
    images, captions = (queries, first.flatten()) if one else (first.flatten(), queries)
    by_image = images.argsort(stable=True)
    logits = torch.empty(len(images), 2, device=order.device)
    logits[by_image] = match(model, gallery, images[by_image], captions[by_image], batch_size=BATCH, **shown)
    scores = logits[:, 1] + cosines(gallery, images, captions) if by == "sum" else logits[:, 1]
    found = []
    for best, score, pair in zip(order, scores.view(first.shape), logits.view(*first.shape, 2), strict=True):
        again = score.sort(descending=True, stable=True).indices
        found.append((torch.cat([best[again], best[len(again) :]]), pair[again]))
    return found


def sheet(rows: Sequence[dict[str, Any]], one: bool) -> Any:
    """The pictures of `rows` as one picture, a line of it a text; of a single picture, it and its texts. What it lacks is said."""
    if foreign := sum(not drawable(text) for text in {row["text"] for row in rows}):
        say(f"predict: the sheet has question marks for letters of {number_of(foreign, 'text')}, which its font lacks")
    labels = [f"{row['probability']:.0%}" if "probability" in row else f"{row['similarity']:.2f}" for row in rows]
    if one:
        if len(rows) > MOST_ROWS:
            say(f"predict: the sheet shows the first {MOST_ROWS} of {len(rows):,} texts")
        return of_texts(rows[0]["image"], [f"{label}: {row['text']}" for label, row in zip(labels, rows, strict=True)])
    lines: dict[str, list[tuple[str, str]]] = {}
    for label, row in zip(labels, rows, strict=True):
        line = lines.setdefault(row["text"], [])
        line.append((row["image"], f"{len(line) + 1}: {label}"))
    if len(lines) > MOST_ROWS:
        say(f"predict: the sheet shows the first {MOST_ROWS} of {len(lines):,} texts")
    if (most := max(map(len, lines.values()))) > MOST_COLUMNS:
        say(f"predict: the sheet shows the first {MOST_COLUMNS} of {most:,} pictures of a text")
    return of_pictures(list(lines.items())[:MOST_ROWS])
