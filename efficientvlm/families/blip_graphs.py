"""BLIP's networks as graphs for export: texts are decoded step by step, matching is split into what image and text give alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.families.base import Family, Graph
from efficientvlm.families.blip_model import context, read, see, starting, text_model
from efficientvlm.families.blocks import Context
from efficientvlm.families.graphs import Axes, Part, Tensors, flat, names, padded, pairs, present, step_graph, vqa_graphs

IMAGE_SIZES = ({"images": 2}, {"images": 1}, {"images": 8})
TEXT_SIZES = ({"texts": 3, "tokens": 5}, {"texts": 1, "tokens": 1}, {"texts": 8, "tokens": 7})
MATCH_SIZES = ({"images": 2, "texts": 3, "tokens": 5}, {"images": 1, "texts": 1, "tokens": 1}, {"images": 3, "texts": 8, "tokens": 4})
NOTHING: frozenset[str] = frozenset()


def blip_graphs(family: Family, model: Any) -> list[Graph]:
    """`question` and `answer`; or `image` and `decoder`; or `image`, `text` and `match`."""
    if "text" not in model.config.towers:
        return _captioning(family, model)
    return vqa_graphs(family, model) if "decoder" in model.config.towers else _matching(family, model)


def _images(family: Family, model: Any) -> Any:
    size = family.sizes(model.config).image_size

    def example(axes: Axes) -> dict[str, Tensor]:
        return {"pixels": torch.randn(axes["images"], 3, size, size, generator=torch.Generator().manual_seed(0))}

    return example


@torch.no_grad()
def _captioning(family: Family, model: Any) -> list[Graph]:
    """`image` gives keys and values of the decoder; `decoder` goes on with `text_ids` for the images named by `rows`."""
    example = _images(family, model)

    def image(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        states = see(model, inputs["pixels"], NOTHING).states
        return (states, *flat(context(text_model(model, "decoder"), states).kv))

    kv = context(text_model(model, "decoder"), see(model, example({"images": 2})["pixels"], NOTHING).states).kv
    outputs = ("image_states", *names(present(kv)))
    return [
        Graph("image", Part(model, image), {"pixels": {0: "images"}}, outputs, IMAGE_SIZES, example),
        step_graph(family, model, "decoder", kv, {0: "images"}, "text_ids"),
    ]


@torch.no_grad()
def _matching(family: Family, model: Any) -> list[Graph]:
    """`image` and `text` give features to compare; `match` reads a text with the keys and values of the image it belongs to (`rows`)."""
    example = _images(family, model)
    vocabulary, layers = family.sizes(model.config).vocab_size, len(model.text_encoder.encoder.layer)

    def image(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        states = see(model, inputs["pixels"], NOTHING).states
        return (F.normalize(model.vision_proj(states[:, 0]), dim=-1), *flat(context(model.text_encoder, states).kv))

    def text(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        alone = read(model.text_encoder, inputs["text_ids"], inputs["text_mask"].bool()[:, None, None], None, NOTHING)
        return (F.normalize(model.text_proj(alone.states[:, 0]), dim=-1),)

    def match(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        seen = Context(pairs(inputs, layers), None, inputs["rows"])
        ids = starting(inputs["text_ids"], model.config.question_start_id)
        return (model.itm_head(read(model.text_encoder, ids, inputs["text_mask"].bool()[:, None, None], seen, NOTHING).states[:, 0]),)

    def texts(axes: Axes) -> dict[str, Tensor]:
        draw, shape = torch.Generator().manual_seed(0), (axes["texts"], axes["tokens"])
        return {"text_ids": torch.randint(vocabulary, shape, generator=draw), "text_mask": padded(*shape, draw)}

    kv = context(model.text_encoder, see(model, example({"images": 1})["pixels"], NOTHING).states).kv
    keys = names(present(kv))

    def both(axes: Axes) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        shapes = [(axes["images"], *tensor.shape[1:]) for tensor in flat(kv)]
        attended = {key: torch.randn(shape, generator=draw) for key, shape in zip(keys, shapes, strict=True)}
        return {**attended, "rows": torch.randint(axes["images"], (axes["texts"],), generator=draw), **texts(axes)}

    by_text: Mapping[str, dict[int, str]] = {name: {0: "texts", 1: "tokens"} for name in ("text_ids", "text_mask")}
    by_match = {**{key: {0: "images"} for key in keys}, "rows": {0: "texts"}, **by_text}
    return [
        Graph("image", Part(model, image), {"pixels": {0: "images"}}, ("image_features", *keys), IMAGE_SIZES, example),
        Graph("text", Part(model, text), dict(by_text), ("text_features",), TEXT_SIZES, texts),
        Graph("match", Part(model, match), by_match, ("logits",), MATCH_SIZES, both),
    ]
