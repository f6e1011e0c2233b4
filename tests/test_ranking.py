"""Ranking and generation in blocks: the same answers whatever fits at once, and memory that does not grow with the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compression_cases import CONFIGS, network
from conftest import SHAPES, run_stage

from efficientvlm.data.kinds.questions import QUESTIONS
from efficientvlm.data.opening import open_data
from efficientvlm.families.footprint import Footprint, spans, tiles
from efficientvlm.loaded import load
from efficientvlm.tasks.answering import Answerer, evaluation_batches
from efficientvlm.tasks.ranking import generate, rank

EVERYTHING = 1 << 60


def drawn(name: str) -> tuple[Any, dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """A network, 9 questions on 4 images in mixed order, and 11 candidates of one to four tokens."""
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = network(config)
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 6, 2, 5, 3, 6, 4])[:, None]).long()
    ids = torch.randint(5, 20, (9, 6)) * mask
    ids[5] = ids[1]
    mask[5] = mask[1]
    batch = {
        "pixels": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),
        "image_index": torch.tensor([0, 0, 1, 1, 1, 3, 2, 3, 0]),
        "question_ids": ids,
        "question_mask": mask,
        "distinct_questions": torch.tensor([0, 1, 2, 3, 4, 6, 7, 8]),
        "distinct_index": torch.tensor([0, 1, 2, 3, 4, 1, 5, 6, 7]),
    }
    lengths = torch.tensor([3, 6, 4, 3, 5, 3, 6, 4, 3, 3, 5])
    seen = (torch.arange(6) < lengths[:, None]).long()
    candidates = torch.randint(5, 20, (11, 6)) * seen
    candidates[:, 0], candidates[:, 1] = 3, torch.randperm(11) + 6  # no two begin alike, so that the best eight are clear
    candidates[torch.arange(11), lengths - 1] = 2
    return model, batch, (candidates, seen)


def whole(model: Any, batch: dict[str, Any], candidates: tuple[torch.Tensor, torch.Tensor], top: int) -> list[dict[int, float]]:
    """Probability by candidate for every question, each candidate in a pass of its own."""
    ids, mask = candidates
    with torch.no_grad():
        _, context = model.encode(batch)
        found = []
        for row in range(len(batch["question_ids"])):
            first, score = [], []
            for answer, seen in zip(ids, mask, strict=True):
                length = int(seen.sum())
                likelihood = model.decode(context, answer[None, :length], None, torch.tensor([row]))[0].log_softmax(-1)
                steps = [float(likelihood[at, answer[at + 1]]) for at in range(length - 1)]
                first.append(steps[0])
                score.append(sum(steps))
            best = sorted(range(len(ids)), key=lambda at: -first[at])[:top]
            of_them = torch.tensor([score[at] for at in best]).softmax(0).tolist()
            found.append(dict(zip(best, of_them, strict=True)))
    return found


@pytest.mark.parametrize("name", ["xvlm", "blip-qa"])
@pytest.mark.parametrize("rows", [1, 7, None])
def test_blocks_do_not_change_the_ranking(name: str, rows: int | None) -> None:
    model, batch, candidates = drawn(name)
    most = EVERYTHING if rows is None else rows * Footprint.of(model.config).answer(4, 6)
    chosen, probabilities = rank(model, batch, candidates, top=8, most=most)
    for row, some, expected in zip(chosen.tolist(), probabilities.tolist(), whole(model, batch, candidates, 8), strict=True):
        assert dict(zip(row, some, strict=True)) == pytest.approx(expected, abs=1e-5)
        assert some == sorted(some, reverse=True)


@pytest.mark.parametrize("name", ["xvlm", "blip-qa"])
def test_blocks_do_not_change_what_is_generated(name: str) -> None:
    model, batch, _ = drawn(name)
    some, everything = (generate(model, batch, cls_id=3, sep_id=2, max_tokens=5, most=most) for most in (1, EVERYTHING))
    assert torch.equal(some, everything)


@pytest.mark.slow
def test_graphs_are_ranked_in_blocks_too(chain: Path, tmp_path: Path) -> None:
    run_stage("export", model=str(chain / "pruned"), out=str(tmp_path / "onnx"), format="onnx", rounds=0, data=SHAPES, limit=4)
    found = []
    for path in (chain / "pruned", tmp_path / "onnx"):
        loaded = load(str(path), exported=True)
        answer = Answerer(loaded)
        source = open_data(QUESTIONS, SHAPES, "test", limit=3, image_size=loaded.sizes.image_size)
        batch = next(iter(evaluation_batches(source, answer.texts, 3)))
        for most in (1, EVERYTHING):
            found.append(rank(loaded.model, batch, answer.candidates, top=128, most=most))
    for chosen, probabilities in found[1:]:
        torch.testing.assert_close(probabilities, found[0][1], atol=1e-4, rtol=0)
        assert torch.equal(chosen[:, 0], found[0][0][:, 0])


def test_no_questions_have_no_answers() -> None:
    model, batch, candidates = drawn("xvlm")
    none = {"question_ids": batch["question_ids"][:0], "question_mask": batch["question_mask"][:0], "image_index": torch.arange(0)}
    chosen, probabilities = rank(model, {**none, "pixels": batch["pixels"]}, candidates, top=8)
    assert chosen.shape == probabilities.shape == (0, 8)


@pytest.mark.parametrize(("rows", "columns", "fit"), [(5, 7, 1), (5, 7, 3), (5, 7, 12), (5, 7, 100), (1, 128, 10)])
def test_tiles_cover_a_table_once(rows: int, columns: int, fit: int) -> None:
    table = torch.zeros(rows, columns)
    for some, of_them in tiles(rows, columns, 3, 3 * fit):
        assert 0 < table[some, of_them].numel() <= fit
        table[some, of_them] += 1
    assert bool((table == 1).all())


def test_spans_cover_all_questions_and_count_every_image_once() -> None:
    owners = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert list(spans(owners, 10, 1, 13)) == [(0, 3), (3, 5), (5, 8), (8, 9), (9, 10)]
    assert list(spans(owners, 10, 1, 1)) == [(at, at + 1) for at in range(10)]
    assert list(spans(owners, 10, 1, EVERYTHING)) == [(0, 10)] and list(spans([], 1, 1, 1)) == []


PEAK = """
import resource, torch
from efficientvlm.families.xvlm.family import XVLM
from efficientvlm.families.xvlm.config import XVLMConfig
from efficientvlm.tasks.ranking import rank
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
family = XVLM()
model = family.build(XVLMConfig(image_size=64, patch_size=16, vision_width=16, vision_layers=1, vision_heads=2, vision_intermediate=16,
    text_width=16, text_layers=1, fusion_layers=1, decoder_layers=1, text_heads=2, text_intermediate=16, vocab_size=60_000,
    heads=[])).eval()
