"""Random crops as CLIP and DIME-FM are published, and JPEGs that are decoded at a reduced size for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from efficientvlm.data import images
from efficientvlm.data.configured import augmentation, open_split
from efficientvlm.data.draw import generator
from efficientvlm.data.images import open_sized
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.data.preprocessing import BILINEAR, Preprocessing
from efficientvlm.data.transforms import Crop, augment
from efficientvlm.errors import BadInput
from efficientvlm.settings.compose import stage_settings

CLIP = Preprocessing(224, 224, crop=True)


def photo(width: int, height: int) -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


def encoded(picture: Image.Image, form: str = "JPEG", **more: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **more)
    return out.getvalue()


def test_pictures_to_be_cropped_are_whole_and_a_seventh_larger() -> None:
    for side in range(8, 600):
        assert round(CLIP.squash(side).for_training("crop").side * 7 / 8) == side
    how = CLIP.for_training("crop")
    pixels, size = open_sized(encoded(photo(400, 300)), how)
    assert how.side == 256 and pixels.shape == (256, 341, 3) and size == (400, 300)
    seen = augment(Crop(), pixels, generator(0, "crop"))
    assert seen.image.shape == (224, 224, 3)
    assert CLIP.for_training("none") == CLIP.for_training("light") == CLIP


def test_a_crop_is_the_published_one_on_the_same_rectangle() -> None:
    """Red grows to the right and green downwards, so that the corners of a crop say where it was."""
    pixels = np.asarray(photo(341, 256))
    areas, ratios, mirrored = [], [], 0
    for number in range(300):
        seen = augment(Crop((0.2, 0.6)), pixels, generator(number, "crop")).image.astype(float)
        left, right, top, bottom = seen[112, 2, 0], seen[112, -3, 0], seen[2, 112, 1], seen[-3, 112, 1]
        mirrored += left > right
        width, height = abs(right - left) / 250, (bottom - top) / 250
        areas.append(width * height)
        ratios.append(width * 341 / (height * 256))
    assert 0.18 < min(areas) < 0.25 and 0.5 < max(areas) < 0.62 and 0.36 < np.mean(areas) < 0.44
    assert 0.72 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.37 and abs(np.mean(np.log(ratios))) < 0.03
    assert 110 < mirrored < 190
    whole = augment(Crop((1.0, 1.0)), np.asarray(photo(800, 80)), generator(0, "crop"), flip_ok=False).image
    middle = photo(800, 80).resize((70, 70), Image.Resampling.BILINEAR, box=(400 - 160 / 3, 0, 400 + 160 / 3, 80))
    assert np.array_equal(whole, np.asarray(middle)), "of what is too long for any crop the middle is taken"


def test_boxes_follow_a_crop() -> None:
    pixels = np.zeros((256, 341, 3), np.uint8)
    pixels[100:140, 200:260] = 255
    box = np.array([[230 / 341, 120 / 256, 60 / 341, 40 / 256]], np.float32)
    for number in range(20):
        seen = augment(Crop(), pixels, generator(number, "box"), box, whole=True)
        rows, columns = np.nonzero(seen.image[..., 0] > 127)
        found = (columns.min() / 224, rows.min() / 224, (columns.max() + 1) / 224, (rows.max() + 1) / 224)
        x, y, w, h = seen.boxes[0]
        assert np.abs(np.subtract(found, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))).max() < 0.02 and seen.visible[0] > 0.99


@pytest.mark.parametrize(
    ("size", "how", "least"),
    [
        ((2048, 1536), CLIP.for_training("crop"), 512),
        ((4096, 4096), Preprocessing.squash(224).for_training("paper"), 448),
        ((1025, 1100), CLIP.for_training("crop"), 512),
        ((600, 900), CLIP.for_training("crop"), 512),
    ],
)
def test_reduced_sides_stay_twice_as_long_as_they_are_to_be(
    size: tuple[int, int], how: Preprocessing, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    real = images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda image, stored="": (made.append(image.size), real(image, stored))[1])
    content = encoded(photo(*size))
    pixels, full = open_sized(content, how)
    assert full == size and least <= min(made[0]) and (min(made[0]) < 2 * least or made[0] == size)
    exact = Preprocessing(how.side, how.resize, how.crop, how.resample, whole=how.whole)
    assert np.abs(pixels.astype(int) - open_sized(content, exact)[0]).mean() < 2 and made[1] == size
    open_sized(encoded(photo(*size), "PNG"), how)
    assert made[2] == size, "only a JPEG can be reduced"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_reduced_as_it_stands_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(1600, 1200), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    for how in (CLIP.for_training("crop"), Preprocessing.squash(64).for_training("paper")):
        pixels, size = open_sized(content, how)
        exact = Preprocessing(how.side, how.resize, how.crop, how.resample, whole=how.whole).pixels(upright.convert("RGB"), "")
        assert size == upright.size and pixels.shape == exact.shape and np.abs(pixels.astype(int) - exact).mean() < 2


def test_measuring_and_asking_decode_exactly(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(encoded(photo(2048, 1536), quality=70))
    (tmp_path / "rows.csv").write_text("image,caption\n0.jpg,something\n")
    data = {"task": "retrieval", "model": "m", "data": str(tmp_path / "rows.csv")}
    train = stage_settings("finetune", {**data, "out": "o", "augment": "crop"})
    train = train.model_copy(update={"val_fraction": 0.0})
    measured = stage_settings("eval", {**data, "split": "train"})
    how = Preprocessing(64, 64, True, BILINEAR)
    exact = how.pixels(Image.open(tmp_path / "0.jpg"), "")
    assert np.array_equal(open_split(measured.model_copy(update={"val_fraction": 0.0}), PAIRS, "train", how)[0].image, exact)
    item: Any = open_split(train, PAIRS, "train", how)[0]
    assert item.image.shape == (73, 97, 3)
    kept: dict[str, Any] = {"seed": 0, "step": 0, "task": True, **augmentation(train)}
    assert kept["augment_kind"] == Crop((0.08, 1.0))

    class Words:
        def batch(self, *_: Any) -> tuple[Any, Any]:
            return None, None

    words: Any = Words()
    assert pair_batch([item], words, **kept)["pixels"].shape == (1, 3, 64, 64)


def test_the_part_that_is_cropped_goes_with_crops() -> None:
    given = {"task": "vqa", "model": "m", "out": "o", "data": "shapes"}
    assert stage_settings("finetune", {**given, "augment": "crop", "crop_scale": [0.5, 1]}).crop_scale == (0.5, 1.0)
    for wrong in ({"crop_scale": [0.5, 1]}, {"augment": "crop", "crop_scale": [0.5, 0.2]}, {"augment": "crop", "crop_scale": [0, 1]}):
        with pytest.raises(BadInput, match="crop_scale"):
            stage_settings("finetune", {**given, **wrong})
