"""What every stage does around its own work: open parents, write the finished folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from efficientvlm import checkpoint, families, files, influence, ranks
from efficientvlm.card import sizes
from efficientvlm.checkpoint import Output
from efficientvlm.compression.accounting import account
from efficientvlm.control import Control
from efficientvlm.data.opening import is_built_in, notes, record
from efficientvlm.data.preprocessing import Preprocessing
from efficientvlm.data.stream import PREFIX as STREAM
from efficientvlm.data.stream import check_settings
from efficientvlm.data.texts import Texts
from efficientvlm.data.tokenizer import load_tokenizer, require_ids, save_tokenizer
from efficientvlm.errors import BadInput, Diverged, Interrupted, OutOfMemory
from efficientvlm.families import loading
from efficientvlm.families.base import Sizes
from efficientvlm.families.exported import Exported, is_exported
from efficientvlm.interrupt import sigterm_as_interrupt
from efficientvlm.manifest import Change, Cost, DataRecord, Manifest, peak_memory_bytes
from efficientvlm.memory import enough_memory, out_of_memory, reason
from efficientvlm.metrics import TITLES, main_metric
from efficientvlm.progress import say, telling
from efficientvlm.settings.base import Strict
from efficientvlm.stages.image_settings import preprocessing_of, write_settings
from efficientvlm.training import Spent

TEXT_LENGTH = 12
SHORTEST = 3  # first and last token, and one between them
SKIPPED = "skipped.jsonl"


@dataclass
class Loaded:
    """A finished checkpoint in memory."""

    path: Path
    family: Any
    model: Any
    tokenizer: Any
    manifest: Manifest

    @property
    def sizes(self) -> Sizes:
        sizes: Sizes = self.family.sizes(self.model.config)
        return sizes

    @property
    def image_processor(self) -> dict[str, Any] | None:
        """The settings in its `preprocessor_config.json`, which what is made of it keeps."""
        return loading.image_processor(self.path)

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become what it reads; :class:`BadInput` if its files contradict one another, or say what is not followed here."""
        return preprocessing_of(self.image_processor, self.sizes, self.path)

    @property
    def tasks(self) -> frozenset[str]:
        """What it does as it is: vqa, pretraining, retrieval, captioning, ..."""
        tasks: frozenset[str] = self.family.tasks(self.model.config)
        return tasks


def load(spec: str, *, weights: bool = True, exported: bool = False) -> Loaded:
    """The checkpoint `spec` names, checked against its manifest.

    Args:
        weights: False gives a model on the meta device, of the shapes in `config.json`; no weight file is opened.
        exported: whether a folder of ONNX graphs will do: it can be asked and measured, and nothing else.

    Raises:
        BadInput: an unfinished or damaged folder, or a tokenizer that does not fit the model.
    """
    manifest = checkpoint.require_complete(spec)
    path = files.resolve(spec)
    family = Exported.of_folder(path) if exported and is_exported(path) else families.of_folder(path)
    model = family.load(path) if weights else shapes(family, family.read_config(path))
    tokenizer = load_tokenizer(path)
    require_ids(tokenizer, family.sizes(model.config).vocab_size, path)
    return Loaded(path, family, model, tokenizer, manifest)


def shapes(family: Any, config: Any) -> Any:
    """A model of the shapes in `config` on the meta device, which holds no values and takes no memory."""
    with torch.device("meta"):
        return family.build(config).eval()


def check_precision(loaded: Loaded, precision: str) -> None:
    """:class:`BadInput` where another precision is asked of ONNX graphs than fp32, which stands for their own."""
    if is_exported(loaded.path) and precision != "fp32":
        raise BadInput(f"{loaded.path} does not run in {precision}", "ONNX graphs compute in their own precision", "leave --precision out")


