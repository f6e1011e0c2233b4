"""What README and docs show, taken out of the Markdown and run on tiny substitutes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml
from conftest import SHAPES, SIZES
from PIL import Image

from efficientvlm import families
from efficientvlm.cli import main as cli
from efficientvlm.objectives import methods
from efficientvlm.settings import methods as method_settings
from efficientvlm.settings import tasks as task_settings
from efficientvlm.tasks import known

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)

# What a page says → what is used in its place. Whole words of a command, or values of a recipe.
SUBSTITUTES = {
    "bundled:easy-vqa-pretrained": "bundled/pretrained",
    "bundled:easy-vqa": "bundled/vqa",
    "easy-vqa": SHAPES,
    "shapes": SHAPES,
    "width={vision: 32, text: 32}": "width={vision: 8, text: 8}",
    "width={vision: 384}": "width={vision: 8}",
    "width={vision: 512}": "width={vision: 32}",
}
# Options that make a command short; where a page gives the same option, the last one counts.
SHORT_TRAINING = "--max-steps 2 --batch-size 2 --limit 12 --set log_every=1 --set eval_limit=2".split()
SHORTENED = {
    **dict.fromkeys(("pretrain", "distill", "prune", "finetune"), SHORT_TRAINING),
    "eval": ["--limit", "4"],
    "bench": "--rounds 1 --set warmup_rounds=0".split(),
    "export": "--rounds 1 --limit 4".split(),
    "run": [part for key in ("max_steps=2", "batch_size=2", "limit=8", "eval_limit=2") for part in ("--set", key)],
}
SMALL = ["--set", f"settings={json.dumps(SIZES)}"]  # for init at a named size: first, so that a page may change one of them


class Block(NamedTuple):
    """A fenced block: its language, the rest of the opening line, its text, and where it begins."""

    language: str
    info: str
    text: str
    where: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(match[1], match[2], match[3], f"{page.name}, line {text.count(chr(10), 0, match.start()) + 1}")
        for match in FENCE.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """The commands of a `sh` block, continued lines joined; of a `console` block those after a `$`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def run_block(block: Block, world: Path) -> None:
    """Run a block in the folder `world`; AssertionError says where it stands and what went wrong."""
    with contextlib.chdir(world):
        if block.info.startswith("file="):
            write_file(Path(block.info.removeprefix("file=")), block.text)
        elif block.info.startswith("row="):
            add_row(block)
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), {})
        elif block.language == "sh":
            for command in commands(block):
                code, out, err = run(command)
                assert code == 0, f"{block.where}: `{command}` ends with {code}\n{out}{err}"
        elif block.language == "console":
            (command,) = commands(block)
            shown = block.text.partition("\n")[2]
            code, out, err = run(command)
            assert out + err == shown, f"{block.where}: `{command}` prints\n{out}{err}"
            assert (code != 0) == shown.startswith("error:"), f"{block.where}: `{command}` ends with {code}"
        else:
            assert block.language == "text", f"{block.where}: nothing is known about {block.language} blocks"


def add_row(block: Block) -> None:
    """Put the entries in a `python row=module:TABLE example` block into a table of the package, with the names of the module `example`."""
    where, example = block.info.removeprefix("row=").split()
    module, _, table = where.partition(":")
    names = vars(importlib.import_module(module)) | vars(importlib.import_module(example))
    names["table"] = getattr(importlib.import_module(module), table)
    exec(compile(f"table.update({{{block.text}}})", block.where, "exec"), names)


@contextlib.contextmanager
def tables_restored() -> Iterator[None]:
    """After the block every table of tasks, methods and families is as it was before."""
    tables = (task_settings.TASKS, task_settings.ABOUT, known.TASKS, method_settings.METHODS, methods.METHODS, families.FAMILIES)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)  # type: ignore[arg-type]


def run(command: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, with substitutes and shortened; `make` only says what it would do.

    Of `torchrun` the options are checked, and what it starts is run once.
    """
    program, *words = shlex.split(command)
    if command == ". .venv/bin/activate":
        return 0, "", ""
    if program == "make":
        outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, env=outside, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    if program == "python" and words[0] == "-c":
        exec(words[1], {})
        return 0, "", ""
    if program == "python" and words[0] == "-m":  # examples are run by tests of their own
        return int(importlib.util.find_spec(words[1]) is None), "", f"there is no module {words[1]}"
    if program == ".venv/bin/python":
        return int(not (ROOT / words[0]).is_file()), "", f"there is no {words[0]}"
    if program == "evlm":
        return evlm(shortened(words))
    if program == "torchrun":  # what it starts, in one process
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words)
        assert launch.no_python, "evlm is a program"
        return run(shlex.join([launch.training_script, *launch.training_script_args]))
    return 127, "", f"{program} is no command the documentation may use"


def shortened(words: list[str]) -> list[str]:
    command, rest = words[0], [SUBSTITUTES.get(word, word) for word in words[1:]]
    if command == "init" and "--size" in rest:
        return [command, *SMALL, *rest]
    if "--from-gates" in rest:  # nothing is trained
        return [command, *rest, "--limit", "12", "--set", "eval_limit=2"]
    if command == "prune" and " --task none " in f" {' '.join(rest)} ":
        return [command, *rest]
    if command == "export" and "onnx" not in rest:  # nothing is timed
        return [command, *rest]
    fewest = ["--batch-size", "3"] if "task=assignment" in rest else []  # a text meets three images
    return [command, *rest, *SHORTENED.get(command, []), *fewest]


def evlm(words: list[str]) -> tuple[int, str, str]:
    """The command line, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["evlm", *words]
        try:
            code = cli._run()
        finally:
            sys.argv = before
    return code, out.getvalue(), err.getvalue()


def write_file(path: Path, text: str) -> None:
    """An example file, and the pictures its rows point to. In recipes names are substituted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".yaml":
        text = yaml.safe_dump(substituted(yaml.safe_load(text)))
    path.write_text(text, encoding="utf-8")
    if path.suffix == ".jsonl":
        for row in map(json.loads, text.splitlines()):
            for value in filter(lambda value: str(value).endswith(".png"), row.values()):
                picture = path.parent / value
                os.makedirs(picture.parent, exist_ok=True)
                Image.new("RGB", (40, 30), (60 * int(picture.stem), 90, 30)).save(picture)


def substituted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: substituted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [substituted(item) for item in value]
    return SUBSTITUTES.get(value, value) if isinstance(value, str) else value


def inline_code(page: Path) -> Iterator[str]:
    """Code between single backticks, outside of fences."""
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))


def script(path: str) -> ModuleType:
    """A Python file of the project that is not part of the package."""
    sys.path.insert(0, str((ROOT / path).parent))  # as `python path` does
    try:
        return importlib.import_module(Path(path).stem)
    finally:
        sys.path.pop(0)
