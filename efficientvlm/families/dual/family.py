"""Dual encoders with a backbone of transformers: our folders, and those that transformers' own dual encoder opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.checks import check_config, check_id
from efficientvlm.families.dual.backbones import BACKBONES
from efficientvlm.families.dual.config import STOCK, DualConfig
from efficientvlm.families.dual.network import MODELS, TOWER
from efficientvlm.families.family import Family
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import advice, image_statistics, open_config, open_model, read_json
from efficientvlm.families.weights import floats, read_folder

CONFIGS: dict[str, Any] = {STOCK[0]: DualConfig, **{kind.model_type: kind for kind in MODELS}}
OWN = {kind.model_type for kind in MODELS}


class DualEncoders(Family):
    name = "dual"
    model_types = tuple(CONFIGS)
    models = MODELS

    def read_config(self, path: Path) -> Any:
        file = path / "config.json"
        values = read_json(file)
        kind = CONFIGS.get(str(values.get("model_type")))
        if kind is None:
            why = f"this family opens {', '.join(CONFIGS)}"
            raise BadInput(f"{path} holds a model of type {values.get('model_type')!r}", why, "give a model of one of these types")
        for name, known in (("vision_config", tuple(BACKBONES)), ("text_config", ("clip_text_model", "siglip_text_model"))):
            part = values.get(name)
            found = part.get("model_type") if isinstance(part, dict) else None
            if found not in known:
                why = f"dual encoders are opened with {', '.join(known)} there"
                raise BadInput(f"{file}: {name} is of type {shorten(found)}", why, "give a model of one of these types")
        part = values["vision_config"]
        statistics = image_statistics(path, values, (CLIP_MEAN, CLIP_STD), kind.processor)
        pooling = {"image_pooling": values.get("image_pooling", BACKBONES[part["model_type"]].pooling)}
        config = open_config(kind, {**values, **statistics, **pooling}, file)
        config.vision_config = config.backbone.check(config.vision_config, str(file))
        check_config(config, str(file))
        if values["model_type"] in OWN or not isinstance(config.end, int):
            check_id("the id that ends a text", config.end, config.text_config.vocab_size, str(file))
        check_shapes(self, config, path)
        return config

    def load(self, path: Path) -> Any:
        config = self.read_config(path)
        if read_json(path / "config.json")["model_type"] in OWN:
            return open_model(self.models[type(config)], path, config)
        tensors = read_folder(path)
        model = self.build(config)
        texts = {name: tensor for name, tensor in tensors.items() if not name.startswith(TOWER) and not name.endswith("position_ids")}
        images = {name.removeprefix(TOWER): tensor for name, tensor in tensors.items() if name.startswith(TOWER)}
        state, left = images_of(model, images)
        return filled(model, texts | state, left, path)

    def save(self, model: Any, folder: Path) -> None:
        """As transformers' own dual encoder has it where that computes the same."""
        if model.config.opened_by is None:
            return super().save(model, folder)
        config, state = model.config, model.state_dict()
        own = {name.removeprefix(TOWER): tensor for name, tensor in state.items() if name.startswith(TOWER)}
        theirs = {f"{TOWER}{name}": tensor for name, tensor in config.backbone.to_stock(own, config.vision_config).items()}
        theirs |= {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = {**config.to_dict(), "vision_config": config.backbone.stock(config.vision_config), "dtype": "float32"}
        values |= {"model_type": STOCK[0], "architectures": [STOCK[1]]}
        (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return None


def images_of(model: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a backbone's own files, by their names there, as `model` has them; and names of those that have no place in it."""
    config, own = model.config, [name.removeprefix(TOWER) for name in model.state_dict() if name.startswith(TOWER)]
    state, left = config.backbone.from_stock(tensors, config.vision_config, own)
    return {f"{TOWER}{name}": tensor for name, tensor in state.items()}, left


def filled(model: Any, state: dict[str, Tensor], left: list[str], where: Path, fresh: tuple[str, ...] = ()) -> Any:
    """`model` with the tensors of `state`, float32, in evaluation mode; those that are `fresh` stay as they were drawn.

    Raises:
        BadInput: tensors that are missing, surplus (`left`), of another shape, or not finite.
    """
    own = model.state_dict()
    missing = sorted(name for name in own if name not in state and not name.startswith(fresh or ("\0",)))
    surplus = sorted([*left, *(name for name in state if name not in own)])
    wrong = sorted(name for name in state if name in own and state[name].shape != own[name].shape)
    found = {"missing keys": missing, "unexpected keys": surplus, "mismatched keys": wrong}
    if said := [f"{len(names)} {what}, first {names[0]}" for what, names in found.items() if names]:
        raise BadInput(f"{where}: weights do not fit config.json", "; ".join(said), advice(where))
    for name, tensor in state.items():
        if (values := floats(tensor)) is None:
            raise BadInput(f"{where} holds damaged weights", f"{name} is not all finite floats", advice(where))
        own[name].copy_(values)
    return model.eval()
