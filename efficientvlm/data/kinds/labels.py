"""Pictures and their classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficientvlm.data import phrases
from efficientvlm.data.cells import check_size, listed, shown, text_of
from efficientvlm.data.class_folders import class_folder
from efficientvlm.data.items import Pixels
from efficientvlm.data.kinds.kind import IMAGE_ID, IMAGE_NAMES, Kind, Picture, Row
from efficientvlm.data.scenes import COLOURS, SHAPES
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import MemoryTable
from efficientvlm.errors import BadInput

NAMES = ("label", "labels", "class", "class_name", "classes", "category", "fine_label", "target", "cls")


@dataclass(slots=True)
class LabelledItem:
    """An image and what it shows, as the data call it; mostly one class."""

    id: str
    image: Pixels
    labels: list[str]


class Labels(Kind[LabelledItem, list[str]]):
    """Roles image, label (a text, a number or a class label; or a list of them) and, optionally, image_id.

    In a folder of pictures alone, the class of a picture is the folder that it lies in.
    """

    name, holds = "labels", "classes"
    roles = {"image": IMAGE_NAMES, **IMAGE_ID, "label": NAMES}
    required = ("image", "label")

    def content(self, values: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> list[str]:
        value = listed(values.get("label"), where, columns["label"])
        found = labels_of(value)
        if not found:
            fix = "a class is a text or a number, or a list of them; write one, or remove the row"
            raise BadInput(where, f"its {columns['label']} is no class ({shown(value)})", fix)
        check_size(found, where, columns["label"])
        return found

    def of_folder(self, folder: Path, skips: Skips) -> MemoryTable | None:
        return class_folder(folder, skips)

    def item(self, key: str, pictures: Sequence[Picture], rows: Sequence[Row[list[str]]]) -> LabelledItem:
        (picture,) = pictures
        return LabelledItem(key, picture.pixels, list(dict.fromkeys(label for labels, _ in rows for label in labels)))

    def texts(self, contents: Sequence[list[str]]) -> Iterator[str]:
        yield from dict.fromkeys(label for labels in contents for label in labels)

    def drawn(self, shapes: Shapes[LabelledItem], index: int, key: str) -> LabelledItem:
        scene, image = shapes.picture(index)
        return LabelledItem(key, image, list(dict.fromkeys(map(phrases.kind, scene.things))))

    def contents_at(self, shapes: Shapes[LabelledItem], index: int) -> list[list[str]]:
        return [list(dict.fromkeys(map(phrases.kind, shapes.scene(index)[1].things)))]


LABELS = Labels()


def labels_of(value: Any) -> list[str]:
    """The classes in a cell; none where one of them is no text and no number."""
    values = value if isinstance(value, list) else [value]
    found = [text_of(one) for one in values]
    return [] if None in found else list(dict.fromkeys(text for text in found if text))


def classes_of(source: Any) -> list[str]:
    """All classes that the data of a source know, whatever part of them it reads: as its schema lists them, numbers in their order, or
    else in alphabetical order."""
    whole = source
    while hasattr(whole, "source"):
        whole = whole.source  # a part that was drawn
    if isinstance(whole, Shapes):
        level = whole.settings.level
        return [f"{colour} {shape}" for colour in list(COLOURS)[: level.colours] for shape in SHAPES[: level.shapes]]
    found = {label: None for value in whole.values_of("label") for label in _readable(value)}
    listed_ones = whole.listed_in("label")
    if set(found) <= set(listed_ones):
        return listed_ones
    if all(label.isdecimal() and label.isascii() for label in found):
        return sorted(found, key=int)
    return sorted(found)


def _readable(value: Any) -> list[str]:
    try:
        return labels_of(listed(value, "", ""))
    except BadInput:
        return []  # such a row is left out where it is read


def present_in(source: Any) -> list[str]:
    """The classes that an image of the source has; of scenes all that may occur."""
    whole = source
    while hasattr(whole, "source"):
        whole = whole.source
    if isinstance(whole, Shapes):
        among = whole.settings.among
        return [name for name in classes_of(whole) if among is None or tuple(name.split()) in among]
    return list(LABELS.texts([label for contents in whole.contents() for label in contents]))
