"""A task and a method of distillation of one file each, through every stage; and that no stage knows one by its name."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUIET, SHAPES, TRAIN, run_stage
from pydantic import Field
from torch import Tensor

import efficientvlm
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.images import open_image
from efficientvlm.data.kinds.pairs import PAIRS, pair_batch
from efficientvlm.data.texts import Texts
from efficientvlm.errors import BadInput
from efficientvlm.loaded import Loaded, load, texts_of
from efficientvlm.objectives.distillation import Distilled
from efficientvlm.objectives.methods import METHODS
from efficientvlm.objectives.objective import Objective, Pass
from efficientvlm.objectives.teachers import LiveTeacher
from efficientvlm.objectives.terms import Term, logits
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings import methods as method_settings
from efficientvlm.settings import tasks as task_settings
from efficientvlm.settings.base import Strict
from efficientvlm.settings.common import Asking, Learning, Measuring, Taught
from efficientvlm.settings.compose import stage_settings
from efficientvlm.stages import predict
from efficientvlm.tasks.influence import Influence, of_pairs
from efficientvlm.tasks.known import TASKS
from efficientvlm.tasks.task import Asked, Learnt
from efficientvlm.training.loop import Batch

# the method: its settings, and one module


class ToyWeights(Strict):
    toy_logits: float = Field(1.0, ge=0)


class ToyDistillation(Taught):
    weights: ToyWeights = Field(default_factory=ToyWeights)


def needs(student: Loaded, teacher: Loaded) -> Iterator[BadInput]:
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        yield BadInput("teacher and student have different tokenizers", "", "use another teacher")


def distilled(hard: Objective, teacher: Any, settings: Any) -> Objective:
    return Distilled(hard, LiveTeacher(hard, teacher), hard.terms, kd=0.5, weights=dict(settings.weights), maps={})


# the task: its settings, its losses, and one class


class ToySettings(Learning):
    shift: int = Field(1, ge=1, description="texts go to the image so many places further for a pair that does not match")


class ToyEval(Measuring):
    pass


class ToyStatement(Asking):
    """Two pictures and what may be true of the first, so that another question than a VQA's is asked."""

    image: task_settings.Pictures = Field(min_length=2, max_length=2)
    statement: str


class Matching(Objective):
    """Pairs of a batch that belong together, and as many that do not."""

    terms = (Term("toy_logits", "toy_logits", logits),)

    def __init__(self, model: Any, shift: int) -> None:
        super().__init__()
        self.model, self.shift = model, shift

    def passes(self, model: Any, batch: dict[str, Any], step: int, want: Any = (), drawn: Any = None) -> Pass:
        scores = self.scores(model, batch)
        truth = torch.arange(len(scores), device=scores.device) < len(scores) // 2
        return Pass({"toy": torch.nn.functional.cross_entropy(scores, truth.long())}, efficientvlm_record(toy_logits=scores))

    def scores(self, model: Any, batch: dict[str, Any]) -> Tensor:
        images, _ = model.embed_images(batch["pixels"])
        texts, _ = model.embed_texts(batch["text_ids"], batch["text_mask"])
        rows = torch.arange(len(images), device=images.device)
        pairs = [(rows, texts, batch["text_mask"]), (rows.roll(self.shift), texts, batch["text_mask"])]
        return torch.cat([model.match(images, images_of, said, mask) for images_of, said, mask in pairs])


def efficientvlm_record(**values: Any) -> Any:
    from efficientvlm.families.network import Record

    return Record(**values)


