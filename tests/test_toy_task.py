"""The examples of a task, a method of distillation and a family, a file each, through every stage; no stage knows one by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET, SHAPES, TRAIN, run_stage
from doc_pages import ROOT as PROJECT
from doc_pages import add_row, blocks, tables_restored
from PIL import Image
from pydantic import Field

import efficientvlm
from efficientvlm.checkpoints.folder import require_complete
from efficientvlm.data.kinds.pairs import PAIRS, PairItem, pair_batch
from efficientvlm.data.opening import open_data
from efficientvlm.errors import BadInput
from efficientvlm.examples import soft_labels
from efficientvlm.examples.cross_encoder import CrossEncoder, CrossEncoderConfig
from efficientvlm.examples.matching_task import Matching, PairMatching
from efficientvlm.loaded import load, texts_of
from efficientvlm.planning.plan import plan
from efficientvlm.recipe import Step
from efficientvlm.settings.common import Asking
from efficientvlm.settings.compose import stage_settings
from efficientvlm.settings.methods import METHODS as METHOD_SETTINGS
from efficientvlm.settings.tasks import ABOUT, About, Pictures
from efficientvlm.stages import predict
from efficientvlm.tasks.known import TASKS

PAGES = [PROJECT / "docs" / f"add-a-{what}.md" for what in ("task", "method", "family")]


@pytest.fixture(autouse=True)
def examples() -> Iterator[None]:
    """What adding a task, a method and a family takes: the entries that their pages show, and the task among those of the method."""
    with tables_restored():
        for block in (block for page in PAGES for block in blocks(page) if block.info.startswith("row=")):
            add_row(block)
        METHOD_SETTINGS["soft_labels"] = METHOD_SETTINGS["soft_labels"] | {"matching": soft_labels.SoftLabels}
        yield


@pytest.fixture
def pairs(chain: Path, tmp_path: Path) -> str:
    """A checkpoint of the example's family, of which a folder was imported."""
    tokenizer = load(str(chain / "init"), weights=False).tokenizer
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 16, "neurons": 24, "vocab_size": len(tokenizer), "initializer_range": 0.1}
    CrossEncoder(CrossEncoderConfig(**sizes)).save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    run_stage("import", model=str(tmp_path / "folder"), out=str(tmp_path / "pairs"))
    return str(tmp_path / "pairs")


