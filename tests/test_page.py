"""The HTML report: what it tells, that it cannot be broken by what it is told, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from doc_pages import evlm
from test_report import STUDENT, TEACHER
from test_report import manifest as counted

from efficientvlm.checkpoints.folder import Output
from efficientvlm.checkpoints.manifest import MANIFEST, DataRecord
from efficientvlm.errors import BadInput
from efficientvlm.report import charts, document, lineage, markup, training
from efficientvlm.report import pages as page
from efficientvlm.report.story import DAMAGE, NOTE, Chapter, Story, origins

VOID = {"meta", "br"}
EVIL = "<script>alert('x')</script>&\"\x00"


class Checked(HTMLParser):
    """A page that was parsed: fails on elements that are not closed in order; `words` is its text, `tags` its elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"
        self.words = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.parts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


SEES = {"samples": 32, "inputs": {name: {"outputs": {"answer": 1.0}, "said": 0.4} for name in ("image", "text")}}


def write(path: Path, stage: str, *, lines: Any = (), data: str = "easy-vqa", config: Any = {}, extra: Any = {}, **more: Any) -> Path:
    """A checkpoint made by hand: real folder and manifest, no model. `layers`, `heads`, `neurons` and `parameters` are its counts."""
    roles = {role: str(more.pop(role)) for role in ("model", "teacher") if role in more}
    output = Output.open(path, stage=stage, inputs=roles, config={"out": str(path), "seed": 3, **roles, **config})
    (output.staging / "model.safetensors").write_text("weights")
    output.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output.commit(
        output.manifest(
            family="toy",
            origin=None if roles else "random",
            accounting=counted(stage, **more).accounting,
            data=[DataRecord(name=data, split="train", count=3600, fingerprint="ab" * 32, licence="MIT")] if lines else [],
            metrics={"val": {"accuracy": 0.931}} if stage == "finetune" else {},
            extra={**({"influence": SEES} if stage in ("prune", "finetune") else {}), **extra},
        )
    )
    return path


def pruning(steps: int = 10) -> list[dict[str, Any]]:
    speed = {"samples_per_s": 50.0, "data_ms": 1.0, "teacher_ms": 20.0, "student_ms": 60.0, "optimizer_ms": 3.0}
    return [
        {"step": 10 * n, "loss": 8 / n, "task": 3.0, "expected_sparsity": 0.05 * n, "target_sparsity": min(0.4, 0.1 * n), **speed}
        for n in range(1, steps + 1)
    ]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """teacher → student → pruned → final, with an evaluation and a bench, in the folder `runs`."""
    monkeypatch.chdir(tmp_path)
    root = Path("runs")
    small = {**STUDENT, "decoder": 1}
    write(root / "teacher", "finetune", layers=TEACHER, parameters=2_000_000)
    layers = {"vision": [1, 3], "text": [1], "fusion": [1], "decoder": []}
    write(root / "student", "shrink", model=root / "teacher", layers=STUDENT, parameters=1_000_000, extra={"layers": layers})
    budget = {"all": {"target": 0.5, "achieved": 0.501, "expected": 0.61}}
    settings = {
        "method": "l0",
        "freeze_at": 0.6,
        "sparsity_warmup": 0.5,
        "sparsity": 0.5,
        "lr": 1e-4,
        "gates": {"lr": 0.05, "init_std": 0.01},
    }
    cut = {"layers": small, "heads": 2, "neurons": 300, "parameters": 600_000}
    write(
        root / "pruned",
        "prune",
        model=root / "student",
        teacher=root / "teacher",
        lines=pruning(),
        config=settings,
        extra={"budget": budget},
        **cut,
    )
    write(root / "final", "finetune", model=root / "pruned", teacher=root / "teacher", lines=[{"step": 5, "loss": 1.5}], **cut)
    result(root, "final", 0.95)
    return root


def result(root: Path, name: str, accuracy: float, file: str | None = None, **changes: Any) -> None:
    from efficientvlm.checkpoints.files import sha256

    data = {"name": "easy-vqa", "split": "test", "count": 100, "fingerprint": "f" * 64, "licence": "MIT"}
    provenance = {"inputs": {"model": sha256(root / name / MANIFEST)}, "config": {}, "created": "2024-01-01T00:00:00+00:00"}
    values = {
        "stage": "eval",
        "task": "vqa",
        "mode": "rank",
        "answers": 13,
        "data": data,
        "metrics": {"accuracy": accuracy, "questions": 9673},
    }
    (root / (file or f"{name}-test.json")).write_text(json.dumps({**values, "provenance": provenance, **changes}))


