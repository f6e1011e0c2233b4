"""Grounding: boxes are read, moved with their view, learnt, measured, cut, exported and drawn; Grad-CAM looks where it must."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compression_cases import CONFIGS, network, tiny_xvlm
from conftest import QUIET, TRAIN, run_stage
from PIL import Image

from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data import phrases
from efficientvlm.data.boxes import in_pixels, iou
from efficientvlm.data.kinds.expressions import EXPRESSIONS, expression_batch
from efficientvlm.data.opening import open_data, record
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.texts import Texts
from efficientvlm.data.transforms import augment, names_a_side
from efficientvlm.errors import BadInput
from efficientvlm.loaded import load
from efficientvlm.objectives.grounding import Grounding
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.compose import stage_settings
from efficientvlm.tasks import gradcam
from efficientvlm.tasks.boxes import Found, scores
from efficientvlm.tasks.grounding import measured_on

LARGE = "shapes:difficulty=4,size=40"
GROUND: dict[str, Any] = {**TRAIN, "task": "grounding", "data": LARGE}
ROWS: list[dict[str, Any]] = [
    {"image": "a.png", "text": "the red one", "bbox": [10, 20, 30, 40], "height": 100, "width": 200},
    {"image": "a.png", "text": ["left", "on the left"], "bbox": [0.0, 0, 200.4, 100], "height": 100, "width": 200},
    {"image": "b.png", "text": "ein Kreis 圆", "bbox": "[5, 5, 10, 10]", "split": "testA", "detections": [[0, 0, 5, 5], [5, 5, 10, 10]]},
]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(folder: Path, rows: list[dict[str, Any]], name: str = "refs.json") -> str:
    Image.new("RGB", (200, 100), (250, 0, 0)).save(folder / "a.png")
    Image.new("RGB", (64, 32), (0, 0, 250)).save(folder / "b.png")
    (folder / name).write_text(json.dumps(rows), "utf-8")
    return str(folder / name)


# reading


def test_a_list_as_published_is_read(tmp_path: Path) -> None:
    source = open_data(EXPRESSIONS, written(tmp_path, ROWS), "test", image_size=32)
    assert len(source) == 2 and record(source, "test")["skipped"] == 0
    first, second = source[0], source[1]
    assert [one.phrase for one in first.expressions] == ["the red one", "left", "on the left"]
    assert first.size == (200, 100) and first.image.shape == (32, 32, 3)
    assert first.expressions[0].box == (10, 20, 30, 40) and first.expressions[1].box == (0, 0, 200, 100)
    assert first.seen(first.expressions[0]) == pytest.approx((0.125, 0.4, 0.15, 0.4))
    assert second.expressions[0].part == "testA" and second.expressions[0].candidates[1] == (5, 5, 10, 10)
    assert list(source.texts()) == ["the red one", "left", "on the left", "ein Kreis 圆"]


def test_a_stated_size_scales_the_box(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "text": "it", "bbox": [100, 100, 200, 100], "width": 400, "height": 200}]
    (item,) = [open_data(EXPRESSIONS, written(tmp_path, rows), "test")[0]]
    assert item.expressions[0].box == (50, 50, 100, 50)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"bbox": [10, 20, -5, 40]}, "has no area"),
        ({"bbox": [10, 20, 0, 40]}, "has no area"),
        ({"bbox": [-10, 20, 30, 40]}, "begins outside"),
        ({"bbox": [120, 20, 190, 90], "width": None, "height": None}, "reaches outside its picture of 200 x 100"),
        ({"bbox": [120, 20, 190, 90]}, "reaches outside its picture of 200 x 100"),
        ({"bbox": [10, 20, 30]}, "is no box"),
        ({"bbox": {"x": 1}}, "is no box"),
        ({"bbox": [10, 20, float("1e400"), 40]}, "is no box"),
        ({"bbox": None}, "is no box"),
        ({"text": "  "}, "is no text"),
        ({"text": []}, "is no text"),
        ({"width": 100, "height": 200, "bbox": [1, 1, 5, 5]}, "the picture is 200 x 100"),
        ({"width": 200, "height": None}, "no size of a picture"),
        ({"width": "wide"}, "no size of a picture"),
        ({"width": 2 * 10**9, "height": 10**9}, "no size of a picture"),
        ({"bbox": [0.1, 0.2, 0.5, 1.0]}, "not larger than a pixel"),
        ({"detections": [[1, 2]]}, "its detections is no box"),
        ({"detections": "many"}, "no list of at most"),
        ({"split": "x" * 61}, "no name of a part"),
        ({"image": "missing.png"}, "there is no image"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_and_counted(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    rows = [ROWS[0] | changes, ROWS[2]]
    with pytest.raises(BadInput) as refused:
        list(open_data(EXPRESSIONS, written(tmp_path, rows), "test", image_size=16))
    assert why in str(refused.value) and "refs.json" in str(refused.value)
    source = open_data(EXPRESSIONS, written(tmp_path, rows), "test", image_size=16, max_bad=1)
    assert [item.id for item in source.usable(range(len(source)))] == ["b.png"]  # type: ignore[attr-defined]
    assert record(source, "test")["skipped"] == 1


def test_a_phrase_whose_box_leaves_the_picture_is_left_out_alone(tmp_path: Path) -> None:
    wrong = ROWS[0] | {"bbox": [120, 20, 190, 90], "width": None, "height": None, "text": "far out"}
    source = open_data(EXPRESSIONS, written(tmp_path, [*ROWS, wrong]), "test", image_size=16, max_bad=1)
    for _ in range(2):
        assert [one.phrase for one in source[0].expressions] == ["the red one", "left", "on the left"]
        assert len(source.usable([0, 1])) == 2  # type: ignore[attr-defined]
    assert record(source, "test")["skipped"] == 1
    with pytest.raises(BadInput, match="reaches outside its picture of 200 x 100"):
        list(open_data(EXPRESSIONS, written(tmp_path, [*ROWS, wrong]), "test", image_size=16, max_bad=0))


def test_what_a_centre_crop_cuts_away_is_no_target(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"bbox": [0, 0, 20, 20]}, ROWS[0] | {"bbox": [40, 10, 80, 50], "text": "the other"}, ROWS[2]]
    how = Preprocessing(32, 32, crop=True)
    source = open_data(EXPRESSIONS, written(tmp_path, rows), "test", image_size=how)
    item = source[0]
    assert item.seen(item.expressions[0]) is None
    seen = item.seen(item.expressions[1])
    assert seen is not None and in_pixels(seen, item.size, how) == pytest.approx((50, 10, 70, 50))  # its left end is cut away
    with pytest.raises(BadInput, match="outside of what the model sees"):
        list(open_data(EXPRESSIONS, written(tmp_path, [rows[0]]), "test", image_size=how))


def test_other_forms_of_rows_are_read(tmp_path: Path) -> None:
    written(tmp_path, ROWS)
    entries = [
        {"id": 1, "file_name": "a.png", "caption": "the red one", "width": 200, "height": 100},
        {"id": 2, "file_name": "a.png", "caption": "all of it", "width": 200, "height": 100},
    ]
    boxes = [{"id": 7, "image_id": 1, "bbox": [10, 20, 30, 40]}, {"id": 8, "image_id": 2, "bbox": [0, 0, 200, 100]}]
    (tmp_path / "finetune_refcoco_train.json").write_text(json.dumps({"images": entries, "annotations": boxes}))
    source = open_data(EXPRESSIONS, str(tmp_path / "finetune_refcoco_train.json"), "test", image_size=16)
    assert len(source) == 1 and [(one.phrase, one.box) for one in source[0].expressions] == [
        ("the red one", (10, 20, 30, 40)),
        ("all of it", (0, 0, 200, 100)),
    ]
    (tmp_path / "rows.csv").write_text('image,text,bbox\na.png,"left, of it","[1, 2, 3, 4]"\nb.png,it,"(5.5, 5, 10, 10)"\n')
    source = open_data(EXPRESSIONS, str(tmp_path / "rows.csv"), "test", image_size=16)
    assert [item.expressions[0].box for item in (source[0], source[1])] == [(1, 2, 3, 4), (5.5, 5, 10, 10)]
    import datasets

    rows = {"image": ["a.png", "b.png"], "text": [["it"], ["that", "this"]], "bbox": [[1, 2, 3.5, 4], [5, 5, 10, 10]]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "rows.parquet"))
    source = open_data(EXPRESSIONS, str(tmp_path / "rows.parquet"), "test", image_size=16)
    assert [len(item.expressions) for item in (source[0], source[1])] == [1, 2] and source[0].expressions[0].box == (1, 2, 3.5, 4)


# scenes


def test_every_phrase_about_a_scene_means_one_shape() -> None:
    form = re.compile(r"the (?:(\w+most|larger|largest|smaller|smallest) )?(.+?)(?: (left of|right of|above|below) the (.+))?")
    best: dict[str, Any] = {
        **{"leftmost": lambda one: -one.x, "rightmost": lambda one: one.x},
        **{"topmost": lambda one: -one.y, "bottommost": lambda one: one.y},
        **dict.fromkeys(("larger", "largest"), lambda one: one.width * one.height),
        **dict.fromkeys(("smaller", "smallest"), lambda one: -one.width * one.height),
    }
    words = set()
    for difficulty in (3, 5):
        source = Shapes(EXPRESSIONS, "train", spec=f"shapes:difficulty={difficulty},size=60")
        for index in range(60):
            item, things = source[index], source.scene(index)[1].things

            def called(noun: str, things: Any = things) -> list[Any]:
                return [one for one in things if noun in (phrases.kind(one), one.shape, f"{one.colour} shape")]

            assert item.expressions
            for said in item.expressions:
                match = form.fullmatch(said.phrase)
                assert match
                word, noun, side, anchor = match.groups()
                meant = called(noun)
                if side:
                    (other,) = called(anchor)
                    meant = [one for one in meant if one is not other and phrases.SIDES[side](one, other)]
                meant = [max(meant, key=best[word])] if word else meant
                assert len(meant) == 1, said.phrase
                (thing,) = meant
                corner = (thing.x - thing.width / 2, thing.y - thing.height / 2)
                assert said.box == pytest.approx([64 * part for part in (*corner, thing.width, thing.height)])
                assert said.box in said.candidates and len(said.candidates) == len(things)
                words |= {word, side}
        assert list(source.contents()) == [source.kind.contents_at(source, index) for index in range(60)]
    assert {*best, *phrases.SIDES, None} == words


# views


@pytest.mark.parametrize("kind", ["light", "paper"])
def test_a_view_holds_its_boxes_whole(kind: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        canvas = np.zeros((64, 64, 3), np.uint8)
        (left, top), (width, height) = rng.integers(0, 44, 2), rng.integers(6, 20, 2)
        canvas[top : top + height, left : left + width] = 255
        box = np.array([[(left + width / 2) / 64, (top + height / 2) / 64, width / 64, height / 64]], np.float32)
        view = augment(kind, canvas, rng, box, whole=True)
        assert view.visible[0] == pytest.approx(1, abs=1e-4)
        rows, columns = np.nonzero(view.image[..., 0] > 100)
        x, y, w, h = view.boxes[0] * 64
        assert [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1] == pytest.approx(
            [x - w / 2, x + w / 2, y - h / 2, y + h / 2], abs={"light": 1e-3, "paper": 6.0}[kind]
        )


def test_pictures_are_mirrored_only_where_no_phrase_names_a_side(chain: Path) -> None:
    texts = Texts(load(str(chain / "init"), weights=False).tokenizer)
    source = open_data(EXPRESSIONS, LARGE, "train", image_size=64)
    flipped = {True: 0, False: 0}
    for index in range(40):
        item = source[index]
        batch = expression_batch([item], texts, seed=0, step=index, augment_kind="light", phrases_per_image=2)
        assert 1 <= len(batch["boxes"]) <= 2 and batch["phrases"] == [
            p for p in batch["phrases"] if p in {e.phrase for e in item.expressions}
        ]
        seen = {one.phrase: item.seen(one) for one in item.expressions}
        wanted = [seen[phrase] for phrase in batch["phrases"]]
        assert all(box is not None for box in wanted)
        moved = any(abs(float(box[0]) - want[0]) > 0.11 for box, want in zip(batch["boxes"], wanted, strict=True) if want)
        sided = any(map(names_a_side, batch["phrases"]))
        flipped[sided] += moved
        assert torch.equal(batch["image_index"], torch.zeros(len(batch["boxes"]), dtype=torch.long))
    assert flipped[True] == 0 < flipped[False]
    again = expression_batch([source[3]], texts, seed=0, step=3, augment_kind="none", phrases_per_image=9)
    assert torch.allclose(again["boxes"], torch.tensor([source[3].seen(one) for one in source[3].expressions]))


# losses and metrics


def test_losses_have_their_values_and_whole_images_are_left_out() -> None:
    model = network(CONFIGS["xvlm-grounding"])
    batch = {**model.example(2, 4), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]])}
    said = torch.tensor([[0.5, 0.5, 0.25, 0.5], [0.75, 0.75, 0.5, 0.5]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "ground", lambda self, batch, want=(): {"boxes": said.requires_grad_()})
        losses = Grounding(model)(batch, 0)
        assert losses["box"].item() == pytest.approx((0.25 + 1.0) / 2)
        assert losses["giou"].item() == pytest.approx((0.5 + 1 + 0.5) / 2) and losses["loss"] == losses["box"] + losses["giou"]
        one = Grounding(model)({**batch, "is_whole_image": torch.tensor([0, 1])}, 0)
        assert one["box"].item() == pytest.approx(0.25) and one["giou"].item() == pytest.approx(0.5)
        none = Grounding(model)({**batch, "is_whole_image": torch.tensor([1, 1])}, 0)["loss"]
        none.backward()
        assert none.item() == 0 and said.grad is not None and not said.grad.isnan().any()


def test_metrics_have_their_values() -> None:
    size = (100, 50)
    rows = [
        Found((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 10.0), size, "testA"),
        Found((0.0, 0.0, 10.0, 10.0), (0.0, 5.0, 10.0, 5.0), size, "testB"),  # exactly one half
        Found((40.0, 20.0, 20.0, 10.0), (45.0, 20.0, 10.0, 10.0), size, "testA"),
        Found((90.0, 40.0, 5.0, 5.0), (0.0, 0.0, 10.0, 10.0), size, "testB"),
    ]
    found = scores(rows)
    assert found["phrases"] == 4 and found["box_accuracy"] == 0.75 and found["mean_iou"] == pytest.approx(2 / 4)
    assert found["box_accuracy_of"] == {"testA": 1.0, "testB": 0.5}
    assert found["centre_accuracy"] == 0.25  # the third lies in the middle, and has the median size
    assert scores([]) == {"phrases": 0}
    touching = np.array([[0.0, 0, 10, 10]]), np.array([[9.0, 0, 1, 10]])
    assert iou(*touching)[0] == pytest.approx(0.1) and iou(*touching, inclusive=True)[0] == 0
    assert iou(np.zeros((1, 4)), np.zeros((1, 4)))[0] == 0


# where a network looks


def looking() -> Any:
    torch.manual_seed(0)
    return network(tiny_xvlm(decoder_layers=0, heads=["itc", "itm"], image_size=32))


def test_a_map_is_attention_times_its_gradient() -> None:
    model = looking()
    batch = {"pixels": torch.randn(3, 3, 32, 32), "text_ids": torch.randint(4, 20, (3, 5)), "text_mask": torch.ones(3, 5).long()}
    batch["text_mask"][1, 3:] = 0
    maps, logits = gradcam.maps(model, batch, 1)
    assert maps.shape == (3, 4, 4) and (maps >= 0).all() and maps.any()
    alone, _ = gradcam.maps(model, {name: value[1:2, :3] if name != "pixels" else value[1:2] for name, value in batch.items()}, 1)
    torch.testing.assert_close(alone[0], maps[1])  # padding changes nothing
    with torch.inference_mode():
        states, _ = model.embed_images(batch["pixels"])
        texts, _ = model.embed_texts(batch["text_ids"], batch["text_mask"])
        torch.testing.assert_close(logits, model.match(states, torch.arange(3), texts, batch["text_mask"]))
        inside, _ = gradcam.maps(model, batch, 1)
        torch.testing.assert_close(inside, maps)
    kept = {group: [] for group in model.config.kept_indices() if group == "fusion.1.cross_head"}
    with pytest.raises(BadInput, match="layer 1 of fusion looks at no image"):
        gradcam.maps(network(model.config.with_kept(kept)), batch, 1)


def test_the_best_box_of_a_map() -> None:
    map_ = torch.zeros(8, 8)
    map_[2:4, 4:8] = 1.0
    x, y, width, height = gradcam.best_box(map_, (160, 80))
    assert iou(np.array([[x, y, width, height]]), np.array([[80.0, 20, 80, 20]]))[0] > 0.7
    boxes = [(0.0, 0.0, 40.0, 40.0), (80.0, 20.0, 80.0, 20.0), (0.0, 0.0, 160.0, 80.0)]
    assert gradcam.pick(map_, boxes, (160, 80)) == boxes[1] and gradcam.pick(-map_, boxes, (160, 80)) in boxes


# stages


@pytest.fixture(scope="module")
def grounds(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher`, `pruned` and `matching` (of retrieval)."""
    root = tmp_path_factory.mktemp("grounds")
    run_stage("finetune", out=str(root / "teacher"), model=str(chain / "init"), **GROUND)
    models = {"model": str(chain / "distilled"), "teacher": str(root / "teacher")}
    run_stage("prune", out=str(root / "pruned"), sparsity=0.4, **models, **GROUND)
    run_stage("finetune", out=str(root / "matching"), model=str(chain / "init"), **{**GROUND, "task": "retrieval"})
    return root


