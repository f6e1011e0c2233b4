"""Which sentences of a pile are kept: against reference numbers, against plain loops, whatever the batches, and after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientvlm.errors import BadInput
from efficientvlm.selection import candidates as candidates_module
from efficientvlm.selection.candidates import Candidates, Offer
from efficientvlm.selection.pile import Pile, is_repeat, repeats
from efficientvlm.selection.rules import Limits, Rules, share_of
from efficientvlm.selection.search import Approximate, Exact, Index, regular, unit

FILE = Path(os.environ.get("EVLM_PARITY") or Path(__file__).parents[1] / "../shared/parity") / "dime_fm/selection.json"
known = pytest.mark.skipif(not FILE.is_file(), reason=f"no reference numbers in {FILE}; name their folder in EVLM_PARITY")


class Images:
    """Embeddings in memory."""

    def __init__(self, vectors: Any) -> None:
        self.vectors = np.asarray(vectors, np.float32)
        self.ids, self.width = [str(number) for number in range(len(vectors))], self.vectors.shape[1]

    def blocks(self) -> Iterator[Any]:
        yield from np.array_split(self.vectors, 3)


def stream(
    index: Index, vectors: Any, rules: Rules, folder: Path, *, images: int, rows: Any, batch: int, killed: int | None = None
) -> Candidates:
    """Offer the sentences `rows` of `vectors`, some at a time, saving after each; `killed` behind so many batches."""
    folder.mkdir(exist_ok=True)
    found = Candidates(folder, images, vectors.shape[1], rules)
    for number, begin in enumerate(range(found.done, len(rows), batch)):
        at = np.asarray(rows[begin : begin + batch])
        near = index.nearest(vectors[at], rules.per_image, found.threshold if rules.per_image else None)
        if near.pairs is None:
            offer = Offer(at, near.best, near.score, near.best, near.score)
        else:
            row, image, cosine = near.pairs
            offer = Offer(at[row], image, cosine, near.best[row], near.score[row])
        found.offer(offer, lambda numbers: vectors[numbers])
        if number == killed:
            found._file.flush()
            return found
        if number % 3 == 2:
            found.save(begin + batch, {})
    return found


def kept(found: Candidates) -> list[int]:
    choice, held = found.choose()
    found.close()
    return held.number[choice.kept].tolist()


@known
@pytest.mark.parametrize("batch", [3, 20])
def test_rules_are_those_of_the_reference(tmp_path: Path, batch: int) -> None:
    reference = json.loads(FILE.read_text())
    expected = reference["expected"]
    pile = tmp_path / "pile.txt"
    pile.write_text("\n".join(reference["sentences"]))
    count, bits = repeats(Pile(pile), Limits(min_characters=1), tmp_path / "keys")
    rows = np.flatnonzero(~is_repeat(bits, 0, count))
    assert rows.tolist() == expected["kept_after_duplicates"]
    vectors, images = unit(reference["sentence_features"]), Images(reference["image_features"])
    index = Exact(images)
    near = index.nearest(vectors)
    np.testing.assert_allclose(near.score, expected["score"], rtol=1e-6)
    assert near.best.tolist() == expected["best_image"]
    for name, rules in {
        "top_n_8": {"total": 8},
        "per_image_k_1": {"per_image": 1},
        "per_image_k_2": {"per_image": 2},
        "capped_1": {"cap": 1},
        "capped_2": {"cap": 2},
        "capped_2_total_5": {"cap": 2, "total": 5},
    }.items():
        found = kept(stream(index, vectors, Rules(near=None, **rules), tmp_path / name, images=len(images.ids), rows=rows, batch=batch))
        assert (sorted(found) if "per_image" in name else found) == expected[name], name


def drawn(seed: int, images: int = 30, sentences: int = 400, width: int = 8) -> tuple[Any, Any]:
    """Images, and sentences of which many lie close to one another."""
    draw = np.random.default_rng(seed)
    themes = draw.standard_normal((sentences // 4, width))
    near = themes[draw.integers(0, len(themes), sentences)] + draw.choice([0.05, 0.3, 1.0], (sentences, 1)) * draw.standard_normal(
        (sentences, width)
    )
    return Images(draw.standard_normal((images, width))), unit(near.astype(np.float32)).astype(np.float16).astype(np.float32)


def by_loops(images: Any, vectors: Any, rules: Rules) -> list[int]:
    """The rules in their plainest form, over all sentences at once."""
    cosines = vectors @ unit(images.vectors).T
    best, score = cosines.argmax(1), cosines.max(1)
    allowed = set(range(len(vectors)))
    if rules.per_image is not None:
        allowed = {int(row) for column in cosines.T for row in np.lexsort((np.arange(len(column)), -column))[: rules.per_image]}
    found: list[int] = []
    mine: dict[int, list[int]] = {}
    for row in np.lexsort((np.arange(len(score)), -score)).tolist():
        others = mine.setdefault(int(best[row]), [])
        if row not in allowed or (rules.cap is not None and len(others) == rules.cap):
            continue
        if rules.near is not None and any(float(unit(vectors)[row] @ unit(vectors)[other]) >= rules.near for other in others):
            continue
        others.append(row)
        found.append(row)
    return found[: rules.total]


@pytest.mark.parametrize(
    "rules",
    [
        Rules(cap=3, reserve=1000),
        Rules(cap=2, total=25, near=0.9, reserve=1000),
        Rules(per_image=4),
        Rules(per_image=6, cap=2, near=0.8),
        Rules(total=50, reserve=1000),
        Rules(cap=3, near=None),
    ],
)
def test_streamed_and_killed_it_is_what_loops_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: Rules) -> None:
    monkeypatch.setattr(candidates_module, "FEWEST", 16)
    monkeypatch.setattr(candidates_module, "AT_A_TIME", 10)
    images, vectors = drawn(1)
    index, rows = Exact(images), np.arange(len(vectors))
    given: dict[str, Any] = {"images": 30, "rows": rows}
    expected = by_loops(images, vectors, rules)
    assert kept(stream(index, vectors, rules, tmp_path / "whole", **given, batch=37)) == expected
    for batches in (1, 5):
        stream(index, vectors, rules, tmp_path / "killed", **given, batch=20, killed=batches).close()
    assert kept(stream(index, vectors, rules, tmp_path / "killed", **given, batch=50)) == expected


def test_what_is_held_is_bounded_and_a_small_reserve_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "FEWEST", 16)
    images, vectors = drawn(2, images=4, sentences=1000)
    order = np.argsort(Exact(images).nearest(vectors).score)  # every sentence better than all before: nothing is dropped at sight
    rules = Rules(cap=3, near=0.7, reserve=2)
    found = stream(Exact(images), vectors[order], rules, tmp_path / "held", images=4, rows=np.arange(1000), batch=20)
    assert len(found._kept) <= 4 * 6 + 40 and found.count < 400
    found.save(1000, {})
    assert (tmp_path / "held" / f"candidates-{found.part}").stat().st_size == found.count * found.record.itemsize
    assert len(list((tmp_path / "held").glob("candidates-*"))) == 1
    choice, held = found.choose()
    short = sum(int((held.best[choice.kept] == image).sum()) < 3 and int((held.best == image).sum()) == 6 for image in range(4))
    assert choice.short == short > 0
    assert len(choice.kept) + choice.dropped.total() == len(held.number) == 24


def test_damaged_candidates_are_refused(tmp_path: Path) -> None:
    images, vectors = drawn(3)
    stream(Exact(images), vectors, Rules(cap=2), tmp_path / "held", images=30, rows=np.arange(400), batch=100).close()
    (tmp_path / "held/candidates-0").write_bytes(b"")
    with pytest.raises(BadInput, match="cut short"):
        Candidates(tmp_path / "held", 30, 8, Rules(cap=2))


def test_many_images_are_searched_approximately(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    images, vectors = drawn(4, images=600, width=16)
    exact = Exact(images).nearest(vectors)
    kept_index = tmp_path / "index"
    index = Approximate(images, 600, probes=8, kept=kept_index)
    found = index.nearest(vectors)
    same = found.best == exact.best
    assert same.mean() > 0.8
    np.testing.assert_allclose(found.score[same], exact.score[same], atol=2e-3)
    assert (found.score <= exact.score + 2e-3).all()
    again = Approximate(Images(np.zeros((1, 16))), 600, probes=8, kept=kept_index).nearest(vectors)  # read, not made
    assert (again.best == found.best).all()
    whole = Approximate(images, 600, probes=10_000).nearest(vectors, 2, np.full(600, -1, np.float32))
    assert (whole.best == exact.best).mean() > 0.99
    assert whole.pairs is not None and len(whole.pairs[0]) == 8 * 400


def test_vectors_come_in_blocks_of_one_size() -> None:
    images, _ = drawn(5, images=31)
    assert [len(block) for block in regular(images.blocks(), 12)] == [12, 12, 7]
    np.testing.assert_allclose(np.concatenate(list(regular(images.blocks(), 12))), unit(images.vectors))


def test_repeated_sentences_are_found_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientvlm.selection.pile.SORTED_AT_ONCE", 7)
    draw = np.random.default_rng(6)
    lines = [f"{draw.choice(['A  dog', 'a Dog', ' a cat', 'A BIRD'])} number {draw.integers(9)}" for _ in range(60)]
    lines[5], lines[9] = "x", "x"
    path = tmp_path / "pile.txt"
    path.write_text("\n".join(lines), "utf-8")
    count, bits = repeats(Pile(path), Limits(min_characters=3), tmp_path / "keys")
    plain = [" ".join(line.split()).lower() for line in lines]
    assert (
        count == 60 and is_repeat(bits, 3, 50).tolist() == [len(text) > 1 and text in plain[:row] for row, text in enumerate(plain)][3:53]
    )


def test_foreign_lines_are_numbered_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pile.txt"
    path.write_bytes("\ufeffeine Straße\r\n\n  two\twords \n".encode() + b"\xff\xfe broken\n" + b"y" * (3 << 20) + b"\nlast")
    assert list(Pile(path).sentences()) == ["eine Straße", "", "two words", None, None, "last"]
    assert list(Pile(path).sentences(4)) == [None, "last"]
    path.write_text("a,b\n1,2\n")
    table = path.rename(tmp_path / "pile.csv")
    with pytest.raises(BadInput, match="no column"):
        list(Pile(table).sentences())
    with pytest.raises(BadInput, match="no column"):
        Pile(tmp_path / "pile.txt", "b")
    assert list(Pile(table, "b").sentences()) == ["2"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("a dog", ""),
        ("dog", "too_short"),
        ("a" * 400, "too_long"),
        ("собака на траве", "other_script"),
        ("собака on the green grass of the park", ""),
        ("12 345 !?", "other_script"),
        ("ein Hündchen", ""),
    ],
)
def test_sentences_are_looked_at_by_length_and_script(text: str, reason: str) -> None:
    assert Limits(scripts=["latin"], script_share=0.7).refusal(text) == reason


def test_letters_belong_to_scripts() -> None:
    assert share_of("草地上的狗", ["cjk"]) == share_of("ABC", ["latin"]) == share_of("किताब", ["devanagari"]) == 1
    assert share_of("イヌ", ["hiragana"]) == 0 and share_of("ABcд", ["latin"]) == 0.75
    assert Limits(min_words=2, max_words=3).refusal("one two three four") == "too_long"
    assert Limits(min_words=2).refusal("oneword") == "too_short"


def test_a_rule_says_how_many_are_kept() -> None:
    with pytest.raises(ValueError, match="says how many"):
        Rules()
