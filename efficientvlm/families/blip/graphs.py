"""BLIP's networks as graphs for export: texts are decoded step by step, matching is split into what image and text give alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efficientvlm.families.graphs import caption_graphs, compare_graphs, matching_graphs, vqa_graphs
from efficientvlm.families.network import Graph
from efficientvlm.families.towers.attention import Context


def blip_graphs(model: Any) -> list[Graph]:
    """`question` and `answer`; or `image` and `decoder`; or `image`, `text` and `match`; or `compare`."""
    if "compare" in model.config.able:
        return compare_graphs(model)
    if "text" not in model.config.towers:
        return caption_graphs(model)
    return vqa_graphs(model) if "decoder" in model.config.towers else _matching(model)


def _matching(model: Any) -> list[Graph]:
    """`match` reads a text with the keys and values of the image it belongs to."""

    def match(model: Any, ids: Tensor, mask: Tensor, seen: Context) -> Tensor:
        logits: Tensor = model.itm_head(model.read(ids, mask, seen).states[:, 0])
        return logits

    return matching_graphs(model, lambda model, states: model.text_encoder.context(states), match)
