"""What became of a model from stage to stage: figures side by side, and whether the targets are met.

Everything is read from manifests and results; nothing is computed by a model here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from efficientvlm.checkpoints.manifest import Manifest
from efficientvlm.errors import BadInput
from efficientvlm.report.metrics import main_metric, titles, unbounded
from efficientvlm.settings.stages import Targets
from efficientvlm.settings.tasks import ABOUT

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
NONE = "–"
EVERY_RESULT = frozenset(("stage", "task", "model", "data", "influence", "device", "precision", "seconds", "metrics", "provenance", "top"))
"""What a result says besides how it was measured. Answers that are kept after the first token may be more or fewer."""
OTHER = "heads"  # what an accounting calls parameters that belong to no tower


def summarise(
    models: Mapping[str, tuple[Manifest, str]],
    evals: Mapping[str, dict[str, Any]],
    bench: dict[str, Any] | None,
    limits: Targets | None = None,
) -> dict[str, Any]:
    """The figures of every model, JSON-ready; the first model is the one the others are compared with.

    Args:
        models: label → manifest and its sha256.
        evals: label → result of the eval stage.
        bench: result of the bench stage.
        limits: what the last model should reach beside the first.

    Raises:
        BadInput: results of other checkpoints, or evaluations of different questions.
    """
    labels = list(models)
    if unknown := [label for label in evals if label not in models]:
        raise BadInput(f"evals names {unknown[0]}", f"models has {', '.join(labels)}", "use the same labels")
    for label, result in evals.items():
        if result["provenance"]["inputs"].get("model") != models[label][1]:
            raise BadInput(f"the evaluation of {label} is of another checkpoint", str(result.get("model")), "evaluate it again")
    tests = {label: _test(result) for label, result in evals.items()}
    if len({str(test) for test in tests.values()}) > 1:
        raise BadInput(
            "the evaluations cannot be compared",
            "; ".join(f"{label}: {_named(test)}" for label, test in tests.items()),
            "evaluate all on the same data",
        )
    timed = {record["sha256"]: record for record in reversed(bench["models"])} if bench else {}
    if bench and not any(digest in timed for _, digest in models.values()):
        raise BadInput("the bench result is of other checkpoints", ", ".join(r["model"] for r in bench["models"]), "run evlm bench again")
    figures = {label: _figures(manifest, evals.get(label), bench, timed.get(digest)) for label, (manifest, digest) in models.items()}
    first = figures[labels[0]]
    for model in figures.values():
        for of, whole in ((model["parameters"], first["parameters"]), (model["macs"], first["macs"])):
            of["of_reference"] = of["total"] / whole["total"]
        known = model["accuracy"] is not None and first["accuracy"]
        model["accuracy_of_reference"] = model["accuracy"] / first["accuracy"] if known else None
    speed = None
    if bench:
        base = bench["models"][0]
        name = next((label for label, (_, digest) in models.items() if digest == base["sha256"]), base["model"])
        speed = {"compared_with": name, "timed": bench["timed"], **{key: bench[key] for key in ("machine", "precision", "text_length")}}
    summary = {"reference": labels[0], "models": figures, "test": next(iter(tests.values()), None), "speed": speed}
    return {**summary, "targets": targets(summary, limits or Targets())}


def test_of(result: dict[str, Any]) -> str:
    """What two evaluations must share to be compared, as one text."""
    return str(_test(result))


def _test(result: dict[str, Any]) -> dict[str, Any]:
    data, metrics = result["data"], result["metrics"]
    counts = ABOUT[result["task"]].counts if result["task"] in ABOUT else ()
    metric, _ = main_metric(metrics) or ("", 0.0)
    return {
        "data": data["name"],
        "split": data["split"],
        "fingerprint": data["fingerprint"],
        "metric": metric,
        "counted": {count: metrics[count] for count in counts if isinstance(metrics.get(count), int)},
        "how": {key: value for key, value in sorted(result.items()) if key not in EVERY_RESULT},
    }


def _named(test: dict[str, Any]) -> str:
    counted = " and ".join(f"{count:,} {name}" for name, count in test["counted"].items())
    manner = [f"{name} {value!r}" for name, value in test["how"].get("manner", {}).items() if name != "decoding"]
    return ", ".join(filter(None, (f"{test['data']} {test['split']}", counted, str(test["how"].get("mode", "")), *manner)))


def metric_title(summary: dict[str, Any]) -> str:
    """What the figure called `accuracy` in a summary is: that of question answering, or the main metric of another task."""
    return titles().get((summary["test"] or {}).get("metric", ""), "accuracy")


def metric_shown(metric: str | None) -> Callable[[float | None], str]:
    """How a main metric is written: in percent, if it is a part of 1."""
    return (lambda value: NONE if value is None else f"{value:.3f}") if metric in unbounded() else _percent


def _figures(manifest: Manifest, test: dict[str, Any] | None, bench: dict[str, Any] | None, timed: dict[str, Any] | None) -> dict[str, Any]:
    counts = manifest.accounting
    units: dict[str, dict[str, list[int]]] = {}
    layers: dict[str, int] = {}
    for group, count in counts["units"].items():
        tower, layer, kind = group.split(".")
        kept = units.setdefault(tower, {}).setdefault(kind, [0, 0])
        kept[0], kept[1] = kept[0] + count["kept"], kept[1] + count["of"]
        layers[tower] = max(layers.get(tower, 0), int(layer) + 1)
    rows = [record for record in bench["latency"] if timed and record["model"] == timed["model"]] if bench else []
    parameters = counts["parameters"]
    return {
        "stage": manifest.stage,
        "parameters": {**parameters, "embeddings": parameters["total"] - parameters["without_embeddings"]},
        "macs": {key: counts["macs"][key] for key in ("total", "image_size", "text_length")},
        "sparsity": counts["sparsity"]["achieved"],
        "layers": layers,
        "kept": units,
        "latency": {str(record["batch"]): {key: record[key] for key in record if key not in ("model", "batch")} for record in rows},
        "timed_untrained": bool(timed) and not (timed or {})["trained"],
        "accuracy": (main_metric(test["metrics"]) or ("", None))[1] if test else None,
        **{key: test["metrics"].get(key) if test else None for key in ("standard_error", "majority_accuracy")},
        "unanswerable": _unanswerable(test["metrics"]) if test else None,
    }


def _unanswerable(metrics: dict[str, Any]) -> float | None:
    """Part of the questions that no answer of the closed list is right for; None where there is none."""
    return metrics["unanswerable"] / metrics["questions"] if metrics.get("unanswerable") else None


def targets(summary: dict[str, Any], limits: Targets) -> list[dict[str, Any]]:
    """The last model beside the first: value, limit and whether it is met; None where it was not measured or nothing was asked."""
    labels = list(summary["models"])
    if len(labels) < 2:
        return []
    last = summary["models"][labels[-1]]
    against_first = summary["speed"] and summary["speed"]["compared_with"] == labels[0]
    values = (
        last["parameters"]["of_reference"],
        last["accuracy_of_reference"],
        last["latency"].get("8", {}).get("speedup") if against_first else None,
    )
    found = []
    asked = (limits.parameters, limits.accuracy, limits.speedup)
    names = ("parameters", metric_title(summary), "speed-up at batch 8")
    for name, sense, limit, value in zip(names, ("at most", "at least", "at least"), asked, values, strict=True):
        met = None if value is None or limit is None else value <= limit if sense == "at most" else value >= limit
        found.append({"name": name, "of": f"{labels[-1]} / {labels[0]}", "value": value, "sense": sense, "limit": limit, "met": met})
    return found


def target_lines(found: list[dict[str, Any]]) -> list[str]:
    """A line a measure: `final / teacher: parameters 30.1 % (at most 44.3 %: met)`; without a target the value alone."""
    lines = []
    for target in found:
        show = _times if target["name"].startswith("speed") else _percent
        line = f"{target['of']}: {target['name']} {show(target['value'])}"
        if target["limit"] is not None:
            verdict = {None: "not measured", True: "met", False: "not met"}[target["met"]]
            line += f" ({target['sense']} {show(target['limit'])}: {verdict})"
        lines.append(line)
    return lines


def summary_table(summary: dict[str, Any]) -> Table:
    """Measures as rows, models as columns; as wide as the labels need, under 100 columns for four models."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    models: dict[str, dict[str, Any]] = summary["models"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("", overflow="fold")
    for label in models:
        table.add_column(Text(label), justify="right", overflow="fold", min_width=9)

    def add(name: str, values: list[str], *, last: bool = False) -> None:
        if any(value != NONE for value in values):
            table.add_row(Text(name), *map(Text, values), end_section=last)

    def every(get: Any) -> list[str]:
        return [get(model) for model in models.values()]

    reference = summary["reference"]
    towers = list(dict.fromkeys(tower for model in models.values() for tower in model["layers"]))
    unit, counted = scale([m["parameters"]["total"] for m in models.values()])
    add(f"parameters ({unit})", every(lambda m: counted(m["parameters"]["total"])))
    add(f"  of the {reference}'s", every(lambda m: _percent(m["parameters"]["of_reference"])))
    for tower in towers:
        add(f"  {tower}", every(lambda m, t=tower: counted(m["parameters"]["by_tower"].get(t))))
    add("  projections and heads", every(lambda m: counted(m["parameters"]["by_tower"].get(OTHER))))
    add("  embeddings (counted in the towers)", every(lambda m: counted(m["parameters"]["embeddings"])), last=True)
    unit, multiplied = scale([m["macs"]["total"] for m in models.values()])
    add(f"multiply-adds ({unit})", every(lambda m: multiplied(m["macs"]["total"])))
    add(f"  of the {reference}'s", every(lambda m: _percent(m["macs"]["of_reference"])))
    add("sparsity of prunable weights", every(lambda m: _percent(m["sparsity"]) if m["sparsity"] else NONE), last=True)
    sizes = sorted({size for model in models.values() for size in model["latency"]}, key=int)
    for size in sizes:
        add(f"latency (ms), batch {size}", every(lambda m, s=size: _latency(m, s)))
        name = f"  speed-up over {summary['speed']['compared_with']}"
        add(name, every(lambda m, s=size: _times(m["latency"].get(s, {}).get("speedup"))), last=size == sizes[-1])
    shown = metric_shown((summary["test"] or {}).get("metric"))
    add(metric_title(summary), every(lambda m: shown(m["accuracy"])))
    add("  standard error", every(lambda m: _percent(m["standard_error"], 2)))
    add("  of the most frequent answer alone", every(lambda m: _percent(m["majority_accuracy"])))
    add("  questions that cannot be answered", every(lambda m: _percent(m["unanswerable"])))
    add(f"  of the {reference}'s", every(lambda m: _percent(m["accuracy_of_reference"])), last=True)
    add(f"layers ({'/'.join(towers)})", every(lambda m: "/".join(str(m["layers"].get(tower, 0)) for tower in towers)), last=True)
    titles = {"heads kept": "head", "cross-attention heads kept": "cross_head", "those for the second image kept": "second_cross_head"}
    for title, kind in (titles | {"neurons kept": "neuron"}).items():
        having = [tower for tower in towers if any(kind in model["kept"].get(tower, {}) for model in models.values())]
        if having:
            table.add_row(Text(title))
        for tower in having:
            add(f"  {tower}", every(lambda m, t=tower, k=kind: _kept(m["kept"].get(t, {}).get(k))), last=tower == having[-1])
    return table


