"""How near captions come to reference captions: BLEU, ROUGE-L and CIDEr-D, as `pycocoevalcap` counts them, without Java.

All three compare runs of words (n-grams), so they depend on what a word is: figures that are to be compared with published ones need the
default tokenization. BLEU and CIDEr-D depend on the whole set of images too, and of parts of it neither is the mean.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from efficientvlm.data.kinds.pairs import plain
from efficientvlm.errors import BadInput
from efficientvlm.tasks import ptb

Tokenization = Literal["ptb", "lower", "plain"]
Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

TOKENIZATIONS: dict[str, Callable[[str], list[str]]] = {
    "ptb": ptb.words,
    "lower": lambda caption: caption.lower().split(),
    "plain": str.split,
}
"""Of the Penn Treebank as published figures have it; lower-cased and split at spaces; as written and split at spaces."""
LONGEST = 4  # words of an n-gram
END = "<eos>"
SIGMA = 6.0
BETA = 1.2
SMALL, TINY = 1e-9, 1e-15  # of the original, so that no logarithm of zero arises


class Sentence:
    """A sentence as words, with its n-grams of one to four words, counted, by n."""

    __slots__ = ("grams", "words")

    def __init__(self, words: Words) -> None:
        self.words = words
        self.grams: list[Grams] = [Counter(zip(*(words[at:] for at in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


@dataclass(frozen=True)
class Scores:
    """`corpus`: the metrics of all captions together; `each`: of every image, in order. Its BLEU is that of the image alone."""

    corpus: dict[str, float]
    each: dict[str, list[float]]

    def standard_error(self, name: str) -> float | None:
        """Of a metric that is the mean over images, ROUGE-L or CIDEr-D; None of a single image."""
        values = self.each[name]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def score(candidates: Sequence[str], references: Sequence[Sequence[str]], tokenization: Tokenization = "ptb") -> dict[str, float]:
    """`bleu_1` to `bleu_4`, `rouge_l` and `cider_d` of one candidate an image; all in 0..1, but CIDEr-D in 0..10 (published times 100).

    With a single image every n-gram is in all of the references, so that CIDEr-D is 0 whatever is said: see :func:`remarks`.

    Raises:
        BadInput: an image without a reference, or no image.
        ValueError: not as many candidates as sets of references.
    """
    return scores(candidates, references, tokenization).corpus


def scores(candidates: Sequence[str], references: Sequence[Sequence[str]], tokenization: Tokenization = "ptb") -> Scores:
    """As :func:`score`, with the metrics of every image beside."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} images")
    if not candidates:
        raise BadInput("no captions are measured", "there is no image", "give data with images that have captions")
    for number, known in enumerate(references):
        if not known:
            raise BadInput(f"image {number}", "it has no reference caption", "give at least one caption an image, or leave the image out")
    split = TOKENIZATIONS[tokenization]
    pairs = [(Sentence(split(said)), [Sentence(split(text)) for text in known]) for said, known in zip(candidates, references, strict=True)]
    cider = CiderD(DocumentFrequencies.of(known for _, known in pairs))
    overlaps = [overlap(*pair) for pair in pairs]
    of_each = [bleu([part]) for part in overlaps]
    each = {name: [found[name] for found in of_each] for name in of_each[0]}
    each["rouge_l"] = [rouge_l(*pair) for pair in pairs]
    each["cider_d"] = [cider(*pair) for pair in pairs]
    means = {name: math.fsum(each[name]) / len(pairs) for name in ("rouge_l", "cider_d")}
    return Scores(bleu(overlaps) | means, each)


