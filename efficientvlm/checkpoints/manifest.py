"""The manifest of a checkpoint folder: what it is, what it was made from, and a hash of every file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from efficientvlm.checkpoints.files import MANIFEST as MANIFEST
from efficientvlm.checkpoints.files import MIB, STATE, read_limited, unreadable
from efficientvlm.errors import BadInput, shorten
from efficientvlm.settings.base import check_plain

SCHEMA_VERSION = 1
LARGEST_JSON = 64 * MIB
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers", "torch-pruning", "numpy", "pillow")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Group = Annotated[str, Field(pattern=r"^[^.]+\.\d{1,4}\.[^.]+$")]


def inside(name: str) -> str:
    """`name` if it can only be a file inside the folder it is used in, else a ValueError."""
    path = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or path.is_absolute() or ".." in path.parts or str(path) != name:
        raise ValueError("not the name of a file inside the folder")
    return name


FileName = Annotated[str, AfterValidator(inside)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Parent(Record):
    role: str = Field(description="option the checkpoint was given as: model, teacher, ...")
    path: str = Field(description="relative to this folder where possible, or bundled:NAME", pattern=r"^[^\x00]+$")
    sha256: Sha256 = Field(description="of the parent's manifest")


class DataRecord(Record):
    name: str
    split: str
    count: Count = Field(description="images read")
    fingerprint: str = Field(description="hex digest of what the source would give")
    licence: str
    skipped: Count = Field(0, description="samples that could not be used")
    read_as: list[str] = Field(default_factory=list, description="columns taken, and how the data was read where that was a guess")


class FileRecord(Record):
    sha256: Sha256
    bytes: Count


class Code(Record):
    version: str
    commit: str | None = Field(None, description="only when the package runs from its own git checkout")
    dirty: bool | None = None


class Cost(Record):
    seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    samples: Count = 0
    peak_memory_bytes: Count | None = Field(None, description="largest resident size of the process")


class Change(Record):
    """Something that changed while a run was stopped, and that does not decide what is learnt."""

    step: Count = Field(description="training steps done when it changed")
    what: str = Field(description="a setting, or of the machine: device, processor, threads, processes, torch")
    before: Any
    now: Any
    same_bits: bool = Field(description="whether the weights are those of a run without the change, to the bit; else up to rounding")


class Counted(BaseModel):
    """Counts of a model; each may be absent, and there may be others."""

    model_config = ConfigDict(strict=True, protected_namespaces=(), allow_inf_nan=False)


class Parameters(Counted):
    total: int | None = None
    without_embeddings: int | None = None
    by_tower: dict[str, int] | None = None


class Macs(Counted):
    total: Count | None = None
    image_size: Count | None = None
    text_length: Count | None = None


class Kept(Counted):
    kept: Count
    of: Count


class Sparsity(Counted):
    achieved: float | None = None


class Accounting(Counted):
    parameters: Parameters | None = None
    macs: Macs | None = None
    units: dict[Group, Kept] | None = None
    sparsity: Sparsity | None = None


def counted(values: dict[str, Any]) -> dict[str, Any]:
    """`values` if what they hold of :class:`Accounting` is of its form, else a ValidationError."""
    Accounting.model_validate(values)
    return values


class Manifest(Record):
    """Contents of `evlm_manifest.json`. It is written last: a folder that holds one is complete."""

    schema_version: Literal[1] = 1
    stage: str
    family: str
    parents: list[Parent] = Field(default_factory=list)
    origin: Literal["imported", "random", "bundled"] | None = Field(None, description="where a chain begins")
    teacher: Parent | None = None
    inputs: dict[str, str] = Field(default_factory=dict, description="role → sha256 of everything that was read")
    config: dict[str, Any] = Field(default_factory=dict, description="resolved configuration of the stage")
    seed: int = 0
    data: list[DataRecord] = Field(default_factory=list)
    code: Code
    environment: dict[str, str] = Field(default_factory=dict)
    files: dict[FileName, FileRecord] = Field(default_factory=dict, description="every file but this one")
    cost: Cost = Field(default_factory=Cost)
    changes: list[Change] = Field(default_factory=list, description="what changed while the run was stopped")
    metrics: dict[str, Any] = Field(default_factory=dict)
    accounting: Annotated[dict[str, Any], AfterValidator(counted)] = Field(
        default_factory=dict, description="parameters, macs, units, sparsity"
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="what only this stage knows: layers, budget, ...")
    created: str = Field(description="UTC, ISO 8601")
    digest: Sha256 | None = Field(None, description="of this manifest without this key, as canonical JSON; shows damage, not forgery")

    def ancestors(self) -> list[Parent]:
        """Parents and the teacher, each role once."""
        return self.parents + ([self.teacher] if self.teacher else [])

    def noted(self, name: str, kind: Any, default: Any) -> Any:
        """What the stage that made it noted as `name`, a setting or (of what was exported) an extra; `default` where it noted nothing.

        Raises:
            BadInput: what is there is no `kind`.
        """
        value = self.config.get(name)
        if (value := self.extra.get(name) if value is None else value) is None:
            return default
        try:
            return TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            why = f"{name}: {error.errors()[0]['msg'].lower()}"
            raise BadInput(f"the manifest of a model for {self.stage} is damaged", why, "restore it, or make the folder again") from None

    def dump(self) -> bytes:
        """UTF-8 JSON with a final newline, the digest made anew.

        Raises:
            ValueError: a number is not finite; JSON has none such.
        """
        values = self.model_dump()
        values["digest"] = digest(values)
        return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def digest(values: dict[str, Any]) -> str:
    """Hex digest of a manifest's values, its own digest left out."""
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """JSON schema of the manifest, as published in docs/manifest.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}


def read_json(path: Path) -> Any:
    """Parsed JSON of a file.

    Raises:
        BadInput: missing, unreadable, larger than 64 MiB, not UTF-8, not JSON, nested too deeply, or with NaN or infinite numbers.
    """
    content = read_limited(path, LARGEST_JSON, "a manifest, configuration or result")
    try:
        return parse_json(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadInput(f"{path} is damaged", "it is not UTF-8 text", "restore it, or make the folder again") from None
    except RecursionError:
        raise BadInput(f"{path} is damaged", "it is nested too deeply", "restore it, or make the folder again") from None
    except ValueError as error:
        raise BadInput(f"{path} is damaged", f"it is not valid JSON ({error})", "restore it, or make the folder again") from None


def parse_json(text: str) -> Any:
    """JSON in which every number is finite: neither `NaN` and `Infinity`, which are no JSON, nor `1e999`, which nothing can hold.

    Raises:
        ValueError: saying what is wrong.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_no_number, parse_float=_finite)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shorten(text, 40)} is too large a number")
    return number


