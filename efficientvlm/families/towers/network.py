"""What a network built of these towers knows of itself: its units, and which tower a tensor belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import GatePoint, Unit
from efficientvlm.families.network import Graph, require
from efficientvlm.families.towers.attention import Context
from efficientvlm.families.towers.layers import Layer
from efficientvlm.families.towers.parts import HIDDEN, NOTHING, SELF_ATTENTION, Encoded, normalise
from efficientvlm.families.towers.swin import Swin
from efficientvlm.families.towers.vit import Vit


class TowerNetwork(PreTrainedModel):
    """In front of a family's networks; methods without a description are those of :class:`families.network.Network` and its abilities.

    `places` says under which name each tower has its layers, `owners` to which tower other tensors belong, by the first part of their
    names; what is left is counted under `heads`.
    """

    renamed: ClassVar[dict[str, str] | None] = None
    """Patterns of names in older files, and what they are called now."""
    places: ClassVar[dict[str, str]]
    owners: ClassVar[dict[str, str]]
    ends_normalised: ClassVar[bool] = True
    """Whether the states of images are what the norm behind the last layer gives."""
    config: Any
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = (r"\.position_ids$",)  # numbers that older files hold

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, though this is outside transformers, which asks `_init_weights` about modules without tensors only where this is False."""
        return False

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[Any, list[str]]:
        """As :meth:`families.network.Network.gain`; what is not there from the start cannot be gained."""
        require(self, ability)
        return self, []

    def resized(self, image_size: int) -> Any:
        """As :meth:`families.network.Resizes.resized`; what is published of other families says nothing of other sizes."""
        if image_size == self.config.sizes().image_size:
            return self
        why = f"a network of type {self.config.model_type} keeps the size that it was made for"
        raise BadInput(f"image_size is {image_size}", why, f"leave it out, or use {self.config.sizes().image_size}")

    def completed(self) -> Any:
        """The network of the layout of transformers' class that computes what this one does, of which nothing was removed; this one where
        it has that layout, or none has."""
        return self

    def reshaped(self, config: Any, tables: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
        """The network of `config` with these weights, and with what `tables` makes of their state instead of what has another shape there;
        on the same device."""
        with torch.device(self.device):
            new = type(self)(config)
        if self.device.type != "meta":
            state = self.state_dict()
            new.load_state_dict(state | tables(state))
        return new.train(self.training)

    @property
    def images(self) -> Vit | Swin:
        """The tower of images."""
        tower = self.get_submodule(next(name for name, owner in self.owners.items() if owner == "vision"))
        assert isinstance(tower, Vit | Swin)
        return tower

    def encode_image(self, pixels: Tensor, regions: tuple[Tensor, Tensor] | None = None, keep: frozenset[str] = NOTHING) -> Encoded:
        """Images [I, 3, H, W] (uint8, or normalised floats) to states [I, T, W]; with `regions` as the tower says."""
        tower = self.images
        out: Encoded = tower(normalise(pixels, self.config.image_mean, self.config.image_std, tower.dtype), regions, keep)
        if self.ends_normalised:
            out.states = tower.finish(out.states, regions)
        return out

    def image_feature(self, states: Tensor) -> Tensor:
        """States [B, T, W] of images to unit vectors [B, E]; only of networks that compare features."""
        raise NotImplementedError

    def pooled_image(self, states: Tensor) -> Tensor:
        """States [B, T, W] of images to what of them is projected to be a feature [B, W]."""
        return states[:, 0]

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encode_image(pixels).states
        return states, self.image_feature(states)

    def attended(self, states: Tensor, rows: Tensor | None = None) -> Context:
        """What captions attend to of images whose states are [I, T, W]; `rows` [C] names the image of each, in order by default."""
        raise NotImplementedError

    def look(self, pixels: Tensor) -> Context:
        return self.attended(self.encode_image(pixels).states)

    @property
    def exportable(self) -> bool:
        """Whether :meth:`graphs` has some of a network of these heads; no weights are looked at."""
        return True

    def graphs(self) -> list[Graph]:
        """The few graphs that the network's task needs, in the order in which they run.

        Raises:
            BadInput: nothing is made of a network of this kind.
        """
        what = f"no ONNX graphs are made of a model of type {self.config.model_type}"
        raise BadInput(what, "its network describes none", "use --format padded")

    def units(self) -> list[Unit]:
        units: list[Unit] = []
        for group, indices in self.config.kept_indices().items():
            tower, number, kind = group.split(".")
            prefix = f"{self.places[tower]}.{number}"
            layer = self.get_submodule(prefix)
            assert isinstance(layer, Layer)
            for position, index in enumerate(indices):
                sites = layer.sites(prefix, kind, position)
                columns = (site for site in sites if site.dim == 1 and site.tensor.endswith(".weight"))  # inputs of a Linear
                gates = (GatePoint(site.tensor.removesuffix(".weight"), site.start, site.stop) for site in columns)
                units.append(Unit(tower, int(number), kind, index, sites, tuple(gates)))
        return units

    def whole_units(self) -> list[Unit]:
        """Heads and neurons that no pruning removes, but of which a narrower network has fewer; here none."""
        return []

    @classmethod
    def tower_of(cls, parameter: str) -> str:
        return cls.owners.get(parameter.partition(".")[0], "heads")

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        raise NotImplementedError

    @classmethod
    def source_name(cls, parameter: str, layers: dict[str, list[int]]) -> str:
        for tower, place in cls.places.items():
            if parameter.startswith(f"{place}."):
                number, _, tail = parameter.removeprefix(f"{place}.").partition(".")
                return f"{place}.{layers[tower][int(number)]}.{tail}"
        return parameter


def blank_batch(side: int, count: int, length: int, device: Any, *, texts: str, answers: bool) -> dict[str, Any]:
    """`count` black images of `side` pixels, a text of `length` tokens with each, called `texts` (text, question), a token of an answer."""
    rows, ones = torch.arange(count, device=device), torch.ones(count, length, dtype=torch.long, device=device)
    pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
    batch: dict[str, Any] = {"pixels": pixels, "image_index": rows, f"{texts}_ids": ones, f"{texts}_mask": ones}
    return batch | ({"answer_ids": ones[:, :1], "answer_mask": ones[:, :1], "answer_index": rows} if answers else {})


def blank_pairs(side: int, count: int, length: int, device: Any) -> dict[str, Any]:
    """`count` pairs of black images of `side` pixels, and a text of `length` tokens about each."""
    batch = blank_batch(side, count, length, device, texts="text", answers=False)
    rows = batch.pop("image_index")
    return {**batch, "second_pixels": batch["pixels"].clone(), "pair_index": rows}


def asked(config: Any, attentions: bool | None, hidden: bool | None) -> frozenset[str]:
    """What a pass keeps that is called as transformers' classes are; None leaves it to the configuration."""
    wanted = {SELF_ATTENTION: config.output_attentions if attentions is None else attentions}
    wanted[HIDDEN] = config.output_hidden_states if hidden is None else hidden
    return frozenset(kind for kind, want in wanted.items() if want)
