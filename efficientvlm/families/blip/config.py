"""Configurations of BLIP: transformers' own fields, and which heads and neurons of each layer are still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from transformers import BlipConfig

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, Flow, groups_of
from efficientvlm.families.checks import check_id
from efficientvlm.families.structure import TwoParts


class SlicedBlipConfig(TwoParts, BlipConfig):
    """What the three networks share; `towers` says which of vision, text, decoder one of them has.

    `decoder_layers` is the depth of a decoder that has another
    one than the question encoder (transformers knows one depth for both). `question_start_id` takes the place of the first token of a text
    that is read together with an image (BLIP: [ENC]); None leaves it, as transformers does. `answer_start_id` does so for a text that the
    decoder goes on with (BLIP: [DEC]), by default the text configuration's `bos_token_id`.
    """

    model_type = "evlm_blip"
    crossing = ("text", "decoder")
    stock: ClassVar[str] = ""
    able: ClassVar[frozenset[str]] = frozenset()
    processor: ClassVar[str] = "BlipImageProcessor"
    towers: ClassVar[tuple[str, ...]] = ()

    decoder_layers: int | None = None
    question_start_id: int | None = None
    answer_start_id: int | None = None

    @property
    def usual_tokens(self) -> int:
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

    def context_width(self, tower: str) -> int:
        """Columns of what `tower` cross-attends to: images, or in a decoder that answers questions the states of the question."""
        of_text = tower == "decoder" and "text" in self.towers
        return int(self.text_config.hidden_size if of_text else self.vision_config.hidden_size)

    @property
    def ties(self) -> bool:
        """Whether the output matrix is the word embedding: unless both configurations say that it is not, as transformers reads them."""
        return bool(self.tie_word_embeddings or self.text_config.tie_word_embeddings)

    def note_smoothing(self, smoothing: float) -> None:
        """Where transformers' own classes look for it."""
        self.text_config.label_smoothing = smoothing

    @property
    def is_stock(self) -> bool:
        """Whether transformers' own class builds this very network."""
        same_depth = len({self.layers()[tower] for tower in self.towers if tower != "vision"}) == 1
        stock_width = all(self.context_width(tower) == self.vision_config.hidden_size for tower in self.towers)
        return not self.kept and same_depth and stock_width and self.decoder_layers in (None, self.text_config.num_hidden_layers)

    @property
    def opened_by(self) -> tuple[str, str] | None:
        return ("blip", self.stock) if self.is_stock else None

    def abilities(self) -> frozenset[str]:
        return self.able

    def flows(self) -> list[Flow]:
        """Pictures reach texts by cross-attention alone, a first token that is pooled sees other positions by self-attention alone."""
        layers = self.layers()
        texts, answers = (groups_of(layers, CROSS_HEAD, tower) for tower in ("text", "decoder"))
        seen = Flow("image", "vision.patches")
        if "text" not in self.towers:
            return [seen, Flow("vision.patches", "decoder", answers), Flow("text", "decoder"), Flow("decoder", "caption")]
        if "decoder" in self.towers:
            read = [seen, Flow("text", "text.tokens"), Flow("vision.patches", "text.tokens", texts)]
            return [*read, Flow("text.tokens", "decoder", answers), Flow("decoder", "answer")]
        mixing = groups_of(layers, HEAD, "text")
        flows = [seen, Flow("vision.patches", "vision.cls", groups_of(layers, HEAD, "vision")), Flow("vision.cls", "itc")]
        flows += [Flow("text", "text.tokens"), Flow("text.tokens", "text.alone", mixing), Flow("text.alone", "itc")]
        return [
            *flows,
            Flow("text.tokens", "text.seeing", mixing),
            Flow("vision.patches", "text.seeing", texts),
            Flow("text.seeing", "itm"),
        ]

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        if empty := [tower for tower in self.towers if not layers[tower]]:
            raise BadInput(f"no {empty[0]} layers", "a BLIP needs at least one in every tower", "ask for 1 or more")
        changed = self.of_layers(layers)
        depth = {tower: len(chosen) for tower, chosen in layers.items()}
        changed.vision_config.num_hidden_layers = depth["vision"]
        changed.text_config.num_hidden_layers = depth["text" if "text" in self.towers else "decoder"]
        both = {"text", "decoder"} <= {*self.towers}
        changed.decoder_layers = depth["decoder"] if both and depth["decoder"] != depth["text"] else None
        return changed

    def stock_config(self, neurons: Mapping[str, int]) -> Self:
        chosen, texts = self.copy(kept=None), {tower: count for tower, count in neurons.items() if tower != "vision"}
        if len(set(texts.values())) > 1:
            why = f"neurons a layer are {', '.join(f'{count} in {tower}' for tower, count in texts.items())}: one number stands for both"
            raise BadInput("this BLIP does not fit transformers' own class", why, "use --format onnx or --format padded")
        chosen.vision_config.intermediate_size = neurons.get("vision", chosen.vision_config.intermediate_size)
        chosen.text_config.intermediate_size = next(iter(texts.values()), chosen.text_config.intermediate_size)
        if not chosen.is_stock:
            depth = ", ".join(f"{count} in {tower}" for tower, count in self.layers().items() if count)
            why = f"layers are {depth}, or the towers differ in width: it has one depth for all texts, and one width"
            raise BadInput("this BLIP does not fit transformers' own class", why, "use --format onnx")
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
    able = frozenset({"embed", "match"})
    towers = ("vision", "text")


KINDS: tuple[type[SlicedBlipConfig], ...] = (BlipAnswerConfig, BlipCaptionConfig, BlipRetrievalConfig)


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
    if "text" in config.towers and config.question_start_id is not None:
        check_id("question_start_id", config.question_start_id, text.vocab_size, where)
    if "decoder" in config.towers:
        check_id("the first token of answers", config.decoder_start, text.vocab_size, where)
    config.kept_indices()
    return config
