"""Embeddings: a student puts images, and if asked sentences, where its teacher puts them; images and sentences are no pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientvlm.checkpoints.store import Store
from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import on_device, stack
from efficientvlm.data.configured import augmentation
from efficientvlm.data.draw import generator, some_of
from efficientvlm.data.kinds.images import IMAGES
from efficientvlm.data.kinds.sentences import SENTENCES
from efficientvlm.data.opening import STREAM, Chosen, ids, origin, usable
from efficientvlm.data.reading import Reading, of_texts
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import augment
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, read_as, texts_of
from efficientvlm.objectives.dime_fm import unfit
from efficientvlm.objectives.embedding import EmbeddingTeacher, Unpaired, first_of, learnt_by_images, width_of
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.teachers import StoredTeacher
from efficientvlm.runtime.progress import counted, say
from efficientvlm.settings.dime_fm import compares_sentences
from efficientvlm.settings.tasks import EmbeddingSettings
from efficientvlm.tasks.task import Beside, Learnt, held_out
from efficientvlm.training.loop import Batch

SENTENCE = "sentences"
EVAL_BATCH = 64
FIRST = 8  # sentences on which student and teacher must agree, where texts are not learnt
ALIKE = 0.98  # their least cosine; stored vectors are rounded
NEAR = 5
AT_ONCE = 65_536  # samples that are looked up
TEXTS = "sentences"
STORED = {"image_store": ("images", "train"), "sentence_store": (TEXTS, SENTENCE)}
"""Role of a store → its side, and the samples that are looked up in it."""


class Embedding(Learnt):
    """A small tower of images in the space of a large network's images and texts; learnt from a teacher alone, without any label."""

    name, kind, needs = "embedding", IMAGES, ("embed",)
    own_losses = False
    grows = ("sentence_batch_size",)

    @property
    def metrics(self) -> dict[str, str]:
        """None without a teacher; a finished network is measured as one for retrieval is."""
        return {}

    def files(self, config: Any) -> dict[str, str | None]:
        return {role: getattr(config, role, None) for role in STORED}

    def stores(self, config: Any) -> dict[str, str]:
        return {role: spec for role, spec in self.files(config).items() if spec}

    def problems(self, config: EmbeddingSettings, student: Loaded) -> Iterator[BadInput]:
        if not getattr(config, "taught", False):
            fix = "give --teacher, or stores of what it says: --set image_store=DIR --set sentence_store=DIR"
            yield BadInput("task embedding has no teacher", "it is learnt from a teacher alone", fix)
        if config.data.startswith(STREAM) and getattr(config, "image_store", None):
            yield BadInput(f"data {config.data}", "samples of a stream are not found in a store", "give its file or folder")
        if config.sentences.startswith(STREAM):
            yield BadInput(f"sentences {config.sentences}", "they are drawn from all there are", "use a file or folder")
        for name in ("batch_size", "sentences_a_step"):
            if getattr(config, name) < 2:
                yield BadInput(f"{name} {getattr(config, name)}", "samples are compared with one another", "use 2 or more")
        if not config.learn_texts and "text" in (getattr(config, "towers", None) or (["text"] if hasattr(config, "sparsity") else [])):
            why = "texts are not learnt, so that gates over their tower would follow nothing"
            yield BadInput("learn_texts false, with the tower of texts to be pruned", why, "leave it out, or give towers=[vision]")

    def beside(self, config: EmbeddingSettings) -> dict[str, Beside]:
        read = {"data": config.sentences, "val": None, "val_fraction": 0.0, "columns": config.sentence_columns}
        own = config.model_copy(update={**read, "limit": config.sentence_limit})
        return {SENTENCE: Beside(SENTENCES, own, config.sentences_a_step)}

    def freeze(self, config: EmbeddingSettings, student: Loaded) -> None:
        """Where texts are not learnt, all that vectors of images do not depend on stays as it is."""
        super().freeze(config, student)
        if config.learn_texts or not self.able(student):
            return
        with torch.device("meta"):
            learnt = learnt_by_images(student.family.build(student.model.config))
        for name, parameter in student.model.named_parameters():
            if name not in learnt:
                parameter.requires_grad_(False)

    def begin(self, config: EmbeddingSettings, student: Loaded, teacher: Loaded | None, sources: Mapping[str, Any]) -> None:
        """:class:`BadInput` where texts are not learnt and the student does not read them as the teacher does."""
        if config.learn_texts:
            return
        items = [sources[SENTENCE][number] for number in range(min(len(sources[SENTENCE]), FIRST))]
        batch = on_device(_said(items, texts_of(student, config.max_tokens)), student.model.device)
        with torch.inference_mode():
            ours, theirs = _texts_of(student, batch), self._asked(config, teacher)[0].sentences(batch)
            least = float(_cosines(ours, theirs).min())
        if not least >= ALIKE:
            why = f"texts are not learnt; its vector of a sentence has a cosine of {least:.2f} with the teacher's, {ALIKE} is the least"
            fix = "make the student with the teacher's tower of texts, or learn texts too: --set learn_texts=true"
            raise BadInput(f"{student.path} does not read sentences as its teacher does", why, fix)

    def fitting(
        self,
        config: Any,
        student: Loaded,
        teacher: Loaded | None,
        digest: str | None,
        stores: Mapping[str, Any],
        sources: dict[str, Any],
        note: Callable[[str], None],
    ) -> dict[str, Any]:
        if not self.able(student) or (teacher and not self.able(teacher)):
            return sources  # said elsewhere
        width, found = width_of(teacher.model) if teacher else None, dict(sources)
        for role, store in stores.items():
            side, split = STORED[role]
            reader = student if side == TEXTS else teacher
            form = read_as(reader, side, config.max_tokens) if reader else None
            for remark in store.check(side=side, width=width, teacher=digest, origin=origin(sources[split]), preprocessing=form):
                note(f"{role}: {remark}")
            if teacher is None:
                for problem in unfit(width_of(student.model), store.width, str(store.path), config):
                    raise problem
            if store.made:
                found[split] = some = known_to(store, sources[split], config.max_missing)
                if isinstance(some, Chosen):
                    note(f"{role}: {some.note}")
        if teacher is None:
            names = [store.teacher[:12] if store.teacher else "one that is not known" for store in stores.values()]
            why = " and ".join(f"{store.path} by {name}" for store, name in zip(stores.values(), names, strict=True))
            if len({store.teacher for store in stores.values()} - {None}) > 1:
                raise BadInput("the stores are of two teachers", why, "embed images and sentences by the same one")
            if not all(store.teacher for store in stores.values()):
                note(f"nobody knows whether the stores are of one teacher: {why}")
        return found

    def taught_by(self, config: Any, teacher: Any, stores: Mapping[str, Any]) -> EmbeddingTeacher:
        return EmbeddingTeacher(teacher, StoredTeacher(*(stores.get(role) for role in STORED)), reads=compares_sentences(config))

    def _asked(self, config: Any, teacher: Loaded | None) -> tuple[EmbeddingTeacher, dict[str, Store]]:
        """What says where samples should lie outside of training: the teacher's network, or where it is not at hand these stores."""
        stores = {} if teacher else {role: Store.open(spec) for role, spec in self.stores(config).items()}
        return self.taught_by(config, teacher and teacher.model, stores), stores

    def objective(self, config: EmbeddingSettings, student: Loaded) -> Objective:
        return Unpaired(student.model, learn_texts=config.learn_texts)

    def reading(self, config: EmbeddingSettings, student: Loaded, sources: dict[str, Any]) -> Reading:
        return of_texts(texts_of(student, config.max_tokens), sources[SENTENCE])

    def batches(self, config: EmbeddingSettings, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        how = augmentation(config)
        mirror = how.pop("mirror")
        draws = [generator(config.seed, step, item.id, "image") for item in items]
        seen = [augment(how["augment_kind"], item.image, draw, flip_ok=mirror).image for item, draw in zip(items, draws, strict=True)]
        return [{"samples": len(items), "pixels": stack(seen), "image_ids": [item.id for item in items]}]

    def completed(
        self,
        config: EmbeddingSettings,
        student: Loaded,
        batches: list[Batch],
        beside: Mapping[str, Sequence[Any]],
        texts: Texts,
        step: int,
    ) -> list[Batch]:
        return [batch | _said(beside[SENTENCE], texts) for batch in batches]

    @torch.inference_mode()
    def validate_on(
        self, config: EmbeddingSettings, student: Loaded, teacher: Loaded | None, sources: Mapping[str, Any], quiet: bool
    ) -> dict[str, Any]:
        """How near vectors of held-out images are to the teacher's, and how often the nearest of some sentences is the same.

        Returns:
            `images`, `sentences`: their numbers; `image_cosine`, `text_cosine`: means of the cosine with the teacher's vector;
            `sentence_agreement`: the part of the images for which student and teacher find the same sentence nearest, each by its own
            vectors; `sentence_in_five`: the part for which the teacher's is among the student's five. Without the teacher's network on the
            images of which there is a vector, and `images_without_vector` counts the others.
        """
        (told, stores), source, texts = self._asked(config, teacher), sources["val"], texts_of(student, config.max_tokens)
        lacking = 0
        if stores and len(source):
            known, lacking = having(source, stores["image_store"])
            if lacking:
                note = f"{lacking:,} of {len(source):,} images have no vector in {stores['image_store'].path} and are left out"
                say(f"validate: {note}", quiet=quiet)
                source = Chosen(source, known, note)
        without = {"images_without_vector": lacking} if lacking else {}
        if not lacking or len(source):
            source = held_out(source, config.eval_limit, "validate", quiet)
        if not len(source):
            return {"images": 0, **without}
        device, size = student.model.eval().device, config.eval_batch_size or EVAL_BATCH
        among = some_of(len(sources[SENTENCE]), config.eval_sentences)
        read: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(among), size):
            items = usable(sources[SENTENCE], among[start : start + size])
            if stores and items:
                there = stores["sentence_store"].has([item.id for item in items])
                items = [item for item, known in zip(items, there, strict=True) if known]
            batch = on_device(_said(items, texts), device)
            read += [(_texts_of(student, batch), told.sentences(batch))] if items else []
        seen: list[tuple[Tensor, Tensor]] = []
        starts = range(0, len(source), size)
        for _, items in zip(counted(starts, "validate", len(source), quiet), usable_batches(source, starts, len(source)), strict=True):
            if items:
                batch = on_device({"pixels": stack([item.image for item in items]), "image_ids": [item.id for item in items]}, device)
                seen.append((student.model.embed_images(batch["pixels"])[1], told.images(batch)))
        vectors = ([torch.cat(side).float().cpu() for side in zip(*both, strict=True)] for both in (seen, read))
        return compared(*vectors) | without


