"""Configurations of BLIP: transformers' own fields, and which heads and neurons of each layer are still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from transformers import BlipConfig

from efficientvlm.errors import BadInput, shorten
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, SECOND_CROSS_HEAD, Flow, groups_of
from efficientvlm.families.checks import check_id
from efficientvlm.families.structure import Layered, TwoParts

CROSSING = ("text", "decoder")
"""Towers that attend to something else."""


class SlicedBlipConfig(TwoParts, BlipConfig):
    """What the three networks share; `towers` says which of vision, text, decoder one of them has.

    `cross_layers` names by tower the layers that have cross-attention; of a tower that it does not name all have it, as in transformers'
    classes. `contrast_temperature` is what similarities were divided by at the end of its pre-training. `decoder_layers` is the depth of a
    decoder that has another one than the question encoder (transformers knows one depth for both). `question_start_id` takes the place of
    the first token of a text that is read together with an image (BLIP: [ENC]); None leaves it, as transformers does. `answer_start_id`
    does so for a text that the decoder goes on with (BLIP: [DEC]), by default the text configuration's `bos_token_id`.
    """

    model_type = "evlm_blip"
    crossing = CROSSING
    stock: ClassVar[str] = ""
    able: ClassVar[frozenset[str]] = frozenset()
    gains = frozenset({"answer", "caption", "embed", "match", "compare"})
    processor: ClassVar[str] = "BlipImageProcessor"
    towers: ClassVar[tuple[str, ...]] = ()
    shares: ClassVar[bool] = False
    """Whether the decoder takes all but its self-attention from the text encoder, and attends to images as that does."""

    cross_layers: dict[str, list[int]] | None = None
    decoder_layers: int | None = None
    contrast_temperature: float | None = None
    question_start_id: int | None = None
    answer_start_id: int | None = None

    together = (("text", "decoder"),)
    rerank_by = "sum"
    usual_momentum = 0.995

    @property
    def feature_width(self) -> int:
        return int(self.image_text_hidden_size)

    @property
    def usual_tokens(self) -> int:
        if self.shares:
            return 30
        return 40 if "text" not in self.towers else 35  # of captions; of questions and texts to match

    @property
    def decoder_start(self) -> int:
        """First token of an answer or caption."""
        return self.text_config.bos_token_id if self.answer_start_id is None else self.answer_start_id

    def layers(self) -> dict[str, int]:
        """Layers of each tower, 0 of those that this network does not have."""
        depth = {"vision": self.vision_config.num_hidden_layers, **dict.fromkeys(("text", "decoder"), self.text_config.num_hidden_layers)}
        if self.decoder_layers is not None:
            depth["decoder"] = self.decoder_layers
        return {tower: count if tower in self.towers else 0 for tower, count in depth.items()}

    def crosses(self, tower: str, layer: int) -> bool:
        tower = "text" if self.shares and tower == "decoder" else tower
        return super().crosses(tower, layer) and layer in (self.cross_layers or {}).get(tower, [layer])

    def context_width(self, tower: str) -> int:
        """Columns of what `tower` cross-attends to: images, or in a decoder that answers questions the states of the question."""
        of_text = tower == "decoder" and "text" in self.towers and not self.shares
        return int(self.text_config.hidden_size if of_text else self.vision_config.hidden_size)

    @property
    def ties(self) -> bool:
        """Whether the output matrix is the word embedding: unless both configurations say that it is not, as transformers reads them."""
        return bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)

    def note_smoothing(self, smoothing: float) -> None:
        """Where transformers' own classes look for it."""
        self.text_config.label_smoothing = smoothing

    @property
    def stock_start(self) -> int | None:
        """Of a network that compares and matches none: it reads texts after two different ones."""
        if "decoder" not in self.towers:
            return None
        return self.question_start_id if "text" in self.towers else self.decoder_start

    @property
    def foreign(self) -> str:
        """What transformers has no word for even where nothing was removed and all layers have cross-attention; empty: nothing."""
        if not self.stock:
            return f"transformers has no class of a BLIP that is to {', '.join(sorted(self.able))}"
        layers, vision = self.layers(), self.vision_config.hidden_size
        depth = {tower: layers[tower] for tower in self.towers if tower != "vision"}
        if len({*depth.values(), self.text_config.num_hidden_layers}) > 1:
            said = " and ".join(f"{count} in {tower}" for tower, count in depth.items())
            return f"layers are {said}, where it has one depth for all texts"
        if any(self.context_width(tower) != vision for tower in self.towers):
            text = self.text_config.hidden_size
            return f"images are {vision} columns wide and questions {text}, where its decoder attends to questions as wide as images"
        if "decoder" in self.towers and self.decoder_start != self.text_config.bos_token_id:
            return (
                f"what it writes begins with token {self.decoder_start}, where it has bos_token_id, {self.text_config.bos_token_id}, there"
            )
        if self.cross_layers and "decoder" not in self.towers:
            why = "texts are read without images too, so that it cannot be switched off in a class that has it in all"
            return f"{self._without()}, and {why}"
        return ""

    def _without(self) -> str:
        """In words the first layer without cross-attention."""
        tower, layer = next(
            (tower, layer) for tower in self.cross_layers or {} for layer in range(self.layers()[tower]) if not self.crosses(tower, layer)
        )
        return f"layer {layer} of {tower} has no cross-attention"

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own class builds this very network."""
        return bool(self.stock) and not (self.kept or self.cross_layers or self.foreign)

    @property
    def opened_by(self) -> tuple[str, str] | None:
        return ("blip", self.stock) if self.is_stock else None

    def abilities(self) -> frozenset[str]:
        return self.able

    def flows(self) -> list[Flow]:
        """Pictures reach texts by cross-attention alone, a first token that is pooled sees other positions by self-attention alone."""
        layers, counts = self.layers(), self.original_counts()
        crossing = [group for group in groups_of(layers, CROSS_HEAD, "text", "decoder") if group in counts]
        texts, answers = (tuple(group for group in crossing if group.startswith(tower)) for tower in ("text", "decoder"))
        seen = Flow("image", "vision.patches")
        if "text" not in self.towers:
            return [seen, Flow("vision.patches", "decoder", answers), Flow("text", "decoder"), Flow("decoder", "caption")]
        if "decoder" in self.towers and not self.shares:
            read = [seen, Flow("text", "text.tokens"), Flow("vision.patches", "text.tokens", texts)]
            return [*read, Flow("text.tokens", "decoder", answers), Flow("decoder", "answer")]
        mixing = groups_of(layers, HEAD, "text")
        flows = [seen, Flow("vision.patches", "vision.cls", groups_of(layers, HEAD, "vision")), Flow("vision.cls", "itc")]
        flows += [Flow("text", "text.tokens"), Flow("text.tokens", "text.alone", mixing), Flow("text.alone", "itc")]
        flows += [Flow("text.tokens", "text.seeing", mixing), Flow("vision.patches", "text.seeing", texts), Flow("text.seeing", "itm")]
        if not self.shares:
            return flows
        return [*flows, Flow("vision.patches", "decoder", texts), Flow("text", "decoder"), Flow("decoder", "caption")]

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        if empty := [tower for tower in self.towers if not layers[tower]]:
            raise BadInput(f"no {empty[0]} layers", "a BLIP needs at least one in every tower", "ask for 1 or more")
        if self.shares and layers["text"] != layers["decoder"]:
            why = f"they share cross-attention and neurons; asked for are {layers['text']} and {layers['decoder']}"
            raise BadInput("text and decoder keep other layers", why, "ask for the same layers of both")
        changed = self.of_layers(layers)
        depth = {tower: len(chosen) for tower, chosen in layers.items()}
        changed.vision_config.num_hidden_layers = depth["vision"]
        changed.text_config.num_hidden_layers = depth["text" if "text" in self.towers else "decoder"]
        changed.cross_layers = moved(self.cross_layers, layers)
        both = {"text", "decoder"} <= {*self.towers}
        changed.decoder_layers = depth["decoder"] if both and depth["decoder"] != depth["text"] else None
        return changed

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        changed = self.copy(kept=None)
        for tower, size in sizes.items():
            part = changed.part(tower)
            part.hidden_size, part.num_attention_heads, part.intermediate_size = size
        changed.text_config.encoder_hidden_size = changed.vision_config.hidden_size
        if fusion_layers is not None:
            own = [tower for tower in self.crossing if not (self.shares and tower == "decoder")]
            depth = {tower: count for tower, count in self.layers().items() if count and tower in own}
            changed.cross_layers = crossing_last(depth, fusion_layers)
            places = ((tower, layer) for tower, count in depth.items() for layer in range(count))
            if lost := [tower for tower, layer in places if changed.crosses(tower, layer) and not self.crosses(tower, layer)]:
                why = f"fewer than {fusion_layers} of its last layers have cross-attention"
                raise BadInput(f"{lost[0]} cannot have so many fusion layers", why, "ask for fewer")
        return changed

    def stock_config(self, neurons: Mapping[str, int]) -> Self:
        chosen, texts = self.copy(kept=None), {tower: count for tower, count in neurons.items() if tower != "vision"}
        if len(set(texts.values())) > 1:
            why = f"neurons a layer are {', '.join(f'{count} in {tower}' for tower, count in texts.items())}: one number stands for both"
            raise BadInput("this BLIP does not fit transformers' own class", why, "use --format onnx or --format padded")
        chosen.vision_config.intermediate_size = neurons.get("vision", chosen.vision_config.intermediate_size)
        chosen.text_config.intermediate_size = next(iter(texts.values()), chosen.text_config.intermediate_size)
        if chosen.foreign:
            raise BadInput("this BLIP does not fit transformers' own class", chosen.foreign, "use --format onnx")
        if chosen.cross_layers:
            why = f"{self._without()}, where all of its layers have one"
            raise BadInput(
                "this BLIP does not fit transformers' own class", why, "use --format onnx, or --format padded, where it is switched off"
            )
        return chosen


class BlipAnswerConfig(SlicedBlipConfig):
    model_type = "evlm_blip_vqa"
    stock = "BlipForQuestionAnswering"
    able = frozenset({"answer"})
    towers = ("vision", "text", "decoder")


class BlipCaptionConfig(SlicedBlipConfig):
    model_type = "evlm_blip_caption"
    stock = "BlipForConditionalGeneration"
    able = frozenset({"caption"})
    towers = ("vision", "decoder")


class BlipRetrievalConfig(SlicedBlipConfig):
    model_type = "evlm_blip_retrieval"
    stock = "BlipForImageTextRetrieval"
    able = frozenset({"embed", "match", "contrast"})
    towers = ("vision", "text")


class BlipPretrainingConfig(SlicedBlipConfig):
    """Compares, matches and captions; units of what text encoder and decoder share are those of the encoder."""

    model_type = "evlm_blip_pretraining"
    able = frozenset({"pretrain", "contrast", "embed", "match", "caption"})
    towers = ("vision", "text", "decoder")
    shares = True
    usual_losses = ("itc", "itm", "lm")

    def learns(self) -> frozenset[str]:
        return frozenset(self.usual_losses)

    @property
    def foreign(self) -> str:
        return "it is not tuned for a task, and each of its classes is for one"

    def original_counts(self) -> dict[str, int]:
        counts = super().original_counts()
        return {group: count for group, count in counts.items() if not group.startswith("decoder.") or group.endswith(f".{HEAD}")}

    def borrowed(self) -> dict[str, str]:
        groups = [group for group in self.original_counts() if group.startswith("text.") and not group.endswith(f".{HEAD}")]
        return {group.replace("text", "decoder", 1): group for group in groups}


class BlipComparisonConfig(SlicedBlipConfig):
    """Reads a text together with two images (NLVR2): a layer that sees images has cross-attention for each of them.

    `merging_layers` are the layers in which a Linear makes one of what both give; in the others it is averaged. By default they are those
    that see images in the upper half of the text tower, as in the published network of twelve layers.
    """

    model_type = "evlm_blip_comparison"
    able = frozenset({"compare"})
    gains = frozenset()
    towers = ("vision", "text")

    merging_layers: list[int] | None = None

    @property
    def merging(self) -> list[int]:
        """The layers in which a Linear makes one of two."""
        depth = self.layers()["text"]
        upper = [layer for layer in range(depth // 2, depth) if self.crosses("text", layer)]
        return upper if self.merging_layers is None else self.merging_layers

    def original_counts(self) -> dict[str, int]:
        """As the base says, with heads for the second image behind those for the first."""
        counts: dict[str, int] = {}
        for group, count in super().original_counts().items():
            counts[group] = count
            if group.endswith(f".{CROSS_HEAD}"):
                counts[group.replace(CROSS_HEAD, SECOND_CROSS_HEAD)] = count
        return counts

    def flows(self) -> list[Flow]:
        layers, counts = self.layers(), self.original_counts()
        flows = [Flow("text", "text.tokens"), Flow("text.tokens", "text.seeing", groups_of(layers, HEAD, "text"))]
        for image, kind in (("left", CROSS_HEAD), ("right", SECOND_CROSS_HEAD)):
            through = tuple(group for group in groups_of(layers, kind, "text") if group in counts)
            flows += [Flow(f"{image} image", f"vision.{image}"), Flow(f"vision.{image}", "text.seeing", through)]
        return [*flows, Flow("text.seeing", "verdict")]

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        changed, merging = super().with_layers(layers), self.merging
        changed.merging_layers = [place for place, layer in enumerate(layers["text"]) if layer in merging]
        return changed

    def with_sizes(self, sizes: Mapping[str, Layered], fusion_layers: int | None = None) -> Self:
        changed = super().with_sizes(sizes, fusion_layers)
        changed.merging_layers = [layer for layer in self.merging if changed.crosses("text", layer)]
        return changed


def crossing_last(depth: Mapping[str, int], count: int | None) -> dict[str, list[int]] | None:
    """`cross_layers` where the last `count` layers of every tower have cross-attention, of a tower that has fewer all; None: all have it.

    Args:
        depth: layers of each tower with cross-attention.
    """
    last = {tower: [*range(layers - count, layers)] for tower, layers in depth.items() if count is not None and count < layers}
    return last or None


def moved(crossing: Mapping[str, list[int]] | None, layers: Mapping[str, list[int]]) -> dict[str, list[int]] | None:
    """`cross_layers` of the network that has only `layers` (tower → old numbers in their new order).

    Raises:
        BadInput: no layer of a tower would look at what it attends to.
    """
    found = {tower: [place for place, layer in enumerate(layers[tower]) if layer in old] for tower, old in (crossing or {}).items()}
    if empty := [tower for tower, new in found.items() if not new]:
        named = ", ".join(map(str, (crossing or {})[empty[0]]))
        why = f"of {empty[0]} the layers {named} have cross-attention, and without one nothing comes from there"
        raise BadInput(f"{empty[0]} layers {layers[empty[0]]} have no cross-attention", why, "keep one of those")
    return {tower: new for tower, new in found.items() if len(new) < len(layers[tower])} or None


KINDS: tuple[type[SlicedBlipConfig], ...] = (
    BlipAnswerConfig,
    BlipCaptionConfig,
    BlipRetrievalConfig,
    BlipPretrainingConfig,
    BlipComparisonConfig,
)


def check_sizes(config: SlicedBlipConfig, where: str) -> SlicedBlipConfig:
    """`config` if it is a BLIP's, beyond what `checks.check_config` asks of all; :class:`BadInput` says what is wrong."""
    vision, text = config.vision_config, config.text_config
    if not text.is_decoder:
        raise BadInput(f"{where}: text_config.is_decoder is false", "then no layer looks at the image", "use a BLIP with cross-attention")
    if vision.image_size % vision.patch_size:
        raise BadInput(
            f"{where}: images of {vision.image_size} px",
            f"they are no multiple of the patch size {vision.patch_size}",
            "correct image_size",
        )
    given = config.contrast_temperature
    if given is not None and not (type(given) in (int, float) and 0 < given < 100):
        raise BadInput(f"{where}: contrast_temperature is {given}", "similarities are divided by it", "correct it, or leave it out")
    for tower, crossing in (config.cross_layers or {}).items():
        depth = config.layers().get(tower, 0) if tower in config.crossing else 0
        if not crossing or any(not isinstance(layer, int) for layer in crossing) or [*crossing] != sorted({*crossing} & {*range(depth)}):
            why = f"of {depth} layers some have cross-attention, named from 0 on in ascending order"
            raise BadInput(f"{where}: cross_layers.{tower} is {crossing}", why, "correct it")
    if config.shares and config.decoder_layers not in (None, text.num_hidden_layers):
        why = f"decoder_layers is {config.decoder_layers}, and they share cross-attention and neurons"
        raise BadInput(f"{where}: text and decoder differ in depth", why, "leave decoder_layers out")
    if config.shares and "decoder" in (config.cross_layers or {}):
        raise BadInput(f"{where}: cross_layers names decoder", "its cross-attention is that of text", "leave it out")
    merging = getattr(config, "merging_layers", None)
    if merging is not None:
        known = [layer for layer in range(config.layers()["text"]) if config.crosses("text", layer)]
        if not isinstance(merging, list) or any(type(layer) is not int for layer in merging) or merging != sorted({*merging} & {*known}):
            why = f"it names layers that see images, of {known}, in ascending order"
            raise BadInput(f"{where}: merging_layers is {shorten(merging)}", why, "correct it")
    if "text" in config.towers and config.question_start_id is not None:
        check_id("question_start_id", config.question_start_id, text.vocab_size, where)
    if "decoder" in config.towers:
        check_id("the first token of answers", config.decoder_start, text.vocab_size, where)
    config.kept_indices()
    return config
