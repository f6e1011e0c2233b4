"""What every stage does around its own work: open parents, write the finished folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from efficientvlm.checkpoints import files, influence
from efficientvlm.checkpoints import folder as checkpoint
from efficientvlm.checkpoints.card import sizes
from efficientvlm.checkpoints.folder import Output
from efficientvlm.checkpoints.manifest import Change, Cost, DataRecord, Manifest, peak_memory_bytes
from efficientvlm.compression.accounting import account
from efficientvlm.control import Control
from efficientvlm.data.opening import notes, record
from efficientvlm.data.tokenizer import save_tokenizer
from efficientvlm.errors import BadInput, Diverged, Interrupted, OutOfMemory, number_of
from efficientvlm.families.image_settings import write_settings
from efficientvlm.report.metrics import main_metric, titles
from efficientvlm.runtime import ranks
from efficientvlm.runtime.interrupt import sigterm_as_interrupt
from efficientvlm.runtime.memory import enough_memory, out_of_memory, reason
from efficientvlm.runtime.progress import say, telling
from efficientvlm.settings.common import Learning
from efficientvlm.tasks.influence import Influence, not_measured, tell
from efficientvlm.training.loop import Spent

SKIPPED = "skipped.jsonl"


def open_output(config: Any, stage: str, control: Control, inputs: Mapping[str, str | None]) -> Output:
    """Claim `config.out`; roles without a value are left out. Of several processes the main one does it, and the others know the result.

    Raises:
        BadInput: the output cannot be written.
    """
    settings = config.model_dump()
    given = {role: spec for role, spec in inputs.items() if spec}
    claimed: list[Output] = []

    def claim() -> dict[str, bool]:
        output = Output.open(config.out, stage=stage, inputs=given, config=settings, force=control.force, resume=control.resume)
        claimed.append(output)
        return {"up_to_date": output.up_to_date, "beside": output.beside}

    with telling("hashing what is read", quiet=control.quiet):
        answer = ranks.on_main(claim)
    output = claimed[0] if claimed else Output(files.expanded(config.out), stage, given, {}, settings, mine=False)
    output.up_to_date, output.beside = answer["up_to_date"], answer["beside"]
    if output.up_to_date:
        others = ["what was made is the same; --force makes it anew"] if output.differing else []
        say("\n  ".join([f"{stage}: {output.path} is up to date", *output.differing, *others]), quiet=control.quiet)
    return output


def finished(output: Output) -> Manifest:
    """The manifest of an output that is up to date, on all processes."""
    return ranks.on_main(lambda: checkpoint.require_complete(output.path), Manifest.model_validate)


@contextmanager
def making(output: Output) -> Iterator[None]:
    """Give the output folder up if the block fails; a saved training state stays, and then a stop by signal is resumable.

    Raises:
        Interrupted: stopped by a signal outside the training loop, with a state saved.
        BadInput: the disk is full, or the output cannot be written any more; the last complete state stays.
        OutOfMemory: likewise.
    """
    try:
        with sigterm_as_interrupt():
            yield
    except BaseException as error:
        output.abandon()
        if isinstance(error, KeyboardInterrupt) and output.resumable:
            raise Interrupted("stopped", f"a resumable state is in {output.path}", "run the same command again") from None
        if files.out_of_space(error):
            raise BadInput(
                f"{output.path} cannot be written", "the disk is full", "free some space and run the same command again"
            ) from error
        if isinstance(error, OSError) and isinstance(error.filename, str | Path) and output.path in Path(error.filename).parents:
            why = (error.strerror or "unknown reason").lower()
            raise BadInput(f"{output.path} cannot be written", why, "see to it, and run the same command again") from error
        if out_of_memory(error):
            raise OutOfMemory(f"out of memory in {output.stage}", reason(error), "use a smaller model, or a machine with more") from error
        raise


@contextmanager
def learning(config: Learning, output: Output, grows: Sequence[str] = ()) -> Iterator[None]:
    """Say what to lower where training diverges or takes more memory than there is; `grows` are settings that it grows with besides.

    Raises:
        Diverged, OutOfMemory: the last good state stays.
    """
    again = "; that begins anew, with --force"
    now = {name: getattr(config, name) for name in ("batch_size", *grows, "max_tokens")}
    lower = f"lower {', '.join(f'{name} (now {value})' if value is not None else name for name, value in now.items())}"
    if config.keeps_teacher:
        lower = f"leave {config.keeps_teacher} out, or {lower}"
    try:
        with enough_memory("training", lower, lambda: again * output.resumable):
            yield
    except Diverged as error:
        kept = "; the last good state is kept" * output.resumable
        raise Diverged(error.what, error.why + kept, error.fix + again * output.resumable) from None


def validated(config: Learning, measure: Callable[[], dict[str, Any]], quiet: bool) -> dict[str, Any]:
    """Metrics on validation data; none with `eval_limit` 0. What was trained has been saved before.

    Raises:
        OutOfMemory: saying how the same command comes to its end.
        Diverged: the weights are finite, and what the network makes of them is not.
    """
    if config.eval_limit == 0:
        say("validate: left out, as eval_limit is 0", quiet=quiet)
        return {"images": 0}
    fix = "run the same command with a smaller eval_batch_size or eval_limit (--set eval_limit=0: none); it does not train again"
    with enough_memory("validation", fix):
        metrics = measure()
    if wrong := [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]:
        what = f"on the validation data {', '.join(wrong)} {'are' if len(wrong) > 1 else 'is'} no finite number"
        raise Diverged(what, "training diverged", "try a smaller --lr or weight_decay; that begins anew, with --force")
    return metrics


def observed(title: str, config: Learning, measurement: Callable[[], Influence], quiet: bool) -> Influence:
    """The influence of the inputs at the end of a stage that validates, said; not measured where its validation is left out."""
    found = not_measured("eval_limit is 0") if config.eval_limit == 0 else validated(config, measurement, quiet)
    tell(title, found, quiet)
    return found


def accounted(model: Any) -> dict[str, Any]:
    """What :func:`account` says of a network, for texts of the usual length or as long as it reads."""
    return account(model, text_length=model.config.sizes().usual_text)


def write(
    output: Output,
    family: Any,
    model: Any,
    tokenizer: Any,
    *,
    control: Control,
    image_processor: dict[str, Any] | None = None,
    spent: Spent | None = None,
    sources: dict[str, Any] | None = None,
    **fields: Any,
) -> Manifest:
    """Stage model, tokenizer and image settings (by default a square, resized image), and commit the folder with its accounting."""
    spent = spent or Spent()
    with telling(f"writing {output.path}", quiet=control.quiet):
        model = model.to("cpu", torch.float32).eval()
        family.save(model, output.staging)
        save_tokenizer(tokenizer, output.staging, model.config.stock_start)
        write_settings(image_processor, model.config.sizes(), output.staging)
        list_skipped(output, sources or {}, control.quiet)
        manifest = output.manifest(
            family=family.name,
            accounting=accounted(model),
            data=[DataRecord(**record(source, split)) for split, source in (sources or {}).items()],
            cost=Cost(seconds=round(spent.seconds, 3), samples=spent.samples, peak_memory_bytes=peak_memory_bytes()),
            changes=[Change(**change) for change in spent.changes],
            **fields,
        )
        done = output.commit(manifest)
    say(f"{output.stage}: wrote {output.path} · {summary(done)}", quiet=control.quiet)
    for note in influence.notes(None, influence.read(influence.Reach, done.accounting["reach"])):
        say(f"{output.stage}: {note}", quiet=control.quiet)
    return done


def summary(manifest: Manifest) -> str:
    """Sizes and the task's main metric on validation data in one line."""
    found = main_metric(manifest.metrics.get("val"))
    return sizes(manifest) + (f"  validation {titles()[found[0]]} {found[1]:.4f}" if found else "")


