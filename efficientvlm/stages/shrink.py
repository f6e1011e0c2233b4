"""shrink: a student with fewer layers, initialised from the teacher's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.control import Control
from efficientvlm.loaded import Loaded, load
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.workspace import Job, Workspace, inputs_of


@dataclass(frozen=True)
class Shrinking(Job):
    """The shapes of the teacher, and which of its layers the student has."""

    teacher: Loaded
    layers: dict[str, list[int]]


def run(config: Shrink, control: Control) -> Manifest:
    """Keep the chosen layers of each tower (every second one by default); everything else is copied."""
    job = prepare(config, Workspace(control.quiet))
    output = open_output(config, "shrink", control, inputs_of(job))
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        teacher = load(config.model)
        student = shrink_model(teacher.model, job.layers)
        kept: dict[str, Any] = {"tokenizer": teacher.tokenizer, "image_processor": teacher.image_processor}
        return write(output, teacher.family, student, **kept, control=control, extra={"layers": job.layers})


def prepare(config: Shrink, workspace: Workspace) -> Shrinking:
    """:class:`BadInput` for layers that the teacher does not have."""
    teacher = workspace.checkpoint(config.model)
    return Shrinking(teacher, resolve_layers(teacher.model.config, config.layers), inputs={"model": config.model})
