"""Weight files of other projects, read without running anything that is in them."""

from __future__ import annotations

import os
import re
import string
import struct
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251  what torch.load raises
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from efficientvlm.checkpoints.manifest import inside, read_json
from efficientvlm.errors import BadInput, shorten

# what reading damaged bytes raises, tried on some thousand damaged files
DAMAGED = (
    UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    struct.error,
    AssertionError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
)
AGAIN = "fetch it again"


def read_file(path: Path, *, values: bool = True) -> dict[str, Any]:
    """Contents of a `.safetensors` file, or of a PyTorch file of tensors and plain values.

    Args:
        values: False gives tensors on the meta device: their shapes are read, their values are not.

    Raises:
        BadInput: not there, damaged, cut short, or with objects of other classes in it.
    """
    if not path.is_file():
        raise BadInput(f"{path} is not a file", "", "give the .th, .pth or .safetensors file itself")
    try:
        if path.suffix == ".safetensors":
            return load_file(path) if values else _shapes(path)
        if values and is_zipfile(path):  # torch.load does not look at the checksums
            with ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise BadInput(f"{path} is damaged", f"the checksum of {broken} is wrong", AGAIN)
        content = torch.load(path, map_location="cpu" if values else "meta", weights_only=True)  # noqa: TID251  the one place that reads published pickles
    except (SafetensorError, BadZipFile) as error:
        raise BadInput(f"{path} is damaged or cut short", _text_in(path) or _first_line(error), AGAIN) from None
    except OSError as error:
        raise BadInput(f"cannot read {path}", _first_line(error), "check the path") from None
    except DAMAGED as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            fix = "where you trust it, save its tensors as .safetensors and import that"
            raise BadInput(f"{path} holds more than tensors", f"it refers to {found[1]}, and no code is run here", fix) from None
        raise BadInput(f"{path} is damaged, or no PyTorch file", _text_in(path) or _bytes_in(path) or _first_line(error), AGAIN) from None
    if not isinstance(content, Mapping):
        raise BadInput(f"{path} holds no weights", f"it is a {type(content).__name__}", "give a file of named tensors")
    return dict(content)


def _text_in(path: Path) -> str:
    """That a file is a text, as a page or a git-lfs pointer saved in place of weights is, and how it begins; empty where it is none."""
    with path.open("rb") as file:
        begin = file.read(60)
    if not begin or set(begin) - set(map(ord, string.printable)):
        return ""
    return f"it is a text that begins with {shorten(begin.decode().split(chr(10))[0])!r}, not weights"


def _bytes_in(path: Path) -> str:
    """That the end of a file of `torch.save` is missing, or that it is none at all; empty where neither is so."""
    with path.open("rb") as file:
        begin = file.read(4)
    size = f"{path.stat().st_size:,} bytes"
    if begin == b"PK\x03\x04":
        return "" if is_zipfile(path) else f"its end is missing: it has only {size}"
    return "" if begin[:1] == b"\x80" else f"its {size} do not begin as those of torch.save do"  # 80: the first of a pickle


def _shapes(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
        floats = {name: part.get_dtype().startswith(("F", "BF")) for name, part in parts.items()}
        return {
            name: torch.empty(part.get_shape(), dtype=torch.float32 if floats[name] else torch.int64, device="meta")
            for name, part in parts.items()
        }


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Tensors of a Hugging Face model folder, in one safetensors file or in shards with an index, old LayerNorm names renewed.

    Raises:
        BadInput: no safetensors there, or damaged ones.
    """
    if not (files := weight_files(folder)):
        raise BadInput(f"no weights in {folder}", "it has no model.safetensors", "save the model there as safetensors")
    return {renewed(name): tensor for file in files for name, tensor in read_file(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a Hugging Face model folder, the shards that its index names, or none.

    Raises:
        BadInput: an index that is damaged, or that names a file that is not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        return []
    try:
        names = read_json(index)["weight_map"].values()
        shards = [folder / inside(name) for name in sorted(set(names))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"cannot read {index}", _first_line(error), AGAIN) from None
    if lacking := [shard.name for shard in shards if not os.path.lexists(shard)]:
        why = f"{index.name} names {len(shards)} files, and {lacking[0]} is not there ({len(lacking)} missing)"
        raise BadInput(f"{folder} is not whole", why, "copy or download the folder again")
    return shards


def finite(values: Tensor) -> bool:
    """Whether all values are finite numbers; a finite sum, which is fast to make, says so already. True on the meta device."""
    return values.is_meta or bool(values.sum().isfinite() or values.isfinite().all())


def floats(tensor: Tensor) -> Tensor | None:
    """`tensor` as float32; None unless it holds real floats that are finite as such too, as far as its values are known."""
    found = tensor.detach().to(torch.float32) if tensor.is_floating_point() else None
    return found if found is not None and finite(found) else None


def counting(tensor: Tensor) -> bool:
    """Whether the numbers of positions in `tensor` are 0, 1, 2, ... along its last dimension, as far as its values are known."""
    return tensor.is_meta or bool((tensor == torch.arange(tensor.shape[-1] if tensor.dim() else 1)).all())


def require_plain(folder: Path) -> None:
    """:class:`BadInput` if the safetensors of a model folder hold whole numbers in place of weights, or positions out of their order."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  no mapping
            positions = {name: opened.get_tensor(name) for name in kinds if name.endswith("position_ids")}
        for name, numbers in positions.items():
            if not counting(numbers):
                why = f"{name} does not count from 0, and here positions always do"
                raise BadInput(f"{folder} cannot be opened", why, "order the rows of its position embedding by it, and leave it out")
        for name, kind in kinds.items():
            if not (kind.startswith(("F", "BF")) or name in positions or name.endswith("relative_position_index")):
                why = f"{name} holds {kind}, and only floating-point weights are opened"
                raise BadInput(f"{folder} cannot be opened", why, "give the model as it was before it was quantised")


def require_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """:class:`BadInput` if one of the tensors of `where` holds NaN or an infinity."""
    if broken := [name for name, values in tensors.items() if not finite(values)]:
        why = f"{broken[0]} does, the first of {len(broken)} tensors"
        raise BadInput(f"{where} holds NaN or infinite values", why, "make it again, or restore it")


def renewed(name: str) -> str:
    """A tensor's name with the LayerNorm names of old BERT files (gamma, beta) replaced."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[old[1]], name)


def _first_line(error: BaseException) -> str:
    if isinstance(error, LookupError):
        return "its structure is not that of a file of tensors"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