class Toy(Learnt, Asked):
    name, kind, needs = "toy", PAIRS, ("match",)
    timed_as = "one picture and one text to whether they match"

    def objective(self, config: Any, student: Loaded) -> Matching:
        return Matching(student.model, config.shift)

    def batches(self, config: Any, student: Loaded, items: Sequence[Any], texts: Texts, step: int) -> list[Batch]:
        return [pair_batch(items, texts, seed=config.seed, step=step, task=True)]

    @torch.inference_mode()
    def validate(self, config: Any, student: Loaded, source: Any, quiet: bool) -> dict[str, Any]:
        return self.measure(student, source, batch_size=4, seed=0, title="validate", quiet=quiet)

    def influence(self, config: Any, student: Loaded, source: Any) -> Influence:
        return of_pairs(student, source)

    def measure(self, loaded: Loaded, source: Any, **_: Any) -> dict[str, Any]:
        items = [source[number] for number in range(min(4, len(source)))]
        batch = pair_batch(items, texts_of(loaded), seed=0, step=0, augment_kind="none", task=True)
        moved = {name: value.to(loaded.model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.inference_mode():
            scores = Matching(loaded.model.eval(), 1).scores(loaded.model, moved)
        return {"images": len(items), "toy_score": float(scores.softmax(1)[: len(items), 1].mean())}

    def evaluate(self, config: Any, loaded: Loaded, source: Any, *, title: str, quiet: bool) -> dict[str, Any]:
        return {"metric": "toy_score", "influence": of_pairs(loaded, source), "metrics": self.measure(loaded, source)}

    def ask(self, config: ToyStatement, loaded: Loaded) -> dict[str, Any]:
        pixels = torch.from_numpy(open_image(config.image[0], loaded.preprocessing)).permute(2, 0, 1)[None].to(loaded.model.device)
        ids, mask = (tensor.to(loaded.model.device) for tensor in texts_of(loaded).batch([config.statement]))
        model = loaded.model.eval()
        with torch.inference_mode():
            images, texts = model.embed_images(pixels)[0], model.embed_texts(ids, mask)[0]
            score = model.match(images, torch.zeros(1, dtype=torch.long), texts, mask).softmax(1)[0, 1]
        return {"answer": float(score)}

    def can_be_timed(self, models: Sequence[Loaded]) -> bool:
        return all(map(self.able, models))

    def timed(self, loaded: Loaded, config: Any, device: torch.device, among: Any, quiet: bool) -> Callable[[int], object]:
        objective = Matching(loaded.model.eval(), 1)
        batch = loaded.model.example(max(config.batch_sizes), config.text_length)
        whole = {"pixels": batch["pixels"], "text_ids": batch["question_ids"], "text_mask": batch["question_mask"]}
        return lambda size: objective.scores(loaded.model, {name: value[:size] for name, value in whole.items()})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What adding a task and a method takes: their settings, and a line each where they are listed."""
    learnt = {"finetune": ToySettings, "prune": ToySettings, "eval": ToyEval}
    monkeypatch.setitem(task_settings.TASKS, "toy", learnt)
    monkeypatch.setitem(task_settings.ABOUT, "toy", task_settings.About({}, asked=ToyStatement))
    monkeypatch.setitem(method_settings.METHODS, "toy-method", {"toy": ToyDistillation})
    monkeypatch.setitem(TASKS, "toy", Toy())
    monkeypatch.setitem(METHODS, "toy-method", SimpleNamespace(needs=needs, distilled=distilled))


def test_a_toy_task_goes_through_every_stage(toy: None, chain: Path, tmp_path: Path) -> None:
    common = {"data": SHAPES, "task": "toy", **TRAIN}
    teacher, pruned, cut, tuned = (str(tmp_path / name) for name in ("teacher", "pruned", "cut", "tuned"))
    taught = {**common, "teacher": teacher, "distillation": "toy-method"}
    run_stage("finetune", out=teacher, model=str(chain / "init"), freeze=["vision"], **common)
    run_stage("prune", out=pruned, model=str(chain / "distilled"), sparsity=0.4, **taught)
    run_stage("prune", out=cut, from_gates=pruned, sparsity=0.5, eval_limit=4)
    run_stage("finetune", out=tuned, model=cut, **taught)
    manifest = require_complete(tuned)
    assert {"toy", "kd"} <= set(manifest.metrics["train"]) and manifest.metrics["val"]["images"] == 4
    assert manifest.config["distillation"] == "toy-method" and manifest.config["task"] == "toy"
    assert require_complete(cut).accounting["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    frozen, before = (load(path).model.state_dict() for path in (teacher, str(chain / "init")))
    assert all(torch.equal(frozen[name], before[name]) for name in before if name.startswith("vision."))
    assert any(not torch.equal(frozen[name], before[name]) for name in before if name.startswith("fusion."))

    found = run_stage("eval", model=tuned, data=SHAPES, task="toy", split="val")
    assert found["metric"] == "toy_score" and 0 <= found["metrics"]["toy_score"] <= 1
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "red.png")
    asked: dict[str, Any] = {"model": tuned, "image": [str(tmp_path / "red.png")] * 2, "device": "cpu"}
    assert 0 <= predict.run(**asked, statement="a red circle")["answer"] <= 1
    with pytest.raises(BadInput, match="question: unknown key"):
        predict.run(**asked, question="a red circle?")
    timed = run_stage("bench", models=[tuned, teacher], rounds=1, warmup_rounds=0, batch_sizes=[1, 2])
    assert timed["timed"] == Toy.timed_as and len(timed["latency"]) == 4 and all(model["trained"] for model in timed["models"])
    run_stage("export", model=tuned, out=str(tmp_path / "padded"), format="padded")
    assert require_complete(tmp_path / "padded").noted("task", str, "") == "toy"

    steps = [
        Step("tuned", "finetune", stage_settings("finetune", {"out": "a", "model": str(chain / "init"), **common})),
        Step("pruned", "prune", stage_settings("prune", {"out": "b", "model": "a", "sparsity": 0.4, **taught})),
        Step("test", "eval", stage_settings("eval", {"model": "b", "data": SHAPES, "task": "toy", "split": "val"})),
    ]
    made = plan(steps, QUIET)
    assert not made.problems.found and all(stage.memory for stage in made.stages)
    with pytest.raises(BadInput, match="cannot match images with texts"):
        run_stage("eval", model=str(chain / "teacher"), data=SHAPES, task="toy", split="val")


def test_pre_training_is_pruned_like_any_task(chain: Path, tmp_path: Path) -> None:
    taught = {"model": str(chain / "student"), "teacher": str(chain / "init"), "data": SHAPES, "task": "pretraining", **TRAIN}
    run_stage("prune", out=str(tmp_path / "pruned"), sparsity=0.4, region_probability=1.0, **taught)
    run_stage("prune", out=str(tmp_path / "cut"), from_gates=str(tmp_path / "pruned"), sparsity=0.6, eval_limit=4)
    pruned, cut = (require_complete(tmp_path / name) for name in ("pruned", "cut"))
    assert {"itc", "mlm", "kd", "region_box"} <= set(pruned.metrics["train"]) and "mlm_accuracy" in cut.metrics["val"]
    assert cut.accounting["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.01) and cut.config["task"] == "pretraining"


def test_towers_that_are_not_there_cannot_be_frozen(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="freeze names ears"):
        run_stage("finetune", out=str(tmp_path / "o"), model=str(chain / "init"), data=SHAPES, freeze=["ears"], **TRAIN)


ROOT = Path(efficientvlm.__file__).parent
OPEN = {"known", "task", "influence", "about", "remembered"}
"""Modules of tasks/ that others may import: none of them is of one task."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Name and content of every module that must not know a task: all but those of settings and tasks."""
    for path in sorted(ROOT.rglob("*.py")):
        folder = path.relative_to(ROOT).parts[0]
        if folder not in ("settings", "tasks"):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))


def test_no_stage_knows_a_task_by_its_name() -> None:
    """Neither a comparison nor a key; the purpose of a random draw is a word as well."""
    found = []
    for name, tree in modules():
        draws = {
            id(part)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) in ("generator", "words")
            for part in call.args
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in TASKS and id(node) not in draws:
                found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("efficientvlm.tasks."):
                if node.module.removeprefix("efficientvlm.tasks.") not in OPEN:  # type: ignore[union-attr]
                    found.append(f"{name}:{node.lineno} imports {node.module}")
    assert found == []
