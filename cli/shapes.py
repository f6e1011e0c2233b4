"""What `evlm plan` lists of a model: the students of other width that have given shares of its parameters and multiply-adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from efficientvlm.cli import output

if TYPE_CHECKING:
    from efficientvlm.planning.shapes import Counts, Found


class Asked(NamedTuple):
    """The options of `evlm plan` that say which students are looked for; None: not given."""

    parameters: float | None
    macs: float | None
    tolerance: float | None
    pass_name: str | None
    image_size: int | None
    text_length: int | None
    of: str | None
    equal: bool
    top: int | None


FLAGS = ("--parameters", "--macs", "--tolerance", "--pass", "--image-size", "--text-length", "--of", "--equal-widths", "--top")

WHOLE = ("network", "encoders")
"""What `--of` may name, of which parameters are a share."""


def refuse(asked: Asked) -> None:
    """A usage error if one of them is given, since a recipe has no such shares."""
    if given := [flag for flag, value in zip(FLAGS, asked, strict=True) if value not in (None, False)]:
        raise typer.BadParameter(f"{given[0]} is about the students of a model", param_hint=given[0])


def shapes(model: str, asked: Asked, *, json: bool) -> None:
    """Print the students of `model`, the nearest first.

    Raises:
        BadInput: it has no students of other width, or makes no such pass.
        TargetMissed: none has such shares; the nearest one is printed.
    """
    if asked.parameters is None or asked.macs is None:
        raise typer.BadParameter("--model needs --parameters and --macs, the shares that a student may have", param_hint="--model")
    of = _of(asked.of)

    from efficientvlm.errors import TargetMissed
    from efficientvlm.loaded import load
    from efficientvlm.planning.shapes import rule_for, search

    network = load(model, weights=False).model
    network = network.resized(asked.image_size) if asked.image_size else network
    rule = rule_for(network, asked.pass_name, asked.text_length, of)
    tolerance = 0.005 if asked.tolerance is None else asked.tolerance
    within, found, whole = search(network, rule, asked.parameters, asked.macs, tolerance, asked.top or 20, equal=asked.equal)
    said = rule.said(whole)
    if json:
        wanted = {"parameters": asked.parameters, "macs": asked.macs, "tolerance": tolerance}
        output.emit({"model": model, "rule": said, "wanted": wanted, "within": within, "shapes": [_object(shape) for shape in found]})
    else:
        output.records_table([_row(shape) for shape in found])
        output.show("")
        for name, text in said.items():
            output.show(f"100 % of {name}: {text}")
        if within:
            output.show(f"{len(found)} of {within:,} shapes within {tolerance:g} of both shares; --json has the settings of evlm shrink")
    if not within:
        why = f"of all shapes the one that is printed comes nearest to {asked.parameters:g} and {asked.macs:g}"
        fix = "ask for other shares, a larger --tolerance or another --pass"
        raise TargetMissed(f"no student within {tolerance:g} of both shares", why, fix)


def _of(text: str | None) -> str | float:
    if text in (None, *WHOLE):
        return text or WHOLE[0]
    try:
        number = float(str(text))
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise typer.BadParameter(f"{text!r} is neither {' nor '.join(WHOLE)} nor a number of parameters", param_hint="--of")
    return number


def _object(shape: Found) -> dict[str, Any]:
    counts: Counts = shape.counts
    shares = {"parameters": shape.parameters, "macs": shape.macs}
    return {"settings": shape.settings, **counts._asdict(), "shares": shares, "stock": shape.stock}


def _row(shape: Found) -> dict[str, Any]:
    settings = shape.settings
    cells = {}
    for tower, layers in settings["layers"].items():
        width, neurons = (settings[name].get(tower) for name in ("width", "neurons"))
        cells[tower] = f"{width} x {layers}, {neurons}" if width else f"{layers} layers"
    if "fusion_layers" in settings:
        cells["fusion layers"] = str(settings["fusion_layers"])
    return {
        **cells,
        "parameters": f"{shape.counts.parameters:,}",
        "share": f"{shape.parameters:.2%}",
        "multiply-adds": f"{shape.counts.macs:,}",
        "share ": f"{shape.macs:.2%}",
        "stock": "yes" if shape.stock else "no",
    }
