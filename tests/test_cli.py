"""The contract of the command line: exit codes, three-line errors, what goes to stdout, what is imported. No stage runs here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import pytest

import efficientvlm
from efficientvlm import control
from efficientvlm.checkpoints.folder import MANIFEST, Output
from efficientvlm.checkpoints.manifest import DataRecord, digest
from efficientvlm.cli import main as cli
from efficientvlm.cli import output, streams
from efficientvlm.cli.options import OPTIONS
from efficientvlm.cli.stages import COMMANDS as STAGE_COMMANDS
from efficientvlm.errors import BadInput, Diverged, Interrupted, TargetMissed
from efficientvlm.runtime.progress import say
from efficientvlm.settings.compose import stage_settings, tasks_of, variants
from efficientvlm.settings.stages import STAGES
from efficientvlm.settings.tasks import ABOUT

HEAVY = {"torch", "transformers", "datasets", "accelerate", "matplotlib", "numpy"}
COMMANDS = [
    *(
        "init",
        "import",
        "pretrain",
        "shrink",
        "distill",
        "prune",
        "finetune",
        "eval",
        "bench",
        "predict",
        "export",
        "select-sentences",
        "inspect",
        "verify",
        "run",
    ),
    "report",
    *("recipes ls", "recipes cat", "recipes cp", "recipes validate"),
    "plan",
]


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "EVLM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


def make(path: Path, stage: str = "finetune", **inputs: str) -> Path:
    output = Output.open(path, stage=stage, inputs=inputs, config={"task": "vqa", "data": "easy-vqa", "out": str(path)})
    (output.staging / "model.safetensors").write_text("weights")
    output.commit(
        output.manifest(
            family="xvlm",
            origin=None if inputs else "random",
            data=[DataRecord(name="easy-vqa", split="train", count=5, fingerprint="ab", licence="MIT")],
            metrics={"accuracy": 0.9712},
            accounting={
                "parameters": {"total": 1_830_000, "by_tower": {"vision": 1}},
                "macs": {"total": 123_400_000},
                "units": {"vision.0.head": {"kept": 3, "of": 4}, "vision.0.neuron": {"kept": 0, "of": 512}},
                "sparsity": {"achieved": 0.4001},
            },
        )
    )
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    make(tmp_path / "teacher")
    make(tmp_path / "student", "shrink", model=str(tmp_path / "teacher"))
    return make(tmp_path / "small", "prune", model=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))


@pytest.fixture
def fake_stage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stages replaced by one that remembers what it was called with and returns or raises what the test puts into `result`."""
    seen: dict[str, Any] = {}

    def run(config: Any, how: control.Control) -> Any:
        seen.update(config=config, control=how)
        if isinstance(seen.get("result"), BaseException):
            raise seen["result"]
        return seen["result"] if "result" in seen else Path(config.out)

    for name in ("init", "import_", "learning", "shrink", "prune", "evaluate", "bench"):
        monkeypatch.setitem(sys.modules, f"efficientvlm.stages.{name}", SimpleNamespace(run=run))
    return seen


@pytest.mark.parametrize("command", [[], *(command.split() for command in COMMANDS)], ids=" ".join)
def test_every_command_has_help(evlm: Any, command: list[str]) -> None:
    code, out, err = evlm(*command, "--help")
    assert code == 0 and "Usage: evlm" in out and err == ""


def words_of(annotation: Any) -> set[str]:
    """The texts that a type allows by name."""
    if get_origin(annotation) is Literal:
        return {word for word in get_args(annotation) if isinstance(word, str)}
    return {word for inner in get_args(annotation) for word in words_of(inner)}


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_the_help_of_an_option_names_every_word_that_its_setting_takes(command: str) -> None:
    """They are written by hand, since reading the settings would double the time of `evlm --help`."""
    asked = [about.asked for about in ABOUT.values() if about.asked]
    for name in STAGE_COMMANDS[command].options:
        fields = [kind.model_fields.get(name) for kind in (variants(command) if command in STAGES else asked)]
        words = {word for field in fields if field for word in words_of(field.annotation)}
        if name == "task":
            words |= set(tasks_of(command)) if command in STAGES else {task for task, about in ABOUT.items() if about.asked}
        said = OPTIONS.get(f"{command}.{name}", OPTIONS[name]).annotation.__metadata__[0].help
        assert not [word for word in sorted(words) if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said)], f"{name}: {said}"


