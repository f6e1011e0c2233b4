"""report: the table and the picture at the end of a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.files import check_writable, expanded, resolve, result_path, shown, unwritable, write_atomic
from efficientvlm.checkpoints.folder import fingerprint, require_complete
from efficientvlm.checkpoints.scratch import sweep
from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.report import pages, shapes
from efficientvlm.report import summary as report
from efficientvlm.report.metrics import main_metric, titles
from efficientvlm.report.picture import structure_figure
from efficientvlm.report.story import Measurement, Story, unique
from efficientvlm.runtime.progress import say
from efficientvlm.settings.stages import Report
from efficientvlm.stages.results import read_result

SUMMARY, TABLE, PICTURE, PAGE = "summary.json", "summary.txt", "structure.png", "report.html"


def run(config: Report, control: Control) -> dict[str, Any]:
    """Write `summary.json`, `summary.txt`, `structure.png` and `report.html` into `config.out`; `text` of the result is the table.

    Only manifests, results and the structure in `config.json` are read, so the report is simply made anew every time.

    Raises:
        BadInput: an unfinished checkpoint, a result of another checkpoint, a folder that holds other files.
    """
    models = {label: (require_complete(spec), fingerprint(spec)) for label, spec in config.models.items()}
    if bare := next((label for label, (made, _) in models.items() if not shapes.fits(made.accounting, shapes.Accounting)), None):
        raise BadInput(f"{config.models[bare]} has no figures for the table", "its manifest lacks some counts of a model", "make it again")
    evals = {label: read_result(expanded(path), "eval") for label, path in config.evals.items()}
    if bare := next((label for label, result in evals.items() if not main_metric(result["metrics"])), None):
        why = f"it has none of the metrics that stand for a task: {', '.join(titles())}"
        raise BadInput(f"{config.evals[bare]} has no figure for the table", why, "evaluate again, or leave it out of evals")
    bench = read_result(expanded(config.bench), "bench") if config.bench else None
    summary = report.summarise(models, evals, bench, config.targets)
    structures = {label: pages.structure_of(resolve(spec)) for label, spec in config.models.items()}
    out = claim(expanded(config.out))
    text = report.text(summary)
    provenance = {
        "models": {label: {"path": shown(resolve(spec)), "sha256": models[label][1]} for label, spec in config.models.items()},
        "code": manifest.code().model_dump(mode="json"),
        "created": manifest.now(),
    }
    result = {"stage": "report", **summary, "provenance": provenance}
    try:
        out.mkdir(parents=True, exist_ok=True)
        # first, as it says that the others are ours
        write_atomic(out / SUMMARY, (json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
        write_atomic(out / TABLE, (text + "\n").encode())
        structure_figure(structures, out / PICTURE, report.captions(summary))
    except OSError as error:
        raise unwritable(out, error) from None
    pages.write(out / PAGE, tell_recipe(config, summary))
    files = {name: str(out / name) for name in (SUMMARY, TABLE, PICTURE, PAGE)}
    say(f"report: wrote {', '.join(files.values())}", quiet=control.quiet)
    return {**result, "files": files, "text": text}


def tell_recipe(config: Report, summary: dict[str, Any]) -> Story:
    """The page of a recipe: the models it names with their ancestors, and the figures of its table."""
    folders = [resolve(spec) for spec in config.models.values()]
    labels = {folder.resolve(): label for folder, label in zip(folders, config.models, strict=True)}
    chapters, problems = pages.tell(folders, labels)
    results = [expanded(path) for path in (*config.evals.values(), *([config.bench] if config.bench else []))]
    measurements = [Measurement(path.name, manifest.read_json(path)) for path in dict.fromkeys(results)]
    out = expanded(config.out).resolve()
    blind, unmeasured = pages.see_inputs(chapters, measurements)
    known = unique([*problems, *blind])
    return Story(out.parent.name, shown(out.parent), manifest.now(), chapters, summary, measurements, known, False, unmeasured)


def claim(out: Path) -> Path:
    """The folder to write; :class:`BadInput` if it is a file or holds what no report wrote.

    A report's folder is known by its `summary.json`: without one that reads as a report's, the files of the other names are not ours.
    """
    try:
        sweep(out)
        there = {path.name for path in out.iterdir()} if os.path.lexists(out) else set()
    except OSError as error:
        raise unwritable(out, error) from None
    names = (SUMMARY, TABLE, PICTURE, PAGE)
    if foreign := sorted(there - set(names)):
        raise BadInput(f"{out} holds other files", ", ".join(foreign[:3]), "use another --out")
    for name in names:
        result_path(out / name)
    if there and not _is_summary(out / SUMMARY):
        raise BadInput(f"{out} holds other files", f"no report wrote {', '.join(sorted(there))}", "use another --out")
    check_writable(out / SUMMARY)
    return out


def _is_summary(path: Path) -> bool:
    try:
        values = manifest.read_json(path)
    except BadInput:
        return False
    made = values.get("provenance") if isinstance(values, dict) else None
    return isinstance(made, dict) and values.get("stage") == "report" and {"models", "code", "created"} <= made.keys()