def read(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        BadInput: there is none (yet), it is damaged, or a newer version of this package wrote it.
    """
    path = folder / MANIFEST
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        if (folder / STATE).is_dir():
            raise BadInput(
                f"{folder} is not finished", "the stage that writes it was interrupted, or is at work", "run its command again; it resumes"
            ) from None
        raise BadInput(
            f"{folder} is not a finished checkpoint", f"it holds no {MANIFEST}", "finish the stage that writes it, or use evlm import"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    values = read_json(path)
    if not isinstance(values, dict):
        raise BadInput(f"{path} is damaged", "it holds no JSON object", "restore it, or make the folder again")
    version = values.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise BadInput(f"{path} has schema version {version}", f"this program reads version {SCHEMA_VERSION}", "upgrade efficientvlm")
    try:
        check_plain(values)
    except ValueError as error:
        raise BadInput(f"{path} is not a manifest", str(error), "restore it, or make the folder again") from None
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].lower()}" for item in error.errors()]
        more = f" (and {len(problems) - 5} more)" * (len(problems) > 5)
        raise BadInput(f"{path} is not a manifest", "; ".join(problems[:5]) + more, "restore it, or make the folder again") from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def code() -> Code:
    """Version of this package, and the git commit when it runs from its own checkout."""
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("efficientvlm")
    except PackageNotFoundError:
        release = "unknown"
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").is_file():
        return Code(version=release)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--verify", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results") if commit else None
    return Code(version=release, commit=commit, dirty=None if changes is None else bool(changes))


@cache
def environment() -> dict[str, str]:
    """Versions of what computes, read from package metadata so that nothing heavy is imported."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count() or 0)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
