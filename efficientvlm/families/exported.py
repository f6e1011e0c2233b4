"""Folders of ONNX graphs, run by ONNX Runtime behind the same methods as a family: `question` and `answer` with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from efficientvlm.config import Strict
from efficientvlm.errors import BadInput
from efficientvlm.families.base import Record, Sizes
from efficientvlm.families.blocks import Cache, normalise
from efficientvlm.families.graphs import names
from efficientvlm.manifest import read_json

ONNX = "onnx.json"
CPU = torch.device("cpu")
INSTALL = "pip install 'efficientvlm[onnx]'"


class Port(Strict):
    """An input or output: numpy's name of its type, and a number or the name of a dynamic axis for every dimension."""

    type: str
    shape: list[int | str]


class GraphFile(Strict):
    file: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    difference: float = Field(description="largest to torch, over several sizes, divided by the largest output where that is above 1")


class Description(Strict):
    """Contents of `onnx.json`: all that a program needs to run the graphs, beside the tokenizer and `preprocessor_config.json`."""

    format_version: Literal[1] = 1
    family: str
    tasks: list[str]
    precision: Literal["fp32", "int8"]
    opset: int
    tolerance: float = Field(description="largest difference to torch that fp32 graphs were allowed")
    graphs: dict[str, GraphFile]
    sizes: dict[str, Any]
    answers: list[str] | None = None
    rank_top: int = 128
    first_token_twice: bool = False
    max_answer_tokens: int = 10
    start_token: int | None = Field(None, description="id that answers begin with")
    end_token: int | None = Field(None, description="id that answers end with")
    measured: dict[str, Any] = Field(default_factory=dict)


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds ONNX graphs instead of a model."""
    return (folder / ONNX).is_file()


def runtime() -> Any:
    """ONNX Runtime; :class:`BadInput` if it is not installed."""
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
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime's own exceptions share no base class
        raise BadInput(f"cannot open {path}", str(error).splitlines()[0], "check the folder with `evlm verify`") from None


def run_session(session: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs for `inputs`; those that the graph does not use are left out."""
    wanted = {port.name for port in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


@dataclass
class ExportedModel:
    """Graphs in the place of a model; `config` is the folder's `onnx.json`."""

    config: Description
    sessions: dict[str, Any]
    device: torch.device = CPU

    def to(self, device: torch.device) -> ExportedModel:
        if device.type != "cpu":
            raise BadInput(
                f"ONNX graphs do not run on {device.type} here", "they are run by ONNX Runtime's CPU provider", "use --device cpu"
            )
        return self

    def eval(self) -> ExportedModel:
        return self

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.config.graphs[graph].outputs, run_session(self.sessions[graph], inputs), strict=True))


class Exported:
    """What stages that only use a model need of its family."""

    name = "onnx"
    retrieval: tuple[str, ...] = ()

    def read_config(self, path: Path) -> Description:
        try:
            return Description.model_validate(read_json(path / ONNX))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BadInput(f"{path / ONNX} cannot be used", f"{where}: {first['msg'].lower()}", "export it again") from None

    def load(self, path: Path) -> ExportedModel:
        """The graphs of `path`, ready to run; :class:`BadInput` if one is missing or damaged."""
        config = self.read_config(path)
        return ExportedModel(config, {name: open_session(path / graph.file) for name, graph in config.graphs.items()})

    def sizes(self, config: Description) -> Sizes:
        return Sizes(**config.sizes)

    def layer_counts(self, config: Description) -> dict[str, int]:
        """Layers whose keys and values lie between the graphs; what a graph holds while it runs is the runtime's own."""
        context = config.graphs["question"].outputs if "question" in config.graphs else {}
        return {"decoder": sum(name.startswith("key_") for name in context)}

    def tasks(self, config: Description) -> frozenset[str]:
        return frozenset(config.tasks)

    def for_vqa(self, model: ExportedModel, teacher: Any, decoder_init: str) -> tuple[ExportedModel, list[str]]:
        if "vqa" not in model.config.tasks:
            raise BadInput(
                "these ONNX graphs answer no questions",
                f"they were exported for {', '.join(model.config.tasks)}",
                "export a model that does",
            )
        return model, []

    def question(self, model: ExportedModel, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, dict[str, Tensor]]:
        """The context is what the graph `question` gives, with the mask."""
        if want:
            raise BadInput("ONNX graphs keep nothing for distillation", ", ".join(want), "use the checkpoint they were exported from")
        sizes = self.sizes(model.config)
        pixels = normalise(batch["pixels"], sizes.image_mean, sizes.image_std, torch.float32)
        mask = batch["question_mask"]
        rows = batch["image_index"] if "image_index" in batch else torch.arange(len(mask))
        outputs = model.run(
            "question", {"pixels": pixels, "question_ids": batch["question_ids"], "question_mask": mask, "image_index": rows}
        )
        return Record(states=outputs.pop("states")), {**outputs, "question_mask": mask}

    def answer(
        self,
        model: ExportedModel,
        context: dict[str, Tensor],
        ids: Tensor,
        mask: Tensor | None,
        rows: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """As a family's; padding may only follow the tokens, where it changes nothing before it, so that `mask` has no use."""
        rows = torch.arange(len(ids)) if rows is None else rows
        cache = Cache() if cache is None else cache
        inputs = {**context, "rows": rows, "answer_ids": ids, "past": torch.arange(cache.length), **self._past(model, cache, len(ids))}
        outputs = model.run("answer", inputs)
        for layer in (int(name.removeprefix("present_key_")) for name in outputs if name.startswith("present_key_")):
            cache.kv[layer] = outputs[f"present_key_{layer}"], outputs[f"present_value_{layer}"]
        cache.length += ids.shape[1]
        return outputs["logits"]

    def _past(self, model: ExportedModel, cache: Cache, rows: int) -> dict[str, Tensor]:
        if cache.length:
            return {name: tensor for layer, kv in cache.kv.items() for name, tensor in zip(names([layer], "past_"), kv, strict=True)}
        ports = model.config.graphs["answer"].inputs
        sizes = {name: (rows, int(port.shape[1]), 0, int(port.shape[3])) for name, port in ports.items() if name.startswith("past_")}
        return {name: torch.zeros(size) for name, size in sizes.items()}

    def new_cache(self, model: ExportedModel) -> Cache:
        return Cache()

    def forward(self, model: ExportedModel, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """All graphs once, in their order, each fed from the batch and from the graphs before it; the record holds every output."""
        sizes = self.sizes(model.config)
        values = {**batch, "pixels": normalise(batch["pixels"], sizes.image_mean, sizes.image_std, torch.float32)}
        record = Record()
        for graph in model.config.graphs:
            record.update(outputs := model.run(graph, values))
            values |= outputs
        return record

    def example_batch(self, config: Description, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        """Every input that no graph before it gives: one image, one text of `text_length` and one token of an answer a sample."""
        made = {name for graph in config.graphs.values() for name in graph.outputs}
        lengths = {"tokens": text_length, "length": 1, "past": 0}
        batch: dict[str, Tensor] = {}
        for name, port in ((name, port) for graph in config.graphs.values() for name, port in graph.inputs.items() if name not in made):
            shape = [size if isinstance(size, int) else lengths.get(size, batch_size) for size in port.shape]
            kind = torch.float32 if name.startswith("past_") else torch.uint8 if port.type == "float32" else torch.long
            batch[name] = torch.arange(batch_size) if len(shape) == 1 and shape[0] else torch.ones(shape, dtype=kind)
        return batch
