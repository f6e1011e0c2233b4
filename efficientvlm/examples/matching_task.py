"""Matching as a task: whether a text belongs to a picture. It is learnt from pairs, and from the same texts with other pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from efficientvlm.data.batch import Batch, on_device, stack
from efficientvlm.data.configured import augmentation
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PAIRS, PairItem, pair_batch
from efficientvlm.data.opening import usable
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.network import Record
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.objectives.losses import matching_loss, positives
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.terms import Term, logits
from efficientvlm.runtime.hardware import autocast
from efficientvlm.runtime.progress import counted
from efficientvlm.settings.base import Size
from efficientvlm.settings.common import Asking, Learning
from efficientvlm.settings.tasks import Pictures
from efficientvlm.tasks.influence import Influence, of_pairs
from efficientvlm.tasks.task import Asked, Learnt, held_out


class MatchingSettings(Learning):
    """What only this task knows, beside the settings of every stage that trains."""

    negatives: Size = Field(1, ge=1, description="other pictures that each text is compared with")


class MatchingQuestion(Asking):
    """What `evlm predict` is given; the examples stand in model cards."""

    image: Pictures = Field(min_length=1, max_length=1, examples=["picture.png"])
    question: str = Field(min_length=1, examples=["a red circle"])


class PairMatching(Objective):
    """Cross-entropy of `no` and `yes` for texts with their own picture and with those of the next pairs of the batch.

    Use it for a network that matches; `objectives.distillation.Distilled` adds a teacher.

    Inputs of `forward`: a `data.kinds.pairs.pair_batch`, of which pixels [B, 3, H, W], text_ids and text_mask [B, L] are read.
    Returns `matching`, and the same as `loss`.
    Source: the matching loss of ALBEF (Li et al. 2021), with negatives in the order of the batch instead of hard ones.

    Example: `PairMatching(model, negatives=1)(batch, step=0)["loss"].backward()`
    """

    terms = (Term("matching_logits", "matching_logits", logits),)

    def __init__(self, model: Any, negatives: int) -> None:
        super().__init__()
        self.model, self.negatives = model, negatives

    def passes(self, model: Any, batch: Batch, step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Nothing is drawn. Recorded are `matching_logits` [(1 + negatives) * B, 2], the texts with their own pictures first."""
        own = torch.arange(len(batch["text_ids"]), device=batch["text_ids"].device)
        pictures = torch.cat([own.roll(-shift) for shift in range(1 + self.negatives)])
        texts = own.repeat(1 + self.negatives)
        scores = score(model, batch, pictures, texts)
        matched = positives(batch)[pictures, texts]  # a caption may belong to several pictures of a batch
        losses = {"matching": matching_loss(scores, matched)} if model is self.model else {}
        return Pass(losses, Record(matching_logits=scores))


def score(model: Any, batch: Batch, pictures: Tensor, texts: Tensor) -> Tensor:
    """Logits [P, 2] (no, yes) of the texts with the numbers `texts` [P] and the pictures with the numbers `pictures` [P] of a batch."""
    images, _ = model.embed_images(batch["pixels"])
    states, _ = model.embed_texts(batch["text_ids"], batch["text_mask"])
    scores: Tensor = model.match(images, pictures, states[texts], batch["text_mask"][texts])
    return scores


