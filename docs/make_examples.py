"""Puts the examples of the pages add-a-*.md into them, from the files that they show:  python docs/make_examples.py"""

from __future__ import annotations

import re
from pathlib import Path

SHOWN = re.compile(r"^```python file=(efficientvlm/\S+)\n(?:.*\n)*?```$", re.MULTILINE)


def with_examples(page: str, root: Path) -> str:
    """`page` with the content of every file that it shows."""
    return SHOWN.sub(lambda found: f"```python file={found[1]}\n{(root / found[1]).read_text('utf-8')}```", page)


if __name__ == "__main__":
    docs = Path(__file__).parent
    for path in sorted(docs.glob("add-a-*.md")):
        path.write_text(with_examples(path.read_text("utf-8"), docs.parent), encoding="utf-8")
