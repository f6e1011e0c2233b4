"""shrink: a student with fewer layers, columns, heads or neurons, initialised from the teacher's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.compression.widths import PRESETS, Origin, resize_model, resolve_sizes
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.structure import Layered, Structure
from efficientvlm.loaded import Loaded, load
from efficientvlm.runtime.progress import say
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.workspace import Job, Workspace, inputs_of


@dataclass(frozen=True)
class Shrinking(Job):
    """The shapes of the teacher, which of its layers the student has, and what those have in it."""

    teacher: Loaded
    layers: dict[str, list[int]]
    sizes: dict[str, Layered] = field(default_factory=dict)
    fusion_layers: int | None = None
    channels: str = "important"
    redrawn: tuple[str, ...] = ()
    seed: int = 0

    def student(self, teacher: Any) -> tuple[Any, Origin | None]:
        """Out of a network of that shape, the meta device included; and where its tensors come from if not all are copies."""
        student = shrink_model(teacher, self.layers)
        if not (self.sizes or self.fusion_layers or self.redrawn):
            return student, None
        how: dict[str, Any] = {"channels": self.channels, "redrawn": self.redrawn, "seed": self.seed}
        return resize_model(student, self.sizes, self.fusion_layers, **how)


def run(config: Shrink, control: Control) -> Manifest:
    """Keep the chosen layers of each tower (every second one by default) and of those what is asked for."""
    job = prepare(config, Workspace(control.quiet))
    output = open_output(config, "shrink", control, inputs_of(job))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        teacher = load(config.model)
        student, origin = job.student(teacher.model)
        if origin:
            say(f"shrink: {origin}", quiet=control.quiet)
        kept: dict[str, Any] = {"tokenizer": teacher.tokenizer, "image_processor": teacher.image_processor}
        extra = {"layers": job.layers, **({"origin": origin.said()} if origin else {})}
        manifest = write(output, teacher.family, student, **kept, control=control, extra=extra)
    if of_whole := shares(manifest.accounting, teacher.manifest.accounting):
        say(f"shrink: {of_whole}", quiet=control.quiet)
    return manifest


def shares(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What part of a teacher's parameters and multiply-adds a student has, by their accountings, and by which rule; empty where one of
    them counts otherwise."""
    (mine, other), (macs, of_macs) = ([of.get(kind) or {} for of in (ours, theirs)] for kind in ("parameters", "macs"))
    rule = ("image_size", "text_length")
    if not (other.get("total") and of_macs.get("total")) or any(macs.get(name) != of_macs.get(name) for name in rule):
        return ""
    request = f"one request at {macs['image_size']} px with {macs['text_length']} tokens"
    part, cost = mine["total"] / other["total"], macs["total"] / of_macs["total"]
    return f"{100 * part:.1f} % of the teacher's parameters, {100 * cost:.1f} % of its multiply-adds for {request}"


def prepare(config: Shrink, workspace: Workspace) -> Shrinking:
    """:class:`BadInput` for layers or sizes that the teacher does not have."""
    teacher = workspace.checkpoint(config.model)
    layers, sizes, fusion_layers = wanted(config, teacher.model.config)
    if unknown := [tower for tower in config.random if not layers.get(tower)]:
        raise BadInput(f"random: no such tower: {unknown[0]}", f"there are {', '.join(t for t in layers if layers[t])}", "use one of these")
    shape: dict[str, Any] = {"channels": config.channels, "redrawn": tuple(config.random), "seed": config.seed}
    job = Shrinking(teacher, layers, sizes, fusion_layers, **shape, inputs={"model": config.model})
    if config.narrower:
        teacher.model.config.with_layers(layers).with_sizes(sizes, fusion_layers)  # refuses what cannot be built
    return job


def wanted(config: Shrink, of: Structure) -> tuple[dict[str, list[int]], dict[str, Layered], int | None]:
    """Layers, sizes and fusion layers of the student of a teacher `of`.

    Raises:
        BadInput: they are not there, or contradict each other.
    """
    given: dict[str, Mapping[str, Any]] = {name: dict(getattr(config, name)) for name in ("layers", "width", "heads", "neurons")}
    fusion_layers = config.fusion_layers
    there = [tower for tower, count in of.layers().items() if count]
    if config.preset:
        preset = PRESETS[config.preset]
        for tower in there:
            images = tower != "vision"
            values = {"layers": preset.layers[images], **preset.sizes[images]._asdict()}
            given = {name: {tower: values[name], **chosen} for name, chosen in given.items()}
        fusion_layers = fusion_layers or preset.fusion_layers
    elif config.narrower:
        given["layers"] = {**{tower: of.layers()[tower] for tower in there}, **given["layers"]}
    try:
        layers = resolve_layers(of, given["layers"])
        return layers, resolve_sizes(of, given["width"], given["heads"], given["neurons"]), fusion_layers
    except BadInput as problem:
        if not config.preset:
            raise
        raise BadInput(f"the preset {config.preset} does not fit", str(problem), "it is for a BLIP of base size or larger") from problem
