"""Captions as text, and their metrics: what every stage that describes images uses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.checkpoints.files import check_writable, open_plain, result_path, unwritable, write_atomic
from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import uniform
from efficientvlm.data.kinds.pairs import PairItem, caption_batch
from efficientvlm.data.reading import Reading
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.families.network import refusal
from efficientvlm.families.towers.decoding import LengthRule, Rules, beam, continued, drawn, likeliest, stepping
from efficientvlm.loaded import Loaded, decoded, texts_of
from efficientvlm.runtime.progress import counted, say
from efficientvlm.settings.tasks import LONGEST, OF_DECODING, PROMPT, SHORTEST
from efficientvlm.tasks import caption_metrics
from efficientvlm.tasks.caption_metrics import Tokenization
from efficientvlm.tasks.choices import Choice, Likeliest
from efficientvlm.tasks.influence import Influence, first_of, measure, not_measured
from efficientvlm.training.loop import Batch

EVAL_BATCH = 64
SAMPLE = 10_000  # captions whose length is looked at
SHARE = 0.05  # of longer captions: more are said
LOOKED_AT = 1 << 20  # bytes of a first line
INFLUENCE = {"image": ("pixels",)}, {"text": ("text_ids", "text_mask")}


@dataclass(frozen=True)
class Manner:
    """How captions are written. Lengths count the first token and the prompt, and not the end."""

    prompt: str = PROMPT
    decoding: str = "beam"
    beams: int = 3
    min_length: int = SHORTEST
    max_length: int = LONGEST
    length_rule: LengthRule = "published"
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, loaded: Loaded, config: Any = None) -> Self:
        """As `config` says, what it leaves open as the network was tuned."""
        shortest, longest = loaded.config.caption_tokens or (SHORTEST, LONGEST)
        prompt = PROMPT if loaded.config.prompt is None else loaded.config.prompt
        usual = {"prompt": prompt, "min_length": shortest, "max_length": longest}
        asked = {name: getattr(config, name, None) for name in cls.__dataclass_fields__}
        return cls(**{**usual, **{name: value for name, value in asked.items() if value is not None}})

    @property
    def said(self) -> dict[str, Any]:
        """What a result says of it: only what has a meaning with this kind of decoding."""
        own = (*OF_DECODING.get(self.decoding, ()), *(["seed"] if self.decoding == "sample" else []))
        return {name: getattr(self, name) for name in ("prompt", "decoding", "min_length", "max_length", "repetition_penalty", *own)}


@dataclass
class Describer:
    """Captions as text. :class:`BadInput` for a network that describes nothing, or lengths that it cannot write."""

    loaded: Loaded
    manner: Manner
    texts: Texts = field(init=False)
    prompt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        if "caption" not in self.loaded.abilities:
            raise refusal(self.loaded.config, "caption", str(self.loaded.path), fix=remedy(self.loaded))
        self.texts = texts_of(self.loaded)
        self.prompt = [self.texts.start, *prompt_of(self.texts, self.manner.prompt)]
        most, positions = self.manner.max_length, self.loaded.sizes.max_positions
        if most > positions:
            raise BadInput(f"max_length {most}", f"{self.loaded.path} has {positions} positions for tokens", f"use at most {positions}")
        if most <= len(self.prompt):
            why = f"the first token and the prompt {self.manner.prompt!r} are {len(self.prompt)} tokens, and nothing could follow"
            raise BadInput(f"max_length {most}", why, f"use more than {len(self.prompt)}, or another prompt")
        if self.manner.min_length > most:
            why = f"captions have at most {most} tokens"
            raise BadInput(f"min_length {self.manner.min_length}", why, "give min_length and max_length together")

    @property
    def rules(self) -> Rules:
        given, sep = len(self.prompt), self.texts.sep
        least = max(0, self.manner.min_length - given)
        return Rules(sep, sep, self.manner.max_length - given, least, self.manner.repetition_penalty)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, keys: Sequence[str]) -> list[str]:
        """A caption of each image [I, 3, H, W]; `keys` name the images, so that what is drawn does not depend on those beside them.

        The work is done in blocks that the device has room for, whose results do not depend on one another.
        """
        device, size = self.loaded.model.device, self.at_once
        found = []
        for start in range(0, len(pixels), size):
            some = slice(start, start + size)
            found += self._described(pixels[some].to(device), keys[some])
        return found

    @property
    def at_once(self) -> int:
        """Images of a block."""
        return max(1, room(self.loaded.model.device) // self.bytes_of_one)

    @property
    def bytes_of_one(self) -> int:
        """Held for one image that is described."""
        size = Footprint.of(self.loaded.config)
        return size.image + (self.manner.beams if self.manner.decoding == "beam" else 1) * size.writing(self.manner.max_length)

    def _described(self, pixels: Tensor, keys: Sequence[str]) -> list[str]:
        model, manner, rules = self.loaded.model, self.manner, self.rules
        given = torch.tensor([self.prompt], device=pixels.device).expand(len(pixels), -1)
        step = stepping(model, model.look(pixels))
        if manner.decoding == "beam" and manner.beams > 1:
            rule: dict[str, Any] = {"length_rule": manner.length_rule, "length_penalty": manner.length_penalty}
            ids = beam(step, given, rules, manner.beams, **rule).ids[:, 0]
        elif manner.decoding == "sample":
            chances: dict[str, Any] = {"top_k": manner.top_k, "top_p": manner.top_p, "temperature": manner.temperature}
            ids = continued(step, given, rules, drawn(uniform(keys, rules.most, manner.seed, "caption"), **chances))
        else:
            ids = continued(step, given, rules, likeliest)
        return [self.said(row) for row in ids.tolist()]

    @torch.inference_mode()
    def greedy(self, pixels: Tensor) -> list[Choice]:
        """A caption of each image [I, 3, H, W], each token the likeliest, whatever the manner says of it."""
        pixels = pixels.to(self.loaded.model.device)
        given = torch.tensor([self.prompt], device=pixels.device).expand(len(pixels), -1)
        choose = Likeliest(self.texts.sep)
        ids = continued(stepping(self.loaded.model, self.loaded.model.look(pixels)), given, self.rules, choose)
        return [Choice(self.said(row), margin) for row, margin in zip(ids.tolist(), choose.margins.tolist(), strict=True)]

    def said(self, ids: list[int]) -> str:
        """Tokens as text."""
        return decoded(self.loaded, self.texts, ids)


def prompt_of(texts: Texts, prompt: str) -> list[int]:
    """The tokens of a prompt, which stand in front of a caption's own."""
    return texts.ids([prompt])[0] if prompt else []


