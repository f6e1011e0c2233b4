"""What every stage does around its own work: open parents, write the finished folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from efficientvlm import checkpoint, families, files
from efficientvlm.card import sizes
from efficientvlm.checkpoint import Output
from efficientvlm.compression.accounting import account
from efficientvlm.config import Strict
from efficientvlm.control import Control
from efficientvlm.data.collate import Texts
from efficientvlm.data.sources import record
from efficientvlm.data.tokenizer import load_tokenizer, save_tokenizer
from efficientvlm.errors import BadInput, Interrupted
from efficientvlm.families.base import Sizes
from efficientvlm.interrupt import sigterm_as_interrupt
from efficientvlm.manifest import Cost, DataRecord, Manifest, peak_memory_bytes
from efficientvlm.progress import say
from efficientvlm.training import Spent

TEXT_LENGTH = 12


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
    def tasks(self) -> frozenset[str]:
        """What it does as it is: vqa, pretraining, retrieval, captioning, ..."""
        tasks: frozenset[str] = self.family.tasks(self.model.config)
        return tasks


def load(spec: str) -> Loaded:
    """The checkpoint `spec` names, checked against its manifest.

    Raises:
        BadInput: an unfinished or damaged folder, or a tokenizer that does not fit the model.
    """
    manifest = checkpoint.require_complete(spec)
    path = files.resolve(spec)
    family = families.of_folder(path)
    model, tokenizer = family.load(path), load_tokenizer(path)
    sizes = family.sizes(model.config)
    if len(tokenizer) > sizes.vocab_size:
        raise BadInput(
            f"{path}: the tokenizer has {len(tokenizer)} tokens", f"the model embeds {sizes.vocab_size}", "use its own tokenizer"
        )
    return Loaded(path, family, model, tokenizer, manifest)


def texts_of(loaded: Loaded, max_tokens: int = 40) -> Texts:
    """Texts as token ids for this model: at most `max_tokens`, and no more than it has positions."""
    return Texts(loaded.tokenizer, min(max_tokens, loaded.sizes.max_positions))


def check_pair(student: Loaded, teacher: Loaded) -> None:
    """:class:`BadInput` unless teacher and student read the same batches: family, vocabulary, image size."""
    if student.family.name != teacher.family.name:
        raise BadInput(f"teacher is {teacher.family.name}, student is {student.family.name}", "distillation needs one family")
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise BadInput(
            "teacher and student have different tokenizers", f"{teacher.path} and {student.path}", "shrink the student from this teacher"
        )
    check_sizes(student.sizes, teacher.sizes)


def check_sizes(ours: Sizes, theirs: Sizes) -> None:
    """:class:`BadInput` unless student and teacher have towers of the same width and heads, and read the same images."""
    parts = {
        **{f"{tower} width": (theirs.widths[tower], width) for tower, width in ours.widths.items()},
        **{f"{tower} heads": (theirs.heads[tower], heads) for tower, heads in ours.heads.items()},
        "patch size": (theirs.patch_size, ours.patch_size),
    }
    if differ := [f"{name} {teacher} and {student}" for name, (teacher, student) in parts.items() if teacher != student]:
        raise BadInput(
            "teacher and student have other sizes", ", ".join(differ), "shrink the student from this teacher: shrinking keeps them"
        )
    if ours.image_size != theirs.image_size:
        sizes = f"{theirs.image_size} and {ours.image_size} px"
        raise BadInput("teacher and student read images of different size", sizes, "shrink the student from this teacher")


def open_output(config: Any, stage: str, control: Control, inputs: dict[str, str | None]) -> Output:
    """Claim `config.out`; roles without a value are left out.

    Raises:
        BadInput: the output cannot be written, or several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("several processes were started", "writing one folder from many is not supported yet", "start a single process")
    given = {role: spec for role, spec in inputs.items() if spec}
    output = Output.open(config.out, stage=stage, inputs=given, config=config.model_dump(), force=control.force, resume=control.resume)
    if output.up_to_date:
        say(f"{stage}: {output.path} is up to date", quiet=control.quiet)
    return output


@contextmanager
def making(output: Output) -> Iterator[None]:
    """Give the output folder up if the block fails; a saved training state stays, and then a stop by signal is resumable.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM outside the training loop, with a state saved.
    """
    try:
        with sigterm_as_interrupt():
            yield
    except BaseException as error:
        output.abandon()
        if isinstance(error, KeyboardInterrupt) and output.resumable:
            raise Interrupted("stopped", f"a resumable state is in {output.path}", "run the same command again") from None
        raise


def write(
    output: Output,
    family: Any,
    model: Any,
    tokenizer: Any,
    *,
    control: Control,
    spent: Spent | None = None,
    sources: dict[str, Any] | None = None,
    **fields: Any,
) -> Manifest:
    """Stage model, tokenizer and image settings, and commit the folder with its accounting."""
    model = model.to("cpu", torch.float32).eval()
    family.save(model, output.staging)
    save_tokenizer(tokenizer, output.staging)
    (output.staging / "preprocessor_config.json").write_text(
        json.dumps(image_settings(family.sizes(model.config)), indent=2) + "\n", encoding="utf-8"
    )
    spent = spent or Spent()
    manifest = output.manifest(
        family=family.name,
        accounting=account(family, model, text_length=TEXT_LENGTH),
        data=[DataRecord(**record(source, split)) for split, source in (sources or {}).items()],
        cost=Cost(seconds=round(spent.seconds, 3), samples=spent.samples, peak_memory_bytes=peak_memory_bytes()),
        **fields,
    )
    done = output.commit(manifest)
    say(f"{output.stage}: wrote {output.path} · {summary(done)}", quiet=control.quiet)
    return done


def image_settings(sizes: Sizes) -> dict[str, Any]:
    """`preprocessor_config.json` of a square, bicubically resized, normalised image, as CLIP's processor reads it."""
    size = {"height": sizes.image_size, "width": sizes.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(sizes.image_mean),
        "image_std": list(sizes.image_std),
    }


def summary(manifest: Manifest) -> str:
    """Sizes and validation accuracy in one line."""
    accuracy = manifest.metrics.get("val", {}).get("accuracy")
    return sizes(manifest) + (f"  validation accuracy {accuracy:.4f}" if accuracy is not None else "")


def which(config: Any, split: str) -> dict[str, Any]:
    """What to open for `split`: validation data of its own is read whole, and then nothing is held out of the training data."""
    if getattr(config, "val", None):
        return {"spec": config.val, "split": "test"} if split == "val" else {"spec": config.data, "split": split, "val_fraction": 0.0}
    return {"spec": config.data, "split": split, "val_fraction": config.val_fraction}


def data_inputs(config: Any, sources: dict[str, Any]) -> dict[str, str | None]:
    """Digests of the training data, and of validation data of its own."""
    val = f"sha256:{sources['val'].fingerprint}" if config.val else None
    return {"data": f"sha256:{sources['train'].fingerprint}", "val": val}


def settings_of(config: Strict, *names: str) -> dict[str, Any]:
    """Some fields of a stage's configuration, by name."""
    return {name: getattr(config, name) for name in names}