def through_every_stage(start: str, teacher_of: str, tmp_path: Path) -> None:
    """`start` learns the example's task from `teacher_of` by the example's method, is pruned, cut again, tuned, and then used."""
    common: dict[str, Any] = {"data": SHAPES, "task": "matching", **TRAIN}
    out = {name: str(tmp_path / name) for name in ("teacher", "short", "distilled", "pruned", "cut", "tuned", "padded", "report")}
    taught = {**common, "distillation": "soft_labels", "teacher": out["teacher"]}
    run_stage("pretrain", out=out["teacher"], model=teacher_of, freeze=["vision"], **common)
    run_stage("shrink", out=out["short"], model=start)
    run_stage("distill", out=out["distilled"], model=out["short"], temperature=4.0, **taught)
    run_stage("prune", out=out["pruned"], model=out["distilled"], sparsity=0.4, negatives=3, **taught)
    run_stage("prune", out=out["cut"], from_gates=out["pruned"], sparsity=0.5, eval_limit=4)
    run_stage("finetune", out=out["tuned"], model=out["cut"], **taught)
    for name in ("distilled", "pruned", "tuned"):
        manifest = require_complete(out[name])
        assert {"matching", "kd"} <= set(manifest.metrics["train"]) and manifest.metrics["val"]["images"] == 4
        assert manifest.config["distillation"] == "soft_labels" and manifest.config["task"] == "matching"
        assert set(manifest.extra.get("influence", {}).get("inputs", {"image": 0, "text": 0})) == {"image", "text"}
    assert require_complete(out["cut"]).accounting["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.02)
    frozen, before = (load(path).model.state_dict() for path in (out["teacher"], teacher_of))
    moved = {name.partition(".")[0] for name in before if not torch.equal(frozen[name], before[name])}
    assert "vision" not in moved and moved

    found = run_stage("eval", model=out["tuned"], data=SHAPES, task="matching", split="val")
    assert found["metric"].startswith("matching_accuracy: ") and 0 <= found["metrics"]["matching_accuracy"] <= 1
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "red.png")
    answer = predict.run(model=out["tuned"], image=str(tmp_path / "red.png"), question="a red circle", device="cpu")
    assert answer["answer"] == ("yes" if answer["probability"] > 0.5 else "no")
    timed = run_stage("bench", models=[out["tuned"], out["teacher"]], rounds=1, warmup_rounds=0, batch_sizes=[1, 2])
    assert timed["timed"] == Matching.timed_as and len(timed["latency"]) == 4 and all(model["trained"] for model in timed["models"])
    run_stage("export", model=out["tuned"], out=out["padded"], format="padded")
    assert require_complete(out["padded"]).noted("task", str, "") == "matching"
    with pytest.raises(BadInput) as refused:
        run_stage("export", model=out["tuned"], out=str(tmp_path / "onnx"), format="onnx", rounds=0)
    assert "--format padded" in refused.value.fix
    assert "--question" in Path(out["tuned"], "README.md").read_text("utf-8")

    steps = [
        Step("pruned", "prune", stage_settings("prune", {"out": "a", "model": start, "sparsity": 0.4, **taught})),
        Step("test", "eval", stage_settings("eval", {"model": "a", "data": SHAPES, "task": "matching", "split": "val"})),
        Step("timed", "bench", stage_settings("bench", {"models": [start, "a"]})),
    ]
    made = plan(steps, QUIET)
    assert not made.problems.found and all(stage.memory for stage in made.stages)


def test_the_task_and_the_method_on_a_known_family(chain: Path, tmp_path: Path) -> None:
    through_every_stage(str(chain / "student"), str(chain / "init"), tmp_path)
    with pytest.raises(BadInput, match="cannot compare images with texts") as refused:
        run_stage("eval", model=str(chain / "teacher"), data=SHAPES, task="matching", split="val")
    assert "answer questions" in refused.value.why and "an X-VLM" in refused.value.fix
    with pytest.raises(BadInput, match="batch_size 4") as few:
        run_stage("finetune", out=str(tmp_path / "o"), model=str(chain / "init"), data=SHAPES, task="matching", negatives=4, **TRAIN)
    assert "5 or more" in few.value.fix