def remedy(loaded: Loaded) -> str:
    """How a model that describes nothing comes to do so; empty where it never will."""
    config = loaded.model.config
    heads, gains = getattr(config, "heads", None), getattr(config, "gains", ())
    if heads is None and "caption" not in gains:
        return ""
    what = "finetune it" if heads is None or "mlm" in heads else "finetune the pre-trained model it comes from"
    return f"{what} with --task captioning first"


def of_prompt(texts: Texts, prompt: str) -> Reading:
    """Whether the tokenizer can read the prompt."""
    lost = prompt_of(texts, prompt).count(texts.unknown) if texts.unknown is not None else 0
    remark = f"{lost} of the tokens of the prompt {prompt!r} are unknown to the tokenizer; --set prompt=... gives another one, or none"
    return Reading({"unknown_prompt_tokens": lost}, [remark] * bool(lost))


def of_lengths(texts: Texts, source: Any, most: int) -> Reading:
    """Captions of `source` that are longer than what is written: `most` tokens, the end counted."""
    lengths = [len(ids) + 1 for ids in Texts(texts.tokenizer).ids(list(islice(source.texts(), SAMPLE)))]
    longer = sum(length > most for length in lengths)
    what = f"{longer:,} of {len(lengths):,} texts have more than the {most} tokens that are written behind the prompt"
    remark = f"{what} (up to {max(lengths, default=0)}); max_length sets how long captions become"
    return Reading({"texts_longer_than_captions": longer}, [remark] * (longer > SHARE * len(lengths)))


@dataclass
class Said:
    """What was said of images: keys of the images, captions and references."""

    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)

    def metrics(self, tokenization: Tokenization, title: str, quiet: bool) -> dict[str, Any]:
        """CIDEr-D with its standard error, BLEU and ROUGE-L, the number of images and the distinct captions among them."""
        if not self.captions:
            return {"images": 0}
        for remark in caption_metrics.remarks(self.captions, self.references):
            say(f"{title}: {remark}", quiet=quiet)
        found = caption_metrics.scores(self.captions, self.references, tokenization)
        counts = {"images": len(self.captions), "distinct_captions": len(set(self.captions))}
        error = found.standard_error("cider_d")
        return {**counts, **found.corpus, **({} if error is None else {"standard_errors": {"cider_d": error}})}

    def rows(self) -> Iterator[dict[str, Any]]:
        for key, caption, references in zip(self.keys, self.captions, self.references, strict=True):
            yield {"image": key, "caption": caption, "references": references}


