"""Pictures become what `preprocessor_config.json` says: the pixels of transformers' image processors, the features of its models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from clip_folder import byte_pairs, write_clip
from compression_cases import CONFIGS, build, family, network
from conftest import run_stage
from PIL import Image

from efficientvlm.control import Control
from efficientvlm.data import preprocessing
from efficientvlm.data.images import open_image, to_rgb
from efficientvlm.data.items import Region
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.opening import open_data
from efficientvlm.data.preprocessing import PROCESSORS, Preprocessing, seen_regions
from efficientvlm.data.tokenizer import save_tokenizer, train_wordpiece
from efficientvlm.errors import BadInput
from efficientvlm.families.image_settings import default_settings, preprocessing_of
from efficientvlm.families.towers.parts import normalise
from efficientvlm.loaded import load

SIZES = ((40, 23), (23, 40), (37, 37), (11, 61), (16, 16), (9, 7))


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(size[0])
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2}[mode]
    values = draw.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode)


def stock(kind: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, f"{kind}Pil")(**settings)


def ours(kind: str, settings: dict[str, Any], image: Image.Image, side: int = 16) -> torch.Tensor:
    """Normalised pixels [3, side, side]."""
    how = preprocessing.read(settings, side, "settings", kind)
    pixels = torch.from_numpy(how.pixels(to_rgb(image), "a picture").transpose(2, 0, 1).copy())[None]
    return normalise(pixels, *preprocessing.statistics(settings, "settings", kind), torch.float32)[0]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_file_does_not_say_is_as_in_the_class_of_transformers(kind):
    theirs = stock(kind, {})
    for name, value in PROCESSORS[kind].items():
        other = getattr(theirs, name, None)
        assert (other or False) == value if name == "do_center_crop" else (dict(other) if name in ("size", "crop_size") else other) == value


CASES: list[tuple[str, dict[str, Any]]] = [
    ("CLIPImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}),
    ("CLIPImageProcessor", {"size": 16, "crop_size": 16}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 19}, "crop_size": 16}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 13}, "crop_size": 16}),
    ("CLIPImageProcessor", {"size": {"height": 20, "width": 14}, "crop_size": [16, 16]}),
    ("CLIPImageProcessor", {"do_resize": False, "crop_size": 16}),
    ("CLIPImageProcessor", {"size": 16, "crop_size": 16, "do_rescale": False}),
    ("CLIPImageProcessor", {"size": 16, "crop_size": 16, "rescale_factor": 1 / 127.5}),
    ("CLIPImageProcessor", {"size": 16, "crop_size": 16, "do_normalize": False}),
    ("CLIPImageProcessor", {"size": 16, "crop_size": 16, "image_mean": 0.5, "image_std": [0.2, 0.3, 0.4]}),
    ("CLIPImageProcessor", {"size": [16, 16], "do_center_crop": False}),
    ("CLIPImageProcessor", {"size": [16, 16], "do_center_crop": None, "do_rescale": None, "do_normalize": None}),
    ("SiglipImageProcessor", {"size": {"height": 16, "width": 16}}),
    ("SiglipImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 2}),
    ("SiglipImageProcessor", {"size": 17, "do_center_crop": True, "crop_size": 16}),
    ("BlipImageProcessor", {"size": 16}),
    ("BlipImageProcessor", {"size": {"height": 16, "width": 16}, "do_rescale": False, "do_normalize": False}),
    ("BitImageProcessor", {"size": {"shortest_edge": 18}, "crop_size": 16}),
    ("ViTImageProcessor", {"size": 16}),
]


@pytest.mark.parametrize("kind, settings", CASES)
def test_pixels_are_those_of_transformers(kind, settings):
    theirs = stock(kind, settings)
    for size in SIZES:
        expected = theirs(picture(size), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours(kind, settings, picture(size)), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", [int(kind) for kind in Image.Resampling])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_every_filter_and_kind_of_picture(resample, mode):
    settings = {"size": 16, "crop_size": 16, "resample": resample}
    expected = stock("CLIPImageProcessor", settings)(picture((40, 23), mode), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours("CLIPImageProcessor", settings, picture((40, 23), mode)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": 16, "do_center_crop": False}, "shortest edge of 16"),
        ({"size": {"longest_edge": 16}}, "size is"),
        ({"size": {"shortest_edge": 16, "longest_edge": 32}}, "size is"),
        ({"size": 16, "crop_size": 24}, "24 x 24, the model reads 16 x 16"),
        ({"size": 16, "crop_size": {"shortest_edge": 16}}, "crop_size is"),
        ({"size": 0}, "size is 0"),
        ({"size": [16, 16, 3]}, "size is"),
        ({"size": {"shortest_edge": [16]}}, "size is"),
        ({"size": {}}, "size is"),
        ({"size": True}, "size is"),
        ({"size": 16, "crop_size": 16, "resample": 99}, "resample is 99"),
        ({"size": 16, "crop_size": 16, "resample": "bicubic"}, "resample"),
        ({"size": 16, "crop_size": 16, "do_pad": True}, "do_pad"),
        ({"image_processor_type": "DonutImageProcessor"}, "DonutImageProcessor"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({}, "224 x 224, the model reads 16 x 16"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(settings, message):
    with pytest.raises(BadInput, match=message):
        preprocessing.statistics(settings, "settings", "CLIPImageProcessor")
        preprocessing.read(settings, 16, "settings", "CLIPImageProcessor")


def test_a_picture_that_nothing_fits_to_the_model_is_refused(tmp_path):
    picture((20, 16)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="20 x 16 pixels, the model reads 16 x 16"):
        open_image(tmp_path / "a.png", Preprocessing(16), "row 1")
    Image.new("RGB", (60_000, 1)).save(tmp_path / "b.png")
    with pytest.raises(BadInput, match="shortest edge of 224"):
        open_image(tmp_path / "b.png", Preprocessing(224, 224, True), "row 2")


def test_regions_follow_the_crop():
    how = Preprocessing(16, 16, True)  # of 64 x 32 the middle 32 x 32
    left, middle, wide = (
        Region(name, box) for name, box in {"l": (0.1, 0.5, 0.2, 1), "m": (0.5, 0.5, 0.25, 0.5), "w": (0.5, 0.5, 1, 1)}.items()
    )
    seen = seen_regions([left, middle, wide], how, 64, 32)
    assert [(region.phrase, region.box) for region in seen] == [("m", (0.5, 0.5, 0.5, 0.5)), ("w", (0.5, 0.5, 1, 1))]
    assert seen_regions([left], Preprocessing.squash(16), 64, 32) == seen_regions([left], 16, 64, 32) == [left]


def folder_of(name: str, path: Path) -> Path:
    """A folder as transformers writes it, with an image processor that is not a square resize for CLIP."""
    if name == "clip":
        return write_clip(path, byte_pairs())
    model = build(name)[0]
    if name.startswith("blip"):
        config = CONFIGS[name].copy()
        config.vision_config.hidden_size = config.text_config.encoder_hidden_size = 24
        model = network(config)
    family(name).save(model, path)
    values = json.loads((path / "config.json").read_text())
    for key in ("image_mean", "image_std"):
        del values[key]
    (path / "config.json").write_text(json.dumps(values))
    save_tokenizer(train_wordpiece(["a red circle"], 20), path)
    kind = "SiglipImageProcessor" if name == "siglip" else "BlipImageProcessor"
    stock(kind, {"size": {"height": 16, "width": 16}, "resample": 2}).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["clip", "siglip", "blip-caption"])
def test_features_of_pictures_of_any_aspect_are_those_of_transformers(name, tmp_path):
    source = folder_of(name, tmp_path / "hf")
    run_stage("import", out=str(tmp_path / "m"), model=str(source))
    rows = []
    for number, (size, mode) in enumerate(zip(SIZES, ("RGB", "RGB", "L", "RGBA", "RGB", "LA"), strict=True)):
        picture(size, mode).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "caption": "a red circle"}))
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    network = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}.get(name, transformers.BlipForConditionalGeneration)
    theirs = network.from_pretrained(source).eval()
    images = [Image.open(tmp_path / f"{number}.png") for number in range(len(SIZES))]
    loaded = load(str(tmp_path / "m"))
    items = open_data(PAIRS, str(tmp_path / "d.jsonl"), "test", image_size=loaded.preprocessing)
    pixels = torch.stack([torch.from_numpy(items[index].image.transpose(2, 0, 1).copy()) for index in range(len(items))])
    with torch.no_grad():
        expected = theirs.vision_model(pixel_values=processor(images, return_tensors="pt")["pixel_values"]).last_hidden_state
        if name == "blip-caption":
            got = loaded.model.encode_image(pixels).states
        else:
            expected = theirs.get_image_features(pixel_values=processor(images, return_tensors="pt")["pixel_values"])
            expected = torch.nn.functional.normalize(getattr(expected, "pooler_output", expected), dim=-1)
            got = loaded.model.embed_images(pixels)[1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_settings_that_contradict_the_configuration_are_refused():
    config = CONFIGS["clip"]
    sizes, settings = config.sizes(), default_settings(config.sizes())
    assert preprocessing_of(settings, sizes, Path("m")) == Preprocessing.squash(16)
    for change in ({"rescale_factor": 1 / 127.5}, {"image_mean": [0.5, 0.5, 0.5]}, {"do_normalize": False}):
        with pytest.raises(BadInput, match="image_mean contradicts"):
            preprocessing_of(settings | change, sizes, Path("m"))
    with pytest.raises(BadInput, match="8 x 8, the model reads 16 x 16"):
        preprocessing_of(settings | {"do_center_crop": True, "crop_size": 8}, sizes, Path("m"))


def test_what_transformers_does_not_follow_either_is_said(tmp_path, capsys):
    source = write_clip(tmp_path / "hf", byte_pairs())
    file = source / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"crop_pct": 0.9, "do_flip": False}))
    run_stage("import", Control(), out=str(tmp_path / "m"), model=str(source))
    assert "not followed in preprocessor_config.json, as transformers does not either: crop_pct" in capsys.readouterr().err
