"""The method of DLIP (Kuang et al. 2023): a light BLIP learns what its modules say, never how their layers get there.

The paper's losses are not public. The nine terms are those of a public replication, which is not the authors'; what is weak in them
is repaired unless `quirks` say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD
from efficientvlm.loaded import Loaded
from efficientvlm.objectives.distances import (
    alignment,
    all_logits,
    cosine,
    first_token,
    last_layer,
    maps_divergence,
    of_last_word,
    of_words,
)
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.terms import Distance, Pairing, Term, TowerMap, has_layers, heads_of, kinds_of_map, logits
from efficientvlm.runtime.progress import say
from efficientvlm.settings.dlip import Dlip


class Row(NamedTuple):
    """A term of the table: what it compares of which module.

    It is found in the first of `outputs` that the losses record, or at the tap `kind` of the module's tower. `how` says of settings, tap
    and mask how it is compared, as fields of a `Term`.
    """

    weight: str
    module: str
    how: Callable[[Dlip, str, str], dict[str, Any]]
    kind: str = ""
    outputs: tuple[str, ...] = ()

    def term(self, offered: Mapping[str, str], settings: Dlip) -> Term | None:
        """The row where the losses record it, None where they do not; `offered` has what they record, and the mask of each."""
        towers = [tower.replace("*", self.kind) for tower in modules(offered)[self.module]] if self.kind else []
        tap = next((tap for tap in (*self.outputs, *towers) if tap in offered), None)
        return None if tap is None else Term(self.weight, tap, **self.how(settings, tap, offered[tap]))


def modules(offered: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Module → patterns of its taps, of which the first that there is counts.

    Of a BLIP the fusion encoder is its text tower, where that sees the image: in contrast and matching for the pairs that belong together,
    and where questions are answered always, so that it then has no text encoder. An X-VLM writes captions with the layers that fuse.
    """
    sees = "text.cross_attention" in offered
    return {
        "image encoder": ("vision.*",),
        "text encoder": () if sees else ("text.*",),
        "fusion encoder": ("fusion.*@itm_positive", "text.*@itm_positive", "fusion.*", *(("text.*",) if sees else ())),
        "decoder": ("decoder.*", "fusion.*"),
        "image and text encoder": (),
        "classifier": (),
    }


def _feature(settings: Dlip, tap: str, mask: str) -> dict[str, Any]:
    return {"distance": cosine, "pick": first_token if "." in tap else None}


def _written(settings: Any, tap: str, mask: str) -> dict[str, Any]:
    if settings.quirks.first_token:
        return _feature(settings, tap, mask)
    return {"distance": of_words if settings.decoder_state == "words" else of_last_word, "mask": "predicts", "pick": last_layer}


def _aligned(settings: Any, tap: str, mask: str) -> dict[str, Any]:
    return {"distance": partial(alignment, alpha=settings.teacher_alpha, queued_first=settings.quirks.queued_first)}


def _said(settings: Dlip, tap: str, mask: str) -> dict[str, Any]:
    return {"distance": all_logits} if settings.quirks.unmasked_padding else {"distance": logits, "mask": "predicts"}


def _concluded(settings: Dlip, tap: str, mask: str) -> dict[str, Any]:
    return {"distance": logits}


def _maps(settings: Dlip, tap: str, mask: str) -> dict[str, Any]:
    mean = settings.heads == "mean"
    how: dict[str, Any] = {"temperature": settings.attention_temperature, "mean": mean, "shrunk": settings.quirks.shrunk_maps}
    return {"distance": partial(maps_divergence, **how), "mask": "" if settings.quirks.unmasked_padding else mask}


TABLE = (
    Row("image_features", "image encoder", _feature, "hidden", ("image_feature",)),
    Row("text_features", "text encoder", _feature, "hidden", ("text_feature",)),
    Row("fused_feature", "fusion encoder", _feature, "hidden"),
    Row("decoder_state", "decoder", _written, "hidden"),
    Row("alignment", "image and text encoder", _aligned, outputs=("contrast",)),
    Row("lm_logits", "decoder", _said, outputs=("lm_logits", "logits")),
    Row("fusion_self_attention", "fusion encoder", _maps, "self_attention"),
    Row("fusion_cross_attention", "fusion encoder", _maps, "cross_attention"),
    Row("decoder_self_attention", "decoder", _maps, "self_attention"),
    Row("verdict", "classifier", _concluded, outputs=("logits",)),
)
"""The nine terms, in the order of the replication, and ours for statements about two images."""