def no_answers(loaded: Loaded, role: str = "") -> BadInput:
    """What to say of a model that has no answer decoder: how it can get one, or else what it is for."""
    what = f"{role} {loaded.path} answers no questions".lstrip()
    other = sorted(loaded.tasks - {"vqa"}) if "pretraining" not in loaded.tasks else []
    if not other and "mlm" not in loaded.model.config.heads:
        fix = "finetune with --task vqa the pre-trained model it comes from, or this one with a --teacher that answers questions"
        return BadInput(what, "it has neither an answer decoder nor an MLM head to start one from", fix)
    if not other:
        return BadInput(what, "it has no answer decoder", "finetune it with --task vqa first")
    return BadInput(what, f"it is a model for {' and '.join(other)}", "use one that answers questions, an X-VLM or a BLIP for VQA")


def texts_of(loaded: Loaded, max_tokens: int | None = None) -> Texts:
    """Texts as token ids for this model, at most as long as :func:`text_length` says."""
    return Texts(loaded.tokenizer, text_length(loaded, max_tokens))


def text_length(loaded: Loaded, asked: int | None = None) -> int:
    """Tokens of the longest text, its first and last included: as asked, as the model was tuned, as is usual, or all positions.

    Raises:
        BadInput: more are asked for than it has positions.
    """
    positions, config, manifest = loaded.sizes.max_positions, loaded.model.config, loaded.manifest
    if asked is not None and asked > positions:
        raise BadInput(f"max_tokens {asked}", f"{loaded.path} has {positions} positions for tokens", f"use at most {positions}")
    tuned = config.max_tokens or manifest.noted("max_tokens", int | None, None)
    return max(SHORTEST, min(asked or tuned or getattr(config, "usual_tokens", None) or positions, positions))


def keep_length(loaded: Loaded, asked: int | None) -> None:
    """Note in the model's configuration how long the texts are that it reads from now on, in what is written of it too."""
    loaded.model.config.max_tokens = text_length(loaded, asked)


def pair_problems(student: Loaded, teacher: Loaded) -> Iterator[BadInput]:
    """Every reason why `teacher` cannot teach `student`: they must read the same batches, in towers of one width."""
    if student.family.name != teacher.family.name:
        yield BadInput(
            f"teacher is {teacher.family.name}, student is {student.family.name}",
            "distillation needs one family",
            "use a teacher of the student's family",
        )
        return
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        yield BadInput(
            "teacher and student have different tokenizers", f"{teacher.path} and {student.path}", "shrink the student from this teacher"
        )
    yield from size_problems(student.sizes, teacher.sizes)
    if student.sizes.image_size == teacher.sizes.image_size and student.preprocessing != teacher.preprocessing:
        why = f"preprocessor_config.json in {teacher.path} and {student.path} resize or crop in another way"
        yield BadInput("teacher and student read pictures of another form", why, "shrink the student from this teacher")


def size_problems(ours: Sizes, theirs: Sizes) -> Iterator[BadInput]:
    """What keeps student and teacher from being compared: towers of other width or heads, images of another size."""
    parts = {
        **{
            f"{tower} {name}": (theirs.shapes(tower)[name], values)
            for tower in ours.widths
            for name, values in ours.shapes(tower).items()
            if values and theirs.shapes(tower)[name]
        },
        "patch size": ([theirs.patch_size], [ours.patch_size]),
    }
    spelled = {name: tuple(", ".join(map(str, values)) for values in pair) for name, pair in parts.items()}
    if differ := [f"{name} {teacher} and {student}" for name, (teacher, student) in spelled.items() if teacher != student]:
        yield BadInput(
            "teacher and student have other sizes", ", ".join(differ), "shrink the student from this teacher: shrinking keeps them"
        )
    if ours.image_size != theirs.image_size:
        sizes = f"{theirs.image_size} and {ours.image_size} px"
        yield BadInput("teacher and student read images of different size", sizes, "shrink the student from this teacher")