def timings(root: Path, **milliseconds: float) -> None:
    from efficientvlm.checkpoints.files import sha256

    models = [{"model": f"runs/{name}", "sha256": sha256(root / name / MANIFEST), "trained": True} for name in milliseconds]
    first = next(iter(milliseconds.values()))
    rows = [
        {"model": f"runs/{name}", "batch": 8, "median_ms": value, "p10_ms": value, "p90_ms": value, "speedup": first / value}
        for name, value in milliseconds.items()
    ]
    values = {
        "stage": "bench",
        "timed": "images to answers",
        "precision": "fp32",
        "text_length": 12,
        "machine": {"name": "Fast CPU", "threads": 2},
    }
    provenance = {"inputs": {}, "config": {}, "created": "2024-01-02T00:00:00+00:00"}
    (root / "speed.json").write_text(json.dumps({**values, "models": models, "latency": rows, "provenance": provenance}))


def read(path: Path, **options: Any) -> Checked:
    return Checked(document.page(page.tell_folder(path, **options)))


def test_a_folder_of_a_recipe_is_told_whole(runs: Path) -> None:
    timings(runs, teacher=40.0, pruned=20.0, final=16.0)
    told = read(runs)
    assert "finetune, reference" in told.words and "0.600 M 30.0 %" in told.words
    assert "16.00 ms 2.50× as fast" in told.words and "95.0 %" in told.words and "93.1 %" in told.words
    assert told.words.count("not measured") == 7  # latency of one, test accuracy of three and so its share, validation accuracy of two
    assert "parameters, final / teacher 30.0 %" in told.words and "target:" not in told.words  # only a recipe says what it wants
    assert "accuracy: easy-vqa test, 9,673 questions, rank" in told.words and "2 threads of Fast CPU" in told.words
    assert "50.1 % reached, 50.0 % asked 50.0 % 61.0 % 50.1 % 50 100" in told.words
    assert "vision 0 was 1" in told.words and "vision 1 was 3" in told.words and "decoder 0 2 of 4" in told.words
    assert "gates.lr 0.05 – " in told.words and "init_std" not in told.words  # only what differs from the default
    assert "easy-vqa train 3,600 abababababab MIT" in told.words and "seed 3" in told.words


def test_what_nobody_measured_is_said(runs: Path) -> None:
    told = read(runs / "final")
    assert "easy-vqa test" not in told.words and "accuracy, final / teacher not measured" in told.words
    (head,) = [line for line in told.words.split("Figures")[2].split("reference")[:1]]
    assert "latency accuracy, test accuracy, validation" in head


def test_inputs_without_influence_are_a_problem_and_unmeasured_ones_no_clean_bill(runs: Path) -> None:
    def notes(kind: str) -> list[str]:
        return [problem.text for problem in page.tell_folder(runs).problems if problem.kind == kind]

    def again(**changes: Any) -> None:
        shutil.rmtree(runs / "final")
        extra = {"influence": SEES | changes}
        write(runs / "final", "finetune", model=runs / "pruned", teacher=runs / "teacher", layers=STUDENT, parameters=9, extra=extra)

    assert not any("influence" in text for text in notes(DAMAGE) + notes(NOTE))
    blind = {"outputs": {"answer": 0.0}, "said": 0.0}
    again(inputs={**SEES["inputs"], "image": blind})
    assert "final: the image has no influence on the answer: with that of another sample all is equal to the last bit" in notes(DAMAGE)
    again(inputs={**SEES["inputs"], "image": {"outputs": {"answer": 1.0}, "said": 0.0}})
    assert not any("influence" in text for text in notes(DAMAGE))
    assert "final: the image changes none of 32 answers, though it changes the scores behind them" in notes(NOTE)
    again(inputs={}, not_measured="no images are held out")
    unmeasured = "whether its inputs have any influence was not measured of final: evlm eval does that"
    assert unmeasured in notes(NOTE) and "final: the influence of the inputs was not measured: no images are held out" in notes(NOTE)
    result(runs, "final", 0.9, influence=SEES)
    assert unmeasured not in notes(NOTE)
    result(runs, "final", 0.9, influence={**SEES, "inputs": {"image": blind}})
    assert any("the image has no influence" in text for text in notes(DAMAGE))
    again(inputs={"image": {"outputs": {"answer": "much"}}})
    assert any("cannot be read" in text for text in notes(DAMAGE)) and unmeasured in notes(NOTE)


