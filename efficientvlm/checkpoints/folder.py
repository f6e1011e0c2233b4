"""Checkpoint folders: found, checked, and written so that a crash never leaves a half-made one (what they come from: lineage.py).

While a stage runs its folder holds `training_state/request.json`, which says what is being made and marks the folder as ours (who owns
what: ownership.py). Finished files are gathered in `training_state` and renamed into place; the manifest comes last. At every instant the
folder is therefore the old checkpoint, an unfinished one that the same command completes, or the new checkpoint. `training_state/lock`
keeps a second writer out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints import manifest as manifests
from efficientvlm.checkpoints import ownership
from efficientvlm.checkpoints.card import model_card
from efficientvlm.checkpoints.files import (
    STATE,
    expanded,
    files_below,
    fsync_dir,
    make_folders,
    resolve,
    sha256,
    shown,
    unreadable,
    unwritable,
    write_new,
)
from efficientvlm.checkpoints.lineage import CARD, is_read, known_data
from efficientvlm.checkpoints.lock import Lock
from efficientvlm.checkpoints.manifest import MANIFEST, FileRecord, Manifest, Parent
from efficientvlm.checkpoints.ownership import LOCK, MARK, METRICS
from efficientvlm.checkpoints.request import REQUEST, beside, compare, read_request, write_request
from efficientvlm.checkpoints.scratch import sweep
from efficientvlm.errors import BadInput

STAGING = "staging-"


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def require_complete(spec: str | Path) -> Manifest:
    """The manifest of a finished checkpoint whose files are all there with their recorded sizes (no hashing, see :func:`verify`).

    Raises:
        BadInput: the stage that writes it has not finished, or files are missing or of another size.
    """
    folder = resolve(spec, checkpoint=True)
    try:
        manifest = manifests.read(folder)
        problems = _wrong_sizes(folder, manifest)
    except OSError as error:
        raise unreadable(folder, error) from None
    if problems:
        raise BadInput(f"{folder} is damaged", "; ".join(problems[:3]), "restore the files, or run its stage again with --force")
    return manifest


def _wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        if name == CARD:
            continue  # people may write into it: no model depends on it
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
    if not path.is_dir():
        return sha256(path)
    try:
        if (path / MANIFEST).is_file():
            return sha256(path / MANIFEST)
        os.listdir(path)
        digest = hashlib.sha256()
        for file in files_below(path):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise unreadable(path, error) from None
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
    return sorted(path.relative_to(folder).as_posix() for path in files_below(folder))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
    cards: list[str] = field(default_factory=list)  # digests of the model cards that a stage wrote here

    def __post_init__(self) -> None:
        self._lock = Lock(self.state_dir / LOCK)
        self._made: list[Path] = []

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
        try:
            out = expanded(path)
            ownership.require_ours(out)
            ownership.refuse_text(out, inputs, config)
            ownership.refuse_inputs_inside(out, inputs, config)
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(f"{str(path)!r} cannot be written", str(error).lower(), "use another --out") from None
        output = cls(out, stage, dict(inputs), {role: fingerprint(spec) for role, spec in inputs.items()}, config)
        try:
            request = output._look(force)
            if output.up_to_date:
                return output
            output._refuse_others(request["replaces"] if request else [])
            output._take_lock()
            request = output._look(force)  # again: another process may have finished meanwhile
            if output.up_to_date:
                output._unlock()
            else:
                output._begin(request, force, resume)
        except OSError as error:
            output._unlock()
            raise unwritable(out, error) from None
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
        """Folder in which the stage writes its final files; made on first use."""
        return self.working(f"{STAGING}{os.getpid()}")

    def working(self, name: str) -> Path:
        """A folder beside the state for files under way, which go with it; made on first use."""
        assert self.mine
        path = self.state_dir / name
        path.mkdir(exist_ok=True)
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
        final = manifest.model_copy(update={"created": manifests.now()})
        (staging / CARD).write_text(model_card(final, self.path.resolve().name, known_data(self.path, final)), encoding="utf-8")
        placed = _names(staging)
        for name in placed:
            (staging / name).chmod(_readable())  # the safetensors writer makes files that only their owner can read
            _fsync_file(staging / name)
        files = {name: FileRecord(sha256=sha256(staging / name), bytes=(staging / name).stat().st_size) for name in placed}
        content = final.model_copy(update={"files": files}).dump()
        write_new(staging / MANIFEST, content)
        self._look_at_targets(placed)
        self._keep_card()

        self.replaces = sorted({*self.replaces, *placed})
        self.cards = [*self.cards, files[CARD].sha256]
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
        os.replace(staging / MANIFEST, self.path / MANIFEST)
        fsync_dir(self.path)
        self._drop_state()
        self._lock.release()
        return Manifest.model_validate_json(content)

    def _look_at_targets(self, placed: Collection[str]) -> None:
        """Refuse before anything is replaced what would be lost: files that no stage wrote, and whatever lies behind a link."""
        ownership.refuse_links(self.path, [*placed, *self.replaces])
        own = {*self.replaces, CARD, *([] if self.beside else [METRICS])}
        if others := [name for name in placed if name not in own and os.path.lexists(self.path / name)]:
            why = f"no stage wrote {', '.join(others[:3])}, which would be replaced"
            raise BadInput(f"{self.path} holds files of others", why, "move them away and run the same command again")

    def _keep_card(self) -> None:
        """Keep a model card that a person has changed beside the new one."""
        card = self.path / CARD
        if not os.path.lexists(card) or sha256(card) in self.cards:
            return
        number = 1
        while os.path.lexists(old := self.path / (f"{CARD}.old" if number == 1 else f"{CARD}.old-{number}")):
            if old.is_file() and not old.is_symlink() and sha256(old) == sha256(card):
                return
            number += 1
        copied = self.working(f"{STAGING}{os.getpid()}-card") / CARD
        shutil.copyfile(card, copied)
        _fsync_file(copied)
        os.rename(copied, old)
        print(f"{self.path}: {CARD} is not as a stage wrote it; it is kept as {old.name}", file=sys.stderr)

    def abandon(self) -> None:
        """Give up: remove the staged files, and every trace of the stage if no training state was saved."""
        if not self.mine or self.up_to_date:
            return
        if self.state_dir.is_dir():
            self._remove_staged(f"{STAGING}{os.getpid()}")
            others = [path for path in self.path.iterdir() if path.name != STATE and path != self.metrics]
            if not self.resumable and ((self.path / MANIFEST).exists() or not others):
                self.metrics.unlink(missing_ok=True)
                self._drop_state()
        self._unlock()

    def _refuse_others(self, replaces: list[str]) -> None:
        """Look at what would be written, locked and removed before any of it is touched."""
        if os.path.lexists(self.state_dir) and self.state_dir.parent.is_dir() and not ownership.owns_state(self.path):
            raise BadInput(
                f"{self.state_dir} holds what no stage wrote", "a stage keeps its state there", "move it away, or use another --out"
            )
        ownership.refuse_links(self.path, [*self.replaces, *replaces])

    def _take_lock(self) -> None:
        while True:
            made = make_folders(self.state_dir, 0o700)
            self._made += [folder for folder in made if folder not in self._made]
            try:
                self._lock.take()
                return
            except FileNotFoundError:  # the holder has just finished and removed the folder
                continue

    def _unlock(self) -> None:
        """Let others write the folder; remove what was made for this stage where nothing is in it."""
        self._lock.release()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _look(self, force: bool) -> dict[str, Any] | None:
        """The unfinished stage that is in the folder, if any; sets `up_to_date`."""
        request = read_request(self.state_dir / REQUEST)
        return self._meet_finished(force, request) if os.path.lexists(self.path / MANIFEST) else request

    def _begin(self, request: dict[str, Any] | None, force: bool, resume: bool) -> None:
        """Go on with what `request` describes, or claim the folder anew."""
        finished = os.path.lexists(self.path / MANIFEST)
        if request:
            differences = self._differences(request)
            self.replaces, self.beside, self.cards = request["replaces"], request["beside"], request["cards"]
            self._made += [self.path] * (request["made"] and self.path not in self._made)
            if not resume or (differences and force):
                request = None
            elif differences:
                why = "; ".join(differences[:5])
                raise BadInput(f"{self.path} holds an unfinished stage of other settings", why, "use --force to drop it, or another --out")
        ownership.refuse_links(self.path, self.replaces)
        self._refuse_added(finished)
        sweep(self.path)
        if self._lock.held:
            self._remove_staged()
        if os.path.lexists(self.path / MARK):
            self._discard()
            (self.path / MARK).unlink()
        if not request:
            self._discard()
            self._claim()

    def _refuse_added(self, finished: bool) -> None:
        """Refuse at once what would be refused at the end: files that a model is opened with, in a folder that would then be ours."""
        known = {*self.replaces, MANIFEST, CARD, MARK, *([] if finished else [METRICS])}
        names = [path.name for path in self.path.iterdir() if path.name not in known and path.name != STATE]
        if added := sorted(name for name in names if name == METRICS or is_read(name)):
            raise BadInput(f"{self.path} holds files that no stage wrote", ", ".join(added[:5]), "move them away, or use another --out")

    def _remove_staged(self, prefix: str = STAGING) -> None:
        """Remove what a killed process, or this one, has staged."""
        for path in self.state_dir.iterdir():
            if path.name.startswith(prefix):
                _remove(path)

    def _drop_state(self) -> None:
        """Remove the unfinished stage. Its request goes first, to where it tells the next command that the rest is to be removed."""
        if os.path.lexists(self.state_dir / REQUEST):
            os.replace(self.state_dir / REQUEST, self.path / MARK)
            fsync_dir(self.path)
        shutil.rmtree(self.state_dir)
        (self.path / MARK).unlink(missing_ok=True)

    def _remove_left_over(self) -> None:
        """Remove the state of a stage that was killed right after it had finished; not that of one that is at work."""
        if not os.path.lexists(self.state_dir):
            (self.path / MARK).unlink(missing_ok=True)
            return
        if not ownership.owns_state(self.path):
            return
        try:
            ownership.refuse_links(self.path, ())
            self._lock.take()
            self._drop_state()
        except (BadInput, OSError):
            return
        finally:
            self._lock.release()

    def _key(self) -> dict[str, Any]:
        """What two runs must share to be the same run, as it looks after a round trip through JSON."""
        return json.loads(json.dumps({"stage": self.stage, "inputs": self.digests, "config": self.config}))

    def _differences(self, other: dict[str, Any]) -> list[str]:
        return compare(self._key(), other)

    def _meet_finished(self, force: bool, request: dict[str, Any] | None) -> dict[str, Any] | None:
        old = manifests.read(self.path)
        made = {"stage": old.stage, "inputs": old.inputs, "config": old.config}
        differences, self.differing = self._differences(made), beside(self._key(), made)
        if not force:
            if damage := _wrong_sizes(self.path, old):
                raise BadInput(f"{self.path} is damaged", "; ".join(damage[:3]), "use --force to make it again")
            if differences:
                why = "; ".join(differences[:5])
                raise BadInput(
                    f"{self.path} holds a finished checkpoint of other settings", why, "use --force to replace it, or another --out"
                )
            if request is None or not self._differences(request):
                self._remove_left_over()
            self.up_to_date = True
            return None
        self.replaces = sorted(old.files)
        self.cards = [old.files[CARD].sha256] if CARD in old.files else []
        self.beside = True
        return request if request and request["beside"] else None

    def _claim(self) -> None:
        made = self.path in self._made
        request = {**self._key(), "replaces": self.replaces, "beside": self.beside, "made": made, "cards": self.cards}
        write_request(self.state_dir, request)

    def _discard(self) -> None:
        """Remove state and metrics, not the request: the next claim replaces it, so that the folder never stops being ours."""
        if os.path.lexists(self.metrics):
            self.metrics.unlink()
        for path in self.state_dir.iterdir():
            if path.name not in (REQUEST, LOCK):
                _remove(path)


class _Seen(Output):
    """An output that is only looked at."""

    def _remove_left_over(self) -> None:
        return


def check_place(path: str | Path) -> None:
    """:class:`BadInput` where a folder cannot be written, whatever it is to hold: it has files that no stage wrote, or is a file."""
    ownership.require_ours(expanded(path))


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
    out = expanded(path)
    given = {role: spec for role, spec in inputs.items() if role not in unread}
    output = _Seen(out, stage, given, {role: fingerprint(spec) for role, spec in given.items()}, config)
    ownership.require_ours(out)
    ownership.refuse_text(out, inputs, config)
    ownership.refuse_inputs_inside(out, inputs, config)
    request = read_request(output.state_dir / REQUEST)
    finished = os.path.lexists(out / MANIFEST)
    before = manifests.read(out).inputs if finished and not force else request["inputs"] if request else {}
    output.digests |= {role: before[role] for role in unread if role in before}
    request = output._look(force)
    if output.up_to_date:
        return "up to date"
    differences = output._differences(request) if request and resume else []
    if differences and not force:
        why = "; ".join(differences[:5])
        raise BadInput(f"{out} holds an unfinished stage of other settings", why, "use --force to drop it, or another --out")
    return "resumes" if request and resume and not differences else "replaces" if finished else "new"