def keep_skipped(output: Output, sources: dict[str, Any], quiet: bool) -> None:
    """Say which samples were skipped so far, and have all of them written down beside the training state, by the main process."""
    for split, source in sources.items():
        if skips := getattr(source, "skips", None):
            say_notes(source, split, quiet)
            say_skipped(source, split, quiet)
            if not output.mine:
                skips.collect()
            ranks.on_main(partial(_keep, output, split, source))


def _keep(output: Output, split: str, source: Any) -> None:
    """Keep what is skipped in a file of this source and of no other: a run that goes on may validate on other data."""
    which = hashlib.sha256(f"{source.name}\0{source.fingerprint}".encode("utf-8", "surrogateescape")).hexdigest()
    source.skips.keep_in(output.state_dir / f"{split}-{which[:16]}-{SKIPPED}")


def gather_skipped(sources: dict[str, Any]) -> None:
    """Tell the main process which samples the others have skipped since the last call; all processes call this together.

    Raises:
        BadInput: in all they are more than may be skipped.
    """
    for source in sources.values() if ranks.world() > 1 else ():
        if skips := getattr(source, "skips", None):
            ours = skips.hand_over()
            theirs = [ranks.tell(ours, number) for number in range(1, ranks.world())]
            ranks.on_main(partial(skips.take_over, theirs))


def say_notes(source: Any, title: str, quiet: bool) -> None:
    """How `source` was read where that was a guess or a part of it."""
    for note in notes(source):
        say(f"{title}: {note}", quiet=quiet)


def say_skipped(source: Any, title: str, quiet: bool) -> None:
    """How many samples of `source` were skipped so far, with the first reasons; nothing if it was none."""
    skips = getattr(source, "skips", None)
    if skips and skips.count:
        say("\n  ".join([f"{title}: {number_of(skips.count, 'sample is', 'samples are')} skipped", *skips.lines()]), quiet=quiet)


def list_skipped(output: Output, sources: dict[str, Any], quiet: bool) -> None:
    """Say which samples were skipped in the end, and put the list into the folder, if there is any."""
    lines = []
    for split, source in sources.items():
        if skips := getattr(source, "skips", None):
            _keep(output, split, source)  # also those beyond the ones that are remembered
            say_skipped(source, split, quiet)
            lines += [json.dumps({"split": split, "sample": what, "reason": why}) + "\n" for what, why in skips.reasons.items()]
    if lines:
        (output.staging / SKIPPED).write_text("".join(lines), encoding="utf-8")
