"""The method of EfficientVLM (Wang et al. 2022): distillation by layers with a teacher of the same family, then gates under one budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficientvlm.compression.sparsity import Scope
from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, NEURON
from efficientvlm.families.structure import odd_layers
from efficientvlm.loaded import Loaded
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.objective import Objective
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.terms import Term, TowerMap, hidden, tower_maps
from efficientvlm.settings.methods import Distillation, DistillationQuirks


def distilled(hard: Any, teacher: Any, settings: Distillation) -> Objective:
    """The losses `hard` mixed with L_KD: every layer of the student imitates one of the teacher; `hard` alone where `kd` is 0.

    Use it for a student that was shrunk from this teacher, or has its widths: hidden states and attention maps are compared layer by layer.

    Args:
        hard: the losses of a task on the student.
        teacher: the network of the teacher, which does the same task.
        settings: weights, `kd`, temperature and quirks.

    Inputs and outputs are those of `objectives.distillation.Distilled`. Source: EfficientVLM (Wang et al. 2022), section 3.

    Example: `distilled(Generation(student), teacher, settings)(batch, step=0)["loss"].backward()`
    """
    if not settings.kd:
        return hard
    return Distilled(
        hard,
        hard.cached(teacher) if settings.cache_teacher else LiveTeacher(hard, teacher),
        released(hard.terms, settings.quirks),
        kd=settings.kd,
        weights=dict(settings.weights),
        maps=layer_maps(hard.model.config, teacher.config, settings.quirks),
        alike=not settings.quirks.independent_negatives,
        temperature=settings.temperature,
        scale=settings.scale_by_temperature,
    )


def layer_maps(student: Any, teacher: Any, quirks: DistillationQuirks) -> dict[str, TowerMap]:
    """Tower → which layers and heads meet. Of two images, layers follow those of the same image in the teacher; the published release
    follows those of the second one alone, where `quirks` ask for it."""
    if not getattr(quirks, "second_image", False):
        return tower_maps(student, teacher)
    count, total = student.layers()["fusion"], teacher.layers()["fusion"]
    chosen = student.copy(layer_source={"fusion": odd_layers(total, count)}, layer_source_of={"fusion": total})
    return {**tower_maps(student, teacher), "fusion": tower_maps(chosen, teacher)["fusion"]}


def needs(student: Loaded, teacher: Loaded, settings: Distillation) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot teach `student` as `settings` say: both must read the same batches, and what is compared must have
    the same form.

    Towers may differ, as a Swin and a ViT do, where no term that compares their layers has a weight. Each network normalises pixels itself.
    """
    if student.family.name != teacher.family.name:
        yield BadInput(
            f"teacher is {teacher.family.name}, student is {student.family.name}",
            "distillation needs one family",
            "use a teacher of the student's family",
        )
        return
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        yield BadInput(
            "teacher and student have different tokenizers", f"{teacher.path} and {student.path}", "shrink the student from this teacher"
        )
    if getattr(settings.quirks, "second_image", False) and not student.sizes.heads.get("fusion"):
        why = f"layers of {student.path} read both images, so that none is of the second one"
        yield BadInput("quirks.second_image", why, "leave it out")
    if settings.kd:
        weighed = [name for name, weight in settings.weights if weight]
        differing = [of_matching(difference, student) for difference in differences(student, teacher)]
        if wrong := [difference for difference in differing if difference.terms & {*weighed}]:
            off = [name for name in weighed if any(name in difference.terms for difference in wrong)]
            fix = f"shrink the student from this teacher, or compare no such layers: {' '.join(f'--set weights.{name}=0' for name in off)}"
            yield BadInput("teacher and student have other sizes", ", ".join(difference.what for difference in wrong), fix)
    if student.sizes.image_size != teacher.sizes.image_size:
        sizes = f"{teacher.sizes.image_size} and {student.sizes.image_size} px"
        yield BadInput("teacher and student read images of different size", sizes, "shrink the student from this teacher")
    elif student.preprocessing != teacher.preprocessing:
        why = f"preprocessor_config.json in {teacher.path} and {student.path} resize or crop in another way"
        yield BadInput("teacher and student read pictures of another form", why, "shrink the student from this teacher")


