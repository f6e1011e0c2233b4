"""The HTML report of a checkpoint with its ancestors, or of a folder of checkpoints and results, read from files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficientvlm import families
from efficientvlm.checkpoints import influence, lineage, manifest
from efficientvlm.checkpoints.files import (
    STATE,
    check_writable,
    open_plain,
    resolve,
    result_path,
    shown,
    unreadable,
    unwritable,
    write_atomic,
)
from efficientvlm.checkpoints.folder import METRICS
from efficientvlm.checkpoints.lineage import Node
from efficientvlm.checkpoints.manifest import MANIFEST, Manifest
from efficientvlm.compression.reach import of_config
from efficientvlm.errors import BadInput, number_of
from efficientvlm.report import shapes
from efficientvlm.report import summary as report
from efficientvlm.report.document import is_ours, page
from efficientvlm.report.metrics import main_metric
from efficientvlm.report.picture import Structure
from efficientvlm.report.story import DAMAGE, NOTE, Chapter, Measurement, Problem, Story, unique

LARGEST_RESULT = 50_000_000  # bytes
LARGEST_NUMBER = 1e30
LONGEST_LINE = 100_000  # bytes of a line of metrics


def run(folder: str, out: str | None = None, *, hashes: bool = False, force: bool = False) -> dict[str, Any]:
    """Write one HTML file about `folder`; by default `report-NAME.html` in the working directory.

    Args:
        folder: a checkpoint (told with all its ancestors), or a folder that holds checkpoints and results of eval and bench.
        hashes: compare the content of every file with its manifest too.
        force: replace whatever file is there.

    Raises:
        BadInput: neither a checkpoint nor a folder with checkpoints, or a file that cannot be written.
    """
    path = resolve(folder, checkpoint=True)
    target = claim(out or f"report-{path.resolve().name}.html", force)
    story = tell_folder(path, hashes=hashes)
    write(target, story)
    found = {kind: [problem.text for problem in story.problems if problem.kind == kind] for kind in (DAMAGE, NOTE)}
    checkpoints = [{"label": chapter.label, "path": chapter.place} for chapter in story.chapters]
    unverified = [problem.text for problem in story.problems if problem.unverified]
    described = {"problems": found[DAMAGE], "unverified": unverified, "notes": found[NOTE], "hashed": hashes}
    return {"path": str(target), "checkpoints": checkpoints, **described}


def write(target: Path, story: Story) -> None:
    """The page of a story, as a whole or not at all; :class:`BadInput` if it cannot be written."""
    try:
        write_atomic(target, page(story).encode("utf-8", "replace"))
    except OSError as error:
        raise unwritable(target, error) from None


def claim(out: str, force: bool) -> Path:
    """The file to write; :class:`BadInput` if it cannot be, or (without `force`) if something else than a report is there.

    What is no regular file is never replaced: a folder, a link, a device.
    """
    target = result_path(out, "report.html")
    if not target.parent.is_dir():
        raise BadInput(f"{target} cannot be written", f"there is no folder {target.parent}", "make the folder first")
    if os.path.lexists(target) and not force:
        with open_plain(target) as file:
            if not is_ours(file.read(4096).decode("utf-8", "replace")):
                raise BadInput(f"{target} exists already", "it is no report of this program", "use --force or another --out")
    check_writable(target)
    return target


def tell_folder(path: Path, *, hashes: bool = False) -> Story:
    """The story of a checkpoint folder or of a folder of checkpoints.

    Raises:
        BadInput: it is neither, or the checkpoint has no readable manifest.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is no folder", "a report is made of a checkpoint or of a folder of checkpoints", "give such a folder")
    title, place, created = path.resolve().name, shown(path), manifest.now()
    try:
        children = sorted(path.iterdir())
        if path / MANIFEST in children:
            chapters, problems = tell([path], hashes=hashes)
            return story_of(title, place, created, chapters, [], problems, hashes)
        folders = [child for child in children if (child / MANIFEST).is_file()]
        files = [child for child in children if child.suffix == ".json" and child.is_file()]
        begun = [child.name for child in children if (child / STATE).is_dir() and child not in folders]
    except OSError as error:
        raise unreadable(path, error) from None
    if not folders:
        raise BadInput(
            f"{path} holds no finished checkpoint",
            f"neither it nor a folder in it has {MANIFEST}",
            "give the folder that a stage or recipe wrote",
        )
    unfinished = [Problem(NOTE, f"{name} is unfinished: the command that began it resumes it") for name in begun]
    measurements, unread = read_measurements(files)
    chapters, problems = tell(folders, hashes=hashes)
    return story_of(title, place, created, chapters, measurements, [*problems, *unfinished, *unread], hashes)


