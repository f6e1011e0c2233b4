"""Embeddings: a student puts images, and if asked sentences, where its teacher puts them; images and sentences are no pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints.store import Store
from efficientvlm.data.ahead import usable_batches
from efficientvlm.data.batch import on_device, stack
from efficientvlm.data.configured import augmentation
from efficientvlm.data.draw import generator, some_of
from efficientvlm.data.kinds.images import IMAGES
from efficientvlm.data.kinds.sentences import SENTENCES
from efficientvlm.data.opening import STREAM, origin, usable
from efficientvlm.data.reading import Reading, of_texts
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import augment
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, read_as, texts_of
from efficientvlm.objectives.embedding import EmbeddingTeacher, Unpaired, first_of, learnt_by_images
from efficientvlm.objectives.objective import Objective
from efficientvlm.runtime.progress import counted
from efficientvlm.settings.tasks import EmbeddingSettings
from efficientvlm.tasks.task import Beside, Learnt, held_out
from efficientvlm.training.loop import Batch

SENTENCE = "sentences"
EVAL_BATCH = 64
FIRST = 8  # sentences on which student and teacher must agree, where texts are not learnt
ALIKE = 0.98  # their least cosine; stored vectors are rounded
NEAR = 5


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
        return {name: getattr(config, name, None) for name in ("image_store", "sentence_store")}

    def problems(self, config: EmbeddingSettings, student: Loaded) -> Iterator[BadInput]:
        if not getattr(config, "teacher", None):
            yield BadInput("task embedding has no teacher", "it is learnt from a teacher alone", "give --teacher")
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
        """:class:`BadInput` where a store is not of what is read, or texts are not learnt and the student does not read them as the
        teacher does."""
        stores = self.files(config)
        for side, role, split, reader in (("images", "image_store", "train", teacher), ("sentences", "sentence_store", SENTENCE, student)):
            if reader and (spec := stores[role]):
                read = read_as(reader, side, config.max_tokens)
                Store.open(spec).check(side=side, origin=origin(sources[split]), preprocessing=read)
        if config.learn_texts:
            return
        items = [sources[SENTENCE][number] for number in range(min(len(sources[SENTENCE]), FIRST))]
        batch = on_device(_said(items, texts_of(student, config.max_tokens)), student.model.device)
        with torch.inference_mode():
            ours, theirs = _texts_of(student, batch), EmbeddingTeacher(_network(teacher)).sentences(batch)
            least = float(_cosines(ours, theirs).min())
        if not least >= ALIKE:
            why = f"texts are not learnt; its vector of a sentence has a cosine of {least:.2f} with the teacher's, {ALIKE} is the least"
            fix = "make the student with the teacher's tower of texts, or learn texts too: --set learn_texts=true"
            raise BadInput(f"{student.path} does not read sentences as its teacher does", why, fix)

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
            vectors; `sentence_in_five`: the part for which the teacher's is among the student's five.
        """
        source, texts = held_out(sources["val"], config.eval_limit, "validate", quiet), texts_of(student, config.max_tokens)
        if not len(source):
            return {"images": 0}
        device, size, said = student.model.eval().device, config.eval_batch_size or EVAL_BATCH, EmbeddingTeacher(_network(teacher))
        among = some_of(len(sources[SENTENCE]), config.eval_sentences)
        read: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(among), size):
            items = usable(sources[SENTENCE], among[start : start + size])
            batch = on_device(_said(items, texts), device)
            read += [(_texts_of(student, batch), said.sentences(batch))] if items else []
        seen: list[tuple[Tensor, Tensor]] = []
        starts = range(0, len(source), size)
        for _, items in zip(counted(starts, "validate", len(source), quiet), usable_batches(source, starts, len(source)), strict=True):
            if items:
                batch = on_device({"pixels": stack([item.image for item in items]), "image_ids": [item.id for item in items]}, device)
                seen.append((student.model.embed_images(batch["pixels"])[1], said.images(batch)))
        vectors = ([torch.cat(side).float().cpu() for side in zip(*both, strict=True)] for both in (seen, read))
        return compared(*vectors)


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


def _network(teacher: Loaded | None) -> Any:
    assert teacher is not None
    return teacher.model
