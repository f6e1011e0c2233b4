"""CLIP and SigLIP as graphs for export: each tower to its features, and how these are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from efficientvlm.families.graphs import IMAGE_SIZES, Part, images_of
from efficientvlm.families.network import Graph

PAIR_SIZES = ({"images": 2, "texts": 3}, {"images": 1, "texts": 1}, {"images": 8, "texts": 2})
TEXT_SIZES = ({"texts": 3, "tokens": 5}, {"texts": 1, "tokens": 2}, {"texts": 8, "tokens": 7})


def clip_graphs(model: Any) -> list[Graph]:
    """`image` and `text`, each to its features, and `similarity`."""

    def texts(axes: Mapping[str, int]) -> dict[str, Tensor]:
        batch = model.example(axes["texts"], axes["tokens"])
        return {"text_ids": batch["text_ids"], "text_mask": batch["text_mask"]}

    def features(axes: Mapping[str, int]) -> dict[str, Tensor]:
        one = model.run(model.example(1, 2))
        return {f"{kind}_features": one[f"{kind}_features"].expand(axes[f"{kind}s"], -1) for kind in ("image", "text")}

    by_text = {name: {0: "texts", 1: "tokens"} for name in ("text_ids", "text_mask")}
    by_pair = {"image_features": {0: "images"}, "text_features": {0: "texts"}}
    lengths = (*TEXT_SIZES, {"texts": 2, "tokens": model.config.sizes().max_positions})
    image = Part(model, lambda model, inputs: (model.embed_images(inputs["pixels"])[1],))
    text = Part(model, lambda model, inputs: (model.embed_texts(inputs["text_ids"], inputs["text_mask"])[1],))
    compared = Part(model, lambda model, inputs: (model.similarity(inputs["image_features"], inputs["text_features"]),))
    return [
        Graph("image", image, {"pixels": {0: "images"}}, ("image_features",), IMAGE_SIZES, images_of(model)),
        Graph("text", text, by_text, ("text_features",), lengths, texts),
        Graph("similarity", compared, by_pair, ("logits",), PAIR_SIZES, features),
    ]