def tell(roots: Sequence[Path], labels: Mapping[Path, str] | None = None, *, hashes: bool = False) -> tuple[list[Chapter], list[Problem]]:
    """Checkpoints and all their ancestors, parents first, the latest root last; and what is wrong with them.

    A root whose manifest cannot be read is a problem, unless it is the only one.

    Args:
        labels: what to call some of the folders (resolved paths) instead of their names.
    """
    nodes, problems = [], []
    for root in roots:
        try:
            nodes.append(lineage.lineage(root))
        except BadInput as error:
            if len(roots) == 1:
                raise
            problems.append(Problem(DAMAGE, here(f"{error.what}: {error.why}")))
    above = {parent.key for node in nodes for parent in node.walk() if parent is not node}
    for node in nodes:
        if node.key not in above:  # whose check covers all its ancestors
            problems += [Problem(DAMAGE, here(text), unverified=True) for text in lineage.verify(node.path, hashes=hashes)]
    nodes.sort(key=lambda node: (node.key not in above, node.manifest.created if node.manifest else ""))
    found: dict[Path, Chapter] = {}
    for node in nodes:
        _add(node, found)
    name_all(list(found.values()), labels or {})
    for chapter in found.values():
        if chapter.manifest:
            chapter.manifest, unsound = sound(chapter.label, chapter.manifest)
            problems += [*unsound, *_read_more(chapter, chapter.manifest)]
    if changed := [chapter.label for chapter in found.values() if chapter.manifest and chapter.manifest.code.dirty]:
        problems.append(Problem(NOTE, f"made by code with local changes, which its commit does not show: {', '.join(changed)}"))
    return list(found.values()), problems


def _add(root: Node, found: dict[Path, Chapter]) -> None:
    """The chapters of a checkpoint and its ancestors, parents first."""
    for node in root.from_the_first():
        chapter = found.get(node.key)
        if chapter is None:
            parents = list(dict.fromkeys((link.role, link.node.key) for link in node.parents))
            chapter = found[node.key] = Chapter(node.key, "", shown(node.path), node.manifest, node.digest, parents=parents)
        if node.problem:
            chapter.problem = chapter.problem or here(node.problem)
        for link in node.parents:
            if link.problem:
                found[link.node.key].problem = found[link.node.key].problem or here(link.problem)


def here(text: str) -> str:
    """A message with paths as they are written in the working directory."""
    return text.replace(f"{Path.cwd()}{os.sep}", "")


def name_all(chapters: Sequence[Chapter], labels: Mapping[Path, str]) -> None:
    """Short labels, no two alike."""
    taken = set(labels.values())
    for chapter in chapters:
        if chapter.key in labels:
            chapter.label = labels[chapter.key]
            continue
        wanted = chapter.place if chapter.place.startswith("bundled:") else chapter.key.name
        if wanted in taken:
            wanted = f"{chapter.key.parent.name}/{chapter.key.name}"
        number, label = 2, wanted
        while label in taken:
            number, label = number + 1, f"{wanted} ({number})"
        chapter.label = label
        taken.add(label)


