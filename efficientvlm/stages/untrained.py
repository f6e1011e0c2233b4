"""prune --task none: cut by the weights alone, without data and without training; for networks whose task cannot be trained here."""

from __future__ import annotations

from efficientvlm.checkpoint import require_complete
from efficientvlm.compression.snapping import snap_scores
from efficientvlm.compression.surgery import slice_model
from efficientvlm.config import Prune
from efficientvlm.control import Control
from efficientvlm.manifest import Manifest
from efficientvlm.stages.common import load, making, open_output, write
from efficientvlm.stages.cutting import budget_report, say_budget, scope_of


def run(config: Prune, control: Control) -> Manifest:
    """Remove the units that `config.method` scores lowest until the budget is met.

    Raises:
        TargetMissed: the sparsity cannot be reached.
    """
    loaded = load(config.model)
    family, model = loaded.family, loaded.model
    scope = scope_of(config, family, model)
    output = open_output(config, "prune", control, {"model": config.model})
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        from efficientvlm.compression.importance import importance_scores  # Torch-Pruning takes seconds to import

        assert config.method != "l0"
        keep = snap_scores(importance_scores(config.method, model, scope.units, seed=config.seed), scope)
        budget = budget_report(scope, keep, None)
        say_budget(budget, control.quiet)
        return write(
            output,
            family,
            slice_model(family, model, keep),
            loaded.tokenizer,
            control=control,
            image_processor=loaded.image_processor,
            extra={"budget": budget, "dense_kept": model.config.kept},
        )
