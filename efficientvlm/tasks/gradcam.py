"""Grounding without boxes: where a network that matches looks for what a text says, by Grad-CAM (ALBEF, X-VLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.data.boxes import PixelBox
from efficientvlm.errors import BadInput

AREA_EXPONENT = 0.5  # of a box, by which what lies inside is divided (published)
CELLS = 32  # on a side of the grid on which the best box of a map is looked for
Map = NDArray[np.float64]


def crossing(model: Any) -> tuple[str, int]:
    """The tower whose layers see images, and how many layers it has.

    Raises:
        BadInput: a network that keeps no attention maps, like ONNX graphs.
    """
    layers = model.config.layers()
    tower = next((tap.partition(".")[0] for tap in sorted(model.taps) if tap.endswith(".cross_attention") and _counts(layers, tap)), None)
    if tower is None:
        why = "its attention to the image is not shown" if not model.taps else "none of its layers attends to images"
        raise BadInput("mode gradcam needs attention maps", why, "use a checkpoint that matches images with texts, not its ONNX graphs")
    return tower, layers[tower]


def _counts(layers: dict[str, int], tap: str) -> bool:
    return tap.partition(".")[0] in ("fusion", "text") and layers.get(tap.partition(".")[0], 0) > 0


def maps(model: Any, batch: dict[str, Any], layer: int) -> tuple[Tensor, Tensor]:
    """Where the image of each text is looked at [Q, side, side], and the matching logits [Q, 2].

    A map is the attention to the patches at `layer` times the gradient of the sum of the `yes` logits at it, where that is above 0; a mean
    over heads, and over the tokens of the text (in the published code over its padding too, which changes the scale alone). `batch` has an
    image for each text: pixels [Q, 3, H, W], text_ids and text_mask [Q, L].

    Source: Li et al. 2021 (ALBEF), section 4; X-VLM, weakly supervised grounding.

    Raises:
        BadInput: nothing is left of the attention at `layer`.
    """
    tower, _ = crossing(model)
    tap = f"{tower}.cross_attention"
    asked = {name.replace("text_", own): batch[name] for name in ("text_ids", "text_mask") for own in ("text_", "question_")}
    with torch.inference_mode(False), torch.enable_grad():
        pixels = batch["pixels"].clone()  # outside of inference mode, like the texts
        record = model.run({"pixels": pixels, **{name: value.clone() for name, value in asked.items()}}, {f"{tap}.{layer}"})
        attention, logits = record[tap][layer], record["logits"]
        if not attention.shape[1]:
            why = "its heads are pruned there"
            raise BadInput(f"layer {layer} of {tower} looks at no image", why, "choose another with --set layer=N")
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention)
    seen = (attention.detach() * gradient.clamp(min=0))[..., 1:].float().mean(1)  # [Q, L, patches]; entry 0 stands for the whole image
    mask = batch["text_mask"][..., None].to(seen.dtype)
    flat = (seen * mask).sum(1) / mask.sum(1)
    side = round(flat.shape[1] ** 0.5)
    return flat.unflatten(1, (side, side)), logits.detach()


def box_scores(map_: Tensor, boxes: Sequence[PixelBox], size: tuple[int, int]) -> list[float]:
    """What a map [side, side] holds inside of each box of a picture of `size` (width, height), over the square root of its area."""
    whole = F.interpolate(map_[None, None], size=(size[1], size[0]), mode="bicubic", align_corners=False)[0, 0]
    return [
        float(whole[int(y) : int(y + height), int(x) : int(x + width)].sum()) / (width * height) ** AREA_EXPONENT
        for x, y, width, height in boxes
    ]


def pick(map_: Tensor, boxes: Sequence[PixelBox], size: tuple[int, int]) -> PixelBox:
    """The box of the highest score, the first of several; where there are none to choose from, the best of a grid (ours)."""
    if not boxes:
        return best_box(map_, size)
    found = box_scores(map_, boxes, size)
    return boxes[max(range(len(boxes)), key=found.__getitem__)]


def best_box(map_: Tensor, size: tuple[int, int]) -> PixelBox:
    """Of all boxes on a grid of 32 by 32 cells the one whose sum over the square root of its area is largest (ours)."""
    cells: Map = F.interpolate(map_[None, None].double(), size=(CELLS, CELLS), mode="bicubic", align_corners=False)[0, 0].cpu().numpy()
    sums = np.zeros((CELLS + 1, CELLS + 1))
    sums[1:, 1:] = cells.cumsum(0).cumsum(1)
    low, high = np.triu_indices(CELLS + 1, 1)  # where a span of cells begins and ends
    bands = sums[high] - sums[low]  # [spans of rows, CELLS + 1]
    inside = bands[:, high] - bands[:, low]  # [spans of rows, spans of columns]
    length = (high - low).astype(np.float64)
    best = int((inside / np.sqrt(length[:, None] * length[None])).argmax())
    rows, columns = divmod(best, len(low))
    across, down = size[0] / CELLS, size[1] / CELLS
    return (
        float(low[columns] * across),
        float(low[rows] * down),
        float(length[columns] * across),
        float(length[rows] * down),
    )
