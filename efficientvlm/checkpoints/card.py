"""The model card (README.md) of a checkpoint, made from its manifest alone."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from efficientvlm.checkpoints import influence
from efficientvlm.checkpoints.manifest import DataRecord, Manifest
from efficientvlm.errors import printable
from efficientvlm.settings.base import Strict
from efficientvlm.settings.tasks import ABOUT

HELD = {"embeddings": "vectors", "sentences": "sentences"}
"""Family → what a folder holds that is no network."""
NAME = re.compile(r"[\w.:/@+ -]+")  # of what the header names; anything else is told below, as text


def model_card(manifest: Manifest, name: str, data: Sequence[DataRecord] = ()) -> str:
    """Markdown with a YAML header. `data` are the records of this stage and of all stages before it."""
    import yaml

    config = manifest.config
    task = config.get("task") or manifest.extra.get("task")
    header: dict[str, Any] = {
        "library_name": "efficientvlm",
        "license": "other",
        "license_name": "see-the-data-table",
        "tags": ["efficientvlm", *(tag for tag in (manifest.family, manifest.stage) if NAME.fullmatch(tag))],
    }
    about = ABOUT.get(str(task))
    if about and about.tag:
        header["pipeline_tag"] = about.tag
    if data:
        header["datasets"] = sorted({record.name for record in data if NAME.fullmatch(record.name)})
    if manifest.parents:
        header["base_model"] = [parent.path for parent in manifest.parents]

    made_from = [f"{plain(parent.role)} {code(parent.path)} (manifest sha256 `{parent.sha256[:12]}`)" for parent in manifest.ancestors()]
    origin = f", origin: {manifest.origin}" if manifest.origin else ""
    spoken = shlex.quote(" ".join(printable(name).split()))
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {plain(name)}",
        "",
        f"{what_it_is(manifest)} written by {code(f'evlm {manifest.stage}')} (efficientvlm {plain(manifest.code.version)}){origin}.",
        f"Made from {'; '.join(made_from)}." if made_from else "It was made from no other checkpoint.",
        "",
    ]
    lines += _table("Size", ("measure", "value"), size_rows(manifest.accounting))
    lines += said_of_inputs(manifest)
    lines += _table("Results", ("measure", "value"), [(key, number(value)) for key, value in results(manifest.metrics)])
    if manifest.stage == "import" and manifest.extra.get("source"):
        licence = plain(str(manifest.extra.get("licence") or "not stated"))
        lines += [f"Imported from {code(str(manifest.extra['source']))}, licence: {licence}.", ""]
    held = HELD.get(manifest.family, "weights")
    rows = [(record.name, record.split, f"{record.count:,}", record.licence) for record in data]
    lines += _table("Data and licences", ("data", "split", "samples" if manifest.family in HELD else "images", "licence"), rows)
    lines += [
        f"The {held} may be used as far as the licences of the data and of the models they were made from allow.",
        "",
        "## Use",
        "",
        "```sh",
        f"evlm inspect {spoken}",
        *([f"evlm predict --model {spoken} {examples(about.asked)}"] if about and about.asked else []),
        "```",
        "",
    ]
    return "\n".join(lines)


def what_it_is(manifest: Manifest) -> str:
    """What a folder holds, as the beginning of a sentence."""
    if manifest.family in HELD:
        return f"{counted(manifest) or HELD[manifest.family].capitalize()},"
    return f"A {plain(manifest.family)} checkpoint"


def counted(manifest: Manifest) -> str:
    """What a folder without weights holds, counted; empty where the manifest does not say."""
    said = manifest.extra
    if {"side", "count", "width"} <= said.keys():
        lacking = f", {said['missing']:,} without one" if said.get("missing") else ""
        return f"{said['count']:,} vectors of {said['width']:,} numbers, of {said['side']}{lacking}"
    found = manifest.metrics.get("sentences") or {}
    return f"{found['kept']:,} of {found['read']:,} sentences" if {"kept", "read"} <= found.keys() else ""


def examples(kind: type[Strict]) -> str:
    """The options of a command with the examples of their settings."""
    given = {name: field.examples[0] for name, field in kind.model_fields.items() if field.examples}
    each = [(name, str(text)) for name, value in given.items() for text in (value if isinstance(value, list) else [value])]
    return " ".join(f"--{name} {json.dumps(text, ensure_ascii=False) if ' ' in text else text}" for name, text in each)


def said_of_inputs(manifest: Manifest) -> list[str]:
    """A section on inputs without influence, if there are any."""
    measured = influence.read(influence.Influence, manifest.extra.get("influence"))
    found = influence.problems(measured, influence.read(influence.Reach, manifest.accounting.get("reach")))
    return ["## Inputs without influence", "", *(f"- {line}" for line in found), ""] if found else []


def plain(text: str) -> str:
    """Foreign text as one line of Markdown that means these very letters: no HTML, no markup, no control characters."""
    line = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"\\{found[0]}", line)


def code(text: str) -> str:
    """Foreign text as code in a line of Markdown."""
    line = " ".join(printable(text).split())
    return f"<code>{plain(line)}</code>" if set(line) & set("<>&`") else f"`{line}`"


def size_rows(accounting: dict[str, Any]) -> list[tuple[str, str]]:
    """Measure and value for what an accounting holds; every part of it may be absent."""
    rows = []
    parameters, macs, sparsity = (accounting.get(key) or {} for key in ("parameters", "macs", "sparsity"))
    if "total" in parameters:
        rows.append(("parameters", f"{parameters['total']:,}"))
    if "without_embeddings" in parameters:
        rows.append(("parameters without embeddings", f"{parameters['without_embeddings']:,}"))
    rows += [(f"parameters, {tower}", f"{count:,}") for tower, count in (parameters.get("by_tower") or {}).items()]
    if "total" in macs:
        rows.append((f"multiply-adds at {macs.get('image_size', '?')} px, {macs.get('text_length', '?')} tokens", f"{macs['total']:,}"))
    if sparsity.get("achieved"):
        rows.append(("sparsity of the prunable weights", number(sparsity["achieved"])))
    return rows


def sizes(manifest: Manifest) -> str:
    """Parameters, multiply-adds and sparsity on one line; what the manifest does not hold is left out."""
    parameters, macs, sparsity = (manifest.accounting.get(key) or {} for key in ("parameters", "macs", "sparsity"))
    parts = []
    if "total" in parameters:
        parts.append(f"{short(parameters['total'])} parameters")
    if "total" in macs:
        parts.append(f"{short(macs['total'])} MACs")
    if sparsity.get("achieved"):
        parts.append(f"sparsity {sparsity['achieved']:.3f}")
    if manifest.family in HELD and counted(manifest):
        parts.append(counted(manifest))
    return "  ".join(parts)


def short(count: float) -> str:
    """A count with three digits and a unit: 1.83 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} "[:-1]


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names, in order."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def results(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """What was measured on held-out data, as dotted names; the losses of training stay in the manifest."""
    return [(key, value) for key, value in flatten(metrics) if not key.startswith("train.")]


def number(value: Any) -> str:
    """Four significant digits for fractions, separators for counts, anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    body = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    return [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body, ""]