def remarks(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[str]:
    """What has to be known beside the metrics of :func:`score`, in sentences."""
    found = []
    if len(references) == 1:
        found.append("CIDEr-D of a single image is 0 whatever is said, since it weighs words by the images that do without them")
    empty = sum(not text.strip() for text in candidates)
    if empty:
        found.append(f"{empty:,} of {len(candidates):,} captions are empty")
    return found


# --- BLEU (Papineni et al. 2002), with the length of the closest reference


class Overlap(NamedTuple):
    """What BLEU counts of a candidate: its words, those of the reference nearest in length (the shorter of two), its n-grams that the
    references have, each as often as one of them at most, and all of its n-grams, by n."""

    words: int
    nearest: int
    right: list[int]
    possible: list[int]


def overlap(said: Sentence, known: Sequence[Sentence]) -> Overlap:
    words, right = len(said.words), []
    for n, ours in enumerate(said.grams):
        theirs = [other.grams[n] for other in known]
        right.append(sum(min(count, max(other[gram] for other in theirs)) for gram, count in ours.items()))
    nearest = min((abs(len(other.words) - words), len(other.words)) for other in known)[1]
    return Overlap(words, nearest, right, [max(0, words - n) for n in range(LONGEST)])


def bleu(overlaps: Sequence[Overlap]) -> dict[str, float]:
    """BLEU of all candidates together: what is counted of them is summed first."""
    found, product = {}, 1.0
    ratio = (sum(part.words for part in overlaps) + TINY) / (sum(part.nearest for part in overlaps) + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    for n in range(LONGEST):
        product *= (sum(part.right[n] for part in overlaps) + TINY) / (sum(part.possible[n] for part in overlaps) + SMALL)
        found[f"bleu_{n + 1}"] = product ** (1 / (n + 1)) * penalty
    return found


# --- ROUGE-L (Lin 2004)


def rouge_l(said: Sentence, known: Sequence[Sentence]) -> float:
    """The longest common subsequence as F-measure that favours recall; the best recall and the best precision over the references."""
    common = [longest_common(said.words, other.words) for other in known]
    precision = max(common) / len(said.words) if said.words else 0.0
    recall = max(count / len(other.words) if other.words else 0.0 for count, other in zip(common, known, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Words, second: Words) -> int:
    """Words of the longest common subsequence; a bit of an integer is a word of `first` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(first)) - 1
    rest = full
    for word in second:
        met = rest & places.get(word, 0)
        rest = (rest + met | rest - met) & full
    return len(first) - rest.bit_count()


# --- CIDEr-D (Vedantam et al. 2015)


@dataclass(frozen=True)
class DocumentFrequencies:
    """In the references of how many of `images` images each n-gram stands."""

    images: int
    counts: Grams

    @classmethod
    def of(cls, references: Iterable[Sequence[Sentence]]) -> DocumentFrequencies:
        """`references`: those of every image."""
        counts: Grams = Counter()
        images = 0
        for known in references:
            images += 1
            counts.update({gram for sentence in known for grams in sentence.grams for gram in grams})
        return cls(images, counts)


@dataclass(frozen=True)
class Vector:
    """A sentence: the weight of its n-grams and their norm, by n; `pairs` is its number of bigrams."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    pairs: int


class CiderD:
    """CIDEr-D of one caption, by given document frequencies; 0 to 10."""

    def __init__(self, frequencies: DocumentFrequencies) -> None:
        self._counts, self._most = frequencies.counts, math.log(max(1, frequencies.images))
        self._rarity = [self._most - math.log(max(1, count)) for count in range(frequencies.images + 1)]

    def __call__(self, said: Sentence, known: Sequence[Sentence]) -> float:
        """The mean over references and n-gram lengths, times ten."""
        return self.similarity(self.vector(said), [self.vector(other) for other in known])

    def vector(self, sentence: Sentence) -> Vector:
        counts, rarity = self._counts, self._rarity
        weights = [{gram: count * rarity[counts[gram]] for gram, count in grams.items()} for grams in sentence.grams]
        norms = [math.sqrt(sum([weight * weight for weight in part.values()])) for part in weights]
        return Vector(weights, norms, max(0, len(sentence.words) - 1))

    def similarity(self, said: Vector, known: Sequence[Vector]) -> float:
        """CIDEr-D of sentences given as vectors, so that references are read once."""
        total = 0.0
        for other in known:
            penalty = math.exp(-((said.pairs - other.pairs) ** 2) / (2 * SIGMA**2))
            for ours, theirs, norm, their_norm in zip(said.weights, other.weights, said.norms, other.norms, strict=True):
                if norm and their_norm:
                    shared = sum([min(ours[gram], theirs[gram]) * theirs[gram] for gram in ours.keys() & theirs.keys()])
                    total += penalty * shared / (norm * their_norm)
        return 10 * total / (LONGEST * len(known)) if known else 0.0


class Reward:
    """CIDEr-D of sampled captions against the references of their images, for self-critical training (Rennie et al. 2017).

    Words are what spaces separate after punctuation is gone, as in the published training; the end of a sentence counts as one, so that the
    length is learnt too.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        """`references`: the captions of every training image, from which the document frequencies are counted."""
        self.cider = CiderD(DocumentFrequencies.of([ended(text) for text in known] for known in references))

    def __call__(self, samples: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The reward of every sample.

        Args:
            samples: those of an image one after another, as many of each image.
            references: the captions of every image of the batch.
        """
        each, rest = divmod(len(samples), max(1, len(references)))
        if rest:
            raise ValueError(f"{len(samples)} samples of {len(references)} images")
        known = [[self.cider.vector(ended(text)) for text in texts] for texts in references]
        return [self.cider.similarity(self.cider.vector(ended(text)), known[at // each]) for at, text in enumerate(samples)]


def ended(text: str) -> Sentence:
    """A caption as the published code prepares it for training, in lower case and without punctuation, and :data:`END`."""
    return Sentence([*plain(text).split(), END])
