"""Picture files to uint8 RGB arrays: orientation applied, transparency on white, size guarded."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from efficientvlm.data.items import Pixels
from efficientvlm.errors import BadInput

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold, here an error: such a file is a mistake or an attack
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # no EPS: Pillow hands that to another program
warnings.filterwarnings("ignore", module="PIL")  # of what cannot be read an error says so, once and with its place
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(source: str | Path | bytes, size: int | None = None, where: str = "") -> Pixels:
    """The picture in a file or in its bytes, `[size, size, 3]` (bicubic, aspect not kept) or in its own size.

    Raises:
        BadInput: no such file, not a picture, damaged, or more than `MAX_PIXELS`; names `where`.
    """
    return open_sized(source, size, where)[0]


def open_sized(source: str | Path | bytes, size: int | None = None, where: str = "") -> tuple[Pixels, tuple[int, int]]:
    """As :func:`open_image`, with the width and height the picture had."""
    file = "" if isinstance(source, bytes) else str(source)
    where = where or f"image {file}".rstrip()
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(where, f"its {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}", "scale it down")
            picture = to_rgb(ImageOps.exif_transpose(image))
            return resized(picture, size), picture.size
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(where, f"there is no file {file}", "check the path") from None
    except Image.DecompressionBombError:
        raise BadInput(where, f"it has more than {MAX_PIXELS:,} pixels", "scale it down") from None
    except Exception as error:  # noqa: BLE001  on damaged bytes Pillow raises whatever its decoders stumble over
        reason = f"it cannot be read as a picture ({str(error).split(' <')[0] or type(error).__name__})"
        raise BadInput(where, f"{file}: {reason}" if file else reason, "replace or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB; transparent parts become white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        paper.alpha_composite(layer)
        return paper.convert("RGB")
    return image.convert("RGB")


def resized(image: Image.Image, size: int | None) -> Pixels:
    """Pixels of `image`, squeezed to a square of `size` if given."""
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image, dtype=np.uint8)
