"""The layouts of published X-VLM and EfficientVLM files: how each is recognised, and what it was made for."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """`begins`: what names of its entries begin with, each of which is there. `use`: what a network of it was trained for."""

    name: str
    begins: tuple[str, ...]
    use: str


LAYOUTS = (
    Layout("vqa", ("text_encoder.", "text_decoder."), "questions about an image"),
    Layout("pretrain", ("text_encoder.cls.",), "any task, after training for it"),
    Layout("retrieval", ("text_encoder.", "vision_proj."), "finding images and texts that belong together"),
    Layout("retrieval", ("text_encoder.", "itm_head."), "matching of images with texts"),
    Layout("grounding", ("text_encoder.", "bbox_head."), "the box of what a text names"),
)
"""The first whose beginnings are all there counts."""
