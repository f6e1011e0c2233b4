"""Sections on licences, environment, and what was checked."""

from __future__ import annotations

from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.report.markup import Child, Html, table, tag
from efficientvlm.report.story import DAMAGE, NOTE, Story

ORIGINS = {
    "bundled": "comes with efficientvlm, under the licence of the package",
    "random": "random weights: nobody else's",
    "imported": "imported from elsewhere: its licence is not recorded",
}


def licences(story: Story) -> Html:
    """Data by licence, and the checkpoints that the chain began with."""
    used: dict[tuple[str, str, str], list[str]] = {}
    for chapter, manifest in story.readable:
        for record in manifest.data:
            used.setdefault((record.name, record.split, record.licence), []).append(chapter.label)
    rows = [(name, split, licence, ", ".join(labels)) for (name, split, licence), labels in used.items()]
    begun = [(chapter.label, ORIGINS[manifest.origin]) for chapter, manifest in story.readable if manifest.origin]
    lost = [(chapter.label, "not found: nothing is known of its licence") for chapter in story.chapters if chapter.manifest is None]
    how = "The weights may be used as far as the licences of the data and of the models they were made from allow."
    return tag(
        "section",
        tag("h2", "Licences"),
        tag("p", how),
        table(["data", "split", "licence", "used for"], rows) if rows else tag("p", "No data were used.", class_="soft"),
        table(["weights that the chain began with", ""], begun + lost) if begun + lost else None,
        id="licences",
    )


def environment(story: Story) -> Html:
    """Versions, in a column for every environment that differs, and the machine that was timed."""
    kinds: list[tuple[dict[str, str], list[str]]] = []
    for chapter, manifest in story.readable:
        versions = {"efficientvlm": _code(manifest), **manifest.environment}
        same = next((labels for other, labels in kinds if other == versions), None)
        if same is None:
            kinds.append((versions, [chapter.label]))
        else:
            same.append(chapter.label)
    names = list(dict.fromkeys(name for versions, _ in kinds for name in versions))
    common = [name for name in names if len({versions.get(name) for versions, _ in kinds}) == 1]
    rows: list[list[Child]] = [[name, kinds[0][0].get(name, "–")] for name in common]
    differing = [name for name in names if name not in common]
    parts: list[Child] = [tag("h2", "Environment")]
    if differing:
        lines = [[", ".join(labels), *(versions.get(name, "–") for name in differing)] for versions, labels in kinds]
        parts.append(table(["checkpoints", *differing], lines))
    machines = {str(m.result["machine"]): m.result["machine"] for m in story.measurements if isinstance(m.result.get("machine"), dict)}
    rows += [["timed on", ", ".join(f"{key} {value}" for key, value in machine.items())] for machine in machines.values()]
    return tag("section", parts, table(["for all" if differing else "", "version"], rows) if rows else None, id="environment")


def _code(manifest: Manifest) -> str:
    commit = f" commit {manifest.code.commit[:12]}" if manifest.code.commit else ""
    return manifest.code.version + commit + (" with local changes" if manifest.code.dirty else "")


def banner(story: Story) -> Html | None:
    """What is wrong, at the top; None if nothing is."""
    wrong = [problem.text for problem in story.problems if problem.kind == DAMAGE]
    if not wrong:
        return None
    title = tag("b", f"{len(wrong)} problem{'s' * (len(wrong) > 1)}", class_="bad")
    more = tag("li", f"and {len(wrong) - 5} more, ", tag("a", "see below", href="#checks")) if len(wrong) > 5 else None
    return tag("div", title, tag("ul", [tag("li", text) for text in wrong[:5]], more), class_="banner", role="alert")


def _unmeasured(story: Story) -> str:
    """What to say where nothing is wrong with the files, while nobody knows whether the models look at their inputs."""
    return f"Nothing is wrong with the files. Whether its inputs have any influence was not measured of {', '.join(story.unmeasured)}."


def checks(story: Story) -> Html:
    """What was checked, how far, and what came out."""
    how = (
        "The content of every file was compared with the sha256 in its manifest."
        if story.hashed
        else "Manifests and the sizes of files were checked; their content was not hashed: evlm verify does that."
    )
    groups: list[Child] = []
    for kind, title in ((DAMAGE, "Problems"), (NOTE, "To know")):
        texts = [problem.text for problem in story.problems if problem.kind == kind]
        style = "bad" if kind == DAMAGE else None
        if texts:
            groups.append([tag("h3", title, class_=style), tag("ul", [tag("li", text) for text in texts], class_="checks")])
    if not any(problem.kind == DAMAGE for problem in story.problems):
        groups.insert(0, tag("p", "No problem was found.", class_="good") if not story.unmeasured else tag("p", _unmeasured(story)))
    return tag("section", tag("h2", "Checks"), tag("p", how), groups, id="checks")