class Matching(Learnt, Asked):
    """The part of all pairs, right and wrong ones, that a network tells apart."""

    name, kind, needs = "matching", PAIRS, ("embed", "match")
    timed_as = "image and text tensors to whether they match, a pair a sample; random pixels and tokens"

    def problems(self, config: MatchingSettings, student: Loaded) -> Iterator[BadInput]:
        if config.batch_size <= config.negatives:
            why = f"a text needs {config.negatives} other pictures beside its own"
            yield BadInput(f"batch_size {config.batch_size}", why, f"use {config.negatives + 1} or more")

    def objective(self, config: MatchingSettings, student: Loaded) -> Objective:
        return PairMatching(student.model, config.negatives)

    def batches(self, config: MatchingSettings, student: Loaded, items: Sequence[PairItem], texts: Texts, step: int) -> list[Batch]:
        return [pair_batch(items, texts, seed=config.seed, step=step, **augmentation(config), task=True)]

    def validate(self, config: MatchingSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        size = config.eval_batch_size or config.batch_size
        source = held_out(source, config.eval_limit, "validate", quiet)
        return self.measure(student, source, batch_size=size, seed=0, title="validate", quiet=quiet)

    def influence(self, config: MatchingSettings, student: Loaded, source: Any) -> Influence:
        return of_pairs(student, source, config.eval_batch_size)

    def evaluate(self, config: Any, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        if not len(source):
            raise BadInput(f"{config.data} has no images", f"split {config.split} of {source.name}", "use another --split")
        measured = self.measure(loaded, source, batch_size=config.batch_size, seed=config.seed, title=title, quiet=quiet)
        what = "matching_accuracy: the part of the pairs that are told apart, a caption of each image with its own and with another image"
        return {"metric": what, "influence": of_pairs(loaded, source, config.batch_size), "metrics": measured}

    @torch.inference_mode()
    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        objective, texts = PairMatching(loaded.model.eval(), 1), texts_of(loaded)
        images, right, pairs = 0, 0, 0
        for start in counted(range(0, len(source), batch_size), title, len(source), quiet):
            items = [item for item in usable(source, range(start, min(len(source), start + batch_size))) if item.captions]
            if len(items) > 1:  # one image alone has no other to be told from
                batch = on_device(pair_batch(items, texts, seed=seed, step=0, augment_kind="none", task=True), loaded.model.device)
                said = objective.passes(loaded.model, batch, 0).record["matching_logits"].argmax(-1)
                own = torch.arange(len(items), device=said.device)
                matched = positives(batch)[torch.cat([own, own.roll(-1)]), own.repeat(2)]
                images, right, pairs = images + len(items), right + int((said == matched.long()).sum()), pairs + len(said)
        return {"images": images, **({"matching_accuracy": right / pairs} if pairs else {})}

    def ask(self, config: MatchingQuestion, loaded: Loaded) -> dict[str, Any]:
        ids, mask = texts_of(loaded).batch([config.question])
        batch = {"pixels": stack([open_image(config.image[0], loaded.preprocessing)]), "text_ids": ids, "text_mask": mask}
        one = torch.zeros(1, dtype=torch.long, device=loaded.model.device)
        with torch.inference_mode():
            yes = float(score(loaded.model.eval(), on_device(batch, loaded.model.device), one, one).softmax(1)[0, 1])
        return {"question": config.question, "answer": "yes" if yes > 0.5 else "no", "probability": yes}

    def can_be_timed(self, models: Sequence[Loaded]) -> bool:
        return all(self.able(loaded) for loaded in models)

    def timed(self, loaded: Loaded, config: Any, device: torch.device, among: Sequence[Loaded], quiet: bool) -> Callable[[int], object]:
        self.make_able(loaded)
        model, draw = loaded.model.to(device).eval(), torch.Generator().manual_seed(config.seed)
        sizes, most = loaded.sizes, max(config.batch_sizes)
        pixels = torch.randint(256, (most, 3, sizes.image_size, sizes.image_size), generator=draw, dtype=torch.uint8)
        ids = torch.randint(sizes.vocab_size, (most, config.text_length), generator=draw)
        whole = on_device({"pixels": pixels, "text_ids": ids, "text_mask": torch.ones_like(ids)}, device)
        rows = torch.arange(most, device=device)

        def match(size: int) -> Tensor:
            with autocast(device, config.precision):
                return score(model, {name: value[:size] for name, value in whole.items()}, rows[:size], rows[:size])

        return match
