"""A cross-encoder as a family of models: a text is read once more while its layers look at a picture, and its first token says whether both
belong together. The layers are those of `families/towers/`, which know their heads and neurons."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from efficientvlm.families.anatomy import CROSS_HEAD, HEAD, Flow, groups_of
from efficientvlm.families.checks import check_config
from efficientvlm.families.family import Family
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import open_config, read_json
from efficientvlm.families.network import Record, check_taps, kinds_of
from efficientvlm.families.structure import Layered, Layerwise
from efficientvlm.families.towers.bert import Bert, Embeddings
from efficientvlm.families.towers.layers import PostNormLayer, PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork, blank_batch
from efficientvlm.families.towers.parts import CROSS_ATTENTION, HIDDEN, SELF_ATTENTION, tap
from efficientvlm.families.towers.vit import Vit

EPS = 1e-5


class CrossEncoderConfig(Layerwise, PreTrainedConfig):
    """Sizes, and what they mean: which units there are, what can be done, by which heads an input reaches an output."""

    model_type = "cross_encoder"
    crossing = ("text",)

    image_size: int = 64
    patch_size: int = 16
    width: int = 32
    attention_heads: int = 4
    neurons: int = 64
    vision_layers: int = 2
    text_layers: int = 2
    vocab_size: int = 1000
    max_positions: int = 40
    initializer_range: float = 0.02

    def layers(self) -> dict[str, int]:
        return {"vision": self.vision_layers, "text": self.text_layers}

    def layered(self, tower: str, layer: int) -> Layered:
        return Layered(self.width, self.attention_heads, self.neurons)

    def reads(self) -> tuple[int, int, int, int]:
        return self.image_size, self.patch_size, self.max_positions, self.vocab_size

    def abilities(self) -> frozenset[str]:
        return frozenset({"embed", "match"})

    def flows(self) -> list[Flow]:
        seeing, looking, reading = (groups_of(self.layers(), *of) for of in ((HEAD, "vision"), (CROSS_HEAD, "text"), (HEAD, "text")))
        alone = [Flow("image", "vision.patches"), Flow("vision.patches", "vision.first", seeing), Flow("vision.first", "itc")]
        alone += [Flow("text", "text.tokens"), Flow("text.tokens", "text.alone", reading), Flow("text.alone", "itc")]
        both = [Flow("text.tokens", "text.first", reading), Flow("vision.patches", "text.first", looking), Flow("text.first", "itm")]
        return alone + both

    def with_layers(self, layers: dict[str, list[int]]) -> Self:
        return self.of_layers(layers, **{f"{tower}_layers": len(chosen) for tower, chosen in layers.items()})


class CrossEncoder(TowerNetwork):
    """The network of any such configuration, pruned or not."""

    config_class = CrossEncoderConfig
    main_input_name = "pixels"
    taps = frozenset({f"{tower}.{kind}" for tower in ("vision", "text") for kind in (HIDDEN, SELF_ATTENTION)} | {f"text.{CROSS_ATTENTION}"})
    places = {"vision": "vision.layers", "text": "text.layers"}
    owners = {"vision": "vision", "text": "text"}

    def __init__(self, config: CrossEncoderConfig) -> None:
        super().__init__(config)
        kept, width, heads = config.kept_indices(), config.width, config.attention_heads
        seeing = Size.of_tower(kept, "vision", config.vision_layers, width, heads)
        reading = Size.of_tower(kept, "text", config.text_layers, width, heads, width)
        images = [PreNormLayer(size, EPS, F.gelu, {}) for size in seeing]
        texts = [PostNormLayer(size, EPS, F.gelu, {}, dropout=0.0, attention_dropout=0.0) for size in reading]
        self.vision = Vit(images, width, config.image_size, config.patch_size, EPS, {})
        self.text = Bert(texts, Embeddings(config.vocab_size, config.max_positions, width, EPS, 0.0))
        self.match_head = nn.Linear(width, 2)
        self.post_init()

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        return parameter.startswith("text.embeddings.") and ".norm." not in parameter

    def image_feature(self, states: Tensor) -> Tensor:
        return F.normalize(states[:, 0], dim=-1)

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The states are the ids themselves: to match, a text is read once more from its first layer, with the image."""
        return ids, F.normalize(self.text.read(ids, mask).states[:, 0], dim=-1)

    def match(self, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.match_head(self.text.read(texts, mask, self.text.context(images, rows=rows)).states[:, 0])
        return logits

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """Images and the text of each: `image_feature` and `text_feature` [B, E], the matching `logits` [B, 2], and the taps in `want`."""
        wanted, record = check_taps(self, want), Record()
        image = self.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        text = self.text.read(batch["text_ids"], batch["text_mask"], self.text.context(image.states), kinds_of(wanted, "text"))
        tap(record, "vision", image, kinds_of(wanted, "vision"))
        tap(record, "text", text, kinds_of(wanted, "text"))
        record["image_feature"] = self.image_feature(image.states)
        record["text_feature"] = self.embed_texts(batch["text_ids"], batch["text_mask"])[1]
        record["logits"] = self.match_head(text.states[:, 0])
        return record

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        return blank_batch(self.config.image_size, batch_size, text_length, device, texts="text", answers=False)


class CrossEncoders(Family):
    """How such networks are made and opened."""

    name = "cross_encoder"
    model_types = ("cross_encoder",)
    models = {CrossEncoderConfig: CrossEncoder}

    def read_config(self, path: Path) -> CrossEncoderConfig:
        file = path / "config.json"
        config: CrossEncoderConfig = open_config(CrossEncoderConfig, read_json(file), file)
        check_config(config, str(file))
        check_shapes(self, config, path)
        return config
