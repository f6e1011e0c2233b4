"""Sheets for people: small pictures in lines with a word on each, or a picture beside the texts that fit it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from efficientvlm.data.images import open_image

SIDE, GAP, LINE = 160, 12, 22
MOST_ROWS, MOST_COLUMNS = 50, 50
PAPER, INK, FRAME = (255, 255, 255), (20, 20, 20), (220, 220, 220)


def of_pictures(rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Image.Image:
    """A line a text: above it the text, then the pictures in files that belong to it, with a label under each.

    At most `MOST_ROWS` lines of `MOST_COLUMNS` pictures are drawn.
    """
    rows = [(text, list(files)[:MOST_COLUMNS]) for text, files in rows[:MOST_ROWS]]
    columns = max(2, *(len(files) for _, files in rows))
    width, height = GAP + columns * (SIDE + GAP), GAP + len(rows) * (2 * LINE + SIDE + 2 * GAP)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    top = GAP
    for text, files in rows:
        write(draw, (GAP, top), text, width - 2 * GAP)
        for at, (file, label) in enumerate(files):
            left = GAP + at * (SIDE + GAP)
            page.paste(small(file, SIDE), (left, top + LINE))
            write(draw, (left, top + LINE + SIDE + 4), label, SIDE)
        top += 2 * LINE + SIDE + 2 * GAP
    return page


def of_texts(file: str, lines: Sequence[str]) -> Image.Image:
    """The picture in a file, and beside it a text a line, the first `MOST_ROWS` of them."""
    side, width = 2 * SIDE, 480
    lines = lines[:MOST_ROWS]
    page = Image.new("RGB", (side + width + 3 * GAP, max(side, len(lines) * LINE) + 2 * GAP), PAPER)
    page.paste(small(file, side), (GAP, GAP))
    draw = ImageDraw.Draw(page)
    for at, line in enumerate(lines):
        write(draw, (side + 2 * GAP, GAP + at * LINE), line, width)
    return page


def small(file: str, side: int) -> Image.Image:
    """The picture in a file within a square of `side` pixels."""
    tile = Image.new("RGB", (side, side), PAPER)
    ImageDraw.Draw(tile).rectangle((0, 0, side - 1, side - 1), outline=FRAME)
    picture = ImageOps.contain(Image.fromarray(open_image(file)), (side, side), Image.Resampling.LANCZOS)
    tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return tile


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """`text` in one line of at most `width` pixels, cut with dots; a letter that the font lacks is a question mark."""
    line, kept = drawn(text), ""
    if draw.textlength(line, _font()) > width:
        while line and draw.textlength(f"{line}...", _font()) > width:
            line = line[:-1]
        kept = "..."
    draw.text(at, line + kept, INK, _font())


def drawn(text: str) -> str:
    """The first letters of `text` as Pillow's own font has them: an accent is left out, another script is question marks."""
    return "".join(letter if _has(letter) else "?" for letter in _plain(text))


def drawable(text: str) -> bool:
    """Whether :func:`drawn` has no question mark that `text` has not."""
    return all(map(_has, _plain(text)))


def _plain(text: str) -> str:
    letters = " ".join(text.split())[:400]
    return "".join(letter if _has(letter) else unicodedata.normalize("NFKD", letter)[0] for letter in letters)


@lru_cache(maxsize=1)
def _font() -> Any:
    return ImageFont.load_default(14)


@lru_cache(maxsize=4096)
def _has(letter: str) -> bool:
    missing = bytes(_font().getmask("\U0010fffe"))
    return letter == " " or bytes(_font().getmask(letter)) != missing
