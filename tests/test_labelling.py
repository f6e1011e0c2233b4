"""Many pictures are described: folders and shards, stopped and gone on, filtered by how well captions fit."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_cases import CONFIGS, family, network
from PIL import Image
from test_export import checkpoint

from efficientvlm.checkpoints import growing
from efficientvlm.data.unlabelled import Unlabelled
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.stages import predict
from efficientvlm.tasks import filtering, labelling
from efficientvlm.tasks.describing import Describer

WORDS = "a red green blue square circle picture of the"
SHORT = {"prompt": "", "min_length": 3, "max_length": 8, "decoding": "greedy", "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner, a network that matches and one that compares by features alone."""
    root = tmp_path_factory.mktemp("models")
    for name, kind in {"captioner": "blip-caption", "matcher": "blip-retrieval", "comparer": "clip"}.items():
        config = CONFIGS[kind].from_dict(CONFIGS[kind].to_dict())
        config.text_config.update({"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "sep_token_id": 3})
        torch.manual_seed(0)
        model = network(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        checkpoint(root / name, family(kind), model, WORDS)
    return root


def picture(number: int) -> bytes:
    content = io.BytesIO()
    noise = torch.randint(256, (24, 20, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(content, "PNG")
    return content.getvalue()


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Eleven pictures, two of them torn, in a folder, a folder in it, and a shard."""
    album = tmp_path / "album"
    (album / "deeper").mkdir(parents=True)
    for number in range(6):
        (album / ("deeper" if number % 2 else "") / f"{number}.png").write_bytes(picture(number))
    (album / "torn.png").write_bytes(picture(9)[:60])
    (album / "1.txt").write_text("of no picture")
    (album / "0.txt").write_text("a red square\na blue circle\n")
    (album / "2.txt").write_bytes(b"\xff\xfe\xff")
    files = {f"{number}.png": picture(20 + number) for number in range(3)}
    files |= {
        "0.txt": b"a green square",
        "1.json": json.dumps({"caption": ["a red circle"]}).encode(),
        "torn.jpg": b"no picture",
        "x.txt": b"x",
    }
    shard(album / "more.tar", files)
    return album


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_folders_and_shards_are_described_and_the_file_is_read_as_data(models: Path, album: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(album.parent)
    asked: dict[str, Any] = {"model": str(models / "captioner"), "image": "album", **SHORT}
    found = predict.run(**asked, out="made/said.jsonl", task="captioning")
    assert found.pop("manner")["decoding"] == "greedy" and found == {"described": 9, "skipped": 2, "out": "made/said.jsonl"}
    said = capsys.readouterr().err
    assert "torn.png" in said and "more.tar/torn.jpg" in said and "2 of 11 pictures cannot be read" in said
    assert "1 sample has no picture" in said
    written = rows(Path("made/said.jsonl"))
    names = [f"../album/{name}" for name in ("0.png", "2.png", "4.png", "deeper/1.png", "deeper/3.png", "deeper/5.png")]
    assert [row["image"] for row in written] == names + [f"../album/more.tar/{number}.png" for number in range(3)]
    assert [path.name for path in Path("made").iterdir()] == ["said.jsonl"]
    with pytest.raises(BadInput, match="is there already") as refused:
        predict.run(**asked, out="made/said.jsonl")
    assert "--force" in refused.value.fix and predict.run(**asked, out="made/said.jsonl", force=True)["described"] == 9
    Path("mine.jsonl").write_text('{"image": "x", "question": "y"}')
    with pytest.raises(BadInput, match="no file of captions"):
        predict.run(**asked, out="mine.jsonl", force=True)
    in_memory = predict.run(**asked)
    assert [row["caption"] for row in in_memory["captions"]] == [row["caption"] for row in written] and in_memory["skipped"] == 2
    assert len({row["caption"] for row in written}) > 1
    one = predict.run(**{**asked, "image": "album/0.png"})
    assert one.pop("manner") and one == {"image": "album/0.png", "caption": written[0]["caption"]}
    with pytest.raises(BadInput, match=r"torn\.png"):
        predict.run(**{**asked, "image": ["album/0.png", "album/torn.png"]})
    with pytest.raises(BadInput, match="holds no picture"):
        predict.run(**{**asked, "image": str(shard(album / "empty.tar", {"a.txt": b"x"}))})
    torn = str(shard(album / "torn.tar", {"a.png": b"no picture"}))
    with pytest.raises(BadInput, match="the one picture cannot be read") as refused:
        predict.run(**{**asked, "image": torn}, out="made/torn.jsonl")
    assert "a.png" in refused.value.why and [path.name for path in Path("made").iterdir()] == ["said.jsonl"]


@pytest.mark.parametrize("filtered", [False, True])
def test_a_run_that_was_killed_or_stopped_ends_in_the_same_file(
    models: Path, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filtered: bool
) -> None:
    monkeypatch.setattr(labelling, "EVAL_BATCH", 1)
    monkeypatch.setattr(labelling, "FEWEST", 1)
    asked: dict[str, Any] = {"model": str(models / "captioner"), "image": str(album), **SHORT, "quiet": True}
    if filtered:
        asked |= {"filter": str(models / "matcher"), "threshold": 0.5}
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    wanted = predict.run(**asked, out=str(whole))
    described = []
    real, write = Describer.__call__, growing.write_atomic

    def describe(self: Any, pixels: Any, keys: Any) -> Any:
        described.extend(keys)
        if len(described) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, pixels, keys)

    class Killed(BaseException):
        pass

    def die(path: Path, data: bytes) -> None:
        """As `kill -9` between lines that were written and the state that counts them."""
        if json.loads(data)["done"] == 6:
            raise Killed
        write(path, data)

    monkeypatch.setattr(Describer, "__call__", describe)
    with pytest.raises(Interrupted, match="stopped behind 3 of 11"):
        predict.run(**asked, out=str(out))
    assert not out.exists()
    monkeypatch.setattr(growing, "write_atomic", die)
    with pytest.raises(Killed):
        predict.run(**asked, out=str(out))
    monkeypatch.setattr(growing, "write_atomic", write)
    with open(f"{out}.unfinished", "ab") as file:
        file.write(b'{"image": "half a li')
    with pytest.raises(BadInput, match="begun with other settings"):
        predict.run(**{**asked, "max_length": 7}, out=str(out))
    assert predict.run(**asked, out=str(out)) == {**wanted, "out": str(out)}
    assert out.read_bytes() == whole.read_bytes() and sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]
    twice = [name for name in described if described.count(name) > 1]
    assert len(set(twice)) == 1  # that which was not yet counted


def test_what_was_begun_elsewhere_is_not_gone_on_with(models: Path, album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "EVAL_BATCH", 1)
    monkeypatch.setattr(labelling, "FEWEST", 1)
    asked: dict[str, Any] = {
        "model": str(models / "captioner"),
        "image": str(album),
        **SHORT,
        "quiet": True,
        "out": str(tmp_path / "o.jsonl"),
    }
    real, count = labelling.GrowingLines.add, 0

    def add(self: Any, *given: Any) -> None:
        nonlocal count
        real(self, *given)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(labelling.GrowingLines, "add", add)
    with pytest.raises(KeyboardInterrupt):
        predict.run(**asked)
    (album / "00.png").write_bytes(picture(50))
    with pytest.raises(BadInput, match="other pictures") as refused:
        predict.run(**asked)
    assert "--no-resume" in refused.value.fix
    state = Path(f"{asked['out']}.unfinished.json")
    for spoilt in ("{", "[]", '{"run": {}, "done": "x"}', state.read_text().replace('"bytes": ', '"bytes": 99')):
        state.write_text(spoilt)
        with pytest.raises(BadInput, match=r"unfinished"):
            predict.run(**asked)
    other = growing.GrowingLines(tmp_path / "p.jsonl", {})
    with pytest.raises(BadInput, match="by another process"):
        growing.GrowingLines(tmp_path / "p.jsonl", {})
    other.__exit__(None, None, None)
    assert predict.run(**asked, resume=False)["described"] == 10
    assert len(rows(Path(asked["out"]))) == 10 and not state.exists()


def test_captions_that_do_not_fit_are_dropped_and_counted(models: Path, album: Path, tmp_path: Path, capsys: Any, evlm: Any) -> None:
    out = tmp_path / "kept.jsonl"
    asked: dict[str, Any] = {"model": str(models / "captioner"), "image": str(album), **SHORT, "filter": str(models / "matcher")}
    every = predict.run(**asked, threshold=0.0, out=str(out))
    made, scored = {"made": 9, "given": 4}, rows(out)
    assert every["kept"] == made and every["dropped"] == {"made": 0, "given": 0} and every["skipped"] == 2
    assert "the captions that 1 picture came with cannot be read" in capsys.readouterr().err
    given = [row["caption"] for row in scored if row["origin"] == "given"]
    assert given == ["a red square", "a blue circle", "a green square", "a red circle"]
    values = sorted(row["probability"] for row in scored)
    assert values[0] < values[-1]
    middle = (values[5] + values[6]) / 2
    some = predict.run(**asked, threshold=middle)
    assert some["captions"] == [row for row in scored if row["probability"] >= middle]
    assert {kind: some["kept"][kind] + some["dropped"][kind] for kind in made} == made and sum(some["kept"].values()) == len(
        some["captions"]
    )
    one = next(row for row in scored if row["image"].endswith("0.png"))
    code, stdout, _ = evlm(
        "predict", "--model", asked["model"], "--image", one["image"], "--filter", asked["filter"], "--threshold", "0", *OPTIONS
    )
    assert code == 0 and json.loads(stdout)["captions"][0]["probability"] == pytest.approx(one["probability"], abs=1e-3)
    with pytest.raises(BadInput, match="needs a threshold"):
        predict.run(**{**asked, "filter": str(models / "comparer")})
    assert "similarity" in predict.run(**{**asked, "filter": str(models / "comparer")}, threshold=-1.0)["captions"][0]
    with pytest.raises(BadInput, match="filter"):
        predict.run(**{**asked, "filter": str(models / "captioner")})
    with pytest.raises(BadInput, match="threshold goes with it"):
        predict.run(**{**asked, "filter": None}, threshold=0.3)


OPTIONS = (
    "--prompt",
    "",
    "--min-length",
    3,
    "--max-length",
    8,
    "--decoding",
    "greedy",
    "--json",
    "--task",
    "captioning",
    "--device",
    "cpu",
)


def test_a_score_is_that_of_the_network(models: Path, album: Path) -> None:
    from efficientvlm.data.images import open_image
    from efficientvlm.loaded import load, texts_of

    matcher = load(str(models / "matcher"))
    judge = filtering.Judge(matcher, 0.5)
    pixels = torch.stack([torch.from_numpy(open_image(album / f"{n}.png", matcher.preprocessing)).permute(2, 0, 1) for n in (0, 2)])
    found = judge(pixels, [["a red square", "blue"], ["a red square"]])
    ids, mask = texts_of(matcher).batch(["a red square"])
    for number in range(2):
        batch = {"pixels": pixels[number : number + 1], "text_ids": ids, "text_mask": mask}
        with torch.inference_mode():
            wanted = float(matcher.model.run(batch)["logits"].softmax(1)[0, 1])
        assert float(found[number][0]) == pytest.approx(wanted, abs=1e-5)


def test_pictures_are_counted_and_read_from_any_on(album: Path) -> None:
    pictures = Unlabelled([album, album / "0.png"], captions=True)
    every = list(pictures.after(0))
    assert len(pictures) == len(every) == 12 and [shown.named for shown in every] == [False] * 11 + [True]
    for start in range(13):
        assert [shown.name for shown in pictures.after(start)] == [shown.name for shown in every][start:]
    assert every[0].captions == ["a red square", "a blue circle"] and isinstance(every[1].captions, BadInput)
    cut = album / "cut.tar"
    cut.write_bytes((album / "more.tar").read_bytes()[:3000])
    broken = Unlabelled([cut])
    assert "what follows is lost" in broken.remarks[0] and len(list(broken.after(0))) == len(broken) > 0
