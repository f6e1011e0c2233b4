"""`onnx.json`: what a folder of ONNX graphs says of them, checked before any is opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from efficientvlm.checkpoints.manifest import FileName
from efficientvlm.errors import shorten
from efficientvlm.families.checks import HUGE, MOST, MOST_LAYERS, Colours, Many, Pixels
from efficientvlm.families.structure import Sizes
from efficientvlm.settings.base import Strict

ONNX = "onnx.json"
TEXT = ("text_ids", "text_mask")
PORTS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "answer": {
        "question": (("pixels", "question_ids", "question_mask", "image_index"), ("states",)),
        "answer": (("rows", "answer_ids"), ("logits",)),
    },
    "ground": {"ground": (("pixels", "question_ids", "question_mask", "image_index"), ("boxes",))},
    "caption": {"image": (("pixels",), ("image_states",)), "decoder": (("rows", "text_ids"), ("logits",))},
    "embed": {"image": (("pixels",), ("image_features",)), "text": (TEXT, ("text_features",))},
    "match": {"match": ((), ())},
    "compare": {"compare": (("pixels", "second_pixels", "pair_index", *TEXT), ("logits",))},
}
"""What the graphs of a model take and give at least, by what it can do."""
MATCH = ("rows", *TEXT)
"""What the graph `match` takes besides outputs of `image`."""
WRITERS = {"answer": "answer_ids", "decoder": "text_ids"}
"""Graphs that write a text token by token, and the input of its tokens."""
READERS = {"answer": "decoder", "decoder": "decoder", "match": "text"}
"""Graphs whose layers keep keys and values as ports, and the tower those are of."""
RANKS = {"states": 3, "image_states": 3, "boxes": 2, "logits": None, "image_features": 2, "text_features": 2}
"""Dimensions of what the graphs give; `logits` have three of what writes, and two from `match` and `compare`."""
CACHED = re.compile(r"(past|present)_(key|value)_(\d{1,4})", re.ASCII)

Length = Annotated[int, Field(ge=0, le=MOST)]
Axis = Annotated[str, Field(min_length=1, max_length=100)]
Deviation = Annotated[float, Field(gt=0, lt=HUGE)]


class Port(Strict):
    """An input or output: numpy's name of its type, and a number or the name of a dynamic axis for every dimension."""

    type: Literal["float32", "int64"]
    shape: list[Length | Axis] = Field(max_length=8)


class GraphFile(Strict):
    file: FileName
    inputs: dict[str, Port] = Field(min_length=1)
    outputs: dict[str, Port] = Field(min_length=1)
    difference: float = Field(ge=0, description="largest to torch, over several sizes, divided by the largest output where that is above 1")


class StoredSizes(Strict):
    """What :class:`structure.Sizes` holds."""

    image_size: Pixels
    patch_size: Pixels
    max_positions: Many
    vocab_size: int = Field(ge=1, le=MOST, strict=True)
    widths: dict[str, Annotated[list[Length], Field(min_length=1, max_length=MOST_LAYERS + 1)]]
    heads: dict[str, Annotated[list[Length], Field(max_length=MOST_LAYERS)]]
    image_mean: Colours
    image_std: Annotated[list[Deviation], Field(min_length=3, max_length=3)]
    window: Pixels | None = None


