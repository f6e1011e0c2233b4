"""Resident peaks of commands: what `memory.py` and `many_answers.py` measure with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from efficientvlm.errors import BadInput

COMMAND = [sys.executable, "-c", "from efficientvlm.cli.main import main; main()"]
MIB = 2**20


def run(*arguments: str, folder: Path) -> tuple[float, float]:
    """Largest resident memory (MiB) of an evlm command run in `folder`, and its processor time in seconds.

    Raises:
        BadInput: it failed.
    """
    with open(folder / "last.log", "w+b") as log:
        process = subprocess.Popen([*COMMAND, *arguments, "--quiet"], cwd=folder, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = (folder / "last.log").read_text("utf-8", "replace").strip()[-500:]
        raise BadInput(f"evlm {' '.join(arguments)} failed", said, "")
    unit = 1 if sys.platform == "darwin" else 1024
    return used.ru_maxrss * unit / MIB, used.ru_utime + used.ru_stime


def planned(*arguments: str, folder: Path) -> dict[str, int]:
    """Bytes by purpose that `--dry-run` states for the same command."""
    done = subprocess.run([*COMMAND, *arguments, "--dry-run", "--json", "--quiet"], cwd=folder, capture_output=True, check=False)
    try:
        memory: Any = json.loads(done.stdout)["plan"]["memory"]
    except ValueError:
        raise BadInput(f"evlm {' '.join(arguments)} cannot be planned", done.stderr.decode()[-500:], "") from None
    return dict(memory)
