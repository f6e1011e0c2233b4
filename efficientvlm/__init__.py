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

AUTO = "transformers.models.auto.modeling_auto"


def load(path: str) -> Any:
    """The model in a checkpoint folder, or in `bundled:NAME`: float32, evaluation mode, of whatever shape it was pruned to.

    Raises:
        efficientvlm.errors.BadInput: an unfinished or damaged folder.
    """
    from efficientvlm import checkpoint, families, files

    checkpoint.require_complete(path)
    folder = files.resolve(path)
    return families.of_folder(folder).load(folder)


def _register() -> None:
    """Make our families known to transformers' Auto classes."""
    from transformers import AutoConfig, AutoModel

    from efficientvlm import families

    for family in map(families.get, families.NAMES):
        for config_class, model_class in family.auto_classes:
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            AutoModel.register(config_class, model_class, exist_ok=True)


class _WhenAutoLoads(importlib.abc.MetaPathFinder):
    """Registers the families right after transformers loads its Auto classes, so that importing this package costs nothing."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenAutoLoads())
