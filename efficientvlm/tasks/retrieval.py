"""Image-text retrieval: contrast and matching are learnt, recall is measured, pictures and texts are searched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch

from efficientvlm.data.configured import augmentation
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.data.reading import counts_of, of_read
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.families.network import refusal, require
from efficientvlm.loaded import Loaded, longest, texts_of
from efficientvlm.objectives.blip_pretraining import BlipPretraining
from efficientvlm.objectives.contrastive import Contrastive
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.xvlm_pretraining import XvlmPretraining
from efficientvlm.runtime.progress import Bar, say
from efficientvlm.settings.tasks import RetrievalEval, RetrievalQuestion, RetrievalSettings
from efficientvlm.tasks.choices import Choice, margin, pictures
from efficientvlm.tasks.contrasting import averaged, contrast_of, contrast_problems, elements_beside
from efficientvlm.tasks.galleries import Pictures
from efficientvlm.tasks.influence import Influence, of_pairs
from efficientvlm.tasks.recall import encode, evaluate, unmoved
from efficientvlm.tasks.remembered import bytes_of_features
from efficientvlm.tasks.search import search
from efficientvlm.tasks.task import Asked, Learnt, held_out
from efficientvlm.training.loop import Batch

EVAL_BATCH = 64
SAMPLE = 1000  # texts that say how long texts are
TOKENS = 6  # of a random text
CONTRAST = "mean_recall: recall at 1, 5 and 10 of captions by images and of images by captions, among all of them, by cosine; their mean"
RERANKED = f"{CONTRAST}; reranked_...: those of them that change with the best candidates of a query in the order of "
ORDERED_BY = {"matching": "their matching logits", "sum": "the sum of matching logit and cosine"}


class Retrieval(Learnt, Asked):
    """Images found by texts and texts by images; learnt with hard negatives by default (X-VLM), on one caption an image and step."""

    name, kind, needs = "retrieval", PAIRS, ("embed",)
    also = ("itm_accuracy", "itm_preferred")

    def problems(self, config: RetrievalSettings, student: Loaded) -> Iterator[BadInput]:
        if config.batch_size < 2:
            yield BadInput("batch_size 1", "matching needs another pair as negative", "use 2 or more")
        if "align" in student.abilities:
            if config.momentum or config.queue:
                yield BadInput("momentum and queue", f"{student.path} contrasts the pairs of a batch alone", "leave them out")
        else:
            yield from contrast_problems(config, student)

    def teacher_problems(self, config: RetrievalSettings, teacher: Loaded) -> Iterator[BadInput]:
        yield from super().teacher_problems(config, teacher)
        if self.able(teacher) and not teacher.abilities & {"match", "align"}:
            yield refusal(teacher.config, "match", f"teacher {teacher.path}")

    def adapt(self, config: RetrievalSettings, student: Loaded, teacher: Loaded | None) -> tuple[Any, list[str]]:
        """Heads of other tasks are left behind; where a network of another task may learn this, what it takes is added.

        One that is trained by contrast alone stays as it is.
        """
        if "align" in student.abilities:
            return student.model, []
        if not self.able(student) and not self.remedy(student):
            raise self.refusal(student)
        network, new = student.model.gain("match")
        if "contrast" not in network.config.abilities():
            require(network, "pretrain")
        return network, new

    def remedy(self, loaded: Loaded) -> str:
        return f"finetune it with --task {self.name} first" if "match" in getattr(loaded.model.config, "gains", ()) else ""

    def changes(self, added: int) -> str:
        what = "heads of other tasks are left behind" if added <= 0 else "a text encoder takes the place of a decoder, and heads are added"
        return f"{what}: {added:+,} parameters"

    def objective_on(self, config: RetrievalSettings, student: Loaded, source: Any) -> Objective:
        """By what the network can do: contrast alone (CLIP, SigLIP), BLIP's losses, whose negatives are drawn without an offset in
        retrieval, or X-VLM's."""
        if "align" in student.abilities:
            return Contrastive(student.model)
        contrast = contrast_of(config, student, source)
        common: dict[str, Any] = {"losses": ("itc", "itm"), "hard_negatives": config.hard_negatives, "contrast": contrast}
        if "contrast" in student.abilities:
            return BlipPretraining(student.model, seed=config.seed, negatives=config.negatives_over, online=True, **common)
        return XvlmPretraining(student.model, seed=config.seed, **common)

    def notes(self, config: RetrievalSettings, student: Loaded, source: Any) -> dict[str, Any]:
        made = None if "align" in student.abilities else averaged(config, student, source)
        return {"contrast": made._asdict()} if made else {}

    def elements_beside(self, config: RetrievalSettings, student: Loaded, source: Any) -> int:
        return 0 if "align" in student.abilities else elements_beside(config, student, source)

    def batches(self, config: RetrievalSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        return [pair_batch(items, texts, seed=config.seed, step=step, **augmentation(config), task=True)]

    def validate(self, config: RetrievalSettings, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        size = config.eval_batch_size or EVAL_BATCH
        return evaluate_pairs(student, source, limit=config.eval_limit, title="validate", quiet=quiet, batch_size=size)

    def influence(self, config: RetrievalSettings, student: Loaded, source: Any) -> Influence:
        return of_pairs(student, source, config.eval_batch_size)

    def check(self, config: RetrievalEval, loaded: Loaded) -> None:
        super().check(config, loaded)
        check_rerank(config.rerank, loaded)

    def evaluate(self, config: RetrievalEval, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        """Every image of `source` looked for by its captions, and the other way round: `metric`, `mode`, `rerank`, `seed`, `metrics`."""
        if not len(source):
            raise BadInput(f"{config.data} has no images", f"split {config.split} of {source.name}", "use another --split")
        shown: dict[str, Any] = {"title": title, "quiet": quiet}
        by = config.rerank_by or loaded.model.config.rerank_by
        how: dict[str, Any] = {"batch_size": config.batch_size, "rerank": config.rerank, "rerank_by": by, "seed": config.seed}
        measured = evaluate_pairs(loaded, source, limit=None, **how, **shown)
        return {
            "metric": RERANKED + ORDERED_BY[by] if config.rerank else CONTRAST,
            "mode": "rerank" if config.rerank else "contrast",
            "rerank": config.rerank,
            **({"rerank_by": by} if config.rerank and by != "matching" else {}),
            "seed": config.seed,
            "influence": of_pairs(loaded, source, config.batch_size),
            "metrics": measured,
        }

    def measure(self, loaded: Loaded, source: Any, *, batch_size: int, seed: int, title: str, quiet: bool) -> dict[str, Any]:
        return evaluate_pairs(loaded, source, limit=None, batch_size=batch_size, seed=seed, title=title, quiet=quiet)

    @torch.inference_mode()
    def choices(self, loaded: Loaded, source: Any, count: int, seed: int) -> list[Choice]:
        """Which text is nearest to each picture, and whether the network that matches finds it fit; of captions, or of random tokens."""
        model, texts = loaded.model.eval(), texts_of(loaded)
        pixels, items = pictures(loaded, source, count, seed)
        if captions := list(dict.fromkeys(text for item in items for text in item.captions)):
            ids, mask = texts.batch(captions)
        else:
            words = torch.tensor([token for token in range(len(texts.tokenizer)) if token not in texts.special])
            ids = words[torch.randint(len(words), (count, TOKENS), generator=torch.Generator().manual_seed(seed))]
            ids[:, 0], ids[:, -1], mask = texts.start, texts.sep, torch.ones_like(ids)
        ids, mask = ids.to(model.device), mask.to(model.device)
        seen, image = model.embed_images(pixels.to(model.device))
        read, text = model.embed_texts(ids, mask)
        scores = (image.float() @ text.float().T).cpu()
        best, margins = scores.argmax(1), margin(scores)
        said = [f"text {number}" for number in best.tolist()]
        if "match" in loaded.abilities:
            fits = model.match(seen, torch.arange(len(best), device=ids.device), read[best], mask[best]).cpu()
            said = [f"{what}: {'yes' if yes else 'no'}" for what, yes in zip(said, fits.argmax(1).tolist(), strict=True)]
            margins = torch.minimum(margins, margin(fits))
        return [Choice(what, gap) for what, gap in zip(said, margins.tolist(), strict=True)]

    def bytes_of_measuring(self, config: RetrievalEval, loaded: Loaded, source: Any) -> int:
        """Of comparing all images and their captions."""
        tokens = longest(loaded, list(islice(source.texts(), SAMPLE)), 40)
        size, most = Footprint.of(loaded.config), room(torch.device("cpu"))
        held = min(most, len(source) * size.seen)
        block = min(most, config.batch_size * max(size.encoding, size.seen + size.question(tokens)))
        return 2 * config.batch_size * 3 * loaded.sizes.image_size**2 + held + block

    def bytes_of_cached_teacher(self, config: RetrievalSettings, teacher: Loaded, source: Any, images_seen: int) -> int:
        return bytes_of_features(teacher, source, images_seen)

    def exported(self, loaded: Loaded) -> dict[str, Any]:
        return {"rerank_by": loaded.model.config.rerank_by}

    def ask(self, config: RetrievalQuestion, loaded: Loaded) -> dict[str, Any]:
        """`answers`, see :func:`tasks.search.search`.

        Raises:
            BadInput: no picture that can be read, no text, `rerank` of a network that does not match, an `out` that cannot be written.
        """
        check_rerank(config.rerank or 0, loaded)
        return search(config, loaded)


def check_rerank(rerank: int, loaded: Loaded) -> None:
    """:class:`BadInput` where candidates are to be matched by a network that cannot."""
    if rerank and "match" not in loaded.abilities:
        why = f"{loaded.path} compares images and texts by their features alone"
        raise BadInput(f"rerank {rerank}", why, "leave it out, or use a model that matches, an X-VLM or a BLIP")


def evaluate_pairs(
    loaded: Loaded,
    source: Any,
    *,
    limit: int | None,
    title: str,
    quiet: bool,
    batch_size: int = EVAL_BATCH,
    rerank: int = 0,
    rerank_by: str = "matching",
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of :func:`tasks.recall.evaluate` over the images of `source`, or `limit` drawn from it, and their captions."""
    source = held_out(source, limit, title, quiet)
    count = len(source)
    if not count:
        return {"images": 0}
    model, texts = loaded.model.eval(), texts_of(loaded)
    pictures = Pictures(source, count, batch_size)
    shown: dict[str, Any] = {"title": title, "quiet": quiet}
    with Bar(title, count, quiet=quiet) as bar:
        batches, tokens = pictures.batches(bar.update), partial(Texts.batch, texts)
        gallery = encode(model, batches, tokens, batch_size, count, again=pictures, **shown)
    result = evaluate(model, gallery, batch_size=batch_size, rerank=rerank, rerank_by=rerank_by, seed=seed, **shown)
    if rerank and (same := sorted(unmoved(gallery, rerank) - {"mean_recall"})):
        say(f"{title}: rerank {rerank} cannot change {', '.join(same)}, which are left out with their mean", quiet=quiet)
    if rerank > (most := max(len(gallery.image), len(gallery.said))):
        say(f"{title}: rerank {rerank} is more than all {most:,} candidates, which are ranked", quiet=quiet)
    for remark in of_read(texts):
        say(f"{title}: {remark}", quiet=quiet)
    return {**result, "reading": counts_of(texts)}
