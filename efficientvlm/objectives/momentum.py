"""Momentum contrast: averaged encoders and queues of what they gave, which belong to an objective and are never deployed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from efficientvlm.data.draw import seed_of
from efficientvlm.objectives.losses import Contrast, Queues, contrast_loss, positives
from efficientvlm.objectives.objective import Objective
from efficientvlm.runtime.exchange import Rows
from efficientvlm.settings.tasks import Over

FEATURES = frozenset({"image_feature", "text_feature", "contrast"})
"""What an objective records of its features."""
NOBODY = -100
"""In the place of the number of an image or caption: it is no pair's."""


class _Featuring(nn.Module):
    """What `functional_call` calls: a network as a function from images and texts to their features."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.embed_images(pixels)[1], self.model.embed_texts(ids, mask)[1]


class MomentumEncoder(nn.Module):
    """Averages of the weights of a network on which its features depend (MoCo, He et al. 2020; ALBEF; BLIP).

    They are buffers, and the network itself computes with them, so that its structure is also theirs: gates that close heads and neurons of
    the network close the same ones here, in the same step, and a sliced network has sliced averages. Only weights are averaged, gates are
    not. A weight that is frozen is its own average and is kept once. What the features do not depend on, such as the cross-attention of a
    text encoder, has no average.

    Args:
        model: a network whose features are learnt (`families.network.Averages`). It is no part of this module.
        momentum: what an average keeps of itself in a step.
    """

    def __init__(self, model: Any, momentum: float) -> None:
        super().__init__()
        self.momentum, self._model = momentum, (_Featuring(model),)
        learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.places = {name: name.replace(".", "/") for name in sorted(learnt & model.feature_parameters())}  # buffers have no dots
        for name, place in self.places.items():
            self.register_buffer(place, model.get_parameter(name).detach().clone())

    @torch.no_grad()
    def follow(self) -> None:
        """A step towards the network's weights, as they are now."""
        for name, place in self.places.items():
            self.get_buffer(place).lerp_(self._model[0].model.get_parameter(name), 1 - self.momentum)

    @torch.no_grad()
    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] and texts [B, L] to unit vectors [B, E] each."""
        averaged = {f"model.{name}": self.get_buffer(place) for name, place in self.places.items()}
        features: tuple[Tensor, Tensor] = functional_call(self._model[0], averaged, (pixels, ids, mask))
        return features[0].float(), features[1].float()


class Features(NamedTuple):
    """Features of pairs: unit vectors [N, E] of images and texts, and numbers [N] that are equal where image or caption are."""

    image: Tensor
    text: Tensor
    image_ids: Tensor
    caption_ids: Tensor


class Queue(nn.Module):
    """The features of the latest pairs, at most `size` of them; a new one takes the place of the oldest.

    It begins empty, and only what is in it is compared with. The published code begins with random vectors: :meth:`fill`.
    """

    total: Tensor

    def __init__(self, size: int, width: int, like: Tensor) -> None:
        """`width` columns a feature; `like` has the device and type that they are to have."""
        super().__init__()
        self.size, self.seen = size, 0
        for name in Features._fields[:2]:
            self.register_buffer(name, like.new_zeros(size, width))
        for name in Features._fields[2:]:
            self.register_buffer(name, like.new_full((size,), NOBODY, dtype=torch.int64))
        self.register_buffer("total", like.new_zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(lambda module, _: module._note())

    @property
    def pointer(self) -> int:
        """Where the next pair goes."""
        return self.seen % self.size

    def latest(self) -> Features:
        """What is in it, in the order of its places."""
        filled = min(self.seen, self.size)
        return Features(*(self.get_buffer(name)[:filled] for name in Features._fields))

    def places(self, count: int) -> Tensor:
        """Where the next `count` pairs go."""
        return (self.seen + torch.arange(count, device=self.total.device)) % self.size

    @torch.no_grad()
    def put(self, new: Features) -> None:
        """Add pairs, no more than there is room for; they begin anew at its end."""
        rows = self.places(len(new.image))
        for name, values in new._asdict().items():
            self.get_buffer(name).index_copy_(0, rows, values.to(self.get_buffer(name).dtype))
        self.seen += len(new.image)
        self.total.fill_(self.seen)

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Random unit vectors in every place, which belong to no pair, as the published code begins."""
        generator = torch.Generator().manual_seed(seed_of(seed, "queue"))
        image, text = (torch.randn(self.get_buffer(name).shape, generator=generator) for name in Features._fields[:2])
        nobody = torch.full((self.size,), NOBODY)
        drawn = Features(F.normalize(image, dim=-1), F.normalize(text, dim=-1), nobody, nobody)
        self.put(Features(*(values.to(self.total.device) for values in drawn)))

    def _note(self) -> None:
        self.seen = int(self.total)


