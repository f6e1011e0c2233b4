"""Pictures alone, of which nothing need be said."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientvlm.data.folders import note, walk
from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import MemoryTable


@dataclass(slots=True)
class ImageItem:
    """A picture."""

    id: str
    image: Pixels


class Images(Kind[ImageItem, None]):
    """Roles image and, optionally, image_id. What else is said of a picture, beside it or in the name of its folder, is not looked at."""

    name, holds = "images", "pictures"
    roles = {"image": IMAGE_NAMES, **IMAGE_ID}
    required = ("image",)

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> None:
        return None

    def of_folder(self, folder: Path, skips: Skips) -> MemoryTable | None:
        """Every picture of a folder and its subfolders. They are told from others of the same names by their bytes' number."""
        found = walk(folder, skips)
        if not found.pictures:
            return None
        note(found, skips, shards=False)
        pictures = found.pictures
        digest = hashlib.sha256()
        for path in pictures:
            digest.update(os.fsencode(path.relative_to(folder)) + f"\0{path.stat().st_size}\n".encode())
        return MemoryTable({"image": pictures}, folder, lambda row: str(pictures[row]), digest.hexdigest())

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[None]]) -> ImageItem:
        (picture,) = pictures
        return ImageItem(key, picture.pixels)

    def shown(self, key: str, pixels: Pixels) -> ImageItem:
        return ImageItem(key, pixels)

    def texts(self, contents: Sequence[None]) -> Iterator[str]:
        yield from ()

    def drawn(self, shapes: Shapes[ImageItem], index: int, key: str) -> ImageItem:
        return ImageItem(key, shapes.picture(index)[1])

    def contents_at(self, shapes: Shapes[ImageItem], index: int) -> list[None]:
        return [None]


IMAGES = Images()
