"""shrink: a student with fewer layers, initialised from the teacher's own."""

from __future__ import annotations

from typing import Any

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.compression.layers import resolve_layers, shrink_model
from efficientvlm.control import Control
from efficientvlm.loaded import Loaded, load
from efficientvlm.settings.stages import Shrink
from efficientvlm.stages.common import making, open_output, write
from efficientvlm.stages.workspace import Workspace


def run(config: Shrink, control: Control) -> Manifest:
    """Keep the chosen layers of each tower (every second one by default); everything else is copied."""
    _, layers = prepare(config, Workspace(control.quiet))
    output = open_output(config, "shrink", control, {"model": config.model})
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        teacher = load(config.model)
        student = shrink_model(teacher.model, layers)
        kept: dict[str, Any] = {"tokenizer": teacher.tokenizer, "image_processor": teacher.image_processor}
        return write(output, teacher.family, student, **kept, control=control, extra={"layers": layers})


def prepare(config: Shrink, workspace: Workspace) -> tuple[Loaded, dict[str, list[int]]]:
    """The shapes of the teacher, and which of its layers the student has."""
    teacher = workspace.checkpoint(config.model)
    return teacher, resolve_layers(teacher.model.config.layers(), config.layers)
