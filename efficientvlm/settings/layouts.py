"""The layouts of published X-VLM, EfficientVLM and BLIP files: how each is recognised."""

from __future__ import annotations

from typing import NamedTuple

XVLM, BLIP = "vision_encoder.", "visual_encoder."
"""What names of the tensors of images begin with."""


class Layout(NamedTuple):
    """`begins`: what names of its entries begin with, each of which is there. `stack`: where it has its text and fusion layers.

    `family` is that of the network, `does` the ability (`families.network.ABILITIES`) by which the family knows which of its networks.
    `images` are read at a time; of an X-VLM, each of them has fusion layers of its own.
    """

    name: str
    begins: tuple[str, ...]
    stack: str = "text_encoder"
    images: int = 1
    family: str = "xvlm"
    does: str = ""


LAYOUTS = (
    Layout("nlvr2", (XVLM, "text_encoder.", "cls_head."), images=2),
    Layout("text_assignment", (XVLM, "text_encoder.", "ta_head."), images=2),
    Layout("vqa", (XVLM, "text_encoder.", "text_decoder.")),
    Layout("captioning", (XVLM, "text_decoder."), "text_decoder"),
    Layout("pretrain", (XVLM, "text_encoder.cls.")),
    Layout("retrieval", (XVLM, "text_encoder.", "vision_proj.")),
    Layout("retrieval", (XVLM, "text_encoder.", "itm_head.")),
    Layout("grounding", (XVLM, "text_encoder.", "bbox_head.")),
    Layout("nlvr2", (BLIP, "text_encoder.", "cls_head."), images=2, family="blip", does="compare"),
    Layout("pretrain", (BLIP, "text_encoder.", "text_decoder.", "vision_proj."), family="blip", does="pretrain"),
    Layout("vqa", (BLIP, "text_encoder.", "text_decoder."), family="blip", does="answer"),
    Layout("captioning", (BLIP, "text_decoder."), family="blip", does="caption"),
    Layout("retrieval", (BLIP, "text_encoder.", "vision_proj."), family="blip", does="match"),
)
"""The first whose beginnings are all there counts."""