def test_light_commands_import_nothing_heavy_and_answer_at_once(chain: Path) -> None:
    script = f"""
import sys
from efficientvlm.cli import main
codes = []
for line in (["--help"], ["prune", "--help"], ["inspect", {str(chain)!r}], ["verify", {str(chain)!r}], ["recipes", "ls"],
             ["recipes", "validate", "quickstart"], ["plan", "--help"], ["prune", "--model", "nowhere"],
             ["shrink", "--model", "nowhere", "--out", "x"]):
    sys.argv = ["evlm", *line]
    codes.append(main._run())
print(codes, sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 0, 2, 3] []", done.stderr


def test_a_stage_loads_nothing_that_only_others_need() -> None:
    """transformers' base class of models brings the rest; it is loaded with the family of the model that is opened."""
    others = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.onnx._internal.exporter"}
    others |= {"accelerate", "transformers.modeling_utils", "onnxruntime", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "sympy"}
    others |= {"matplotlib", "tokenizers"}
    script = f"""
import gc, sys
from efficientvlm.stages.run import module_of
for stage in ("shrink", "predict", "eval"):
    module_of(stage)
    print(stage, sorted({others!r} & set(sys.modules)), gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{stage} [] True" for stage in ("shrink", "predict", "eval")], done.stdout + done.stderr


def test_version_and_no_arguments(evlm: Any) -> None:
    assert evlm("--version") == (0, f"evlm {efficientvlm.__version__}\n", "")
    code, out, _ = evlm()
    assert code == 2 and "Usage" in out


def test_predict_has_the_options_that_tasks_ask_for() -> None:
    from efficientvlm.cli.stages import COMMANDS
    from efficientvlm.settings.tasks import ABOUT

    asked = {name for about in ABOUT.values() if about.asked for name in about.asked.model_fields}
    assert {*COMMANDS["predict"].options} == asked | {"json", "quiet", "task"}


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "shrink --nonsense",
        "shrink --out x",
        "shrink --model m",
        "prune --sparsity much",
        "prune --model m --data d",
        "distill --model m --data d --out o",
        "bench",
        "eval --model m",
        "predict --model m",
        "shrink --model m --out o --layers vision",
        "shrink --model m --out o --layers vision=a",
        "eval --model m --data d --column question",
        "inspect",
        "recipes cat",
        "run",
    ],
)
def test_wrong_usage_exits_2(evlm: Any, line: str) -> None:
    code, out, err = evlm(*line.split(" "))
    assert code == 2 and out == "" and "Traceback" not in err and err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("shrink --model nowhere --out o", "'nowhere' does not exist"),
        ("inspect nowhere", "does not exist"),
        ("verify bundled:nothing", "no bundled checkpoint"),
        ("shrink --model teacher --out o --set lyers=3", "lyers: unknown key, did you mean layers?"),
        ("prune --model teacher --data d --out o --sparsity 1.5", "sparsity: input should be less than 1"),
        ("prune --model teacher --data d --out o --sparsity nan", "sparsity"),
        ("prune --model teacher --data d --out o --set gates.head_int=3", "gates.head_int: unknown key, did you mean head_init?"),
        ("prune --model teacher --data d --out o --set sparsity", "not key=value"),
        ("finetune --model teacher --data d --out o --task nlvr", "task"),
        ("finetune --model teacher --data d --out o --precision fp8", "precision"),
        ("import --model teacher --tokenizer teacher --out o", "neither a file nor a folder with a config.json"),
        ("import --model nowhere --out o", "does not exist"),
        ("predict --model teacher --image nowhere.png --question what?", "nowhere.png"),
        ("predict --model teacher --image teacher --question what?", "it is not a file"),
        ("run quikstart", "did you mean quickstart?"),
        ("run quickstart --set pruned.sparsty=0.3", "did you mean sparsity?"),
        ("recipes cp quickstart no/such/folder.yaml", "no folder"),
    ],
)
def test_bad_input_exits_3_in_three_lines(evlm: Any, chain: Path, line: str, words: str) -> None:
    code, out, err = evlm(*line.split(" "))
    assert code == 3 and out == "" and words in err
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and lines[1].startswith("  why:") and "Traceback" not in err
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--mode guess", "--mode: input should be 'rank' or 'generate'"),
        ("--top 0", "--top: input should be greater than or equal to 1"),
        ("--max-tokens 2", "--max-tokens: input should be greater than or equal to 4"),
        ("--question ", "--question: it is empty"),
        ("--image b", "--image: it has 2 entries, and takes at most 1"),
    ],
)
def test_a_question_with_a_wrong_value_is_wrong_usage(evlm: Any, given: str, words: str) -> None:
    code, out, err = evlm(*"predict --model nowhere --image a --question what?".split(), *given.split(" "))
    assert code == 2 and out == "" and words in err and "nowhere" not in err


def test_an_unfinished_input_is_refused_before_anything_is_loaded(evlm: Any, tmp_path: Path) -> None:
    Output.open(tmp_path / "half", stage="prune", inputs={}, config={})
    code, _, err = evlm("shrink", "--model", tmp_path / "half", "--out", "o")
    assert code == 3 and "interrupted" in err and "it resumes" in err


def test_only_given_options_reach_the_configuration(evlm: Any, chain: Path, fake_stage: dict[str, Any]) -> None:
    line = "prune --model student --teacher teacher --data shapes --out small --column question=text --column answer=label"
    code, out, err = evlm(*line.split(), "--set", "gates.lr=3e-2", "--set", "epochs=3", "--epochs", "2", "--no-resume", "--force")
    assert (code, err) == (0, ""), err
    config = fake_stage["config"]
    assert config.model_fields_set == {"model", "teacher", "data", "out", "columns", "gates", "epochs"}
    assert config.columns == {"question": "text", "answer": "label"} and config.gates.lr == 0.03 and config.epochs == 3
    assert fake_stage["control"] == control.Control(force=True, resume=False, quiet=False, json=False)
    assert out.splitlines()[-1] == "small" and "parameters: 1,830,000" in out


def test_layers_and_repeated_options(evlm: Any, chain: Path, fake_stage: dict[str, Any]) -> None:
    code, _, err = evlm("shrink", "--model", "teacher", "--out", "small", *"--layers vision=6 --layers text=1,3 --layers fusion=2,".split())
    assert (code, err) == (0, "") and fake_stage["config"].layers == {"vision": 6, "text": [1, 3], "fusion": [2]}
    fake_stage["result"] = {"latency": [{"model": "teacher", "ms": {"1": 2.5}}, {"model": "small", "extra": 1}], "threads": 2}
    code, out, err = evlm("bench", "--model", "teacher", "--model", "small", "--batch-size", 1, "--batch-size", 4)
    assert (code, err) == (0, ""), err
    assert fake_stage["config"].models == ["teacher", "small"] and fake_stage["config"].batch_sizes == [1, 4]
    assert "ms.1" in out and "2.5" in out and "threads" not in out


def test_a_recut_needs_neither_model_nor_data(evlm: Any, chain: Path, fake_stage: dict[str, Any]) -> None:
    code, _, err = evlm("prune", "--from-gates", "small", "--sparsity", 0.6, "--out", "student")
    assert (code, err) == (0, "") and fake_stage["config"].model_fields_set == {"from_gates", "sparsity", "out"}
    for words, missing in ((("--data", "shapes"), "--model"), (("--model", "small"), "--data")):
        code, _, err = evlm("prune", *words, "--out", "student")
        assert code == 2 and missing in err


def test_a_dry_run_finds_data_that_is_not_there(evlm: Any, chain: Path) -> None:
    code, _, err = evlm("finetune", "--model", "small", "--data", "esy-vqa", "--out", "o", "--dry-run")
    assert code == 3 and "did you mean easy-vqa?" in err


def test_json_is_exactly_one_object(evlm: Any, chain: Path, fake_stage: dict[str, Any]) -> None:
    fake_stage["result"] = chain
    for line in (
        "prune --model student --data shapes --out small --json",
        "inspect small --json",
        "inspect --schema",
        "verify small --json",
        "recipes ls --json",
        "recipes validate quickstart --json",
    ):
        code, out, err = evlm(*line.split())
        assert (code, err) == (0, ""), line
        assert isinstance(json.loads(out), dict), line
    assert fake_stage["control"].quiet
    fake_stage["result"] = {"accuracy": 0.5}
    assert json.loads(evlm("eval", "--model", "small", "--data", "shapes", "--json")[1]) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (BadInput("a", "b", "c"), 3, ["error: a", "  why: b", "  do:  c"]),
        (BadInput("a", "\n  b\n  c"), 3, ["error: a", "  why:", "    b", "    c"]),
        (TargetMissed("sparsity 0.9 cannot be met"), 4, ["error: sparsity 0.9 cannot be met"]),
        (
            Interrupted("stopped", "a state was written", "run it again"),
            75,
            ["error: stopped", "  why: a state was written", "  do:  run it again"],
        ),
        (KeyboardInterrupt(), 130, []),
        (OSError(28, "No space left on device"), 3, ["error: a file cannot be written"]),
        (PermissionError(13, "Permission denied", "x/y"), 3, ["error: x/y cannot be used", "  why: permission denied"]),
        (OSError(30, "Read-only file system", "x"), 3, ["error: x cannot be used", "  why: read-only file system"]),
        (OSError(36, "File name too long", "x" * 300), 3, [f"error: {'x' * 133}…{'x' * 66} cannot be used", "  why: file name too long"]),
        (OSError(40, "Too many levels of symbolic links", "l"), 3, ["error: l cannot be used"]),
        (MemoryError(), 3, ["error: out of memory"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 3, ["error: out of memory"]),
        (Diverged("the loss is nan", "training diverged", "try a smaller --lr"), 3, ["error: the loss is nan"]),
        (FileNotFoundError(2, "No such file or directory", "ours"), 1, ["error: unexpected FileNotFoundError"]),
        (
            BadInput("\x1b]0;owned\x07", "x" * 5000, "\x9b"),
            3,
            ["error: \\x1b]0;owned\\x07", f"  why: {'x' * 133}…{'x' * 66}", "  do:  \\x9b"],
        ),
        (RuntimeError("two\nlines"), 1, ["error: unexpected RuntimeError", "  why: two lines"]),
    ],
)
def test_exit_codes_and_messages(evlm: Any, chain: Path, fake_stage: dict[str, Any], error: Exception, code: int, lines: list[str]) -> None:
    fake_stage["result"] = error
    found, out, err = evlm("shrink", "--model", "teacher", "--out", "o")
    assert found == code and out == ""
    assert err.splitlines()[: len(lines)] == lines and "Traceback" not in err
    assert code != 1 or "EVLM_DEBUG=1" in err


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": ""}, ""),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": "-1"}, ""),
    ],
)
def test_a_launcher_that_sets_nonsense(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evlm", "--version"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    if named:
        assert ended.value.code == 3 and out == "" and len(err.splitlines()) == 3 and f"error: {named}" in err
    else:
        assert ended.value.code == 0 and out.startswith("evlm ") and err == ""


def test_one_of_several_processes_ends_without_taking_the_interpreter_down() -> None:
    """There, a thread of gloo that still holds a tensor would abort the process."""
    program = """
