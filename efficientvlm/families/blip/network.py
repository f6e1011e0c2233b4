"""What BLIP's three networks have in common: towers of any number of heads and neurons a layer, under the names of transformers' files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficientvlm.errors import BadInput
from efficientvlm.families.anatomy import HEAD as HEADS
from efficientvlm.families.anatomy import SECOND_CROSS_HEAD
from efficientvlm.families.blip.config import BlipComparisonConfig, SlicedBlipConfig, check_sizes
from efficientvlm.families.blip.graphs import blip_graphs
from efficientvlm.families.blip.names import EMBEDDINGS, HEAD, IMAGE_LAYER, IMAGES, LAYERS, POSITIONS, TEXT_LAYER
from efficientvlm.families.blip.shared import BorrowingBert, BorrowingLayer
from efficientvlm.families.blip.start import TEMPERATURE, draw_blip
from efficientvlm.families.network import Graph, Record, check_taps, kinds_of, require
from efficientvlm.families.towers.attention import Cache, Context, Second
from efficientvlm.families.towers.bert import Bert, Embeddings, LanguageHead
from efficientvlm.families.towers.decoding import Writing
from efficientvlm.families.towers.layers import PostNormLayer, PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork, blank_batch, blank_pairs
from efficientvlm.families.towers.parts import (
    CROSS_ATTENTION,
    HIDDEN,
    NOTHING,
    SELF_ATTENTION,
    Encoded,
    activation,
    resize_positions,
    tap,
)
from efficientvlm.families.towers.vit import Vit

FEATURES = "features"


class Decoder(nn.Module):
    """The text tower that writes, and its prediction head."""

    def __init__(self, bert: Bert, head: LanguageHead) -> None:
        super().__init__()
        self.bert, self.cls = bert, nn.Module()
        self.cls.predictions = head

    def forward(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        """Tokens [B, L] to next-token logits [B, L, V]; with a `cache`, `ids` are the tokens that follow those in it."""
        out = self.bert.follow(ids, mask, context, cache, keep)
        head = cast(LanguageHead, self.cls.predictions)
        return head(out.states, self.bert.embeddings), out


class Blip(Writing, TowerNetwork):
    """What the three networks have in common."""

    places = LAYERS
    owners = {"vision_model": "vision", "text_encoder": "text", "text_decoder": "decoder"}
    main_input_name = "pixel_values"
    config: SlicedBlipConfig

    @property
    def taps(self) -> frozenset[str]:
        """Of the towers that there are; features only where they are compared."""
        towers = self.config.towers
        found = {f"{tower}.{kind}" for tower in towers for kind in (HIDDEN, SELF_ATTENTION)}
        found |= {f"{tower}.{CROSS_ATTENTION}" for tower in towers if tower != "vision"}
        return frozenset(found | {f"{tower}.{FEATURES}" for tower in ("vision", "text") if "embed" in self.config.able})

    def __init__(self, config: SlicedBlipConfig) -> None:
        super().__init__(config)
        self.vision_model = self._images()
        if "text" in config.towers:
            self.text_encoder = self._texts("text")
        if "decoder" in config.towers:
            bert, text = self._borrowing() if config.shares else self._texts("decoder"), config.text_config
            shape = (text.hidden_size, text.vocab_size, text.layer_norm_eps, activation(text.hidden_act))
            tied: dict[str, Any] = {} if config.shares else {"tied": bert.embeddings.word, "own": not config.ties}
            self.text_decoder = Decoder(bert, LanguageHead(*shape, HEAD, **tied))
        if config.shares:
            self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        if "compare" in config.able:
            width = config.text_config.hidden_size
            self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        if "embed" in config.able:
            vision, text, outputs = config.vision_config.hidden_size, config.text_config.hidden_size, config.image_text_hidden_size
            self.vision_proj, self.text_proj, self.itm_head = nn.Linear(vision, outputs), nn.Linear(text, outputs), nn.Linear(text, 2)
        self.post_init()

    def _images(self) -> Vit:
        part, kept = self.config.vision_config, self.config.kept_indices()
        sizes = Size.of_tower(kept, "vision", part.num_hidden_layers, part.hidden_size, part.num_attention_heads)
        kind: dict[str, Any] = {"dropout": part.attention_dropout, "fused": True}
        layers = [PreNormLayer(size, part.layer_norm_eps, activation(part.hidden_act), IMAGE_LAYER, **kind) for size in sizes]
        shape = (part.hidden_size, part.image_size, part.patch_size, part.layer_norm_eps)
        return Vit(layers, *shape, IMAGES, patch_bias=True, batch_axis=True)

    def _texts(self, tower: str) -> Bert:
        part, kept, context = self.config.text_config, self.config.kept_indices(), self.config.context_width(tower)
        shape = part.hidden_size, part.num_attention_heads
        crossing = [self.config.crosses(tower, layer) for layer in range(self.config.layers()[tower])]
        sizes = [Size.of(kept, f"{tower}.{layer}", *shape, context * crosses) for layer, crosses in enumerate(crossing)]
        if isinstance(self.config, BlipComparisonConfig):
            merging = self.config.merging
            for layer, size in enumerate(sizes):
                if crossing[layer]:
                    second = Second(len(kept[f"{tower}.{layer}.{SECOND_CROSS_HEAD}"]), layer in merging)
                    sizes[layer] = size._replace(second=second)
        dropout = {"dropout": part.hidden_dropout_prob, "attention_dropout": part.attention_probs_dropout_prob}
        layers = [PostNormLayer(size, part.layer_norm_eps, activation(part.hidden_act), TEXT_LAYER, **dropout) for size in sizes]
        table = (part.vocab_size, part.max_position_embeddings, part.hidden_size, part.layer_norm_eps, part.hidden_dropout_prob)
        return Bert(layers, Embeddings(*table, padding=part.pad_token_id, names=EMBEDDINGS), {"layers": "encoder.layer"})

    def _borrowing(self) -> BorrowingBert:
        """The decoder of a network in which it has only self-attention of its own."""
        part, kept = self.config.text_config, self.config.kept_indices()
        dropout, layers = part.attention_probs_dropout_prob, []
        for number, lender in enumerate(cast(Iterable[PostNormLayer], self.text_encoder.layers)):
            size = lender.size._replace(heads=len(kept[f"decoder.{number}.{HEADS}"]))
            layers.append(BorrowingLayer(lender, size, part.layer_norm_eps, TEXT_LAYER, attention_dropout=dropout))
        return BorrowingBert(self.text_encoder, layers, {"layers": "encoder.layer"})

    def _init_weights(self, module: nn.Module) -> None:
        draw_blip(self, module)

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        table = parameter.rpartition(".embeddings.")[2]
        return table.startswith(("word_embeddings.", "position_embeddings.")) or table == "position_embedding"

    def get_input_embeddings(self) -> nn.Module:
        bert: Bert = self.text_encoder if "text" in self.config.towers else self.text_decoder.bert
        return bert.embeddings.word

    def resized(self, image_size: int) -> Any:
        """The positions of patches are resized as in the published code; :class:`BadInput` where patches do not fill such images."""
        if image_size == self.config.vision_config.image_size:
            return self
        config = self.config.copy()
        config.vision_config.image_size = image_size
        side = image_size // check_sizes(config, "config.json").vision_config.patch_size
        return self.reshaped(config, lambda state: {POSITIONS: resize_positions(state[POSITIONS][0], side)[None]})

    def image_feature(self, states: Tensor) -> Tensor:
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = NOTHING) -> Encoded:
        """Token ids and mask [B, L] (1 = token), read without an image, to states [B, L, W]."""
        out: Encoded = self.text_encoder.read(ids, mask, None, keep)
        return out

    def text_feature(self, states: Tensor, mask: Tensor) -> Tensor:
        """States [B, L, W] of texts that were read without an image to unit vectors [B, E]; only of a network that compares them."""
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def feature_parameters(self) -> frozenset[str]:
        texts = ("vision_model.", "text_encoder.", "vision_proj.", "text_proj.")
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(texts) and ".crossattention." not in name)

    def read(self, ids: Tensor, mask: Tensor, context: Context, keep: frozenset[str] = NOTHING) -> Encoded:
        """Texts [B, L] that are read with an image, whose first token becomes `question_start_id`, to states [B, L, W]."""
        return self.text_encoder.read(starting(ids, self.config.question_start_id), mask, context, keep)

    def follow(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        """Tokens [B, L] to next-token logits [B, L, V], causal; the first token of a text becomes the decoder's own."""
        ids = starting(ids, self.config.decoder_start, cache.length if cache else 0)
        logits, out = self.text_decoder(ids, mask, context, cache, keep)
        return logits, out

    def attended(self, states: Tensor, rows: Tensor | None = None) -> Context:
        return self.text_decoder.bert.context(states, rows=rows)

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """Next-token `logits` [A, L, V] of answers or captions, or the matching `logits` [B, 2] (no, yes) of image and text.

        The taps `vision.features` and `text.features` of a matching network are unit vectors [I, E] and [B, E]; for them texts are read
        once more, without the image. A pre-training network matches and adds `lm_logits` [B, L, V], those of captions. A network that
        compares reads texts about pairs of images (`data.kinds.statements.statement_batch`): `logits` [S, 2] of false and true; its states
        of images are those of all first, then of all second images, and maps of cross-attention have the heads for the first image in front
        of those for the second.
        """
        wanted = check_taps(self, want)
        if "compare" in self.config.able:
            return self._compare(batch, wanted)
        if "text" not in self.config.towers:
            return self._caption(batch, wanted)
        if "decoder" not in self.config.towers:
            return self._match(batch, wanted)
        if self.config.shares:
            record = self._match(batch, wanted)
            seen = self.attended(record["image_states"], batch.get("image_index"))
            record["lm_logits"], out = self.follow(batch["text_ids"], batch["text_mask"], seen, keep=kinds_of(wanted, "decoder"))
            tap(record, "decoder", out, kinds_of(wanted, "decoder"))
            return record
        record, answers = self.encode(batch, wanted)
        if "answer_ids" in batch:
            self.answer(batch, answers, wanted, record)
        return record

    def encode(self, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, Context]:
        require(self, "answer")
        wanted = check_taps(self, want)
        record, states = self._read_with_image(batch, batch["question_ids"], batch["question_mask"], wanted)
        return record, self.text_decoder.bert.context(states, batch["question_mask"])

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The states are the ids themselves: to match, a text is read once more from its first layer, with the image."""
        return ids, self.text_feature(self.encode_text(ids, mask).states, mask)

    def match(self, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.itm_head(self.read(texts, mask, self.text_encoder.context(images, rows=rows)).states[:, 0])
        return logits

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        answers, side = "answer" in self.config.able, self.config.vision_config.image_size
        if "compare" in self.config.able:
            return blank_pairs(side, batch_size, text_length, device)
        return blank_batch(side, batch_size, text_length, device, texts="question" if answers else "text", answers=answers)

    @property
    def exportable(self) -> bool:
        return not self.config.shares

    def graphs(self) -> list[Graph]:
        if not self.exportable:
            raise BadInput("this model is not tuned for a task", "pre-training is not exported", "finetune it with --task captioning first")
        return blip_graphs(self)

    def completed(self) -> Any:
        """With cross-attention in every layer, switched off where this one has none; only where texts are always read with what they
        attend to.

        What such an attention adds is 0. The norm behind it, of what the norm before has normalised, then does that norm's work, whose own
        scale and shift become 1 and 0. Exact but for rounding. Source: ours, as transformers' classes have it in all layers.
        """
        if not self.config.cross_layers or self.config.foreign:
            return self
        full = type(self)(self.config.copy(cross_layers=None))
        own = self.state_dict()
        full.load_state_dict({name: own.get(name, torch.zeros_like(tensor)) for name, tensor in full.state_dict().items()})
        for tower in self.config.cross_layers:
            for layer in range(self.config.layers()[tower]):
                if not self.config.crosses(tower, layer):
                    _switch_off(cast(PostNormLayer, full.get_submodule(f"{LAYERS[tower]}.{layer}")))
        return full.to(self.device).train(self.training)

    def stock_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Captioning and matching take the same; a network that answers is given its questions as answers too."""
        if "text_ids" in batch:
            return {"pixel_values": batch["pixels"], "input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}
        ids, mask = batch["question_ids"], batch["question_mask"]
        return {"pixel_values": batch["pixels"], "input_ids": ids, "attention_mask": mask, "labels": ids}

    def _read_with_image(self, batch: dict[str, Any], ids: Tensor, mask: Tensor, wanted: frozenset[str]) -> tuple[Record, Tensor]:
        """Record of vision and text, with text `states` [B, L, W] after cross-attention."""
        image = self.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        seen = self.text_encoder.context(image.states, rows=batch.get("image_index"))
        text = self.read(ids, mask, seen, kinds_of(wanted, "text"))
        record = Record(states=text.states, image_states=image.states)
        for tower, out in (("vision", image), ("text", text)):
            tap(record, tower, out, kinds_of(wanted, tower) - {FEATURES})
        return record, text.states

    def _match(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        ids, mask = batch["text_ids"], batch["text_mask"]
        record, states = self._read_with_image(batch, ids, mask, wanted)
        record["logits"] = self.itm_head(states[:, 0])
        if f"vision.{FEATURES}" in wanted:
            record[f"vision.{FEATURES}"] = self.image_feature(record["image_states"])
        if f"text.{FEATURES}" in wanted:
            record[f"text.{FEATURES}"] = self.embed_texts(ids, mask)[1]
        return record

    def _compare(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        both = {"pixels": torch.cat([batch["pixels"], batch["second_pixels"]]), "image_index": batch.get("pair_index")}
        record, states = self._read_with_image(both, batch["text_ids"], batch["text_mask"], wanted)
        record["logits"] = self.cls_head(states[:, 0])
        return record

    def _caption(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        record = Record()
        image = self.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        seen = self.attended(image.states, batch.get("image_index"))
        record["logits"], out = self.follow(batch["text_ids"], batch["text_mask"], seen, keep=kinds_of(wanted, "decoder"))
        for tower, encoded in (("vision", image), ("decoder", out)):
            tap(record, tower, encoded, kinds_of(wanted, tower))
        return record


@torch.no_grad()
def _switch_off(layer: PostNormLayer) -> None:
    """Let cross-attention whose weights are 0 do nothing."""
    layer.cross_attention_norm.load_state_dict(layer.attention_norm.state_dict())
    layer.attention_norm.weight.fill_(1)
    layer.attention_norm.bias.fill_(0)


def starting(ids: Tensor, first: int | None, offset: int = 0) -> Tensor:
    """`ids` [B, L], tokens from number `offset` on, with `first` as token 0; None leaves them."""
    if first is None:
        return ids
    return torch.where(torch.arange(offset, offset + ids.shape[1], device=ids.device) == 0, first, ids)
