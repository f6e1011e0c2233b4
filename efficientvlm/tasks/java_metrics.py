"""METEOR and SPICE, whose only implementations are Java programs; both come with the package `pycocoevalcap`, an extra of this one.

SPICE needs CoreNLP 3.6.0 with its models beside it, about 400 MB, which `pycocoevalcap` would fetch at first use. Nothing is fetched here:
the folder is the user's own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from efficientvlm.errors import BadInput
from efficientvlm.tasks import ptb

PACKAGE = "pycocoevalcap"
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
OPENED = ("java.lang", "java.math", "java.util", "java.util.concurrent", "java.net", "java.text")  # to SPICE by a Java of today
HEAP = {"METEOR": "2G", "SPICE": "8G"}


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of one candidate an image, on the words of the Penn Treebank; 0..1.

    Raises:
        BadInput: without Java or `pycocoevalcap`, or a program that fails.
    """
    folder = check("METEOR") / "meteor"
    command = ["java", f"-Xmx{HEAP['METEOR']}", "-jar", str(folder / "meteor-1.5.jar"), "-", "-", "-stdio", "-l", "en", "-norm"]
    lines = [f"SCORE ||| {' ||| '.join(map(_words, known))} ||| {_words(said)}" for said, known in zip(candidates, references, strict=True)]
    found = _run("METEOR", command, lines).splitlines()
    if len(found) != len(lines):
        raise BadInput("METEOR failed", f"it answered {len(found)} of {len(lines)} captions", "leave meteor out")
    return float(_run("METEOR", command, [f"EVAL ||| {' ||| '.join(found)}"]).split()[-1])


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]], corenlp: str) -> float:
    """SPICE of one candidate an image: the mean F-measure of what both say; 0..1.

    Args:
        corenlp: folder with the two files of :data:`CORENLP`.

    Raises:
        BadInput: as :func:`meteor`; or no such files.
    """
    folder, own = check("SPICE", corenlp) / "spice", Path(corenlp).expanduser()
    jars = [folder / "spice-1.0.jar", *sorted((folder / "lib").glob("*.jar")), *(own / name for name in CORENLP)]
    opened = [word for name in OPENED for word in ("--add-opens", f"java.base/{name}=ALL-UNNAMED")]
    said = [
        {"image_id": number, "test": candidate, "refs": list(known)}
        for number, (candidate, known) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place, "in.json"), Path(place, "out.json")
        given.write_text(json.dumps(said), "utf-8")
        start = ["java", f"-Xmx{HEAP['SPICE']}", *opened, "-cp", os.pathsep.join(map(str, jars)), "edu.anu.spice.SpiceScorer"]
        _run("SPICE", [*start, str(given), "-out", str(out), "-silent"], [])
        found = [entry["scores"]["All"]["f"] for entry in json.loads(out.read_text("utf-8"))]
    return math.fsum(found) / len(found)


def check(metric: str, corenlp: str | None = None) -> Path:
    """The folder of the package; :class:`BadInput` where it, Java or what is needed of CoreNLP is missing."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"{metric} needs {PACKAGE}", "it is not installed", "pip install 'efficientvlm[meteor]'")
    if shutil.which("java") is None:
        raise BadInput(f"{metric} needs Java", "there is no command java", "install a Java runtime, version 8 or later")
    missing = [name for name in CORENLP if not Path(corenlp, name).expanduser().is_file()] if corenlp is not None else []
    if missing:
        raise BadInput(f"{corenlp} is not CoreNLP 3.6.0", f"{' and '.join(missing)} not found", "name the folder it was unpacked in")
    return Path(next(iter(found.submodule_search_locations)))


def _words(caption: str) -> str:
    return " ".join(ptb.words(caption)).replace("|||", " ")


def _run(metric: str, command: list[str], lines: list[str]) -> str:
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", env={**os.environ, "LC_ALL": "C.UTF-8"}, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise BadInput(f"{metric} failed", why, "see that its Java program runs on this machine, or leave it out")
    return done.stdout
