"""Pictures alone, of which nothing need be said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.shapes import Shapes


@dataclass(slots=True)
class ImageItem:
    """A picture."""

    id: str
    image: Pixels


class Images(Kind[ImageItem, None]):
    """Roles image and, optionally, image_id."""

    name, holds = "images", "pictures"
    roles = {"image": IMAGE_NAMES, **IMAGE_ID}
    required = ("image",)

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> None:
        return None

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[None]]) -> ImageItem:
        (picture,) = pictures
        return ImageItem(key, picture.pixels)

    def texts(self, contents: Sequence[None]) -> Iterator[str]:
        yield from ()

    def drawn(self, shapes: Shapes[ImageItem], index: int, key: str) -> ImageItem:
        return ImageItem(key, shapes.picture(index)[1])

    def contents_at(self, shapes: Shapes[ImageItem], index: int) -> list[None]:
        return [None]


IMAGES = Images()
