"""Folders of ONNX graphs, run by ONNX Runtime behind the methods of a family: to answer with a key/value cache, to compare, to match."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import open_plain
from efficientvlm.checkpoints.manifest import FileName
from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.checks import HUGE, MOST, MOST_LAYERS, MOST_PIXELS
from efficientvlm.families.graphs import names
from efficientvlm.families.loading import read_json
from efficientvlm.families.network import Record, check_taps, require
from efficientvlm.families.structure import Sizes
from efficientvlm.families.towers.attention import Cache
from efficientvlm.families.towers.parts import normalise
from efficientvlm.runtime.memory import out_of_memory
from efficientvlm.settings.base import Strict, parse

ONNX = "onnx.json"
CPU = torch.device("cpu")
TEXT = ("text_ids", "text_mask")
PORTS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "answer": {
        "question": (("pixels", "question_ids", "question_mask", "image_index"), ("states",)),
        "answer": (("rows", "answer_ids"), ("logits",)),
    },
    "embed": {"image": (("pixels",), ("image_features",)), "text": (TEXT, ("text_features",))},
    "match": {"match": ((), ())},
}
"""What the graphs of a model take and give at least, by what it can do."""
MATCH = ("rows", *TEXT)
"""What the graph `match` takes besides outputs of `image`."""
READERS = {"answer": "decoder", "decoder": "decoder", "match": "text"}
"""Graphs whose layers keep keys and values as ports, and the tower those are of."""
RANKS = {"states": 3, "logits": None, "image_features": 2, "text_features": 2}
"""Dimensions of what the graphs give; `logits` have three from `answer` and two from `match`."""
CACHED = re.compile(r"(past|present)_(key|value)_(\d{1,4})", re.ASCII)
INSTALL = "pip install 'efficientvlm[onnx]'"


Length = Annotated[int, Field(ge=0, le=MOST)]
Axis = Annotated[str, Field(min_length=1, max_length=100)]
Colours = Annotated[list[float], Field(min_length=3, max_length=3)]
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

    image_size: int = Field(ge=1, le=MOST_PIXELS)
    patch_size: int = Field(ge=1, le=MOST_PIXELS)
    max_positions: int = Field(ge=1, le=MOST)
    vocab_size: int = Field(ge=1, le=MOST, strict=True)
    widths: dict[str, Annotated[list[Length], Field(min_length=1, max_length=MOST_LAYERS + 1)]]
    heads: dict[str, Annotated[list[Length], Field(max_length=MOST_LAYERS)]]
    image_mean: Colours
    image_std: Annotated[list[Deviation], Field(min_length=3, max_length=3)]


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
    max_tokens: int | None = Field(None, ge=3, le=MOST, description="longest question or text, with its first and last token")
    max_answer_tokens: int = Field(10, ge=1, le=MOST)
    start_token: Length | None = Field(None, description="id that answers begin with")
    end_token: Length | None = Field(None, description="id that answers end with")
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
                wanted = RANKS[port] or 3
                if len(shape := graphs[name].outputs[port].shape) != wanted:
                    raise ValueError(f"graph {name} gives {port} as {shape}, where {wanted} dimensions are read")
        if "answer" in graphs:
            check_cache(graphs["answer"])
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


def check_cache(graph: GraphFile) -> None:
    """ValueError unless keys and values of earlier tokens come in pairs, as [rows, heads, tokens, size], and go on as they came."""
    found: dict[str, dict[str, list[Any]]] = {"past": {}, "present": {}}
    for side, ports in (("past", graph.inputs), ("present", graph.outputs)):
        for name, port in ports.items():
            if name.startswith(f"{side}_"):
                if not (match := CACHED.fullmatch(name)) or len(port.shape) != 4:
                    raise ValueError(f"graph answer has a port {shorten(name)} of shape {port.shape}, which is no cache")
                found[side][f"{match[2]}_{match[3]}"] = [port.shape[1], port.shape[3]]
    layers = {name.partition("_")[2] for name in found["past"]}
    whole = {f"{part}_{layer}" for layer in layers for part in ("key", "value")}
    if found["past"] != found["present"] or whole != found["past"].keys():
        raise ValueError("graph answer gives other keys and values than it takes")
    if strange := [sizes for sizes in found["past"].values() if not all(isinstance(size, int) and size for size in sizes)]:
        raise ValueError(f"graph answer leaves heads and sizes of its keys open: {strange[0]}")


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds ONNX graphs instead of a model."""
    return (folder / ONNX).is_file()


