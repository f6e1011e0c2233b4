"""Model families, by the `model_type` of their configuration."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientvlm.checkpoints.manifest import read_json
from efficientvlm.errors import BadInput
from efficientvlm.runtime.memory import uncollected

if TYPE_CHECKING:
    from efficientvlm.families.family import Family  # it loads torch

AUTO = "transformers.models.auto.modeling_auto"
FAMILIES = {
    "xvlm": "efficientvlm.families.xvlm.family:XVLM",
    "clip": "efficientvlm.families.clip.family:CLIP",
    "dual": "efficientvlm.families.dual.family:DualEncoders",
    "blip": "efficientvlm.families.blip.family:BLIP",
}
"""The families by name, as `module:class`; a module is imported when its family is asked for."""


@cache
def get(name: str) -> Family:
    """The family called `name`, known to transformers' Auto classes once those are loaded; :class:`BadInput` lists the known names."""
    if name not in FAMILIES:
        raise BadInput(f"unknown model family {name!r}", f"known are {', '.join(FAMILIES)}", "use one of them")
    with uncollected():
        module, _, kind = FAMILIES[name].partition(":")
        family: Family = getattr(import_module(module), kind)()
    if AUTO in sys.modules:
        register(family)
    return family


def register(family: Family) -> None:
    """Make the classes of `family` known to transformers' Auto classes."""
    from transformers import AutoConfig, AutoModel

    for config_class, model_class in family.models.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)


def of_folder(path: Path) -> Family:
    """The family of the checkpoint folder `path`, from its `config.json`."""
    file = path / "config.json"
    if not file.exists():
        if (path / "onnx.json").is_file():
            why = "they can be asked, evaluated and timed, not changed"
            raise BadInput(f"{path} holds ONNX graphs", why, "give the checkpoint they were exported from")
        raise BadInput(f"{path} is not a checkpoint folder", "it has no config.json", "give the folder that holds the model")
    config = read_json(file)
    if not isinstance(config, dict) or "model_type" not in config:
        why = "it does not say which family of models it is of (model_type)"
        raise BadInput(f"{file} is not the configuration of a model", why, "give a checkpoint folder, or a model in transformers' format")
    name = config["model_type"]
    for family in map(get, FAMILIES):
        if name in family.model_types:
            return family
    known = ", ".join(kind for family in map(get, FAMILIES) for kind in family.model_types)
    raise BadInput(f"{path} holds a model of type {name!r}", f"this package opens {known}", "give a model of one of these types")


def of_stock(model: Any) -> Any:
    """A network of ours with the values of a model of transformers' own class (CLIP, SigLIP, BLIP), called as that is; copied, not shared.

    Raises:
        BadInput: a class that no family opens, or sizes that it refuses.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as place:
        folder = Path(place)
        values = model.config.to_dict() | {"architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(values, default=str), "utf-8")
        family = of_folder(folder)
        config = family.read_config(folder)
    network, state = family.build(config), model.state_dict()
    extra = [name for name in state if name.endswith("position_ids")]
    network.load_state_dict({name: value for name, value in state.items() if name not in extra}, strict=True)
    example = next(model.parameters())
    return network.to(example.device, example.dtype).train(model.training)