def captions(summary: dict[str, Any]) -> dict[str, str]:
    """Label → size in a few words, for the picture."""
    reference = summary["reference"]
    parameters = {label: model["parameters"] for label, model in summary["models"].items()}
    unit, counted = scale([part["total"] for part in parameters.values()])
    beside = {label: f", {_percent(part['of_reference'])} of the {reference}'s" for label, part in parameters.items() if label != reference}
    return {label: f"{counted(part['total'])} {unit} parameters{beside.get(label, '')}" for label, part in parameters.items()}


def _latency(model: dict[str, Any], size: str) -> str:
    record = model["latency"].get(size)
    mark = "*" if model["timed_untrained"] else ""
    return f"{mark}{record['median_ms']:.2f}" if record else NONE


def _kept(pair: list[int] | None) -> str:
    return f"{pair[0]:,}/{pair[1]:,}" if pair else NONE


def scale(values: list[int]) -> tuple[str, Callable[[float | None], str]]:
    """One unit for a whole block of the table, and how a count is written in it."""
    unit, size = next(((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if max(values) >= size), ("1", 1.0))
    decimals = 3 if max(values) < 10 * size else 2 if max(values) < 100 * size else 1
    return unit, lambda value: NONE if value is None else f"{value / size:.{decimals}f}"


def _percent(value: float | None, decimals: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{decimals}f} %"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def plain(table: Table, width: int = WIDTH) -> str:
    """A table as text without colour."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"[ \t]+$", "", console.file.getvalue(), flags=re.MULTILINE).strip("\n")


def text(summary: dict[str, Any]) -> str:
    """The table, how its figures were measured, and the targets."""
    return "\n".join([plain(summary_table(summary)), "", *notes(summary), "", *target_lines(summary["targets"])]).rstrip()


def notes(summary: dict[str, Any]) -> list[str]:
    """How the figures of a summary were measured, a line each."""
    macs = summary["models"][summary["reference"]]["macs"]
    found = [f"multiply-adds: one image of {macs['image_size']} px, a text of {macs['text_length']} tokens"]
    if test := summary["test"]:
        found.append(f"{metric_title(summary)}: {_named(test)}")
    if speed := summary["speed"]:
        machine = speed["machine"]
        found.append(
            f"latency: {speed['timed'].partition(';')[0]}; texts of {speed['text_length']} tokens, median; {speed['precision']}, "
            f"{machine['threads']} thread{'s' * (machine['threads'] > 1)} of {machine['name']}"
        )
    if any(model["timed_untrained"] for model in summary["models"].values()):
        found.append("* not trained for the task: timed with what was added for the timing alone")
    return found