def having(source: Any, store: Any) -> tuple[NDArray[np.int64], int]:
    """The numbers of the samples that a store has a vector of, in order, and of how many it has none; what cannot be used is neither."""
    names, parts, begin, lacking = ids(source), [np.zeros(0, np.int64)], 0, 0
    while some := list(islice(names, AT_ONCE)):
        there, usable = store.has([name or "" for name in some]), np.array([name is not None for name in some])
        parts.append(begin + np.flatnonzero(usable & there))
        lacking += int((usable & ~there).sum())
        begin += len(some)
    return np.concatenate(parts), lacking


def known_to(store: Any, source: Any, most: float) -> Any:
    """`source`, without the samples that a store lacks.

    Raises:
        BadInput: they are more than the part `most` of all.
    """
    (known, lacking), count = having(source, store), len(source)
    if not lacking:
        return source
    if lacking > most * count or not len(known):
        share, fix = lacking / count, "embed these data"
        if len(known):
            fix += f", or allow it with --set max_missing={min(1.0, math.ceil(100 * share) / 100):g}"
        what = f"{store.path} has no vector of {lacking:,} of {count:,} samples of {source.name}"
        raise BadInput(what, f"that is {share:.2%}, at most {most:.2%} may be left out", fix)
    return Chosen(source, known, f"{lacking:,} of {count:,} samples have no vector in {store.path} and are left out")