def needs(student: Loaded, teacher: Loaded, settings: Dlip) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot teach `student` as `settings` say.

    Both read the same tokens and pictures; widths, layers, heads and patches may differ. Features are aligned in one space, so that they
    must be as long.
    """
    if student.family.name != teacher.family.name:
        who = f"teacher is {teacher.family.name}, student is {student.family.name}"
        yield BadInput(who, "their modules are not the same", "use a teacher of the student's family")
        return
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        fix = "shrink the student from this teacher, or make it with the teacher's tokenizer"
        yield BadInput("teacher and student have different tokenizers", f"{teacher.path} and {student.path}", fix)
    if (student.sizes.image_size, student.preprocessing) != (teacher.sizes.image_size, teacher.preprocessing):
        sizes = f"{teacher.sizes.image_size} and {student.sizes.image_size} px, or they crop in another way"
        yield BadInput("teacher and student read different pictures", sizes, "shrink the student from this teacher")
    if not settings.kd:
        return
    weighed = {name for name, weight in settings.weights if weight}
    if not weighed:
        yield BadInput("no term has a weight", "then there is nothing to learn from the teacher", "give a weight, or kd 0")
    lengths = [_length(loaded.model, "text_proj") for loaded in (teacher, student)]
    if "alignment" in weighed and None not in lengths and lengths[0] != lengths[1]:
        why = f"features have {lengths[0]} and {lengths[1]} numbers, and are compared with the same keys"
        fix = "use a student whose features are as long, or --set weights.alignment=0"
        yield BadInput("teacher and student cannot be aligned", why, fix)
    if settings.adapters == "text_projection" and (None in lengths or lengths[0] != lengths[1]):
        yield _unprojected()
    if student.sizes.patch_size != teacher.sizes.patch_size and "fusion_cross_attention" in weighed:
        for loaded in (student, teacher):
            if loaded.sizes.window is not None or loaded.sizes.image_size % loaded.sizes.patch_size:
                why = f"{loaded.path} has no grid of patches that the maps of the other could be brought to"
                yield BadInput("teacher and student have other patches", why, "use --set weights.fusion_cross_attention=0")


def _unprojected() -> BadInput:
    why = "the networks' own projections of texts are to bring their states together, and one has none, or they differ in length"
    return BadInput("adapters=text_projection", why, "use adapters=learned")


def _length(model: Any, projection: str) -> int | None:
    """Numbers of a feature that `projection` of `model` makes; None where there is none."""
    return getattr(getattr(model, projection, None), "out_features", None)


def distilled(hard: Any, teacher: Any, settings: Dlip) -> Objective:
    """The losses `hard` with DLIP's terms beside them: L = hard + kd · Σ weight · term; `hard` alone where `kd` is 0.

    Use it for a student that has other widths than its teacher, fewer layers or other numbers of heads: only features, predictions and the
    maps of last layers are compared. Rows whose module the networks and losses do not have are left out, which is said.

    Args:
        hard: the losses of a task on the student.
        teacher: the network of the teacher, which does the same task.
        settings: weights, and how what differs in size meets.

    Inputs and outputs are those of `objectives.distillation.Distilled`; every term is reported beside their sum `kd`. Of several processes
    contrast spans the pairs of all.

    Source: DLIP (Kuang et al. 2023) names modules and kinds of information; the formulas are those of an unofficial replication. Ours: the
    decoder is compared at its words, padding is left out (of keys of a map too, so that a text counts alike in every batch), negatives of
    the queues are those of earlier steps, averages of heads are brought back to the size of single ones, and states go through projections
    of their own, not through those that contrast learns.

    Example: `distilled(Captions(student), teacher, settings)(batch, step=0)["loss"].backward()`

    Raises:
        BadInput: nothing is left to compare, or to bring it together.
    """
    if not settings.kd:
        return hard
    student, maps = hard.model, last_layers(hard.model.config, teacher.config)
    weights = dict(settings.weights)
    rows = [row for row in TABLE if weights.get(row.weight)]
    offered = {term.tap: term.mask for term in hard.terms} | dict.fromkeys(hard.outputs, "")
    found = {row.weight: term for row in rows if (term := row.term(offered, settings)) is not None and has_layers(term, maps)}
    if lacking := [f"{row.weight} ({row.module})" for row in rows if row.weight not in found]:
        say(f"distillation: left out, as these networks and losses have nothing of the kind: {', '.join(lacking)}")
    if not found:
        why = "these networks and losses have none of the modules that have a weight"
        raise BadInput("the student has nothing to learn from its teacher", why, "give a weight to another term, or use kd 0")
    terms, projections = list(found.values()), {}
    if settings.adapters == "learned":
        projections = learned(terms, student, teacher)
    elif None in (_length(student, "text_proj"), _length(teacher, "text_proj")):  # the task may have left them behind
        raise _unprojected()
    else:
        terms = [_by_text_projections(term, student, teacher) for term in terms]
    return Distilled(
        hard,
        hard.cached(teacher) if settings.cache_teacher else LiveTeacher(hard, teacher),
        terms,
        kd=settings.kd,
        weights=weights,
        maps=maps,
        projections=projections,
        temperature=getattr(settings, "temperature", 1.0),
        scale=getattr(settings, "scale_by_temperature", False),
        hard_weight=1.0,
        each=True,
    )


def last_layers(student: Any, teacher: Any) -> dict[str, TowerMap]:
    """The last layer of every tower that both networks have, and which of its heads meet.

    Of `attention` the first pair is of self-attention, the last of cross-attention: of the last layers that have one. Heads are told apart
    by the numbers that they had before any were removed. Where the student had fewer of them than the teacher, or more, a head follows the
    one that it was cut out of, or else head i of S follows head i · T // S of T.
    """
    maps, sizes = {}, (student.sizes(), teacher.sizes())
    kept, of_teacher = student.kept_indices(), teacher.kept_indices()
    for tower, count in student.layers().items():
        total = teacher.layers().get(tower, 0)
        if not count or not total:
            continue
        pairs: list[tuple[int, int]] = []
        heads: dict[str, list[tuple[list[int], list[int]]]] = {}
        for kind in (HEAD, CROSS_HEAD):
            layer, other = _last(kept, tower, count, kind), _last(of_teacher, tower, total, kind)
            if layer is None or other is None:
                continue
            mine, others = sizes[0].heads[tower][layer], sizes[1].heads[tower][other]
            ours, theirs = (heads_of(known, f"{tower}.{at}", kind) or [] for known, at in ((kept, layer), (of_teacher, other)))
            followed = [_followed(student, f"{tower}.{layer}.{one}", mine, others) for one in kinds_of_map(kind)]
            wanted = [(image, followed[image][head]) for image, head in ours]
            met = [(at, theirs.index(head)) for at, head in enumerate(wanted) if head in theirs]
            heads[kind] = [([], []) for _ in range(count)]
            heads[kind][layer] = ([at for at, _ in met], [at for _, at in met])
            pairs.append((layer, other))
        maps[tower] = TowerMap([(count, total)], pairs, heads)
    return maps


def _followed(student: Any, group: str, heads: int, others: int) -> Sequence[int]:
    """Which of the teacher's `others` heads each of the `heads` of `group` follows: the one that it was cut out of, or by their places."""
    noted: Sequence[int] = (student.head_source or {}).get(group, ())
    return noted if len(noted) == heads and max(noted) < others else [head * others // heads for head in range(heads)]


def _last(kept: Mapping[str, list[int]], tower: str, count: int, kind: str) -> int | None:
    """The last of `count` layers of `tower` with units of `kind`, however many are left."""
    return next((layer for layer in reversed(range(count)) if f"{tower}.{layer}.{kind}" in kept), None)


def learned(terms: Iterable[Term], student: Any, teacher: Any) -> dict[str, nn.Module]:
    """Tap → a projection of the student's states or features to the width of the teacher's, where that is another."""
    widths = [network.config.sizes().widths for network in (student, teacher)]
    found: dict[str, nn.Module] = {}
    for term in terms:
        of_output = {"image_feature": "vision_proj", "text_feature": "text_proj"}.get(term.tap)
        if of_output:
            mine, other = _length(student, of_output), _length(teacher, of_output)
        elif term.tap.partition("@")[0].endswith(".hidden"):
            mine, other = (width[term.tower][-1] for width in widths)
        else:
            continue
        if mine is not None and other is not None and mine != other:
            found[term.tap] = nn.Linear(mine, other, device=student.device)
    return found


def _by_text_projections(term: Term, student: Any, teacher: Any) -> Term:
    """`term` of states behind each network's own projection of texts, which contrast uses for another purpose (published)."""
    if not term.tap.partition("@")[0].endswith(".hidden") or term.tower == "vision":
        return term

    def distance(ours: Tensor, theirs: Tensor, term: Term, pairing: Pairing) -> Tensor:
        with torch.no_grad():
            projected = teacher.text_proj(theirs.clone())
        return inner(student.text_proj(ours), projected, term, pairing)

    inner: Distance = term.distance
    return term._replace(distance=distance)
