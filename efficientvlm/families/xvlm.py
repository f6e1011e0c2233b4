"""The X-VLM family: anatomy, layer choice, taps, loading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.base import CROSS_HEAD, HEAD, Flow, Graph, Record, Sizes, check_taps, groups_of, kinds_of
from efficientvlm.families.checks import check_config
from efficientvlm.families.graphs import vqa_graphs
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import open_config, open_model, read_json
from efficientvlm.families.structure import Described, kept_of_layers
from efficientvlm.families.towers.attention import Cache, Context, Sharing
from efficientvlm.families.towers.parts import CROSS_ATTENTION, HIDDEN, SELF_ATTENTION, Encoded, tap
from efficientvlm.families.xvlm_config import SIZES, XVLMConfig, check_fields, check_sizes, checked_settings
from efficientvlm.families.xvlm_model import XVLMModel


class XVLM(Described):
    name = "xvlm"
    network = XVLMModel
    model_types: tuple[str, ...] = ("xvlm",)
    auto_classes: tuple[tuple[type, type], ...] = ((XVLMConfig, XVLMModel),)
    towers: tuple[str, ...] = ("vision", "text", "fusion", "decoder")
    taps = frozenset(
        {f"{tower}.{kind}" for tower in towers for kind in (HIDDEN, SELF_ATTENTION)}
        | {f"{tower}.{CROSS_ATTENTION}" for tower in ("fusion", "decoder")}
    )

    stock = False
    retrieval: tuple[str, ...] = ("itc", "itm")
    extra_tokens: tuple[str, ...] = ()

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> XVLMConfig:
        number = vocab if isinstance(vocab, int) else len(vocab)
        config = check_sizes(XVLMConfig(**{**SIZES[size], "vocab_size": number, **checked_settings(changes)}))
        check_config(self, config, "settings")
        return config

    def build(self, config: XVLMConfig) -> XVLMModel:
        return XVLMModel(config)

    def read_config(self, path: Path) -> XVLMConfig:
        file = path / "config.json"
        values = read_json(file)
        check_fields(values, str(file))
        config: XVLMConfig = open_config(XVLMConfig, values, file)
        check_config(self, config, str(file))
        check_sizes(config)
        check_shapes(self, config, path)
        return config

    def save(self, model: XVLMModel, folder: Path) -> None:
        model.save_pretrained(folder)

    def sizes(self, config: XVLMConfig) -> Sizes:
        layers, by_tower = config.layers(), {tower: "vision" if tower == "vision" else "text" for tower in self.towers}
        return Sizes(
            config.image_size,
            config.patch_size,
            config.max_positions,
            config.vocab_size,
            {tower: (getattr(config, f"{kind}_width"),) * (layers[tower] + 1) for tower, kind in by_tower.items()},
            {tower: (getattr(config, f"{kind}_heads"),) * layers[tower] for tower, kind in by_tower.items()},
            tuple(config.image_mean),
            tuple(config.image_std),
        )

    def tasks(self, config: XVLMConfig) -> frozenset[str]:
        """`retrieval` needs both of its heads; a network that has them, and others, can be pre-trained with its own losses too."""
        if config.decoder_layers:
            return frozenset({"vqa"})
        able = {"retrieval"} if set(self.retrieval) <= set(config.heads) else set()
        return frozenset(able | {"pretraining"} if config.heads else able)

    def load(self, path: Path) -> XVLMModel:
        """Float32 model of a checkpoint folder, evaluation mode.

        Raises:
            BadInput: weights that are missing, surplus or of another shape than `config.json` says, or not readable.
        """
        model: XVLMModel = open_model(XVLMModel, path, self.read_config(path))
        return model

    def flows(self, config: XVLMConfig) -> list[Flow]:
        """Pictures reach texts by cross-attention alone, a pooled [CLS] sees other positions by self-attention alone."""
        layers = config.layers()
        crossing = groups_of(layers, CROSS_HEAD, "fusion")
        flows = [Flow("image", "vision.patches"), Flow("text", "text.tokens")]
        if layers["decoder"]:
            flows += [Flow("text.tokens", "fusion.tokens"), Flow("vision.patches", "fusion.tokens", crossing)]
            return [*flows, Flow("fusion.tokens", "decoder", groups_of(layers, CROSS_HEAD, "decoder")), Flow("decoder", "answer")]
        pools = config.text_pooling == "cls"
        if "itc" in config.heads:
            flows += [Flow("vision.patches", "vision.cls", groups_of(layers, HEAD, "vision")), Flow("vision.cls", "itc")]
            flows += [Flow("text.tokens", "text.pooled", groups_of(layers, HEAD, "text") if pools else None), Flow("text.pooled", "itc")]
        mixing = groups_of(layers, HEAD, "text", "fusion")
        for at, heads, through in (("pooled", ("itm", "box"), mixing if pools else None), ("masked", ("mlm",), mixing)):
            if read := [head for head in heads if head in config.heads]:
                flows += [Flow("text.tokens", f"fusion.{at}", through), Flow("vision.patches", f"fusion.{at}", crossing)]
                flows += [Flow(f"fusion.{at}", head) for head in read]
        return flows

    def with_layers(self, config: XVLMConfig, layers: dict[str, list[int]]) -> XVLMConfig:
        local = config.local_attention_depth
        if config.vision_layers:
            local = sum(old >= config.vision_layers - local for old in layers["vision"])
        sizes = {f"{tower}_layers": len(chosen) for tower, chosen in layers.items()}
        source = {tower: list(chosen) for tower, chosen in layers.items()}
        before = {"layer_source": source, "layer_source_of": config.layers()}
        return config.copy(**sizes, **before, kept=kept_of_layers(config.kept, layers), local_attention_depth=local)

    def forward(self, model: XVLMModel, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """A question-answering batch: question states, and with `answer_ids` the decoder's `logits` [A, L, V].

        A network whose only heads are those of retrieval adds the matching `logits` [Q, 2] of each question with its image, and the unit
        vectors `image_feature` [I, E] and `text_feature` [Q, E].
        """
        record, context = self.question(model, batch, want)
        if "answer_ids" in batch:
            keep = kinds_of(check_taps(self, want), "decoder")
            context.rows = batch["answer_index"]
            context.sharing = Sharing.of(context.rows, len(batch["question_ids"]))
            context.mask = None if context.mask is None else context.mask[context.rows]
            record["logits"], out = model.decode(batch["answer_ids"], batch["answer_mask"], context, keep=keep)
            tap(record, "decoder", out, keep)
        return record

    def question(self, model: XVLMModel, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, Context]:
        """Image and question through vision, text and fusion; the context is what an answer decoder attends to (one row a question)."""
        wanted = check_taps(self, want)
        record = Record()
        image = model.encode_image(batch["pixels"], keep=kinds_of(wanted, "vision"))
        text = self._texts(model, batch, kinds_of(wanted, "text"))
        context = model.fusion.context(image.states, rows=batch.get("image_index"))
        fused = model.fuse(text.states, batch["question_mask"], context, keep=kinds_of(wanted, "fusion"))
        for tower, out in (("vision", image), ("text", text), ("fusion", fused)):
            tap(record, tower, out, kinds_of(wanted, tower))
        if set(model.config.heads) == set(self.retrieval):
            mask = batch["question_mask"]
            record |= {"image_feature": model.image_feature(image.states), "text_feature": model.text_feature(text.states, mask)}
            record["logits"] = model.itm_head(model.pooled(fused.states, mask))
        record["states"] = fused.states
        answers = model.decoder.context(fused.states, batch["question_mask"]) if model.config.decoder_layers else Context([])
        return record, answers

    def _texts(self, model: XVLMModel, batch: dict[str, Any], keep: frozenset[str]) -> Encoded:
        """The questions through the text tower, one that is asked of several images only once where no dropout sets them apart."""
        ids, mask = batch["question_ids"], batch["question_mask"]
        if "distinct_questions" not in batch or (model.training and model.config.dropout):
            return model.encode_text(ids, mask, keep=keep)
        distinct = batch["distinct_questions"]
        return model.encode_text(ids[distinct], mask[distinct], keep=keep).spread(batch["distinct_index"])

    def answer(
        self, model: XVLMModel, context: Context, ids: Tensor, mask: Tensor | None, rows: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Next-token logits [B, L, V] of answer prefixes `ids` [B, L]; `rows` [B] names the question of each, in order by default."""
        return model.decode(ids, mask, context if rows is None else context.of(rows), cache)[0]

    def graphs(self, model: XVLMModel) -> list[Graph]:
        if not model.config.decoder_layers:
            why = "it has no answer decoder, and nothing else of an X-VLM is exported"
            raise BadInput("this model is not tuned for a task", why, "finetune it with --task vqa first")
        return vqa_graphs(self, model)

    def stock_config(self, config: XVLMConfig, neurons: Mapping[str, int]) -> NoReturn:
        raise BadInput("transformers has no X-VLM", "", "use --format onnx or padded")

    def stock_inputs(self, batch: dict[str, Any]) -> NoReturn:
        self.stock_config(XVLMConfig(), {})

    def example_batch(self, config: XVLMConfig, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        rows = torch.arange(batch_size, device=device)
        batch: dict[str, Any] = {
            "pixels": torch.zeros(batch_size, 3, config.image_size, config.image_size, dtype=torch.uint8, device=device),
            "image_index": rows,
            "question_ids": torch.ones(batch_size, text_length, dtype=torch.long, device=device),
            "question_mask": torch.ones(batch_size, text_length, dtype=torch.long, device=device),
        }
        if config.decoder_layers:
            ones = torch.ones(batch_size, 1, dtype=torch.long, device=device)
            batch |= {"answer_ids": ones, "answer_mask": ones, "answer_index": rows}
        return batch

    def for_vqa(self, model: XVLMModel, teacher: XVLMModel | None, decoder_init: str) -> tuple[XVLMModel, list[str]]:
        if model.config.decoder_layers:
            return model, []
        if not model.config.fusion_layers:
            raise BadInput("this model cannot answer questions", "without fusion layers it reads them blind", "shrink to at least one")
        donor = teacher if decoder_init in ("auto", "teacher") else None
        if donor is None and decoder_init == "teacher":
            raise BadInput("decoder_init is teacher", "there is no --teacher", "give one, or decoder_init=fusion")
        if donor is None and "mlm" not in model.config.heads:
            why = "it has neither an answer decoder nor an MLM head to start one from"
            raise BadInput("this model cannot answer questions", why, "use a pre-trained model, or give a --teacher")
        layers = model.config.fusion_layers
        if donor is not None:
            layers = min(layers, donor.config.decoder_layers)
        before = set(model.state_dict())
        tuned = self.with_decoder(model, layers, donor)
        return tuned, [] if donor is not None else sorted(set(tuned.state_dict()) - before)

    def for_retrieval(self, model: XVLMModel) -> XVLMModel:
        heads = model.config.heads
        if missing := sorted(set(self.retrieval) - set(heads)):
            why = "it answers questions" if model.config.decoder_layers else f"it has no head for {' and '.join(missing)}"
            raise BadInput("this model does no retrieval", why, "start from a pre-trained one, before it is tuned for another task")
        if set(heads) == set(self.retrieval):
            return model
        new = self.build(model.config.copy(heads=[head for head in heads if head in self.retrieval]))
        old = model.state_dict()
        new.load_state_dict({name: old[name] for name in new.state_dict()})
        return new

    def image_features(self, model: XVLMModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = model.encode_image(pixels).states
        return states, model.image_feature(states)

    def text_features(self, model: XVLMModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = model.encode_text(ids, mask).states
        return states, model.text_feature(states, mask)

    def match(self, model: XVLMModel, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        fused = model.fuse(texts, mask, model.fusion.context(images, rows=rows))
        logits: Tensor = model.itm_head(model.pooled(fused.states, mask))
        return logits

    def with_decoder(self, model: XVLMModel, layers: int, source: XVLMModel | None = None) -> XVLMModel:
        """`model` for question answering: an answer decoder is added, the pre-training heads dropped (EfficientVLM, VQA).

        The decoder comes from the odd layers of `source`'s decoder, or else from `model`'s own last fusion layers, embeddings and MLM head;
        there cross-attention keys and values stay fresh where images are wider or narrower than text.

        Raises:
            BadInput: the layers it would come from are missing or pruned.
        """
        donor, tower = (model, "fusion") if source is None else (source, "decoder")
        if not donor.config.layers()[tower] or any(group.startswith(f"{tower}.") for group in donor.config.kept or {}):
            raise BadInput(
                f"no answer decoder can be made from these {tower} layers",
                "there are none, or they are pruned",
                "give --teacher, or start from an unpruned model",
            )
        config = model.config.copy(decoder_layers=layers, heads=[])
        fresh = (
            ("cross_attention.k.weight", "cross_attention.v.weight") if source is None and config.vision_width != config.text_width else ()
        )
        new = self.build(config)
        old, state = model.state_dict(), new.state_dict()
        for name in state:
            if not name.startswith(("decoder.", "decoder_head.")):
                state[name] = old[name]
            elif not name.endswith(fresh):
                state[name] = _decoder_source(name, layers, model, source)
        new.load_state_dict(state)
        return new


def _decoder_source(name: str, layers: int, model: XVLMModel, source: XVLMModel | None) -> Tensor:
    donor = source if source is not None else model
    available = donor.config.decoder_layers if source is not None else donor.config.fusion_layers
    tensors = donor.state_dict()
    _, _, rest = name.partition(".layers.")
    if rest:
        number, _, tail = rest.partition(".")
        layer = (int(number) + 1) * available // layers - 1
        return tensors[f"{'decoder' if source is not None else 'fusion'}.layers.{layer}.{tail}"]
    if source is not None:
        return tensors[name]
    return tensors[name.replace("decoder_head.", "mlm_head.").replace("decoder.embeddings.", "text.embeddings.")]
