"""Image towers of transformers: what each kind has, how it is built of ours, and what its tensors are called in transformers' files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, Dinov2Config, SwinConfig, ViTConfig

from efficientvlm.errors import BadInput
from efficientvlm.families.structure import Layered, odd_layers
from efficientvlm.families.towers.layers import PreNormLayer, Size
from efficientvlm.families.towers.parts import activation, resize_patches, resize_positions
from efficientvlm.families.towers.swin import Swin, SwinBlock, depths_of, grids, keep_pairs
from efficientvlm.families.towers.vit import Vit

Kept = Mapping[str, list[int]]
State = dict[str, Tensor]
OF_BACKBONES = ("out_features", "out_indices", "stage_names")  # follow from the depth
CLS, POOLER, MEAN, NORMED_MEAN = "cls", "pooler", "mean", "normed_mean"
SWIN_EPS = 1e-5
"""Of the norms between the stages of transformers' Swin, whatever its configuration says."""
BOTH = ("weight", "bias")
LAYER = re.compile(r"layers\.(\d+)\.(.+?)(\.weight|\.bias)?$")
FUSED = re.compile(r"(.*\.attention)\.qkv\.(weight|bias)$")
PATCHES = "embeddings.patch_embeddings.projection"


def rebuilt(part: Any, **changes: Any) -> Any:
    """`part`, a configuration of transformers, with some fields changed and what follows from them made anew."""
    values = {name: value for name, value in part.to_dict().items() if name not in OF_BACKBONES}
    return type(part).from_dict({**values, **changes})