def open_output(config: Any, stage: str, control: Control, inputs: dict[str, str | None]) -> Output:
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
        told = ranks.on_main(claim)
    output = claimed[0] if claimed else Output(files.expanded(config.out), stage, given, {}, settings, mine=False)
    output.up_to_date, output.beside = told["up_to_date"], told["beside"]
    if output.up_to_date:
        others = ["what was learnt is the same; evlm eval measures it, --force makes it anew"] if output.differing else []
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
def learning(config: Any, output: Output) -> Iterator[None]:
    """Say what to lower where training diverges or takes more memory than there is.

    Raises:
        Diverged, OutOfMemory: the last good state stays.
    """
    again = "; that begins anew, with --force"
    names = [name for name in ("batch_size", "questions_per_image", "max_tokens") if name in type(config).model_fields]
    lower = f"lower {', '.join(f'{name} (now {getattr(config, name)})' for name in names)}"
    if getattr(config, "cache_teacher", False):
        lower = f"leave cache_teacher out, or {lower}"
    try:
        with enough_memory("training", lower, lambda: again * output.resumable):
            yield
    except Diverged as error:
        kept = "; the last good state is kept" * output.resumable
        raise Diverged(error.what, error.why + kept, error.fix + again * output.resumable) from None


def validated(config: Any, measure: Callable[[], dict[str, Any]], quiet: bool) -> dict[str, Any]:
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
        save_tokenizer(tokenizer, output.staging)
        write_settings(image_processor, family.sizes(model.config), output.staging)
        list_skipped(output, sources or {}, control.quiet)
        manifest = output.manifest(
            family=family.name,
            accounting=account(family, model, text_length=TEXT_LENGTH),
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
    return sizes(manifest) + (f"  validation {TITLES[found[0]]} {found[1]:.4f}" if found else "")


def which(config: Any, split: str) -> dict[str, Any]:
    """What to open for `split`: validation data of its own is read whole, and then nothing is held out of the training data.

    Raises:
        BadInput: a stream to train on, without what a stream cannot give.
    """
    if config.data.startswith(STREAM) and split == "train":
        check_settings(config)
        return {"spec": config.data, "split": split, "seed": config.seed, "shuffle_buffer": config.shuffle_buffer}
    if getattr(config, "val", None):
        return {"spec": config.val, "split": "test"} if split == "val" else {"spec": config.data, "split": split, "val_fraction": 0.0}
    return {"spec": config.data, "split": split, "val_fraction": config.val_fraction}


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
            told = [ranks.tell(ours, number) for number in range(1, ranks.world())]
            ranks.on_main(partial(skips.take_over, told))


def say_notes(source: Any, title: str, quiet: bool) -> None:
    """How `source` was read where that was a guess or a part of it."""
    for note in notes(source):
        say(f"{title}: {note}", quiet=quiet)


def augmentation(config: Any) -> dict[str, Any]:
    """How training images are changed, as arguments of a collator; those of a user's own are mirrored only when asked for."""
    mirror = config.mirror if config.mirror is not None else is_built_in(config.data)
    return {"augment_kind": config.augment, "mirror": mirror}


def say_skipped(source: Any, title: str, quiet: bool) -> None:
    """How many samples of `source` were skipped so far, with the first reasons; nothing if it was none."""
    skips = getattr(source, "skips", None)
    if skips and skips.count:
        say("\n  ".join([f"{title}: {skips.count} samples are skipped", *skips.lines()]), quiet=quiet)


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


def data_inputs(config: Any, sources: dict[str, Any]) -> dict[str, str | None]:
    """Digests of the training data, and of validation data of its own."""
    val = f"sha256:{sources['val'].fingerprint}" if config.val else None
    return {"data": f"sha256:{sources['train'].fingerprint}", "val": val}


def settings_of(config: Strict, *names: str) -> dict[str, Any]:
    """Some fields of a stage's configuration, by name."""
    return {name: getattr(config, name) for name in names}
