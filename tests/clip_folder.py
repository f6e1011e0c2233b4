"""A tiny CLIP as a Hugging Face folder: weights, byte-pair tokenizer, centre-cropping image processor, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compression_cases import TEXT, VISION
from tokenizers import trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

SENTENCES = ["a red circle", "the blue square", "a cat and dogs"]


def byte_pairs() -> Any:
    """A byte-pair tokenizer of CLIP's kind."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=special, end_of_word_suffix="</w>", show_progress=False)
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(SENTENCES * 5, trainer)
    learnt = json.loads(backend.to_str())["model"]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)


def write_clip(folder: Path, tokenizer: Any) -> Path:
    """Images of 16 px, cut out of the middle of 20; two layers a tower; licence MIT."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text, vision = TEXT | ids | {"vocab_size": len(tokenizer), "projection_dim": 8}, VISION | {"projection_dim": 8}
    torch.manual_seed(3)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**sizes, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1]).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [clip]\n---\n# A model\n", encoding="utf-8")
    return folder
