"""BLIP's networks as graphs for export: texts are decoded step by step, matching is split into what image and text give alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from efficientvlm.families.graphs import (
    IMAGE_SIZES,
    Axes,
    Part,
    Tensors,
    caption_graphs,
    flat,
    images_of,
    names,
    padded,
    pairs,
    present,
    vqa_graphs,
)
from efficientvlm.families.network import Graph
from efficientvlm.families.towers.attention import Context

TEXT_SIZES = ({"texts": 3, "tokens": 5}, {"texts": 1, "tokens": 1}, {"texts": 8, "tokens": 7})
MATCH_SIZES = ({"images": 2, "texts": 3, "tokens": 5}, {"images": 1, "texts": 1, "tokens": 1}, {"images": 3, "texts": 8, "tokens": 4})


def blip_graphs(model: Any) -> list[Graph]:
    """`question` and `answer`; or `image` and `decoder`; or `image`, `text` and `match`."""
    if "text" not in model.config.towers:
        return caption_graphs(model)
    return vqa_graphs(model) if "decoder" in model.config.towers else _matching(model)


@torch.no_grad()
def _matching(model: Any) -> list[Graph]:
    """`image` and `text` give features to compare; `match` reads a text with the keys and values of the image it belongs to (`rows`)."""
    example = images_of(model)
    vocabulary, layers = model.config.sizes().vocab_size, len(model.text_encoder.layers)

    def image(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        states = model.encode_image(inputs["pixels"]).states
        return (model.image_feature(states), *flat(model.text_encoder.context(states).kv))

    def text(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        return (model.text_feature(inputs["text_ids"], inputs["text_mask"]),)

    def match(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        seen = Context(pairs(inputs, layers), None, inputs["rows"])
        return (model.itm_head(model.read(inputs["text_ids"], inputs["text_mask"], seen).states[:, 0]),)

    def texts(axes: Axes) -> dict[str, Tensor]:
        draw, shape = torch.Generator().manual_seed(0), (axes["texts"], axes["tokens"])
        return {"text_ids": torch.randint(vocabulary, shape, generator=draw), "text_mask": padded(*shape, draw)}

    kv = model.text_encoder.context(model.encode_image(example({"images": 1})["pixels"]).states).kv
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