def test_no_problem_is_claimed_only_where_the_influence_was_measured() -> None:
    from efficientvlm.report import facts

    story = Story("t", "t", "", [], None, [], [], False)
    assert "No problem was found." in Checked(str(facts.checks(story))).words
    story.unmeasured.append("final")
    words = Checked(str(facts.checks(story))).words
    assert "No problem" not in words and "Whether its inputs have any influence was not measured of final." in words


def test_the_page_needs_nothing_else(runs: Path) -> None:
    text = document.page(page.tell_folder(runs))
    told = Checked(text)
    assert not {name for name, _ in told.tags} & {"script", "link", "img", "iframe", "object", "image", "use", "base", "form"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in {meta.get("content") for meta in told.all("meta")}
    assert not re.search(r"https?:|url\((?!#)|@import|//\w", text)
    anchors = {attributes["id"] for _, attributes in told.tags if "id" in attributes}
    assert all(link["href"] and link["href"][1:] in anchors for link in told.all("a")) and len(told.all("a")) > 10
    assert not any(key.startswith("on") for _, attributes in told.tags for key in attributes)


def test_text_stays_text(runs: Path) -> None:
    folder = write(
        runs / "<b>bold</b>", "finetune", model=runs / "final", lines=[{"step": 1, EVIL: 2.0}], data=EVIL, layers=STUDENT, parameters=9
    )
    told = read(folder)
    shown = "<script>alert('x')</script>&\"\N{REPLACEMENT CHARACTER}"
    assert told.words.count(shown) >= 3 and "<b>bold</b>" in told.words
    assert not told.all("script") and len(told.all("b")) == len(re.findall("<b[ >]", document.page(page.tell_folder(folder))))
    assert markup.tag("i", "<", title='"><x>', id=None, hidden=True) == '<i title="&quot;&gt;&lt;x&gt;" hidden>&lt;</i>'
    assert markup.join(["a&b", None, [markup.tag("br"), "\ud800"]]) == "a&amp;b<br>\N{REPLACEMENT CHARACTER}"


def test_heads_that_went_are_drawn_hollow_with_their_number() -> None:
    story = Story("t", "t", "", [], None, [], [], False)
    made = counted("prune", {"vision": 1}, heads=2, neurons=128, parameters=10)
    chapter = Chapter(
        Path("x"), "x", "x", made, "0" * 64, structure={"vision.0.head": ([1, 2], 4), "vision.0.neuron": (list(range(128)), 512)}
    )
    story.chapters.append(chapter)
    from efficientvlm.report import structure

    told = Checked(str(structure.section(story)))
    cells = [attributes["class"] for tag, attributes in told.tags if tag == "rect" and attributes.get("class") in ("kept", "gone")]
    assert cells[:4] == ["gone", "kept", "kept", "gone"]
    assert "head 0: removed" in told.words and "head 2: kept" in told.words and "128 of 512 (25 %)" in told.words


def test_layers_of_a_student_know_where_they_were(runs: Path) -> None:
    story = page.tell_folder(runs / "final")
    assert origins(story, story.chapters[-1]) == {"vision": [1, 3], "text": [1], "fusion": [1], "decoder": []}
    assert origins(story, story.chapters[0])["vision"] == [0, 1, 2, 3]


def test_curves_end_where_the_log_ends_and_mark_the_phases(runs: Path) -> None:
    story = page.tell_folder(runs)
    chapter = next(chapter for chapter in story.chapters if chapter.label == "pruned")
    assert chapter.manifest and training.phases(chapter.manifest, chapter.lines) == [(30, "target full"), (60, "structure final")]
    held = chapter.manifest.model_copy(update={"config": chapter.manifest.config | {"sparsity_hold": 0.25}})
    assert training.phases(held, chapter.lines) == [(15, "target rises"), (45, "target full"), (60, "structure final")]
    loss, task, sparsity = (Checked(str(chart)) for chart in training.charts(chapter, chapter.manifest))
    assert "step 100: loss 0.8" in loss.words and "loss" in loss.words and "structure final" in task.words
    assert "step 40: expected 20.0 %, target 40.0 %" in sparsity.words and len(sparsity.all("polyline")) == 2
    xs = [float(point.split(",")[0]) for point in str(loss.all("polyline")[0]["points"]).split()]
    assert xs == sorted(xs) and xs[-1] == charts.WIDTH - charts.RIGHT and len(xs) == 10
    times = Checked(str(training.section(story)))
    assert "pruned" in times.words and "20.0 60.0 3.0 1.0 50" in times.words


def test_axes_hold_every_kind_of_number() -> None:
    for values in ([1e-30], [0.0], [5.0, 5.0], [-3.0, -1.0], [-1e29, 1e29], [1e-11, 1e29], [0.3, 0.0], [1e-300, 1e-299]):
        drawn = str(charts.curves("x", [charts.Line("x", 1, list(enumerate(values, 1)))], len(values)))
        assert "nan" not in drawn and "inf" not in drawn
        assert all(0 <= float(y) <= charts.HEIGHT for y in re.findall(r'y1="([-\d.]+)"', drawn)) and len(re.findall("<text", drawn)) < 20
    assert charts.Axis(0, 0.4).ticks() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert charts.Axis(0.009, 1.2, log=True).ticks() == pytest.approx([0.01, 0.03, 0.1, 0.3, 1])
    points, size = charts.thin([(float(step), 2.0 * step) for step in range(1, 1001)], 100)
    assert (len(points), size) == (100, 10) and points[0] == (10.0, 11.0) and points[-1][0] == 1000.0


def test_the_graph_gives_every_checkpoint_a_place(runs: Path) -> None:
    write(runs / "other", "prune", model=runs / "student", teacher=runs / "teacher", layers=STUDENT, parameters=5)
    story = page.tell_folder(runs)
    places = {chapter.label: lineage.places(story)[chapter.key] for chapter in story.chapters}
    assert len(set(places.values())) == len(places) == 5
    assert places["teacher"][1] < places["student"][1] < places["pruned"][1] < places["final"][1]
    told = Checked(str(lineage.graph(story)))
    assert len([path for path in told.all("path") if "edge" in str(path.get("class"))]) == 7
    assert "pruned from teacher teacher" in str(told.all("svg")[0]["aria-label"])


def test_what_is_wrong_stands_at_the_top(runs: Path) -> None:
    def problems() -> list[str]:
        return [problem.text for problem in page.tell_folder(runs, hashes=False).problems if problem.kind == DAMAGE]

    structure = [text for text in problems() if "which heads it kept" not in text]  # no configuration was written here
    assert structure == [] and "No problem" not in read(runs).words
    weights = runs / "pruned" / "model.safetensors"
    weights.write_text("weightz")
    assert not any("has changed" in text for text in problems())
    told = read(runs, hashes=True)
    assert "runs/pruned/model.safetensors has changed" in told.words and "compared with the sha256" in told.words
    weights.unlink()
    assert "runs/pruned/model.safetensors is missing" in problems()
    shutil.rmtree(runs / "student")
    told = read(runs)
    assert "parent not found" in told.words and "not hashed" in told.words
    assert told.words.index("parent not found") < told.words.index("parameters")
    (runs / "final" / MANIFEST).write_text("{")
    assert any("not valid JSON" in text for text in problems()) and not any("final" == c.label for c in page.tell_folder(runs).chapters)


def test_what_a_reader_ought_to_know_is_noted(runs: Path) -> None:
    write(
        runs / "odd",
        "finetune",
        model=runs / "final",
        layers=STUDENT,
        parameters=5,
        config={"quirks": {"double_sep": True, "epoch_step": False}},
    )
    (runs / "half" / "training_state").mkdir(parents=True)
    result(runs, "final", 0.5, "old.json", provenance={"inputs": {"model": "0" * 64}, "created": "2024"})
    result(runs, "final", 0.5, "retrieval.json", metrics={"recall@1": 0.4})
    result(runs, "final", 0.5, "broken.json", metrics=3)
    (runs / "notes.json").write_text('{"mine": true}')
    with (runs / "final" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5}\n{"step"\n[]\n{"step": 1e999}\n{"step": 6, "loss": NaN}\n' + '{"step": 1' + "0" * 400 + "}\n")
    problems = page.tell_folder(runs).problems
    notes = " | ".join(problem.text for problem in problems if problem.kind == NOTE)
    damage = " | ".join(problem.text for problem in problems if problem.kind == DAMAGE)
    assert "odd: behaviours of the published release were switched on: double_sep |" in notes and "epoch_step" not in notes
    assert "half is unfinished" in notes and "old.json measures checkpoints that are not among these" in notes
    assert "broken.json is not what evlm eval writes" in damage and "final: 5 lines of metrics.jsonl cannot be read" in damage
    assert "notes.json" not in notes + damage and "recall@1 0.4" in read(runs).words


def test_a_huge_file_of_metrics_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with path.open("r+b") as file:
        file.truncate(200 * page.LONGEST_LINE)
    tracemalloc.start()
    try:
        lines, broken = page.read_lines(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * page.LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert lines == [{"step": 1.0}] and broken == 200


def test_manifests_that_cannot_be_drawn_are_left_out_by_name(runs: Path) -> None:
    from efficientvlm.checkpoints import manifest as manifests

    path = runs / "pruned" / MANIFEST
    for change in (
        {"accounting": {"parameters": {"total": 3}}},
        {"extra": {"budget": 3}},
        {"accounting": {}},
        {"config": {"freeze_at": "x", "quirks": 3}},
    ):
        made = manifests.read(runs / "pruned").model_copy(update=change)
        before = path.read_bytes()
        path.write_bytes(made.dump())
        told = read(runs)
        assert ("left out of the figures" in told.words) == ("accounting" in change)
        assert ("cannot be read" in told.words.replace("kept cannot be read", "")) == ("extra" in change)
        path.write_bytes(before)


def test_folders_that_are_neither_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, why in (("empty", "holds no finished checkpoint"), ("file", "is no folder"), ("gone", "does not exist")):
        with pytest.raises(BadInput, match=why) as error:
            page.run(str(tmp_path / name), str(tmp_path / "out.html"))
        assert error.value.exit_code == 3 and not (tmp_path / "out.html").exists()


def test_only_reports_are_replaced(runs: Path) -> None:
    done = page.run(str(runs))
    assert done["path"] == "report-runs.html" and done["problems"] and not done["hashed"]
    before = Path("report-runs.html").read_bytes()
    page.run(str(runs / "final"), "report-runs.html")
    assert Path("report-runs.html").read_bytes() != before and not list(Path().glob(".*"))
    Path("mine.html").write_text("<html>mine</html>")
    for out, why in (("mine.html", "exists already"), ("runs", "folder"), ("nowhere/x.html", "no folder nowhere")):
        with pytest.raises(BadInput) as error:
            page.run(str(runs), out)
        assert why in f"{error.value.what} {error.value.why}"
    assert Path("mine.html").read_text() == "<html>mine</html>"
    page.run(str(runs), "mine.html", force=True)
    assert Path("mine.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_the_command(runs: Path) -> None:
    code, out, _ = evlm(["report", "runs/final", "--out", "final.html"])
    assert code == 0 and out.splitlines()[-1] == "final.html" and all(line.startswith("problem: ") for line in out.splitlines()[:-1])
    code, out, _ = evlm(["report", "runs", "--json", "--verify"])
    told = json.loads(out)
    assert code == 0 and told["hashed"] and [part["label"] for part in told["checkpoints"]] == ["teacher", "student", "pruned", "final"]
    code, out, err = evlm(["report", "."])
    assert (code, out) == (3, "") and len(err.splitlines()) == 3 and "holds no finished checkpoint" in err


def test_a_real_chain(chain: Path, tmp_path: Path) -> None:
    told = read(chain / "pruned")
    assert "No problem was found." in told.words and "head 0: " in told.words and "structure final" in told.words
    before = sorted((path, path.stat().st_mtime_ns) for path in chain.rglob("*"))
    page.run(str(chain), str(tmp_path / "all.html"), hashes=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in chain.rglob("*")) == before
    assert "7 of 7" not in told.words and told.words.count("random weights") >= 1


def test_drawing_a_page_loads_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'matplotlib'}"
    script = f"import sys; import efficientvlm.report.document; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
