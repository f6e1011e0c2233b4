"""The BLIP family: question answering, captioning, matching; anatomy, layer choice, taps, loading."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from efficientvlm.data.preprocessing import CLIP_MEAN, CLIP_STD
from efficientvlm.errors import BadInput
from efficientvlm.families.base import CROSS_HEAD, HEAD, Flow, Graph, Record, Sizes, check_taps, groups_of, kinds_of
from efficientvlm.families.blip_config import (
    KINDS,
    BlipAnswerConfig,
    BlipRetrievalConfig,
    SlicedBlipConfig,
    check_sizes,
)
from efficientvlm.families.blip_fresh import DECODE, ENCODE, fresh_config
from efficientvlm.families.blip_graphs import blip_graphs
from efficientvlm.families.blip_model import MODELS, Blip
from efficientvlm.families.checks import check_config
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import image_statistics, open_config, open_model, read_json
from efficientvlm.families.structure import Described, kept_of_layers
from efficientvlm.families.towers.attention import Cache, Context, Sharing
from efficientvlm.families.towers.parts import CROSS_ATTENTION, HIDDEN, SELF_ATTENTION, tap

TASKS = {"BlipForQuestionAnswering": "vqa", "BlipForConditionalGeneration": "captioning", "BlipForImageTextRetrieval": "retrieval"}
FEATURES = "features"


class BLIP(Described):
    """Batches are those of `data.kinds`: `question_*` and `answer_*` to answer, `text_ids` and `text_mask` to caption or match.

    Texts that are decoded start with the configuration's `decoder_start`, those read with an image with its `question_start_id`, whatever
    their first token was.
    """

    name = "blip"
    network = Blip
    stock = True
    model_types: tuple[str, ...] = ("blip", *(kind.model_type for kind in KINDS))
    auto_classes: tuple[tuple[type, type], ...] = tuple(MODELS.items())
    towers: tuple[str, ...] = ("vision", "text", "decoder")
    taps = frozenset(
        {f"{tower}.{kind}" for tower in towers for kind in (HIDDEN, SELF_ATTENTION)}
        | {f"{tower}.{CROSS_ATTENTION}" for tower in ("text", "decoder")}
        | {f"{tower}.{FEATURES}" for tower in ("vision", "text")}
    )

    retrieval: tuple[str, ...] = ("itc", "itm")
    extra_tokens: tuple[str, ...] = (DECODE, ENCODE)

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> SlicedBlipConfig:
        return self._checked(fresh_config(size, changes, vocab), "settings")

    def build(self, config: SlicedBlipConfig) -> Any:
        return MODELS[type(config)](config)

    def read_config(self, path: Path) -> SlicedBlipConfig:
        """Of a folder of ours or of transformers; which of the three networks it is, `architectures` says there.

        Raises:
            BadInput: another network than these three, or sizes that do not fit together.
        """
        file = path / "config.json"
        values = read_json(file)
        named = next(iter(values.get("architectures") or []), None)
        kind = next((kind for kind in KINDS if values.get("model_type") == kind.model_type or named == kind.stock), None)
        if kind is None:
            raise BadInput(
                f"{file}: architectures is {named}",
                f"opened are {', '.join(kind.stock for kind in KINDS)}",
                "give a model of one of these classes",
            )
        values |= image_statistics(path, values, (CLIP_MEAN, CLIP_STD), kind.processor)
        config = self._checked(open_config(kind, values, file), str(file))
        check_shapes(self, config, path)
        return config

    def _checked(self, config: SlicedBlipConfig, where: str) -> SlicedBlipConfig:
        check_config(self, config, where)
        return check_sizes(config, where)

    def load(self, path: Path) -> Any:
        config = self.read_config(path)
        return open_model(MODELS[type(config)], path, config)

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        if model.config.is_stock:
            file = folder / "config.json"
            values = read_json(file) | {"model_type": "blip", "architectures": [model.config.stock]}
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def sizes(self, config: SlicedBlipConfig) -> Sizes:
        vision, text = config.vision_config, config.text_config
        parts = {tower: (vision if tower == "vision" else text, count) for tower, count in config.layers().items()}
        return Sizes(
            vision.image_size,
            vision.patch_size,
            text.max_position_embeddings,
            text.vocab_size,
            {tower: (part.hidden_size,) * (count + 1) for tower, (part, count) in parts.items()},
            {tower: (part.num_attention_heads,) * count for tower, (part, count) in parts.items()},
            tuple(config.image_mean),
            tuple(config.image_std),
        )

    def tasks(self, config: SlicedBlipConfig) -> frozenset[str]:
        return frozenset({TASKS[config.stock]})

    def flows(self, config: SlicedBlipConfig) -> list[Flow]:
        """Pictures reach texts by cross-attention alone, a first token that is pooled sees other positions by self-attention alone."""
        layers = config.layers()
        texts, answers = (groups_of(layers, CROSS_HEAD, tower) for tower in ("text", "decoder"))
        seen = Flow("image", "vision.patches")
        if "text" not in config.towers:
            return [seen, Flow("vision.patches", "decoder", answers), Flow("text", "decoder"), Flow("decoder", "caption")]
        if "decoder" in config.towers:
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

    def with_layers(self, config: SlicedBlipConfig, layers: dict[str, list[int]]) -> SlicedBlipConfig:
        if empty := [tower for tower in config.towers if not layers[tower]]:
            raise BadInput(f"no {empty[0]} layers", "a BLIP needs at least one in every tower", "ask for 1 or more")
        changed = config.copy(
            kept=kept_of_layers(config.kept, layers),
            layer_source={tower: list(chosen) for tower, chosen in layers.items()},
            layer_source_of=config.layers(),
        )
        depth = {tower: len(chosen) for tower, chosen in layers.items()}
        changed.vision_config.num_hidden_layers = depth["vision"]
        changed.text_config.num_hidden_layers = depth["text" if "text" in config.towers else "decoder"]
        both = isinstance(config, BlipAnswerConfig)
        changed.decoder_layers = depth["decoder"] if both and depth["decoder"] != depth["text"] else None
        return changed

    def forward(self, model: Any, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """Next-token `logits` [A, L, V] of answers or captions, or the matching `logits` [B, 2] (no, yes) of image and text.

        The taps `vision.features` and `text.features` of a matching network are unit vectors [I, E] and [B, E]; for them texts are read
        once more, without the image.
        """
        wanted = self._check(model, want)
        if "text" not in model.config.towers:
            return self._caption(model, batch, wanted)
        if "decoder" not in model.config.towers:
            return self._match(model, batch, wanted)
        record, answers = self.question(model, batch, wanted)
        if "answer_ids" in batch:
            rows = batch["answer_index"]
            keep = kinds_of(wanted, "decoder")
            sharing = Sharing.of(rows, len(batch["question_ids"]))
            seen = Context(answers.kv, None if answers.mask is None else answers.mask[rows], rows, sharing)
            record["logits"], out = model.decode(batch["answer_ids"], batch["answer_mask"], seen, keep=keep)
            tap(record, "decoder", out, keep)
        return record

    def question(self, model: Any, batch: dict[str, Any], want: Iterable[str] = ()) -> tuple[Record, Context]:
        self._require_answers(model.config)
        wanted = self._check(model, want)
        record, states = self._read_with_image(model, batch, batch["question_ids"], batch["question_mask"], wanted)
        return record, model.text_decoder.bert.context(states, batch["question_mask"])

    def answer(
        self, model: Any, context: Context, ids: Tensor, mask: Tensor | None, rows: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        logits: Tensor = model.decode(ids, mask, context if rows is None else context.of(rows), cache)[0]
        return logits

    def graphs(self, model: Any) -> list[Graph]:
        return blip_graphs(self, model)

    def stock_config(self, config: SlicedBlipConfig, neurons: Mapping[str, int]) -> SlicedBlipConfig:
        chosen, texts = config.copy(kept=None), {tower: count for tower, count in neurons.items() if tower != "vision"}
        if len(set(texts.values())) > 1:
            why = f"neurons a layer are {', '.join(f'{count} in {tower}' for tower, count in texts.items())}: one number stands for both"
            raise BadInput("this BLIP does not fit transformers' own class", why, "use --format onnx or --format padded")
        chosen.vision_config.intermediate_size = neurons.get("vision", chosen.vision_config.intermediate_size)
        chosen.text_config.intermediate_size = next(iter(texts.values()), chosen.text_config.intermediate_size)
        if not chosen.is_stock:
            depth = ", ".join(f"{count} in {tower}" for tower, count in config.layers().items() if count)
            why = f"layers are {depth}, or the towers differ in width: it has one depth for all texts, and one width"
            raise BadInput("this BLIP does not fit transformers' own class", why, "use --format onnx")
        return chosen

    def stock_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Captioning and matching take the same; a network that answers is given its questions as answers too."""
        if "text_ids" in batch:
            return {"pixel_values": batch["pixels"], "input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}
        ids, mask = batch["question_ids"], batch["question_mask"]
        return {"pixel_values": batch["pixels"], "input_ids": ids, "attention_mask": mask, "labels": ids}

    def for_retrieval(self, model: Any) -> NoReturn:
        raise BadInput(
            "a BLIP is not trained for retrieval here", "its retrieval is measured only", "use an X-VLM, or prune with --task none"
        )

    def image_features(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = model.encode_image(pixels).states
        return states, model.image_feature(states)

    def text_features(self, model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The states are the ids themselves: to match, a text is read once more from its first layer, with the image."""
        return ids, model.text_feature(ids, mask)

    def match(self, model: Any, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model.itm_head(model.read(texts, mask, model.text_encoder.context(images, rows=rows)).states[:, 0])
        return logits

    def for_vqa(self, model: Any, teacher: Any | None, decoder_init: str) -> tuple[Any, list[str]]:
        self._require_answers(model.config)
        return model, []

    def example_batch(self, config: SlicedBlipConfig, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        side = config.vision_config.image_size
        ones = torch.ones(batch_size, text_length, dtype=torch.long, device=device)
        rows = torch.arange(batch_size, device=device)
        batch: dict[str, Any] = {"pixels": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8, device=device), "image_index": rows}
        if not isinstance(config, BlipAnswerConfig):
            return batch | {"text_ids": ones, "text_mask": ones}
        answer = {"answer_ids": ones[:, :1], "answer_mask": ones[:, :1], "answer_index": rows}
        return batch | {"question_ids": ones, "question_mask": ones, **answer}

    def _read_with_image(
        self, model: Any, batch: dict[str, Any], ids: Tensor, mask: Tensor, wanted: frozenset[str]
    ) -> tuple[Record, Tensor]:
        """Record of vision and text, with text `states` [B, L, W] after cross-attention."""
        image = model.encode_image(batch["pixels"], kinds_of(wanted, "vision"))
        seen = model.text_encoder.context(image.states, rows=batch.get("image_index"))
        text = model.read(ids, mask, seen, kinds_of(wanted, "text"))
        record = Record(states=text.states, image_states=image.states)
        for tower, out in (("vision", image), ("text", text)):
            tap(record, tower, out, kinds_of(wanted, tower) - {FEATURES})
        return record, text.states

    def _match(self, model: Any, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        ids, mask = batch["text_ids"], batch["text_mask"]
        record, states = self._read_with_image(model, batch, ids, mask, wanted)
        record["logits"] = model.itm_head(states[:, 0])
        if f"vision.{FEATURES}" in wanted:
            record[f"vision.{FEATURES}"] = model.image_feature(record["image_states"])
        if f"text.{FEATURES}" in wanted:
            record[f"text.{FEATURES}"] = model.text_feature(ids, mask)
        return record

    def _caption(self, model: Any, batch: dict[str, Any], wanted: frozenset[str]) -> Record:
        record = Record()
        image = model.encode_image(batch["pixels"], kinds_of(wanted, "vision"))
        seen = model.text_decoder.bert.context(image.states, rows=batch.get("image_index"))
        record["logits"], out = model.decode(batch["text_ids"], batch["text_mask"], seen, keep=kinds_of(wanted, "decoder"))
        for tower, encoded in (("vision", image), ("decoder", out)):
            tap(record, tower, encoded, kinds_of(wanted, tower))
        return record

    def _check(self, model: Any, want: Iterable[str]) -> frozenset[str]:
        wanted = check_taps(self, want)
        config = model.config
        absent = sorted(name for name in wanted if name.partition(".")[0] not in config.towers)
        if not isinstance(config, BlipRetrievalConfig):
            absent += sorted(name for name in wanted if name.endswith(FEATURES))
        if absent:
            raise BadInput(
                f"no such tap here: {', '.join(absent)}", f"{config.stock} has the towers {', '.join(config.towers)}", "leave it out"
            )
        return wanted

    def _require_answers(self, config: SlicedBlipConfig) -> None:
        if not isinstance(config, BlipAnswerConfig):
            raise BadInput("this model cannot answer questions", f"it is a {config.stock}", "use a BlipForQuestionAnswering")
