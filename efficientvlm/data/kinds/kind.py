"""What a kind of sample has to say for itself; all readers of data ask it, and know no kind themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from efficientvlm.data.folders import image_folder
from efficientvlm.data.items import Pixels
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import MemoryTable
from efficientvlm.errors import BadInput

if TYPE_CHECKING:
    from efficientvlm.data.shapes import Shapes

IMAGE_NAMES = ("image", "image_path", "img", "binary", "file_name")
IMAGE_ID = {"image_id": ("image_id", "img_id")}

Item = TypeVar("Item")
Content = TypeVar("Content")


class Picture(NamedTuple):
    """A picture as it was read: its pixels, the width and height it had before (None for none that was read), and how it was prepared."""

    pixels: Pixels
    size: tuple[int, int] | None
    how: Preprocessing | int | None


class Row(NamedTuple, Generic[Content]):
    """What a row of data says, and how to find it, for messages."""

    content: Content
    where: str


class Kind(Generic[Item, Content]):
    """A kind of sample: which columns a row has for it, what they must hold, and what becomes of the rows that share their pictures."""

    name: ClassVar[str]
    holds: ClassVar[str]
    """What data of this kind have, in a message: `captions`."""
    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    """Role → names of columns that are recognised without `--column`; pictures first."""
    required: ClassVar[tuple[str, ...]]
    pictures: ClassVar[tuple[str, ...]] = ("image",)
    """Roles of the pictures of a row: none, one or several."""
    listed: ClassVar[str] = ""
    """Role of a column that lists all of them, in the place of a column for each; empty where there is none."""
    plain: ClassVar[bool] = False
    """Whether a line of a plain text file is a sample."""

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Content:
        """What a row says beside its pictures, checked before training starts; `values` by role, `columns` role → column.

        Raises:
            BadInput: it cannot be used; names `where`.
        """
        raise NotImplementedError

    def of_folder(self, folder: Path, skips: Skips) -> MemoryTable | None:
        """The rows of a folder of pictures without a file that says what they show; None where it holds no picture.

        Raises:
            BadInput: nothing is said of them that this kind needs.
        """
        return image_folder(folder, skips)

    def check(self, row: Row[Content], pictures: Sequence[Picture]) -> None:
        """:class:`BadInput` where what a row says does not fit its pictures, now that they are read: this row alone is left out."""

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[Content]]) -> Item:
        """The sample `key`: its pictures in the order of their roles, and every usable row that has them.

        Raises:
            BadInput: something does not fit the pictures.
        """
        raise NotImplementedError

    def shown(self, key: str, pixels: Pixels) -> Item | None:
        """The sample that a picture is of which nothing is said; None where this kind needs more."""
        return None

    def texts(self, contents: Sequence[Content]) -> Iterator[str]:
        """Every string in what the rows of a sample say."""
        raise NotImplementedError

    def longest(self, contents: Sequence[Content]) -> list[Content]:
        """What the rows of a sample say where of several texts the longest is read: for the memory that it may take."""
        return list(contents)

    def drawn(self, shapes: Shapes[Item], index: int, key: str) -> Item:
        """The sample of the generator `shapes` at `index`."""
        raise self.not_drawn(shapes)

    def contents_at(self, shapes: Shapes[Item], index: int) -> list[Content]:
        """What the generator `shapes` says at `index`, without drawing it."""
        raise self.not_drawn(shapes)

    def not_drawn(self, shapes: Shapes[Item]) -> BadInput:
        return BadInput(f"data {shapes.name}", f"it has no {self.holds}", f"use {self.holds} of your own")