def runtime() -> Any:
    """ONNX Runtime, which does not report to its makers; :class:`BadInput` if it is not installed. Nothing else here imports it first."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is loaded; it cannot be switched off later
    try:
        import onnxruntime
    except ImportError as error:
        raise BadInput("ONNX Runtime is not installed", str(error), INSTALL) from None
    return onnxruntime


def open_session(path: Path) -> Any:
    """A session on the processor with as many threads as torch has."""
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads would slow whatever runs next
    open_plain(path).close()
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime's own exceptions share no base class
        raise BadInput(f"cannot open {path}", _first_line(error), "check the folder with `evlm verify`") from None


def run_session(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs for `inputs`; those that the graph does not use are left out.

    Raises:
        BadInput: the graph cannot work on them.
    """
    wanted = {port.name for port in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
    try:
        return [torch.from_numpy(array) for array in session.run(None, feed)]
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput("an ONNX graph failed", _first_line(error), "check the folder with `evlm verify`, or export it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_ports(name: str, graph: GraphFile, session: Any, where: Path) -> None:
    """:class:`BadInput` unless inputs and outputs of the graph are those that `onnx.json` says, in name, and where it is fixed in size."""
    for kind, told, found in (("inputs", graph.inputs, session.get_inputs()), ("outputs", graph.outputs, session.get_outputs())):
        shapes = {port.name: port.shape for port in found}
        if list(told) != list(shapes) if kind == "outputs" else not set(shapes) <= set(told):
            why = f"{name} has the {kind} {shorten(', '.join(shapes))}, {shorten(', '.join(told))} by {ONNX}"
            raise BadInput(f"{where} does not fit its {ONNX}", why, "export it again")
        for port, shape in shapes.items():
            fixed = [(ours, theirs) for ours, theirs in zip(told[port].shape, shape, strict=False) if isinstance(theirs, int)]
            if len(shape) != len(told[port].shape) or any(ours != theirs for ours, theirs in fixed):
                why = f"{name} takes {port} as {shape}, {told[port].shape} by {ONNX}"
                raise BadInput(f"{where} does not fit its {ONNX}", why, "export it again")


@dataclass
class ExportedModel:
    """Graphs in the place of a network; `config` is the folder's `onnx.json`."""

    config: Description
    sessions: dict[str, Any]
    device: torch.device = CPU
    taps: frozenset[str] = frozenset()

    def to(self, device: torch.device) -> ExportedModel:
        if device.type != "cpu":
            raise BadInput(
                f"ONNX graphs do not run on {device.type} here", "they are run by ONNX Runtime's CPU provider", "use --device cpu"
            )
        return self

    def eval(self) -> ExportedModel:
        return self

    def pass_through(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.config.graphs[graph].outputs, run_session(self.sessions[graph], inputs), strict=True))

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[ExportedModel, list[str]]:
        require(self, ability)
        return self, []

    def encode(self, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, dict[str, Tensor]]:
        """The context is what the graph `question` gives, with the mask."""
        check_taps(self, want)
        sizes = self.config.sizes()
        pixels = normalise(batch["pixels"], sizes.image_mean, sizes.image_std, torch.float32)
        mask = batch["question_mask"]
        rows = batch["image_index"] if "image_index" in batch else torch.arange(len(mask))
        outputs = self.pass_through(
            "question", {"pixels": pixels, "question_ids": batch["question_ids"], "question_mask": mask, "image_index": rows}
        )
        return Record(states=outputs.pop("states")), {**outputs, "question_mask": mask}

    def decode(
        self,
        context: dict[str, Tensor],
        ids: Tensor,
        mask: Tensor | None,
        rows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """As a network's; padding may only follow the tokens, where it changes nothing before it, so that `mask` has no use."""
        rows = torch.arange(len(ids)) if rows is None else rows
        cache = Cache() if cache is None else cache
        inputs = {**context, "rows": rows, "answer_ids": ids, "past": torch.arange(cache.length), **self._past(cache, len(ids))}
        outputs = self.pass_through("answer", inputs)
        for layer in (int(name.removeprefix("present_key_")) for name in outputs if name.startswith("present_key_")):
            cache.kv[layer] = outputs[f"present_key_{layer}"], outputs[f"present_value_{layer}"]
        cache.length += ids.shape[1]
        return outputs["logits"]

    def _past(self, cache: Cache, rows: int) -> dict[str, Tensor]:
        if cache.length:
            return {name: tensor for layer, kv in cache.kv.items() for name, tensor in zip(names([layer], "past_"), kv, strict=True)}
        ports = self.config.graphs["answer"].inputs
        sizes = {name: (rows, int(port.shape[1]), 0, int(port.shape[3])) for name, port in ports.items() if name.startswith("past_")}
        return {name: torch.zeros(size) for name, size in sizes.items()}

    def new_cache(self) -> Cache:
        return Cache()

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] to what :meth:`match` reads of them, all of it in one tensor [B, N], and unit vectors [B, E]."""
        sizes = self.config.sizes()
        outputs = self.pass_through("image", {"pixels": normalise(pixels, sizes.image_mean, sizes.image_std, torch.float32)})
        read = [outputs[name].flatten(1) for name in self._read_by_match()]
        return torch.cat([outputs["image_features"][:, :0], *read], 1), outputs["image_features"]

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, L] to what :meth:`match` reads of them, the ids themselves, and unit vectors [B, E]."""
        return ids, self.pass_through("text", {"text_ids": ids, "text_mask": mask})["text_features"]

    def match(self, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        """Matching logits [P, 2] of `texts` [P, L] with `images` [I, N], as they came with the features; `rows` [P] names the image."""
        require(self, "match")
        shapes = {name: [int(size) for size in self.config.graphs["match"].inputs[name].shape[1:]] for name in self._read_by_match()}
        parts = images.split([math.prod(shape) for shape in shapes.values()], 1)
        seen = {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return self.pass_through("match", {**seen, "rows": rows, "text_ids": texts, "text_mask": mask})["logits"]

    def _read_by_match(self) -> list[str]:
        """Outputs of `image` that `match` goes on from."""
        return [name for name in self.config.graphs["match"].inputs if name not in MATCH] if "match" in self.config.abilities() else []

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """All graphs once, in their order, each fed from the batch and from the graphs before it; the record holds every output."""
        sizes = self.config.sizes()
        values = {**batch, "pixels": normalise(batch["pixels"], sizes.image_mean, sizes.image_std, torch.float32)}
        record = Record()
        for graph in self.config.graphs:
            record.update(outputs := self.pass_through(graph, values))
            values |= outputs
        return record

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        """Every input that no graph before it gives: one image, one text of `text_length` and one token of an answer a sample."""
        made = {name for graph in self.config.graphs.values() for name in graph.outputs}
        lengths = {"tokens": text_length, "length": 1, "past": 0}
        batch: dict[str, Tensor] = {}
        ports = {name: port for graph in self.config.graphs.values() for name, port in graph.inputs.items() if name not in made}
        for name, port in ports.items():
            shape = [size if isinstance(size, int) else lengths.get(size, batch_size) for size in port.shape]
            kind = torch.float32 if name.startswith("past_") else torch.uint8 if port.type == "float32" else torch.long
            batch[name] = torch.arange(batch_size) if len(shape) == 1 and shape[0] else torch.ones(shape, dtype=kind)
        return batch


class Exported:
    """How folders of ONNX graphs are opened; unlike a family's networks these are not trained, cut or saved."""

    name = "onnx"

    @staticmethod
    def read_config(path: Path) -> Description:
        """What `onnx.json` says; :class:`BadInput` for anything that no export writes there, all of it at once."""
        file = path / ONNX
        description = parse(Description, read_json(file), str(file))
        size = description.stored_sizes.image_size
        for name, graph in description.graphs.items():
            pixels = graph.inputs.get("pixels")
            if pixels and pixels.shape[1:] != [3, size, size]:
                why = f"graph {name} takes pixels as {pixels.shape}, the images have {size} px"
                raise BadInput(f"{file} cannot be used", why, "export it again")
        listed = manifest.read(path).files if (path / manifest.MANIFEST).is_file() else None
        if strangers := [graph.file for graph in description.graphs.values() if listed is not None and graph.file not in listed]:
            raise BadInput(f"{file} cannot be used", f"its {strangers[0]} is no file of this export", "export it again")
        return description

    def load(self, path: Path) -> ExportedModel:
        """The graphs of `path`, ready to run; :class:`BadInput` if one is missing, damaged or another than `onnx.json` says."""
        config = self.read_config(path)
        sessions = {}
        for name, graph in config.graphs.items():
            sessions[name] = open_session(path / graph.file)
            check_ports(name, graph, sessions[name], path / graph.file)
        return ExportedModel(config, sessions)
