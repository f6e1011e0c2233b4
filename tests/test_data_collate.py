"""Batches: shapes, seeding, masking, boxes that follow the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efficientvlm.data.easy_vqa import EasyVQA
from efficientvlm.data.items import Question, Region
from efficientvlm.data.kinds.pairs import PAIRS, PairItem, pair_batch, patches_of, region_batch
from efficientvlm.data.kinds.questions import VQAItem, vqa_batch
from efficientvlm.data.masking import mask_tokens
from efficientvlm.data.shapes import Shapes
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import train_wordpiece
from efficientvlm.data.transforms import augment, light, names_a_side, paper, rand_augment
from efficientvlm.errors import BadInput


@pytest.fixture(scope="module")
def texts() -> Texts:
    words = [text for _, text in zip(range(4000), Shapes(PAIRS, "train", spec="shapes:difficulty=4").texts())]
    return Texts(train_wordpiece([*words, "embankment"], 400), 40)


def picture(seed: int = 0, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def equal(first: dict, second: dict) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(a, second[key]) if isinstance(a, torch.Tensor) else a == second[key] for key, a in first.items())


def test_texts_close_with_a_separator_and_pad(texts: Texts) -> None:
    ids, mask = texts.batch(["a red circle", "a red circle left of a blue triangle"], 6)
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == mask.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert ids[:, 0].tolist() == [texts.cls] * 2 and ids[0, 4:].tolist() == [texts.sep, texts.pad] and ids[1, 5] == texts.sep
    assert texts.tokenizer.convert_ids_to_tokens(ids[1].tolist()) == ["[CLS]", "a", "red", "circle", "left", "[SEP]"]
    twice, _ = texts.batch(["red", "a red circle"], 5, double_sep=True)
    assert twice.tolist()[0][2:] == [texts.sep, texts.sep, texts.pad] and twice.tolist()[1][3:] == [texts.sep] * 2


def test_texts_of_a_batch_of_none_and_of_nothing(texts: Texts) -> None:
    assert texts.batch([])[0].shape == (0, 0)
    assert texts.batch([""])[0].tolist() == [[texts.cls, texts.sep]]
    assert texts.batch(["a red circle"], 4, prompt=[7, 8, 9])[0].tolist() == [[texts.cls, 7, 8, 9, texts.sep]]  # which leaves no room


def vqa_items() -> list[VQAItem]:
    questions = [
        Question(f"is there a {c} {s}?", [("yes", 0.6), ("no", 0.4)]) for c in ("red", "blue", "teal") for s in ("circle", "triangle")
    ]
    return [VQAItem("a", picture(1), questions), VQAItem("b", picture(2), questions[:2])]


def test_vqa_batch(texts: Texts) -> None:
    batch = vqa_batch(vqa_items(), texts, seed=0, step=0, questions_per_image=4)
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["pixels"].dtype == torch.uint8
    assert torch.equal(batch["pixels"][1], torch.from_numpy(picture(2)).permute(2, 0, 1))
    assert batch["image_index"].tolist() == [0, 0, 0, 0, 1, 1] and len(set(batch["question_texts"][:4])) == 4
    assert batch["answer_index"].tolist() == [q for q in range(6) for _ in range(2)]
    assert batch["answer_weights"].tolist() == pytest.approx([0.6, 0.4] * 6) and batch["answer_weights"].dtype == torch.float32
    assert batch["answer_ids"].shape == (12, 3) and batch["question_ids"].shape == batch["question_mask"].shape
    decoded = texts.tokenizer.decode(batch["question_ids"][5][1:-1])
    assert decoded.replace(" ", "") == batch["question_texts"][5].replace(" ", "")


def test_vqa_batch_is_a_function_of_seed_and_step(texts: Texts) -> None:
    def make(seed: int, step: int) -> dict:
        return vqa_batch(vqa_items(), texts, seed=seed, step=step, questions_per_image=3, augment_kind="light")

    assert equal(make(0, 5), make(0, 5))
    assert len({tuple(make(0, step)["question_texts"]) for step in range(8)}) > 1
    assert any(not torch.equal(make(0, 0)["pixels"], make(seed, 0)["pixels"]) for seed in (1, 2, 3))


def test_evaluation_takes_every_question_in_order(texts: Texts) -> None:
    items = vqa_items()
    batch = vqa_batch(items, texts, seed=0, step=0, train=False, questions_per_image=1)
    assert batch["question_texts"] == [q.text for item in items for q in item.questions]


def test_pair_batch(texts: Texts) -> None:
    items = [Shapes(PAIRS, "train")[i] for i in (0, 1, 0)]
    batch = pair_batch(items, texts, seed=0, step=0, augment_kind="none")
    assert batch["image_ids"][0] == batch["image_ids"][2] != batch["image_ids"][1]
    assert batch["text_ids"].shape == batch["masked_ids"].shape == batch["text_mask"].shape
    assert all(caption in item.captions for caption, item in zip(batch["captions"], items))
    assert equal(batch, pair_batch(items, texts, seed=0, step=0, augment_kind="none"))
    plain = pair_batch(items, texts, seed=0, step=0, augment_kind="none", task=True)
    assert batch.keys() - plain.keys() == {"masked_ids", "masked_positions", "masked_labels"}
    assert equal(plain, {name: batch[name] for name in plain})
    assert len({tuple(pair_batch(items, texts, seed=0, step=step)["captions"]) for step in range(6)}) > 1


def test_masking(texts: Texts) -> None:
    captions = ["a red circle left of a small blue triangle on a pale yellow background and a teal diamond"] * 400
    ids, mask = texts.batch(captions)
    masked, positions, labels = mask_tokens(ids, mask, texts.tokenizer, [np.random.default_rng(0)] * len(ids), 0.25, 3)
    hidden = labels != -100
    assert (hidden.sum(1) == 3).all() and positions.shape == labels.shape == (400, 3)
    assert torch.equal(ids.gather(1, positions)[hidden], labels[hidden])
    for row in range(400):
        assert len(set(positions[row].tolist())) == 3
    changed = torch.ones_like(ids, dtype=torch.bool).scatter(1, positions, False)
    assert torch.equal(masked[changed], ids[changed]), "a token that is no target was changed"
    special = {texts.cls, texts.sep, texts.pad, texts.tokenizer.mask_token_id}
    assert not special & set(labels[hidden].tolist())
    share = (masked.gather(1, positions) == texts.tokenizer.mask_token_id)[hidden].float().mean()
    same = (masked.gather(1, positions) == labels)[hidden].float().mean()
    assert 0.75 < share < 0.85 and 0.07 < same < 0.14
    assert len(set(positions.flatten().tolist())) == int(mask[0].sum()) - 2, "every word can be hidden"


def test_words_are_hidden_whole_and_the_budget_is_kept() -> None:
    tokenizer = train_wordpiece(["ab cd ef gh"], 30)
    texts = Texts(tokenizer, 40)
    ids, mask = texts.batch(["abcdef gh abgh cd efgh", "q", ""])
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert any(token.startswith("##") for token in tokens)
    words, word = [], -1
    for token in tokens:
        word += not token.startswith("##")
        words.append(word)
    for seed in range(50):
        _, positions, labels = mask_tokens(ids, mask, tokenizer, [np.random.default_rng(seed)] * len(ids), 0.5, 6)
        hidden = positions[0][labels[0] != -100].tolist()
        touched = {words[place] for place in hidden}
        assert [place for place in range(len(tokens)) if words[place] in touched] == hidden
        assert 1 <= len(hidden) <= 6
        assert (labels[2] == -100).all(), "a text without words has nothing to hide"


def test_region_batch(texts: Texts) -> None:
    items = [Shapes(PAIRS, "train", spec="shapes:difficulty=4")[i] for i in range(6)]
    batch = region_batch(items, texts, seed=0, step=0, patch_grid=8, augment_kind="none", regions_per_image=2)
    rows = len(batch["image_index"])
    assert batch["image_mask"].shape == (rows, 65) and batch["boxes"].shape == (rows, 4) and batch["text_ids"].shape[0] == rows
    assert batch["is_whole_image"].sum() == 6 and (batch["image_mask"][:, 0] == 1).all()
    for row in range(rows):
        item, caption = items[batch["image_index"][row]], batch["captions"][row]
        if batch["is_whole_image"][row]:
            assert caption in item.captions and batch["image_mask"][row].all() and batch["boxes"][row].tolist() == [0.5, 0.5, 1, 1]
        else:
            assert any(r.phrase == caption and np.allclose(r.box, batch["boxes"][row].numpy(), atol=1e-6) for r in item.regions)
    assert equal(batch, region_batch(items, texts, seed=0, step=0, patch_grid=8, augment_kind="none", regions_per_image=2))


def test_region_batch_of_images_that_lack_one_or_the_other(texts: Texts) -> None:
    items = [PairItem("a", picture(), ["a red circle"]), PairItem("b", picture(), [], [Region("a blue ring", (0.5, 0.5, 0.2, 0.2))])]
    batch = region_batch(items, texts, seed=0, step=0, patch_grid=(4, 4))
    assert batch["captions"] == ["a red circle", "a blue ring"] and batch["is_whole_image"].tolist() == [1, 0]


def test_a_region_that_is_half_outside_is_left_out(texts: Texts) -> None:
    places = [Region("a red ring", (0.0, 0.5, 0.4, 0.4)), Region("a blue ring", (0.05, 0.5, 0.4, 0.4))]
    batch = region_batch([PairItem("a", picture(), ["both"], places)], texts, seed=0, step=0, patch_grid=4, augment_kind="none")
    assert batch["captions"] == ["a blue ring", "both"]


def test_patches_under_a_box() -> None:
    boxes = np.array([[0.5, 0.5, 0.5, 0.5], [0.125, 0.9, 0.25, 0.01], [0.5, 0.5, 1, 1], [0.999, 0.001, 0, 0]], np.float32)
    mask = patches_of(boxes, (4, 4))
    inner = mask[:, 1:].reshape(-1, 4, 4)
    assert inner[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert inner[1].tolist() == [[0] * 4, [0] * 4, [0] * 4, [1, 0, 0, 0]]
    assert inner[2].all() and inner[3].sum() == 1 and inner[3][0, 3] == 1
    assert patches_of(np.array([[0.5, 0.75, 1, 0.5]], np.float32), (2, 3))[0].tolist() == [1, 0, 0, 0, 1, 1, 1]


def marked(box: tuple[float, float, float, float], side: int = 60) -> np.ndarray:
    image = np.full((side, side, 3), 250, np.uint8)
    x, y, w, h = (round(v * side) for v in (box[0] - box[2] / 2, box[1] - box[3] / 2, box[2], box[3]))
    image[y : y + h, x : x + w] = (200, 0, 0)
    return image


@pytest.mark.parametrize("kind", ["light", "paper"])
def test_a_box_stays_on_its_object(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientvlm.data.transforms.rand_augment", lambda image, rng, geometric: image)  # colours are compared below
    box = (0.3, 0.6, 0.2, 0.3)
    image, seen = marked(box), set()
    for seed in range(60):
        out = augment(kind, image, np.random.default_rng(seed), np.array([box], np.float32), task=False)
        assert out.image.shape == image.shape and out.image.dtype == np.uint8 and out.visible[0] > 0.99
        rows, columns = np.nonzero(out.image[:, :, 1] < 125)
        left, top = (out.boxes[0, :2] - out.boxes[0, 2:] / 2) * 60
        right, bottom = (out.boxes[0, :2] + out.boxes[0, 2:] / 2) * 60
        assert np.abs(np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) - [left, top, right, bottom]).max() < 1.6
        seen.add(bool(left > 30))
    assert seen == {True, False}, "both mirrored and not"


def test_a_box_that_leaves_the_image_is_measured() -> None:
    boxes = np.array([[0.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.2, 0.2]], np.float32)
    out = augment("none", picture(), np.random.default_rng(0), boxes)
    assert out.visible.tolist() == pytest.approx([0.5, 1.0]) and out.boxes[0].tolist() == pytest.approx([0.125, 0.5, 0.25, 0.5])


def test_no_mirror_image_where_words_name_a_side(texts: Texts) -> None:
    assert names_a_side("left of it") and names_a_side("the RIGHT one") and not names_a_side("a bright leftover")
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :12] = 255
    for step in range(20):
        items = [
            VQAItem("a", image, [Question("what is at the left?", [("snow", 1.0)])]),
            VQAItem("b", image, [Question("where?", [("right", 1.0)])]),
        ]
        pixels = vqa_batch(items, texts, seed=0, step=step, augment_kind="light")["pixels"]
        assert (pixels[:, :, :, 0] == 255).all() and (pixels[:, :, :, -1] == 0).all()
        pair = pair_batch([PairItem("c", image, ["snow at the left"])], texts, seed=0, step=step, augment_kind="light")["pixels"]
        assert (pair[:, :, :, 0] == 255).all()
        crop = region_batch(
            [PairItem("c", image, ["x"], [Region("the left", (0.15, 0.5, 0.2, 0.4))])], texts, seed=0, step=step, patch_grid=4
        )
        assert (crop["pixels"][:, :, :, 0] == 255).all()


def test_light_shifts_by_a_tenth_at_most_and_repeats_the_border() -> None:
    image = np.repeat(np.repeat(np.arange(50, dtype=np.uint8)[None, :, None], 50, 0), 3, 2)
    shifts = set()
    for seed in range(80):
        out = light(image, np.random.default_rng(seed), flip_ok=False).image
        shifts.add(int(out[0, 25, 0]) - 25)
        assert out[0, 0, 0] in range(6) and out[0, -1, 0] in range(44, 50)
    assert min(shifts) == -5 and max(shifts) == 5


def test_paper_crops_within_the_scale() -> None:
    rng = np.random.default_rng(0)
    image = picture(side=48)
    for _ in range(20):
        assert paper(image, rng, scale=(0.5, 1.0)).image.shape == image.shape
    seeds = [paper(image, np.random.default_rng(3)).image for _ in range(2)]
    assert np.array_equal(*seeds)


def test_every_operation_of_rand_augment_runs() -> None:
    from PIL import Image

    from efficientvlm.data import transforms

    flat = Image.fromarray(picture(side=24) // 2 + 40)
    for name in transforms.COLOUR_OPERATIONS + transforms.GEOMETRIC_OPERATIONS:
        out = transforms._operate(flat, name, 1)
        assert out.size == flat.size and out.mode == "RGB"
        assert (np.array(out) != np.array(flat)).any() == (name != "identity"), name
    assert rand_augment(flat, np.random.default_rng(0), geometric=False).size == flat.size


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(BadInput, match="heavy"):
        augment("heavy", picture(), np.random.default_rng(0))  # type: ignore[arg-type]


def test_easy_vqa_holds_out_the_same_images_always() -> None:
    train, val, test = (EasyVQA(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (3600, 400, 1000)
    assert not set(train._ids) & set(val._ids) and set(train._ids) | set(val._ids) == set(range(4000))
    assert EasyVQA("val")._ids[:5] == val._ids[:5]
    assert sum(len(train._all_questions[i]) for i in range(4000)) == 38575 and sum(map(len, test._all_questions.values())) == 9673
    assert train.fingerprint == val.fingerprint != test.fingerprint


def test_easy_vqa_items() -> None:
    source = EasyVQA("val", limit=3, image_size=32)
    item = source[2]
    assert len(source) == 3 and item.image.shape == (32, 32, 3) and item.id == f"easy-vqa/train/{source._ids[2]}"
    assert all(len(q.answers) == 1 and q.answers[0][1] == 1.0 for q in item.questions)
    assert len(list(source.texts())) == 2 * sum(len(source[i].questions) for i in range(3))
    with pytest.raises(BadInput):
        EasyVQA("dev")
