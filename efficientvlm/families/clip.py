"""CLIP and SigLIP: two towers, compared by their features. Anatomy, layer choice, taps, folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from efficientvlm.errors import BadInput
from efficientvlm.families.base import HEAD, Flow, Graph, Record, Sizes, check_taps, groups_of, kinds_of
from efficientvlm.families.checks import check_config, check_id
from efficientvlm.families.clip_config import TOWERS, SlicedSiglipConfig
from efficientvlm.families.clip_model import MODELS, Comparing
from efficientvlm.families.graphs import Part
from efficientvlm.families.headers import check_shapes
from efficientvlm.families.loading import image_statistics, open_config, open_model, read_json
from efficientvlm.families.structure import Described, kept_of_layers
from efficientvlm.families.towers.parts import HIDDEN, SELF_ATTENTION, tap

CONFIGS: dict[str, Any] = {name: kind for kind in MODELS for name in (kind.stock[0], kind.model_type)}  # type: ignore[attr-defined]
IMAGE_SIZES = ({"images": 2}, {"images": 1}, {"images": 8})
PAIR_SIZES = ({"images": 2, "texts": 3}, {"images": 1, "texts": 1}, {"images": 8, "texts": 2})
TEXT_SIZES = ({"texts": 3, "tokens": 5}, {"texts": 1, "tokens": 2}, {"texts": 8, "tokens": 7})


class CLIP(Described):
    name = "clip"
    network = Comparing
    model_types: tuple[str, ...] = tuple(CONFIGS)
    auto_classes: tuple[tuple[type, type], ...] = tuple(MODELS.items())
    towers: tuple[str, ...] = TOWERS
    taps = frozenset(f"{tower}.{kind}" for tower in TOWERS for kind in (HIDDEN, SELF_ATTENTION))
    stock = True
    retrieval: tuple[str, ...] = ("itc",)
    extra_tokens: tuple[str, ...] = ()

    def fresh_config(self, size: str, changes: Mapping[str, Any], vocab: int | Mapping[str, int]) -> NoReturn:
        raise BadInput("no CLIP or SigLIP is made at random", "nothing here trains one from scratch", "import one: evlm import --model DIR")

    def build(self, config: Any) -> Any:
        return MODELS[type(config)](config)

    def read_config(self, path: Path) -> Any:
        """Stock configurations too; `image_mean` and `image_std` are then those of the folder's image processor."""
        file = path / "config.json"
        values = read_json(file)
        kind = CONFIGS.get(str(values.get("model_type")))
        if kind is None:
            raise BadInput(
                f"{path} holds a model of type {values.get('model_type')!r}",
                f"this family opens {', '.join(CONFIGS)}",
                "give a model of one of these types",
            )
        config = open_config(kind, {**values, **image_statistics(path, values, (kind.image_mean, kind.image_std), kind.processor)}, file)
        check_config(self, config, str(file))
        if values["model_type"] == kind.model_type or not isinstance(config.end, int):  # a stock one takes it from its tokenizer
            check_id("the id that ends a text", config.end, config.text_config.vocab_size, str(file))
        if not getattr(config.vision_config, "vision_use_head", True):
            raise BadInput(
                f"{file}: vision_use_head is false",
                "without its pooling head a SigLIP cannot compare images with texts",
                "give a SigLIP that has one",
            )
        check_shapes(self, config, path)
        return config

    def load(self, path: Path) -> Any:
        """Float32 model of a checkpoint folder or of a stock one, evaluation mode; :class:`BadInput` if weights and sizes do not fit."""
        config = self.read_config(path)
        return open_model(MODELS[type(config)], path, config)

    def save(self, model: Any, folder: Path) -> None:
        """With the names of transformers' own class while nothing is removed."""
        model.save_pretrained(folder)
        if model.config.kept is None:
            file = folder / "config.json"
            kind, architecture = model.config.stock
            values = json.loads(file.read_text("utf-8")) | {"model_type": kind, "architectures": [architecture]}
            file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def sizes(self, config: Any) -> Sizes:
        vision, text = config.vision_config, config.text_config
        return Sizes(
            vision.image_size,
            vision.patch_size,
            text.max_position_embeddings,
            text.vocab_size,
            {name: (config.tower(name).hidden_size,) * (count + 1) for name, count in config.layers().items()},
            {name: (config.tower(name).num_attention_heads,) * count for name, count in config.layers().items()},
            tuple(config.image_mean),
            tuple(config.image_std),
        )

    def tasks(self, config: Any) -> frozenset[str]:
        return frozenset({"retrieval"})

    def flows(self, config: Any) -> list[Flow]:
        """The pooled position of a tower sees the others by self-attention alone; SigLIP's pooling of the image is never pruned."""
        pooled = None if isinstance(config, SlicedSiglipConfig) else groups_of(config.layers(), HEAD, "vision")
        flows = [Flow("image", "vision.patches"), Flow("vision.patches", "vision.pooled", pooled), Flow("vision.pooled", "itc")]
        mixing = groups_of(config.layers(), HEAD, "text")
        return [*flows, Flow("text", "text.tokens"), Flow("text.tokens", "text.pooled", mixing), Flow("text.pooled", "itc")]

    def with_layers(self, config: Any, layers: dict[str, list[int]]) -> Any:
        source = {tower: list(chosen) for tower, chosen in layers.items()}
        chosen = config.copy(kept=kept_of_layers(config.kept, layers), layer_source=source, layer_source_of=config.layers())
        for tower, numbers in layers.items():
            chosen.tower(tower).num_hidden_layers = len(numbers)
        return chosen

    def forward(self, model: Comparing, batch: dict[str, Any], want: Iterable[str] = ()) -> Record:
        """Images and texts: `image_features` [I, E] and `text_features` [T, E], unit vectors, and their `logits` [I, T]."""
        wanted = check_taps(self, want)
        record = Record()
        image = model.encode_image(batch["pixels"], kinds_of(wanted, "vision"))
        ids, text = model.encode_text(batch["text_ids"], batch["text_mask"], kinds_of(wanted, "text"))
        for tower, out in (("vision", image), ("text", text)):
            tap(record, tower, out, kinds_of(wanted, tower))
        record["image_features"] = model.image_feature(image.states)
        record["text_features"] = model.text_feature(text.states, ids)
        record["logits"] = model.similarity(record["image_features"], record["text_features"])
        return record

    def example_batch(self, config: Any, batch_size: int, text_length: int, device: Any = "cpu") -> dict[str, Any]:
        size, end = config.vision_config.image_size, config.end
        ids = torch.full((batch_size, text_length), 0 if end else 1, device=device)
        ids[:, -1] = end
        return {
            "pixels": torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device),
            "text_ids": ids,
            "text_mask": torch.ones_like(ids),
        }

    def graphs(self, model: Any) -> list[Graph]:
        """`image` and `text`, each to its features, and `similarity`."""
        sizes = self.sizes(model.config)

        def images(axes: Mapping[str, int]) -> dict[str, Tensor]:
            draw = torch.Generator().manual_seed(0)
            return {"pixels": torch.randn(axes["images"], 3, sizes.image_size, sizes.image_size, generator=draw)}

        def texts(axes: Mapping[str, int]) -> dict[str, Tensor]:
            batch = self.example_batch(model.config, axes["texts"], axes["tokens"])
            return {"text_ids": batch["text_ids"], "text_mask": batch["text_mask"]}

        def features(axes: Mapping[str, int]) -> dict[str, Tensor]:
            one = self.forward(model, self.example_batch(model.config, 1, 2))
            return {f"{kind}_features": one[f"{kind}_features"].expand(axes[f"{kind}s"], -1) for kind in ("image", "text")}

        by_text = {name: {0: "texts", 1: "tokens"} for name in ("text_ids", "text_mask")}
        by_pair = {"image_features": {0: "images"}, "text_features": {0: "texts"}}
        lengths = (*TEXT_SIZES, {"texts": 2, "tokens": sizes.max_positions})
        return [
            Graph("image", ImageGraph(model), {"pixels": {0: "images"}}, ("image_features",), IMAGE_SIZES, images),
            Graph("text", TextGraph(model), by_text, ("text_features",), lengths, texts),
            Graph("similarity", Part(model, _similarity), by_pair, ("logits",), PAIR_SIZES, features),
        ]

    def stock_config(self, config: Any, neurons: Mapping[str, int]) -> Any:
        """Depth and one number of neurons a tower are fields of transformers' configurations; SigLIP's pooling head shares vision's."""
        chosen = config.copy(kept=None)
        for tower, count in neurons.items():
            before = config.tower(tower).intermediate_size
            if tower == "vision" and count != before and isinstance(config, SlicedSiglipConfig):
                why = f"vision layers have {count} neurons and the pooling head {before}, where one number stands for both"
                raise BadInput("this SigLIP does not fit transformers' own class", why, "use --format onnx or --format padded")
            chosen.tower(tower).intermediate_size = count
        return chosen

    def stock_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"pixel_values": batch["pixels"], "input_ids": batch["text_ids"], "attention_mask": batch["text_mask"]}

    def for_vqa(self, model: Any, teacher: Any | None, decoder_init: str) -> NoReturn:
        raise BadInput(
            "CLIP and SigLIP cannot answer questions",
            "they compare images with texts and decode nothing",
            "use X-VLM or BLIP for --task vqa",
        )

    def for_retrieval(self, model: Any) -> NoReturn:
        why = "the losses of retrieval are those of an X-VLM, which matches too"
        raise BadInput("CLIP and SigLIP are not trained here", why, "use an X-VLM, or prune with --task none")

    def image_features(self, model: Comparing, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = model.encode_image(pixels).states
        return states, model.image_feature(states)

    def text_features(self, model: Comparing, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ids, out = model.encode_text(ids, mask)
        return out.states, model.text_feature(out.states, ids)

    def match(self, model: Any, images: Tensor, rows: Tensor, texts: Tensor, mask: Tensor) -> NoReturn:
        raise BadInput("CLIP and SigLIP do not match", "they compare images with texts by their features alone", "leave rerank out")

    def question(self, model: Any, batch: dict[str, Any], want: Iterable[str] = ()) -> NoReturn:
        self.for_vqa(model, None, "auto")

    def answer(
        self, model: Any, context: Any, ids: Tensor, mask: Tensor | None, rows: Any | None = None, cache: Any | None = None
    ) -> NoReturn:
        self.for_vqa(model, None, "auto")


class ImageGraph(nn.Module):
    """pixels → image_features [I, E], unit vectors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
        return (self.model.image_feature(self.model.encode_image(inputs["pixels"]).states),)


class TextGraph(nn.Module):
    """text_ids, text_mask → text_features [T, E], unit vectors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
        ids, out = self.model.encode_text(inputs["text_ids"], inputs["text_mask"])
        return (self.model.text_feature(out.states, ids),)


def _similarity(model: Comparing, inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
    return (model.similarity(inputs["image_features"], inputs["text_features"]),)
