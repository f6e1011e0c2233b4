"""Whether what a model says depends on its inputs: the same samples once more with one input taken from other samples (ours).

An input has no influence when every output is then equal to the last bit. That is measured, not concluded: it holds for ONNX graphs too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints import influence
from efficientvlm.data.batch import stack
from efficientvlm.data.opening import usable
from efficientvlm.errors import Diverged
from efficientvlm.families.weights import finite
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.runtime.progress import say
from efficientvlm.training.loop import Batch

SAMPLES = 32
PICTURES = {"pixels": "left image", "second_pixels": "right image"}
"""What each is of a network that reads two; one alone is the image."""
TEXTS = ("text_ids", "question_ids")
Influence = dict[str, Any]
Run = Callable[[Batch], tuple[dict[str, Tensor], Sequence[str]]]


def of_pairs(loaded: Loaded, source: Any, batch_size: int | None = None) -> Influence:
    """What picture and caption do to features and to matching, for the first images of `source` and one caption of each."""
    items = [item for item in first_of(source) if item.captions]
    if len(items) < 2:
        return not_measured(f"there are {len(items)} images with captions, and 2 are needed")
    captions = [item.captions[number % len(item.captions)] for number, item in enumerate(items)]
    return of_texts(loaded, [item.image for item in items], captions, batch_size)


def of_texts(loaded: Loaded, images: Sequence[Any], texts: Sequence[str], batch_size: int | None = None) -> Influence:
    """What picture and text do to features and to matching, for `images` and a text of each; two at least."""
    device = loaded.model.device
    ids, mask = texts_of(loaded).batch(texts)
    pixels = stack(images)
    batch = {"pixels": pixels.to(device), "text_ids": ids.to(device), "text_mask": mask.to(device)}
    return _of_comparison(loaded, batch, batch_size)


def of_images(loaded: Loaded, images: Sequence[Any], batch_size: int | None = None) -> Influence:
    """What the picture does to its features, for `images`, two at least."""

    def run(batch: Batch) -> tuple[dict[str, Tensor], list[str]]:
        return {"itc": loaded.model.embed_images(batch["pixels"])[1]}, []

    return measure(run, {"pixels": stack(images).to(loaded.model.device)}, {"image": ("pixels",)}, batch_size)


def of_anything(loaded: Loaded) -> Influence:
    """The same without data: what random pictures and tokens do to the outputs, for a network of any task."""
    model, sizes = loaded.model, loaded.sizes
    draw = torch.Generator().manual_seed(0)
    batch = model.example(SAMPLES, sizes.usual_text)
    if not draw_inputs(loaded, batch, draw):
        return not_measured("the tokenizer has no words")
    pictures = {what: name for name, what in PICTURES.items() if name in batch}
    ids = next(name for name in TEXTS if name in batch)
    if "embed" in model.config.abilities():
        mask = ids.removesuffix("ids") + "mask"
        found = _of_comparison(loaded, {"pixels": batch["pixels"], "text_ids": batch[ids], "text_mask": batch[mask]})
    else:
        text = tuple(name for name in batch if name.startswith(ids.removesuffix("ids")))

        def run(batch: Batch) -> tuple[dict[str, Tensor], list[str]]:
            record = model.run(batch)
            output = "logits" if "logits" in record else "states"
            return {output: record[output]}, []

        seen = {what if len(pictures) > 1 else "image": (name,) for what, name in pictures.items()}
        found = measure(run, batch, {**seen, "text": text})
    return {"inputs_drawn_at_random": True, **found}


def draw_inputs(loaded: Loaded, batch: Batch, draw: torch.Generator) -> bool:
    """Put random pixels and words into a batch of a network's `example`; False, with its tokens as they were, where there are no words.

    The first and the last token stay: a network may look for them, and they come nowhere else.
    """
    for name in (name for name in PICTURES if name in batch):
        batch[name] = torch.randint(0, 256, batch[name].shape, dtype=torch.uint8, generator=draw).to(batch[name].device)
    name = next(name for name in TEXTS if name in batch)
    ids = batch[name].clone()
    special = {*loaded.tokenizer.all_special_ids, int(ids[0, 0]), int(ids[0, -1])}
    words = torch.tensor([token for token in range(len(loaded.tokenizer)) if token not in special])
    if len(words) and ids.shape[1] > 2:
        ids[:, 1:-1] = words[torch.randint(0, len(words), ids[:, 1:-1].shape, generator=draw)].to(ids.device)
        batch[name] = ids
    return bool(len(words))


def _of_comparison(loaded: Loaded, batch: Batch, batch_size: int | None = None) -> Influence:
    model = loaded.model

    def run(batch: Batch) -> tuple[dict[str, Tensor], list[str]]:
        images, image = model.embed_images(batch["pixels"])
        texts, text = model.embed_texts(batch["text_ids"], batch["text_mask"])
        outputs = {"itc": torch.cat([image, text], 1)}
        if "match" in model.config.abilities():
            rows = torch.arange(len(images), device=images.device)
            outputs["itm"] = model.match(images, rows, texts, batch["text_mask"])
        if "caption" in model.config.abilities():
            outputs["caption"] = model.decode(model.look(batch["pixels"]), batch["text_ids"], batch["text_mask"])
        return outputs, []

    return measure(run, batch, {"image": ("pixels",), "text": ("text_ids", "text_mask")}, batch_size)


@torch.inference_mode()
def measure(run: Run, batch: Batch, inputs: Mapping[str, tuple[str, ...]], batch_size: int | None = None) -> Influence:
    """The part of the samples of which an output changes with an input, JSON-ready.

    Args:
        run: a batch to tensors [N, ...] by output, and what the model says of each sample, if it says something.
        batch: tensors [N, ...].
        inputs: input → entries of the batch that are it; each sample gets those of the next one that has others.
        batch_size: samples at a time, by default all.

    Returns:
        `samples`; `inputs`: input → `outputs`, by output the part of the samples of which some bit is another, and `said`, the part that is
        answered otherwise, where answers are given; or `not_measured`, why that could not be found out.

    Raises:
        Diverged: outputs are NaN or infinite.
    """
    count = len(next(iter(batch.values())))
    parts = torch.arange(count).split(batch_size or count)
    before = [run(_rows(batch, rows)) for rows in parts]
    found: dict[str, Any] = {}
    for name, entries in inputs.items():
        others = _others([b"".join(batch[entry][row].cpu().numpy().tobytes() for entry in entries) for row in range(count)])
        if others is None:
            found[name] = {"not_measured": "all samples have the same"}
            continue
        changed = {**batch, **{entry: batch[entry][others] for entry in entries}}
        after = [run(_rows(changed, rows)) for rows in parts]
        pairs = list(zip(before, after, strict=True))
        outputs = [part for old, new in pairs for part in (old[0], new[0])]
        if wrong := sorted({output for part in outputs for output, value in part.items() if not finite(value)}):
            what = f"of some samples {' and '.join(wrong)} are no finite numbers"
            raise Diverged(what, "the network overflows, though its weights are finite", "train it with a smaller --lr, in fp32, or anew")
        moved = {output: [(old[0][output] != new[0][output]).flatten(1).any(1) for old, new in pairs] for output in before[0][0]}
        found[name] = {"outputs": {output: _part(torch.cat(hits)) for output, hits in moved.items()}}
        if before[0][1]:
            said = [one != other for old, new in pairs for one, other in zip(old[1], new[1], strict=True)]
            found[name]["said"] = _part(torch.tensor(said))
    return {"samples": count, "inputs": found}


def not_measured(why: str) -> Influence:
    """What stands in the place of a measurement that could not be made."""
    return {"not_measured": why}


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return {name: value[rows.to(value.device)] for name, value in batch.items()}


def first_of(source: Any) -> list[Any]:
    """The first samples of a source that can be read, as many as are looked at."""
    return usable(source, range(min(len(source), SAMPLES)))


def _others(contents: Sequence[bytes]) -> list[int] | None:
    """For each row the next one, in a circle, with other contents; None where all are alike."""
    if len(set(contents)) < 2:
        return None
    count = len(contents)
    return [next(at % count for at in range(row + 1, row + count) if contents[at % count] != contents[row]) for row in range(count)]


def _part(hits: Tensor) -> float:
    return float(hits.cpu().double().mean())


def tell(title: str, found: Influence, quiet: bool) -> None:
    """Say what has no influence, also to who wants no progress; what was not measured; and what changes no answer."""
    record = influence.read(influence.Influence, found)
    for line in influence.problems(record, None):
        say(f"WARNING: {title}: {line}")
    for line in influence.notes(record, None):
        say(f"{title}: {line}", quiet=quiet)
