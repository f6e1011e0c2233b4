"""Memory and processor time of ranking questions by many answers, with a large vocabulary, here and in another tree of this project.

python benchmarks/ranking.py [--against TREE --against-images 8]

A network of the bundled teacher's sizes with a vocabulary of 30,522 ranks 6 questions about each image by 1,400 answers of up to five
tokens, on random weights, in a fresh process. `--against` measures the same with the code in another folder, such as a checkout of an
earlier commit; where that takes much memory, with fewer images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from published import ROOT, as_csv, csv_of, rows_of

QUESTIONS, ANSWERS, VOCABULARY, TEACHER = 6, 1400, 30_522, "bundled/easy-vqa"
QUESTION_TOKENS, ANSWER_TOKENS = 12, 7


def ranked(images: int) -> dict[str, Any]:
    """Rank in this process, with whichever `efficientvlm` it imports."""
    import resource
    import time

    import torch

    import efficientvlm
    from efficientvlm import families
    from efficientvlm.families.xvlm.config import XVLMConfig

    try:
        from efficientvlm.tasks.ranking import rank
    except ImportError:  # another tree may be an older one
        from efficientvlm.tasks.vqa import rank  # type: ignore[no-redef]

    torch.manual_seed(0)
    family = families.get("xvlm")
    folder = Path(__file__).resolve().parents[1] / "efficientvlm" / TEACHER
    config = XVLMConfig.from_pretrained(folder)
    config.vocab_size = VOCABULARY
    model = family.build(config).eval()
    asked = images * QUESTIONS

    def tokens(rows: int, length: int) -> tuple[Any, Any]:
        return torch.randint(100, VOCABULARY, (rows, length)), torch.ones(rows, length, dtype=torch.int64)

    ids, mask = tokens(asked, QUESTION_TOKENS)
    answers, present = tokens(ANSWERS, ANSWER_TOKENS)
    answers[:, 0] = answers[0, 0]
    present[:] = torch.arange(ANSWER_TOKENS) < torch.randint(3, ANSWER_TOKENS + 1, (ANSWERS, 1))
    size = config.sizes().image_size
    batch = {
        "pixels": torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8),
        "image_index": torch.arange(images).repeat_interleave(QUESTIONS),
        "question_ids": ids,
        "question_mask": mask,
        "distinct_questions": torch.arange(asked),
        "distinct_index": torch.arange(asked),
    }
    began = time.process_time()
    chosen, _ = rank(model, batch, (answers, present), top=128)
    seconds = time.process_time() - began
    unit = 1 if sys.platform == "darwin" else 1024
    assert chosen.shape == (asked, 128) and Path(efficientvlm.__file__).is_relative_to(os.environ["PYTHONPATH"])
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "cpu_seconds": seconds}


def measure(tree: Path, images: int) -> dict[str, Any]:
    """The row of `tree`."""
    from efficientvlm.checkpoints import manifest
    from efficientvlm.runtime.hardware import processor

    command = [sys.executable, __file__, "--images", str(images), "--here"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree)}, cwd=tree, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    head = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    sizes = {"images": images, "questions": images * QUESTIONS, "answers": ANSWERS, "vocabulary": VOCABULARY}
    each = {"cpu_ms_per_question": 1000 * found["cpu_seconds"] / (images * QUESTIONS)}
    return {"commit": commit, **sizes, **found, **each, "processor": processor(), "date": manifest.now()[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, action="append")
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--against-images", type=int, default=8)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    counts = asked.images or [8, 64]
    if asked.here:
        print(json.dumps(ranked(counts[0])))
        return
    from efficientvlm.checkpoints.files import write_atomic
    from efficientvlm.runtime.hardware import processor

    path = ROOT / csv_of("ranking", processor())
    made = [measure(asked.against.resolve(), asked.against_images)] if asked.against else []
    made += [measure(ROOT, count) for count in counts]
    rows = {(row["commit"], str(row["images"])): dict(row) for row in [*rows_of(path), *made]}
    write_atomic(path, as_csv(list(rows.values())))
    for row in made:
        print(f"{row['commit']}, {row['images']} images: {row['peak_mib']:.0f} MiB, {row['cpu_ms_per_question']:.0f} ms a question")


if __name__ == "__main__":
    main()