def sound(label: str, recorded: Manifest) -> tuple[Manifest, list[Problem]]:
    """The manifest without an accounting or extras that a page could not draw."""
    problems = []
    if not shapes.fits(recorded.accounting, shapes.Accounting):
        recorded = recorded.model_copy(update={"accounting": {}})
        problems.append(Problem(DAMAGE, f"{label}: its manifest does not hold the counts of a model; it is left out of the figures"))
    if not shapes.fits(recorded.extra, shapes.Extra):
        recorded = recorded.model_copy(update={"extra": {}})
        problems.append(Problem(DAMAGE, f"{label}: the budget or the layers in its manifest cannot be read"))
    return recorded, problems


def _read_more(chapter: Chapter, recorded: Manifest) -> list[Problem]:
    """Structure and metrics of a checkpoint, and what a reader ought to know about it."""
    problems = []
    try:
        chapter.structure = structure_of(chapter.key)
        chapter.reach = reach_of(chapter.key)
    except BadInput as error:
        problems.append(Problem(DAMAGE, here(f"{chapter.label}: which heads it kept cannot be read: {error.what}, {error.why}")))
    chapter.lines, broken = read_lines(chapter.key / METRICS)
    if broken:
        problems.append(Problem(DAMAGE, f"{chapter.label}: {broken} line{'s' * (broken > 1)} of {METRICS} cannot be read"))
    quirks = recorded.config.get("quirks")
    switched = [name for name, on in quirks.items() if on is True] if isinstance(quirks, dict) else []
    if switched:
        problems.append(Problem(NOTE, f"{chapter.label}: behaviours of the published release were switched on: {', '.join(switched)}"))
    for record in recorded.data:
        if record.skipped:
            problems.append(
                Problem(
                    NOTE, f"{chapter.label}: skipped, as of no use: {number_of(record.skipped, 'sample')} of {record.name} {record.split}"
                )
            )
    return problems


def read_lines(path: Path) -> tuple[list[dict[str, float]], int]:
    """Numbers of a metrics file by name, in order of the steps, and how many lines are not what they should be."""
    lines: list[dict[str, float]] = []
    broken = 0
    if not path.is_file():
        return [], 0
    with open_plain(path) as file:
        while text := file.readline(LONGEST_LINE):
            try:
                values = json.loads(text)
                line = {name: float(value) for name, value in values.items() if type(value) in (int, float) and abs(value) < LARGEST_NUMBER}
                before = lines[-1]["step"] if lines else 0.0
            except (ValueError, AttributeError, RecursionError):
                line, before = {}, 0.0
            if line.get("step", 0.0) > before:
                lines.append(line)
            else:
                broken += 1
    return lines, broken


def read_measurements(paths: Iterable[Path]) -> tuple[list[Measurement], list[Problem]]:
    """Results of eval and bench among JSON files; other files are none of a report's business."""
    found, problems = [], []
    for path in paths:
        if path.stat().st_size > LARGEST_RESULT:
            continue
        try:
            values = manifest.read_json(path)
        except BadInput as error:
            problems.append(Problem(DAMAGE, here(f"{error.what}: {error.why}")))
            continue
        if not isinstance(values, dict) or values.get("stage") not in ("eval", "bench"):
            continue
        if not shapes.fits(values, shapes.Eval if values["stage"] == "eval" else shapes.Bench):
            problems.append(Problem(DAMAGE, f"{path.name} is not what evlm {values['stage']} writes"))
            continue
        found.append(Measurement(path.name, values))
    return found, problems


def story_of(
    title: str,
    place: str,
    created: str,
    chapters: list[Chapter],
    measurements: list[Measurement],
    problems: list[Problem],
    hashed: bool,
) -> Story:
    """A story with its figures: every checkpoint that can be counted, beside the teacher of the last one."""
    models = {
        chapter.label: (chapter.manifest, chapter.sha256)
        for chapter in chapters
        if chapter.manifest and chapter.manifest.accounting and chapter.sha256
    }
    first = reference(chapters)
    if first in models:
        models = {first: models[first], **models}
    evals, bench, left = _choose(models, measurements)
    summary = report.summarise(models, evals, bench) if models else None
    blind, unmeasured = see_inputs(chapters, measurements)
    return Story(title, place, created, chapters, summary, measurements, unique([*problems, *left, *blind]), hashed, unmeasured)


