"""What a plan takes in the place of a published file that is not there yet."""

from __future__ import annotations

import os
from typing import Any

from efficientvlm import families
from efficientvlm.checkpoints.files import expanded, is_hub_id, resolve
from efficientvlm.data.tokenizer import load_tokenizer, with_special
from efficientvlm.loaded import shapes
from efficientvlm.settings.stages import EXPECTED, ImportConfig
from efficientvlm.stages.workspace import Beginning

WORDS = "bundled:easy-vqa-pretrained"
"""The checkpoint whose tokenizer stands in for one that is not there."""


def stand_in(config: Any) -> Beginning | None:
    """What `config` expects to be imported, where it says so and its file is not there."""
    if not isinstance(config, ImportConfig) or config.expects is None or there(config.model):
        return None
    expected = EXPECTED[config.expects]
    family = families.get(expected.family)

    def network() -> tuple[Any, Any, Any, list[str]]:
        own = config.tokenizer if config.tokenizer and there(config.tokenizer) else None
        tokenizer = with_special(load_tokenizer(resolve(own or WORDS), bert=True), family.extra_tokens)
        vocab = dict(tokenizer.get_vocab())
        vocab |= {f"[unused{number}]": number for number in range(len(vocab), expected.vocab_size)}
        values = family.fresh_config("base", expected.settings | config.settings, vocab)
        remarks = [f"{config.model} is not there: planned as {config.expects}"]
        remarks += [] if own else [f"{config.tokenizer or f'the tokenizer of {config.model}'} is not there: a word is planned as one token"]
        return family, shapes(family, values), tokenizer, remarks

    return Beginning(network)


def there(spec: str) -> bool:
    """Whether something lies at that place, or it is the name of something on a hub."""
    return is_hub_id(spec) or os.path.lexists(expanded(spec))
