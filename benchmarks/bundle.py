"""Put the teachers that `evlm run easy-vqa-teacher` trained into the package, in half precision.

python benchmarks/bundle.py runs/easy-vqa-teacher
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from efficientvlm.card import model_card
from efficientvlm.checkpoint import CARD, require_complete
from efficientvlm.files import BUNDLED, sha256
from efficientvlm.lineage import known_data
from efficientvlm.manifest import MANIFEST, FileRecord, Parent

NAMES = {"pretrained": "easy-vqa-pretrained", "teacher": "easy-vqa"}  # stage of the recipe → name in the package
WEIGHTS = "model.safetensors"
MOST_BYTES = 10_000_000


def bundle(run: Path) -> None:
    """Write both checkpoints; the second one's parent is the first."""
    parent: Parent | None = None
    for stage, name in NAMES.items():
        source, target = run / stage, BUNDLED / name
        manifest = require_complete(source)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in sorted(manifest.files):
            if file == WEIGHTS:
                halves = {key: value.to(torch.float16) for key, value in load_file(source / file).items()}
                save_file(halves, target / file, metadata={"format": "pt"})
            else:
                shutil.copyfile(source / file, target / file)
        files = {file: FileRecord(sha256=sha256(target / file), bytes=(target / file).stat().st_size) for file in sorted(manifest.files)}
        extra = {**manifest.extra, "weights": "float16, rounded from the float32 of the training run"}
        final = manifest.model_copy(update={"origin": "bundled", "files": files, "parents": [parent] if parent else [], "extra": extra})
        (target / MANIFEST).write_bytes(final.dump())
        (target / CARD).write_text(model_card(final, name, known_data(target, final)), encoding="utf-8")
        parent = Parent(role="model", path=f"bundled:{name}", sha256=sha256(target / MANIFEST))
        (target / WEIGHTS).chmod(0o644)
        size = sum(file.stat().st_size for file in target.iterdir())
        if size > MOST_BYTES:
            raise SystemExit(f"{target} has {size} bytes, more than {MOST_BYTES}")
        print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    bundle(Path(sys.argv[1]))
