"""Entry point of `evlm`: the list of commands, and what becomes of errors."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from typing import Annotated

import typer

from efficientvlm.checkpoints.files import out_of_space
from efficientvlm.cli import folders, plan, recipes
from efficientvlm.cli.predict import predict
from efficientvlm.cli.stages import command
from efficientvlm.cli.streams import unbreakable
from efficientvlm.errors import EvlmError, printable, shorten
from efficientvlm.runtime import ranks, waiting
from efficientvlm.runtime.interrupt import deaf, sigterm_as_interrupt
from efficientvlm.runtime.memory import out_of_memory

app = typer.Typer(
    name="evlm",
    help="Make a vision-language model small: shrink, distill, prune, finetune; then measure what came out.",
    epilog="Exit codes: 0 done or up to date, 2 wrong usage, 3 bad input or what the machine refuses, 4 target not reached, "
    "75 interrupted: the same command resumes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

REFUSALS = {
    getattr(errno, name)
    for name in (
        "EACCES",
        "EPERM",
        "EROFS",
        "EIO",
        "EMFILE",
        "ENFILE",
        "ENAMETOOLONG",
        "ELOOP",
        "ENOTDIR",
        "EISDIR",
        "ENXIO",
        "ENODEV",
        "ESTALE",
    )
    if hasattr(errno, name)
}
"""What a system says where it will not, or cannot, give a file."""

PANELS: dict[str, dict[str, Callable[..., None] | None]] = {
    "Make a model": {"init": None, "import": None, "shrink": None},
    "Train": {"pretrain": None, "distill": None, "prune": None, "finetune": None},
    "Prepare data": {"select-sentences": None},
    "Use and measure": {"embed": None, "eval": None, "bench": None, "predict": predict, "export": None},
    "Look into folders": {"inspect": folders.inspect, "verify": folders.verify, "report": folders.report},
    "Whole chains": {"plan": plan.plan, "run": recipes.run},
}
"""Panel → command → its function; those of stages come from their table."""
for panel, functions in PANELS.items():
    for name, function in functions.items():
        app.command(name, rich_help_panel=panel)(function or command(name))
app.add_typer(recipes.app, name="recipes", rich_help_panel="Whole chains")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"evlm {version('efficientvlm')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options that come before the command."""


def main() -> None:
    """Run the command line and exit with its code: those of the help text, 1 for the unexpected, 130 for Ctrl-C without a state."""
    waiting.choose()
    with unbreakable() as out:
        try:
            several = ranks.launched() > 1
            ranks.rank()
        except EvlmError as error:
            several, code = False, _fail(error.exit_code, error.what, error.why, error.fix)
        else:
            code = _run_with_others() if several else _run()
        deaf()
        sys.stdout.flush()
        if out.failure:
            why = (out.failure.strerror or "unknown reason").lower()
            code = code or _fail(3, "the output could not be written", why, "print to another place")
    if several:
        ranks.leave(code)
    sys.exit(code)


def _run_with_others() -> int:
    """Run as one of several processes, of which the main one speaks; another one speaks up only if the main one does not."""
    from efficientvlm.settings.stages import STAGES

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of parameters that happen to be used in the first step
    ours = nullcontext() if ranks.is_main() else redirect_stderr(io.StringIO())
    with ours as said, nullcontext() if ranks.is_main() else redirect_stdout(io.StringIO()):
        try:
            ranks.start()
            shared = len(sys.argv) > 1 and sys.argv[1] in ("run", *STAGES)
            code = _run() if shared or ranks.is_main() else 0
        except EvlmError as error:
            code = _fail(error.exit_code, error.what, error.why, error.fix)
    if ranks.end(code) and said:
        sys.stderr.write(said.getvalue())
    return code


def _run() -> int:
    try:
        with sigterm_as_interrupt():
            app(prog_name="evlm")
    except SystemExit as end:
        if end.code == 130:  # Typer's own answer to Ctrl-C
            return _fail(130, "interrupted", "", "run the same command again")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except EvlmError as error:
        return _fail(error.exit_code, error.what, error.why, error.fix)
    except KeyboardInterrupt:
        return _fail(130, "interrupted", "", "run the same command again")
    except Exception as error:  # noqa: BLE001 - the outermost edge: whatever happens, three lines and no traceback
        return _unexpected(error)
    return 0


def _unexpected(error: Exception) -> int:
    """What the machine refuses is 3, wherever it happens; all else is a fault of ours."""
    reason = " ".join(str(error).split()) or "no further information"
    if out_of_memory(error):
        return _fail(3, "out of memory", reason, "use smaller batches, fewer threads or processes, or a smaller model")
    if out_of_space(error):
        return _fail(
            3, "a file cannot be written", f"the disk is full ({shorten(reason)})", "free some space and run the same command again"
        )
    if isinstance(error, OSError) and error.errno in REFUSALS:
        what = f"{error.filename} cannot be used" if error.filename else "the system refuses"
        return _fail(3, what, (error.strerror or reason).lower(), "check the path, its permissions and its disk")
    if isinstance(error, FileNotFoundError) and not _here():
        return _fail(3, "the working folder is gone", "it was removed while a shell was in it", "change to another folder")
    return _fail(1, f"unexpected {type(error).__name__}", reason, "set EVLM_DEBUG=1 to see where it happened, and report it")


def _here() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _fail(code: int, what: str, why: str, fix: str) -> int:
    if os.environ.get("EVLM_DEBUG", "") not in ("", "0"):
        print(printable(traceback.format_exc()), file=sys.stderr)
    error = EvlmError(what, why, fix)  # within bounds, and without what a terminal obeys
    what, why, fix = error.what, error.why, error.fix
    several = "\n" in why
    reasons = [f"  why: {why}"] if not several else ["  why:", *(f"    {line.strip()}" for line in why.strip().splitlines())]
    with suppress(OSError):  # the terminal was closed: the code says the same
        print("\n".join([f"error: {what}", *(reasons if why else []), *([f"  do:  {fix}"] if fix else [])]), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