def see_inputs(chapters: Sequence[Chapter], measurements: Sequence[Measurement]) -> tuple[list[Problem], list[str]]:
    """Inputs without influence by manifests, results and structure; and the pruned and tuned checkpoints of which nobody measured it."""
    problems, unmeasured = [], []
    for chapter in chapters:
        if chapter.manifest is None:
            continue
        results = [part.result for part in measurements if part.result["provenance"]["inputs"].get("model") == chapter.sha256]
        records = [chapter.manifest.extra.get("influence"), *(result.get("influence") for result in results)]
        measured: list[influence.Influence] = [r for value in records if (r := influence.read(influence.Influence, value))]
        recorded = influence.read(influence.Reach, chapter.manifest.accounting.get("reach"))
        checked: list[influence.Influence | None] = [*measured] or [None]
        for record in checked:
            problems += [Problem(DAMAGE, f"{chapter.label}: {text}") for text in influence.problems(record, recorded or chapter.reach)]
            problems += [Problem(NOTE, f"{chapter.label}: {text}") for text in influence.notes(record, recorded)]
        if not any(record.inputs for record in measured) and chapter.manifest.stage in influence.MEASURING:
            unmeasured.append(chapter.label)
    if unmeasured:
        of = ", ".join(unmeasured)
        problems.append(Problem(NOTE, f"whether its inputs have any influence was not measured of {of}: evlm eval does that"))
    return problems, unmeasured


def reference(chapters: Sequence[Chapter]) -> str:
    """Label of what all others are compared with: the nearest teacher on the last one's chain, else where its chain begins."""
    by_key = {chapter.key: chapter for chapter in chapters}
    at = chapters[-1]
    while True:
        teacher = next((key for role, key in at.parents if role == "teacher" and by_key[key].manifest), None)
        if teacher:
            return by_key[teacher].label
        parent = next((key for _, key in at.parents if by_key[key].manifest), None)
        if parent is None:
            return at.label
        at = by_key[parent]


def _choose(
    models: Mapping[str, tuple[Manifest, str]], measurements: Sequence[Measurement]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None, list[Problem]]:
    """The evaluations of one and the same test, and the one bench, that tell of most models; the later one if several do."""
    label_of = {digest: label for label, (_, digest) in models.items()}
    tests: dict[str, dict[str, dict[str, Any]]] = {}
    benches, problems = [], []
    for measurement in sorted(measurements, key=lambda item: item.result["provenance"]["created"]):
        result = measurement.result
        digests = [result["provenance"]["inputs"].get("model")] if result["stage"] == "eval" else [m["sha256"] for m in result["models"]]
        known = [label_of[digest] for digest in digests if digest in label_of]
        if not known:
            problems.append(Problem(NOTE, f"{measurement.name} measures checkpoints that are not among these, or were made anew since"))
        elif result["stage"] == "eval" and main_metric(result["metrics"]):
            tests.setdefault(report.test_of(result), {})[known[0]] = result
        elif result["stage"] == "bench":
            benches.append((len(known), result))
    evals: dict[str, dict[str, Any]] = max(reversed(list(tests.values())), key=len, default={})
    bench = max(reversed(benches), key=lambda pair: pair[0], default=(0, None))[1]
    if len(tests) > 1:
        problems.append(Problem(NOTE, "there are evaluations of several tests; the table shows the one that most models took"))
    if len(benches) > 1:
        problems.append(Problem(NOTE, "there are several bench results; the table shows the one with most of these models"))
    return evals, bench, problems


def reach_of(folder: Path) -> influence.Reach:
    """What the inputs of a checkpoint reach, from its configuration alone; how much reaches nothing is not counted here."""
    family = families.of_folder(folder)
    return influence.Reach(**of_config(family.read_config(folder)))


def structure_of(folder: Path) -> Structure:
    """Which heads and neurons a checkpoint kept, from its configuration alone."""
    family = families.of_folder(folder)
    config = family.read_config(folder)
    counts = config.original_counts()
    return {group: (indices, counts[group]) for group, indices in config.kept_indices().items()}