def compared(images: Sequence[Tensor], texts: Sequence[Tensor]) -> dict[str, Any]:
    """The metrics of :meth:`Embedding.validate_on`, of the student's and the teacher's vectors of images and of sentences."""
    found: dict[str, Any] = {"images": len(images[0]) if images else 0, "sentences": len(texts[0]) if texts else 0}
    found |= {f"{name}_cosine": float(_cosines(*both).mean()) for name, both in (("image", images), ("text", texts)) if both}
    if images and texts:
        ours, theirs = (image @ text.T for image, text in zip(images, texts, strict=True))
        nearest = theirs.argmax(1)
        found["sentence_agreement"] = float((ours.argmax(1) == nearest).float().mean())
        five = ours.topk(min(NEAR, ours.shape[1])).indices
        found["sentence_in_five"] = float((five == nearest[:, None]).any(1).float().mean())
    return found


def _cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """[N] of the student's vectors with the teacher's, or with the first numbers of longer ones."""
    return (ours.float() * first_of(theirs.float(), ours.shape[-1])).sum(-1)


def _said(items: Sequence[Any], texts: Texts) -> Batch:
    ids, mask = texts.batch([item.text for item in items])
    return {"text_ids": ids, "text_mask": mask, "sentence_ids": [item.id for item in items]}


def _texts_of(student: Loaded, batch: Batch) -> Tensor:
    vectors: Tensor = student.model.embed_texts(batch["text_ids"], batch["text_mask"])[1]
    return vectors
