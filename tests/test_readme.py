"""README and docs tell the truth: commands run, examples are read, links lead somewhere, tables are those of the code."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from clip_folder import byte_pairs, write_clip
from compression_cases import BACKBONE
from doc_pages import FENCE, ROOT, blocks, commands, evlm, inline_code, run, run_block, script, tables_restored, write_file
from pydantic import BaseModel
from test_import import published
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from efficientvlm.data.tokenizer import save_tokenizer, train_wordpiece
from efficientvlm.settings.base import merge
from efficientvlm.settings.compose import stage_settings, tasks_of, variants
from efficientvlm.settings.methods import CaptioningWeights, Distillation, DistillWeights, RetrievalWeights, TaskWeights
from efficientvlm.settings.stages import STAGES, Prune

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
names = [page.relative_to(ROOT).as_posix() for page in PAGES]

QUESTIONS = """{"image": "pictures/1.png", "question": "what is it?", "answer": "car"}
{"image": "pictures/2.png", "question": "what is it?", "answer": "boat"}
"""


@pytest.fixture(scope="session")
def published_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders and files that a reader brings along, with few and narrow layers."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    tokenizer = train_wordpiece(["what color is the car", "is there a boat", "yes no red blue"], 70)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**size, image_size=64, patch_size=32)).save_pretrained(root / "clip-vit-base-patch16")
    ViTModel(ViTConfig(**size, image_size=64, patch_size=32)).save_pretrained(root / "vit-base-patch16-224")
    text = BertConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=20)
    BertModel(text, add_pooling_layer=False).save_pretrained(root / "bert-base-uncased")
    save_tokenizer(tokenizer, root / "bert-base-uncased")
    write_clip(root / "clip-vit-base-patch32", byte_pairs())
    Dinov2Model(Dinov2Config(**BACKBONE, mlp_ratio=2)).save_pretrained(root / "dinov2-small")
    swin = published(vocab=len(tokenizer), swin=True)
    for name, state in (("x-vlm-clip.th", published(vocab=len(tokenizer))), ("x-vlm-swin.th", swin)):
        torch.save({"model": state}, root / name)  # noqa: TID251  what the published code does
    return root


@pytest.fixture
def world(tmp_path: Path, chain: Path, published_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the reader's: what the pages take for granted lies there."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "EVLM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    shutil.copytree(published_models, tmp_path, dirs_exist_ok=True)
    shutil.copytree(chain / "init", tmp_path / "bundled" / "pretrained")
    shutil.copytree(chain / "init", tmp_path / "bundled" / "init")  # where the teacher looks for its parent
    shutil.copytree(chain / "teacher", tmp_path / "bundled" / "vqa")
    write_file(tmp_path / "my-questions.jsonl", QUESTIONS)
    write_file(tmp_path / "my-pairs.jsonl", QUESTIONS.replace("question", "caption"))
    return tmp_path


def test_the_readme_from_top_to_bottom(world: Path) -> None:
    for block in blocks(ROOT / "README.md"):
        run_block(block, world)


LONG = ("pipeline.md", "export.md", "plan.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [], id=page.name)
        for page in (*DOCS, ROOT / "benchmarks" / "README.md")
    ],
)
def test_every_page_from_top_to_bottom(page: Path, world: Path, chain: Path) -> None:
    """A page stands for itself: it may use the folders of the chain, called as in the README, and what it wrote itself."""
    shutil.copytree(chain, world / "runs")
    with tables_restored():
        for block in blocks(page):
            run_block(block, world)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_examples_on_a_page_are_the_files_that_run(page: Path) -> None:
    shown = [block for block in blocks(page) if block.info.startswith("file=efficientvlm/")]
    assert len(shown) == page.name.startswith("add-a-")
    for block in shown:
        assert (ROOT / block.info.removeprefix("file=")).read_text("utf-8") == block.text, (
            f"{block.where}: run: python docs/make_examples.py"
        )


def test_a_wrong_command_does_not_pass(world: Path) -> None:
    for text in (
        "evlm shrink --modell x",
        "evlm shrunk",
        "evlm verify nowhere",
        "make nonsense",
        "curl x",
        "python -c 'raise AssertionError'",
    ):
        page = world / "page.md"
        page.write_text(f"```sh\n{text}\n```\n")
        with pytest.raises(AssertionError):
            run_block(blocks(page)[0], world)


def test_the_four_lines_are_the_recipe() -> None:
    """Every option of the lines has the value it has in the recipe, which sets a few more."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text("utf-8"))
    stages = {stage["stage"]: stage for stage in recipe["stages"]}
    (block,) = (block for block in blocks(ROOT / "README.md") if "evlm shrink" in block.text)
    lines = [shlex.split(line)[1:] for line in commands(block) if line.startswith("evlm")]
    assert [line[0] for line in lines] == ["shrink", "distill", "prune", "finetune"]
    for command, *options in lines:
        given = {key.removeprefix("--").replace("-", "_"): value for key, value in zip(options[::2], options[1::2], strict=True)}
        assert given.pop("out") == f"runs/{stages[command]['name']}"
        asked = {**recipe["defaults"], **stages[command], "task": "vqa"}
        asked = {key: f"runs/{value[1:]}" if str(value).startswith("@") else value for key, value in asked.items()}
        known = {name for kind in variants(command) for name in kind.model_fields} - ({"task"} if command == "distill" else set())
        wanted = stage_settings(command, {"out": "x", **{key: value for key, value in asked.items() if key in known}})
        mine = stage_settings(command, {"out": "x", **merge({}, [f"{key}={value}" for key, value in given.items()])})
        for key in given:
            assert getattr(mine, key) == getattr(wanted, key), f"README.md and recipes/quickstart.yaml differ in {command} --{key}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and ROOT in (file, *file.parents), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text("utf-8")), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page.name} links to {target}"


