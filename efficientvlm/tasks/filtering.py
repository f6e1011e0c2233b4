"""Filtering of captions by a network that says how well each fits its picture (CapFilt)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.network import refusal
from efficientvlm.loaded import Loaded, load, texts_of
from efficientvlm.runtime.hardware import pick_device
from efficientvlm.settings.tasks import CaptionQuestion
from efficientvlm.tasks.recall import encode, match

BATCH = 64
THRESHOLD = 0.5


@dataclass
class Judge:
    """Says of captions whether they fit, by the `probability` of a match, of at least `threshold`; where a network does not match, by the
    cosine of features, the `similarity`.

    Source: Li et al. 2022 (BLIP), section 3.3, whose filter keeps what its matching head calls a match.
    """

    loaded: Loaded
    threshold: float
    texts: Texts = field(init=False)

    def __post_init__(self) -> None:
        self.texts = texts_of(self.loaded)

    @classmethod
    def of(cls, config: CaptionQuestion) -> Judge:
        """As `config` asks for.

        Raises:
            BadInput: no such checkpoint, one that compares nothing, or one that does not match without a threshold.
        """
        loaded = load(str(config.filter), exported=True)
        if "embed" not in loaded.abilities:
            raise refusal(loaded.config, "match", f"filter {loaded.path}")
        if config.threshold is None and "match" not in loaded.abilities:
            why = f"{loaded.path} compares by features alone, and from which cosine on a caption fits depends on it"
            raise BadInput("the filter needs a threshold", why, "give --threshold, e.g. 0.25, or a model that matches")
        loaded.model.to(pick_device(config.device)).eval()
        return cls(loaded, THRESHOLD if config.threshold is None else config.threshold)

    @property
    def score(self) -> str:
        """What the score is called."""
        return "probability" if "match" in self.loaded.abilities else "similarity"

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, captions: Sequence[Sequence[str]]) -> list[list[float]]:
        """The score of each caption of each image [I, 3, H, W]."""
        model = self.loaded.model
        names = [str(number) for number in range(len(pixels))]
        gallery = encode(model, [(names, pixels, captions)], partial(Texts.batch, self.texts), BATCH, len(pixels))
        if "match" in self.loaded.abilities:
            scores = match(model, gallery, gallery.owners, gallery.said, batch_size=BATCH).softmax(1)[:, 1]
        else:
            scores = (gallery.image[gallery.owners] * gallery.text[gallery.said]).sum(1)
        return [list(part) for part in torch.split(scores.cpu(), [len(said) for said in captions])]
