"""What a network built of these towers knows of itself: its units, and which tower a tensor belongs to."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedModel

from efficientvlm.families.anatomy import GatePoint, Unit
from efficientvlm.families.network import require
from efficientvlm.families.towers.attention import Cache
from efficientvlm.families.towers.layers import Layer
from efficientvlm.families.towers.parts import HIDDEN, SELF_ATTENTION


class TowerNetwork(PreTrainedModel):
    """In front of a family's networks.

    `places` says under which name each tower has its layers, `owners` to which tower other tensors belong, by the first part of their
    names; what is left is counted under `heads`.
    """

    renamed: ClassVar[dict[str, str] | None] = None
    """Patterns of names in older files, and what they are called now."""
    places: ClassVar[dict[str, str]]
    owners: ClassVar[dict[str, str]]
    config: Any
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = (r"\.position_ids$",)  # numbers that older files hold

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, though this is outside transformers, which asks `_init_weights` about modules without tensors only where this is False."""
        return False

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[Any, list[str]]:
        """This network made able to do `ability`, and the names of its tensors that are new.

        Args:
            donor: a network that is able, or None.
            decoder_init: `auto`, `teacher` or `fusion`, where a new answer decoder comes from.

        Raises:
            BadInput: it cannot be made able.
        """
        require(self, ability)
        return self, []

    def new_cache(self) -> Cache:
        """An empty key/value cache for `decode`."""
        return Cache()

    def units(self) -> list[Unit]:
        """Every removable unit that is present, ordered by tower, layer, kind, index."""
        units: list[Unit] = []
        for group, indices in self.config.kept_indices().items():
            tower, number, kind = group.split(".")
            prefix = f"{self.places[tower]}.{number}"
            layer = self.get_submodule(prefix)
            assert isinstance(layer, Layer)
            for position, index in enumerate(indices):
                sites = layer.sites(prefix, kind, position)
                last = sites[-1]
                gates = (GatePoint(last.tensor.removesuffix(".weight"), last.start, last.stop),)
                units.append(Unit(tower, int(number), kind, index, sites, gates))
        return units

    @classmethod
    def tower_of(cls, parameter: str) -> str:
        """The tower a state-dict name is counted under, or `heads`."""
        return cls.owners.get(parameter.partition(".")[0], "heads")

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        """Whether a state-dict name is a token, position or type embedding table."""
        raise NotImplementedError

    @classmethod
    def source_name(cls, parameter: str, layers: dict[str, list[int]]) -> str:
        """Name in the larger network of the tensor that initialises `parameter` of the network with `layers`."""
        for tower, place in cls.places.items():
            if parameter.startswith(f"{place}."):
                number, _, tail = parameter.removeprefix(f"{place}.").partition(".")
                return f"{place}.{layers[tower][int(number)]}.{tail}"
        return parameter


def asked(config: Any, attentions: bool | None, hidden: bool | None) -> frozenset[str]:
    """What a pass keeps that is called as transformers' classes are; None leaves it to the configuration."""
    wanted = {SELF_ATTENTION: config.output_attentions if attentions is None else attentions}
    wanted[HIDDEN] = config.output_hidden_states if hidden is None else hidden
    return frozenset(kind for kind, want in wanted.items() if want)
