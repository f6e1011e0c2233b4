"""Captioning: an image is described in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from efficientvlm.data.configured import augmentation
from efficientvlm.data.kinds.pairs import PAIRS, caption_batch
from efficientvlm.data.reading import Reading, counts_of, of_read, of_texts
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import room
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.objectives.captioning import Captions
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.self_critical import SelfCritical
from efficientvlm.runtime.hardware import autocast
from efficientvlm.runtime.progress import say
from efficientvlm.settings.base import settings_of
from efficientvlm.settings.stages import Bench
from efficientvlm.settings.tasks import CaptionEval, CaptioningSettings, CaptionQuestion
from efficientvlm.tasks import java_metrics
from efficientvlm.tasks.caption_metrics import Reward
from efficientvlm.tasks.choices import Choice, pictures
from efficientvlm.tasks.describing import (
    EVAL_BATCH,
    Describer,
    Manner,
    captions_file,
    describe,
    mean_loss,
    of_captions,
    of_lengths,
    of_prompt,
    prompt_of,
    remedy,
    write_captions,
)
from efficientvlm.tasks.influence import Influence
from efficientvlm.tasks.labelling import label
from efficientvlm.tasks.remembered import bytes_of_captions
from efficientvlm.tasks.task import Asked, Learnt, gain_untrained, held_out
from efficientvlm.training.loop import Batch

TIMED_BEAMS, TIMED_TOKENS = 3, 16
METRIC = (
    "cider_d: CIDEr-D (0 to 10; published figures are a hundred times it), with BLEU-1 to 4 and ROUGE-L (0 to 1) beside it, of one caption "
    "an image against all of its references; words are those of {}"
)
WORDS = {"ptb": "the Penn Treebank tokenizer, as published", "lower": "a split at spaces, lower-cased", "plain": "a split at spaces"}


class Captioning(Learnt, Asked):
    """The smoothed likelihood of captions behind a prompt; beam search (X-VLM)."""

    name, kind, needs = "captioning", PAIRS, ("caption",)
    grows = ("captions_per_image",)
    also = ("bleu_4", "rouge_l")
    timed_as = (
        f"image tensors to captions by beam search, {TIMED_BEAMS} beams of {TIMED_TOKENS} tokens behind a prompt of 4, none of which ends "
        "before; random pixels"
    )

    def remedy(self, loaded: Loaded) -> str:
        return remedy(loaded)

    # learning

    def problems(self, config: CaptioningSettings, student: Loaded) -> Iterator[BadInput]:
        texts = texts_of(student, config.max_tokens)
        given = len(prompt_of(texts, config.prompt))
        if texts.room() <= given:
            why = f"its {given} tokens leave no room for a caption in {texts.max_tokens}"
            yield BadInput(f"prompt {config.prompt!r}", why, "use a shorter prompt, or raise max_tokens")
        elif config.max_length <= given + 1:
            why = f"the first token and the prompt {config.prompt!r} are {given + 1} tokens, and nothing could follow"
            yield BadInput(f"max_length {config.max_length}", why, f"use more than {given + 1}, or another prompt")
        if config.max_length > student.sizes.max_positions:
            why = f"{student.path} has {student.sizes.max_positions} positions for tokens"
            yield BadInput(f"max_length {config.max_length}", why, f"use at most {student.sizes.max_positions}")

        if config.self_critical and getattr(config, "teacher", None) and config.kd:  # type: ignore[attr-defined]
            why = "samples are judged by their references, and no teacher takes part"
            yield BadInput("self_critical with a teacher", why, "leave --teacher out, or give --kd 0")
        if config.self_critical and config.data.startswith("stream:"):
            why = "what a word is worth follows from the captions of all training images"
            yield BadInput("self_critical on a stream", why, "use data that are no stream")

    def adapt(self, config: CaptioningSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """Heads of other tasks are left behind; that of masked tokens says the next one."""
        tuned: tuple[Any, list[str]] = student.model.gain("caption")
        return tuned

    def changes(self, added: int) -> str:
        what = "heads of other tasks are left behind" if added <= 0 else "a decoder is added, and heads of other tasks are left behind"
        return f"{what}: {added:+,} parameters"

    def configure(self, config: CaptioningSettings, student: Loaded, source: Any) -> None:
        student.config.prompt, student.config.caption_tokens = config.prompt, [config.min_length, config.max_length]
        student.model.config.note_smoothing(config.label_smoothing)

    def reading(self, config: CaptioningSettings, student: Loaded, sources: dict[str, Any]) -> Reading:
        texts = texts_of(student, config.max_tokens)
        given = prompt_of(texts, config.prompt)
        found = of_texts(texts, sources["train"], len(given)) + of_prompt(texts, config.prompt)
        return found + of_lengths(texts, sources["train"], config.max_length - len(given) - 1)

    def objective(self, config: CaptioningSettings, student: Loaded) -> Objective:
        return Captions(student.model, config.label_smoothing, published=config.smoothing == "published")

    def objective_on(self, config: CaptioningSettings, student: Loaded, source: Any) -> Objective:
        """With `self_critical` rewards, in which words count by how many images of `source` do without them."""
        if not config.self_critical:
            return self.objective(config, student)
        describer = Describer(student, Manner.of(student, config))
        reward = Reward([caption for content in contents for caption in content.captions] for contents in source.contents())
        chosen = settings_of(config, "samples", "baseline", "seed")
        return SelfCritical(student.model, reward, describer.said, describer.prompt, describer.rules, **chosen)

    def batches(self, config: CaptioningSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        chosen = settings_of(config, "seed", "prompt", "captions_per_image", "plain_captions")
        return [caption_batch(items, texts, step=step, **chosen, **augmentation(config))]

    def validate(self, config: CaptioningSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        """The loss of a token, and the metrics of the captions that are written."""
        source = held_out(source, config.eval_limit, "validate", quiet)
        if not len(source):
            return {"images": 0}
        size = config.eval_batch_size or EVAL_BATCH
        loss = mean_loss(student, source, size, quiet, **settings_of(config, "prompt", "plain_captions"))
        describer = Describer(student, Manner.of(student, config))
        found = describe(describer, source, size, "validate", quiet).metrics("ptb", "validate", quiet)
        return {**found, **({} if loss is None else {"loss": loss})}

    def influence(self, config: CaptioningSettings, student: Loaded, source: Any) -> Influence:
        return of_captions(Describer(student, Manner.of(student, config)), source, config.eval_batch_size)

    def bytes_of_cached_teacher(self, config: CaptioningSettings, teacher: Loaded, source: Any, images_seen: int) -> int:
        return bytes_of_captions(config, teacher, source, images_seen)

    # measuring

    def check(self, config: CaptionEval, loaded: Loaded) -> None:
        Describer(loaded, Manner.of(loaded, config))
        if config.meteor:
            java_metrics.check("METEOR")
        if config.spice:
            java_metrics.check("SPICE", config.spice)
        if config.captions:
            captions_file(config.captions, "references")

    def also_writes(self, config: CaptionEval) -> list[str]:
        return [config.captions] if config.captions else []

    def evaluate(self, config: CaptionEval, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        """Every image of `source` described: `metric`, in which `manner`, `metrics`; captions go to the file `config.captions`, if any."""
        describer = Describer(loaded, Manner.of(loaded, config))
        said = describe(describer, source, config.batch_size, title, quiet)
        if not said.captions:
            raise BadInput(f"{config.data} has no captions", f"split {config.split} of {source.name}", "use another --data or --split")
        if config.captions:
            write_captions(captions_file(config.captions, "references"), said.rows())
        measured = said.metrics(config.tokenization, title, quiet)
        if config.meteor:
            measured["meteor"] = java_metrics.meteor(said.captions, said.references)
        if config.spice:
            measured["spice"] = java_metrics.spice(said.captions, said.references, config.spice)
        for remark in (*of_prompt(describer.texts, describer.manner.prompt).remarks, *of_read(describer.texts)):
            say(f"{title}: {remark}", quiet=quiet)
        return {
            "metric": METRIC.format(WORDS[config.tokenization]),
            "mode": config.decoding,
            "manner": describer.manner.said,
            "influence": of_captions(describer, source, config.batch_size),
            "metrics": {**measured, "reading": counts_of(describer.texts)},
        }

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        said = describe(Describer(loaded, Manner.of(loaded)), source, batch_size, title, quiet)
        return said.metrics("ptb", title, quiet)

    def reading_of_measuring(self, config: CaptionEval, loaded: Loaded, source: Any) -> Reading:
        return of_prompt(texts_of(loaded), Manner.of(loaded, config).prompt)

    def bytes_of_measuring(self, config: CaptionEval, loaded: Loaded, source: Any) -> int:
        pixels = 2 * config.batch_size * 3 * loaded.sizes.image_size**2
        return pixels + held(Describer(loaded, Manner.of(loaded, config)), min(len(source), config.batch_size))

    def exported(self, loaded: Loaded) -> dict[str, Any]:
        manner = Manner.of(loaded)
        ends = {"start_token": loaded.tokenizer.cls_token_id, "end_token": loaded.tokenizer.sep_token_id}
        return {"prompt": manner.prompt, "caption_tokens": [manner.min_length, manner.max_length], **ends}

    def choices(self, loaded: Loaded, source: Any, count: int, seed: int) -> list[Choice]:
        """Greedy captions; of a network with fewer positions than captions usually have, shorter ones."""
        loaded.model.eval()
        manner = Manner.of(loaded)
        most = min(manner.max_length, loaded.sizes.max_positions)
        fits = len(prompt_of(texts_of(loaded), manner.prompt)) + 1 < most
        manner = replace(manner, prompt=manner.prompt if fits else "", max_length=most, min_length=min(manner.min_length, most))
        return Describer(loaded, manner).greedy(pictures(loaded, source, count, seed)[0])

    # asking

    def ask(self, config: CaptionQuestion, loaded: Loaded) -> dict[str, Any]:
        """Captions of pictures, see :func:`tasks.labelling.label`."""
        return label(config, loaded)

    def can_be_timed(self, models: Sequence[Loaded]) -> bool:
        """Where one of them describes images."""
        return any(self.able(loaded) for loaded in models)

    def make_able(self, loaded: Loaded) -> None:
        """Give `loaded.model` the form that describes images, if it has another."""
        gain_untrained(loaded, "caption")

    def timed(self, loaded: Loaded, config: Bench, device: torch.device, among: Sequence[Loaded], quiet: bool) -> Callable[[int], object]:
        """Describes random images in as many tokens whatever the network says, so that networks are compared on the same work."""
        self.make_able(loaded)
        loaded.model.to(device).eval()
        describer = self.timed_describer(loaded)
        draw, side = torch.Generator().manual_seed(config.seed), loaded.sizes.image_size
        images = {
            size: torch.randint(256, (size, 3, side, side), generator=draw, dtype=torch.uint8).to(device) for size in config.batch_sizes
        }

        def describe(size: int) -> object:
            with autocast(device, config.precision):
                return describer(images[size], [""] * size)

        return describe

    def timed_describer(self, loaded: Loaded) -> Describer:
        """Searches as long as there is room, on a prompt of three words of any kind."""
        most = min(4 + TIMED_TOKENS, loaded.sizes.max_positions)
        describer = Describer(loaded, Manner(prompt="", beams=TIMED_BEAMS, min_length=most, max_length=most))
        word = next(token for token in range(len(loaded.tokenizer)) if token not in describer.texts.special)
        describer.prompt += [word] * 3
        return describer

    def bytes_of_timing(self, loaded: Loaded, config: Bench) -> int:
        return held(self.timed_describer(loaded), max(config.batch_sizes))


def held(describer: Describer, images: int) -> int:
    """Bytes held while `images` are described in blocks, beside weights."""
    return max(describer.bytes_of_one, min(room(torch.device("cpu")), images * describer.bytes_of_one))
