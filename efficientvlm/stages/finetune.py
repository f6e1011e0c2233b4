"""finetune: train a model of any stage on its task, with or without a teacher."""

from __future__ import annotations

from efficientvlm.control import Control
from efficientvlm.manifest import Manifest
from efficientvlm.settings.stages import Finetune
from efficientvlm.stages.common import finished, making, open_output
from efficientvlm.stages.tuning import Tuning


def run(config: Finetune, control: Control) -> Manifest:
    """Train on the task and write the tuned checkpoint, with its validation accuracy in the manifest."""
    tuning = Tuning.open(config, quiet=control.quiet)
    output = open_output(config, "finetune", control, tuning.inputs)
    if output.up_to_date:
        return finished(output)
    with making(output):
        objective = tuning.objective()
        spent = tuning.train(objective, output, control)
        return tuning.finish(output, control, spent)
