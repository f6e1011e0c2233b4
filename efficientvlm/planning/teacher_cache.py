"""What a cached teacher keeps in main memory, from the tables of the data (ours)."""

from __future__ import annotations

from typing import Any

from efficientvlm.data.kinds.questions import answers
from efficientvlm.data.shapes import SAMPLED_TEXTS, Shapes
from efficientvlm.errors import BadInput
from efficientvlm.planning.costs import FLOAT, main_memory, size
from efficientvlm.settings.tasks import VQASettings
from efficientvlm.stages.common import Loaded, texts_of


def bytes_kept(config: Any, teacher: Loaded, source: Any, images_seen: int) -> int:
    """Bytes that a cached teacher comes to keep in one process, at most, over a run that reads `images_seen` images, some again.

    The texts of `shapes` are estimated from its first ones.
    """
    images = min(len(source), images_seen)
    whole = getattr(source, "source", source)
    listed = min(len(whole), SAMPLED_TEXTS) if isinstance(whole, Shapes) else len(whole)  # images whose texts are known without a picture
    if isinstance(config, VQASettings):
        tokens = _answer_tokens(config, teacher, [answer for answer, _ in answers(source)])
        return round(tokens * images / max(1, listed)) * teacher.sizes.vocab_size * FLOAT
    captions = images_seen if listed < len(whole) else min(images_seen, len(set(source.texts())))
    return (images + captions) * int(teacher.model.config.embed_dim) * FLOAT


def _answer_tokens(config: VQASettings, teacher: Loaded, answers: list[str]) -> int:
    """Tokens of all `answers`, as training reads them."""
    distinct = list(dict.fromkeys(answers))
    _, mask = texts_of(teacher).batch(distinct, config.max_answer_tokens, double_sep=config.quirks.double_sep)
    lengths = dict(zip(distinct, mask.sum(1).tolist(), strict=True))
    return sum(lengths[answer] for answer in answers)


def problem(kept: int) -> BadInput | None:
    """What is wrong with keeping so many bytes on this machine."""
    there = main_memory()
    if there is None or kept <= there:
        return None
    return BadInput(
        "cache_teacher takes too much memory", f"up to {size(kept)} would be kept; this machine has {size(there)}", "leave it out"
    )