def known_settings() -> set[str]:
    found = set()
    for kind in (kind for stage in STAGES for kind in variants(stage)):
        for name, info in kind.model_fields.items():
            found.add(name)
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                found |= {f"{name}.{inner}" for inner in info.annotation.model_fields}
    return found


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """Command → its help text."""
    commands = [*STAGES, "predict", "inspect", "verify", "plan", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return {command: evlm([command, "--help"])[1] for command in commands}


WRITTEN = [page for page in PAGES if page.name != "commands.md"]  # that one is made from the commands


@pytest.mark.parametrize("page", WRITTEN, ids=[page.relative_to(ROOT).as_posix() for page in WRITTEN])
def test_options_and_settings_in_the_text_exist(page: Path, help_of: dict[str, str]) -> None:
    for code in inline_code(page):
        program, *words = shlex.split(code) if code.startswith("evlm ") else code.split()
        if program == "make":
            assert run(code)[0] == 0, f"{page.name}: `{code}`"
        if words and (script := ROOT / "benchmarks" / program).is_file():
            text = script.read_text("utf-8")
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), f"{page.name}: `{code}`"
            continue
        command = words[0] if program == "evlm" and words and not words[0].startswith("-") else None
        assert command in (None, "recipes") or command in help_of, f"{page.name}: `{code}`"
        texts = [help_of[command]] if command in help_of else help_of.values()
        for option in (word for word in (program, *words) if re.fullmatch(r"--[a-z][a-z-]*", word)):
            assert any(re.search(rf"{option}(?![\w-])", text) for text in texts), f"{page.name}: `{code}`"
        for setting in re.findall(r"--set ([a-z_.]+)=", code):
            assert setting in known_settings() or setting.startswith("settings."), f"{page.name}: `{code}`"


def weights_under(title: str) -> dict[str, float]:
    text = (ROOT / "docs" / "distillation.md").read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    return {name: float(value) for name, value in re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.MULTILINE)}


def test_tables_are_those_of_the_code() -> None:
    assert weights_under("Before the task") == DistillWeights().model_dump()
    assert weights_under("With the task") == TaskWeights().model_dump()
    assert weights_under("Retrieval") == RetrievalWeights().model_dump()
    assert weights_under("Captioning") == CaptioningWeights().model_dump()
    pruning = (ROOT / "docs" / "pruning.md").read_text("utf-8")
    quirks = re.findall(r"^\| `(\w+)` \| (true|false) \|", pruning, re.MULTILINE)
    given = {"model": "m", "data": "d", "out": "o"}
    tasks = [task for task in tasks_of("prune") if task != "none"]
    more = {"embedding": {"sentences": "s"}}
    known = {name: usual for task in tasks for name, usual in stage_settings("prune", {**given, **more.get(task, {}), "task": task}).quirks}
    assert {name: value == "true" for name, value in quirks} == known
    for name in ("freeze_at", "sparsity_hold", "sparsity_warmup"):
        assert f"`{name}` = {Prune.model_fields[name].default} of" in pruning
    assert f"kd = {Distillation.model_fields['kd'].default} (--kd)" in (ROOT / "docs" / "distillation.md").read_text("utf-8")


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == script("docs/make_settings.py").page(), "run: python docs/make_settings.py"


def test_the_page_of_settings_lists_them_all() -> None:
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    flat = script("docs/make_settings.py").flat
    names = {name for stage in STAGES for kind in variants(stage) for name in flat(kind)}
    assert not [name for name in sorted(names) if f"| `{name}`" not in page]


def test_the_page_of_commands_is_up_to_date() -> None:
    assert (ROOT / "docs" / "commands.md").read_text("utf-8") == script("docs/make_commands.py").page(), "run: python docs/make_commands.py"