class Description(Strict):
    """Contents of `onnx.json`: all that a program needs to run the graphs, beside the tokenizer and `preprocessor_config.json`."""

    format_version: Literal[1] = 1
    family: str = Field(min_length=1)
    able: list[str] = Field(min_length=1, alias="abilities")
    precision: Literal["fp32", "int8"]
    opset: int = Field(ge=1, le=1000)
    tolerance: float = Field(gt=0, description="largest difference to torch that fp32 graphs were allowed")
    graphs: dict[str, GraphFile] = Field(min_length=1)
    stored_sizes: StoredSizes = Field(alias="sizes")
    answers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    rank_top: int = Field(128, ge=1)
    first_token_twice: bool = False
    rank_smoothing: float = Field(0.0, ge=0, lt=1)
    max_tokens: int | None = Field(None, ge=3, le=MOST, description="longest question or text, with its first and last token")
    max_answer_tokens: int = Field(10, ge=1, le=MOST)
    start_token: Length | None = Field(None, description="id that answers and captions begin with")
    end_token: Length | None = Field(None, description="id that answers and captions end with")
    prompt: str | None = Field(None, max_length=1000, description="what captions begin with, behind the start token")
    caption_tokens: Annotated[list[Length], Field(min_length=2, max_length=2)] | None = Field(
        None, description="fewest and most tokens of a caption, start token and prompt included, the end not"
    )
    rerank_by: Literal["matching", "sum"] = Field("matching", description="what orders candidates anew; sum: logit and cosine")
    measured: dict[str, Any] = Field(default_factory=dict)

    @field_validator("graphs")
    @classmethod
    def _run_one_after_the_other(cls, graphs: dict[str, GraphFile], info: ValidationInfo) -> dict[str, GraphFile]:
        needed = [(ability, *graph) for ability in info.data.get("able", ()) for graph in PORTS.get(ability, {}).items()]
        for ability, name, (inputs, outputs) in needed:
            if name not in graphs:
                raise ValueError(f"there is no graph {name}, which the ability {ability} needs")
            missing = [port for port in inputs if port not in graphs[name].inputs] + [p for p in outputs if p not in graphs[name].outputs]
            if missing:
                raise ValueError(f"graph {name} has no {missing[0]}")
            for port in outputs:
                wanted = RANKS[port] or (2 if name == "compare" else 3)
                if len(shape := graphs[name].outputs[port].shape) != wanted:
                    raise ValueError(f"graph {name} gives {port} as {shape}, where {wanted} dimensions are read")
        for name in WRITERS:
            if name in graphs:
                check_cache(name, graphs[name])
        if "caption" in info.data.get("able", ()):
            check_context(graphs["image"], graphs["decoder"])
        if "match" in graphs and "image" in graphs:
            taken, given = graphs["match"].inputs, graphs["image"].outputs
            if strange := sorted({*MATCH} - taken.keys()) + sorted(taken.keys() - {*MATCH} - given.keys()):
                raise ValueError(f"graph match does not go on from graph image: {strange[0]}")
            for name in sorted(taken.keys() - {*MATCH}):
                ours, theirs = given[name].shape[1:], taken[name].shape[1:]
                if ours != theirs or any(isinstance(size, str) for size in theirs):
                    raise ValueError(f"graph image gives {name} as {ours}, graph match takes {theirs}")
            if "logits" not in graphs["match"].outputs or len(graphs["match"].outputs["logits"].shape) != 2:
                raise ValueError("graph match has no logits of two dimensions")
        return graphs

    def sizes(self) -> Sizes:
        values = self.stored_sizes.model_dump()
        by_layer = {name: {tower: tuple(layers) for tower, layers in values[name].items()} for name in ("widths", "heads")}
        return Sizes(**{**values, **by_layer, "image_mean": tuple(values["image_mean"]), "image_std": tuple(values["image_std"])})

    def layers(self) -> dict[str, int]:
        """Layers by tower, as far as a graph shows them by their keys and values; those of other towers are inside the graphs."""
        counts = {"decoder": 0}
        for graph, tower in READERS.items():
            ports = self.graphs[graph].inputs if graph in self.graphs else {}
            keys = {name.rpartition("_")[2] for name in ports if name.removeprefix("past_").startswith(("key_", "value_"))}
            counts[tower] = max(counts.get(tower, 0), len(keys))
        return counts

    def abilities(self) -> frozenset[str]:
        return frozenset(self.able)

    @property
    def model_type(self) -> str:
        return f"{self.family}, ONNX graphs"


def check_context(image: GraphFile, decoder: GraphFile) -> None:
    """ValueError unless the graph `image` gives the keys and values that the graph `decoder` takes, in sizes that are fixed."""
    for name, port in decoder.inputs.items():
        if name.startswith(("key_", "value_")):
            ours, theirs = (image.outputs[name].shape[1:] if name in image.outputs else None), port.shape[1:]
            if ours != theirs or any(isinstance(size, str) for size in theirs):
                raise ValueError(f"graph image gives {shorten(name)} as {ours}, graph decoder takes {theirs}")


def check_cache(called: str, graph: GraphFile) -> None:
    """ValueError unless keys and values of earlier tokens come in pairs, as [rows, heads, tokens, size], and go on as they came."""
    found: dict[str, dict[str, list[Any]]] = {"past": {}, "present": {}}
    for side, ports in (("past", graph.inputs), ("present", graph.outputs)):
        for name, port in ports.items():
            if name.startswith(f"{side}_"):
                if not (match := CACHED.fullmatch(name)) or len(port.shape) != 4:
                    raise ValueError(f"graph {called} has a port {shorten(name)} of shape {port.shape}, which is no cache")
                found[side][f"{match[2]}_{match[3]}"] = [port.shape[1], port.shape[3]]
    layers = {name.partition("_")[2] for name in found["past"]}
    whole = {f"{part}_{layer}" for layer in layers for part in ("key", "value")}
    if found["past"] != found["present"] or whole != found["past"].keys():
        raise ValueError(f"graph {called} gives other keys and values than it takes")
    if strange := [sizes for sizes in found["past"].values() if not all(isinstance(size, int) and size for size in sizes)]:
        raise ValueError(f"graph {called} leaves heads and sizes of its keys open: {strange[0]}")


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds ONNX graphs instead of a model."""
    return (folder / ONNX).is_file()
