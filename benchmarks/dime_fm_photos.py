"""The part `photos` of `dime_fm.py`: what half of a DINOv2 learns without pairs from a teacher of photos, and which sentences it takes.

The recipe `dime_fm/photos` says how a student is made and trained; all rows but the teacher's are that student with other sentences, fewer
photos or terms, or trained on the true pairs. They share what is made before training, and differ in the seed of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from published import ROOT, about, of_towers, share
from scenes import Chain

from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.errors import BadInput

RECIPE = ROOT / "recipes" / "dime_fm" / "photos.yaml"
PHOTOS, SEEDS = "photos", (0, 1, 2)
TEACHER, SELECTED, WHOLE, RANDOM, PAIRS, PRUNED = "teacher", "selected", "whole pile", "random part", "true pairs", "selected, pruned"
METRICS = tuple(f"{direction}_r{top}" for direction in ("image_to_text", "text_to_image") for top in (1, 5, 10))

Measured = tuple[tuple[str, str], Callable[[Path], Iterator[dict[str, Any]]]]


@dataclass(frozen=True)
class Places:
    """Folders that :mod:`efficientvlm.examples.photo_teacher` and :mod:`efficientvlm.examples.towers` wrote, and how students compute while
    they learn."""

    photos: Path
    towers: Path
    precision: str = "fp32"

    @property
    def overrides(self) -> list[str]:
        """Of the recipe, so that it reads them."""
        pile = [f"sentences.data={self.pile}", f"selected.sentences={self.pile}"]
        return [f"data={self.photos}", f"images.vectors={self.photos / 'vectors.parquet'}", *pile, *of_towers(self.towers)]

    @property
    def pile(self) -> Path:
        return self.photos / "pile.txt"


@dataclass(frozen=True)
class Model:
    """A row: what it is, the stage of the recipe that trains it, and what that stage is told beyond the recipe.

    `drawn` is whether it reads as many sentences of the pile, drawn at random, as were selected; `part` is that of the photos.
    """

    what: str
    stage: str = "distilled"
    changes: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    drawn: bool = False
    part: float = 1.0
    seeds: tuple[int, ...] = (0,)


MODELS = {
    SELECTED: Model("photos, and the sentences that were selected", seeds=SEEDS),
    PAIRS: Model("as many steps on the same photos with their own captions, by contrast", "pairs", seeds=SEEDS),
    WHOLE: Model("photos, and the pile as it is", whole=True, seeds=SEEDS),
    RANDOM: Model("photos, and as many sentences as were selected, drawn from the pile", whole=True, drawn=True, seeds=SEEDS),
    "without vl": Model("selected sentences, L_p-vl alone", changes={"weights": {"vl": 0}}),
    "without pvl": Model("selected sentences, L_vl alone", changes={"weights": {"pvl": 0}}),
    "with udist": Model("selected sentences, L_udist with a weight of 0.1 beside both", changes={"weights": {"udist": 0.1}}),
    "half of the photos": Model("selected sentences, half of the photos, as many steps", part=0.5),
    "a tenth of the photos": Model("selected sentences, a tenth of the photos, as many steps", part=0.1),
    PRUNED: Model("the student of the selected sentences, then two fifths of its tower of images cut by learnt gates", "pruned"),
}


def photos_rows(seeds: Sequence[int], places: Places) -> Iterator[Measured]:
    """Key and measurement of every row: the teacher, all models of the first seed, and those of the other seeds."""
    for seed in seeds:
        if seed == SEEDS[0]:
            yield (str(seed), TEACHER), partial(teacher, places)
        for name, model in MODELS.items():
            if seed in model.seeds:
                yield (str(seed), name), partial(student, seed, name, places)


def said_by_teacher(places: Places) -> dict[str, Any]:
    """What the script wrote of the teacher.

    Raises:
        BadInput: it was not run.
    """
    path = places.photos / "teacher.json"
    if not path.is_file():
        raise BadInput(
            f"there is no {path}", "photos, their vectors and the pile are made first", "python -m efficientvlm.examples.photo_teacher"
        )
    return dict(json.loads(path.read_text("utf-8")))


def teacher(places: Places, root: Path) -> Iterator[dict[str, Any]]:
    found = said_by_teacher(places)
    yield row(SEEDS[0], TEACHER, found["metrics"], places, photos=found["fitted_on"], what="features of EfficientNet-Lite0 and a matrix")


class Photos:
    """The stages of the recipe with the seed of a student; what comes before its training is that of the first seed."""

    def __init__(self, seed: int, places: Places, root: Path) -> None:
        self.places = places
        self.chain = Chain(RECIPE, seed, root / PHOTOS, places.overrides)
        self.first = self.chain if seed == SEEDS[0] else Chain(RECIPE, SEEDS[0], root / PHOTOS, places.overrides)

    def model(self, name: str) -> str:
        """The checkpoint of a row."""
        model = MODELS[name]
        made = {"model": self.model(SELECTED) if name == PRUNED else self.first.made("student")}
        if model.stage != "pairs":
            made |= {f"{side[:-1]}_store": self.first.made(side) for side in ("images", "sentences")}
            made["sentences"] = str(self.places.pile) if model.whole else self.first.made("selected")
        changes: dict[str, Any] = {"precision": self.places.precision, **made, **model.changes}
        if model.drawn:
            changes["sentence_limit"] = len(self.selected())
        if model.part < 1:
            changes["limit"] = round(model.part * said_by_teacher(self.places)["photos"])
        out = f"row-{name.replace(',', '').replace(' ', '-')}"  # a stage of the recipe is called selected too
        self.chain.like(model.stage, out, **changes)
        return str(self.chain.root / out)

    def selected(self) -> list[str]:
        return (Path(self.first.made("selected")) / "sentences.txt").read_text("utf-8").splitlines()

    def tested(self, name: str) -> dict[str, Any]:
        """The metrics of a row's model on the photos of validation, measured once."""
        out = f"{name.replace(',', '').replace(' ', '-')}-val.json"
        return dict(self.chain.like("student-val", out, model=self.model(name))["metrics"])


