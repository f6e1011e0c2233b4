"""Curves and bars as inline SVG. Every mark has a title that shows its value when a pointer rests on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from efficientvlm.report.markup import Html, tag

Point = tuple[float, float]

WIDTH, HEIGHT = 340, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 22, 36
LABELS = 84  # more room at the right where several lines are named
POINTS = 160
LETTER = 6.3  # width of a letter of a label
FAR = 12.0  # a curve that falls further than this is drawn on a logarithmic axis


@dataclass
class Line:
    """A curve: its name, its colour (1 to 4), and its (step, value) in order."""

    name: str
    colour: int
    points: Sequence[Point]
    dashed: bool = False


@dataclass
class Axis:
    """Values from `low` to `high` on a length of pixels."""

    low: float
    high: float
    log: bool = False

    def part(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return ((math.log10(value) if self.log else value) - low) / (high - low)

    def ticks(self, count: int = 4) -> list[float]:
        """Round values on the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                found = [factor * 10.0**power for power in powers for factor in factors]
                found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
                if len(found) <= 6:
                    break
            return found[:: math.ceil(len(found) / 6)]
        step = round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def round_step(wanted: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `wanted`."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= wanted * (1 - 1e-9))


def axis_of(values: Sequence[float], *, logarithmic: bool = True) -> Axis:
    """An axis that holds `values`: from 0, unless they are all positive and far apart."""
    low, high = min(values), max(values)
    if logarithmic and low > 1e-12 and high > FAR * low:
        return Axis(low * 0.9, high * 1.1, log=True)
    low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-12:
        high = low + 1.0
    return Axis(low * 1.06, high * 1.06)


def thin(points: Sequence[Point], most: int = POINTS) -> tuple[list[Point], int]:
    """At most `most` points, each the mean of as many neighbours; and of how many."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups], size


def plain(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def curves(
    title: str, lines: Sequence[Line], last: float, marks: Sequence[tuple[float, str]] = (), show: Callable[[float], str] = plain
) -> Html:
    """A figure of one or more lines over training steps 0 to `last`; `marks` are steps with a name, drawn as dotted lines."""
    thinned = [Line(line.name, line.colour, thin(line.points)[0], line.dashed) for line in lines]
    grouped = max(thin(line.points)[1] for line in lines)
    values = [value for line in thinned for _, value in line.points]
    across, up = Axis(0, last), axis_of(values, logarithmic=show is plain)
    right = LABELS if len(lines) > 1 else RIGHT

    def x(step: float) -> float:
        return LEFT + across.part(step) * (WIDTH - LEFT - right)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - up.part(value) * (HEIGHT - TOP - BOTTOM)

    drawn = [*_grid(up, y, right, show), *_steps(across, x, right), *_marks(marks, x)]
    for line in thinned:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
        drawn.append(tag("polyline", points=path, class_=f"curve c{line.colour}" + " dashed" * line.dashed, style="fill:none"))
        if len(line.points) == 1:
            drawn.append(tag("circle", cx=x(line.points[0][0]), cy=y(line.points[0][1]), r=3, class_=f"c{line.colour}"))
    drawn += _names(thinned, x, y, show) if len(lines) > 1 else _end(thinned[0], x, y, show)
    drawn += _hovers(thinned, x, show)
    notes = ["logarithmic axis"] * up.log + [f"means of {grouped} lines of the log"] * (grouped > 1)
    ends = ", ".join(f"{line.name} {show(line.points[0][1])} to {show(line.points[-1][1])}" for line in lines)
    svg = tag("svg", drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, role="img", aria_label=f"{title} by step: {ends}")
    return tag("figure", tag("b", title), tag("span", " · " + ", ".join(notes), class_="soft small") if notes else None, svg)


def _grid(up: Axis, y: Callable[[float], float], right: int, show: Callable[[float], str]) -> list[Html]:
    drawn = []
    for value in up.ticks():
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - right, y1=y(value), y2=y(value), class_="axis" if value == 0 else "grid"))
        label = f"{100 * value:g}\N{NO-BREAK SPACE}%" if show is percent else f"{value:g}"
        drawn.append(tag("text", label, x=LEFT - 6, y=y(value) + 4, text_anchor="end", class_="faint"))
    return drawn


def _steps(across: Axis, x: Callable[[float], float], right: int) -> list[Html]:
    bottom = HEIGHT - BOTTOM
    drawn = [tag("line", x1=LEFT, x2=WIDTH - right, y1=bottom, y2=bottom, class_="axis")]
    for step in across.ticks():
        drawn.append(tag("line", x1=x(step), x2=x(step), y1=bottom, y2=bottom + 4, class_="axis"))
        drawn.append(tag("text", f"{step:,g}", x=x(step), y=bottom + 16, text_anchor="middle", class_="faint"))
    return [*drawn, tag("text", "step", x=(LEFT + WIDTH - right) / 2, y=HEIGHT - 5, text_anchor="middle", class_="faint")]


def _marks(marks: Sequence[tuple[float, str]], x: Callable[[float], float]) -> list[Html]:
    drawn: list[Html] = []
    row, before = 0, -math.inf
    for step, name in sorted(marks):
        place, long = x(step), LETTER * len(name)
        end = place + long > WIDTH
        row = 10 + 11 * ((place - long if end else place) < before and row == 10)  # names that would touch go below one another
        drawn.append(tag("line", tag("title", f"step {step:,g}: {name}"), x1=place, x2=place, y1=14, y2=HEIGHT - BOTTOM, class_="mark"))
        drawn.append(tag("text", name, x=place - 3 if end else place + 3, y=row, text_anchor="end" if end else "start", class_="faint"))
        before = place if end else place + long
    return drawn


def _end(line: Line, x: Callable[[float], float], y: Callable[[float], float], show: Callable[[float], str]) -> list[Html]:
    """The last value, written above the end of the line and above what lies beside it."""
    step, value = line.points[-1]
    words = show(value)
    place = min(y(other) for at, other in line.points if x(at) >= x(step) - LETTER * len(words)) - 7
    return [tag("text", words, x=x(step), y=max(place, TOP + 4.0), text_anchor="end", class_=f"c{line.colour}")]


def _names(lines: Sequence[Line], x: Callable[[float], float], y: Callable[[float], float], show: Callable[[float], str]) -> list[Html]:
    """Name and last value beside the end of every line, pushed apart where they would touch."""
    drawn = []
    lowest = HEIGHT - BOTTOM - 12.0
    down = sorted(lines, key=lambda line: -y(line.points[-1][1]))
    for line in down:
        value = line.points[-1][1]
        place = min(y(value) - 2, lowest)
        lowest = place - 27
        drawn.append(tag("text", line.name, x=WIDTH - LABELS + 6, y=place, class_=f"c{line.colour}"))
        drawn.append(tag("text", show(value), x=WIDTH - LABELS + 6, y=place + 12, class_=f"c{line.colour}"))
    return drawn


def _hovers(lines: Sequence[Line], x: Callable[[float], float], show: Callable[[float], str]) -> list[Html]:
    """A column over each step that tells the values of all lines there."""
    steps = sorted({step for line in lines for step, _ in line.points})
    values = [dict(line.points) for line in lines]
    drawn = []
    for number, step in enumerate(steps):
        start = x(steps[number - 1]) if number else 2 * x(step) - x(steps[1] if len(steps) > 1 else step) - 4
        stop = x(steps[number + 1]) if number + 1 < len(steps) else x(step) + (x(step) - start)
        described = [f"{line.name} {show(found[step])}" for line, found in zip(lines, values, strict=True) if step in found]
        left, right = (start + x(step)) / 2, (x(step) + stop) / 2
        box = {"x": left, "y": TOP, "width": max(1.0, right - left), "height": HEIGHT - TOP - BOTTOM}
        drawn.append(tag("rect", tag("title", f"step {step:,g}: " + ", ".join(described)), class_="hover", **box))
    return drawn


def bar(part: float, title: str, colour: str = "kept") -> Html:
    """A bar that fills `part` of its track."""
    inner = tag("rect", width=f"{100 * min(1.0, max(0.0, part)):.1f}%", height="100%", rx=2, class_=colour)
    return tag("svg", tag("title", title), tag("rect", width="100%", height="100%", rx=2, class_="track"), inner, width="100%", height=8)


def stack(parts: Sequence[tuple[str, float, int]], longest: float, unit: str) -> Html:
    """Parts (name, amount, colour) one behind the other, as long as their sum is beside `longest`."""
    drawn, at = [], 0.0
    for name, amount, colour in parts:
        place = {"x": f"{100 * at / longest:.2f}%", "width": f"{100 * amount / longest:.2f}%"}
        drawn.append(tag("rect", tag("title", f"{name}: {amount:,.1f} {unit}"), height="100%", class_=f"c{colour}", **place))
        at += amount
    described = ", ".join(f"{name} {amount:,.1f} {unit}" for name, amount, _ in parts)
    return tag("svg", drawn, width="100%", height=16, role="img", aria_label=described)


def bullet(value: float, wish: float | None, title: str, most: float = 1.0, width: int = 220) -> Html:
    """A bar with a tick where the wish was."""
    length = width * min(1.0, value / most)
    drawn = [tag("rect", width=width, y=3, height=10, class_="track"), tag("rect", width=length, y=3, height=10, class_="kept")]
    if wish is not None:
        drawn.append(tag("rect", x=width * min(1.0, wish / most) - 1, width=2, height=16, class_="tick"))
    return tag("svg", tag("title", title), drawn, viewBox=f"0 0 {width} 16", width=width, height=16)


def swatch(colour: int) -> Html:
    """A square of a colour, for the head of a column."""
    return tag("span", tag("svg", tag("rect", width=10, height=10, class_=f"c{colour}"), viewBox="0 0 10 10"), class_="swatch")
