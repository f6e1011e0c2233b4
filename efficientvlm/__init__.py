"""Make a large vision-language model small and fast: shrink, distill, prune, finetune.

`load` opens a checkpoint folder. Once this package is imported, `transformers.AutoModel.from_pretrained` opens one too. Importing it loads
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "of_stock": "families",
    "count_parameters": "compression.accounting",
    "count_macs": "compression.accounting",
    "Pruner": "compression.pruner",
    "Scope": "compression.sparsity",
    "Gates": "compression.gates",
    "snap": "compression.snapping",
    "snap_scores": "compression.snapping",
    "slice_model": "compression.surgery",
    "pad_model": "compression.surgery",
}
"""What is offered beside `load`, and the module that it comes from when it is first asked for; see docs/library.md."""
AUTO = "transformers.models.auto.configuration_auto"


def load(path: str) -> Any:
    """The model in a checkpoint folder, or in `bundled:NAME`: float32, evaluation mode, of whatever shape it was pruned to.

    Raises:
        efficientvlm.errors.BadInput: an unfinished or damaged folder.
    """
    from efficientvlm import families
    from efficientvlm.checkpoints import files
    from efficientvlm.checkpoints import folder as checkpoint

    checkpoint.require_complete(path)
    folder = files.resolve(path, checkpoint=True)
    return families.of_folder(folder).load(folder)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'efficientvlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"efficientvlm.{PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])


def _register_on_first_use(module: Any) -> None:
    """Have `AutoConfig` register our families when it is asked for its first configuration.

    Not earlier: it is loaded in the middle of what the families import.
    """
    auto = module.AutoConfig
    original = auto.__dict__["from_pretrained"]

    def from_pretrained(_: type, *args: Any, **options: Any) -> Any:
        from efficientvlm import families

        auto.from_pretrained = original
        for name in families.FAMILIES:
            families.register(families.get(name))
        return auto.from_pretrained(*args, **options)

    auto.from_pretrained = classmethod(from_pretrained)


class _WhenAutoLoads(importlib.abc.MetaPathFinder):
    """Waits for transformers to load `AutoConfig`, so that importing this package costs nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register_on_first_use(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if AUTO in sys.modules:
    _register_on_first_use(sys.modules[AUTO])
else:
    sys.meta_path.insert(0, _WhenAutoLoads())
