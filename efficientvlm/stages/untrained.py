"""prune --task none: cut by the weights alone, without data and without training; for networks whose task cannot be trained here."""

from __future__ import annotations

from typing import Any

from efficientvlm.checkpoint import require_complete
from efficientvlm.compression.snapping import snap_scores
from efficientvlm.compression.surgery import slice_model
from efficientvlm.control import Control
from efficientvlm.manifest import Manifest
from efficientvlm.settings.stages import Prune
from efficientvlm.stages.common import load, making, open_output, write
from efficientvlm.stages.cutting import cut_report, say_cut, scope_of
from efficientvlm.stages.influence import of_anything, tell


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
        extra = {**cut_report(scope, keep, None), "dense_kept": model.config.kept}
        say_cut(extra, control.quiet)
        loaded.model = slice_model(family, model, keep)
        extra["influence"] = of_anything(loaded)
        tell("prune", extra["influence"], control.quiet)
        common: dict[str, Any] = {"control": control, "image_processor": loaded.image_processor, "extra": extra}
        return write(output, family, loaded.model, loaded.tokenizer, **common)
