"""A CLIP as open_clip has it: `open_clip_config.json`, and weights under its names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from efficientvlm.data.preprocessing import BICUBIC, BILINEAR, Preprocessing
from efficientvlm.errors import BadInput
from efficientvlm.families.towers.attention import causal
from efficientvlm.families.towers.parts import activation

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
INSTEAD = "use --format onnx, which keeps every saving, or --format hf or padded"
RESAMPLED = {BICUBIC: "bicubic", BILINEAR: "bilinear"}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Modules of a layer of transformers' CLIP, and what open_clip calls them; queries, keys and values lie in one tensor there."""
TENSORS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    **{f"vision_model.pre_layrnorm.{kind}": f"visual.ln_pre.{kind}" for kind in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{kind}": f"visual.ln_post.{kind}" for kind in ("weight", "bias")},
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{f"text_model.final_layer_norm.{kind}": f"ln_final.{kind}" for kind in ("weight", "bias")},
    "logit_scale": "logit_scale",
}
TURNED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
"""Projections, which open_clip multiplies from the other side."""
PLACES = (("vision_model.encoder.layers", "visual.transformer.resblocks"), ("text_model.encoder.layers", "transformer.resblocks"))


def check(config: Any, preprocessing: Preprocessing, name: str) -> None:
    """:class:`BadInput` unless open_clip's CLIP can be what a network of the uniform `config` is, and read pictures as it does."""
    if getattr(config, "stock", ("",))[0] != "clip":
        why = f"a {config.model_type} network has towers that open_clip reads through another package, if at all"
        raise BadInput(f"{name} does not fit open_clip", why, "give a CLIP, or use --format onnx")
    parts = config.vision_config, config.text_config
    acts = sorted({str(part.hidden_act) for part in parts})
    if len(acts) > 1 or acts[0] not in ("gelu", "quick_gelu"):
        raise BadInput(
            f"{name} does not fit open_clip", f"activations are {', '.join(acts)}, and one, gelu or quick_gelu, is for both", INSTEAD
        )
    _picture(preprocessing, name)


def settings(config: Any, preprocessing: Preprocessing, name: str) -> dict[str, Any]:
    """`open_clip_config.json` of a network of `config`."""
    vision, text = config.vision_config, config.text_config
    towers = {
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            **_shape(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            **_shape(text),
            "pool_type": "eos",
            "eos_id": config.end,
            "hf_tokenizer_name": ".",  # open_clip takes the one that lies beside this file
        },
    }
    mode, interpolation = _picture(preprocessing, name)
    pictures = {"mean": list(config.image_mean), "std": list(config.image_std), "interpolation": interpolation, "resize_mode": mode}
    quick = {"quick_gelu": True} if vision.hidden_act == "quick_gelu" else {}
    return {"model_cfg": {"embed_dim": config.feature_width, **quick, **towers}, "preprocess_cfg": pictures}


def _shape(part: Any) -> dict[str, Any]:
    """Neurons, which are counted by the width, and what norms add."""
    ratio = part.intermediate_size / part.hidden_size
    if int(part.hidden_size * ratio) != part.intermediate_size:
        ratio = (part.intermediate_size + 0.5) / part.hidden_size
    return {"mlp_ratio": ratio, **({"norm_kwargs": {"eps": part.layer_norm_eps}} if part.layer_norm_eps != 1e-5 else {})}


def _picture(how: Preprocessing, name: str) -> tuple[str, str]:
    """How open_clip resizes pictures, and by which filter; :class:`BadInput` where it has no such way."""
    mode = "squash" if how.resize == (how.side, how.side) and not how.crop else "shortest" if how.crop and how.resize == how.side else ""
    if not mode or how.resample not in RESAMPLED:
        why = f"pictures are resized to {how.resize} and cut to {how.side}, with Pillow's filter {how.resample}"
        raise BadInput(f"{name} reads pictures as open_clip does not", why, INSTEAD)
    return mode, RESAMPLED[how.resample]


def tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' CLIP by open_clip's names, and in its shapes."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name in TURNED:
            found[TURNED[name]] = tensor.T
        elif name in TENSORS:
            found[TENSORS[name]] = tensor
        else:
            ours, theirs = next(places for places in PLACES if name.startswith(f"{places[0]}."))
            number, _, rest = name.removeprefix(f"{ours}.").partition(".")
            module, _, kind = rest.rpartition(".")
            if module in LAYER:
                found[f"{theirs}.{number}.{LAYER[module]}.{kind}"] = tensor
            else:
                joined.setdefault(f"{theirs}.{number}.attn.in_proj_{kind}", {})[module.removeprefix("self_attn.")[0]] = tensor
    return found | {name: torch.cat([parts[one] for one in "qkv"]) for name, parts in joined.items()}


def write(model: Any, preprocessing: Preprocessing, folder: Path, name: str) -> None:
    """Weights and configuration of the uniform `model`."""
    found = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors(model.state_dict()).items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    content = settings(model.config, preprocessing, name)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def features(folder: Path, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of normalised images [B, 3, H, W] and texts [B, L], computed from the files in `folder` alone, as open_clip says.

    It stands for open_clip where that is not installed: its CLIP, read off its public source.
    """
    values = json.loads((folder / CONFIG).read_text("utf-8"))["model_cfg"]
    state = load_file(folder / WEIGHTS)
    act = activation("quick_gelu" if values.get("quick_gelu") else "gelu")
    vision, text = values["vision_cfg"], values["text_cfg"]

    def norm(x: Tensor, name: str, part: Mapping[str, Any]) -> Tensor:
        eps = part.get("norm_kwargs", {}).get("eps", 1e-5)
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def layers(x: Tensor, place: str, part: Mapping[str, Any], heads: int, mask: Tensor | None) -> Tensor:
        for number in range(part["layers"]):
            at = f"{place}.{number}"
            h = F.linear(norm(x, f"{at}.ln_1", part), state[f"{at}.attn.in_proj_weight"], state[f"{at}.attn.in_proj_bias"])
            q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in h.chunk(3, -1))
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            x = x + F.linear(h, state[f"{at}.attn.out_proj.weight"], state[f"{at}.attn.out_proj.bias"])
            h = act(F.linear(norm(x, f"{at}.ln_2", part), state[f"{at}.mlp.c_fc.weight"], state[f"{at}.mlp.c_fc.bias"]))
            x = x + F.linear(h, state[f"{at}.mlp.c_proj.weight"], state[f"{at}.mlp.c_proj.bias"])
        return x

    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(patches), 1, -1), patches], 1) + state["visual.positional_embedding"]
    x = layers(norm(x, "visual.ln_pre", vision), "visual.transformer.resblocks", vision, vision["width"] // vision["head_width"], None)
    image = norm(x[:, 0], "visual.ln_post", vision) @ state["visual.proj"]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][: ids.shape[1]]
    x = norm(layers(x, "transformer.resblocks", text, text["heads"], causal(ids.shape[1], 0, ids.device)), "ln_final", text)
    at = (ids == text["eos_id"]).int().argmax(-1)
    words = x[torch.arange(len(x)), at] @ state["text_projection"]
    return F.normalize(image, dim=-1), F.normalize(words, dim=-1)


def difference(model: Any, folder: Path) -> float:
    """Largest absolute difference between the features of `model` and those of :func:`features`."""
    sizes, draw = model.config.sizes(), torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, sizes.image_size, sizes.image_size, generator=draw)
    ids = torch.randint(sizes.vocab_size, (3, min(12, sizes.max_positions)), generator=draw)
    ids[:, -1] = model.config.end
    with torch.no_grad():
        record = model.run({"pixels": pixels, "text_ids": ids, "text_mask": torch.ones_like(ids)})
    pairs = zip((record["image_features"], record["text_features"]), features(folder, pixels, ids), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
