"""The layouts of published X-VLM and EfficientVLM files: how each is recognised."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """`begins`: what names of its entries begin with, each of which is there. `stack`: where it has its text and fusion layers.

    `images` are read at a time, and each of them has fusion layers of its own.
    """

    name: str
    begins: tuple[str, ...]
    stack: str = "text_encoder"
    images: int = 1


LAYOUTS = (
    Layout("nlvr2", ("text_encoder.", "cls_head."), images=2),
    Layout("text_assignment", ("text_encoder.", "ta_head."), images=2),
    Layout("vqa", ("text_encoder.", "text_decoder.")),
    Layout("captioning", ("text_decoder.",), "text_decoder"),
    Layout("pretrain", ("text_encoder.cls.",)),
    Layout("retrieval", ("text_encoder.", "vision_proj.")),
    Layout("retrieval", ("text_encoder.", "itm_head.")),
    Layout("grounding", ("text_encoder.", "bbox_head.")),
)
"""The first whose beginnings are all there counts."""
