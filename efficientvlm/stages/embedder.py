"""A network's vectors of images and of sentences, for stages that keep or compare them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from efficientvlm.data.texts import Texts
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.runtime.hardware import autocast
from efficientvlm.selection.rules import Array
from efficientvlm.selection.search import unit

AT_ONCE = 64  # sentences that a tower of texts reads at once


class Embedder:
    """The towers of a network that embeds, on a device. Vectors are of length 1, in float32; what is not finite stays so."""

    def __init__(self, loaded: Loaded, device: torch.device, *, precision: str = "fp32", max_tokens: int | None = None) -> None:
        self.model, self.device, self.precision = loaded.model.to(device).eval(), device, precision
        self.texts: Texts = texts_of(loaded, max_tokens)

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Array:
        """Pictures (uint8 [N, 3, H, W]) to vectors [N, E]."""
        with autocast(self.device, self.precision):
            vectors: Tensor = self.model.embed_images(pixels.to(self.device))[1]
        return unit(vectors.float().cpu().numpy())

    @torch.inference_mode()
    def sentences(self, sentences: Sequence[str], at_once: int = AT_ONCE) -> Array:
        """Sentences [N], one or more, to vectors [N, E], `at_once` at a time. Those of like length are read together, so that little is
        padding."""
        lengths = np.array([len(ids) for ids in self.texts.ids(sentences)])
        order = np.argsort(lengths, kind="stable")
        parts = []
        for begin in range(0, len(order), at_once):
            ids, mask = self.texts.batch([sentences[row] for row in order[begin : begin + at_once]])
            with autocast(self.device, self.precision):
                parts.append(self.model.embed_texts(ids.to(self.device), mask.to(self.device))[1].float().cpu().numpy())
        found = np.concatenate(parts)
        vectors = np.empty_like(found)
        vectors[order] = found
        return unit(vectors)
