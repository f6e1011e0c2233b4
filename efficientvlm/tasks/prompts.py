"""Classes as texts: templates of sentences, and a feature a class, the mean over all of its sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficientvlm.checkpoints.files import MIB, expanded, read_limited
from efficientvlm.data.class_names import Classes, named
from efficientvlm.data.text_tables import lines_of
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput, Diverged, shorten
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.families.weights import finite
from efficientvlm.loaded import Loaded
from efficientvlm.runtime.progress import counted
from efficientvlm.settings.tasks import PLACE, TEMPLATES

LARGEST = 4 * MIB
CLASSES_AT_ONCE = 1000
"""Whose sentences are token ids at one time."""


@dataclass
class Prompts:
    """Templates, with the place of a class in each, and the files that some of them come from."""

    templates: list[str]
    files: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, given: Sequence[str]) -> Prompts:
        """Each of `given` is a template, the name of a known list, or a file with a template a line.

        Raises:
            BadInput: no such file, or a line that has no place for the class.
        """
        templates: list[str] = []
        files = files_of(given)
        for one in given:
            if PLACE in one:
                templates.append(one)
            elif one in TEMPLATES:
                templates += TEMPLATES[one]
            else:
                templates += _lines(one)
        return cls(list(dict.fromkeys(templates)), files)

    def texts(self, name: str) -> list[str]:
        """The sentences of a class."""
        return [template.replace(PLACE, name) for template in self.templates]


def files_of(given: Sequence[str]) -> list[Path]:
    """The files among what is given as templates."""
    return [expanded(one) for one in given if PLACE not in one and one not in TEMPLATES]


def _lines(name: str) -> list[str]:
    path = expanded(name)
    if not name.strip() or not path.exists():
        why = f"it is no template, which has {PLACE} for the class, no file, and none of the known lists {', '.join(TEMPLATES)}"
        raise BadInput(f"templates '{shorten(name, 80)}'", why, f'write for example "a photo of a {PLACE}."')
    content = read_limited(path, LARGEST, "a file of templates")
    try:
        lines = [line.strip() for line in lines_of(content.decode("utf-8-sig")) if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"cannot read the templates in {path}", f"{error.reason} at byte {error.start}", "write it in UTF-8") from None
    if not lines:
        raise BadInput(f"{path} holds no templates", "", "write one a line")
    if wrong := next(((number, line) for number, line in enumerate(lines, 1) if PLACE not in line), None):
        why = f"line {wrong[0]:,} has no {PLACE} for the class ({shorten(wrong[1], 60)})"
        raise BadInput(f"cannot read the templates in {path}", why, f'write for example "a photo of a {PLACE}."')
    return lines


@torch.inference_mode()
def class_features(loaded: Loaded, texts: Texts, classes: Classes, prompts: Prompts, *, batch_size: int, title: str, quiet: bool) -> Tensor:
    """Unit vectors [C, E]: the mean of the unit vectors of all sentences of a class, again of length 1 (Radford et al. 2021, 3.1.4).

    Every sentence is encoded once. Sentences are encoded by blocks of classes, so that memory does not grow with their number.

    Raises:
        Diverged: a feature is no finite number.
    """
    model, size, count = loaded.model.eval(), Footprint.of(loaded.config), len(prompts.templates)
    at_once = max(1, CLASSES_AT_ONCE // count)
    found: list[Tensor] = []
    for start in counted(range(0, len(classes), at_once), f"{title} classes", len(classes), quiet):
        sentences = [text for name in classes.names[start : start + at_once] for text in prompts.texts(name)]
        ids, mask = (tensor.to(model.device) for tensor in texts.batch(sentences))
        step = max(1, min(batch_size, room(model.device) // (size.question_token * ids.shape[1])))
        parts = [model.embed_texts(ids[at : at + step], mask[at : at + step])[1].float() for at in range(0, len(ids), step)]
        means = torch.cat(parts).unflatten(0, (-1, count)).mean(1)
        found.append(torch.nn.functional.normalize(means, dim=-1))
    features = torch.cat(found)
    if not finite(features):
        what = "the features of some classes are no finite numbers"
        raise Diverged(what, "the network overflows, though its weights are finite", "train it with a smaller --lr, in fp32, or anew")
    return features


def of_names(texts: Texts, classes: Classes, prompts: Prompts) -> tuple[dict[str, int], list[str]]:
    """Counts and remarks on names that the tokenizer cannot read, and on those whose sentences read alike, so that the first of their
    classes is always said.

    Raises:
        BadInput: they all read alike.
    """
    own = Texts(texts.tokenizer, texts.max_tokens)
    unread = [name for name, identity in zip(classes.names, own.identities(classes.names), strict=True) if identity is None]
    groups = _alike(own, classes.names, prompts)
    alike = [classes.names[number] for number in sorted(number for group in groups for number in group)]
    if len(alike) == len(classes) and len(groups) == 1 and len(set(classes.names)) > 1:
        why = f"as the tokenizer reads them, up to {own.max_tokens} tokens, their sentences are one ({named(classes.names)})"
        raise BadInput(f"{len(classes):,} class names cannot be told apart", why, "name the classes in its language, or in fewer words")
    remarks = []
    if unread:
        remarks.append(f"the tokenizer lacks a part of {len(unread):,} of {len(classes):,} class names ({named(unread)})")
    if alike:
        why = "the first of those that are alike is said for all of them"
        remarks.append(f"{len(alike):,} of {len(classes):,} classes read alike ({named(list(dict.fromkeys(alike)))}): {why}")
    return {"unread_class_names": len(unread), "shared_class_names": len(alike)}, remarks


def _alike(texts: Texts, names: Sequence[str], prompts: Prompts) -> list[list[int]]:
    """Groups of the numbers of `names` of which every sentence is cut to the same tokens; the first template mostly tells all apart."""
    groups, room_of_text = [list(range(len(names)))], texts.room()
    for template in prompts.templates:
        parts: dict[tuple[int, ...], list[int]] = {}
        for at, group in enumerate(groups):
            for number, ids in zip(group, texts.ids([template.replace(PLACE, names[number]) for number in group]), strict=True):
                parts.setdefault((at, *ids[:room_of_text]), []).append(number)
        groups = [part for part in parts.values() if len(part) > 1]
    return groups


def record_of(prompts: Prompts) -> dict[str, Any]:
    """How classes are asked for, in a result; long lists by their number and first templates."""
    shown = prompts.templates[:10]
    return {"templates": shown, "template_count": len(prompts.templates)}
