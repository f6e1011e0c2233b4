"""Graphs for export, whatever the family: of decoders, and of networks that compare two images.

A decoder goes on from keys and values of what it attends to, projected once and picked by row, and from those of its own earlier tokens, so
that ranking many answers repeats neither. Written against :class:`attention.Context` and :class:`attention.Cache`, which every network's
`decode` uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efficientvlm.families.network import Graph
from efficientvlm.families.towers.attention import Cache, Context, KeyValue

Tensors = Mapping[str, Tensor]
Axes = Mapping[str, int]
TEXT_SIZES = ({"texts": 3, "tokens": 5}, {"texts": 1, "tokens": 1}, {"texts": 8, "tokens": 7})
MATCH_SIZES = ({"images": 2, "texts": 3, "tokens": 5}, {"images": 1, "texts": 1, "tokens": 1}, {"images": 3, "texts": 8, "tokens": 4})
IMAGE_SIZES = ({"images": 2}, {"images": 1}, {"images": 8})
QUESTION_SIZES = (
    {"images": 2, "questions": 3, "tokens": 5},
    {"images": 1, "questions": 1, "tokens": 1},
    {"images": 1, "questions": 4, "tokens": 3},
    {"images": 8, "questions": 8, "tokens": 7},
)
PAIR_SIZES = (
    {"pairs": 2, "statements": 3, "tokens": 5},
    {"pairs": 1, "statements": 1, "tokens": 1},
    {"pairs": 1, "statements": 4, "tokens": 3},
    {"pairs": 8, "statements": 8, "tokens": 7},
)
QUESTION_AXES = {
    "pixels": {0: "images"},
    **{name: {0: "questions", 1: "tokens"} for name in ("question_ids", "question_mask")},
    "image_index": {0: "questions"},
}
STEP_SIZES = (
    {"sequences": 7, "length": 2, "past": 4},
    {"sequences": 1, "length": 1, "past": 0},
    {"sequences": 5, "length": 3, "past": 0},
    {"sequences": 16, "length": 1, "past": 1},
)


def images_of(model: Any) -> Callable[[Axes], dict[str, Tensor]]:
    """Example `pixels` of the size that `model` reads."""
    size = model.config.sizes().image_size

    def example(axes: Axes) -> dict[str, Tensor]:
        return {"pixels": torch.randn(axes["images"], 3, size, size, generator=torch.Generator().manual_seed(0))}

    return example


def questions_of(model: Any) -> Callable[[Axes], dict[str, Tensor]]:
    """Example inputs of a network that reads questions, several about some images and none about others."""
    sizes = model.config.sizes()

    def example(axes: Axes) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        count, tokens = axes["questions"], axes["tokens"]
        return {
            "pixels": torch.randn(axes["images"], 3, sizes.image_size, sizes.image_size, generator=draw),
            "question_ids": torch.randint(sizes.vocab_size, (count, tokens), generator=draw),
            "question_mask": padded(count, tokens, draw),
            "image_index": torch.randint(axes["images"], (count,), generator=draw),
        }

    return example


class Part(nn.Module):
    """A function of `model` as a module, for graphs that need no more than one."""

    def __init__(self, model: nn.Module, function: Callable[[Any, Tensors], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, inputs: Tensors) -> tuple[Tensor, ...]:
        return self.function(self.model, inputs)


class Step(nn.Module):
    """Keys and values of what is attended to and of the tokens so far, more tokens → next-token logits, keys and values of all tokens."""

    def __init__(self, model: Any, layers: int, past: list[int], ids: str) -> None:
        super().__init__()
        self.model, self.layers, self.past, self.ids = model, layers, past, ids

    def forward(self, inputs: Tensors) -> tuple[Tensor, ...]:
        mask = inputs["question_mask"].bool()[:, None, None] if "question_mask" in inputs else None
        context = Context(pairs(inputs, self.layers), mask)
        cache: Cache = self.model.new_cache()
        cache.kv = {layer: kv for layer, kv in enumerate(pairs(inputs, self.layers, "past_")) if kv is not None}
        cache.length = inputs[f"past_key_{self.past[0]}"].shape[2] if self.past else inputs["past"].shape[0]
        logits = self.model.decode(context, inputs[self.ids], None, inputs["rows"], cache)
        return (logits, *(tensor for layer in self.past for tensor in cache.kv[layer]))


def pairs(tensors: Tensors, layers: int, prefix: str = "") -> list[KeyValue | None]:
    """Keys and values called `{prefix}key_{layer}` and `{prefix}value_{layer}`; None for a layer without."""
    has = [f"{prefix}key_{layer}" in tensors for layer in range(layers)]
    return [(tensors[f"{prefix}key_{i}"], tensors[f"{prefix}value_{i}"]) if there else None for i, there in enumerate(has)]


def names(layers: list[int], prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}{kind}_{layer}" for layer in layers for kind in ("key", "value"))


def present(kv: list[KeyValue | None]) -> list[int]:
    """Layers that have keys and values."""
    return [layer for layer, tensors in enumerate(kv) if tensors is not None]


def flat(kv: list[KeyValue | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensors in kv if tensors is not None for tensor in tensors)


@torch.no_grad()
def vqa_graphs(model: Any) -> list[Graph]:
    """`question` and `answer` of a model that answers questions.

    `question` gives the text `states` and the keys and values of every decoder layer that has cross-attention heads.
    """

    def question(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        record, context = model.encode(dict(inputs))
        return (record["states"], *flat(context.kv))

    example = questions_of(model)
    _, context = model.encode(example(QUESTION_SIZES[0]))
    outputs = ("states", *names(present(context.kv)))
    return [
        Graph("question", Part(model, question), QUESTION_AXES, outputs, QUESTION_SIZES, example),
        step_graph(model, "answer", context.kv, {0: "questions", 2: "tokens"}, "answer_ids"),
    ]


def compare_graphs(model: Any) -> list[Graph]:
    """`compare` of a model that reads two images and a text about them: `logits` [statements, 2] of false and true."""
    sizes = model.config.sizes()

    def example(axes: Axes) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        count, tokens, side = axes["statements"], axes["tokens"], sizes.image_size
        return {
            **{name: torch.randn(axes["pairs"], 3, side, side, generator=draw) for name in ("pixels", "second_pixels")},
            "pair_index": torch.randint(axes["pairs"], (count,), generator=draw),
            "text_ids": torch.randint(sizes.vocab_size, (count, tokens), generator=draw),
            "text_mask": padded(count, tokens, draw),
        }

    def compare(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        return (model.run(dict(inputs))["logits"],)

    axes = {
        "pixels": {0: "pairs"},
        "second_pixels": {0: "pairs"},
        "pair_index": {0: "statements"},
        **{name: {0: "statements", 1: "tokens"} for name in ("text_ids", "text_mask")},
    }
    return [Graph("compare", Part(model, compare), axes, ("logits",), PAIR_SIZES, example)]


def ground_graphs(model: Any) -> list[Graph]:
    """`ground` of a model that finds what a phrase means: `boxes` [questions, 4], as fractions of the image."""

    def ground(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        return (model.ground(dict(inputs))["boxes"],)

    return [Graph("ground", Part(model, ground), QUESTION_AXES, ("boxes",), QUESTION_SIZES, questions_of(model))]


@torch.no_grad()
def caption_graphs(model: Any) -> list[Graph]:
    """`image` gives keys and values for the captions of images; `decoder` goes on with `text_ids` for the images named by `rows`."""
    example = images_of(model)

    def image(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        states = model.encode_image(inputs["pixels"]).states
        return (states, *flat(model.attended(states).kv))

    kv = model.look(example({"images": 2})["pixels"]).kv
    outputs = ("image_states", *names(present(kv)))
    return [
        Graph("image", Part(model, image), {"pixels": {0: "images"}}, outputs, IMAGE_SIZES, example),
        step_graph(model, "decoder", kv, {0: "images"}, "text_ids"),
    ]


@torch.no_grad()
def matching_graphs(
    model: Any, attended: Callable[[Any, Tensor], Context], match: Callable[[Any, Tensor, Tensor, Context], Tensor]
) -> list[Graph]:
    """`image`, `text` and `match` of a network that compares images with texts and matches them.

    `image` and `text` give features to compare; `match` reads a text with the keys and values of the image it belongs to (`rows`), which
    `image` gives too.

    Args:
        attended: the network and image states → what texts attend to.
        match: the network, token ids and mask [P, L] and what they attend to → logits [P, 2].
    """
    example, vocabulary = images_of(model), model.config.sizes().vocab_size

    def image(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        states = model.encode_image(inputs["pixels"]).states
        return (model.image_feature(states), *flat(attended(model, states).kv))

    def text(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        return (model.embed_texts(inputs["text_ids"], inputs["text_mask"])[1],)

    def matched(model: Any, inputs: Tensors) -> tuple[Tensor, ...]:
        seen = Context(pairs(inputs, layers), None, inputs["rows"])
        return (match(model, inputs["text_ids"], inputs["text_mask"], seen),)

    def texts(axes: Axes) -> dict[str, Tensor]:
        draw, shape = torch.Generator().manual_seed(0), (axes["texts"], axes["tokens"])
        return {"text_ids": torch.randint(vocabulary, shape, generator=draw), "text_mask": padded(*shape, draw)}

    kv = attended(model, model.encode_image(example({"images": 1})["pixels"]).states).kv
    layers, keys = len(kv), names(present(kv))

    def both(axes: Axes) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        shapes = [(axes["images"], *tensor.shape[1:]) for tensor in flat(kv)]
        seen = {key: torch.randn(shape, generator=draw) for key, shape in zip(keys, shapes, strict=True)}
        return {**seen, "rows": torch.randint(axes["images"], (axes["texts"],), generator=draw), **texts(axes)}

    by_text = {name: {0: "texts", 1: "tokens"} for name in ("text_ids", "text_mask")}
    by_match = {**{key: {0: "images"} for key in keys}, "rows": {0: "texts"}, **by_text}
    return [
        Graph("image", Part(model, image), {"pixels": {0: "images"}}, ("image_features", *keys), IMAGE_SIZES, example),
        Graph("text", Part(model, text), dict(by_text), ("text_features",), TEXT_SIZES, texts),
        Graph("match", Part(model, matched), by_match, ("logits",), MATCH_SIZES, both),
    ]


@torch.no_grad()
def step_graph(model: Any, name: str, kv: list[KeyValue | None], axes: dict[int, str], ids: str) -> Graph:
    """One decoding step, run by `decode`.

    A layer without cross-attention heads has no `key_i` and `value_i`, one without heads no `past_key_i`. If no layer has heads, `past`
    [tokens so far] says by its length alone where the new tokens stand.

    Args:
        kv: keys and values of an example, whose sizes other than those of `axes` (dimension → name) are fixed. An axis `tokens` brings a
            `question_mask`.
        ids: name of the input with the new tokens.
    """
    cache = model.new_cache()
    rows = next((tensors[0].shape[0] for tensors in kv if tensors is not None), 1)
    shapes = {layer: tensors[0].shape for layer, tensors in enumerate(kv) if tensors is not None}
    model.decode(Context(kv), torch.zeros(rows, 1, dtype=torch.long), None, None, cache)
    cached = {layer: tensors[0].shape for layer, tensors in sorted(cache.kv.items())}
    vocabulary, owner, asks = model.config.sizes().vocab_size, axes[0], "tokens" in axes.values()
    attended = ({owner: 3, "tokens": 5}, {owner: 1, "tokens": 1}, {owner: 2, "tokens": 6}, {owner: 8, "tokens": 3})
    sizes = tuple({**{axis: part[axis] for axis in axes.values()}, **step} for part, step in zip(attended, STEP_SIZES, strict=True))

    def example(given: Axes) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        inputs: dict[str, Tensor] = {}
        for layer, shape in shapes.items():
            wanted = [given[axes[dim]] if dim in axes else size for dim, size in enumerate(shape)]
            inputs |= {key: torch.randn(wanted, generator=draw) for key in names([layer])}
        if asks:
            inputs["question_mask"] = padded(given[owner], given["tokens"], draw)
        inputs["rows"] = torch.randint(given[owner], (given["sequences"],), generator=draw)
        inputs[ids] = torch.randint(vocabulary, (given["sequences"], given["length"]), generator=draw)
        for layer, (_, heads, _, width) in cached.items():
            before = (given["sequences"], heads, given["past"], width)
            inputs |= {key: torch.randn(before, generator=draw) for key in names([layer], "past_")}
        return inputs if cached else {**inputs, "past": torch.arange(given["past"])}

    dynamic: dict[str, dict[int, str]] = {key: axes for key in names(list(shapes))}
    dynamic |= {"question_mask": {0: owner, 1: "tokens"}} if asks else {}
    dynamic |= {"rows": {0: "sequences"}, ids: {0: "sequences", 1: "length"}}
    dynamic |= {key: {0: "sequences", 2: "past"} for key in names(list(cached), "past_")} if cached else {"past": {0: "past"}}
    module = Step(model, max(len(kv), *(layer + 1 for layer in cached), 0), list(cached), ids)
    return Graph(name, module, dynamic, ("logits", *names(list(cached), "present_")), sizes, example)


def padded(rows: int, tokens: int, draw: torch.Generator) -> Tensor:
    """A mask [rows, tokens] whose rows end in padding of different length; the first has none."""
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=draw)
    lengths[0] = tokens
    return (torch.arange(tokens) < lengths).long()
