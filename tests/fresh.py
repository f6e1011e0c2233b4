"""Programs run in processes of their own, side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def outputs(programs: dict[str, tuple[str, Sequence[str]]], cwd: Path) -> dict[str, str]:
    """Standard output of each program (name → code and arguments); AssertionError with the end of its errors if one fails."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    started = {name: subprocess.Popen([sys.executable, "-c", code, *words], **pipes) for name, (code, words) in programs.items()}
    said = {}
    for name, process in started.items():
        said[name], errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {errors[-2000:]}"
    return said