def test_training_pruning_and_cutting_again(grounds: Path, chain: Path, tmp_path: Path) -> None:
    teacher, pruned = require_complete(grounds / "teacher"), require_complete(grounds / "pruned")
    assert load(str(grounds / "teacher")).abilities == {"ground"} and teacher.metrics["train"].keys() == {"loss", "box", "giou"}
    assert teacher.metrics["val"]["images"] == 4 and {"box_accuracy", "mean_iou", "centre_accuracy"} <= teacher.metrics["val"].keys()
    assert {"box", "giou", "kd"} <= pruned.metrics["train"].keys()
    assert set(pruned.extra["influence"]["inputs"]) == {"image", "text"}
    sparsity = pruned.accounting["sparsity"]
    assert 0 <= sparsity["achieved"] - 0.4 <= (2 * 16 + 1) / sparsity["initial"]
    run_stage("prune", out=str(tmp_path / "cut"), from_gates=str(grounds / "pruned"), sparsity=0.6, eval_limit=3)
    cut = require_complete(tmp_path / "cut")
    assert cut.config["task"] == "grounding" and cut.accounting["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.01)
    kept: dict[str, Any] = {"weights": dict.fromkeys(("text_hidden", "text_self_attention", "vision_hidden", "vision_self_attention"), 0)}
    kept["weights"] |= dict.fromkeys(("fusion_hidden", "fusion_self_attention", "fusion_cross_attention"), 0)
    taught = {**GROUND, "model": str(grounds / "pruned"), "teacher": str(grounds / "teacher"), "augment": "none", **kept}
    for name in (True, False):
        run_stage("finetune", out=str(tmp_path / f"{name}"), cache_teacher=name, **taught)
    one, other = (load(str(tmp_path / f"{name}")).model.state_dict() for name in (True, False))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


def test_boxes_alone_are_learnt_before_the_task(chain: Path, tmp_path: Path) -> None:
    boxes: dict[str, Any] = {"losses": ["box"], **TRAIN, "max_steps": 3, "model": str(chain / "init")}
    run_stage("pretrain", out=str(tmp_path / "boxes"), data=LARGE, region_probability=0.0, **boxes)
    learnt = require_complete(tmp_path / "boxes").metrics["train"]
    assert learnt.keys() == {"loss", "box", "giou"} and learnt["giou"] > 0
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"image": "a.png", "caption": "red"}\n')
    written(tmp_path, ROWS)
    with pytest.raises(BadInput, match="describes no regions"):
        run_stage("pretrain", out=str(tmp_path / "none"), data=str(captions), **{**boxes, "limit": None}, val_fraction=0)


