"""Classes told from their names: data with classes, names and templates, accuracies, further sets, and predict on folders."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clip_folder import byte_pairs, write_clip
from conftest import run_stage
from PIL import Image

from efficientvlm.data.class_names import Classes, NamesFile, classes_named
from efficientvlm.data.kinds.labels import LABELS, classes_of, present_in
from efficientvlm.data.opening import notes, open_data, usable
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.loaded import load, texts_of
from efficientvlm.settings.tasks import TEMPLATES
from efficientvlm.stages import predict
from efficientvlm.tasks import classifying
from efficientvlm.tasks.class_metrics import judged, mean_average_precision, read_metrics, roc_auc, tell
from efficientvlm.tasks.prompts import Prompts, class_features, of_names

COLOURS = {"red": (250, 0, 0), "blue": (0, 0, 250), "cat": (90, 90, 90)}


def paint(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 60, (20, 24, 3))
    Image.fromarray((noise + np.array(colour) * 3 // 4).clip(0, 255).astype(np.uint8)).save(path)


def fill(root: Path, each: int = 4, start: int = 0) -> Path:
    for number, (name, colour) in enumerate(COLOURS.items()):
        for at in range(each):
            paint(root / name / f"{at}.png", colour, start + 100 * number + at)
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("clip")
    run_stage("import", model=str(write_clip(root / "folder", byte_pairs())), out=str(root / "clip"))
    return str(root / "clip")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("photos"))


def labels(spec: str, split: str = "test", **more: Any) -> list[list[str]]:
    source = open_data(LABELS, spec, split, **more)
    return [item.labels for item in usable(source, range(len(source)))]


def test_the_class_of_a_picture_is_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    for name in ("train/n01440764/a.png", "train/n02084071/b.png", "val/n02084071/c.png"):
        paint(tmp_path / "net" / name, (0, 0, 0), 0)
    assert labels(str(tmp_path / "net"), "val") == [["n02084071"]] and len(labels(str(tmp_path / "net"), "train")) == 2
    for name in ("a/abbey/1.png", "c/church/indoor/2.png", "c/church/outdoor/3.png", "h/hotel/indoor/4.png"):
        paint(tmp_path / "deep" / name, (0, 0, 0), len(name))
    assert labels(str(tmp_path / "deep")) == [["abbey"], ["church/indoor"], ["outdoor"], ["hotel/indoor"]]
    (tmp_path / "deep/w/wood").mkdir(parents=True)
    assert "1 folder holds no picture and names no class: w/wood" in notes(open_data(LABELS, str(tmp_path / "deep"), "test"))
    with pytest.raises(BadInput, match="folders of splits") as splits:
        open_data(LABELS, str(tmp_path), "test")
    assert "train, val" in splits.value.why
    paint(tmp_path / "deep" / "5.png", (0, 0, 0), 0)
    with pytest.raises(BadInput, match="lies in no folder of a class"):
        open_data(LABELS, str(tmp_path / "deep"), "test")


def test_rows_with_classes(tmp_path: Path) -> None:
    """CSV, class labels of a schema, shards; of other rows, and of a part that is drawn, all classes are known."""
    for at in range(4):
        paint(tmp_path / f"{at}.png", (60 * at, 0, 0), at)
    rows = ["image,class", "0.png,10", "1.png,9", "1.png,2", "2.png,", "3.png,貓"]
    (tmp_path / "all.csv").write_text("\n".join(rows), "utf-8")
    assert labels(str(tmp_path / "all.csv"), max_bad=1) == [["10"], ["9", "2"], ["貓"]]
    (tmp_path / "numbers.csv").write_text("\n".join(rows[:4]), "utf-8")
    drawn = open_data(LABELS, str(tmp_path / "numbers.csv"), "test", limit=1)
    assert classes_of(drawn) == ["2", "9", "10"] and len(present_in(drawn)) < 3

    import datasets

    features = datasets.Features({"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=["dog", "cat", "ant"])})
    table = {"image": [str(tmp_path / "0.png"), str(tmp_path / "1.png")], "fine_label": [2, 1]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "saved")
    source = open_data(LABELS, str(tmp_path / "saved"), "test")
    assert [item.labels for item in usable(source, [0, 1])] == [["ant"], ["cat"]] and classes_of(source) == ["dog", "cat", "ant"]

    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name, content in (("a.png", (tmp_path / "0.png").read_bytes()), ("a.cls", b"7\n")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    assert labels(str(tmp_path / "shard.tar")) == [["7"]]


def test_scenes_have_the_classes_of_their_shapes() -> None:
    one = open_data(LABELS, "shapes:objects=1,size=60", "val")
    assert all(len(one[at].labels) == 1 for at in range(len(one))) and len(classes_of(one)) == 24
    two = open_data(LABELS, "shapes:objects=2,size=60", "val", limit=3)
    assert {label for at in range(3) for label in two[at].labels} <= set(present_in(two))
    assert [two.source.kind.contents_at(two.source, at)[0] for at in two.indices] == [two[at].labels for at in range(3)]


def test_a_file_of_names(tmp_path: Path) -> None:
    def of(name: str, text: str, known: list[str]) -> Classes:
        (tmp_path / name).write_text(text, "utf-8")
        return classes_named(known, NamesFile.read(tmp_path / name), "d")

    wnids = ["n01440764", "n02084071"]
    for name, text in (
        ("tabs.txt", "n02084071\tdog\nn01440764\ttench, fish\n"),
        ("synsets.txt", "n02084071 dog\nn01440764 tench, fish\n"),
        ("two.csv", 'wnid,name\nn02084071,dog\nn01440764,"tench, fish"\n'),
        ("map.json", '{"n02084071": "dog", "n01440764": "tench, fish"}'),
        ("keras.json", '{"0": ["n02084071", "dog"], "1": ["n01440764", "tench, fish"]}'),
    ):
        found = of(name, text, wnids)
        assert dict(zip(found.keys, found.names, strict=True)) == {"n01440764": "tench, fish", "n02084071": "dog"}, name
    by_order = of("list.txt", "tench\ndog\n", wnids)
    assert by_order.names == ["tench", "dog"] and "n01440764 is 'tench'" in by_order.remarks[0]
    assert of("list.txt", "cat\ndog\nant", ["2", "0"]).keys == ["0", "1", "2"]  # by number, the middle one is not in the data
    assert of("list.txt", "crane\ncrane\nant", ["2", "0"]).names == ["crane", "crane", "ant"]
    assert of("list.txt", "ant\ngolden retriever\ncat", ["golden_retriever", "cat"]).keys == ["ant", "golden_retriever", "cat"]
    for text, known, why in (
        ("a\nb", ["0", "2"], "has a class 2, and there are 2 names, counted from 0"),
        ("a\tb", ["x", "y"], "2 of 2 classes of d have no name there: x, y"),
        ("a\nb\nc", ["x", "y"], "2 of 2 classes"),
        ("x\nx\ny", ["x", "y"], "there is more than one x"),
        ("x\ta\ny", ["x", "y"], "other lines have a class, a tab and its name, 'y' has not"),
        ("n01440764 tench\ndog", wnids, "a synset and its name, 'dog' has not"),
        ("x\ta\nx\tb", ["x"], "1 class has two names"),
        ("\n", ["x"], "it holds no names"),
    ):
        with pytest.raises(BadInput) as refused:
            of("bad.txt", text, known)
        assert why in refused.value.why, text
    for name, content in (
        ("bad.json", b"[1, 2]"),
        ("deep.json", b"[" * 5000),
        ("twice.json", b'{"a": "b", "a": "c"}'),
        ("latin.txt", b"caf\xe9"),
        ("no.csv", b"a,b\n1,2"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match="cannot read the class names"):
            NamesFile.read(tmp_path / name)
    assert classes_named(["golden_retriever"], None, "d").names == ["golden retriever"]
    assert "2 of 2 classes of d are numbers" in classes_named(wnids, None, "d").remarks[0]


def test_accuracies_by_hand() -> None:
    best = np.array([[0, 1], [1, 0], [1, 2], [2, 1], [1, 2], [0, 2]])
    found = tell([[0], [0], [1], [2], [0, 2], [0, 1]], best, ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(4 / 6) and found["several_classes"] == 2 and "top5_accuracy" not in found
    assert found["mean_per_class_accuracy"] == pytest.approx((2 / 4 + 1 + 1 / 2) / 3)
    assert found["majority_accuracy"] == pytest.approx(4 / 6) and found["classes_seen"] == 3
    assert found["confusions"] == [{"class": "a", "said": "b", "images": 1, "part": 1 / 4}]
    assert [row["class"] for row in found["hardest_classes"]] == ["a", "c", "b"]
    six = tell([[5], [0]], np.array([[0, 1, 2, 3, 5], [5, 1, 2, 3, 4]]), list("abcdef"))
    assert six["accuracy"] == 0 and six["top5_accuracy"] == 0.5


def test_metrics_of_data_sets(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 6, (40, 2)).astype(np.float32)  # with equal ones
    wanted = draw.integers(0, 2, 40)
    own = roc_auc([[int(one)] for one in wanted], scores)
    assert own == pytest.approx(metrics.roc_auc_score(wanted, scores[:, 1] - scores[:, 0]))
    ranked = np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
    # right, wrong, right, wrong: precision 1 up to a recall of 0.5, then 2/3
    assert mean_average_precision([[0], [], [0], []], ranked) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    with pytest.raises(BadInput, match="roc_auc"):
        judged("roc_auc", {}, [[0]], np.zeros((1, 3), np.float32))
    (tmp_path / "m.csv").write_text("set,metric\nvoc,11point_mAP\npets,mean-per-class\n")
    assert read_metrics(tmp_path / "m.csv") == {"voc": "11point_map", "pets": "mean_per_class"}
    for text in ("set,metric\na,f1\n", "set,metric\na,accuracy\na,accuracy\n", "name,metric\na,accuracy\n", "set,metric\n"):
        (tmp_path / "m.csv").write_text(text)
        with pytest.raises(BadInput):
            read_metrics(tmp_path / "m.csv")


def test_templates(tmp_path: Path) -> None:
    assert len(TEMPLATES["clip-7"]) == 7 and len(set(TEMPLATES["clip-18"])) == 18 and "a photo of the small {}." in TEMPLATES["clip-18"]
    (tmp_path / "own.txt").write_text("a {} on a {}\n\n{}\n")
    found = Prompts.of(["a photo of a {}.", str(tmp_path / "own.txt"), "{}"])
    assert found.texts("{0} c%s") == ["a photo of a {0} c%s.", "a {0} c%s on a {0} c%s", "{0} c%s"] and found.files == [
        tmp_path / "own.txt"
    ]
    (tmp_path / "own.txt").write_text("{}\nno place\n")
    for wrong in (str(tmp_path / "own.txt"), "clip-80", "", " "):
        with pytest.raises(BadInput, match=r"templates"):
            Prompts.of([wrong])


def test_the_nearest_class_by_hand(clip: str, photos: Path, tmp_path: Path) -> None:
    """Equal to the cosines with the mean of the sentences of each class, and with one class a set; further sets and their mean."""
    other = fill(tmp_path / "other", each=2, start=1000)
    (tmp_path / "m.csv").write_text("set,metric\nv2,mean_per_class\nv3,accuracy\n")
    given: dict[str, Any] = {"model": clip, "data": str(photos), "task": "zeroshot", "templates": ["a {}", "the {}", "{} and dogs"]}
    sets = {"v2": str(other), "v3": {"data": str(photos), "templates": "a {}"}}
    found = run_stage("eval", **given, also=sets, set_metrics=str(tmp_path / "m.csv"), batch_size=5, out=str(tmp_path / "r.json"))
    loaded = load(clip)
    source = open_data(LABELS, str(photos), "test", image_size=loaded.preprocessing)
    items = usable(source, range(len(source)))

    def features(templates: list[str]) -> torch.Tensor:
        rows = []
        for name in sorted(COLOURS):
            ids, mask = texts_of(loaded).batch([template.replace("{}", name) for template in templates])
            mean = loaded.model.embed_texts(ids, mask)[1].mean(0)
            rows.append(mean / mean.norm())
        return torch.stack(rows)

    with torch.inference_mode():
        pixels = torch.stack([torch.from_numpy(item.image).permute(2, 0, 1) for item in items])
        nearest = (loaded.model.embed_images(pixels)[1] @ features(given["templates"]).T).argmax(1).tolist()
    right = [sorted(COLOURS)[one] in item.labels for one, item in zip(nearest, items, strict=True)]
    metrics = found["metrics"]
    assert metrics["top1_accuracy"] == pytest.approx(sum(right) / 12) and metrics["images"] == 12 and metrics["classes"] == 3
    assert metrics["sets_mean"] == pytest.approx((metrics["sets"]["v2"]["mean_per_class"] + metrics["sets"]["v3"]["top1_accuracy"]) / 2)
    assert metrics["sets"]["v2"]["images"] == 6 and found["sets"]["v2"]["split"] == "test" and found["template_count"] == 3
    assert set(found["influence"]["inputs"]) == {"image", "text"}
    assert run_stage("eval", **given, also=sets, set_metrics=str(tmp_path / "m.csv"), batch_size=5, out=str(tmp_path / "r.json")) == found
    with pytest.raises(BadInput, match="holds a result of other settings"):
        run_stage("eval", **given | {"templates": "a {}"}, also=sets, set_metrics=str(tmp_path / "m.csv"), out=str(tmp_path / "r.json"))
    with pytest.raises(BadInput, match="names no metric of v4"):
        run_stage("eval", **given, also={"v4": str(other)}, set_metrics=str(tmp_path / "m.csv"))
    (tmp_path / "names.txt").write_text("red\tred\nblue\tblue\ncat\tcat\nnone\tdogs\n")
    known = run_stage("eval", **given, classes=str(tmp_path / "names.txt"))
    present = run_stage("eval", **given, classes=str(tmp_path / "names.txt"), candidates="present")
    assert known["class_count"] == 4 and present["class_count"] == 3


def test_names_that_are_alike_or_cannot_be_read(clip: str) -> None:
    texts = texts_of(load(clip, weights=False))
    plain = Prompts.of(["{}"])
    counts, remarks = of_names(texts, Classes(["1", "2", "3"], ["cat", "Cat", "dogs"]), plain)
    assert counts["shared_class_names"] == 2 and "2 of 3 classes read alike (cat, Cat)" in remarks[0]
    long = Classes(["1", "2", "3"], ["a " * texts.max_tokens + end for end in ("cat", "dogs")] + ["cat"])
    assert of_names(texts, long, plain)[0]["shared_class_names"] == 2
    with pytest.raises(BadInput, match="3 class names cannot be told apart"):
        of_names(texts, long, Prompts.of(["a " * texts.max_tokens + "{}"]))
    assert of_names(texts, long, Prompts.of(["a " * texts.max_tokens + "{}", "{}"]))[0]["shared_class_names"] == 2
    tokenizer = texts.tokenizer
    if texts.unknown is not None or tokenizer.unk_token_id is not None:
        with pytest.raises(BadInput, match="2 class names cannot be told apart"):
            of_names(texts, Classes(["1", "2"], ["貓", "狗"]), plain)
        counts, remarks = of_names(texts, Classes(["1", "2", "3"], ["貓", "狗", "cat 貓 a"]), plain)
        assert counts == {"unread_class_names": 3, "shared_class_names": 2} and len(remarks) == 2


def test_thousands_of_classes_do_not_change_the_features(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficientvlm.tasks import prompts

    loaded = load(clip)
    classes = Classes([*map(str, range(50))], [f"a {'red ' * (number % 5)}cat {number}" for number in range(50)])
    shown: dict[str, Any] = {"title": "", "quiet": True}
    at_once = class_features(loaded, texts_of(loaded), classes, Prompts.of(["a {}", "{}"]), batch_size=64, **shown)
    monkeypatch.setattr(prompts, "CLASSES_AT_ONCE", 6)
    in_blocks = class_features(loaded, texts_of(loaded), classes, Prompts.of(["a {}", "{}"]), batch_size=4, **shown)
    torch.testing.assert_close(at_once, in_blocks, rtol=1e-5, atol=1e-6)
    assert torch.allclose(at_once.norm(dim=1), torch.ones(50))


def test_predict_a_folder(
    clip: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evlm: Callable[..., tuple[int, str, str]]
) -> None:
    """A run that was stopped goes on and ends in the same bytes; what it wrote is data; the sheet shows every class said."""
    asked: dict[str, Any] = {"model": clip, "task": "zeroshot", "image": str(photos), "classes": [*COLOURS], "device": "cpu"}
    monkeypatch.setattr(classifying, "BATCH", 5)
    whole = predict.run(**asked, out=str(tmp_path / "whole.csv"), sheet=str(tmp_path / "sheet.png"), top=2)
    assert (whole["classified"], whole["skipped"]) == (12, 0) and Image.open(whole["sheet"]).format == "PNG"
    rows = list(csv.DictReader((tmp_path / "whole.csv").open(encoding="utf-8")))
    assert [*rows[0]] == ["image", "class", "similarity", "class_2", "similarity_2"] and len(rows) == 12
    kept = predict.run(**asked)["answers"]
    assert [(row["class"], f"{row['similarity']}") for row in kept] == [(row["class"], row["similarity"]) for row in rows]
    assert len(labels(str(tmp_path / "whole.csv"))) == 12
    with monkeypatch.context() as patch:
        patch.setattr(classifying, "stop_flag", lambda: contextlib.nullcontext(SimpleNamespace(requested=True)))
        with pytest.raises(Interrupted):
            predict.run(**asked, out=str(tmp_path / "again.csv"), top=2)
    assert not (tmp_path / "again.csv").exists()
    with pytest.raises(BadInput, match="begun with other settings"):
        predict.run(**{**asked, "classes": ["red", "blue"]}, out=str(tmp_path / "again.csv"), top=2)
    predict.run(**asked, out=str(tmp_path / "again.csv"), top=2)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    with pytest.raises(BadInput, match="is there already"):
        predict.run(**asked, out=str(tmp_path / "again.csv"))
    (tmp_path / "mine.csv").write_text("a,b\n")
    for wrong, what in (
        ({"out": str(tmp_path / "mine.csv")}, "is no file of classes"),
        ({"out": str(tmp_path / "c.jsonl")}, "out"),
        ({"classes": ["red", "red"]}, "classes"),
        ({"classes": ["names.txt"]}, "there is no file names.txt"),
    ):
        with pytest.raises(BadInput, match=what):
            predict.run(**asked | wrong)
    one = ("predict", "--task", "zeroshot", "--model", clip, "--image", photos / "red" / "0.png", "--classes", "red", "--classes", "cat")
    code, out, _ = evlm(*one, "--template", "a {}", "--json")
    answers = json.loads(out)["answers"]
    assert code == 0 and {row["class"] for row in answers} == {"red", "cat"} and answers[0]["similarity"] >= answers[1]["similarity"]
    assert evlm("predict", "--task", "zeroshot", "--model", clip, "--image", photos)[0] == 2
