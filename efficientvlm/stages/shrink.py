"""shrink: a student with fewer layers, columns, heads or neurons, initialised from the teacher's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientvlm import families
from efficientvlm.checkpoints.files import resolve
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.compression.widths import PRESETS, Origin, resize_model, resolve_sizes
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.checks import MOST_LAYERS
from efficientvlm.families.image_settings import resized_settings
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
    depth: dict[str, int] = field(default_factory=dict)
    images: tuple[int | None, int | None] = (None, None)
    backbone: Path | None = None
    seed: int = 0

    @property
    def family(self) -> Any:
        """The student's, which is not the teacher's where a backbone reads its images."""
        return families.get("dual") if self.backbone else self.teacher.family

    def image_settings(self, student: Any) -> dict[str, Any] | None:
        """How pictures are prepared for it: as for the teacher, in its own size."""
        return resized_settings(self.teacher.image_processor, self.teacher.sizes, student.config.sizes())

    def student(self, teacher: Any) -> tuple[Any, Origin | None]:
        """Out of a network of that shape, the meta device included; and where its tensors come from if not all are copies."""
        base = based(teacher, self.backbone, self.images, seed=self.seed)
        student = shrink_model(base, self.layers)
        if not (self.sizes or self.fusion_layers or self.redrawn or self.backbone or self.images != (None, None)):
            return student, None
        how: dict[str, Any] = {"channels": self.channels, "redrawn": self.redrawn, "depth": self.depth, "seed": self.seed}
        found, origin = resize_model(student, self.sizes, self.fusion_layers, **how)
        if self.backbone:
            from efficientvlm.families.dual.start import NEW

            new_names = [name for name in origin.whole + origin.cut if name.startswith(NEW)]
            for names in (origin.whole, origin.cut):
                names[:] = [name for name in names if name not in new_names]
            origin.random += new_names
            origin.why.insert(0, f"images are read by the {found.config.vision_config.model_type} in {self.backbone}")
        elif self.images != (None, None) and "vision" not in self.redrawn:
            before, now = (network.config.sizes() for network in (teacher, found))
            old, new = (f"{sizes.patch_size} pixels on images of {sizes.image_size}" for sizes in (before, now))
            origin.why.append(f"patches of {new} are resampled from those of {old}")
        return found, origin


def based(teacher: Any, backbone: Path | None, images: tuple[int | None, int | None], seed: int = 0) -> Any:
    """What a student is cut out of: `teacher`, with a backbone for its images if there is one, for images and patches of so many pixels on
    a side; None: as before. Of a network on the meta device it is one too."""
    image_size, patch_size = images
    if backbone:
        from efficientvlm.families.dual.start import with_backbone  # with the base class of models, which takes a while to load

        values = not next(teacher.parameters()).is_meta
        teacher, image_size = with_backbone(teacher, backbone, image_size, values=values, seed=seed), None
    if (image_size, patch_size) == (None, None):
        return teacher
    teacher.config.with_images(image_size, patch_size)  # refuses what is made for its own alone
    return teacher.for_images(image_size, patch_size)


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
            from efficientvlm.export.stock import opening

            say(f"shrink: {origin}", quiet=control.quiet)
            say(f"shrink: {opening(job.family, student, output.working('opened'))}", quiet=control.quiet)
        kept: dict[str, Any] = {"tokenizer": teacher.tokenizer, "image_processor": job.image_settings(student)}
        extra = {"layers": job.layers, **({"origin": origin.said()} if origin else {})}
        manifest = write(output, job.family, student, **kept, control=control, extra=extra)
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
    preset = PRESETS[config.preset] if config.preset else None
    redrawn = tuple(config.random) or (preset.redrawn if preset else ())
    images = config.image_size, config.patch_size or (preset.patch_size if preset else None)
    backbone = resolve(config.vision_from) if config.vision_from else None
    with naming_preset(config):
        of = based(teacher.model, backbone, images).config
        layers, sizes, fusion_layers, depth = wanted(config, of)
    if unknown := [tower for tower in redrawn if not layers.get(tower)]:
        raise BadInput(f"random: no such tower: {unknown[0]}", f"there are {', '.join(t for t in layers if layers[t])}", "use one of these")
    shape: dict[str, Any] = {"channels": config.channels, "redrawn": redrawn, "depth": depth, "images": images, "seed": config.seed}
    shape["backbone"] = backbone
    return Shrinking(teacher, layers, sizes, fusion_layers, **shape, inputs={"model": config.model, "vision_from": config.vision_from})


@contextmanager
def naming_preset(config: Shrink) -> Iterator[None]:
    """What keeps a preset from being made of a teacher names the preset, and the teacher that it is for."""
    try:
        yield
    except BadInput as problem:
        if not config.preset:
            raise
        raise BadInput(f"the preset {config.preset} does not fit", str(problem), f"it is for {PRESETS[config.preset].teacher}") from problem


def wanted(config: Shrink, of: Structure) -> tuple[dict[str, list[int]], dict[str, Layered], int | None, dict[str, int]]:
    """Layers that the student of a teacher `of` takes, sizes, fusion layers, and layers of towers that have more than it.

    Raises:
        BadInput: they are not there, or contradict each other.
    """
    given: dict[str, Mapping[str, Any]] = {name: dict(getattr(config, name)) for name in ("layers", "width", "heads", "neurons")}
    fusion_layers, redrawn = config.fusion_layers, tuple(config.random)
    there = [tower for tower, count in of.layers().items() if count]
    if config.preset:
        preset = PRESETS[config.preset]
        for tower in there:
            texts = tower != "vision"
            count, size = preset.layers[texts], preset.sizes[texts]
            values = {"layers": of.layers()[tower] if count is None else count, **(size._asdict() if size else {})}
            given = {name: {**({tower: values[name]} if name in values else {}), **chosen} for name, chosen in given.items()}
        fusion_layers, redrawn = fusion_layers or preset.fusion_layers, redrawn or preset.redrawn
    elif config.narrower:
        given["layers"] = {**{tower: of.layers()[tower] for tower in there}, **given["layers"]}
    depth, layers = _depth(of, given["layers"], redrawn)
    layers = resolve_layers(of, layers)
    sizes = resolve_sizes(of, given["width"], given["heads"], given["neurons"], redrawn)
    if config.narrower:
        of.with_layers(layers).with_sizes(sizes, fusion_layers).with_depth(depth)  # refuses what cannot be built
    return layers, sizes, fusion_layers, depth


def _depth(of: Structure, layers: Mapping[str, Any], redrawn: tuple[str, ...]) -> tuple[dict[str, int], dict[str, Any]]:
    """Numbers of layers of towers that take none of the teacher's and have more than it; and `layers` with as many there as it has."""
    there = of.layers()
    free = {tower: count for tower, count in layers.items() if tower in redrawn and tower in there and isinstance(count, int)}
    deeper = {tower: count for tower, count in free.items() if count > there[tower]}
    if huge := [tower for tower, count in deeper.items() if count > MOST_LAYERS]:
        raise BadInput(f"{deeper[huge[0]]} {huge[0]} layers", f"there can be 0 to {MOST_LAYERS}", "ask for fewer")
    return deeper, {**layers, **{tower: there[tower] for tower in deeper}}
