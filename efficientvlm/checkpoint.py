"""Checkpoint folders: found, checked, and written so that a crash never leaves a half-made one (what they come from: lineage.py).

While a stage runs its folder holds `training_state/request.json`, which says what is being made and marks the folder as ours. Finished
files are gathered in a sibling folder and renamed in; the manifest comes last. At every instant the folder is therefore the old checkpoint,
an unfinished one that the same command completes, or the new checkpoint. `training_state/lock` keeps a second writer out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientvlm import files as places
from efficientvlm import manifest as manifests
from efficientvlm.card import model_card
from efficientvlm.errors import BadInput
from efficientvlm.files import fsync_dir, out_of_space, resolve, sha256, shown, write_atomic
from efficientvlm.lineage import known_data
from efficientvlm.lock import Lock
from efficientvlm.manifest import MANIFEST, FileRecord, Manifest, Parent
from efficientvlm.request import REQUEST, beside, compare, read_request

STATE = "training_state"
LOCK = "lock"
METRICS = "metrics.jsonl"
CARD = "README.md"


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def require_complete(spec: str | Path) -> Manifest:
    """The manifest of a finished checkpoint whose files are all there with their recorded sizes (no hashing, see :func:`verify`).

    Raises:
        BadInput: the stage that writes it has not finished, or files are missing or of another size.
    """
    folder = resolve(spec, checkpoint=True)
    if (folder / STATE).is_dir() and not (folder / MANIFEST).exists():
        raise BadInput(f"{folder} is not finished", "the stage that writes it was interrupted", "run its command again; it resumes")
    manifest = manifests.read(folder)
    if problems := _wrong_sizes(folder, manifest):
        raise BadInput(f"{folder} is damaged", "; ".join(problems[:3]), "restore the files, or run its stage again with --force")
    return manifest


def _wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != record.bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {record.bytes}")
    return problems


def fingerprint(spec: str | Path) -> str:
    """Hex digest of an input: of a checkpoint's manifest, of a file, or of all files of another folder.

    A text `sha256:HEX` is taken as a digest already known.
    """
    if str(spec).startswith("sha256:"):
        return str(spec).removeprefix("sha256:")
    path = resolve(spec)
    if path.is_file():
        return sha256(path)
    if (path / MANIFEST).is_file():
        return sha256(path / MANIFEST)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()


def _is_checkpoint(spec: str) -> bool:
    return not spec.startswith("sha256:") and (resolve(spec) / MANIFEST).is_file()


def _relative(path: Path, folder: Path) -> str:
    """How a manifest in `folder` refers to `path`: folders that are moved together keep finding one another."""
    if (text := shown(path)).startswith("bundled:"):
        return text
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows
        return path.resolve().as_posix()


def _readable() -> int:
    """Mode of a new file under the process's umask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@dataclass
