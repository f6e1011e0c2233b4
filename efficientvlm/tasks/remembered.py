"""What a cached teacher keeps in main memory, from the tables of the data (ours)."""

from __future__ import annotations

from itertools import islice
from typing import Any

from efficientvlm.data.kinds.questions import answers as said
from efficientvlm.data.kinds.questions import asked
from efficientvlm.data.shapes import SAMPLED_TEXTS, Shapes
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.settings.tasks import CaptioningSettings, VQASettings

FLOAT = 4


def listed_images(source: Any) -> int:
    """Images of `source` whose texts are known without a picture: of `shapes` the first ones."""
    whole = getattr(source, "source", source)
    return min(len(whole), SAMPLED_TEXTS) if isinstance(whole, Shapes) else len(whole)


def bytes_of_answers(config: VQASettings, teacher: Loaded, source: Any, images_seen: int) -> int:
    """Of logits at every token of every accepted answer, over a run that reads `images_seen` images, some again."""
    answers = [answer for answer, _ in said(source)]
    distinct = list(dict.fromkeys(answers))
    _, mask = texts_of(teacher).batch(distinct, config.max_answer_tokens, double_sep=config.quirks.double_sep)
    lengths = dict(zip(distinct, mask.sum(1).tolist(), strict=True))
    tokens = sum(lengths[answer] for answer in answers)
    return round(tokens * min(len(source), images_seen) / max(1, listed_images(source))) * teacher.sizes.vocab_size * FLOAT


def bytes_of_captions(config: CaptioningSettings, teacher: Loaded, source: Any, images_seen: int) -> int:
    """Of logits at every token of every caption, over a run that reads `images_seen` images, some again."""
    texts = texts_of(teacher, config.max_tokens)
    some = [[caption for content in contents for caption in content.captions] for contents in islice(source.contents(), SAMPLED_TEXTS)]
    given = texts.ids([config.prompt])[0] if config.prompt else []
    _, mask = texts.batch([caption for captions in some for caption in captions], prompt=given)
    return round(int(mask.sum()) * min(len(source), images_seen) / max(1, len(some))) * teacher.sizes.vocab_size * FLOAT


def bytes_of_verdicts(source: Any, images_seen: int) -> int:
    """Of the logits of every statement about the pairs of images that a run reads."""
    each = sum(1 for _ in source.texts()) / max(1, listed_images(source))
    return round(min(len(source), images_seen) * max(1.0, each)) * 2 * FLOAT


def bytes_of_features(teacher: Loaded, source: Any, images_seen: int) -> int:
    """Of a feature for each picture and each distinct caption."""
    images = min(len(source), images_seen)
    whole = len(getattr(source, "source", source))
    captions = images_seen if listed_images(source) < whole else min(images_seen, len(set(source.texts())))
    return (images + captions) * teacher.model.config.feature_width * FLOAT


def asked_each(source: Any) -> float:
    """Questions an image, by the first questions of `source`; 1 of a stream, whose every row is a sample of its own."""
    if getattr(source, "endless", False):
        return 1.0
    return sum(1 for _ in asked(source)) / max(1, listed_images(source))
