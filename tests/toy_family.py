"""A second, deliberately odd family: what the toolkit does to it must follow from the anatomy alone.

Vision: plain attention and a plain FFN. Text: layer 0 has one fused qkv Linear, layer 1 key/value heads shared by two query heads each, and
cross-attention to vision; its FFN is gated (two input sites a neuron). The token table and the output Linear are one tensor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, NEURON, Flow, GatePoint, Site, Unit
from efficientvlm.families.network import Record, check_taps
from efficientvlm.families.structure import Structure

SHARED = 2  # query heads a key/value head


@dataclass
class ToyConfig:
    width: int = 16
    heads: int = 4
    neurons: int = 10
    vision_layers: int = 2
    text_layers: tuple[str, ...] = ("fused", "shared")
    vocab: int = 11
    image_size: int = 8
    kept: dict[str, list[int]] = field(default_factory=dict)

    model_type = "toy"

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def layers(self) -> dict[str, int]:
        return {"vision": self.vision_layers, "text": len(self.text_layers)}

    def original_counts(self) -> dict[str, int]:
        counts = {}
        for tower, layouts in (("vision", ("plain",) * self.vision_layers), ("text", self.text_layers)):
            for layer, layout in enumerate(layouts):
                counts[f"{tower}.{layer}.{HEAD}"] = self.heads
                if layout == "shared":
                    counts[f"{tower}.{layer}.{CROSS_HEAD}"] = self.heads
                counts[f"{tower}.{layer}.{NEURON}"] = self.neurons
        return counts

    def kept_indices(self) -> dict[str, list[int]]:
        return {group: list(self.kept.get(group, range(count))) for group, count in self.original_counts().items()}

    def flows(self) -> list[Flow]:
        crossing = tuple(f"text.{layer}.{CROSS_HEAD}" for layer, layout in enumerate(self.text_layers) if layout == "shared")
        return [Flow("image", "vision"), Flow("vision", "text", crossing), Flow("text", "logits"), Flow("words", "text")]

    def with_kept(self, kept: dict[str, list[int]]) -> ToyConfig:
        changed = copy.deepcopy(self)
        changed.kept = {**changed.kept, **{group: list(indices) for group, indices in kept.items()}}
        return changed

    choose = Structure.choose

    def with_layers(self, layers: dict[str, list[int]]) -> ToyConfig:
        changed = copy.deepcopy(self)
        changed.vision_layers = len(layers["vision"])
        changed.text_layers = tuple(self.text_layers[layer] for layer in layers["text"])
        changed.kept = {}
        for tower, sources in layers.items():
            for new, old in enumerate(sources):
                for group, kept in self.kept.items():
                    if group.startswith(f"{tower}.{old}."):
                        changed.kept[f"{tower}.{new}.{group.split('.')[2]}"] = list(kept)
        return changed


class OnlyBias(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))


class Attention(nn.Module):
    """`layout`: plain, fused or shared; `kept` are the original query heads."""

    def __init__(self, config: ToyConfig, kept: list[int], layout: str) -> None:
        super().__init__()
        self.kept, self.layout, self.head_width = kept, layout, config.head_width
        width, inner = config.width, len(kept) * config.head_width
        if not kept:
            self.out = OnlyBias(width)
            return
        if layout == "fused":
            self.qkv = nn.Linear(width, 3 * inner)
        else:
            self.kv_kept = sorted({head // SHARED for head in kept}) if layout == "shared" else kept
            self.q = nn.Linear(width, inner)
            self.k = nn.Linear(width, len(self.kv_kept) * config.head_width)
            self.v = nn.Linear(width, len(self.kv_kept) * config.head_width)
        self.out = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if not self.kept:
            return self.out.bias.expand_as(x)
        if self.layout == "fused":
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = self.q(x), self.k(source), self.v(source)
        q, k, v = (part.reshape(*part.shape[:2], -1, self.head_width).transpose(1, 2) for part in (q, k, v))
        if self.layout == "shared":
            use = torch.tensor([self.kv_kept.index(head // SHARED) for head in self.kept])
            k, v = k[:, use], v[:, use]
        context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(context.reshape(*x.shape[:2], -1))


class FFN(nn.Module):
    def __init__(self, config: ToyConfig, kept: list[int], gated: bool) -> None:
        super().__init__()
        self.kept, self.gated = kept, gated
        if not kept:
            self.fc2 = OnlyBias(config.width)
            return
        self.fc1 = nn.Linear(config.width, len(kept))
        if gated:
            self.up = nn.Linear(config.width, len(kept), bias=False)
        self.fc2 = nn.Linear(len(kept), config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.kept:
            return self.fc2.bias.expand_as(x)
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden * self.up(x) if self.gated else hidden)


class Layer(nn.Module):
    def __init__(self, config: ToyConfig, tower: str, number: int, layout: str) -> None:
        super().__init__()
        kept = config.kept_indices()
        self.norm = nn.LayerNorm(config.width)
        self.attention = Attention(config, kept[f"{tower}.{number}.{HEAD}"], layout)
        if layout == "shared":
            self.cross = Attention(config, kept[f"{tower}.{number}.{CROSS_HEAD}"], "plain")
        self.ffn = FFN(config, kept[f"{tower}.{number}.{NEURON}"], gated=tower == "text")

    def forward(self, x: torch.Tensor, vision: torch.Tensor | None = None) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y)
        if hasattr(self, "cross"):
            x = x + self.cross(self.norm(x), vision)
        return x + self.ffn(self.norm(x))


class ToyModel(nn.Module):
    taps: frozenset[str] = frozenset({"logits"})

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Linear(3 * 16, config.width)
        self.vision = nn.ModuleList(Layer(config, "vision", i, "plain") for i in range(config.vision_layers))
        self.words = nn.Embedding(config.vocab, config.width)
        self.text = nn.ModuleList(Layer(config, "text", i, layout) for i, layout in enumerate(config.text_layers))
        self.output = nn.Linear(config.width, config.vocab)
        self.output.weight = self.words.weight

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        batch, _, size, _ = image.shape
        patches = image.reshape(batch, 3, size // 4, 4, size // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 48)
        x = self.patches(patches)
        for layer in self.vision:
            x = layer(x)
        y = self.words(text)
        for layer in self.text:
            y = layer(y, x)
        return self.output(y)

    def tower_of(self, parameter: str) -> str:
        tower = parameter.split(".")[0]
        return {"vision": "vision", "patches": "vision", "text": "text", "words": "text"}.get(tower, "heads")

    def is_embedding(self, parameter: str) -> bool:
        return parameter == "words.weight"

    def units(self) -> list[Unit]:
        units = []
        for group, kept in self.config.kept_indices().items():
            tower, layer, kind = group.split(".")
            units += _units(self.config, tower, int(layer), kind, kept)
        return units

    def source_name(self, parameter: str, layers: dict[str, list[int]]) -> str:
        tower, *rest = parameter.split(".")
        return ".".join([tower, str(layers[tower][int(rest[0])]), *rest[1:]]) if tower in layers else parameter

    def run(self, batch: dict[str, Any], want: Any = ()) -> Record:
        check_taps(self, want)
        return Record(logits=self(batch["image"], batch["text"]))

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        image = torch.rand(batch_size, 3, self.config.image_size, self.config.image_size, device=device)
        return {"image": image, "text": torch.randint(1, self.config.vocab, (batch_size, text_length), device=device)}


def _units(config: ToyConfig, tower: str, layer: int, kind: str, kept: list[int]) -> list[Unit]:
    base = f"{tower}.{layer}"
    if kind == NEURON:
        inputs = ("fc1.weight", "fc1.bias") + (("up.weight",) if tower == "text" else ())
        return [
            Unit(
                tower,
                layer,
                kind,
                index,
                (*(Site(f"{base}.ffn.{name}", 0, i, i + 1) for name in inputs), Site(f"{base}.ffn.fc2.weight", 1, i, i + 1)),
                (GatePoint(f"{base}.ffn.fc2", i, i + 1),),
            )
            for i, index in enumerate(kept)
        ]
    name = f"{base}.{'cross' if kind == CROSS_HEAD else 'attention'}"
    layout = "plain" if tower == "vision" or kind == CROSS_HEAD else config.text_layers[layer]
    d = config.head_width
    key_values = sorted({head // SHARED for head in kept})
    units = []
    for i, index in enumerate(kept):
        if layout == "fused":
            rows = [("qkv", part * len(kept) + i) for part in range(3)]
        else:
            kv = key_values.index(index // SHARED) if layout == "shared" else i
            rows = [("q", i), ("k", kv), ("v", kv)]
        sites = [Site(f"{name}.{linear}.{what}", 0, row * d, (row + 1) * d) for linear, row in rows for what in ("weight", "bias")]
        sites.append(Site(f"{name}.out.weight", 1, i * d, (i + 1) * d))
        units.append(Unit(tower, layer, kind, index, tuple(sites), (GatePoint(f"{name}.out", i * d, (i + 1) * d),)))
    return units