def test_a_question_of_other_parts_than_known_tasks_ask(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Statement(Asking):
        image: Pictures = Field(min_length=2, max_length=2)
        statement: str

    monkeypatch.setitem(ABOUT, "matching", About({}, asked=Statement))
    monkeypatch.setattr(Matching, "ask", lambda self, config, loaded: {"answer": [config.statement, *config.image]})
    asked: dict[str, Any] = {"model": str(chain / "init"), "image": ["a.png", "b.png"], "device": "cpu"}
    assert predict.run(**asked, statement="both are red")["answer"] == ["both are red", "a.png", "b.png"]
    with pytest.raises(BadInput, match="cannot answer questions"):
        predict.run(**asked, question="are both red?")


def test_the_task_and_the_method_on_the_family_of_the_example(pairs: str, tmp_path: Path) -> None:
    through_every_stage(pairs, pairs, tmp_path)


@pytest.mark.slow
def test_the_method_teaches_known_tasks_across_widths(chain: Path, tmp_path: Path) -> None:
    """A student of other width than its teacher, which the published method refuses."""
    narrow = {"size": "tiny", "tokenizer": str(chain / "init"), "settings": {"image_size": 64, "vision_width": 24, "text_width": 24}}
    few: dict[str, Any] = {"data": SHAPES, **TRAIN, "max_steps": 2}
    run_stage("init", out=str(tmp_path / "narrow"), **narrow)
    general = {"model": str(tmp_path / "narrow"), "teacher": str(chain / "init"), **few}
    with pytest.raises(BadInput, match="other sizes"):
        run_stage("distill", out=str(tmp_path / "refused"), **general)
    run_stage("distill", out=str(tmp_path / "distilled"), distillation="soft_labels", **general)
    assert {"itc", "kd"} <= set(require_complete(tmp_path / "distilled").metrics["train"])
    asked = {"model": str(tmp_path / "narrow"), "teacher": str(chain / "teacher"), "decoder_init": "fusion", **few}
    run_stage("finetune", out=str(tmp_path / "tuned"), distillation="soft_labels", **asked)
    assert {"task", "kd"} <= set(require_complete(tmp_path / "tuned").metrics["train"])


def test_soft_labels_are_the_divergence_of_all_distributions(pairs: str) -> None:
    torch.manual_seed(0)
    student, teacher = (load(pairs) for _ in range(2))
    for parameter in teacher.model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    items: list[PairItem] = [open_data(PAIRS, SHAPES, "train", image_size=64)[number] for number in range(4)]
    batch = pair_batch(items, texts_of(student), seed=0, step=0, augment_kind="none", task=True)
    config = soft_labels.SoftLabels(out="o", model="m", data="d", task="matching", kd=0.25, temperature=2.0)
    hard = PairMatching(student.model, 1)
    losses = soft_labels.distilled(hard, teacher.model, config)(batch, 0)
    ours, theirs = (hard.passes(model, batch, 0).record["matching_logits"] / 2 for model in (student.model, teacher.model))
    divergence = 4 * torch.nn.functional.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    assert losses["kd"].item() == pytest.approx(divergence.item(), rel=1e-5) and divergence > 0
    assert losses["loss"].item() == pytest.approx(0.75 * losses["matching"].item() + 0.25 * divergence.item(), rel=1e-5)
    hard.terms = ()
    with pytest.raises(BadInput, match="need logits"):
        soft_labels.distilled(hard, teacher.model, config)


def test_a_caption_of_two_pictures_matches_both() -> None:
    """What counts as matched is the caption, not its place: two pictures with one caption are no negatives of one another."""

    class Certain(torch.nn.Module):
        def embed_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
            return pixels, None

        def embed_texts(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, None]:
            return ids, None

        def match(self, images: torch.Tensor, rows: torch.Tensor, texts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.full((len(rows),), 2.0), torch.zeros(len(rows))], 1)  # always no

    batch = {"pixels": torch.zeros(3, 1), "text_ids": torch.tensor([[1], [1], [2]]), "text_mask": torch.ones(3, 1, dtype=torch.long)}
    batch["image_ids"] = torch.arange(3)
    loss = PairMatching(Certain(), 1)(batch, 0)["matching"]
    no, yes = 0.126928, 2.126928  # cross-entropy of the logits 2 and 0
    assert loss.item() == pytest.approx((4 * yes + 2 * no) / 6, rel=1e-5)  # 3 own pictures, and that of the neighbour with the same caption


@pytest.mark.slow
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
OWN = {*TASKS}  # before those of examples are added
OPEN = {"known", "task", "influence", "about", "remembered", "choices"}
"""Modules of tasks/ that others may import: none of them is of one task."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Name and content of every module that must not know a task: all but those of settings, tasks and examples."""
    for path in sorted(ROOT.rglob("*.py")):
        folder = path.relative_to(ROOT).parts[0]
        if folder not in ("settings", "tasks", "examples"):
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
            if isinstance(node, ast.Constant) and node.value in OWN and id(node) not in draws:
                found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("efficientvlm.tasks."):
                if node.module.removeprefix("efficientvlm.tasks.") not in OPEN:  # type: ignore[union-attr]
                    found.append(f"{name}:{node.lineno} imports {node.module}")
    assert not found, "\n".join(found)
