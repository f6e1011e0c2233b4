"""`make cases`: what a folder of cases says is counted, and nothing that went wrong is taken for a good end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import run_cases

SEVERAL = """import sys
CASES = {"a-fine": "ok    a-fine: ", "b-bad": "FAULT b-bad: lost", "c-later": "SKIP  c-later: needs root", "d-mute": "",
         "e-moved": "FAULT e-moved: ImportError(\\"cannot import name 'x' from 'efficientvlm.y'\\")"}
if sys.argv[1] == "--list":
    sys.exit(print("\\n".join(CASES)))
said = CASES[sys.argv[1]]
print(said)
sys.exit("FAULT" in said)
"""


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A command that only knows its version, in an environment of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    (folder / "evlm").write_text("#!/bin/sh\n[ $1 = --version ]\n")
    (folder / "evlm").chmod(0o755)
    return folder / "evlm"


def run(folder: Path, command: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, str], str]:
    code = run_cases.main([str(folder), "--evlm", str(command), *more])
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line[8:].rsplit(" (", 1)[0]: line[:7].strip() for line in lines if line.endswith(" s)") and not line.startswith(" ")}
    return code, verdicts, lines[-1]


def test_every_kind_of_end_is_counted(tmp_path: Path, command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cases"
    (folder / "deep").mkdir(parents=True)
    for name, code in {"ok": 0, "fault": 1, "signal": 139, "later": 77}.items():
        (folder / "deep" / f"{name}.sh").write_text(f"[ $EVLM = {command} ] && [ -z $(ls) ] || exit 9\nexit {code}\n")
    (folder / "slow.py").write_text("import time\ntime.sleep(60)\n")
    (folder / "moved.py").write_text("from efficientvlm.checkpoints.folder import no_such_name\n")
    (folder / "cases.py").write_text(SEVERAL)
    code, verdicts, counts = run(folder, command, capsys, "--timeout", "5", "--jobs", "4")
    assert code == 1 and counts.endswith(": 2 ok, 5 FAULT, 4 SKIP, 0 NOT RUN")
    assert verdicts["deep/signal.sh"] == verdicts["slow.py"] == verdicts["cases.py:d-mute"] == "FAULT"
    assert verdicts["moved.py"] == verdicts["cases.py:e-moved"] == "SKIP"


def test_a_case_that_did_not_run_and_a_product_that_does_not(tmp_path: Path, command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cases"
    folder.mkdir()
    assert run(folder, command, capsys)[::2] == (1, "no case was found")
    (folder / "a.sh").write_text("exit 0\n")
    assert run(folder, command, capsys)[0] == 0
    (folder / "b.sh").write_text("exit 2\n")
    assert run(folder, command, capsys)[0] == 2
    command.write_text("#!/bin/sh\nexit 1\n")
    assert run(folder, command, capsys)[0] == 2
