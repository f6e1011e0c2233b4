"""Run a folder of cases, each of which shows whether a fault is there, against one `evlm`.

python tests/run_cases.py FOLDER [--evlm PATH] [--user NAME ...] [--jobs 2] [--timeout 600] [--only TEXT]

A case is a script, `*.sh` or `*.py`, anywhere below FOLDER. It finds the absolute path of the command in EVLM and is run in an empty folder
of its own, `.py` by the Python of evlm's environment. Exit code 0 says ok, 1 FAULT, 77 SKIP (it needs another user or machine), 2 that the
product did not run; anything else, a time-out included, is a FAULT. A file named `cases.py` holds several: `cases.py --list` names them and
`cases.py NAME` prints `ok`, `FAULT` or `SKIP`, the name and a remark. A case that looks inside the package for a name that has moved is
skipped, and that is said.

As root, `--user` runs all cases once for each of the users named. Exit code: 0 all ok, 1 a FAULT, a case that every user skipped although
there were several, or no case at all; 2 the product did not run.
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OK, FAULT, SKIP, NOT_RUN = "ok", "FAULT", "SKIP", "NOT RUN"
SHOWN = 12
SAID = re.compile(r"^(ok|FAULT|SKIP) +([\w.+-]+) *:? ?(.*)$")
MOVED = re.compile(r"(ImportError|ModuleNotFoundError|AttributeError)\b.*\befficientvlm\b")


@dataclass(frozen=True)
class Case:
    """A script, or one of those that a file holds."""

    script: Path
    label: str
    name: str | None = None


@dataclass(frozen=True)
class Result:
    label: str
    user: str
    verdict: str
    remark: str
    seconds: float


class Runner:
    """Starts scripts as one user, each in a process group and a folder of its own."""

    def __init__(self, evlm: Path, user: str | None, timeout: float) -> None:
        self.evlm, self.timeout = evlm, timeout
        self.other = None if user is None or pwd.getpwnam(user).pw_uid == os.geteuid() else pwd.getpwnam(user)
        self.user = user or pwd.getpwuid(os.geteuid()).pw_name

    def call(self, *command: str | Path) -> tuple[int | None, str, float]:
        """Exit code (None after a time-out), everything printed, and seconds."""
        folder = Path(tempfile.mkdtemp(prefix="case-"))
        environment = {**os.environ, "EVLM": str(self.evlm), "TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home")}
        environment |= {"PATH": os.pathsep.join([str(self.evlm.parent), os.environ.get("PATH", os.defpath)])}
        environment.setdefault("OMP_NUM_THREADS", "1")
        account = {}
        if self.other:
            account = {"user": self.other.pw_uid, "group": self.other.pw_gid, "extra_groups": []}
        for name in ("tmp", "home", "work"):
            (folder / name).mkdir()
        for path in (folder, *folder.iterdir()) if self.other else ():
            os.chown(path, self.other.pw_uid, self.other.pw_gid)
        began = time.monotonic()
        try:
            with tempfile.TemporaryFile() as said:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    cwd=folder / "work",
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **account,
                )
                try:
                    code: int | None = process.wait(self.timeout)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    _end(process)
                said.seek(0)
                return code, said.read().decode("utf-8", "replace"), time.monotonic() - began
        finally:
            subprocess.run(["chmod", "-R", "u+rwX", str(folder)], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)

    def command(self, script: Path, *words: str) -> list[str | Path]:
        return ["sh", script] if script.suffix == ".sh" else [self.evlm.parent / "python", script, *words]

    def list(self, script: Path) -> list[str]:
        """Names of the cases that a file holds."""
        code, said, _ = self.call(*self.command(script, "--list"))
        names = said.split()
        if code or not names or any(not re.fullmatch(r"[\w.+-]+", name) for name in names):
            raise SystemExit(f"{script} --list names no cases: exit code {code}\n{said.strip()[-500:]}")
        return names

    def run(self, case: Case) -> Result:
        code, said, seconds = self.call(*self.command(case.script, *([case.name] if case.name else [])))
        verdict, remark = judge(code, said, case.name)
        if code is None:
            remark = f"still running after {self.timeout:.0f} s\n{remark}"
        return Result(case.label, self.user, verdict, remark, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a case started and left running, the case itself included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def judge(code: int | None, said: str, name: str | None) -> tuple[str, str]:
    """Verdict and what to show of a case that ended with `code` and printed `said`."""
    lines = said.strip().splitlines()
    remark = "\n".join(lines[-SHOWN:])
    if name is not None and code in (0, 1):
        own = [match for match in map(SAID.match, lines) if match and match[2] == name]
        if not own:
            return FAULT, f"it gave no verdict on itself\n{remark}"
        verdict, remark = own[-1][1], own[-1][3]
        if verdict == FAULT and MOVED.search(remark):
            return SKIP, f"it looks for a name that has moved: {remark}"
        return verdict, remark
    if code == 1 and lines and MOVED.match(lines[-1]):
        return SKIP, f"it looks for a name that has moved: {lines[-1]}"
    return {0: OK, 1: FAULT, 2: NOT_RUN, 77: SKIP}.get(code, FAULT) if code is not None else FAULT, remark


def scripts(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if path.suffix in (".sh", ".py") and path.is_file() and not hidden:
            yield path.resolve()


def cases(folder: Path, names: Callable[[Path], list[str]], only: str) -> list[Case]:
    """All cases below a folder whose label holds `only`."""
    found = []
    for script in scripts(folder):
        label = script.relative_to(folder.resolve()).as_posix()
        if script.name == "cases.py":
            found += [Case(script, f"{label}:{name}", name) for name in names(script)]
        else:
            found.append(Case(script, label))
    return [case for case in found if only in case.label]


def show(result: Result, several: bool) -> None:
    user = f" as {result.user}" if several else ""
    print(f"{result.verdict:7} {result.label}{user} ({result.seconds:.0f} s)", flush=True)
    if result.verdict != OK and result.remark:
        print("\n".join(f"        | {line[:300]}" for line in result.remark.splitlines()), flush=True)


def summary(results: list[Result], users: list[str]) -> int:
    """Print the counts; the exit code."""
    for user in users:
        counts = Counter(result.verdict for result in results if result.user == user)
        print(f"as {user}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in (OK, FAULT, SKIP, NOT_RUN)))
    verdicts = defaultdict(set)
    for result in results:
        verdicts[result.label].add(result.verdict)
    never = sorted(label for label, seen in verdicts.items() if seen == {SKIP}) if len(users) > 1 else []
    if never:
        print(f"skipped by every user: {', '.join(never)}")
    if not results:
        print("no case was found")
    everything = {result.verdict for result in results}
    return 2 if NOT_RUN in everything else int(FAULT in everything or bool(never) or not results)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--evlm", type=Path, default=Path(sys.executable).parent / "evlm", help="by default the one beside this Python")
    parser.add_argument("--user", action="append", help="run as this user; may be repeated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds a case")
    parser.add_argument("--only", default="", help="only cases whose name holds this text")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        parser.error(f"no folder {options.folder}")
    if options.jobs < 1 or options.timeout <= 0:
        parser.error("--jobs and --timeout are positive")
    for user in options.user or []:
        try:
            pwd.getpwnam(user)
        except KeyError:
            parser.error(f"no user {user}")
    evlm = Path(os.path.abspath(options.evlm))
    runners = [Runner(evlm, user, options.timeout) for user in options.user or [None]]
    for runner in runners:
        try:
            code, said, _ = runner.call(evlm, "--version")
        except OSError as error:
            code, said = -1, str(error)
        if code != 0:
            print(f"{evlm} does not run as {runner.user}: exit code {code}\n{said.strip()[-500:]}")
            return 2
    found = cases(options.folder, runners[0].list, options.only)
    results: list[Result] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for runner in runners:
            for result in pool.map(runner.run, found):
                show(result, len(runners) > 1)
                results.append(result)
    return summary(results, [runner.user for runner in runners])


if __name__ == "__main__":
    sys.exit(main())
