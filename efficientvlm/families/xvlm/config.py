"""Configuration of X-VLM: sizes, and which heads and neurons of each layer are still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model
from transformers import PreTrainedConfig

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, Flow, groups_of
from efficientvlm.families.checks import MOST_LAYERS, Colours, Many, Pixels
from efficientvlm.families.family import SMALLER
from efficientvlm.families.structure import Layered, Layerwise, Sizes, Structure, odd_layers
from efficientvlm.families.towers.swin import depths_of, keep_pairs
from efficientvlm.settings.base import Strict, parse

TOWERS = ("vision", "text", "fusion", "decoder")
PRETRAIN_HEADS = ("itc", "itm", "mlm", "box")
CAPTION_HEAD = "lm"
PAIR_HEADS = ("compare", "assign")
"""Heads of networks that read two images at a time."""

SIZES: dict[str, dict[str, Any]] = SMALLER | {
    "tiny": SMALLER["tiny"] | {"fusion_layers": 2, "local_attention_depth": 2},
    "small": SMALLER["small"] | {"text_layers": 3, "fusion_layers": 3},
}


class XVLMConfig(Layerwise, PreTrainedConfig):
    """Defaults are the CLIP-ViT-B/16 + BERT-base teacher of EfficientVLM (facts: 12 vision, 6 text, 6 fusion layers).

    CLIP normalises what enters its first layer and has quick-GELU; other vision transformers do without the one (`vision_pre_norm`) or have
    the exact GELU (`vision_activation`). With `vision_depths`, the layers of each stage, the tower is a Swin as in the public files: width,
    heads and neurons are those of its last stage then, and a stage has half of what the next one has. Contrast, matching and boxes read the
    first token of a text or, with `text_pooling` mean, the mean of its tokens, as sentence encoders are trained. With the head
    `lm`, which stands alone, text and fusion layers are one causal decoder that describes images. With `fusion_images` 2, fusion layers
    take turns to attend to one and to the other of two images, and two that follow each other have keys and values in common (NLVR2).
    """

    model_type = "xvlm"
    crossing = ("fusion", "decoder")
    usual_losses = PRETRAIN_HEADS
    together = (("text", "fusion", "decoder"),)

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_intermediate: int = 3072
    vision_eps: float = 1e-5
    vision_pre_norm: bool = True
    vision_activation: str = "quick_gelu"
    vision_depths: list[int] | None = None
    vision_window: int = 7
    vision_drop_path: float = 0.1
    local_attention_depth: int = 4

    vocab_size: int = 30522
    max_positions: int = 512
    type_vocab_size: int = 2
    text_width: int = 768
    text_layers: int = 6
    fusion_layers: int = 6
    fusion_images: int = 1
    decoder_layers: int = 0
    text_heads: int = 12
    text_intermediate: int = 3072
    text_eps: float = 1e-12
    text_pooling: str = "cls"
    dropout: float = 0.1

    embed_dim: int = 256
    heads: list[str] | tuple[str, ...] = PRETRAIN_HEADS
    temperature_init: float = 0.07
    initializer_range: float = 0.02

    @property
    def stride(self) -> int:
        """Pixels on a side of what a vision token stands for in the end."""
        return self.patch_size << (len(self.vision_depths or [0]) - 1)

    @property
    def patches(self) -> int:
        return (self.image_size // self.stride) ** 2

    def vision_parts(self, layer: int) -> int:
        """Into how many parts width, heads and neurons of the last stage are divided at vision `layer`."""
        ends = accumulate(self.vision_depths or [self.vision_layers])
        return 1 << sum(layer < end for end in list(ends)[:-1])

    @property
    def usual_tokens(self) -> int:
        return 40

    def learns(self) -> frozenset[str]:
        return frozenset(self.heads) & set(PRETRAIN_HEADS)

    @property
    def feature_width(self) -> int:
        return self.embed_dim

    def layers(self) -> dict[str, int]:
        return {"vision": self.vision_layers, "text": self.text_layers, "fusion": self.fusion_layers, "decoder": self.decoder_layers}

    def layered(self, tower: str, layer: int) -> Layered:
        if tower == "vision":
            parts = self.vision_parts(layer)
            return Layered(self.vision_width // parts, self.vision_heads // parts, self.vision_intermediate // parts)
        return Layered(self.text_width, self.text_heads, self.text_intermediate)

    def reads(self) -> tuple[int, int, int, int]:
        return self.image_size, self.stride, self.max_positions, self.vocab_size

    def sizes(self) -> Sizes:
        return super().sizes()._replace(window=self.vision_window if self.vision_depths else None)

    def abilities(self) -> frozenset[str]:
        if self.decoder_layers:
            return frozenset({"answer"})
        if CAPTION_HEAD in self.heads:
            return frozenset({"caption"})
        if {*self.heads} == {"box"}:
            return frozenset({"ground"})
        by_head = {"itc": "embed", "itm": "match", **{head: head for head in PAIR_HEADS}}
        trained = {"pretrain"} if set(self.heads) & set(PRETRAIN_HEADS) else set()
        return frozenset({by_head[head] for head in self.heads if head in by_head} | trained)

    def flows(self) -> list[Flow]:
        """Pictures reach texts by cross-attention alone, a pooled [CLS] sees other positions by self-attention alone."""
        layers = self.layers()
        crossing = groups_of(layers, CROSS_HEAD, "fusion")
        flows = [Flow("image", "vision.patches"), Flow("text", "text.tokens")]
        if layers["decoder"]:
            flows += [Flow("text.tokens", "fusion.tokens"), Flow("vision.patches", "fusion.tokens", crossing)]
            return [*flows, Flow("fusion.tokens", "decoder", groups_of(layers, CROSS_HEAD, "decoder")), Flow("decoder", "answer")]
        if CAPTION_HEAD in self.heads:
            into = [Flow("text.tokens", "fusion.tokens"), Flow("vision.patches", "fusion.tokens", crossing)]
            return [*flows, *into, Flow("fusion.tokens", "caption")]
        pools = self.text_pooling == "cls"
        if self.fusion_images > 1:
            return self._flows_of_two(groups_of(layers, HEAD, "text", "fusion") if pools else None, crossing)
        if "itc" in self.heads:
            first = None if self.vision_depths else groups_of(layers, HEAD, "vision")  # of a Swin it is the mean of the patches
            flows += [Flow("vision.patches", "vision.cls", first), Flow("vision.cls", "itc")]
            flows += [Flow("text.tokens", "text.pooled", groups_of(layers, HEAD, "text") if pools else None), Flow("text.pooled", "itc")]
        mixing = groups_of(layers, HEAD, "text", "fusion")
        for at, heads, through in (("pooled", ("itm", "box"), mixing if pools else None), ("masked", ("mlm",), mixing)):
            if read := [head for head in heads if head in self.heads]:
                flows += [Flow("text.tokens", f"fusion.{at}", through), Flow("vision.patches", f"fusion.{at}", crossing)]
                flows += [Flow(f"fusion.{at}", head) for head in read]
        return flows

    def _flows_of_two(self, mixing: tuple[str, ...] | None, crossing: tuple[str, ...]) -> list[Flow]:
        flows = [Flow("text", "text.tokens"), Flow("text.tokens", "fusion.pooled", mixing)]
        for number, image in enumerate(("left", "right")):
            flows.append(Flow(f"{image} image", f"vision.{image}"))
            flows.append(Flow(f"vision.{image}", "fusion.pooled", crossing[number :: self.fusion_images]))
        return [*flows, *(Flow("fusion.pooled", "verdict" if head == "compare" else head) for head in self.heads)]

    def choose(self, tower: str, count: int | None = None) -> list[int]:
        """As the base says; of a Swin pairs of layers, stage by stage; of fusion layers for several images one for each."""
        if tower == "fusion" and self.fusion_images > 1:
            return self._choose_fusion(count)
        if tower != "vision" or not self.vision_depths:
            return super().choose(tower, count)
        fewest, most = 2 * len(self.vision_depths), sum(self.vision_depths)
        wanted = max(fewest, most // 4 * 2) if count is None else count
        if wanted % 2 or not fewest <= wanted <= most:
            why = "a Swin keeps pairs of layers, one a stage at least"
            raise BadInput(f"{wanted} vision layers", why, f"ask for an even number, {fewest} to {most}")
        return keep_pairs(self.vision_depths, wanted)

    def _choose_fusion(self, count: int | None) -> list[int]:
        each, total = self.fusion_images, self.fusion_layers // self.fusion_images
        wanted = each * max(total // 2, min(total, 1)) if count is None else count
        if wanted % each:
            raise BadInput(f"{wanted} fusion layers", f"each of {each} images has its own", f"ask for a multiple of {each}")
        return [each * chosen + image for chosen in odd_layers(total, wanted // each) for image in range(each)]

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        each, chosen = self.fusion_images, layers["fusion"]
        if chosen != [layer - layer % each + image for layer in chosen[::each] for image in range(each)]:
            why = f"{each} layers that follow each other, one for each image, have keys and values in common"
            raise BadInput(f"fusion layers {chosen}", why, f"choose {', '.join(map(str, range(each)))} or the like, together")
        local = self.local_attention_depth
        if self.vision_layers and not self.vision_depths:
            local = sum(old >= self.vision_layers - local for old in layers["vision"])
        sizes = {f"{tower}_layers": len(chosen) for tower, chosen in layers.items()}
        depths = depths_of(self.vision_depths, layers["vision"]) if self.vision_depths else None
        return self.of_layers(layers, **sizes, local_attention_depth=local, vision_depths=depths)

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        if fusion_layers is not None:
            raise BadInput(
                "fusion_layers is not for this network", "its fusion layers are a tower of their own", "use layers: {fusion: ...}"
            )
        if "vision" in sizes and self.vision_depths:
            why = "its stages differ in width, and each hangs on the one before"
            raise BadInput("a Swin keeps its width", why, "change its layers, or the towers of texts")
        names = {"vision": "vision"} | dict.fromkeys(("text", "fusion", "decoder"), "text")
        fields = {
            f"{names[tower]}_{name}": value
            for tower, size in sizes.items()
            for name, value in zip(("width", "heads", "intermediate"), size, strict=True)
        }
        return self.copy(kept=None, **fields)


def checked_settings(values: Mapping[str, Any], allowed: Iterable[str] | None = None, why: str = "") -> dict[str, Any]:
    """`values` a user gave for fields of :class:`XVLMConfig`, each of the field's type; structure (`kept`, `layer_source`) is no setting.

    Raises:
        BadInput: naming every unknown field and wrong value, or a field outside `allowed` and `why` it cannot be set.
    """
    given = parse(_settings_schema(), dict(values), "settings").model_dump(exclude_unset=True)
    if allowed is not None and (fixed := sorted(set(given) - set(allowed))):
        raise BadInput(f"settings.{fixed[0]} cannot be set", f"it {why}", f"what can be set: {', '.join(sorted(allowed))}")
    return given


def check_fields(values: Mapping[str, Any], where: str) -> None:
    """Refuse a field of the stored configuration `values` that is not of its type; :class:`BadInput` names every one."""
    schema = _settings_schema()
    parse(schema, {name: value for name, value in values.items() if name in schema.model_fields}, where)


@cache
def _settings_schema() -> type[Strict]:
    count = Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    kinds: dict[str, Any] = {"int": Many, "float": Annotated[float, Field(ge=0)], "list[str] | None": list[str] | None}
    special: dict[str, Any] = {
        **dict.fromkeys(("vision_layers", "text_layers", "fusion_layers", "decoder_layers", "local_attention_depth"), count),
        **dict.fromkeys(("image_mean", "image_std"), Colours),
        **dict.fromkeys(("image_size", "patch_size"), Pixels),
        "heads": list[Literal["itc", "itm", "mlm", "box", "lm", "compare", "assign"]],
        "fusion_images": Literal[1, 2],
        "vision_pre_norm": bool,
        "vision_depths": Annotated[list[Annotated[Pixels, Field(strict=True)]], Field(min_length=2, max_length=8)] | None,
        "vision_window": Annotated[Pixels, Field(strict=True)],
        **dict.fromkeys(("dropout", "vision_drop_path"), Annotated[float, Field(ge=0, lt=1)]),
        "vision_activation": Literal["quick_gelu", "gelu"],
        "text_pooling": Literal["cls", "mean"],
    }
    types = {name: special.get(name) or kinds.get(kind) for name, kind in (Structure.__annotations__ | XVLMConfig.__annotations__).items()}
    fields: dict[str, Any] = {name: (kind, getattr(XVLMConfig, name)) for name, kind in types.items() if kind is not None}
    return create_model("Settings", __base__=Strict, **fields)


def check_sizes(config: XVLMConfig) -> XVLMConfig:
    """`config` if its sizes fit together; :class:`BadInput` says which do not."""
    if CAPTION_HEAD in config.heads and (len(config.heads) > 1 or config.decoder_layers or not config.fusion_layers):
        others = [*(head for head in config.heads if head != CAPTION_HEAD), *(["a decoder"] if config.decoder_layers else [])]
        why = "a network that describes images does nothing else" if others else "without fusion layers it does not see them"
        raise BadInput(f"heads is {list(config.heads)}{' beside a decoder' * bool(config.decoder_layers)}", why, "use heads=[lm] alone")
    for tower in ("vision", "text"):
        width, heads = getattr(config, f"{tower}_width"), getattr(config, f"{tower}_heads")
        if heads < 1 or width % heads:
            raise BadInput(
                f"{tower}_heads is {heads}", f"{width} columns cannot be shared evenly by so many heads", f"use a divisor of {width}"
            )
    if config.patch_size < 1 or config.image_size % config.patch_size:
        raise BadInput(
            f"image_size is {config.image_size}", f"it is no multiple of the patch size {config.patch_size}", "use a multiple of it"
        )
    _check_pairs(config)
    if config.vision_depths:
        return _check_swin(config)
    if config.local_attention_depth > config.vision_layers:
        raise BadInput(
            f"local_attention_depth is {config.local_attention_depth}",
            f"there are {config.vision_layers} vision layers",
            "use that many at most",
        )
    return config


def _check_pairs(config: XVLMConfig) -> None:
    """:class:`BadInput` unless the network reads one image at a time, or is all made for two."""
    of_two = [head for head in config.heads if head in PAIR_HEADS]
    if config.fusion_images == 1:
        if of_two:
            raise BadInput(f"heads are {', '.join(config.heads)}", f"{of_two[0]} is of two images", "use fusion_images 2, or other heads")
        return
    if config.fusion_layers % config.fusion_images or not config.fusion_layers:
        why = f"each of {config.fusion_images} images has fusion layers of its own"
        raise BadInput(f"fusion_layers is {config.fusion_layers}", why, f"use a multiple of {config.fusion_images}, one at least")
    if config.decoder_layers or len(of_two) != 1 or len(config.heads) != 1:
        why = f"a network of {config.fusion_images} images has one head, {' or '.join(PAIR_HEADS)}, and no decoder"
        raise BadInput(
            f"heads are {', '.join(config.heads) or 'none'}, decoder_layers is {config.decoder_layers}", why, "use one of these alone"
        )


def _check_swin(config: XVLMConfig) -> XVLMConfig:
    depths, parts = config.vision_depths or [], 1 << (len(config.vision_depths or []) - 1)
    if any(depth % 2 for depth in depths):
        raise BadInput(f"vision_depths is {depths}", "a plain layer and a shifted one make a pair", "use an even number of layers a stage")
    if config.vision_layers != sum(depths):
        raise BadInput(f"vision_layers is {config.vision_layers}", f"the stages have {depths}", f"{sum(depths)} is their sum")
    for name in ("vision_width", "vision_heads", "vision_intermediate"):
        if getattr(config, name) % parts:
            why = f"it halves from stage to stage, {len(depths) - 1} times"
            raise BadInput(f"{name} is {getattr(config, name)}", why, f"use a multiple of {parts}")
    sides = [config.image_size // config.patch_size >> stage for stage in range(len(depths))]
    if config.image_size % config.stride or any(side % min(config.vision_window, side) for side in sides):
        why = f"its stages have {', '.join(map(str, sides))} tokens on a side, and windows of {config.vision_window} must fill them"
        raise BadInput(f"image_size is {config.image_size}", why, f"use {config.vision_window * config.stride}, or another vision_window")
    return config
