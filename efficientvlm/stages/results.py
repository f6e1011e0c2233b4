"""The JSON file of a stage that measures: what was read is written beside what came out, so that a result is neither mixed up nor lost."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import check_writable, result_path, unwritable, write_atomic
from efficientvlm.checkpoints.folder import fingerprint
from efficientvlm.checkpoints.scratch import sweep
from efficientvlm.errors import BadInput
from efficientvlm.report import shapes
from efficientvlm.settings.base import Strict
from efficientvlm.settings.compose import asides
from efficientvlm.stages.workspace import Job, inputs_of

MACHINE = "machine"
"""Role of the machine that measured. A result of another one stays what it is: it is up to date, and says where it comes from."""


def digests_of(job: Job) -> dict[str, str]:
    """Role → sha256 of what `job` reads."""
    return {role: fingerprint(read) for role, read in inputs_of(job).items()}


@dataclass
class ResultFile:
    """Where a result goes (`path` None: nowhere) and the finished result that lies there already, if it is the same measurement.

    `differing` says in which settings, that do not count, the finished one was measured otherwise.
    """

    path: Path | None
    stage: str
    inputs: dict[str, str]
    config: dict[str, Any]
    finished: dict[str, Any] | None = None
    differing: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, config: Strict, stage: str, inputs: dict[str, str], *, force: bool) -> ResultFile:
        """Claim the file `config.out`, and see that it can be written before anything is measured.

        Args:
            inputs: role → sha256 of what is read. A setting named like a role (`model`, or `models` for `models.0`) does not count when two
                runs are compared: the same checkpoint may be called by two names.
            force: measure again and replace whatever result is there.

        Raises:
            BadInput: the file is no result, a result of other inputs or settings (without `force`), or cannot be written.
        """
        file = cls.examine(config, stage, inputs, force=force)
        if file.path and file.finished:
            sweep(file.path.parent)  # of a process that was killed right after it had written the result
        elif file.path:
            check_writable(file.path)
        return file

    @classmethod
    def examine(cls, config: Strict, stage: str, inputs: dict[str, str], *, force: bool, unread: Collection[str] = ()) -> ResultFile:
        """As :meth:`open`, but no folder is made, and inputs called in `unread` are taken to be what they were."""
        values = config.model_dump(mode="json")
        out = values.pop("out")
        if out is None:
            return cls(None, stage, inputs, values)
        path = result_path(out)
        file = cls(path, stage, dict(inputs), values)
        if os.path.lexists(path):
            earlier = read_result(path, stage)
            there = earlier["provenance"]["inputs"]
            file.inputs |= {role: there[role] for role in unread if role in there}
            file._meet(earlier, force)
        return file

    def _meet(self, earlier: dict[str, Any], force: bool) -> None:
        if force:
            return
        there = earlier["provenance"]
        roles = {role.partition(".")[0] for role in (*self.inputs, *there["inputs"])}
        names = sorted({*self.inputs, *there["inputs"]} - {MACHINE})
        changed = [f"input {name} differs" for name in names if self.inputs.get(name) != there["inputs"].get(name)]
        for name in sorted({*self.config, *there["config"]} - roles):
            if self.config.get(name) != there["config"].get(name):
                text = f"{name}: {there['config'].get(name)} there, {self.config.get(name)} now"
                (self.differing if name in asides(self.stage) else changed).append(text)
        if changed:
            raise BadInput(
                f"{self.path} holds a result of other settings", "; ".join(changed[:5]), "remove it, or use --force or another --out"
            )
        self.finished = earlier

    def write(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result` with its provenance, written as a whole if there is a file to write.

        Raises:
            BadInput: it cannot be written; then it has been printed, so that what was measured is not lost.
        """
        provenance = {
            "inputs": self.inputs,
            "config": self.config,
            "code": manifest.code().model_dump(mode="json"),
            "environment": dict(manifest.environment()),
            "created": manifest.now(),
        }
        whole = {"stage": self.stage, **result, "provenance": provenance}
        if self.path:
            text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, f"{text}\n".encode())
            except OSError as error:
                print(text)
                raise unwritable(self.path, error) from None
        return whole


def read_result(path: Path, stage: str) -> dict[str, Any]:
    """The result in a file.

    Raises:
        BadInput: there is none, it is damaged, or it was not written by `stage`.
    """
    if not os.path.lexists(path):
        raise BadInput(f"there is no result {path}", "the stage that writes it has not finished", f"run evlm {stage} --out {path}")
    values = manifest.read_json(path)
    provenance = values.get("provenance") if isinstance(values, dict) else None
    known = isinstance(provenance, dict) and all(isinstance(provenance.get(key), dict) for key in ("inputs", "config"))
    if not known or values.get("stage") != stage:
        raise BadInput(f"{path} is no result of evlm {stage}", "it was written by something else", "give another file")
    if not shapes.fits(values, shapes.RESULTS[stage]):
        why = "it is not what this stage writes: it was changed since, or by another version"
        raise BadInput(f"{path} is damaged", why, f"run evlm {stage} --force --out {path} again")
    return values
