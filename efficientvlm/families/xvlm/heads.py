"""How an X-VLM gains an ability: an answer decoder, only the heads of retrieval or of boxes, or the language head of captions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efficientvlm.errors import BadInput
from efficientvlm.families.network import refusal
from efficientvlm.families.xvlm.config import CAPTION_HEAD, PRETRAIN_HEADS

RETRIEVAL = {"itc", "itm"}
TEXT_SIZES = ("text_width", "text_heads", "text_intermediate", "max_positions", "vocab_size", "type_vocab_size")
"""What an answer decoder has in common with the one it starts from."""
GROUNDING = {"box"}


def answering(model: Any, teacher: Any | None, decoder_init: str) -> tuple[Any, list[str]]:
    """`model` with an answer decoder, and the names of its tensors that are new.

    Args:
        teacher: an X-VLM that answers questions, or None.
        decoder_init: `auto`, `teacher` or `fusion`, where a new decoder comes from.

    Raises:
        BadInput: there is nothing to make a decoder from.
    """
    if model.config.decoder_layers:
        return model, []
    if not model.config.fusion_layers:
        raise refusal(model.config, "answer", why="without fusion layers it reads them blind", fix="shrink to at least one")
    fits = teacher is not None and all(getattr(teacher.config, name) == getattr(model.config, name) for name in TEXT_SIZES)
    if decoder_init == "teacher" and teacher is not None and not fits:
        why = "its answer decoder has another width, or other heads, neurons, positions or words"
        raise BadInput("decoder_init is teacher", why, "use decoder_init=fusion")
    donor = teacher if decoder_init in ("auto", "teacher") and fits else None
    if donor is None and decoder_init == "teacher":
        raise BadInput("decoder_init is teacher", "there is no --teacher", "give one, or decoder_init=fusion")
    if donor is None and "mlm" not in model.config.heads:
        why = "it has neither an answer decoder nor an MLM head to start one from"
        raise refusal(model.config, "answer", why=why, fix="use a pre-trained model, or give a --teacher")
    layers = model.config.fusion_layers
    if donor is not None:
        layers = min(layers, donor.config.decoder_layers)
    before = set(model.state_dict())
    tuned = with_decoder(model, layers, donor)
    return tuned, [] if donor is not None else sorted(set(tuned.state_dict()) - before)


def matching(model: Any) -> Any:
    """`model` without the heads of other tasks than retrieval; :class:`BadInput` if it lacks one of those."""
    heads = model.config.heads
    if missing := sorted(RETRIEVAL - set(heads)):
        why = "it answers questions" if model.config.decoder_layers else f"it has no head for {' and '.join(missing)}"
        raise refusal(model.config, "match", why=why, fix="start from a pre-trained one, before it is tuned for another task")
    if set(heads) == RETRIEVAL:
        return model
    return _with_heads(model, [head for head in heads if head in RETRIEVAL])[0]


def grounding(model: Any) -> tuple[Any, list[str]]:
    """`model` with no other head than that of boxes, and the names of its tensors that are new: those of that head if it had none.

    Raises:
        BadInput: it is tuned for another task, or texts do not see images in it.
    """
    if model.config.decoder_layers or set(model.config.heads) - set(PRETRAIN_HEADS):
        raise refusal(model.config, "ground", fix="start from a pre-trained one, before it is tuned for another task")
    if not model.config.fusion_layers:
        raise refusal(model.config, "ground", why="without fusion layers it reads phrases blind", fix="shrink to at least one")
    return (model, []) if set(model.config.heads) == GROUNDING else _with_heads(model, sorted(GROUNDING))


def _with_heads(model: Any, heads: list[str]) -> tuple[Any, list[str]]:
    """`model` with other heads, and the names of the tensors that it did not have."""
    new = type(model)(model.config.copy(heads=heads))
    old, state = model.state_dict(), new.state_dict()
    new.load_state_dict({name: old.get(name, tensor) for name, tensor in state.items()})
    return new, sorted(state.keys() - old.keys())


def captioning(model: Any) -> Any:
    """`model` as a causal decoder of captions: text and fusion layers as they are, the head of masked tokens as its language head, without
    the heads of other tasks (X-VLM, captioning); nothing is new.

    Raises:
        BadInput: it has no head of masked tokens, or no fusion layers.
    """
    heads = model.config.heads
    if CAPTION_HEAD in heads:
        return model
    if not model.config.fusion_layers:
        raise refusal(model.config, "caption", why="without fusion layers it does not see them", fix="shrink to at least one")
    if "mlm" not in heads:
        why = "it answers questions" if model.config.decoder_layers else "it has no MLM head, which says the words of captions"
        raise refusal(model.config, "caption", why=why, fix="start from a pre-trained one, before it is tuned for another task")
    new = type(model)(model.config.copy(heads=[CAPTION_HEAD]))
    old = model.state_dict()
    new.load_state_dict({name: old[f"m{name}" if name.startswith("lm_head.") else name] for name in new.state_dict()})
    return new


def with_decoder(model: Any, layers: int, source: Any | None = None) -> Any:
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
    fresh = ("cross_attention.k.weight", "cross_attention.v.weight") if source is None and config.vision_width != config.text_width else ()
    new = type(model)(config)
    old, state = model.state_dict(), new.state_dict()
    for name in state:
        if not name.startswith(("decoder.", "decoder_head.")):
            state[name] = old[name]
        elif not name.endswith(fresh):
            state[name] = _decoder_source(name, layers, model, source)
    new.load_state_dict(state)
    return new


def _decoder_source(name: str, layers: int, model: Any, source: Any | None) -> Tensor:
    donor = source if source is not None else model
    available = donor.config.decoder_layers if source is not None else donor.config.fusion_layers
    tensors: dict[str, Tensor] = donor.state_dict()
    _, _, rest = name.partition(".layers.")
    if rest:
        number, _, tail = rest.partition(".")
        layer = (int(number) + 1) * available // layers - 1
        return tensors[f"{'decoder' if source is not None else 'fusion'}.layers.{layer}.{tail}"]
    if source is not None:
        return tensors[name]
    return tensors[name.replace("decoder_head.", "mlm_head.").replace("decoder.embeddings.", "text.embeddings.")]