def student(seed: int, name: str, places: Places, root: Path) -> Iterator[dict[str, Any]]:
    """Train, measure on the photos of validation, and say what came out."""
    made, model, began = Photos(seed, places, root), MODELS[name], time.process_time()
    about_pile = said_by_teacher(places)
    trained = checkpoint.require_complete(made.model(name))
    seconds, accounting = time.process_time() - began, trained.accounting
    sizes: dict[str, Any] = {"cpu_seconds": round(seconds, 1), "steps": made.chain.settings(model.stage).max_steps}
    sizes["precision"] = trained.config["precision"]
    sizes |= {"vision_parameters": accounting["parameters"]["by_tower"]["vision"], "sparsity": accounting["sparsity"]["achieved"]}
    if model.stage == "pairs":
        sizes |= {"sentences": about_pile["captions"], "captions_among": 1.0}
    elif model.whole:
        sizes["sentences"] = len(made.selected()) if model.drawn else about_pile["sentences"]
        sizes["captions_among"] = about_pile["captions"] / about_pile["sentences"]
    else:
        sizes |= {"sentences": len(made.selected()), "captions_among": among(made.selected(), places)}
    photos = round(model.part * about_pile["photos"])
    yield row(seed, name, made.tested(name), places, photos=photos, what=model.what, **sizes)


def among(sentences: Sequence[str], places: Places) -> float:
    """The part of `sentences` that are captions."""
    from pyarrow import parquet as pq

    said = pq.read_table(places.photos / "train.parquet", columns=["captions"])["captions"].to_pylist()
    captions = {" ".join(text.split()) for texts in said for text in texts}
    return sum(text in captions for text in sentences) / len(sentences)


def row(seed: int, name: str, metrics: dict[str, Any], places: Places, *, photos: int, what: str, **sizes: Any) -> dict[str, Any]:
    best = said_by_teacher(places)["metrics"]["mean_recall"]
    columns = ("sentences", "captions_among", "steps", "precision", "vision_parameters", "sparsity", "cpu_seconds")
    return {
        "seed": seed,
        "model": name,
        "mean_recall": metrics["mean_recall"],
        "of_teacher": share(metrics["mean_recall"], best),
        **{metric: metrics[metric] for metric in METRICS},
        "photos": photos,
        **{column: sizes.get(column) for column in columns},
        **about(what),
    }
