"""Picture files to uint8 RGB arrays: orientation applied, transparency on white, size guarded."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from efficientvlm.checkpoints.files import open_plain
from efficientvlm.data.items import Pixels
from efficientvlm.data.preprocessing import MAX_PIXELS, Preprocessing, prepared
from efficientvlm.errors import BadInput

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of picture files, in lower case."""
LARGEST_PICTURE = 200_000_000  # bytes
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # no EPS: Pillow hands that to another program
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)
warnings.filterwarnings("ignore", module="PIL")  # of what cannot be read an error says so, once and with its place
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(source: str | Path | bytes, size: Preprocessing | int | None = None, where: str = "") -> Pixels:
    """The picture in a file or in its bytes, as `size` prepares it (a number: squeezed to that square) or in its own size.

    Raises:
        BadInput: no such file, not a picture, damaged, more than `MAX_PIXELS`, or not of the form that `size` asks for; names `where`.
    """
    return open_sized(source, size, where)[0]


def open_sized(source: str | Path | bytes, size: Preprocessing | int | None = None, where: str = "") -> tuple[Pixels, tuple[int, int]]:
    """As :func:`open_image`, with the width and height the picture had."""
    file = "" if isinstance(source, bytes) else str(source)
    where = where or f"image {file}".rstrip()
    if not isinstance(source, bytes) and not os.path.exists(source):
        raise BadInput(where, f"there is no file {file}", "check the path")
    try:
        with _bytes_of(source, where) as content, Image.open(content, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(where, f"its {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}", "scale it down")
            stored = str(image.tile[0][3]) if image.tile else ""  # how deep a pixel is in the file, forgotten once it is decoded
            if image.mode == "F" or (image.mode == "I" and ";16" not in stored):
                why = "its pixels are numbers of 32 bits, and nothing says which of them is white"
                raise BadInput(where, why, "save it with 8 or 16 bits")
            full = _reduce(image, size) if isinstance(size, Preprocessing) else None
            image.load()
            upright = image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)  # which always copies
            picture = to_rgb(upright, stored)
            return prepared(picture, size, where), full or picture.size
    except BadInput:
        raise
    except Image.DecompressionBombError:
        raise BadInput(where, f"it has more than {MAX_PIXELS:,} pixels", "scale it down") from None
    except Exception as error:  # noqa: BLE001  on damaged bytes Pillow raises whatever its decoders stumble over
        reason = f"it cannot be read as a picture ({str(error).split(' <')[0] or type(error).__name__})"
        raise BadInput(where, reason if file in where else f"{file}: {reason}", "replace or remove it") from None


def _reduce(image: Image.Image, how: Preprocessing) -> tuple[int, int] | None:
    """Have a JPEG decoded at a reduced size where `how` allows that; the upright width and height that it has then nevertheless."""
    if not how.reduced or image.format not in ("JPEG", "MPO"):
        return None
    width, height = image.size
    turned = image.getexif().get(ORIENTATION) in SIDEWAYS
    least = how.decoded(*((height, width) if turned else (width, height)))
    if least is None or image.draft(image.mode, least[::-1] if turned else least) is None:
        return None
    return (height, width) if turned else (width, height)


def _bytes_of(source: str | Path | bytes, where: str) -> IO[bytes]:
    """A picture, open for reading: bytes, or a regular file of a size that a picture can have."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        content = open_plain(Path(source))
    except BadInput as error:
        reason = f"it cannot be read as a picture ({error.why})"
        raise BadInput(where, reason if str(source) in where else f"{source}: {reason}", "replace or remove it") from None
    if (size := os.fstat(content.fileno()).st_size) > LARGEST_PICTURE:
        content.close()
        raise BadInput(where, f"{source} has {size:,} bytes, a picture at most {LARGEST_PICTURE:,}", "scale it down")
    return content


def to_rgb(image: Image.Image, stored: str = "") -> Image.Image:
    """`image` in mode RGB; transparent parts become white. `stored` is Pillow's name for the pixels of its file, like `RGB;16B`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    clear = _clear_pixels(image, stored)
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("La", "RGBa"):  # colours that are multiplied by their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("LA", "PA", "RGBA") or (image.mode == "P" and "transparency" in image.info):
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        paper.alpha_composite(layer)
        return paper.convert("RGB")
    image.info.pop("transparency", None)
    if clear is None:
        return image.convert("RGB")
    pixels = np.array(image.convert("RGB"))
    pixels[clear] = 255
    return Image.fromarray(pixels)


def _clear_pixels(image: Image.Image, stored: str) -> NDArray[np.bool_] | None:
    """Where a picture has the one colour that its file declares transparent, `[H, W]`; None if it declares none."""
    key = image.info.get("transparency")
    if key is None or isinstance(key, bytes) or image.mode not in ("1", "L", "I", "I;16", "I;16B", "RGB"):
        return None
    bits = next((int(part) for part in ("16", "4", "2") if f";{part}" in stored), 1 if image.mode == "1" else 8)
    scale = {1: 255, 2: 85, 4: 17}.get(bits, 1)  # the colour is given in the depth of the file, which Pillow widens to 8 bits
    wanted = np.asarray(key, np.int64) * scale >> (8 if bits == 16 and image.mode == "RGB" else 0)  # or cuts down to them
    seen = np.asarray(image.convert("L") if image.mode == "1" else image)
    same: NDArray[np.bool_] = np.asarray(seen == wanted)
    return np.asarray(same.all(-1)) if seen.ndim == 3 else same