import atexit
from efficientvlm.cli.main import main
class Ghost:
    def __del__(self):
        print("destroyed with the interpreter")
ghost = Ghost()
atexit.register(print, "registered for the end")
main()
"""
    for variables, code in (({"WORLD_SIZE": "2", "RANK": "0"}, 3), ({}, 0)):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")} | variables
        command = [sys.executable, "-c", program, "inspect", "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code and ("the processes do not find one another" in done.stderr) == bool(variables), done.stderr
        assert "registered for the end" in done.stdout and ("destroyed" in done.stdout) != bool(variables)


def test_a_traceback_on_request(evlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVLM_DEBUG", "1")
    code, _, err = evlm("inspect", "nowhere")
    assert code == 3 and "Traceback" in err and "error: 'nowhere' does not exist" in err


def test_inspect_shows_the_lineage(evlm: Any, chain: Path) -> None:
    code, out, err = evlm("inspect", "small")
    assert (code, err) == (0, ""), err
    for part in (
        "small  prune",
        "model: ",
        "teacher: ",
        "(random)",
        "1.83 M parameters",
        "123 M MACs",
        "sparsity 0.400",
        "accuracy 0.9712",
    ):
        assert part in out
    assert "heads" not in out and "vision 0: 3/4 heads, 0/512 neurons" in evlm("inspect", "small", "--units")[1]
    root = json.loads(evlm("inspect", "small", "--json")[1])
    assert [parent["role"] for parent in root["parents"]] == ["model", "teacher"]
    assert root["manifest"]["stage"] == "prune"
    assert {node["path"]: node["manifest"]["origin"] for node in root["ancestors"]}[root["parents"][1]["path"]] == "random"


def test_verify_tells_good_from_bad(evlm: Any, chain: Path, tmp_path: Path) -> None:
    code, out, err = evlm("verify", "small")
    assert (code, err) == (0, "") and out.splitlines() == ["all files of 3 checkpoints are as they were written", "small"]
    (tmp_path / "teacher" / "model.safetensors").write_text("Weights")
    code, out, err = evlm("verify", "small")
    assert code == 3 and out == "" and "teacher/model.safetensors has changed" in err
    code, out, _ = evlm("verify", "small", "--json")
    assert code == 3 and json.loads(out)["ok"] is False and len(json.loads(out)["problems"]) == 1
    (tmp_path / "small" / MANIFEST).write_bytes(b"\xff")
    assert evlm("verify", "small")[0] == 3 and evlm("inspect", "small")[0] == 3


def test_recipes_are_listed_shown_copied_and_checked(evlm: Any, tmp_path: Path) -> None:
    assert "quickstart" in evlm("recipes", "ls")[1]
    text = evlm("recipes", "cat", "quickstart")[1]
    assert evlm("recipes", "cp", "quickstart", "mine.yaml")[1] == "mine.yaml\n"
    assert Path("mine.yaml").read_text(encoding="utf-8") == text
    assert evlm("recipes", "cp", "quickstart", "mine.yaml")[0] == 3
    assert evlm("recipes", "cp", "quickstart", "mine.yaml", "--force")[0] == 0
    assert evlm("recipes", "cp", "mine.yaml", tmp_path, "--force")[1].strip().endswith("mine.yaml")
    assert evlm("recipes", "validate", "mine.yaml")[1].splitlines()[-1] == "quickstart is valid"


def test_run_hands_the_checked_stages_over(evlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run_recipe(steps: Any, how: Any) -> dict[str, Any]:
        seen.update(steps=steps, how=how)
        return {"stages": [{"name": step.name, "seconds": 1.5} for step in steps], "result": seen.get("result")}

    monkeypatch.setattr("efficientvlm.stages.run.run_recipe", run_recipe)
    code, out, _ = evlm("run", "quickstart", "--out", "here", "--set", "pruned.sparsity=0.5", "--quiet")
    assert code == 0 and out.splitlines()[-1] == "here" and seen["how"].quiet
    assert {step.name: step.config for step in seen["steps"]}["pruned"].sparsity == 0.5
    seen["result"] = {"text": "a table\n"}
    assert evlm("run", "quickstart", "--out", "here")[1] == "a table\nhere\n"


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_colour_on_a_terminal_only_and_never_with_no_color(chain: Path) -> None:
    import pty

    def seen(**environment: str) -> bytes:
        leader, follower = pty.openpty()
        base = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        with subprocess.Popen(
            [sys.executable, "-m", "efficientvlm.cli.main", "inspect", str(chain)],
            stdout=follower,
            env={**base, "TERM": "xterm-256color", **environment},
        ):
            os.close(follower)
            content = b""
            while True:
                try:
                    part = os.read(leader, 65536)
                except OSError:
                    break
                if not part:
                    break
                content += part
        os.close(leader)
        return content

    def coloured(text: bytes) -> bool:
        return any(b"\x1b[%d" % code in text for code in range(30, 38))

    assert coloured(seen()) and not coloured(seen(NO_COLOR="1"))
    piped = subprocess.run([sys.executable, "-m", "efficientvlm.cli.main", "inspect", str(chain)], capture_output=True, check=True)
    assert b"\x1b" not in piped.stdout + piped.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"out": ""}, "out: it is empty"),
        ({"out": "  "}, "out: it is empty"),
        ({"lr": True}, "lr: it is no switch that could be true"),
        ({"limit": False}, "limit: it is no switch that could be false"),
        ({"weights": {"logits": True}}, "weights.logits: it is no switch"),
        ({"seed": 2**63}, "seed: input should be less than"),
        ({"from_gates": "pruned", "method": "random"}, "method: the gates that were learnt choose; leave method out"),
    ],
)
def test_values_that_mean_nothing(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        stage_settings("prune", {"model": "m", "data": "easy-vqa", "out": "o", **options}, "evlm prune")
    assert refused.value.what == "evlm prune has 1 wrong setting"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_goes_nowhere_is_an_error(buffered: bool) -> None:
    command = [sys.executable, *(() if buffered else ("-u",)), "-m", "efficientvlm.cli.main", "--version"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 3 and "Traceback" not in done.stderr and "no space left on device" in done.stderr.lower()
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 3


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_pipe_that_does_not_wait_for_its_reader_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer is full when a write comes: nothing is lost, and nothing counts as a failure."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    content, found = bytes(range(256)) * 2000, bytearray()

    def read_all() -> None:
        while part := os.read(reader, 4096):
            found.extend(part)

    raw = streams._Raw(writer)
    thread = threading.Thread(target=read_all)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"\0" * 4096):
            pass
    thread.start()
    with io.BufferedWriter(raw) as out:
        out.write(content)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert raw.failure is None and found.lstrip(b"\0") == content.lstrip(b"\0")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_without_a_state_exits_130(tmp_path: Path) -> None:
    script = """
