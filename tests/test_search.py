"""Search by evlm predict: pictures of a folder for a text, texts for a picture, and the sheet of what was found."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_cases import CONFIGS, family
from conftest import SHAPES, run_stage
from PIL import Image
from test_export import checkpoint, small

from efficientvlm.cli import main as cli
from efficientvlm.data.kinds.pairs import PAIRS
from efficientvlm.data.opening import open_data
from efficientvlm.errors import BadInput
from efficientvlm.families import footprint
from efficientvlm.loaded import load, texts_of
from efficientvlm.stages import predict
from efficientvlm.tasks import search, sheets


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures in two folders, one in the other, a torn one, and a file that is no picture."""
    root = tmp_path_factory.mktemp("album")
    (root / "älter" / "照片").mkdir(parents=True)
    source = open_data(PAIRS, SHAPES, "train", image_size=64)
    for at in range(6):
        place = root if at < 2 else root / "älter" / "照片"
        Image.fromarray(source[at].image).save(place / f"{at}.png")
    (root / "torn.jpg").write_bytes(b"\xff\xd8 no more of it")
    (root / "notes.txt").write_text("of a journey")
    return root


def scores(model: str, pictures: list[str], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and matching logits of all pairs at once."""
    loaded = load(model)
    pixels = torch.stack([torch.from_numpy(search.open_image(path, loaded.preprocessing)).permute(2, 0, 1) for path in pictures])
    ids, mask = texts_of(loaded).batch(texts)
    with torch.inference_mode():
        states, image = loaded.model.embed_images(pixels)
        read, text = loaded.model.embed_texts(ids, mask)
        pairs = torch.cartesian_prod(torch.arange(len(pictures)), torch.arange(len(texts)))
        logits = loaded.model.match(states, pairs[:, 0], read[pairs[:, 1]], mask[pairs[:, 1]])
    return image @ text.T, logits.view(len(pictures), len(texts), 2)


def test_the_best_pictures_of_a_folder(chain: Path, album: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of matching, computed in blocks of one picture as all pairs at once say; what cannot be read is counted and said."""
    texts = ["a red circle", "a blue square above a circle"]
    asked: dict[str, Any] = {"model": str(chain / "init"), "image": str(album), "text": texts, "device": "cpu"}
    monkeypatch.setattr(search, "BATCH", 2)
    monkeypatch.setitem(footprint.BLOCK, "cpu", 1)
    found = predict.run(**asked, top=4, out=str(tmp_path / "sheets" / "found.png"))
    said = capsys.readouterr().err
    assert found["pictures"] == 6 and found["texts"] == 2 and found["unreadable"] == [str(album / "torn.jpg")]
    assert "1 of 7 pictures cannot be read" in said and f"left out {album / 'torn.jpg'}: " in said and "predict pictures" in said
    pictures = sorted(map(str, album.rglob("*.png")))
    cosines, logits = scores(asked["model"], pictures, texts)
    for at, text in enumerate(texts):
        rows = [row for row in found["answers"] if row["text"] == text]
        assert [row["image"] for row in rows] == [pictures[i] for i in logits[:, at, 1].argsort(descending=True).tolist()[:4]]
        for row in rows:
            place = pictures.index(row["image"])
            assert row["similarity"] == pytest.approx(float(cosines[place, at]), abs=1e-4)
            assert row["score"] == pytest.approx(float(logits[place, at, 1]), abs=1e-4)
            assert row["probability"] == pytest.approx(float(logits[place, at].softmax(0)[1]), abs=1e-4)
    drawn = Image.open(found["out"])
    assert drawn.format == "PNG" and drawn.width > 4 * sheets.SIDE and drawn.height > 2 * sheets.SIDE
    first = Image.open(found["answers"][0]["image"]).convert("RGB").resize((160, 160), Image.Resampling.LANCZOS)
    tile = drawn.crop((sheets.GAP, sheets.GAP + sheets.LINE, sheets.GAP + 160, sheets.GAP + sheets.LINE + 160))
    difference = torch.tensor(list(tile.tobytes())).sub(torch.tensor(list(first.tobytes()))).abs().float().mean()
    assert difference < 2, "the best picture comes first"
    plain = predict.run(**asked, rerank=0, top=2, quiet=True, out=found["out"])  # what it wrote itself is replaced
    said = capsys.readouterr().err
    assert "1 of 7 pictures cannot be read" in said and "predict pictures" not in said, "quiet is about progress"
    assert [row["image"] for row in plain["answers"]] == [
        pictures[i] for at in range(2) for i in cosines[:, at].argsort(descending=True).tolist()[:2]
    ]
    assert all("score" not in row for row in plain["answers"])


def test_the_best_texts_of_a_picture(chain: Path, album: Path, tmp_path: Path, capsys: Any) -> None:
    """From a file of many lines, of another script too, and from the command line."""
    lines = ["a red circle", "", "ein Kreis", "红色的圆圈", "a blue square", *(f"{number} squares" for number in range(60))]
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    asked: dict[str, Any] = {"model": str(chain / "init"), "image": str(album / "0.png"), "device": "cpu"}
    found = predict.run(**asked, text="a circle", texts=str(tmp_path / "texts.txt"), top=70, out=str(tmp_path / "a.png"))
    texts = [line for line in ["a circle", *lines] if line]
    logits = scores(asked["model"], asked["image"].split("\0"), texts)[1][0, :, 1]
    assert [row["text"] for row in found["answers"]] == [texts[i] for i in logits.argsort(descending=True, stable=True).tolist()]
    assert found["pictures"] == 1 and found["texts"] == len(texts) == 65 and Image.open(tmp_path / "a.png").width > 640
    said = capsys.readouterr().err
    assert "question marks for letters of 1 text" in said and "unknown" in said and "shows the first 50 of 65 texts" in said
    many = [{"text": "a circle", "image": str(album / "0.png"), "similarity": 0.5} for _ in range(51)]
    assert search.sheet(many, False).width == sheets.GAP + 50 * (sheets.SIDE + sheets.GAP)
    assert "shows the first 50 of 51 pictures of a text" in capsys.readouterr().err


def test_a_folder_with_one_picture_that_can_be_read_is_searched(chain: Path, album: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for name in ("0.png", "torn.jpg"):
        (tmp_path / "one" / name).write_bytes((album / name).read_bytes())
    texts = ["a red circle", "a blue square", "a circle"]
    asked: dict[str, Any] = {"model": str(chain / "init"), "text": texts, "device": "cpu", "top": 1}
    for images in ([tmp_path / "one"], [album / "0.png", album / "torn.jpg"]):
        found = predict.run(**asked, image=list(map(str, images)), out=str(tmp_path / "sheet.png"))
        assert [row["text"] for row in found["answers"]] == texts and found["pictures"] == 1 and len(found["unreadable"]) == 1
    assert len(predict.run(**asked, image=str(album / "0.png"))["answers"]) == 1


def test_wrong_questions_are_refused(chain: Path, album: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no")
    Image.new("RGB", (9, 9)).save(tmp_path / "own.png")
    (tmp_path / "none.txt").write_text("\n\n")
    asked: dict[str, Any] = {"model": str(chain / "init"), "image": str(album), "text": "a circle", "device": "cpu"}
    before = (album / "0.png").read_bytes()
    for changes, words in (
        ({"text": None}, "nothing to look for"),
        ({"text": ["a", " "]}, "one is empty"),
        ({"texts": str(tmp_path / "none.txt")}, "holds no texts"),
        ({"texts": str(tmp_path / "nowhere.txt")}, "does not exist"),
        ({"image": str(tmp_path / "empty")}, "holds no picture"),
        ({"image": str(tmp_path / "bad.png")}, "cannot be read as a picture"),
        ({"image": [str(tmp_path / "bad.png"), str(album / "torn.jpg")]}, "none of 2 pictures"),
        ({"out": str(tmp_path / "a.jpg")}, "written as PNG"),
        ({"out": str(album / "0.png")}, "the picture itself"),
        ({"out": str(tmp_path / "own.png")}, "another picture"),
        ({"out": str(tmp_path / "bad.png")}, "another picture"),
        ({"top": 0}, "greater than or equal to 1"),
        ({"question": "what?"}, "question: unknown key"),
    ):
        with pytest.raises(BadInput) as refused:
            predict.run(**{**asked, **changes})
        assert words in str(refused.value), words
    assert (album / "0.png").read_bytes() == before and not list(tmp_path.glob("*.jpg"))
    with pytest.raises(BadInput, match="cannot compare images with texts"):
        predict.run(**{**asked, "model": str(chain / "teacher")})


def test_by_command(chain: Path, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["predict", "--model", chain / "init", "--image", album, "--text", "a red circle", "--top", 2, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["evlm", *map(str, words), "--json", "--out", str(tmp_path / "s.png")])
    assert cli._run() == 0
    out, err = capsys.readouterr()
    assert len(json.load(io.StringIO(out))["answers"]) == 2 and "1 of 7 pictures" in err and (tmp_path / "s.png").is_file()
    monkeypatch.setattr(sys, "argv", ["evlm", *map(str, words)])
    assert cli._run() == 0
    out, err = capsys.readouterr()
    assert "probability" in out and ".png" in out and "1 of 7 pictures" in err


def test_letters_of_the_sheet() -> None:
    assert sheets.drawn("élan\n of") == "elan of" and sheets.drawable("élan")
    assert sheets.drawn("红 a") == "? a" and not sheets.drawable("红 a")
    assert sheets.drawn("a" * 1000) == "a" * 400


def test_a_clip_finds_by_cosine_alone(tmp_path: Path, album: Path) -> None:
    config = copy.deepcopy(CONFIGS["clip"])
    config.text_config.update({"vocab_size": 90, "pad_token_id": 0, "eos_token_id": 3})
    source = checkpoint(tmp_path / "model", family("clip"), small(config), "a red green blue circle square")
    asked: dict[str, Any] = {"model": str(source), "image": str(album), "text": "a red circle", "device": "cpu"}
    found = predict.run(**asked, top=3)
    values = [row["similarity"] for row in found["answers"]]
    assert values == sorted(values, reverse=True) and len(values) == 3 and "score" not in found["answers"][0]
    with pytest.raises(BadInput, match="by their features alone"):
        predict.run(**asked, rerank=3)
    run_stage("export", model=str(source), out=str(tmp_path / "onnx"), format="onnx", rounds=0)
    again = predict.run(**{**asked, "model": str(tmp_path / "onnx")}, top=3)
    assert [row["image"] for row in again["answers"]] == [row["image"] for row in found["answers"]]
