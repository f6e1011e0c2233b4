"""Captions that are judged as a whole: the network learns from how much better its samples score than what it would have said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from efficientvlm.data.batch import uniform
from efficientvlm.families.network import Record
from efficientvlm.families.towers.decoding import Rules, continued, drawn, stepping
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.runtime import ranks

Baseline = Literal["greedy", "samples"]
Reward = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]
"""Captions, as many of each image one after another, and the references of every image → the score of each caption."""


class SelfCritical(Objective):
    """Policy gradient on sampled captions, with a baseline of the network itself (Rennie et al. 2017; X-VLM, CIDEr stage).

    Use it to go on with a network that was tuned on captions, at a small learning rate: it learns to score well, not to describe.

    Args:
        reward: scores captions.
        say: token ids to a caption.
        prompt: tokens that every caption begins with, its first one included.
        rules: when a caption ends.
        samples: captions that are drawn of each image, in training mode.
        baseline: what a sample has to be better than: the caption that always takes the likeliest token, in evaluation mode, or the mean of
            the other samples of its image.
        seed: of the draws, which follow from it, the step and the image.

    Inputs of `forward`: a `data.kinds.pairs.caption_batch`, of which are read: pixels [I, 3, H, W]; references and item_ids, by image.
    Returns `self_critical`, the same as `loss`, and, without gradients, the mean `reward` of the samples and of the baseline.

    Samples are drawn without gradients, and one pass over all of their tokens gives the log-probabilities; the published code keeps the
    gradients of the steps in which it draws, with the same dropout. It also ends an unfinished caption by force, which is not done here.

    Example: `SelfCritical(model, Reward(references), say, prompt, rules, samples=5)(batch, step=0)["loss"].backward()`
    """

    def __init__(
        self,
        model: Any,
        reward: Reward,
        say: Callable[[list[int]], str],
        prompt: Sequence[int],
        rules: Rules,
        *,
        samples: int = 5,
        baseline: Baseline = "greedy",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.reward, self.say, self.prompt, self.rules = model, reward, say, list(prompt), rules
        self.samples, self.baseline, self.seed = samples, baseline, seed

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        losses, record, _ = self.passes(self.model, batch, step)
        rewards = {name: record[name].sum() / ranks.share_of(len(record[name])) for name in ("reward", "baseline_reward")}
        return {"loss": losses["self_critical"], **losses, **rewards}

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Iterable[str] = (), drawn: Any = None) -> Pass:
        """Recorded are the `reward` [I * samples] and `baseline_reward` [I * samples] of every sample, and their mean `log_probability`."""
        references = batch["references"]
        rows = torch.arange(len(references), device=batch["pixels"].device).repeat_interleave(self.samples)
        ids = self.sampled(model, batch, rows, step)
        captions = [self.say(text) for text in ids.tolist()]
        reward = torch.tensor(self.reward(captions, references), device=rows.device)
        if self.baseline == "greedy":
            greedy = [self.say(text) for text in self.likeliest(model, batch).tolist()]
            baseline = torch.tensor(self.reward(greedy, references), device=rows.device).repeat_interleave(self.samples)
        else:
            baseline = mean_of_others(reward, self.samples)
        chances = self.log_probability(model, batch, rows, ids)
        loss = -(chances * (reward - baseline)).sum() / ranks.share_of(len(rows))
        return Pass({"self_critical": loss}, Record(reward=reward, baseline_reward=baseline, log_probability=chances))

    @torch.no_grad()
    def sampled(self, model: Any, batch: dict[str, Any], rows: Tensor, step: int) -> Tensor:
        """Tokens [I * samples, T] that are drawn behind the prompt."""
        keys = [f"{batch['item_ids'][row]}#{number % self.samples}" for number, row in enumerate(rows.tolist())]
        chances = uniform(keys, self.rules.most, self.seed, step, "self-critical")
        return continued(stepping(model, model.look(batch["pixels"]), rows), self._given(rows), self.rules, drawn(chances))

    @torch.no_grad()
    def likeliest(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Tokens [I, T] of the captions that the network would give, without dropout."""
        training = model.training
        model.eval()
        try:
            given = self._given(torch.arange(len(batch["pixels"]), device=batch["pixels"].device))
            return continued(stepping(model, model.look(batch["pixels"])), given, self.rules)
        finally:
            model.train(training)

    def log_probability(self, model: Any, batch: dict[str, Any], rows: Tensor, ids: Tensor) -> Tensor:
        """The mean log-probability [I * samples] of the tokens `ids` behind the prompt, the end counted and what follows it not."""
        text, ended = torch.cat([self._given(rows), ids], 1), (ids == self.rules.end).long()
        said = (ended.cumsum(1) - ended) == 0
        mask = torch.cat([torch.ones_like(text[:, : len(self.prompt)]), said.long()], 1)
        logits = model.run({"pixels": batch["pixels"], "image_index": rows, "text_ids": text, "text_mask": mask})["logits"]
        scores = logits[:, len(self.prompt) - 1 : -1].float().log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return (scores * said).sum(1) / said.sum(1)

    def _given(self, rows: Tensor) -> Tensor:
        return torch.tensor([self.prompt], device=rows.device).expand(len(rows), -1)


def mean_of_others(reward: Tensor, samples: int) -> Tensor:
    """For each of `samples` rewards of an image [I * samples] the mean of the others."""
    by_image = reward.unflatten(0, (-1, samples))
    return ((by_image.sum(1, keepdim=True) - by_image) / (samples - 1)).flatten()
