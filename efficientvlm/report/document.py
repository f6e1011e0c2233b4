"""The page as a whole."""

from __future__ import annotations

from efficientvlm.report import facts, figures, lineage, structure, training
from efficientvlm.report.markup import Html, tag
from efficientvlm.report.story import Story, moment
from efficientvlm.report.style import CSS

GENERATOR = "evlm report"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched and nothing runs, whatever a name contains
SECTIONS = {
    "figures": "Figures",
    "training": "Training",
    "structure": "Structure",
    "lineage": "Lineage",
    "licences": "Licences",
    "environment": "Environment",
    "checks": "Checks",
}


def page(story: Story) -> str:
    """One HTML document without scripts and without anything to be fetched."""
    parts: dict[str, Html | None] = {
        "figures": figures.section(story),
        "training": training.section(story),
        "structure": structure.section(story),
        "lineage": lineage.section(story),
        "licences": facts.licences(story),
        "environment": facts.environment(story),
        "checks": facts.checks(story),
    }
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=GENERATOR),
        tag("title", f"{story.title} · efficientvlm"),
        Html(f"<style>{CSS}</style>"),
    )
    count = len(story.readable)
    what = f"{count} checkpoint{'s' * (count != 1)} · {story.place} · {moment(story.created)}"
    top = tag("header", tag("h1", story.title), tag("div", what, class_="soft small"), class_="top")
    links = tag("nav", [tag("a", SECTIONS[name], href=f"#{name}") for name, part in parts.items() if part is not None])
    body = tag("body", top, links, tag("main", facts.banner(story), figures.tiles(story), parts.values()), _footer(story))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def is_ours(beginning: str) -> bool:
    """Whether a file that begins like this was written by :func:`page`."""
    return str(tag("meta", name="generator", content=GENERATOR)) in beginning


def _footer(story: Story) -> Html:
    return tag("footer", f"Written by evlm report from manifests, logs and results alone, {moment(story.created)}. No model was run.")