def test_a_network_without_a_head_of_boxes_gets_one(grounds: Path, chain: Path, tmp_path: Path) -> None:
    run_stage("finetune", out=str(tmp_path / "out"), model=str(grounds / "matching"), **{**GROUND, "max_steps": 2})
    assert load(str(tmp_path / "out")).model.config.heads == ["box"]
    _, new = load(str(grounds / "matching")).model.gain("ground")
    assert len(new) == 6 and all(name.startswith("box_head.") for name in new)
    assert load(str(chain / "init")).model.gain("ground")[1] == []
    with pytest.raises(BadInput, match="cannot find what a phrase means") as answering:
        run_stage("finetune", out=str(tmp_path / "no"), model=str(chain / "teacher"), **GROUND)
    assert "it can answer questions" in answering.value.why
    with pytest.raises(BadInput, match="cannot find what a phrase means") as refused:
        run_stage("eval", model=str(chain / "init"), data=LARGE, task="grounding")
    assert "finetune it with --task grounding" in refused.value.fix


def test_measuring_in_both_modes(grounds: Path, tmp_path: Path) -> None:
    asked = {"data": LARGE, "task": "grounding", "split": "val"}
    said = run_stage("eval", model=str(grounds / "teacher"), **asked)
    assert said["mode"] == "box" and said["metrics"]["images"] == 4 and 0 <= said["metrics"]["box_accuracy"] <= 1
    assert set(said["influence"]["inputs"]) == {"image", "text"}
    loaded = load(str(grounds / "teacher"))
    source = open_data(EXPRESSIONS, LARGE, "val", image_size=loaded.preprocessing)
    shown = [measured_on(loaded, source, batch_size=size, title="", quiet=True) for size in (1, 3)]
    assert shown[0]["mean_iou"] == pytest.approx(said["metrics"]["mean_iou"], abs=1e-5) == pytest.approx(shown[1]["mean_iou"], abs=1e-5)
    looked = run_stage("eval", model=str(grounds / "matching"), mode="gradcam", **asked)
    assert looked["layer"] == 1 and looked["metrics"]["phrases_with_detections"] == looked["metrics"]["phrases"] > 0
    assert looked["metrics"]["reading"]["tokens"] > 0
    other = run_stage("eval", model=str(grounds / "matching"), mode="gradcam", layer=0, **asked)
    assert other["layer"] == 0
    with pytest.raises(BadInput, match="layer 2"):
        run_stage("eval", model=str(grounds / "matching"), mode="gradcam", layer=2, **asked)
    with pytest.raises(BadInput, match="match images with texts"):
        run_stage("eval", model=str(grounds / "teacher"), mode="gradcam", **asked)
    with pytest.raises(BadInput, match="wrong setting"):
        stage_settings("eval", {"model": "m", "data": "d", "task": "grounding", "layer": 1})