class Difference(NamedTuple):
    """In words what is another in the teacher than in the student, and the terms that cannot be compared for it."""

    what: str
    terms: frozenset[str]


def of_matching(difference: Difference, student: Loaded) -> Difference:
    """The same with the terms of fusion where the tower of texts fuses them with images itself, to match them."""
    if "fusion" in student.sizes.widths or not student.abilities & {"match", "contrast"}:
        return difference
    return difference._replace(terms=difference.terms | {name.replace("text_", "fusion_", 1) for name in difference.terms})


def differences(student: Loaded, teacher: Loaded) -> Iterator[Difference]:
    """Every size of the towers that decides which terms can be compared, where teacher and student differ in it."""
    ours, theirs = student.sizes, teacher.sizes
    layers, maps = frozenset({"vision_hidden", "vision_self_attention"}), tower_maps(student.model.config, teacher.model.config)
    crossing = [tower for tower in ours.widths if f"{tower}.cross_attention" in student.model.taps]
    seeing = [tower for tower in crossing if tower != "decoder" or len(crossing) == 1]  # behind another one, a decoder attends to texts
    looking = frozenset(f"{tower}_cross_attention" for tower in seeing)
    for tower in ours.widths:
        parts = {"width": {f"{tower}_hidden"}, "heads": {f"{tower}_self_attention", f"{tower}_cross_attention"}}
        for name, terms in parts.items():
            mine, other = ours.shapes(tower)[name], theirs.shapes(tower)[name]
            if mine and other and mine != other:
                yield Difference(f"{tower} {name} {', '.join(map(str, other))} and {', '.join(map(str, mine))}", frozenset(terms))
    if ours.patch_size != theirs.patch_size:
        yield Difference(f"patch size {theirs.patch_size} and {ours.patch_size}", layers | looking)
    if ours.window != theirs.window:
        spelled = " and ".join("none" if window is None else str(window) for window in (theirs.window, ours.window))
        yield Difference(f"vision window {spelled}", layers)
    for tower, pairs in maps.items():
        alike = ours.shapes(tower) == theirs.shapes(tower)
        if alike and any(ours.widths[tower][s] != theirs.widths[tower][t] for s, t in pairs.hidden):
            what = f"{tower} layers of the student stand for layers of stages of other width"
            yield Difference(what, frozenset({f"{tower}_hidden", f"{tower}_self_attention"}))


def released(terms: Iterable[Term], quirks: DistillationQuirks) -> tuple[Term, ...]:
    """`terms` with what the published release does instead, where `quirks` ask for it: it compares padding too, and leaves out the last
    hidden state of vision, and of what writes captions."""
    rows = []
    for term in terms:
        if quirks.unmasked_padding:
            term = term._replace(mask="")
        if quirks.skip_last_hidden and (term.tower == "vision" or term.skips_last) and term.distance is hidden:
            term = term._replace(last=-1)
        rows.append(term)
    return tuple(rows)


def released_rows(scope: Scope) -> Tensor:
    """Index of the gate that the published release applies to each unit in full-stack tasks.

    There text and fusion masks are concatenated, but fusion layers read them from row 0: a fusion layer is governed by rows that belong to
    the text tower, or to an earlier fusion layer, and the last rows govern nothing.
    """
    place = {(unit.group, unit.index): at for at, unit in enumerate(scope.units)}
    layers = {tower: sorted({u.layer for u in scope.units if u.tower == tower}) for tower in ("text", "fusion")}
    fusion_rows = [f"fusion.{layer}.{kind}" for layer in layers["fusion"] for kind in (HEAD, CROSS_HEAD)]
    head_rows = [f"text.{layer}.{HEAD}" for layer in layers["text"]] + fusion_rows
    neuron_rows = [f"{tower}.{layer}.{NEURON}" for tower in ("text", "fusion") for layer in layers[tower]]
    reads = dict(zip(fusion_rows, head_rows, strict=False))
    reads |= dict(zip((f"fusion.{layer}.{NEURON}" for layer in layers["fusion"]), neuron_rows, strict=False))
    return torch.tensor([place.get((reads.get(unit.group, unit.group), unit.index), at) for at, unit in enumerate(scope.units)])
