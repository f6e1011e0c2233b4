"""The wheel: everything inside efficientvlm/, nothing beside it, and it runs from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import efficientvlm

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = f"efficientvlm-{efficientvlm.__version__}.dist-info"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_listed() -> None:
    found = {
        f"efficientvlm.{path.parent.relative_to(ROOT / 'efficientvlm').as_posix()}"
        for path in (ROOT / "efficientvlm").glob("*/**/__init__.py")
    }
    expected = {"efficientvlm", "efficientvlm.cli", "efficientvlm.recipes"} | {name.replace("/", ".") for name in found}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == expected


def test_the_version_stands_in_one_place_and_leads_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, *_ = re.findall(r"^## (\S+)", changes, re.MULTILINE)
    assert newest == efficientvlm.__version__, "CHANGELOG.md and efficientvlm/__init__.py speak of different versions"
    assert "version" in SETTINGS["project"]["dynamic"] and "version" not in SETTINGS["project"]
    for section in re.split(r"^## .+\n", changes, flags=re.MULTILINE)[1:]:
        titles = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert titles and titles == [title for title in ("Added", "Changed", "Fixed") if title in titles]


def test_no_registry_host_is_named() -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://" not in text and "pypi" not in text.lower(), name


def test_torch_is_loaded_in_one_place_and_weights_only() -> None:
    calls = [
        (path.relative_to(ROOT).as_posix(), line)
        for folder in ("efficientvlm", "cli")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "torch.load(" in line
    ]
    assert len(calls) <= 1 and all("weights_only=True" in line for _, line in calls), calls


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that nothing is left in the tree and nothing old gets in."""
    copy = tmp_path_factory.mktemp("source")
    names = ["efficientvlm", "cli", "recipes", "tests", "pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(copy)]
    subprocess.run(command, check=True)
    return next(target.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" not in name}
    assert {name.split("/")[0] for name in names} == {"efficientvlm", INSTALLED}
    wanted = {"efficientvlm/py.typed", "efficientvlm/cli/main.py"}
    wanted |= {f"efficientvlm/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "efficientvlm" / "bundled").rglob("*") if path.is_file()}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "efficientvlm").rglob("*.py")}
    assert wanted <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_installed_wheel_runs_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)
    assert {path.name for path in site.iterdir()} - {"bin", "Scripts"} == {
        "efficientvlm",
        INSTALLED,
    }
    environment = {**os.environ, "PYTHONPATH": str(site)}
    script = "import efficientvlm.cli.main as m, efficientvlm.recipes as r; print(m.__file__); print(r.__file__); m.main()"
    command = [sys.executable, "-c", script, "recipes", "ls"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert all(line.startswith(str(site)) for line in lines[:2]) and any(line.startswith("quickstart") for line in lines)


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_the_command_works_wherever_it_is_called(place: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "efficientvlm.cli.main", "recipes", "ls"]
    done = subprocess.run(command, cwd=ROOT if place == "root" else tmp_path, capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout and done.stderr == ""