class Output:
    """The folder one stage writes. Made by :meth:`open`, finished by :meth:`commit`, given up by :meth:`abandon`.

    `differing` says in which settings, that do not change what is learnt, a result that is up to date was made otherwise.
    `mine` is False in the other processes of a distributed run: they know the folder, and write nothing into it.
    """

    path: Path
    stage: str
    inputs: dict[str, str]
    digests: dict[str, str]
    config: dict[str, Any]
    up_to_date: bool = False
    replaces: list[str] = field(default_factory=list)
    beside: bool = False
    differing: list[str] = field(default_factory=list)
    mine: bool = True

    def __post_init__(self) -> None:
        self._lock = Lock(self.state_dir / LOCK)

    @classmethod
    def open(
        cls, path: str | Path, *, stage: str, inputs: dict[str, str], config: dict[str, Any], force: bool = False, resume: bool = True
    ) -> Output:
        """Claim a folder for a stage, or find that its result is already there (`up_to_date`; then nothing is written).

        Args:
            inputs: role → checkpoint, file or folder, `bundled:NAME`, or `sha256:HEX` of anything else (a data fingerprint). Checkpoints
                become the parents in the manifest, the role `teacher` its teacher.
            config: the resolved configuration; `out` and the keys named like a role do not count when two runs are compared.
            force: replace a finished checkpoint of other inputs or configuration, or make the same one again. The old one stays complete
                until :meth:`commit`.
            resume: False discards an unfinished state.

        Raises:
            BadInput: the folder is not ours, is an input, is finished or unfinished with other inputs or configuration, is being written
                by another process, or cannot be made.
        """
        out = Path(path).expanduser()
        output = cls(out, stage, dict(inputs), {role: fingerprint(spec) for role, spec in inputs.items()}, config)
        output._refuse_foreign()
        output._look(force, resume)
        if output.up_to_date:
            return output
        try:
            output._lock.take()
            request = output._look(force, resume)  # again: another process may have finished meanwhile
            if not output.up_to_date:
                output._remove_litter()
                output._begin(request, force, resume)
        except OSError as error:
            output._unlock()
            if out_of_space(error):
                raise BadInput(f"{out} cannot be written", "the disk is full", "free some space, or use another --out") from None
            raise BadInput(f"{out} cannot be written", (error.strerror or "unknown reason").lower(), "use another --out") from None
        except BaseException:
            output._unlock()
            raise
        return output

    @property
    def state_dir(self) -> Path:
        """Where a resumable state is kept. `request.json` in it is ours: put states into files or folders beside it."""
        return self.path / STATE

    @property
    def metrics(self) -> Path:
        """The growing metrics file. It lies with the state as long as the folder still holds the checkpoint it will replace."""
        return (self.state_dir if self.beside else self.path) / METRICS

    @property
    def staging(self) -> Path:
        """Sibling folder in which the stage writes its final files; made on first use."""
        assert self.mine
        path = _staging_of(self.path, os.getpid())
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def resumable(self) -> bool:
        """Whether a training state was saved: a folder `step-N` whose `state.json`, written last, is there."""
        return any(self.state_dir.glob("step-*/state.json"))

    def manifest(self, *, family: str, **fields: Any) -> Manifest:
        """A manifest with stage, parents, teacher, inputs, configuration, seed, code and environment filled in.

        Further fields (`origin`, `data`, `cost`, `metrics`, `accounting`, `extra`) are given by name.
        """
        parents = [
            Parent(role=role, path=_relative(resolve(spec), self.path), sha256=self.digests[role])
            for role, spec in self.inputs.items()
            if _is_checkpoint(spec)
        ]
        known: dict[str, Any] = {
            "parents": [parent for parent in parents if parent.role != "teacher"],
            "teacher": next((parent for parent in parents if parent.role == "teacher"), None),
            "seed": int(self.config.get("seed", 0)),
            "code": manifests.code(),
            "environment": dict(manifests.environment()),
            "created": manifests.now(),
        }
        return Manifest(**{"stage": self.stage, "family": family, "inputs": self.digests, "config": self.config, **known, **fields})

    def commit(self, manifest: Manifest) -> Manifest:
        """Hash the staged files, rename them into the folder and write the manifest last. Returns the manifest as written.

        Raises:
            ValueError: nothing was staged, or the manifest holds a number that is not finite.
        """
        staging = self.staging
        if not _names(staging):
            raise ValueError(f"stage {self.stage} staged no files")
        if self.metrics.is_file():
            shutil.copyfile(self.metrics, staging / METRICS)
        for name in _names(staging):
            (staging / name).chmod(_readable())  # the safetensors writer makes files that only their owner can read
            _fsync_file(staging / name)
        files = {name: FileRecord(sha256=sha256(staging / name), bytes=(staging / name).stat().st_size) for name in _names(staging)}
        final = manifest.model_copy(update={"files": files, "created": manifests.now()})
        content = final.dump()
        card = staging / CARD
        card.write_text(model_card(final, self.path.resolve().name, known_data(self.path, final)), encoding="utf-8")
        _fsync_file(card)

        placed = _names(staging)
        self.replaces = sorted({*self.replaces, *placed})
        self._claim()
        (self.path / MANIFEST).unlink(missing_ok=True)
        fsync_dir(self.path)
        for name in placed:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, target)
        for name in set(self.replaces) - set(placed):
            (self.path / name).unlink(missing_ok=True)
        for folder in {(self.path / name).parent for name in placed}:
            fsync_dir(folder)
        write_atomic(self.path / MANIFEST, content)
        shutil.rmtree(staging)
        shutil.rmtree(self.state_dir)
        self._lock.release()
        return Manifest.model_validate_json(content)

    def abandon(self) -> None:
        """Give up: remove the staged files, and every trace of the stage if no training state was saved."""
        if not self.mine:
            return
        shutil.rmtree(_staging_of(self.path, os.getpid()), ignore_errors=True)
        if not self.path.is_dir() or self.up_to_date:
            return
        others = [path for path in self.path.iterdir() if path.name != STATE and path != self.metrics]
        if not self.resumable and ((self.path / MANIFEST).exists() or not others):
            self.metrics.unlink(missing_ok=True)
            shutil.rmtree(self.state_dir, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        """Let others write the folder; remove it where nothing was in it but the lock."""
        self._lock.release()
        with contextlib.suppress(OSError):
            self.state_dir.rmdir()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _look(self, force: bool, resume: bool) -> dict[str, Any] | None:
        """The unfinished stage that is in the folder, if any; sets `up_to_date`."""
        request = read_request(self.state_dir, lenient=force or not resume)
        return self._meet_finished(force, request) if (self.path / MANIFEST).exists() else request

    def _begin(self, request: dict[str, Any] | None, force: bool, resume: bool) -> None:
        """Go on with what `request` describes, or claim the folder anew."""
        if request:
            self.replaces, self.beside = request["replaces"], request["beside"]
            differences = self._differences(request)
            if not resume or (differences and force):
                request = None
            elif differences:
                why = "; ".join(differences[:5])
                raise BadInput(f"{self.path} holds an unfinished stage of other settings", why, "use --force to drop it, or another --out")
        if not request:
            self._discard()
            self._claim()

    def _remove_litter(self) -> None:
        """Remove what a killed process left behind: its staged files and its half-written temporary ones."""
        resolved = self.path.resolve()
        for path in resolved.parent.glob(f".{resolved.name}.staging-*"):
            number = path.name.rpartition("-")[2]
            if number.isdigit() and int(number) != os.getpid() and (self._lock.held or not _alive(int(number))):
                shutil.rmtree(path, ignore_errors=True)
        if self._lock.held:
            for path in resolved.glob(".*.tmp-*"):
                path.unlink(missing_ok=True)

    def _remove_state(self) -> None:
        """Remove the state of a stage that was killed right after it had finished; not that of one that is at work."""
        if not self._lock.held and self.state_dir.is_dir():
            try:
                self._lock.take()
            except (BadInput, OSError):
                return
        self._remove_litter()
        shutil.rmtree(self.state_dir, ignore_errors=True)
        self._lock.release()

    def _refuse_foreign(self) -> None:
        resolved = self.path.resolve()
        if places.BUNDLED in (resolved, *resolved.parents):
            raise BadInput(f"{self.path} cannot be written", "it belongs to the installed package", "use another --out")
        for role, spec in self.inputs.items():
            given = None if spec.startswith("sha256:") else resolve(spec).resolve()
            if given and (given == resolved or given in resolved.parents):
                raise BadInput(f"{self.path} cannot be written", f"it is the {role} this stage reads", "use another --out")
        try:
            if self.path.exists() and not self.path.is_dir():
                raise BadInput(f"{self.path} cannot be written", "it is a file", "use another --out")
            ours = not self.path.exists() or (self.path / MANIFEST).exists() or self.state_dir.is_dir() or not any(self.path.iterdir())
        except OSError as error:
            raise BadInput(f"{self.path} cannot be read", (error.strerror or "unknown reason").lower(), "use another --out") from None
        if not ours:
            raise BadInput(f"{self.path} is not empty", "it holds files that no stage wrote", "use another --out")

    def _key(self) -> dict[str, Any]:
        """What two runs must share to be the same run, as it looks after a round trip through JSON."""
        return json.loads(json.dumps({"stage": self.stage, "inputs": self.digests, "config": self.config}))

    def _differences(self, other: dict[str, Any]) -> list[str]:
        return compare(self._key(), other)

    def _meet_finished(self, force: bool, request: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            old = manifests.read(self.path)
            made = {"stage": old.stage, "inputs": old.inputs, "config": old.config}
            differences, self.differing = self._differences(made), beside(self._key(), made)
            damage = _wrong_sizes(self.path, old)
        except BadInput:
            if not force:
                raise
            old, differences, damage = None, [], ["manifest"]
        if not force:
            if damage:
                raise BadInput(f"{self.path} is damaged", "; ".join(damage[:3]), "use --force to make it again")
            if differences:
                why = "; ".join(differences[:5])
                raise BadInput(
                    f"{self.path} holds a finished checkpoint of other settings", why, "use --force to replace it, or another --out"
                )
            if request is None or not self._differences(request):
                self._remove_state()
            self.up_to_date = True
            return None
        self.replaces = sorted(old.files) if old else []
        self.beside = True
        return request if request and request["beside"] else None

    def _claim(self) -> None:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        content = {**self._key(), "replaces": self.replaces, "beside": self.beside}
        write_atomic(self.state_dir / REQUEST, (json.dumps(content, indent=2) + "\n").encode())

    def _discard(self) -> None:
        shutil.rmtree(_staging_of(self.path, os.getpid()), ignore_errors=True)
        if self.metrics.exists():
            self.metrics.unlink()
        for path in self.state_dir.iterdir() if self.state_dir.is_dir() else ():
            if path.name in (REQUEST, LOCK):
                continue  # replaced by the next claim, so that the folder never stops being ours
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class _Seen(Output):
    """An output that is only looked at."""

    def _remove_state(self) -> None:
        return


def check_place(path: str | Path) -> None:
    """:class:`BadInput` where a folder cannot be written, whatever it is to hold: it has files that no stage wrote, or is a file."""
    _Seen(Path(path).expanduser(), "", {}, {}, {})._refuse_foreign()


def examine(
    path: str | Path,
    *,
    stage: str,
    inputs: dict[str, str],
    config: dict[str, Any],
    force: bool = False,
    resume: bool = True,
    unread: Collection[str] = (),
) -> str:
    """What :meth:`Output.open` would find: `new`, `up to date`, `resumes` or `replaces`. Nothing is written or removed.

    Args:
        unread: roles taken to be what they were when the folder was made, where hashing them would take long.

    Raises:
        BadInput: as :meth:`Output.open`.
    """
    out = Path(path).expanduser()
    given = {role: spec for role, spec in inputs.items() if role not in unread}
    output = _Seen(out, stage, given, {role: fingerprint(spec) for role, spec in given.items()}, config)
    output._refuse_foreign()
    request = read_request(output.state_dir, lenient=force or not resume)
    finished = (out / MANIFEST).exists()
    before = manifests.read(out).inputs if finished and not force else request["inputs"] if request else {}
    output.digests |= {role: before[role] for role in unread if role in before}
    request = output._look(force, resume)
    if output.up_to_date:
        return "up to date"
    differences = output._differences(request) if request and resume else []
    if differences and not force:
        why = "; ".join(differences[:5])
        raise BadInput(f"{out} holds an unfinished stage of other settings", why, "use --force to drop it, or another --out")
    return "resumes" if request and resume and not differences else "replaces" if finished else "new"


def _staging_of(out: Path, pid: int) -> Path:
    resolved = out.resolve()
    return resolved.parent / f".{resolved.name}.staging-{pid}"


def _alive(pid: int) -> bool:
    if os.name == "nt" or pid == os.getpid():
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
