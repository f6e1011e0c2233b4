"""A picture of which heads and neurons each model kept."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints.files import write_atomic

Layer = dict[str, tuple[list[int], int]]
"""Kind → original indices of the units kept, and how many there were."""

Structure = dict[str, tuple[list[int], int]]
"""The same by group, `tower.layer.kind`."""

COLOURS = ("#2a6fbb", "#d9822b", "#2e9e6b", "#8a5cc2", "#b8475a", "#5f6b7a")
GREY, INK = "#aeb6c1", "#1f2733"
CROSSING = ("cross_head", "second_cross_head")
HOW_TO_READ = "A row is a layer: squares are its attention heads, the bar its neurons. Filled is kept, hollow is removed."


def structure_figure(structures: Mapping[str, Structure], path: Path, captions: Mapping[str, str] | None = None) -> None:
    """PNG of what each model kept: a column a model, a block a tower, a row a layer.

    Models of the same structure share a column. `captions` are shown below the label of a model.
    """
    from matplotlib.figure import Figure

    columns: list[tuple[list[str], Structure]] = []
    for label, structure in structures.items():
        same = next((names for names, other in columns if other == structure), None)
        if same is None:
            columns.append(([label], structure))
        else:
            same.append(label)
    drawings = [_blocks(structure) for _, structure in columns]
    towers = list(dict.fromkeys(tower for blocks in drawings for tower in blocks))
    rows = {tower: max(len(blocks.get(tower, [])) for blocks in drawings) for tower in towers}
    heads = max((of for _, structure in columns for group, (_, of) in structure.items() if not group.endswith(".neuron")), default=1)
    crossed, twice = (any(group.endswith(f".{kind}") for _, structure in columns for group in structure) for kind in CROSSING)

    line = max(1.0, heads / 7)  # height of a line of text, in heads
    wide = max(heads, 5 * line)
    places = {"head": 0.0, "neuron": wide + line, "cross_head": wide + 9.5 * line}
    places["second_cross_head"] = places["cross_head"] + max(heads, 8 * line) + line
    last = "second_cross_head" if twice else "cross_head"
    span = max(places[last] + wide if crossed else places["neuron"] + 7.5 * line, 12 * line)
    left, top, gap = 4.5 * line, 5.3 * line, 2 * line
    width = left + len(columns) * (span + gap)
    height = top + sum(rows.values()) + 2.1 * line * len(towers) + 0.6 * line
    unit = 15 / width
    figure = Figure(figsize=(15, height * unit), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    pen = _Pen(axes, 0.5 * line * unit * 72, line, places, 5 * line)
    pen.text(0.5 * line, 0.9 * line, HOW_TO_READ)
    for number, ((labels, _), blocks) in enumerate(zip(columns, drawings, strict=True)):
        x = left + number * (span + gap)
        if number:
            axes.plot((x - gap / 2, x - gap / 2), (2.2 * line, height - line), color="#dfe3e8", linewidth=1)
        pen.text(x, 2.7 * line, " = ".join(labels), 1.6, weight="bold")
        pen.text(x, 3.9 * line, (captions or {}).get(labels[0], ""))
        y = top
        for position, tower in enumerate(towers):
            colour = COLOURS[position % len(COLOURS)]
            y += line
            if number == 0:
                pen.text(0.5 * line, y + rows[tower] / 2, tower, 1.4, weight="bold", color=colour)
            layers = blocks.get(tower, [])
            pen.block(layers, x, y, colour)
            if len(layers) < rows[tower]:
                pen.text(
                    x, y + len(layers) + 0.6 * line, f"{len(layers)} of {rows[tower]} layers" if layers else "no layers", color="#7b8694"
                )
            y += rows[tower] + 1.1 * line
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white", metadata={"Software": ""})
    write_atomic(path, picture.getvalue())


def _blocks(structure: Structure) -> dict[str, list[Layer]]:
    """Tower → its layers in order → kind → kept indices and count."""
    blocks: dict[str, list[Layer]] = {}
    for group, units in structure.items():
        tower, layer, kind = group.split(".")
        layers = blocks.setdefault(tower, [])
        layers += [{} for _ in range(int(layer) + 1 - len(layers))]
        layers[int(layer)][kind] = units
    return blocks


@dataclass
class _Pen:
    """Draws on axes whose unit is the room of one head; `size` of text in points, `line` its height, `places` the offset of each kind."""

    axes: Any
    size: float
    line: float
    places: dict[str, float]
    bar: float

    def text(self, x: float, y: float, words: str, scale: float = 1.0, **style: Any) -> None:
        self.axes.text(x, y, words, size=scale * self.size, va="center", **{"color": INK, **style})

    def box(self, x: float, y: float, width: float, face: str, edge: str) -> None:
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y + 0.12), width, 0.76, facecolor=face, edgecolor=edge, linewidth=0.9))

    def block(self, layers: list[Layer], x: float, y: float, colour: str) -> None:
        """One tower of one model, its first layer at (x, y) and the counts above it."""
        names = {"head": "heads", "neuron": "neurons", "cross_head": "cross-attention", "second_cross_head": "to the second image"}
        for kind, name in names.items():
            start = x + self.places[kind]
            present = [layer[kind] for layer in layers if kind in layer]
            if present:
                kept, of = sum(len(indices) for indices, _ in present), sum(count for _, count in present)
                self.text(start, y - 0.45 * self.line, f"{name} {kept:,}/{of:,}")
            for number, layer in enumerate(layers):
                indices, count = layer.get(kind, ([], 0))
                if kind == "neuron" and count:
                    part = len(indices) / count
                    self.box(start, y + number, self.bar, "white", GREY)
                    self.box(start, y + number, self.bar * part, colour, colour)
                    if part < 1:
                        self.text(start + self.bar + 0.25 * self.line, y + number + 0.5, f"{100 * part:.0f} %")
                elif kind != "neuron":
                    for head in range(count):
                        face, edge = (colour, colour) if head in indices else ("white", GREY)
                        self.box(start + head + 0.1, y + number, 0.8, face, edge)
