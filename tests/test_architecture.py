"""Imports point downwards, in the order of the table of folders in CONTRIBUTING.md; the tables of tasks and methods agree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from efficientvlm.objectives import methods
from efficientvlm.settings import methods as method_settings
from efficientvlm.settings import tasks as task_settings
from efficientvlm.tasks.known import TASKS
from efficientvlm.tasks.task import Asked

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| `(?:efficientvlm/)?([a-z]+)(?:/|\.py)` \|", re.M)
EVERYWHERE = {"errors", "control"}
"""Files that import nothing of the package, and that any other may import."""


def order() -> list[str]:
    """Folders and files of the package from the top to the bottom."""
    return ROW.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))


def imports() -> Iterator[tuple[str, str, str]]:
    """The folder or file of an import, the one that it imports from, and where that stands."""
    for folder in ("cli", "efficientvlm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT)
            own = folder if folder == "cli" else file.with_suffix("").parts[1]
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "efficientvlm":
                    inside = (node.module or "").split(".")[1:2] or [name.name for name in node.names]
                    for other in inside:
                        yield own, other, f"{file}:{node.lineno}"


def test_imports_point_downwards() -> None:
    rank = {place: number for number, place in enumerate(order())}
    own = {"__init__", "examples", "script"}  # the library's front door and the programs beside the command line: nothing imports them
    wrong = [
        f"{where}: {place} imports {other}"
        for place, other, where in imports()
        if place not in own and place != other and other not in EVERYWHERE and rank.get(other, -1) <= rank[place]
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_imported_everywhere_imports_nothing() -> None:
    assert not [where for place, _, where in imports() if place in EVERYWHERE]


def test_every_folder_is_in_the_table() -> None:
    folders = {path.parent.name for path in (ROOT / "efficientvlm").glob("*/__init__.py")} - {"examples"}
    assert folders <= set(order())


def test_every_task_and_method_stands_in_each_of_its_tables() -> None:
    """`settings/` has what is known where nothing is loaded, `tasks/known.py` and `objectives/methods.py` the code."""
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in task_settings.ABOUT}
    assert set(TASKS) == set(task_settings.TASKS) - {"none"}
    for name, task in TASKS.items():
        assert isinstance(task, Asked) == (task_settings.ABOUT[name].asked is not None), name
    assert set(methods.METHODS) == set(method_settings.METHODS)
    assert all(set(tasks) <= set(TASKS) for tasks in method_settings.METHODS.values())