class Backbone:
    """A kind of image tower. `part` is always its configuration of transformers; names of tensors are those below the tower."""

    config_class: ClassVar[Any]
    pooling: ClassVar[str]
    """How transformers' class makes one vector of an image."""
    top: ClassVar[dict[str, str]]
    """Our names of tensors outside of layers, and theirs."""
    layer: ClassVar[dict[str, tuple[str, ...]]]
    """Our names of the modules of a layer, and theirs: first that of files, then others that newer versions may write."""

    def check(self, part: Any, where: str) -> Any:
        """`part` as our tower has it.

        Raises:
            BadInput: it says something that our tower does not compute.
        """
        if part.num_channels != 3:
            raise BadInput(f"{where}: num_channels is {part.num_channels}", "pictures have three", "use another backbone")
        for name in ("image_size", "patch_size"):
            value = getattr(part, name)
            if not isinstance(value, int) or value < 1:
                raise BadInput(f"{where}: {name} is {value}", "images and patches are squares here", "use a backbone with squares")
        activation(part.hidden_act)
        return part

    def width(self, part: Any) -> int:
        """Columns of the vector of an image."""
        width: int = part.hidden_size
        return width

    def depth(self, part: Any) -> int:
        """Layers that can be pruned or left out."""
        depth: int = part.num_hidden_layers
        return depth

    def layered(self, part: Any, layer: int) -> Layered:
        return Layered(part.hidden_size, part.num_attention_heads, part.intermediate_size)

    def choose(self, part: Any, count: int | None) -> list[int]:
        """Which `count` layers a shallower one takes, half of them by default; :class:`BadInput` where it cannot be so many."""
        total = self.depth(part)
        return odd_layers(total, max(total // 2, min(total, 1)) if count is None else count)

    def foreign(self, part: Any) -> str:
        """What transformers' class cannot say of `part`; empty where it can say all."""
        return ""

    def with_layers(self, part: Any, chosen: Sequence[int]) -> Any:
        return rebuilt(part, num_hidden_layers=len(chosen))

    def with_size(self, part: Any, size: Layered) -> Any:
        return rebuilt(part, hidden_size=size.width, num_attention_heads=size.heads, intermediate_size=size.neurons)

    def with_images(self, part: Any, image_size: int, patch_size: int) -> Any:
        """:class:`BadInput` where patches, or windows, do not fill such images."""
        if image_size % patch_size:
            why = f"it is no multiple of the patch size {patch_size}"
            raise BadInput(f"image_size is {image_size}", why, f"use {max(1, image_size // patch_size) * patch_size}")
        return rebuilt(part, image_size=image_size, patch_size=patch_size)

    def tables(self, state: State, part: Any) -> State:
        """Those tensors of `state` that depend on sizes of images, for those of `part`."""
        return {
            "position_embedding": resize_positions(state["position_embedding"], part.image_size // part.patch_size),
            "patch_embedding.weight": resize_patches(state["patch_embedding.weight"], part.patch_size),
        }

    def tower(self, part: Any, kept: Kept) -> Any:
        """A fresh tower that has the `kept` units."""
        sizes = Size.of_tower(kept, "vision", part.num_hidden_layers, part.hidden_size, part.num_attention_heads)
        layers = [PreNormLayer(size, part.layer_norm_eps, activation(part.hidden_act), {}) for size in sizes]
        return Vit(layers, part.hidden_size, part.image_size, part.patch_size, part.layer_norm_eps, {}, patch_bias=True)

    def stock(self, part: Any) -> dict[str, Any]:
        """The configuration for transformers' own dual encoder."""
        return dict(part.to_dict())

    def to_stock(self, state: State, part: Any) -> State:
        """Tensors of ours by the names, and in the shapes, of transformers' files."""
        return {self.name_of(name, part): tensor for name, tensor in state.items()}

    def from_stock(self, tensors: State, part: Any, own: Iterable[str]) -> tuple[State, list[str]]:
        """Tensors of transformers' files by our names `own`; and names of those that have no place."""
        names = {theirs: ours for ours in own for theirs in self.names_of(ours, part)}
        return {names[name]: tensor for name, tensor in tensors.items() if name in names}, [name for name in tensors if name not in names]

    def name_of(self, ours: str, part: Any) -> str:
        return self.names_of(ours, part)[0]

    def names_of(self, ours: str, part: Any) -> list[str]:
        """What a tensor of ours may be called in transformers' files, the name that is written first."""
        if ours in self.top:
            return [self.top[ours]]
        found = LAYER.match(ours)
        if not found or found[2] not in self.layer:
            return [ours]
        starts = self.starts(int(found[1]), part)
        return [f"{start}{name}{found[3] or ''}" for start in starts for name in self.layer[found[2]]]

    def starts(self, layer: int, part: Any) -> list[str]:
        """What names of the tensors of a layer may begin with."""
        return [f"encoder.layer.{layer}.", f"layers.{layer}."]


class Plain(Backbone):
    """A ViT as transformers has it: no norm in front of the layers, and a [CLS] token, pooled by a layer of its own where there is one."""

    config_class, pooling = ViTConfig, POOLER
    top: ClassVar[dict[str, str]] = {
        "class_embedding": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        **{f"patch_embedding.{kind}": f"{PATCHES}.{kind}" for kind in BOTH},
        **{f"post_norm.{kind}": f"layernorm.{kind}" for kind in BOTH},
        **{f"pooler.{kind}": f"pooler.dense.{kind}" for kind in BOTH},
    }
    layer: ClassVar[dict[str, tuple[str, ...]]] = {
        **{f"attention.{name[0]}": (f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value")},
        "attention.out": ("attention.output.dense", "attention.o_proj"),
        "attention_norm": ("layernorm_before",),
        "ffn_norm": ("layernorm_after",),
        "ffn.fc1": ("intermediate.dense", "mlp.fc1"),
        "ffn.fc2": ("output.dense", "mlp.fc2"),
    }

    def check(self, part: Any, where: str) -> Any:
        super().check(part, where)
        return rebuilt(part, qkv_bias=True)  # those that are not there are zero

    def to_stock(self, state: State, part: Any) -> State:
        return {
            name: tensor[None, None] if name.endswith("cls_token") else tensor[None] if name.endswith("position_embeddings") else tensor
            for name, tensor in super().to_stock(state, part).items()
        }

    def from_stock(self, tensors: State, part: Any, own: Iterable[str]) -> tuple[State, list[str]]:
        own = list(own)
        state, left = super().from_stock(tensors, part, own)
        for name in ("class_embedding", "position_embedding"):
            if name in state:
                state[name] = state[name].flatten() if name == "class_embedding" else state[name].flatten(0, -2)
        for name in own:  # attention without biases
            weight = state.get(name.removesuffix("bias") + "weight")
            if name not in state and re.search(r"attention\.[qkv]\.bias$", name) and weight is not None:
                state[name] = torch.zeros(len(weight))
        return state, left


class Dino(Plain):
    """A DINOv2. Its LayerScale goes into the output projections, as in an X-VLM that is made of one, and is written as ones."""

    config_class, pooling = Dinov2Config, CLS
    layer: ClassVar[dict[str, tuple[str, ...]]] = {
        **{name: Plain.layer[name] for name in Plain.layer if name.startswith("attention.")},
        **{"attention_norm": ("norm1",), "ffn_norm": ("norm2",), "ffn.fc1": ("mlp.fc1",), "ffn.fc2": ("mlp.fc2",)},
    }
    scaled: ClassVar[dict[str, str]] = {"layer_scale1.lambda1": "attention.out", "layer_scale2.lambda1": "ffn.fc2"}

    def check(self, part: Any, where: str) -> Any:
        Backbone.check(self, part, where)
        if part.use_swiglu_ffn:
            why = "its feed-forward layers are gated (SwiGLU, as in the giant size)"
            raise BadInput(f"{where}: a DINOv2 that is not followed", why, "use one of size S, B or L")
        return rebuilt(part, qkv_bias=True, use_mask_token=False, layerscale_value=1.0)

    def layered(self, part: Any, layer: int) -> Layered:
        neurons = getattr(part, "intermediate_size", None) or part.hidden_size * part.mlp_ratio
        return Layered(part.hidden_size, part.num_attention_heads, neurons)

    def with_size(self, part: Any, size: Layered) -> Any:
        ratio, rest = divmod(size.neurons, size.width)
        own = {"intermediate_size": size.neurons if rest else None}  # which transformers' class does not read
        return rebuilt(part, hidden_size=size.width, num_attention_heads=size.heads, mlp_ratio=max(1, ratio), **own)

    def foreign(self, part: Any) -> str:
        neurons = self.layered(part, 0).neurons
        if neurons % part.hidden_size:
            return f"a DINOv2 of transformers has a whole number of neurons a column, and this one {neurons} for {part.hidden_size} columns"
        return ""

    def to_stock(self, state: State, part: Any) -> State:
        ones = {f"encoder.layer.{i}.{name}": torch.ones(part.hidden_size) for i in range(part.num_hidden_layers) for name in self.scaled}
        return super().to_stock(state, part) | ones

    def from_stock(self, tensors: State, part: Any, own: Iterable[str]) -> tuple[State, list[str]]:
        state, left = super().from_stock(tensors, part, own)
        for layer in range(part.num_hidden_layers):
            for name, target in self.scaled.items():
                scale = tensors.get(f"encoder.layer.{layer}.{name}")
                for kind in BOTH if scale is not None else ():
                    at = f"layers.{layer}.{target}.{kind}"
                    if scale is not None and at in state and len(state[at]) == scale.numel():
                        state[at] = state[at].float() * scale.float().view(-1, *[1] * (state[at].dim() - 1))
        return state, [name for name in left if not name.endswith(tuple(self.scaled)) and name != "embeddings.mask_token"]


class Windows(Backbone):
    """A Swin. What stands for an image is the mean of its patches."""

    config_class, pooling = SwinConfig, MEAN
    top: ClassVar[dict[str, str]] = {
        **{f"patch_embedding.{kind}": f"{PATCHES}.{kind}" for kind in BOTH},
        **{f"patch_norm.{kind}": f"embeddings.norm.{kind}" for kind in BOTH},
        **{f"post_norm.{kind}": f"layernorm.{kind}" for kind in BOTH},
    }
    layer: ClassVar[dict[str, tuple[str, ...]]] = {
        **{f"attention.{name[0]}": (f"attention.self.{name}",) for name in ("query", "key", "value")},
        "attention.bias_table": ("attention.self.relative_position_bias_table",),
        "attention.out": ("attention.output.dense",),
        "attention_norm": ("layernorm_before",),
        "ffn_norm": ("layernorm_after",),
        "ffn.fc1": ("intermediate.dense",),
        "ffn.fc2": ("output.dense",),
    }

    def check(self, part: Any, where: str) -> Any:
        super().check(part, where)
        plain = "use a Swin with relative positions alone"
        if part.use_absolute_embeddings or not part.qkv_bias:
            raise BadInput(f"{where}: a Swin that is not followed", "it has absolute positions, or attention without biases", plain)
        return self.with_images(part, part.image_size, part.patch_size)

    def width(self, part: Any) -> int:
        width: int = part.embed_dim << (len(part.depths) - 1)
        return width

    def depth(self, part: Any) -> int:
        return sum(part.depths)

    def layered(self, part: Any, layer: int) -> Layered:
        stage = next(i for i in range(len(part.depths)) if layer < sum(part.depths[: i + 1]))
        width = part.embed_dim << stage
        return Layered(width, part.num_heads[stage], int(width * part.mlp_ratio))

    def choose(self, part: Any, count: int | None) -> list[int]:
        count = max(2 * len(part.depths), sum(part.depths) // 4 * 2) if count is None else count
        try:
            return keep_pairs(part.depths, count)
        except ValueError:
            why = "a Swin keeps pairs of layers, one a stage at least"
            fix = f"ask for an even number, {2 * len(part.depths)} to {sum(part.depths)}"
            raise BadInput(f"{count} vision layers", why, fix) from None

    def with_layers(self, part: Any, chosen: Sequence[int]) -> Any:
        return rebuilt(part, depths=depths_of(part.depths, chosen))

    def with_size(self, part: Any, size: Layered) -> Any:
        raise BadInput("a Swin keeps its width", "its stages differ in width, and each hangs on the one before", "change its layers")

    def with_images(self, part: Any, image_size: int, patch_size: int) -> Any:
        sides = [image_size // patch_size >> stage for stage in range(len(part.depths))]
        stride = patch_size << (len(part.depths) - 1)
        if image_size % stride or any(side % part.window_size for side in sides):
            why = f"its stages have {', '.join(map(str, sides))} tokens on a side, and windows of {part.window_size} must fill them"
            raise BadInput(f"image_size is {image_size}", why, f"use a multiple of {part.window_size * stride}")
        return rebuilt(part, image_size=image_size, patch_size=patch_size)

    def tables(self, state: State, part: Any) -> State:
        return {"patch_embedding.weight": resize_patches(state["patch_embedding.weight"], part.patch_size)}

    def tower(self, part: Any, kept: Kept) -> Any:
        count, grid, eps = sum(part.depths), part.image_size // part.patch_size, part.layer_norm_eps
        layers = []
        for layer, (side, window, shift) in enumerate(grids(part.depths, grid, part.window_size)):
            width, heads, _ = self.layered(part, layer)
            size, drop = Size.of(kept, f"vision.{layer}", width, heads), part.drop_path_rate * layer / max(1, count - 1)
            layers.append(SwinBlock(size, eps, activation(part.hidden_act), {}, grid=side, window=window, shift=shift, drop=drop))
        tower = Swin(layers, part.depths, part.embed_dim, grid, part.patch_size, eps, {})
        for module in (tower.patch_norm, *tower.merges.modules()):
            if isinstance(module, nn.LayerNorm):
                module.eps = SWIN_EPS
        return tower

    def starts(self, layer: int, part: Any) -> list[str]:
        stage = next(i for i in range(len(part.depths)) if layer < sum(part.depths[: i + 1]))
        return [f"encoder.layers.{stage}.blocks.{layer - sum(part.depths[:stage])}."]

    def names_of(self, ours: str, part: Any) -> list[str]:
        if ours.startswith("merges."):
            stage, _, rest = ours.removeprefix("merges.").partition(".")
            return [f"encoder.layers.{stage}.downsample.{rest}"]
        return super().names_of(ours, part)

    def to_stock(self, state: State, part: Any) -> State:
        apart: State = {}
        for name, tensor in state.items():
            if found := FUSED.match(name):
                apart |= {f"{found[1]}.{one}.{found[2]}": piece for one, piece in zip("qkv", tensor.chunk(3), strict=True)}
            else:
                apart[name] = tensor
        return super().to_stock(apart, part)

    def from_stock(self, tensors: State, part: Any, own: Iterable[str]) -> tuple[State, list[str]]:
        own = list(own)
        fused = {name: [f"{found[1]}.{one}.{found[2]}" for one in "qkv"] for name in own if (found := FUSED.match(name))}
        names = [name for name in own if name not in fused] + [piece for pieces in fused.values() for piece in pieces]
        state, left = super().from_stock(tensors, part, names)
        for name, pieces in fused.items():
            if all(piece in state for piece in pieces):
                state[name] = torch.cat([state.pop(piece) for piece in pieces])
        return state, [name for name in left if not name.endswith("relative_position_index")]


class Convolutions(Backbone):
    """A ConvNeXt: transformers' own module, of which nothing is pruned. What stands for an image is the norm of the mean of its places."""

    config_class, pooling, top, layer = ConvNextConfig, NORMED_MEAN, {}, {}

    def width(self, part: Any) -> int:
        width: int = part.hidden_sizes[-1]
        return width

    def depth(self, part: Any) -> int:
        return 0

    def layered(self, part: Any, layer: int) -> Layered:
        return Layered(part.hidden_sizes[-1], 1, 0)

    def with_images(self, part: Any, image_size: int, patch_size: int) -> Any:
        if patch_size != part.patch_size:
            raise BadInput(f"patch_size is {patch_size}", "a ConvNeXt keeps its own", "leave it out")
        return rebuilt(part, image_size=image_size)

    def tables(self, state: State, part: Any) -> State:
        return {}

    def tower(self, part: Any, kept: Kept) -> nn.Module:
        from transformers import ConvNextModel  # here: no other network needs a module of transformers

        return ConvNextModel(part)

    def stock(self, part: Any) -> dict[str, Any]:
        return {**part.to_dict(), "hidden_size": part.hidden_sizes[-1]}  # transformers' dual encoder asks for it, and its ConvNeXt has none


BACKBONES: dict[str, Backbone] = {kind.config_class.model_type: kind() for kind in (Plain, Dino, Windows, Convolutions)}
POOLED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    CLS: lambda tower, states: tower.post_norm(states[:, 0]),
    POOLER: lambda tower, states: tower.pooler(tower.post_norm(states[:, 0])).tanh(),
    MEAN: lambda tower, states: tower.post_norm(states).mean(1),
    NORMED_MEAN: lambda tower, states: tower.layernorm(states.mean(1)),
}
"""How one vector [B, W] of an image is made of the last states [B, T, W] of its tower."""
