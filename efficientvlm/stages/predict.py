"""predict: one question about one image file."""

from __future__ import annotations

from typing import Any

from efficientvlm.data.images import open_image
from efficientvlm.data.items import Question
from efficientvlm.data.kinds.questions import VQAItem, vqa_batch
from efficientvlm.errors import BadInput
from efficientvlm.hardware import pick_device
from efficientvlm.stages.answering import Answerer
from efficientvlm.stages.common import keep_length, load
from efficientvlm.stages.evaluate import counts_first_token_twice


def run(
    *, model: str, image: str, question: str, mode: str = "rank", device: str = "auto", top: int = 5, max_tokens: int | None = None
) -> dict[str, Any]:
    """`answer`, and in mode `rank` the `top` best `answers` with their probabilities among the ranked candidates.

    Raises:
        BadInput: an image that is missing, damaged or huge, an empty or too long question, a checkpoint that answers no questions.
    """
    if not question.strip():
        raise BadInput("the question is empty", "", 'ask something, e.g. --question "What colour is it?"')
    if top < 1:
        raise BadInput(f"--top {top} shows nothing", "", "use 1 or more")
    loaded = load(model, exported=True)
    keep_length(loaded, max_tokens)
    pixels = open_image(image, loaded.preprocessing)
    loaded.model.to(pick_device(device))
    answer = Answerer(loaded, mode=mode, twice=counts_first_token_twice(loaded.manifest, None))
    words, room = len(answer.texts.ids([question])[0]), answer.texts.room()
    if words > room:
        raise BadInput(
            "the question is too long", f"it has {words} tokens, the model reads {room}", "ask more briefly, or raise --max-tokens"
        )
    batch = vqa_batch([VQAItem(image, pixels, [Question(question, [])])], answer.texts, seed=0, step=0, train=False)
    if mode == "generate":
        return {"question": question, "answer": answer(batch)[0]}
    scored = answer.scored(batch)[0]
    answers = [{"answer": text, "probability": probability} for text, probability in scored[:top]]
    return {"question": question, "answer": scored[0][0], "candidates": len(scored), "answers": answers}