def test_graphs_say_the_same_boxes(grounds: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    run_stage("export", model=str(grounds / "pruned"), out=str(out), format="onnx", data=LARGE, split="val", rounds=1, batch_sizes=[2])
    manifest = require_complete(out)
    assert manifest.metrics["difference"]["ground"] <= 1e-4
    assert manifest.metrics["onnx_fp32"]["mean_iou"] == pytest.approx(manifest.metrics["torch_fp32"]["mean_iou"], abs=1e-4)
    asked = {"data": LARGE, "task": "grounding", "split": "val"}
    assert run_stage("eval", model=str(out), **asked)["metrics"]["mean_iou"] == pytest.approx(
        run_stage("eval", model=str(grounds / "pruned"), **asked)["metrics"]["mean_iou"], abs=1e-4
    )
    with pytest.raises(BadInput, match="match images with texts"):
        run_stage("eval", model=str(out), mode="gradcam", **asked)


def test_a_box_is_said_and_drawn(grounds: Path, tmp_path: Path, evlm: Any) -> None:
    picture, out = tmp_path / "in.png", tmp_path / "new" / "found.png"
    Image.new("RGB", (90, 60), (200, 200, 200)).save(picture)
    words = ["predict", "--model", grounds / "teacher", "--image", picture, "--question", "the red circle", "--device", "cpu"]
    code, text, _ = evlm(*words, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0 and found["out"] == str(out) and found["image_size"] == [90, 60]
    box = found["box"]
    assert 0 <= box["left"] <= box["left"] + box["width"] <= 90.1 and 0 <= box["top"] <= box["top"] + box["height"] <= 60.1
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (60, 90, 3) and (drawn != 200).any() and (drawn == 200).any()
    for wrong, code_ in (
        (["--out", picture], 3),
        (["--out", tmp_path / "found.txt"], 3),
        (["--out", tmp_path], 3),
        (["--question", " "], 2),
    ):
        assert evlm(*words, *wrong)[0] == code_, wrong
    assert np.asarray(Image.open(picture)).min() == 200
    assert evlm(*["the red circle " * 60 if word == "the red circle" else word for word in words])[0] == 3
    assert evlm(*words)[1].startswith("answer: left ")


def test_a_plan_and_a_timing_know_the_task(grounds: Path, chain: Path, tmp_path: Path) -> None:
    timed = run_stage("bench", models=[str(grounds / "teacher"), str(chain / "init")], rounds=1, warmup_rounds=0, batch_sizes=[1, 2])
    assert timed["timed"].startswith("image and phrase tensors to a box") and [m["trained"] for m in timed["models"]] == [True, False]
    steps = [
        Step("tuned", "finetune", stage_settings("finetune", dict(out=str(tmp_path / "t"), model=str(chain / "init"), **GROUND))),
        Step(
            "pruned",
            "prune",
            stage_settings(
                "prune",
                dict(out=str(tmp_path / "p"), model=str(chain / "distilled"), teacher=str(tmp_path / "t"), sparsity=0.4, **GROUND),
            ),
        ),
        Step("test", "eval", stage_settings("eval", {"model": str(tmp_path / "p"), "data": LARGE, "task": "grounding"})),
        Step("timed", "bench", stage_settings("bench", {"models": [str(tmp_path / "t"), str(tmp_path / "p")]})),
    ]
    made = plan(steps, QUIET)
    assert not made.problems.found and all(stage.memory for stage in made.stages)
