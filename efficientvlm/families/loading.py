"""Folders of weights and configuration, opened strictly: what does not fit is an error, never a fresh random tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as said

from efficientvlm.checkpoints import manifest
from efficientvlm.checkpoints.pointers import pointers, without_code
from efficientvlm.data import preprocessing
from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.checks import CORRECT, check_channels
from efficientvlm.families.weights import require_finite, require_plain
from efficientvlm.runtime.memory import out_of_memory
from efficientvlm.runtime.progress import say
from efficientvlm.settings.base import check_plain

said.disable_progress_bar()  # progress is ours to show
MOST_LABELS = 100_000  # transformers makes a table of as many names; no network here has a classification head


def advice(folder: Path) -> str:
    """What to do about a damaged folder: only our own checkpoints can be verified."""
    return "check it with `evlm verify`" if (folder / manifest.MANIFEST).is_file() else "save or download it again"


@contextmanager
def silent() -> Iterator[None]:
    """transformers says nothing in the block: what matters of it is in our own words."""
    level = said.get_verbosity()
    said.set_verbosity(said.CRITICAL)
    try:
        yield
    finally:
        said.set_verbosity(level)


# of SigLIP, whose published configurations name tokens of CLIP's vocabulary; ours come from the tokenizer
logging.getLogger("transformers.configuration_utils").addFilter(lambda record: "_token_id must be" not in str(record.msg))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder, without what points to code, which is said; :class:`BadInput` if there is none."""
    values = manifest.read_json(file)
    if not isinstance(values, dict):
        raise BadInput(f"cannot read {file}", "it is not a JSON object", advice(file.parent))
    if found := sorted(set(pointers(values))):
        say_once(f"{file} points to code ({', '.join(found)}); it is not run, and not carried on")
    without: dict[str, Any] = without_code(values)
    return without


@cache
def say_once(text: str) -> None:
    say(text)


def open_config(kind: Any, values: Mapping[str, Any], file: Path) -> Any:
    """Configuration of class `kind` from the content of `file`, whatever `model_type` that names: the one door for configurations.

    Raises:
        BadInput: it is quantised, holds what no configuration can, or the class does not take it.
    """
    try:
        check_plain(values)
    except ValueError as error:
        raise BadInput(f"cannot read {file}", str(error), advice(file.parent)) from None
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        why = f"its weights are quantised ({shorten(method or 'quantization_config')}), and only floating-point weights are opened"
        raise BadInput(f"{file.parent} cannot be opened", why, "give the model as it was before, in float32, float16 or bfloat16")
    for name, part in (("", values), *((f"{name}.", part) for name, part in values.items() if isinstance(part, dict))):
        labels = part.get("num_labels", 0)
        if not isinstance(labels, int) or not 0 <= labels <= MOST_LABELS:
            raise BadInput(f"{file}: {name}num_labels is {shorten(labels)}", f"it is 0 to {MOST_LABELS:,} where it means anything", CORRECT)
    try:
        with silent():
            return kind.from_dict({name: value for name, value in values.items() if name != "model_type"})
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a configuration class raises whatever a wrong value makes of it
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"cannot read {file}", shorten(why), advice(file.parent)) from None


def open_model(kind: Any, path: Path, config: Any) -> Any:
    """Float32 model of class `kind` with the weights in folder `path`, evaluation mode.

    Raises:
        BadInput: weights that are missing, surplus, of another shape than `config` says, not finite, or not readable.
    """
    try:
        require_plain(path)
        with silent():
            model, info = kind.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                key_mapping=getattr(kind, "renamed", None),
                ignore_mismatched_sizes=True,  # they are reported below; without it the first one raises
            )
    except (MemoryError, BadInput):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput(f"cannot load {path}", (str(error).splitlines() or [type(error).__name__])[0], advice(path)) from error
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
    if problems:
        summary = "; ".join(f"{len(keys)} {kind.replace('_', ' ')}, first {keys[0]}" for kind, keys in problems.items())
        raise BadInput(f"{path}: weights do not fit config.json", summary, advice(path))
    require_finite(model.state_dict(), path)
    return model.eval()


def image_statistics(folder: Path, values: Mapping[str, Any], default: tuple[Any, Any], kind: str) -> dict[str, Any]:
    """`image_mean` and `image_std` where the configuration `values` lacks them: from the folder's image processor, or else `default`.

    Args:
        kind: the class of transformers that the image processor is of where its file does not say it.

    Raises:
        BadInput: they are not three numbers each, or of an image processor that is not followed.
    """
    if "image_mean" in values and "image_std" in values:
        return {}
    settings, where = image_processor(folder), f"the image processor in {folder}"
    given = default if settings is None else preprocessing.statistics(settings, where, kind)
    found = dict(zip(("image_mean", "image_std"), given, strict=True))
    for name, value in found.items():
        check_channels(name, value, where)
    return {name: list(value) for name, value in found.items()}


def image_processor(folder: Path) -> dict[str, Any] | None:
    """Settings of the image processor in a folder, inside `processor_config.json` or of its own file; None where there are none.

    Raises:
        BadInput: a file that is no JSON object.
    """
    if (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor")
        if isinstance(settings, dict):
            return settings
    return read_json(folder / preprocessing.FILE) if (folder / preprocessing.FILE).is_file() else None
