"""No command looks up a name or calls anywhere unless data or a model of the hub is asked for, and no library does behind its back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

WATCHED = """
import json, os, sys

CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto", "socket.sendmsg")
calls, told = [], []


def watch(event, arguments):
    if event in CALLS:
        calls.append(f"{event} {arguments[1:]}")
    elif event == "import" and arguments[0] == "onnxruntime":
        told.append(os.environ.get("ORT_DISABLE_TELEMETRY"))


sys.addaudithook(watch)
from efficientvlm.cli.main import main

codes = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["evlm", *command]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
print(json.dumps({"codes": codes, "calls": calls, "told": told[:1]}))
"""
NETWORK = re.compile(r"sa_family=AF_INET6?\b|systemd/resolve|mDNSResponder|avahi")
SYSTEM_CALLS = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg"]


def traced(folder: Path) -> list[str]:
    """The words before a command that write down what it and its threads send, also those that Python knows nothing of; none where the
    system cannot."""
    if not shutil.which("strace"):
        return []
    for more in (["--seccomp-bpf"], []):
        command = [*SYSTEM_CALLS, *more, "-o", str(folder / "trace")]
        if subprocess.run([*command, sys.executable, "-c", "pass"], capture_output=True).returncode == 0:
            return command
    return []


def test_no_name_is_looked_up_and_nothing_is_left_in_temporary_folders(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "p.png")
    commands = [
        ["shrink", "--model", "bundled:easy-vqa", "--layers", "vision=1", "--out", "s", "-q"],
        ["export", "--model", "s", "--format", "onnx", "--int8", "--set", "rounds=0", "--out", "o", "-q"],
        ["eval", "--model", "o", "--data", "shapes:size=20", "--limit", "2", "-q"],
        ["predict", "--model", "o", "--image", "p.png", "--question", "what color is it?"],
    ]
    own = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    for folder in own.values():
        os.mkdir(folder)
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | own
    trace = traced(tmp_path)
    done = subprocess.run(
        [*trace, sys.executable, "-c", WATCHED, json.dumps(commands)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"codes": [0] * 4, "calls": [], "told": ["1"]}
    assert not [path for folder in own.values() for path in Path(folder).rglob("*") if path.name == ".ses"]
    if not trace:
        pytest.skip("the calls of Python were watched; those of libraries need strace")
    assert [line for line in (tmp_path / "trace").read_text().splitlines() if NETWORK.search(line)] == []


def test_what_is_watched_is_seen(tmp_path: Path) -> None:
    ask = "import socket\ntry: socket.getaddrinfo('name.invalid', 80)\nexcept OSError: pass\n"
    ask += "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))\n"
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.replace("from efficientvlm.cli.main import main", ask), "[]"], capture_output=True, text=True
    )
    seen = json.loads(done.stdout)["calls"]
    assert [text.split()[0] for text in seen] == ["socket.getaddrinfo", "socket.connect"]
    if not (trace := traced(tmp_path)):
        pytest.skip("no strace")
    subprocess.run([*trace, sys.executable, "-c", ask], check=True)
    assert any(NETWORK.search(line) for line in (tmp_path / "trace").read_text().splitlines())
