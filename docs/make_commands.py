"""Writes docs/commands.md from the commands themselves:  python docs/make_commands.py"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

HEAD = """# Every command

Made from the commands by `python docs/make_commands.py`; `--help` after a command shows the same. Settings without an option of their own
are in [settings.md](settings.md), exit codes in [exit-codes.md](exit-codes.md).
"""
COMPLETION = re.compile(r"^\* `--(?:install|show)-completion`.*\n", re.MULTILINE)


def page() -> str:
    """The whole page as Markdown, as Typer documents an application."""
    command = [sys.executable, "-m", "typer", "efficientvlm.cli.main", "utils", "docs", "--name", "evlm", "--title", "Commands"]
    plain = {"NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}
    made = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **plain}).stdout
    text = html.unescape(made).partition("\n")[2].replace("```console\n$ ", "```text\n")
    lines = (line.rstrip() for line in COMPLETION.sub("", text).splitlines())
    return HEAD + "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
