"""A few of the bad inputs and kills of `benchmarks/hostile.py`, and its judge, which has to see what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
JUDGE = """
import os, sys, time
sys.path.insert(0, "benchmarks")
import datasets, efficientvlm.cli.main, hostile
from attack.judge import judged
from attack.process import Place, Running, seen
from pathlib import Path
import attack.process as process

process.IDLE_SECONDS, process.MEMORY_MB = 2, 400

def ends(name, action, out="o"):
    place = Place(Path(sys.argv[1]) / name)
    (place.work / "mine").write_text("mine")
    before = seen(place.work)
    ended = Running(["recipes", "ls"], place, action).wait()
    print(name, *(fault.kind for fault in judged(ended, place, before, out)), sep="|")

def half():
    Path("o").mkdir()
    Path("o/model.safetensors").write_text("x")
    sys.stderr.write("error: x\\n")
    raise SystemExit(3)

ends("fine", lambda: None)
ends("raises", lambda: 1 / 0)
ends("changes", lambda: Path("mine").write_text("other"))
ends("strays", lambda: Path("new").write_text("other"))
ends("leaves", lambda: Path(os.environ["TMPDIR"], "x").mkdir())
ends("waits", lambda: os.mkfifo("o") or open("o"))
ends("grows", lambda: (bytearray(900 << 20), time.sleep(60)))
ends("half", half)
ends("dies", lambda: os.abort())
"""


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", JUDGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}
    assert found.pop("fine") == []
    expected = {"raises": "exit 1", "changes": "outside", "strays": "outside", "leaves": "leftovers", "waits": "hang", "grows": "memory"}
    assert {name: kinds[0] for name, kinds in found.items()} == {**expected, "half": "half an output", "dies": "crash"}


@pytest.mark.slow
def test_some_bad_inputs_and_a_kill(tmp_path: Path) -> None:
    kinds = [word for name in ("settings", "recipes", "manifests", "rows of data") for word in ("--kind", name)]
    command = [sys.executable, "benchmarks/hostile.py", "--seed", "5", "--inputs", "57", *kinds, "--kills", "1", "--command", "shrink"]
    faults = tmp_path / "faults"
    done = subprocess.run([*command, "--faults", str(faults)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "12 bad inputs, 0 faults" in done.stdout and "1 kills, 0 faults" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0 and not faults.exists()
