"""What a checkpoint was made from: its chain of parents and teachers, shown and verified from manifests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from efficientvlm import manifest as manifests
from efficientvlm.errors import BadInput
from efficientvlm.files import locate, resolve, sha256
from efficientvlm.manifest import MANIFEST, DataRecord, Manifest

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".msgpack", ".ot", ".gguf")
GRAPHS = (".onnx", ".onnx.data", ".onnx_data", ".ort", ".xml")
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".pth", ".jinja", ".jinja2")
SETTINGS = ("config.json", ".index.json", "tokenizer.json", "tokens.json", "tokens_map.json", "onnx.json", "template.json", "modules.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "vocab.bpe", "merges.txt", "encoder.json", ".model", ".tiktoken", ".spm")


def is_read(name: str) -> bool:
    """Whether some loader reads or runs a file of this name: weights, graphs, configuration, tokenizer, processor, template, code."""
    return name.lower().endswith((*WEIGHTS, *GRAPHS, *CODE, *SETTINGS, *VOCABULARIES))


@dataclass
class Node:
    """A checkpoint in a lineage: its manifest, or the reason it could not be read."""

    role: str
    path: Path
    manifest: Manifest | None
    problem: str | None = None
    parents: list[Node] = field(default_factory=list)

    def walk(self) -> Iterable[Node]:
        """This node and all above it."""
        yield self
        for parent in self.parents:
            yield from parent.walk()


def lineage(spec: str | Path) -> Node:
    """A checkpoint with everything it was made from, read from manifests only.

    A parent that is gone or was changed since is a node with a `problem`. Parents of a bundled checkpoint that are not there are left out:
    a chain may end in one.

    Raises:
        BadInput: the folder itself has no readable manifest.
    """
    folder = resolve(spec, checkpoint=True)
    return _node("", folder, manifests.read(folder), None, (sha256(folder / MANIFEST),))


def _node(role: str, folder: Path, manifest: Manifest, problem: str | None, above: tuple[str, ...]) -> Node:
    node = Node(role, folder, manifest, problem)
    for parent in manifest.ancestors():
        path = locate(parent, folder)
        if not (path / MANIFEST).is_file():
            if manifest.origin != "bundled":
                node.parents.append(Node(parent.role, path, None, f"parent not found at {path}"))
            continue
        digest = sha256(path / MANIFEST)
        if digest in above:
            node.parents.append(Node(parent.role, path, None, f"{path} is its own ancestor"))
            continue
        changed = None if digest == parent.sha256 else f"{path} has changed since {folder} was made from it"
        try:
            node.parents.append(_node(parent.role, path, manifests.read(path), changed, (*above, digest)))
        except BadInput as error:
            node.parents.append(Node(parent.role, path, None, str(error)))
    return node


def verify(spec: str | Path, *, hashes: bool = True) -> list[str]:
    """Re-hash every file of a checkpoint and of all its ancestors; the problems found, none if all is well.

    Without `hashes` manifests are checked, and files only for being there in their size.

    Raises:
        BadInput: the folder itself has no readable manifest.
    """
    problems: list[str] = []
    seen: set[Path] = set()
    for node in lineage(spec).walk():
        if node.problem and node.problem not in problems:
            problems.append(node.problem)
        if node.manifest is None or node.path.resolve() in seen:
            continue
        seen.add(node.path.resolve())
        if node.manifest.digest != manifests.digest(manifests.read_json(node.path / MANIFEST)):
            problems.append(f"{node.path / MANIFEST} has changed since it was written")
        problems += _changed_files(node.path, node.manifest, hashes)
    return problems


def _changed_files(folder: Path, manifest: Manifest, hashes: bool) -> list[str]:
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != record.bytes or (hashes and sha256(path) != record.sha256):
            problems.append(f"{path} has changed since it was written")
    for path in sorted(folder.iterdir()):
        if is_read(path.name) and path.name not in manifest.files:
            problems.append(f"{path} is not listed in the manifest")
    return problems


def known_data(folder: Path, manifest: Manifest) -> list[DataRecord]:
    """Data of a stage and of the stages before it, each once; what cannot be read any more is left out."""
    records = [record for node in _node("", folder, manifest, None, ()).walk() if node.manifest for record in node.manifest.data]
    return list({(record.name, record.split): record for record in records}.values())
