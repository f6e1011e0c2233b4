"""X-VLM: CLIP-style vision transformer, BERT-style text and fusion layers, answer decoder. One class for teacher, student and pruned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from efficientvlm.errors import BadInput
from efficientvlm.families.graphs import caption_graphs, compare_graphs, ground_graphs, matching_graphs, vqa_graphs
from efficientvlm.families.network import Graph, Record, check_taps, kinds_of
from efficientvlm.families.towers.attention import Cache, Context
from efficientvlm.families.towers.bert import Bert, Embeddings, LanguageHead, earlier
from efficientvlm.families.towers.decoding import Writing
from efficientvlm.families.towers.layers import PostNormLayer, PreNormLayer, Size
from efficientvlm.families.towers.network import TowerNetwork, blank_batch, blank_pairs
from efficientvlm.families.towers.parts import CROSS_ATTENTION, HIDDEN, NOTHING, SELF_ATTENTION, Activation, Encoded, activation, tap
from efficientvlm.families.towers.swin import Swin, SwinBlock, WindowAttention, grids
from efficientvlm.families.towers.vit import Vit
from efficientvlm.families.xvlm.config import CAPTION_HEAD, TOWERS, XVLMConfig
from efficientvlm.families.xvlm.heads import GROUNDING, RETRIEVAL, answering, captioning, grounding, matching
from efficientvlm.families.xvlm.pairs import of_two_images
from efficientvlm.families.xvlm.resize import resized

Kept = dict[str, list[int]]


def _vision(config: XVLMConfig, kept: Kept) -> Vit | Swin:
    act = activation(config.vision_activation)
    each = [config.layered("vision", layer) for layer in range(config.vision_layers)]
    sizes = [Size.of(kept, f"vision.{layer}", width, heads) for layer, (width, heads, _) in enumerate(each)]
    if config.vision_depths:
        return _swin(config, sizes, act)
    layers = [PreNormLayer(size, config.vision_eps, act, {}) for size in sizes]
    shape = (config.vision_width, config.image_size, config.patch_size, config.vision_eps)
    return Vit(layers, *shape, {}, pre_norm=config.vision_pre_norm, local_layers=config.local_attention_depth)


def _swin(config: XVLMConfig, sizes: Sequence[Size], act: Activation) -> Swin:
    """The tower of the public files; a later layer is left out more often while it is trained, the last with `vision_drop_path`."""
    depths, grid, eps = config.vision_depths or [], config.image_size // config.patch_size, config.vision_eps
    drops = [config.vision_drop_path * i / max(1, len(sizes) - 1) for i in range(len(sizes))]
    layers = [
        SwinBlock(size, eps, act, {}, grid=side, window=window, shift=shift, drop=drop)
        for size, drop, (side, window, shift) in zip(sizes, drops, grids(depths, grid, config.vision_window), strict=True)
    ]
    return Swin(layers, depths, config.vision_width >> (len(depths) - 1), grid, config.patch_size, eps, {})


def _texts(config: XVLMConfig, kept: Kept, tower: str, context_width: int = 0, *, embeddings: bool, contexts: int = 1) -> Bert:
    dropout = {"dropout": config.dropout, "attention_dropout": config.dropout}
    sizes = Size.of_tower(kept, tower, config.layers()[tower], config.text_width, config.text_heads, context_width)
    if contexts > 1:
        sizes = Size.sharing(kept, tower, sizes, contexts)
    table = None
    if embeddings:
        shape = (config.vocab_size, config.max_positions, config.text_width, config.text_eps, config.dropout)
        table = Embeddings(*shape, type_vocab_size=config.type_vocab_size)
    return Bert([PostNormLayer(size, config.text_eps, F.gelu, {}, **dropout) for size in sizes], table)


def _says(config: XVLMConfig) -> LanguageHead:
    return LanguageHead(config.text_width, config.vocab_size, config.text_eps, names={"dense": "transform"})


def mlp_head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


class XVLMModel(Writing, TowerNetwork):
    """X-VLM with the heads named in `config.heads` and, when `config.decoder_layers` > 0, an answer decoder."""

    config_class = XVLMConfig
    main_input_name = "pixels"
    taps = frozenset(
        {f"{tower}.{kind}" for tower in TOWERS for kind in (HIDDEN, SELF_ATTENTION)}
        | {f"{tower}.{CROSS_ATTENTION}" for tower in ("fusion", "decoder")}
    )
    places = {tower: f"{tower}.layers" for tower in TOWERS}
    owners = {**{tower: tower for tower in TOWERS}, "decoder_head": "decoder"}

    def __init__(self, config: XVLMConfig) -> None:
        super().__init__(config)
        kept = config.kept_indices()
        self.vision = _vision(config, kept)
        self.text = _texts(config, kept, "text", embeddings=True)
        self.fusion = _texts(config, kept, "fusion", config.vision_width, embeddings=False, contexts=config.fusion_images)
        if config.decoder_layers:
            self.decoder = _texts(config, kept, "decoder", config.text_width, embeddings=True)
            self.decoder_head = _says(config)
        if "itc" in config.heads:
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_width, config.embed_dim)
            self.temp = nn.Parameter(torch.tensor(config.temperature_init))
        if "compare" in config.heads:
            self.compare_head = mlp_head(config.text_width, 2)
        if "assign" in config.heads:
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.assign_head = nn.Linear(config.text_width, 3)
        if "itm" in config.heads:
            self.itm_head = mlp_head(config.text_width, 2)
        if "box" in config.heads:
            self.box_head = mlp_head(config.text_width, 4)
        if "mlm" in config.heads:
            self.mlm_head = _says(config)
        if CAPTION_HEAD in config.heads:
            self.lm_head = _says(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Vit):
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding, std=std)
        elif isinstance(module, WindowAttention) and module.heads:
            init.normal_(module.bias_table, std=std)
        elif module is self and hasattr(self, "temp"):
            init.constant_(self.temp, self.config.temperature_init)

    @classmethod
    def is_embedding(cls, parameter: str) -> bool:
        return ".embeddings." in parameter and ".norm." not in parameter

    def encode_text(self, ids: Tensor, mask: Tensor, keep: frozenset[str] = NOTHING) -> Encoded:
        """Token ids and mask [B, L] (1 = token) to states [B, L, W]."""
        return self.text.read(ids, mask, keep=keep)

    def fuse(self, states: Tensor, mask: Tensor, context: Context, keep: frozenset[str] = NOTHING) -> Encoded:
        """Text states [B, L, W] through the fusion layers, attending to image states projected by `fusion.context`."""
        out: Encoded = self.fusion(states, mask.bool()[:, None, None], context, keep=keep)
        return out

    def follow(
        self, ids: Tensor, mask: Tensor | None, context: Context, cache: Cache | None = None, keep: frozenset[str] = NOTHING
    ) -> tuple[Tensor, Encoded]:
        if CAPTION_HEAD in self.config.heads:
            logits, _, out = self.write(ids, mask, context, cache)
            return logits, out
        out = self.decoder.follow(ids, mask, context, cache, keep)
        return self.decoder_head(out.states, self.decoder.embeddings), out

    def attended(self, states: Tensor, rows: Tensor | None = None) -> Context:
        return self.fusion.context(states, rows=rows)

    def write(
        self,
        ids: Tensor,
        mask: Tensor | None,
        context: Context,
        cache: Cache | None = None,
        keep: tuple[frozenset[str], frozenset[str]] = (NOTHING, NOTHING),
    ) -> tuple[Tensor, Encoded, Encoded]:
        """Tokens [B, L] through text and fusion layers as one causal decoder: next-token logits [B, L, V], and what both kept."""
        seen = earlier(ids, mask, cache)
        text = self.text.follow(ids, mask, None, cache, keep[0])
        fused = self.fusion(text.states, seen, context, cache and cache.behind(len(self.text.layers)), keep[1])
        return self.lm_head(fused.states, self.text.embeddings), text, fused

    def image_feature(self, states: Tensor) -> Tensor:
        """Image states [B, T, W] to unit vectors [B, E]."""
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """Text or fused states [B, L, W] with mask [B, L] to one state each [B, W]: the first token's, or the mean over the tokens."""
        if self.config.text_pooling == "cls":
            return states[:, 0]
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    def text_feature(self, states: Tensor, mask: Tensor) -> Tensor:
        """Text states [B, L, W] with mask [B, L] to unit vectors [B, E]."""
        return F.normalize(self.text_proj(self.pooled(states, mask)), dim=-1)

    def feature_parameters(self) -> frozenset[str]:
        parts = ("vision.", "text.", "vision_proj.", "text_proj.")
        return frozenset(name for name, _ in self.named_parameters() if name.startswith(parts))

    def mlm_logits(self, states: Tensor, positions: Tensor) -> Tensor:
        """Fused states [B, L, W] and masked positions [B, M] to vocabulary logits [B, M, V]."""
        picked = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        logits: Tensor = self.mlm_head(picked, self.text.embeddings)
        return logits

    def run(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """A question-answering batch: question states, and with `answer_ids` the decoder's `logits` [A, L, V].

        A network whose only heads are those of retrieval adds the matching `logits` [Q, 2] of each question with its image, and the unit
        vectors `image_feature` [I, E] and `text_feature` [Q, E]; one whose only head is that of boxes the `logits` [Q, 4] of the box. One
        that describes images reads captions instead, and gives the next-token `logits` [C, L, V] of these. One of two images at a time
        reads statements about pairs of them (`data.kinds.statements.statement_batch`): `logits` [S, 2] of false and true, or of a text
        [S, 3] of the first, the second and neither image; its states of images are those of all first, then of all second images.
        """
        if CAPTION_HEAD in self.config.heads:
            return self._captions(batch, check_taps(self, want))
        if self.config.fusion_images > 1:
            return self._compare(batch, check_taps(self, want))
        record, context = self.encode(batch, want)
        if "answer_ids" in batch:
            self.answer(batch, context, check_taps(self, want), record)
        if {*self.config.heads} == GROUNDING:
            record["logits"] = self.box_head(self.pooled(record["states"], batch["question_mask"]))
        return record

    def ground(self, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        record, _ = self.encode(batch, want)
        record["boxes"] = self.box_head(self.pooled(record["states"], batch["question_mask"])).sigmoid()
        return record

    def encode(self, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, Context]:
        """Image and question through vision, text and fusion; the context is what an answer decoder attends to (one row a question)."""
        wanted = check_taps(self, want)
        record = Record()
        image = self.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        text = self._texts(batch, kinds_of(wanted, "text"))
        context = self.fusion.context(image.states, rows=batch.get("image_index"))
        fused = self.fuse(text.states, batch["question_mask"], context, keep=kinds_of(wanted, "fusion"))
        for tower, out in (("vision", image), ("text", text), ("fusion", fused)):
            tap(record, tower, out, kinds_of(wanted, tower))
        if {*self.config.heads} == {"itc", "itm"}:
            mask = batch["question_mask"]
            record |= {"image_feature": self.image_feature(image.states), "text_feature": self.text_feature(text.states, mask)}
            record["logits"] = self.itm_head(self.pooled(fused.states, mask))
        record["states"] = fused.states
        answers = self.decoder.context(fused.states, batch["question_mask"]) if self.config.decoder_layers else Context([])
        return record, answers

    def _captions(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        record = Record()
        image = self.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        seen = self.attended(image.states, batch.get("image_index"))
        keep = kinds_of(wanted, "text"), kinds_of(wanted, "fusion")
        record["logits"], text, fused = self.write(batch["text_ids"], batch["text_mask"], seen, keep=keep)
        for tower, out in (("vision", image), ("text", text), ("fusion", fused)):
            tap(record, tower, out, kinds_of(wanted, tower))
        return record

    def _compare(self, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        record, mask = Record(), batch["text_mask"]
        image = self.encode_image(torch.cat([batch["pixels"], batch["second_pixels"]]), keep=kinds_of(wanted, "vision"))
        text = self.encode_text(batch["text_ids"], mask, keep=kinds_of(wanted, "text"))
        context = self.fusion.context(image.states, rows=batch.get("pair_index"))
        fused = self.fuse(text.states, mask, context, keep=kinds_of(wanted, "fusion"))
        for tower, out in (("vision", image), ("text", text), ("fusion", fused)):
            tap(record, tower, out, kinds_of(wanted, tower))
        record["logits"] = self.verdict(fused.states, mask)
        return record

    def verdict(self, states: Tensor, mask: Tensor) -> Tensor:
        """Fused states [S, L, W] of texts about two images to logits: false and true, or of which image a text is."""
        head = self.compare_head if "compare" in self.config.heads else self.assign_head
        logits: Tensor = head(self.pooled(states, mask))
        return logits

    def _texts(self, batch: dict[str, Any], keep: frozenset[str]) -> Encoded:
        """The questions through the text tower, one that is asked of several images only once where no dropout sets them apart."""
        ids, mask = batch["question_ids"], batch["question_mask"]
        if "distinct_questions" not in batch or (self.training and self.config.dropout):
            return self.encode_text(ids, mask, keep=keep)
        distinct = batch["distinct_questions"]
        return self.encode_text(ids[distinct], mask[distinct], keep=keep).spread(batch["distinct_index"])

    def embed_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encode_text(ids, mask).states
        return states, self.text_feature(states, mask)

    def match(self, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        fused = self.fuse(texts, mask, self.fusion.context(images, rows=rows))
        logits: Tensor = self.itm_head(self.pooled(fused.states, mask))
        return logits

    def gain(self, ability: str, donor: XVLMModel | None = None, decoder_init: str = "auto") -> tuple[XVLMModel, list[str]]:
        """As the base says: to `answer`, an answer decoder is added; to `match`, the heads of other tasks are taken away; so to
        `caption`, and the head of masked tokens says the next one, and to `ground`, with a head of boxes where there was none; to `compare`
        or `assign`, the fusion layers are doubled, one for each of two images, and a head is added."""
        if ability == "answer":
            return answering(self, donor, decoder_init)
        if ability == "ground":
            return grounding(self)
        if ability == "match":
            return matching(self), []
        if ability == "caption":
            return captioning(self), []
        if ability in ("compare", "assign"):
            return of_two_images(self, ability)
        return super().gain(ability, donor, decoder_init)

    def resized(self, image_size: int) -> XVLMModel:
        model: XVLMModel = resized(self, image_size)
        return model

    def example(self, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        if self.config.fusion_images > 1:
            return blank_pairs(self.config.image_size, batch_size, text_length, device)
        answers, texts = bool(self.config.decoder_layers), "text" if CAPTION_HEAD in self.config.heads else "question"
        return blank_batch(self.config.image_size, batch_size, text_length, device, texts=texts, answers=answers)

    @property
    def exportable(self) -> bool:
        heads = set(self.config.heads)
        return bool(self.config.decoder_layers) or heads in (RETRIEVAL, GROUNDING) or not heads.isdisjoint({CAPTION_HEAD, "compare"})

    def graphs(self) -> list[Graph]:
        if CAPTION_HEAD in self.config.heads:
            return caption_graphs(self)
        if "compare" in self.config.heads:
            return compare_graphs(self)
        if {*self.config.heads} == GROUNDING:
            return ground_graphs(self)
        if {*self.config.heads} == RETRIEVAL:
            return matching_graphs(self, lambda model, states: model.fusion.context(states), _matched)
        if not self.exportable:
            raise BadInput("this model is not tuned for a task", "pre-training is not exported", "finetune it for a task first")
        return vqa_graphs(self)


def _matched(model: XVLMModel, ids: Tensor, mask: Tensor, seen: Context) -> Tensor:
    logits: Tensor = model.itm_head(model.pooled(model.fuse(model.encode_text(ids, mask).states, mask, seen).states, mask))
    return logits