def batches(source: Any, batch_size: int, title: str, quiet: bool) -> Iterator[list[PairItem]]:
    """All images of `source` that have captions, in order, with progress; those that cannot be read are left out."""
    starts = range(0, len(source), batch_size)
    for _, found in zip(counted(starts, title, len(source), quiet), usable_batches(source, starts, len(source)), strict=True):
        if items := [item for item in found if item.captions]:
            yield items


def describe(describer: Describer, source: Any, batch_size: int, title: str, quiet: bool) -> Said:
    """What is said of every image of `source`."""
    said = Said()
    describer.loaded.model.eval()
    for items in batches(source, batch_size, title, quiet):
        batch = caption_batch(items, describer.texts, seed=0, step=0)
        said.keys += batch["item_ids"]
        said.captions += describer(batch["pixels"], batch["item_ids"])
        said.references += batch["references"]
    return said


def of_captions(describer: Describer, source: Any, batch_size: int | None = None) -> Influence:
    """What an image does to a caption and to the scores of its words, and what the words before do to those scores."""
    items = [item for item in first_of(source) if item.captions]
    if len(items) < 2:
        return not_measured(f"there are {len(items)} images with captions, and 2 are needed")
    model, texts, manner = describer.loaded.model, describer.texts, describer.manner
    device = model.device
    chosen = [PairItem(item.id, item.image, [item.captions[number % len(item.captions)]]) for number, item in enumerate(items)]
    whole = caption_batch(chosen, texts, seed=0, step=0, prompt=manner.prompt)
    batch = {name: whole[name].to(device) for name in ("pixels", "text_ids", "text_mask")}
    rows = [str(number) for number in range(len(items))]

    def scores(batch: Batch) -> dict[str, Tensor]:
        return {"caption": model.decode(model.look(batch["pixels"]), batch["text_ids"], batch["text_mask"], None, model.new_cache())}

    images = measure(lambda part: (scores(part), describer(part["pixels"], rows[: len(part["pixels"])])), batch, INFLUENCE[0], batch_size)
    words = measure(lambda part: (scores(part), []), batch, INFLUENCE[1], batch_size)
    return {**images, "inputs": {**images["inputs"], **words["inputs"]}}


@torch.inference_mode()
def mean_loss(loaded: Loaded, source: Any, batch_size: int, quiet: bool, *, prompt: str, plain_captions: bool = False) -> float | None:
    """Mean cross-entropy of a token of all captions of `source`, as it is without smoothing; None where there is none."""
    model, texts = loaded.model.eval(), texts_of(loaded)
    total, tokens = 0.0, 0
    for items in batches(source, batch_size, "validation loss", quiet):
        batch = caption_batch(items, texts, seed=0, step=0, prompt=prompt, plain_captions=plain_captions)
        some = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
        logits, target = model.run(some)["logits"].float(), some["target_mask"][:, 1:].bool()
        total += float(F.cross_entropy(logits[:, :-1][target], some["text_ids"][:, 1:][target], reduction="sum"))
        tokens += int(target.sum())
    return total / tokens if tokens else None


def captions_file(path: str, *beside: str) -> Path:
    """The JSONL file that captions are written to: none yet, or one that such captions lie in, with what stands `beside` each.

    Raises:
        BadInput: it is another file, such as data with captions where references stand beside, or it cannot be read or written.
    """
    file, keys = result_path(path, "captions.jsonl"), {"image", "caption", *beside}
    if os.path.lexists(file):
        with open_plain(file) as opened:
            first = opened.readline(LOOKED_AT)
        try:
            row = json.loads(first) if first.strip() else dict.fromkeys(keys)
        except (ValueError, RecursionError):
            row = None
        if not (isinstance(row, dict) and keys <= row.keys()):
            raise BadInput(f"{file} is no file of captions", "it holds something else", "remove it, or give another file")
    check_writable(file)
    return file


def write_captions(path: Path, rows: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line, all of them or none; :class:`BadInput` where the system refuses it."""
    lines = [json.dumps(dict(row), ensure_ascii=False) for row in rows]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise unwritable(path, error) from None
