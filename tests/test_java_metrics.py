"""METEOR and SPICE: what is asked of the Java programs, and what is said where they are not there."""

from __future__ import annotations

import json
import stat
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest

from efficientvlm.errors import BadInput
from efficientvlm.tasks.java_metrics import CORENLP, meteor, spice

PROGRAM = """#!/usr/bin/env python3
import json, sys
arguments = sys.argv[1:]
open({log!r}, "a").write(json.dumps(arguments) + "\\n")
if "edu.anu.spice.SpiceScorer" in arguments:
    given = json.load(open(arguments[arguments.index("edu.anu.spice.SpiceScorer") + 1]))
    scores = [{{"image_id": one["image_id"], "scores": {{"All": {{"f": len(one["refs"]) / 10}}}}}} for one in given]
    json.dump(scores, open(arguments[arguments.index("-out") + 1], "w"))
else:
    for line in sys.stdin:
        kind, *rest = line.rstrip("\\n").split(" ||| ")
        print(len(rest) if kind == "SCORE" else "\\n".join([*rest, str(sum(map(float, rest)) / 10)]))
"""


@pytest.fixture
def java(tmp_path, monkeypatch):
    """A command `java` that answers as the programs do and writes down what it was called with; a package with their files."""
    log = tmp_path / "log"
    program = tmp_path / "bin" / "java"
    package = tmp_path / "site" / "pycocoevalcap"
    for folder in (program.parent, package / "meteor", package / "spice" / "lib"):
        folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "spice" / "lib" / "one.jar").touch()
    program.write_text(PROGRAM.format(log=str(log)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.syspath_prepend(package.parent)
    return program, log


def test_meteor_is_asked_with_words(java):
    assert meteor(["A dog.", "two ||| cats"], [["a dog", "The dog!"], ["cats"]]) == pytest.approx((3 + 2) / 10)
    assert [call[-6:] for call in map(json.loads, java[1].read_text().splitlines())] == [["-", "-", "-stdio", "-l", "en", "-norm"]] * 2


def test_spice_reads_the_corenlp_of_the_user(java, tmp_path, monkeypatch):
    own = tmp_path / "corenlp"
    own.mkdir()
    with pytest.raises(BadInput, match=r"models\.jar not found"):
        spice(["a"], [["a"]], str(own))
    for name in CORENLP:
        (own / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spice(["a dog", "a cat"], [["a", "b"], ["c"]], "~/corenlp") == pytest.approx(0.15)
    (call,) = map(json.loads, java[1].read_text().splitlines())
    jars = {Path(jar).name for jar in call[call.index("-cp") + 1].split(":")}
    assert jars == {"spice-1.0.jar", "one.jar", *CORENLP}


def test_a_program_that_fails_says_why(java):
    java[0].write_text("#!/bin/sh\necho no such heap >&2\nexit 3\n")
    with pytest.raises(BadInput, match="no such heap"):
        meteor(["a"], [["a"]])


def test_what_is_missing_is_named(monkeypatch, java):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="METEOR needs Java") as caught:
        meteor(["a"], [["a"]])
    assert "Java runtime" in str(caught.value.fix)
    monkeypatch.setattr("efficientvlm.tasks.java_metrics.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="it is not installed") as caught:
        spice(["a"], [["a"]], "folder")
    assert "efficientvlm[meteor]" in str(caught.value.fix)


@pytest.mark.slow
@pytest.mark.skipif(not (which("java") and find_spec("pycocoevalcap")), reason="needs Java and the extra meteor")
def test_meteor_of_all_captions():
    numbers = json.loads((Path(__file__).parent / "reference" / "captions.json").read_text("utf-8"))
    assert meteor(numbers["candidates"], numbers["references"]) == pytest.approx(0.3770823862208167)
