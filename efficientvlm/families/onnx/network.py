"""Graphs in the place of a network: to answer or describe with a key/value cache, to compare, to match."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.graphs import names
from efficientvlm.families.network import Record, check_taps, require
from efficientvlm.families.onnx.description import MATCH, WRITERS, Description
from efficientvlm.families.onnx.sessions import run_session
from efficientvlm.families.towers.attention import Cache
from efficientvlm.families.towers.parts import normalise

CPU = torch.device("cpu")
PICTURES = ("pixels", "second_pixels")


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

    def normalised(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] as the graphs read them."""
        sizes = self.config.sizes()
        return normalise(pixels, sizes.image_mean, sizes.image_std, torch.float32)

    def pass_through(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.config.graphs[graph].outputs, run_session(self.sessions[graph], inputs), strict=True))

    def gain(self, ability: str, donor: Any = None, decoder_init: str = "auto") -> tuple[ExportedModel, list[str]]:
        require(self, ability)
        return self, []

    def encode(self, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, dict[str, Tensor]]:
        """The context is what the graph `question` gives, with the mask."""
        check_taps(self, want)
        pixels, mask = self.normalised(batch["pixels"]), batch["question_mask"]
        rows = batch["image_index"] if "image_index" in batch else torch.arange(len(mask))
        outputs = self.pass_through(
            "question", {"pixels": pixels, "question_ids": batch["question_ids"], "question_mask": mask, "image_index": rows}
        )
        return Record(states=outputs.pop("states")), {**outputs, "question_mask": mask}

    def ground(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        check_taps(self, want)
        rows = batch["image_index"] if "image_index" in batch else torch.arange(len(batch["question_mask"]))
        asked = {name: batch[name] for name in ("question_ids", "question_mask")}
        return Record(self.pass_through("ground", {"pixels": self.normalised(batch["pixels"]), **asked, "image_index": rows}))

    def look(self, pixels: Tensor) -> dict[str, Tensor]:
        """The context is what the graph `image` gives."""
        return self.pass_through("image", {"pixels": self.normalised(pixels)})

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
        graph = next(name for name in WRITERS if name in self.config.graphs)
        before = self._past(graph, cache, len(ids))
        outputs = self.pass_through(graph, {**context, "rows": rows, WRITERS[graph]: ids, "past": torch.arange(cache.length), **before})
        for layer in (int(name.removeprefix("present_key_")) for name in outputs if name.startswith("present_key_")):
            cache.kv[layer] = outputs[f"present_key_{layer}"], outputs[f"present_value_{layer}"]
        cache.length += ids.shape[1]
        return outputs["logits"]

    def _past(self, graph: str, cache: Cache, rows: int) -> dict[str, Tensor]:
        if cache.length:
            return {name: tensor for layer, kv in cache.kv.items() for name, tensor in zip(names([layer], "past_"), kv, strict=True)}
        ports = self.config.graphs[graph].inputs
        sizes = {name: (rows, int(port.shape[1]), 0, int(port.shape[3])) for name, port in ports.items() if name.startswith("past_")}
        return {name: torch.zeros(size) for name, size in sizes.items()}

    def new_cache(self) -> Cache:
        return Cache()

    def embed_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] to what :meth:`match` reads of them, all of it in one tensor [B, N], and unit vectors [B, E]."""
        outputs = self.pass_through("image", {"pixels": self.normalised(pixels)})
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
        values = {name: self.normalised(value) if name in PICTURES else value for name, value in batch.items()}
        record = Record()
        for graph in self.config.graphs:
            record.update(outputs := self.pass_through(graph, values))
            values |= outputs
        return record

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        """Every input that no graph before it gives: one image, one text of `text_length` and one token of an answer a sample."""
        computed = {name for graph in self.config.graphs.values() for name in graph.outputs}
        lengths = {"tokens": text_length, "length": 1, "past": 0}
        batch: dict[str, Tensor] = {}
        ports = {name: port for graph in self.config.graphs.values() for name, port in graph.inputs.items() if name not in computed}
        for name, port in ports.items():
            shape = [size if isinstance(size, int) else lengths.get(size, batch_size) for size in port.shape]
            kind = torch.float32 if name.startswith("past_") else torch.uint8 if port.type == "float32" else torch.long
            batch[name] = torch.arange(batch_size) if len(shape) == 1 and shape[0] else torch.ones(shape, dtype=kind)
        return batch
