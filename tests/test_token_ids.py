"""Token ids that a CLIP or SigLIP looks for are its tokenizer's, whatever its configuration says: features as transformers gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_folder import SENTENCES, byte_pairs, write_clip
from compression_cases import TEXT, VISION
from conftest import run_stage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from efficientvlm.control import Control
from efficientvlm.errors import BadInput
from efficientvlm.families.clip.config import LEGACY_END, SlicedCLIPConfig
from efficientvlm.loaded import load, texts_of

WORDS = "a the red blue circle square cat and dogs".split()


def fixed(special: list[str], pad: str, end: str) -> Any:
    """Words, nothing in front of a text and `end` behind it: SigLIP 2 has padding 0 and end 1, SigLIP 1 one token for both."""
    vocab = {token: number for number, token in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, vocab[end])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end, unk_token="<unk>", model_max_length=12)


TOKENIZERS = {
    "SigLIP 1": (["<unk>", "</s>"], "</s>", "</s>"),
    "SigLIP 2": (["<pad>", "<eos>", "<bos>", "<unk>"], "<pad>", "<eos>"),
}


def write_siglip(folder: Path, tokenizer: Any, **text: Any) -> Path:
    """As published ones: the configuration says nothing of token ids, so that transformers' defaults, of another vocabulary, hold."""
    torch.manual_seed(0)
    sizes = TEXT | {"vocab_size": len(tokenizer), "projection_size": VISION["hidden_size"], "max_position_embeddings": 12} | text
    SiglipModel(SiglipConfig(text_config=sizes, vision_config=VISION)).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        values["text_config"].pop(name, None)
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_siglip_reads_texts_as_transformers_does(kind, tmp_path, capsys):
    tokenizer = fixed(*TOKENIZERS[kind])
    source = write_siglip(tmp_path / "hf", tokenizer)
    run_stage("import", Control(), out=str(tmp_path / "m"), model=str(source))
    assert ("padding 0 (config.json: 1)" in capsys.readouterr().err) == (kind == "SigLIP 2")
    loaded, theirs = load(str(tmp_path / "m")), SiglipModel.from_pretrained(source).eval()
    words = tokenizer(SENTENCES, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs.get_text_features(input_ids=words["input_ids"])
        expected = torch.nn.functional.normalize(getattr(expected, "pooler_output", expected), dim=-1)
        got = loaded.model.embed_texts(*texts_of(loaded).batch(SENTENCES))[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("said", [49407, LEGACY_END, None])
def test_a_clip_ends_texts_where_its_tokenizer_does(said, tmp_path, capsys):
    """A wrong number and transformers' default are replaced and said; the number of old files, which means the highest id, is kept."""
    tokenizer = byte_pairs()
    source = write_clip(tmp_path / "hf", tokenizer)
    right = CLIPModel.from_pretrained(source).eval()
    values = json.loads((source / "config.json").read_text())
    values["text_config"]["eos_token_id"] = said
    if said is None:
        del values["text_config"]["eos_token_id"]
    (source / "config.json").write_text(json.dumps(values))
    run_stage("import", Control(), out=str(tmp_path / "m"), model=str(source))
    loaded = load(str(tmp_path / "m"))
    highest = tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    replaced = said != LEGACY_END or not highest
    assert (f"end of text {tokenizer.eos_token_id} (config.json: " in capsys.readouterr().err) == replaced
    assert loaded.manifest.extra["token_ids"] == (
        [] if not replaced else [f"end of text {tokenizer.eos_token_id} (config.json: {said or 49407})"]
    )
    words = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = right.get_text_features(**words)
        expected = torch.nn.functional.normalize(getattr(expected, "pooler_output", expected), dim=-1)
        got = loaded.model.embed_texts(*texts_of(loaded).batch(SENTENCES))[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_end_token_with_the_number_of_old_files_is_refused():
    config = SlicedCLIPConfig(text_config=TEXT, vision_config=VISION)
    tokenizer = fixed(["<unk>", "<pad>", "<eos>"], "<pad>", "<eos>")
    with pytest.raises(BadInput, match="ends texts with the id 2"):
        config.adopt(tokenizer)