import sys, types, os, signal
def run(config, control):
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(5)
sys.modules["efficientvlm.stages.shrink"] = types.SimpleNamespace(run=run)
sys.argv = ["evlm", "shrink", "--model", sys.argv[1], "--out", "o"]
from efficientvlm.cli.main import main
main()
"""
    make(tmp_path / "teacher")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "teacher")], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`command` run by bash in `folder`, `evlm` being this program."""
    program = f'evlm() {{ "{sys.executable}" -m efficientvlm.cli.main "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.mark.skipif(os.name == "nt", reason="shell")
def test_a_reader_that_leaves_changes_neither_code_nor_is_it_spoken_of(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    for command, code in (
        ("evlm inspect --schema | head -c 9 >/dev/null", 0),
        ("evlm recipes cat quickstart >&-", 0),
        ("evlm inspect nowhere 2>&-", 3),
        ("evlm inspect nowhere 2>&1 >/dev/null | true", 3),
        ("evlm verify nowhere --json | true", 3),
    ):
        done = shell(command, tmp_path)
        assert (done.returncode, done.stderr if "2>" not in command else "") == (code, done.stderr if code else ""), command
        assert "unexpected" not in done.stderr + done.stdout and "Traceback" not in done.stderr
    done = shell("cd gone && rmdir ../gone && evlm inspect nowhere", tmp_path)
    assert done.returncode == 3 and "the working folder is gone" in done.stderr


EVIL = "\x1b]0;owned\x07\x1b[31m\x9b\u202e\r\udcff"


def test_nothing_that_a_terminal_obeys_comes_out_of_a_manifest(evlm: Any, chain: Path) -> None:
    path = chain / "evlm_manifest.json"
    values = json.loads(path.read_text("utf-8"))
    evil = EVIL.replace("\udcff", "")
    values |= {"stage": evil, "metrics": {evil: evil, "accuracy": 0.5}, "family": evil}
    values["files"] = {evil: {"sha256": "0" * 64, "bytes": 1}}
    values["digest"] = digest(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    for words in (
        "inspect small",
        "inspect small --units",
        "inspect small --json",
        "verify small",
        "verify small --json",
        "report small --out r.html",
    ):
        code, out, err = evlm(*words.split())
        assert code in (0, 3) and not set(EVIL) & set(out + err) - set("]0;owned[31m"), words
        if "--json" in words:
            assert "owned" in json.dumps(json.loads(out))


def test_what_is_printed_is_what_the_terminal_can_show(capsys: pytest.CaptureFixture[str]) -> None:
    output.mapping_result({"answer": EVIL, "answers": [{"text": EVIL, "p": 0.5}], "list": [EVIL]}, EVIL, as_json=False)
    output.records_table([{EVIL: EVIL}])
    say(EVIL)
    shown = capsys.readouterr()
    assert not set(EVIL) & set(shown.out + shown.err) - set("]0;owned[31m") and "\\x1b]0;owned" in shown.out
    output.emit({EVIL: EVIL})
    text = capsys.readouterr().out
    assert not set(EVIL) & set(text) - set("]0;owned[31m") and json.loads(text) == {EVIL: EVIL}
