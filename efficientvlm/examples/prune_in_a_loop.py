"""Prune a CLIP to half of its prunable weights in a training loop of your own.

python -m efficientvlm.examples.prune_in_a_loop FOLDER
"""

from __future__ import annotations

import sys

import torch
from transformers import CLIPConfig, CLIPModel

import efficientvlm

STEPS, GATE_STEPS, WORDS = 150, 90, 30


def clip() -> CLIPModel:
    """Stands for any CLIP, SigLIP or BLIP that transformers opens."""
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**layers, "vocab_size": WORDS, "max_position_embeddings": 8, "eos_token_id": WORDS - 1, "bos_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**layers, "image_size": 16, "patch_size": 8}, projection_dim=16))


def pairs(step: int, count: int = 8) -> dict[str, torch.Tensor]:
    """Patterns and the word for each; yours come from a DataLoader."""
    patterns = torch.randn(WORDS, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = 1 + torch.randperm(WORDS - 2, generator=torch.Generator().manual_seed(step))[:count]
    ids = torch.stack([torch.zeros_like(words), words, torch.full_like(words, WORDS - 1)], 1)
    return {"pixel_values": patterns[words], "input_ids": ids}


def main(folder: str) -> None:
    torch.manual_seed(0)
    model = efficientvlm.of_stock(clip()).train()  # the same values, keywords and outputs
    pruner = efficientvlm.Pruner.of(model, sparsity=0.5, steps=GATE_STEPS, head_init=2.0)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3), *pruner.optimizers()]
    for step in range(STEPS):
        pruner.begin_step(step)
        loss = model(**pairs(step), return_loss=True).loss + pruner.penalty(step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        pruner.end_step(step)
    small = pruner.finish()
    small.save_pretrained(folder)  # AutoModel opens it, once efficientvlm is imported
    before, after = (efficientvlm.count_parameters(network)["total"] for network in (model, small))
    print(f"{before:,} parameters became {after:,}, loss {loss.item():.2f}; written to {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
