"""What a checkpoint was made from: its chain of parents and teachers, shown and verified from manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from efficientvlm.checkpoints import manifest as manifests
from efficientvlm.checkpoints.files import STATE, locate, resolve, sha256, walk
from efficientvlm.checkpoints.manifest import MANIFEST, DataRecord, Manifest
from efficientvlm.errors import BadInput

CARD = "README.md"

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".msgpack", ".ot", ".gguf")
GRAPHS = (".onnx", ".onnx.data", ".onnx_data", ".ort", ".xml")
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".pth", ".jinja", ".jinja2")
SETTINGS = ("config.json", ".index.json", "tokenizer.json", "tokens.json", "tokens_map.json", "onnx.json", "template.json", "modules.json")
VOCABULARIES = ("vocab.txt", "vocab.json", "vocab.bpe", "merges.txt", "encoder.json", ".model", ".tiktoken", ".spm")


def is_read(name: str) -> bool:
    """Whether some loader reads or runs a file of this name: weights, graphs, configuration, tokenizer, processor, template, code."""
    return name.lower().endswith((*WEIGHTS, *GRAPHS, *CODE, *SETTINGS, *VOCABULARIES))


@dataclass(eq=False)
class Link:
    """One checkpoint's use of another, in a role; `problem` is set where that has changed since, or is not to be had."""

    role: str
    node: Node
    problem: str | None = None


@dataclass(eq=False)
class Node:
    """A checkpoint in a lineage, which is a graph: a folder is one node however often it was used.

    Its manifest, or the reason it could not be read.
    """

    path: Path
    manifest: Manifest | None
    digest: str | None = None
    problem: str | None = None
    parents: list[Link] = field(default_factory=list)

    @property
    def key(self) -> Path:
        """The folder with its links followed: what tells nodes apart."""
        return Path(os.path.realpath(self.path))

    def walk(self) -> Iterator[Node]:
        """This node and all above it, each once, before its parents."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                waiting += [link.node for link in reversed(node.parents)]

    def from_the_first(self) -> list[Node]:
        """This node and all above it, each once, after its parents."""
        order: list[Node] = []
        seen: set[int] = set()
        waiting: list[tuple[Node, bool]] = [(self, False)]
        while waiting:
            node, expanded = waiting.pop()
            if expanded:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                waiting += [(node, True), *((link.node, False) for link in reversed(node.parents))]
        return order

    def problems(self) -> list[str]:
        """What is wrong with this node and with its links to its parents."""
        return [text for text in (self.problem, *(link.problem for link in self.parents)) if text]


def lineage(spec: str | Path) -> Node:
    """A checkpoint with everything it was made from, read from manifests only, each folder once.

    A parent that is gone is a node with a `problem`, one that was changed since is a link with one. Parents of a bundled checkpoint that
    are not there are left out: a chain may end in one.

    Raises:
        BadInput: the folder itself has no readable manifest.
    """
    folder = resolve(spec, checkpoint=True)
    return _ancestors(Node(folder, manifests.read(folder), sha256(folder / MANIFEST)))


def _ancestors(root: Node) -> Node:
    """`root` with everything above it."""
    nodes = {root.key: root}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        for parent in node.manifest.ancestors() if node.manifest else ():
            path = locate(parent, node.path)
            key = Path(os.path.realpath(path))
            if key not in nodes:
                found = _read(path)
                if found is None and node.manifest and node.manifest.origin == "bundled":
                    continue
                nodes[key] = found or Node(path, None, problem=f"parent not found at {path}")
                waiting.append(nodes[key])
            above = nodes[key]
            changed = above.digest is not None and above.digest != parent.sha256
            node.parents.append(Link(parent.role, above, f"{path} has changed since {node.path} was made from it" if changed else None))
    _cut_circles(root)
    return root


def _read(path: Path) -> Node | None:
    """The node of a folder; None if it holds no manifest."""
    try:
        if not os.path.lexists(path / MANIFEST):
            return None
        return Node(path, manifests.read(path), sha256(path / MANIFEST))
    except BadInput as error:
        return Node(path, None, problem=f"{error.what}: {error.why}")


def _cut_circles(root: Node) -> None:
    """Take out the links that lead back to where they come from: a manifest that says so was not written by a stage."""
    open_, done = set(), set()
    waiting: list[tuple[Node, bool]] = [(root, False)]
    while waiting:
        node, expanded = waiting.pop()
        if expanded:
            open_.discard(id(node))
            done.add(id(node))
        elif id(node) not in done and id(node) not in open_:
            open_.add(id(node))
            back = [link for link in node.parents if id(link.node) in open_]
            for link in back:
                node.problem = f"{link.node.path} is its own ancestor"
            node.parents = [link for link in node.parents if link not in back]
            waiting += [(node, True), *((link.node, False) for link in node.parents)]


@dataclass
class Verified:
    """What was found wrong with a checkpoint and its ancestors, what a reader may want to know, and how many checkpoints were looked at."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoints: int = 0


def verify(spec: str | Path, *, hashes: bool = True) -> list[str]:
    """The problems that :func:`examine` finds, none if all is well."""
    return examine(spec, hashes=hashes).problems


def examine(spec: str | Path, *, hashes: bool = True) -> Verified:
    """Hash every file of a checkpoint and of all its ancestors again, and look for files that were added.

    An added file that some loader would read or run is a problem, any other is named in the notes. Without `hashes` manifests are checked,
    and files only for being there in their size.

    Raises:
        BadInput: the folder itself has no readable manifest.
    """
    found = Verified()
    for node in lineage(spec).walk():
        found.problems += node.problems()
        if node.manifest is None:
            continue
        found.checkpoints += 1
        try:
            if node.manifest.digest != manifests.digest(manifests.read_json(node.path / MANIFEST)):
                found.problems.append(f"{node.path / MANIFEST} has changed since it was written")
            _look_at_files(node.path, node.manifest, hashes, found)
        except (BadInput, OSError) as error:
            found.problems.append(f"{node.path} cannot be read: {error}")
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _look_at_files(folder: Path, manifest: Manifest, hashes: bool, found: Verified) -> None:
    for name, record in manifest.files.items():
        path = folder / name
        try:
            if not os.path.lexists(path):
                found.problems.append(f"{path} is missing")
            elif path.stat().st_size != record.bytes or (hashes and sha256(path) != record.sha256):
                found.problems.append(f"{path} has changed since it was written")
        except OSError as error:
            found.problems.append(f"{path} cannot be read: {(error.strerror or 'unknown reason').lower()}")
        except BadInput as error:
            found.problems.append(f"{error.what}: {error.why}")
    if CARD not in manifest.files and not (folder / CARD).is_file():  # older checkpoints have one, and do not list it
        found.problems.append(f"{folder / CARD} is missing")
    known = {*manifest.files, MANIFEST, CARD}
    for place, below, held in walk(folder):
        if place == folder and STATE in below:
            below.remove(STATE)
            found.notes.append(f"{folder / STATE} is there: a stage is at work, or was interrupted")
        for path in (place / name for name in held):
            if path.relative_to(folder).as_posix() in known:
                continue
            if is_read(path.name):
                found.problems.append(f"{path} is not listed in the manifest")
            else:
                found.notes.append(f"{path} was added" + (", a link that is not followed" if path.is_symlink() else ""))


def known_data(folder: Path, manifest: Manifest) -> list[DataRecord]:
    """Data of a stage and of the stages before it, each once; what cannot be read any more is left out."""
    nodes = _ancestors(Node(folder, manifest)).walk()
    records = [record for node in nodes if node.manifest for record in node.manifest.data]
    return list({(record.name, record.split): record for record in records}.values())
