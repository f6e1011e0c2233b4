"""Put the teachers that `evlm run easy-vqa-teacher` trained into the package, in half precision.

python benchmarks/bundle.py runs/easy-vqa-teacher
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from efficientvlm.checkpoints.card import model_card
from efficientvlm.checkpoints.files import BUNDLED, sha256
from efficientvlm.checkpoints.folder import CARD, require_complete
from efficientvlm.checkpoints.lineage import known_data
from efficientvlm.checkpoints.manifest import MANIFEST, FileRecord, Parent
from efficientvlm.errors import BadInput
from efficientvlm.script import run_script

NAMES = {"pretrained": "easy-vqa-pretrained", "teacher": "easy-vqa"}  # stage of the recipe → name in the package
WEIGHTS = "model.safetensors"
MOST_BYTES = 10_000_000


def bundle(run: Path) -> list[Path]:
    """Write both checkpoints, once both are there; the second one's parent is the first. Their folders."""
    parent: Parent | None = None
    manifests = {stage: require_complete(run / stage) for stage in NAMES}
    for stage, manifest in manifests.items():
        name = NAMES[stage]
        source, target = run / stage, BUNDLED / name
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
            shutil.rmtree(target)
            raise BadInput(
                f"{target} is too large for the package",
                f"{size:,} bytes, {MOST_BYTES:,} at most",
                "train a smaller teacher; git restores the old one",
            )
    return [BUNDLED / name for name in NAMES.values()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the recipe's stages")
    run = parser.parse_args().run
    sys.exit(run_script(lambda: bundle(run)))