ids = torch.randint(5, 60_000, (200, 5)); ids[:, 0] = 2
batch = {"pixels": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "image_index": torch.arange(2).repeat_interleave(6),
    "question_ids": torch.ones(12, 8, dtype=torch.long), "question_mask": torch.ones(12, 8, dtype=torch.long)}
before = peak()
rank(model, batch, (ids, torch.ones_like(ids)), top=32)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured as Linux counts it")
def test_the_memory_of_ranking_is_bounded() -> None:
    """All candidates at once would take 12 x 32 x 3 x 60,000 logits, 276 MB, and again as much for their probabilities."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250


@pytest.mark.slow
def test_many_answers_go_through_the_whole_chain_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import many_answers

    sizes = {"count": 60, "images": 80, "steps": 2, "vocabulary": 200}
    made = many_answers.chain(tmp_path, tmp_path / "rows.csv", **sizes)
    assert [row["stage"] for row in made] == list(many_answers.stages(2, 200)) and max(row["peak_mib"] for row in made) < 2048
    monkeypatch.setattr(many_answers, "run", lambda *arguments, folder: pytest.fail("nothing is left to do"))
    assert len(many_answers.chain(tmp_path, tmp_path / "rows.csv", **sizes)) == len(made)
    assert len(set(many_answers.answers(1400))) == 1400
