"""Published BLIP files: what their entries are, and the network in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.blip.config import CROSSING, SlicedBlipConfig
from efficientvlm.families.blip.names import EMBEDDINGS, IMAGE_LAYER, IMAGES, LAYERS, POSITIONS, PREDICTIONS
from efficientvlm.families.blip.start import Sizes, fresh_config
from efficientvlm.families.checks import Many
from efficientvlm.families.published import FIX, HEAD_WIDTH, TIED, Published, grid_of, require_usual_heads
from efficientvlm.families.towers.parts import resize_positions
from efficientvlm.families.weights import AGAIN, floats
from efficientvlm.settings.base import parse

VISION = {
    "cls_token": IMAGES["class_embedding"],
    "pos_embed": IMAGES["position_embedding"],
    **{f"patch_embed.proj.{kind}": f"{IMAGES['patch_embedding']}.{kind}" for kind in ("weight", "bias")},
    **{f"norm.{kind}": f"{IMAGES['post_norm']}.{kind}" for kind in ("weight", "bias")},
}
VISION_LAYER = {
    "attn.qkv": f"{IMAGE_LAYER['attention']}.{IMAGE_LAYER[':qkv']}",
    "attn.proj": f"{IMAGE_LAYER['attention']}.{IMAGE_LAYER[':out']}",
    **{"norm1": IMAGE_LAYER["attention_norm"], "norm2": IMAGE_LAYER["ffn_norm"]},
    **{"mlp.fc1": IMAGE_LAYER["fc1"], "mlp.fc2": IMAGE_LAYER["fc2"]},
}
LAYER = re.compile(r"(visual_encoder\.blocks|text_encoder\.encoder\.layer|text_decoder\.bert\.encoder\.layer)\.(\d{1,3})\.(.+)$")
STACKS = {"vision": "visual_encoder.blocks", "text": LAYERS["text"], "decoder": LAYERS["decoder"]}
TEXTS = {"text": "text_encoder.", "decoder": "text_decoder.bert."}
WORDS = f"embeddings.{EMBEDDINGS['word']}.weight"
COPIES = {f"{PREDICTIONS}.decoder.weight": TEXTS["decoder"] + WORDS, f"{PREDICTIONS}.decoder.bias": f"{PREDICTIONS}.bias"}
"""What the prediction head holds a second time."""
MERGE = "crossattention.output.merge_layer"
OF_TWO = {
    **{f"crossattention.self{image}.": f"crossattention.{place}.self." for image, place in enumerate(("first", "second"))},
    **{f"crossattention.output.dense{image}.": f"crossattention.{place}.output.dense." for image, place in enumerate(("first", "second"))},
    f"{MERGE}.": "crossattention.merge.",
}
"""Of a network that reads two images at a time: what lies in each layer for the one, for the other, and for both."""
KNOWN = ("text_encoder.", "text_decoder.", "vision_proj.", "text_proj.", "itm_head.", "cls_head.")
AVERAGES = tuple(f"{part}_m." for part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"))
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
HOTTEST = 100
FREE = ("vision_heads", "text_heads", "image_size", "image_mean", "image_std", "vision_eps", "text_eps", "dropout", "answers", "rank_top")


class Told(Sizes):
    """What can be said of a network in a file, beside its sizes."""

    answers: list[str] | None = None
    rank_top: Many = 128


def translate(file: Published, checked: Callable[[SlicedBlipConfig, str], SlicedBlipConfig]) -> tuple[SlicedBlipConfig, dict[str, Tensor]]:
    """Configuration and state of the BLIP in a published file.

    A decoder that shares all but its self-attention with the text encoder may lack what it shares, or the encoder may. Another `image_size`
    resizes the position embedding as the published loader does.

    Args:
        checked: the configuration, or :class:`BadInput` where no network is of it.

    Raises:
        BadInput: as :func:`families.published.read_published`.
    """
    given = parse(Told, dict(file.settings), "settings").model_dump(exclude_unset=True)
    if fixed := sorted({*given} - {*FREE}):
        why = f"what can be set: {', '.join(sorted(FREE))}"
        raise BadInput(f"settings.{fixed[0]} cannot be set", "it follows from the file", why)
    native = checked(_config(file, given), "settings")
    called = file.translated(lambda name: _reason(file, native, name), lambda name: _renamed(file, native, name))
    state = {ours: file.value(name) for ours, name in called.items()}
    for copy, original in () if native.shares else COPIES.items():
        if native.ties and original in state:
            state[copy] = state[original]
    file.require_complete(state, native)
    size = given.get("image_size", native.vision_config.image_size)
    if size == native.vision_config.image_size:
        return native, state
    config = native.copy()
    config.vision_config.image_size = size
    grid = size // checked(config, "settings").vision_config.patch_size
    return config, state | {POSITIONS: resize_positions(state[POSITIONS][0], grid)[None]}


def _config(file: Published, given: Mapping[str, Any]) -> SlicedBlipConfig:
    """The network that is in the file, its images of the size that it was made for."""
    path, tensors = file.path, file.tensors

    def shape(name: str, dims: int = 2) -> torch.Size:
        if name not in tensors or tensors[name].dim() != dims:
            raise BadInput(f"{path} is incomplete", f"no {dims}-dimensional tensor for {name}", FIX)
        return tensors[name].shape

    depth, crossing = _layers(file)
    tower = "text" if depth["text"] else "decoder"
    patches = shape("visual_encoder.patch_embed.proj.weight", 4)
    known: dict[str, Any] = {
        "network": file.layout.does,
        "image_size": grid_of(path, shape("visual_encoder.pos_embed", 3)[1]) * patches[2],
        "patch_size": patches[2],
        "vision_width": patches[0],
        "vision_layers": depth["vision"],
        "vision_intermediate": shape(f"{STACKS['vision']}.0.mlp.fc1.weight")[0],
        "vocab_size": shape(_first(file, WORDS))[0],
        "text_width": shape(_first(file, WORDS))[1],
        "max_positions": shape(_first(file, f"embeddings.{EMBEDDINGS['position']}.weight"))[0],
        "text_layers": depth[tower],
        "text_intermediate": shape(_first(file, "encoder.layer.0.intermediate.dense.weight"))[0],
    }
    if tower == "text" and depth["decoder"] not in (0, depth["text"]):
        known["decoder_layers"] = depth["decoder"]
    if "vision_proj.weight" in tensors:
        known["embed_dim"] = shape("vision_proj.weight")[0]
    for part in ("vision", "text"):
        if f"{part}_heads" not in given:
            require_usual_heads(path, part, known[f"{part}_width"])
            file.report.assumed[f"{part}_heads"] = known[f"{part}_heads"] = known[f"{part}_width"] // HEAD_WIDTH
    answers, rank_top = given.get("answers"), given.get("rank_top")
    told = {name: value for name, value in given.items() if name not in ("answers", "rank_top", "image_size")}
    config = fresh_config("base", {**known, **told}, file.vocab or known["vocab_size"])
    if config.shares:
        crossing = {"text": crossing["text"] | crossing["decoder"]}
    few = {tower: sorted(layers) for tower, layers in crossing.items() if len(layers) < depth[tower]}
    config.cross_layers = few or None
    file.report.remarks = [f"only {len(layers)} of {depth[tower]} layers of {tower} attend to images" for tower, layers in few.items()]
    if file.layout.images > 1:
        config.merging_layers = sorted(int(found[2]) for found in map(LAYER.match, tensors) if found and found[3] == f"{MERGE}.weight")
    temperature = _temperature(file)
    config.contrast_temperature = None if config.shares else temperature
    config.answers = answers if answers is None else [*answers]
    config.rank_top = config.rank_top if rank_top is None else rank_top
    return config


def _temperature(file: Published) -> float | None:
    """What a network that only compares and matches was trained with; None where the file, or what was read of it, does not say."""
    if "temp" not in file.tensors or file.tensors["temp"].is_meta:
        return None
    stored = file.tensors["temp"]
    value = floats(stored)
    if value is None or value.numel() != 1 or not 0 < float(value) < HOTTEST:
        raise BadInput(f"{file.path} is damaged", f"temp is {stored.tolist()}, a temperature is above 0 and below {HOTTEST}", AGAIN)
    return round(float(value), 6)


def _layers(file: Published) -> tuple[dict[str, int], dict[str, set[int]]]:
    """Layers of each tower, and by tower of texts those with cross-attention; :class:`BadInput` where nothing looks at images."""
    found: dict[str, set[int]] = {stack: set() for stack in STACKS.values()}
    seeing: dict[str, set[int]] = {STACKS[tower]: set() for tower in CROSSING}
    for match in filter(None, map(LAYER.match, file.tensors)):
        found[match[1]].add(int(match[2]))
        if match[3].startswith("crossattention."):
            seeing[match[1]].add(int(match[2]))
    depth = {tower: len(found[stack]) for tower, stack in STACKS.items()}
    crossing = {tower: seeing[STACKS[tower]] for tower in CROSSING if depth[tower]}
    if not depth["vision"] or not any(crossing.values()):
        why = "no layer of its tower of images" if not depth["vision"] else "none of its text layers has cross-attention"
        raise BadInput(f"{file.path} is no BLIP file", why, FIX)
    return depth, crossing


def _first(file: Published, tail: str) -> str:
    """The name of the tensor `tail` of the text encoder, or of the decoder where that has it alone."""
    return next((begin + tail for begin in TEXTS.values() if begin + tail in file.tensors), TEXTS["decoder"] + tail)


def _shared(config: SlicedBlipConfig, name: str) -> str:
    """The tensor of the text encoder that `name` of the decoder is the same as; empty where it is none of these."""
    if not config.shares or not name.startswith(TEXTS["decoder"]) or ".attention." in name:
        return ""
    return name.replace(TEXTS["decoder"], TEXTS["text"], 1)


def _reason(file: Published, config: SlicedBlipConfig, name: str) -> str | None:
    """Why an entry is left out; None if it is not."""
    if name.endswith(".position_ids"):
        file.require_counting(name)
        return "numbers of positions, made anew"
    if name.startswith(AVERAGES):
        return "averaged encoders, of training alone; training makes its own"
    if name in QUEUES:
        return "queues of features, of training alone; training fills its own"
    if name == "temp" and not config.shares:
        return "temperature of contrast, which the configuration names; training goes on with it"
    if name in COPIES:
        word = COPIES[name]
        if config.shares and word not in file.tensors:
            word = _shared(config, word)
        file.require_equal(name, word, "a model that ties them")
        return TIED
    twin = _shared(config, name)
    if not twin or twin not in file.tensors:
        return None
    file.require_equal(name, twin, "a model whose text encoder and decoder share them")
    return "second copy of a tensor that text encoder and decoder share, found equal"


def _renamed(file: Published, config: SlicedBlipConfig, name: str) -> str | None:
    """Our name of an entry that is not left out; None for one of unknown meaning."""
    begin, _, rest = name.partition(".")
    if begin == "visual_encoder":
        if (found := LAYER.match(name)) is None:
            return f"vision_model.{VISION[rest]}" if rest in VISION else None
        part, _, kind = found[3].rpartition(".")
        return f"{LAYERS['vision']}.{found[2]}.{VISION_LAYER[part]}.{kind}" if part in VISION_LAYER else None
    if name == "temp":
        return name
    for theirs, ours in OF_TWO.items() if file.layout.images > 1 else ():
        name = name.replace(theirs, ours)
    return _shared(config, name) or name if name.startswith(KNOWN) else None
