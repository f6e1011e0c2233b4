"""Caption metrics and their words against stored numbers of `pycocoevalcap`, and what they make of odd captions."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from efficientvlm.errors import BadInput
from efficientvlm.tasks import ptb
from efficientvlm.tasks.caption_metrics import Reward, Sentence, longest_common, remarks, score, scores

NUMBERS: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "captions.json").read_text("utf-8"))
CANDIDATES, REFERENCES = NUMBERS["candidates"], NUMBERS["references"]
close = pytest.approx


def test_words_are_those_of_the_original_tokenizer():
    for candidate, known, expected in zip(CANDIDATES, REFERENCES, NUMBERS["words"], strict=True):
        assert [" ".join(ptb.words(text)) for text in (candidate, *known)] == expected


def test_words_of_odd_sentences():
    assert {text: " ".join(ptb.words(text)) for text in NUMBERS["sentences"]} == NUMBERS["sentences"]


@pytest.mark.parametrize("tokenization", ["ptb", "lower", "plain"])
def test_metrics_of_all_captions(tokenization):
    assert score(CANDIDATES, REFERENCES, tokenization) == close(NUMBERS["corpus"][tokenization], rel=1e-12)


def test_metrics_of_each_caption():
    found = scores(CANDIDATES, REFERENCES).each
    assert found.keys() == NUMBERS["each"].keys()
    for name, values in NUMBERS["each"].items():
        assert found[name] == close(values, rel=1e-9, abs=1e-12), name


def test_standard_errors_are_those_of_means_over_images():
    found = scores(CANDIDATES, REFERENCES)
    assert found.standard_error("cider_d") == close(statistics.stdev(NUMBERS["each"]["cider_d"]) / 40**0.5)
    assert scores(["a"], [["a"]]).standard_error("cider_d") is None


def test_metrics_depend_on_the_other_images():
    assert score(CANDIDATES[:10], REFERENCES[:10]) == close(NUMBERS["corpus"]["first_10"], rel=1e-12)


def test_rewards_of_self_critical_training():
    known, reward = NUMBERS["rewards"], Reward(REFERENCES)
    assert reward(known["samples"], known["ground_truth"]) == close(known["sample_cider_d"], rel=1e-12)
    assert reward(known["greedy"], known["ground_truth"]) == close(known["greedy_cider_d"], rel=1e-12)
    with pytest.raises(ValueError):
        reward(known["samples"][:7], known["ground_truth"])


def test_a_caption_without_its_end_earns_less():
    reward = Reward([["a dog runs on the beach"], ["a cat sleeps on a mat"], ["two birds"]])
    whole, cut = reward(["a dog runs on the beach", "a dog runs on the"], [["a dog runs on the beach"]])
    assert whole == close(10) and cut < whole


def test_one_image_is_worth_nothing_and_this_is_said():
    assert score(["a dog"], [["a dog"]])["cider_d"] == 0
    assert any("single image" in remark for remark in remarks(["a dog"], [["a dog"]]))
    assert not remarks(["a dog", "a cat"], [["a dog"], ["a cat"]])


def test_empty_captions_are_zero_and_this_is_said():
    found = scores(["", "...", "a cat"], [["a dog"], ["a bird", ""], ["a cat"]])
    assert [value[:2] for name, value in found.each.items() if name in ("rouge_l", "cider_d")] == [[0, 0], [0, 0]]
    assert all(values[0] < 1e-9 and values[2] > 0 for values in found.each.values())
    assert remarks(["", " ", "a"], [["a"]] * 3) == ["2 of 3 captions are empty"]


def test_captions_of_every_script():
    texts = ["собака бежит по пляжу", "कुत्ता दौड़ता है", "كلب يجري على الشاطئ", "犬 が 走る", "un chien court à la plage"]
    assert [ptb.words(text) for text in texts] == [text.split() for text in texts]
    assert score(texts, [[text] for text in texts])["bleu_1"] == close(1)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(BadInput, match="no image"):
        score([], [])
    with pytest.raises(BadInput, match="image 1: it has no reference"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError):
        score(["a"], [])


def test_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(200):
        first, second = ([rng.choice("abcd") for _ in range(rng.randrange(12))] for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
        assert longest_common(first, second) == table[-1][-1]


@pytest.mark.parametrize("part", ["a+", "a,", "a.", "a-", "1,", "n't", "a'", "/", "_", "a" * 50 + "é", "!?", "((", "www."])
def test_long_captions_are_read(part):
    """A search that goes back and forth would not end."""
    assert "".join(ptb.words(part * (20_000 // len(part)) + " end")).endswith("end")


def test_n_grams():
    assert [sum(grams.values()) for grams in Sentence("a b a b a".split()).grams] == [5, 4, 3, 2]
    assert [sum(grams.values()) for grams in Sentence(["a"]).grams] == [1, 0, 0, 0]
