"""The images next to a sentence: compared with every one, or with those of the nearest clusters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.selection.rules import Array

BLOCK = 16_384  # images that are compared at once
TRAINED_ON = 64  # images a cluster, at most, that clusters are found from


class Vectors(Protocol):
    """Embeddings of many samples, as a store of embeddings has them."""

    @property
    def ids(self) -> Any:
        """The name of every sample, by its number."""

    @property
    def width(self) -> int: ...

    def blocks(self) -> Iterable[Array]:
        """The vectors of all samples in order, some [n, E] at a time."""


class Nearest(NamedTuple):
    """Of N sentences: nearest image [N] and cosine with it [N]; pairs (sentence [P], image [P], cosine [P]) that may be among an image's
    best, none where these are not asked for."""

    best: Array
    score: Array
    pairs: tuple[Array, Array, Array] | None


class Index(Protocol):
    """Images that sentences are compared with."""

    def nearest(self, vectors: Array, most: int | None = None, threshold: Array | None = None) -> Nearest:
        """The image next to each of the unit vectors [N, E], the first where several are equally near.

        Args:
            most: so many best sentences of an image are asked for as well, whose cosine is above its `threshold` [I].
        """


def unit(vectors: Array) -> Array:
    """Rows [N, E] as float32 of length 1; a row of zeros stays as it is."""
    found = np.asarray(vectors, np.float32)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(length > 0, length, 1)


class Exact:
    """Compares with every image. Takes 4 bytes a number of every image's vector."""

    def __init__(self, images: Vectors, device: Any = "cpu") -> None:
        self.device = torch.device(device)
        self.blocks = [torch.from_numpy(block).to(self.device) for block in regular(images.blocks(), BLOCK)]

    @torch.inference_mode()
    def nearest(self, vectors: Array, most: int | None = None, threshold: Array | None = None) -> Nearest:
        sentences = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(self.device)
        best = torch.zeros(len(sentences), dtype=torch.int64, device=self.device)
        score = torch.full((len(sentences),), -torch.inf, device=self.device)
        pairs: list[tuple[Array, Array, Array]] = []
        begin = 0
        for images in self.blocks:
            cosines = sentences @ images.T
            value, where = cosines.max(1)
            nearer = value > score
            best, score = torch.where(nearer, where + begin, best), torch.where(nearer, value, score)
            if most is not None and len(sentences):
                assert threshold is not None
                pairs.append(self._pairs(cosines, most, threshold[begin : begin + len(images)], begin))
            begin += len(images)
        joined = tuple(np.concatenate(column) for column in zip(*pairs, strict=True)) if pairs else None
        return Nearest(best.cpu().numpy(), score.cpu().numpy(), joined)  # type: ignore[arg-type]

    def _pairs(self, cosines: Tensor, most: int, threshold: Array, begin: int) -> tuple[Array, Array, Array]:
        """Of cosines [N, I]: those above the threshold [I] of their image that no more than `most` others exceed."""
        last = cosines.topk(min(most, len(cosines)), 0).values[-1]
        limit = torch.from_numpy(threshold).to(self.device)
        rows, images = ((cosines >= last) & (cosines > limit)).nonzero(as_tuple=True)
        return rows.cpu().numpy(), images.cpu().numpy() + begin, cosines[rows, images].cpu().numpy()


class Approximate:
    """Compares with the images of the nearest clusters, by an inverted file of fp16 vectors.

    Takes 2 bytes a number of every image's vector. Some sentences get another image than the nearest; `benchmarks/sentences.py` measures of
    how many that is so.
    """

    neighbours = 8
    """Images that a sentence is among the candidates of, at most."""

    def __init__(self, images: Vectors, count: int, *, probes: int = 32, kept: Path | None = None) -> None:
        """`kept`: a file that holds the finished index, so that a run that goes on has the same."""
        self.faiss = faiss_package()
        if kept is not None and kept.is_file():
            self.index = self.faiss.read_index(str(kept))
        else:
            self.index = self._made(images, count)
            if kept is not None:
                self.faiss.write_index(self.index, str(kept.with_name(kept.name + ".new")))
                kept.with_name(kept.name + ".new").replace(kept)
        self.index.nprobe = min(probes, self.index.nlist)

    def _made(self, images: Vectors, count: int) -> Any:
        lists = clusters(count)
        quantizer = self.faiss.IndexFlatIP(images.width)
        half = self.faiss.ScalarQuantizer.QT_fp16
        index = self.faiss.IndexIVFScalarQuantizer(quantizer, images.width, lists, half, self.faiss.METRIC_INNER_PRODUCT, False)
        index.cp.spherical, index.cp.seed = True, 1234
        step = max(1, count // (TRAINED_ON * lists))
        sample = np.concatenate([block[::step] for block in regular(images.blocks(), BLOCK * step)])
        index.cp.max_points_per_centroid = TRAINED_ON
        index.cp.min_points_per_centroid = 1
        index.train(sample)
        for block in regular(images.blocks(), BLOCK):
            index.add(block)
        return index

    def nearest(self, vectors: Array, most: int | None = None, threshold: Array | None = None) -> Nearest:
        cosines, images = self.index.search(np.ascontiguousarray(vectors, np.float32), self.neighbours)
        found = images >= 0
        equal = found & (cosines == cosines[:, :1])
        best = np.where(equal, images, np.iinfo(np.int64).max).min(1, initial=np.iinfo(np.int64).max)
        best = np.where(found[:, 0], best, -1)
        score = np.where(found[:, 0], cosines[:, 0], np.float32("nan"))
        if most is None:
            return Nearest(best, score, None)
        assert threshold is not None
        rows, places = (found & (cosines > threshold[images])).nonzero()
        return Nearest(best, score, (rows, images[rows, places], cosines[rows, places]))


def clusters(count: int) -> int:
    """How many clusters `count` images are put into: four times the square root, as is usual, with at least 16 images in each."""
    return max(1, min(4 * math.isqrt(count), count // 16))


def regular(blocks: Iterable[Array], size: int) -> Iterator[Array]:
    """Unit vectors of all `blocks` in blocks of `size` rows, so that what is computed does not depend on how a store is cut."""
    rest: list[Array] = []
    count = 0
    for block in blocks:
        rest.append(unit(block))
        count += len(block)
        while count >= size:
            whole = np.concatenate(rest)
            yield whole[:size]
            rest, count = [whole[size:]], count - size
    if count:
        yield np.concatenate(rest)


def faiss_package() -> Any:
    """The package faiss; :class:`BadInput` where it is not installed."""
    try:
        import faiss
    except ImportError:
        fix = "pip install 'efficientvlm[search]', or give --set search=exact"
        raise BadInput("the package faiss is not installed", "an approximate search needs it", fix) from None
    return faiss