class Keys(NamedTuple):
    """What a batch is contrasted with.

    `own` are the momentum features of the batch [B, ...], `every` those of the batches of all processes, `of` those of all keys [K, ...]:
    of one or the other first, as `rows` says, and from `queued` on of the queue. `same` [B, K] is True where an image and a text belong
    together. `replaced` are the places in the queue that the step will take.
    """

    own: Features
    every: Features
    of: Features
    rows: Rows
    queued: int
    same: Tensor
    replaced: Tensor

    def contrasted(self, image: Tensor, text: Tensor, temperature: Tensor) -> Contrast:
        """Features [B, E] of the batch and what they are compared by, for a method that compares them otherwise."""
        images, texts = self.of.image[self.queued :], self.of.text[self.queued :]
        queues = Queues(images, texts, self.every.image, self.every.text, self.replaced)
        return Contrast(image, text, temperature, self.rows, self.same, queues)


class MomentumContrast(nn.Module):
    """Contrast of a batch with the momentum features of the same batch and of a queue, with soft targets (ALBEF, Li et al. 2021; BLIP).

    Use it as a part of an objective, which calls :meth:`begin_step` before the passes of a step, :meth:`keys` and :meth:`loss` in them, and
    :meth:`end_step` once the weights are updated: so everything is compared with the queue as it was before the step.

    Pairs of one image, and equal captions, are positives of one another and share a target, in the batch and in the queue (BLIP does so in
    fine-tuning on retrieval, by images alone). Over several processes the queue gets the pairs of all; `over` says whether a batch meets
    the pairs of all processes, so that several compute what one does, or those of its own process, as published.

    Args:
        model: the network, as of :class:`MomentumEncoder`.
        momentum: what an average keeps of itself in a step.
        queue: pairs in the queue.
        alpha: the part of a target that the momentum features give.
        ramp: steps in which it grows from 0.
        random: the queue begins with random vectors, drawn from this seed; by default it is empty.
    """

    def __init__(
        self, model: Any, *, momentum: float, queue: int, alpha: float, ramp: int = 0, over: Over = "all", random: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = MomentumEncoder(model, momentum)
        self.queue = Queue(queue, model.config.feature_width, next(model.parameters()).detach())
        self.most, self.ramp, self.over = alpha, ramp, over
        self.waiting: Features | None = None
        if random is not None:
            self.queue.fill(random)

    def alpha(self, step: int) -> float:
        """The part of a target that the momentum features give at `step`."""
        return self.most * min(1.0, step / self.ramp) if self.ramp else self.most

    def begin_step(self) -> None:
        self.encoder.follow()

    def end_step(self) -> None:
        """Put the pairs of the step into the queue."""
        if self.waiting is not None:
            self.queue.put(self.waiting)
            self.waiting = None

    @torch.no_grad()
    def keys(self, batch: dict[str, Any]) -> Keys:
        """What the pairs of `batch` are contrasted with; a `data.kinds.pairs.pair_batch`, of which `image_ids` may be missing."""
        ids = batch["text_ids"]
        everyone = Rows(len(ids))
        none = torch.full_like(ids[:, 0], NOBODY)
        image, text = self.encoder(batch["pixels"], ids, batch["text_mask"])
        own = Features(image, text, batch.get("image_ids", none), batch.get("caption_ids", none))
        every = Features(*map(everyone.gather, own))
        self.waiting = every
        met, rows = (every, everyone) if self.over == "all" else (own, Rows.of_one(len(ids)))
        known = self.queue.latest()
        of = Features(*(torch.cat([now, before]) for now, before in zip(met, known, strict=True)))
        same = positives(batch, rows)[rows.start : rows.start + len(ids)]
        before = torch.zeros(len(ids), len(known.image), dtype=torch.bool, device=ids.device)
        for mine, theirs in ((own.image_ids, known.image_ids), (own.caption_ids, known.caption_ids)):
            before |= (mine[:, None] == theirs[None]) & (mine[:, None] != NOBODY)
        return Keys(own, every, of, rows, len(met.image), torch.cat([same, before], 1), self.queue.places(len(every.image)))

    def loss(self, image: Tensor, text: Tensor, keys: Keys, temperature: Tensor, step: int) -> Tensor:
        """Mean of both directions, for features [B, E] of images and texts.

        The targets are `alpha` times what the momentum features say, and else the positives, which share theirs.
        """
        alpha, hard = self.alpha(step), keys.same.float()
        hard = hard / hard.sum(1, keepdim=True)
        losses = []
        for ours, averaged, others in ((image, keys.own.image, keys.of.text), (text, keys.own.text, keys.of.image)):
            with torch.autocast(image.device.type, enabled=False):  # in bfloat16 close keys would be equal
                with torch.no_grad():
                    targets = alpha * (averaged @ others.T / temperature).softmax(1) + (1 - alpha) * hard
                losses.append(contrast_loss(ours.float() @ others.T / temperature, targets))
        return (losses[0] + losses[1]) / 2

    def describe(self, step: int) -> dict[str, float]:
        return {"alpha": self.alpha(step), "queue": float(min(self.queue.seen, self.queue.size))}


class Contrasting(Objective):
    """An objective that may have averaged encoders and a queue; without them pairs are contrasted with those of the batch alone."""

    contrast: MomentumContrast | None

    def begin_step(self, step: int) -> None:
        if self.contrast is not None:
            self.contrast.begin_step()

    def after_step(self, step: int) -> None:
        if self.contrast is not None:
            self.contrast.end_step()

    def describe(self, step: int) -> dict[str, float]:
        return self.contrast.describe(step) if self.contrast is not None else {}
