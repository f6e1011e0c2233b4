"""Configuration of X-VLM: sizes, and which heads and neurons of each layer are still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model
from transformers import PreTrainedConfig

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, Flow, groups_of
from efficientvlm.families.checks import MOST_LAYERS, Colours, Many, Pixels
from efficientvlm.families.family import SMALLER
from efficientvlm.families.structure import Layered, Structure, Uniform
from efficientvlm.settings.base import Strict, parse

TOWERS = ("vision", "text", "fusion", "decoder")
PRETRAIN_HEADS = ("itc", "itm", "mlm", "box")

SIZES: dict[str, dict[str, Any]] = SMALLER | {
    "tiny": SMALLER["tiny"] | {"fusion_layers": 2, "local_attention_depth": 2},
    "small": SMALLER["small"] | {"text_layers": 3, "fusion_layers": 3},
}


class XVLMConfig(Uniform, PreTrainedConfig):
    """Defaults are the CLIP-ViT-B/16 + BERT-base teacher of EfficientVLM (facts: 12 vision, 6 text, 6 fusion layers).

    CLIP normalises what enters its first layer and has quick-GELU; other vision transformers do without the one (`vision_pre_norm`) or have
    the exact GELU (`vision_activation`). Contrast, matching and boxes read the first token of a text or, with `text_pooling` mean, the mean
    of its tokens, as sentence encoders are trained.
    """

    model_type = "xvlm"
    crossing = ("fusion", "decoder")

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_intermediate: int = 3072
    vision_eps: float = 1e-5
    vision_pre_norm: bool = True
    vision_activation: str = "quick_gelu"
    local_attention_depth: int = 4

    vocab_size: int = 30522
    max_positions: int = 512
    type_vocab_size: int = 2
    text_width: int = 768
    text_layers: int = 6
    fusion_layers: int = 6
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
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def usual_tokens(self) -> int:
        return 40

    def layers(self) -> dict[str, int]:
        return {"vision": self.vision_layers, "text": self.text_layers, "fusion": self.fusion_layers, "decoder": self.decoder_layers}

    def layered(self, tower: str) -> Layered:
        if tower == "vision":
            return Layered(self.vision_width, self.vision_heads, self.vision_intermediate)
        return Layered(self.text_width, self.text_heads, self.text_intermediate)

    def reads(self) -> tuple[int, int, int, int]:
        return self.image_size, self.patch_size, self.max_positions, self.vocab_size

    def abilities(self) -> frozenset[str]:
        if self.decoder_layers:
            return frozenset({"answer"})
        by_head = {"itc": "embed", "itm": "match"}
        return frozenset({by_head[head] for head in self.heads if head in by_head} | ({"pretrain"} if self.heads else set()))

    def flows(self) -> list[Flow]:
        """Pictures reach texts by cross-attention alone, a pooled [CLS] sees other positions by self-attention alone."""
        layers = self.layers()
        crossing = groups_of(layers, CROSS_HEAD, "fusion")
        flows = [Flow("image", "vision.patches"), Flow("text", "text.tokens")]
        if layers["decoder"]:
            flows += [Flow("text.tokens", "fusion.tokens"), Flow("vision.patches", "fusion.tokens", crossing)]
            return [*flows, Flow("fusion.tokens", "decoder", groups_of(layers, CROSS_HEAD, "decoder")), Flow("decoder", "answer")]
        pools = self.text_pooling == "cls"
        if "itc" in self.heads:
            flows += [Flow("vision.patches", "vision.cls", groups_of(layers, HEAD, "vision")), Flow("vision.cls", "itc")]
            flows += [Flow("text.tokens", "text.pooled", groups_of(layers, HEAD, "text") if pools else None), Flow("text.pooled", "itc")]
        mixing = groups_of(layers, HEAD, "text", "fusion")
        for at, heads, through in (("pooled", ("itm", "box"), mixing if pools else None), ("masked", ("mlm",), mixing)):
            if read := [head for head in heads if head in self.heads]:
                flows += [Flow("text.tokens", f"fusion.{at}", through), Flow("vision.patches", f"fusion.{at}", crossing)]
                flows += [Flow(f"fusion.{at}", head) for head in read]
        return flows

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        local = self.local_attention_depth
        if self.vision_layers:
            local = sum(old >= self.vision_layers - local for old in layers["vision"])
        sizes = {f"{tower}_layers": len(chosen) for tower, chosen in layers.items()}
        return self.of_layers(layers, **sizes, local_attention_depth=local)


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
        "heads": list[Literal["itc", "itm", "mlm", "box"]],
        "vision_pre_norm": bool,
        "vision_activation": Literal["quick_gelu", "gelu"],
        "text_pooling": Literal["cls", "mean"],
    }
    types = {name: special.get(name) or kinds.get(kind) for name, kind in (Structure.__annotations__ | XVLMConfig.__annotations__).items()}
    fields: dict[str, Any] = {name: (kind, getattr(XVLMConfig, name)) for name, kind in types.items() if kind is not None}
    return create_model("Settings", __base__=Strict, **fields)


def check_sizes(config: XVLMConfig) -> XVLMConfig:
    """`config` if its sizes fit together; :class:`BadInput` says which do not."""
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
    if config.local_attention_depth > config.vision_layers:
        raise BadInput(
            f"local_attention_depth is {config.local_attention_depth}",
            f"there are {config.vision_layers} vision layers",
            "use that many at most",
        )
    return config
