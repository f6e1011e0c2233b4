"""Pictures that are written for people: what was found is drawn into a copy."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from efficientvlm.checkpoints.files import open_plain, result_path, unwritable, write_atomic
from efficientvlm.data.boxes import PixelBox
from efficientvlm.data.images import open_image
from efficientvlm.errors import BadInput

INNER, OUTER = (255, 64, 0), (255, 255, 255)
MARK, MADE_BY = "Software", "efficientvlm"  # an entry of PNG's own, by which pictures of ours are known
THICKNESS = 200  # a line is one in so many pixels of the longer side, and two pixels at least


def with_box(image: str | Path, box: PixelBox) -> Image.Image:
    """The picture in a file, upright, with a frame around `box` (left, top, width, height in its pixels)."""
    picture = Image.fromarray(open_image(image))
    left, top, width, height = box
    corners = (left, top, max(left, left + width - 1), max(top, top + height - 1))
    line, draw = max(2, max(picture.size) // THICKNESS), ImageDraw.Draw(picture)
    draw.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=OUTER, width=line + 2)
    draw.rectangle(corners, outline=INNER, width=line)
    return picture


def picture_path(out: str, sources: Sequence[str | Path] = (), *, option: str = "--out") -> Path:
    """The PNG file that a picture is written to: none yet, or one that :func:`write_picture` wrote.

    Raises:
        BadInput: another kind of file, something that is no file, one of the pictures `sources` themselves, or any other picture.
    """
    path = result_path(out, "found.png")
    if path.suffix.lower() != ".png":
        raise BadInput(f"{option} {out}", "pictures are written as PNG", "give a file that is called .png")
    if any(os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source) for source in sources):
        raise BadInput(f"{option} {out}", "it is the picture itself, which is not changed", "give another file")
    if os.path.lexists(path) and not _is_ours(path):
        raise BadInput(f"{option} {out}", "there is another picture, which evlm predict did not write", "remove it, or give another file")
    return path


def _is_ours(path: Path) -> bool:
    try:
        with open_plain(path) as file, Image.open(file, formats=["PNG"]) as picture:
            return bool(picture.info.get(MARK) == MADE_BY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def write_picture(picture: Image.Image, path: Path) -> str:
    """Write a picture as PNG, as a whole, with the folders above it; its name.

    Raises:
        BadInput: the system refuses it.
    """
    content, mark = io.BytesIO(), PngImagePlugin.PngInfo()
    mark.add_text(MARK, MADE_BY)
    picture.save(content, "PNG", pnginfo=mark)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.getvalue())
    except OSError as error:
        raise unwritable(path, error) from None
    return str(path)
