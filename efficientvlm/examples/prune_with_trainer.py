"""The same with transformers' Trainer: a callback moves the gates, and the Trainer knows nothing of them.

python -m efficientvlm.examples.prune_with_trainer FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import efficientvlm
from efficientvlm.examples.prune_in_a_loop import GATE_STEPS, STEPS, clip, pairs


class Pruning(TrainerCallback):
    """Gates on the model of a Trainer. The budget's gradient does not depend on the batch, so that it is added just before the update."""

    def __init__(self, pruner: efficientvlm.Pruner) -> None:
        self.pruner, self.optimizers = pruner, pruner.optimizers()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pruner.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.pruner.moving:
            self.pruner.penalty(state.global_step).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.pruner.end_step(state.global_step)


def together(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def main(folder: str) -> None:
    torch.manual_seed(0)
    model = efficientvlm.of_stock(clip())
    pruner = efficientvlm.Pruner.of(model, sparsity=0.5, steps=GATE_STEPS, head_init=2.0)
    data = [{name: values[row] for name, values in batch.items()} for batch in map(pairs, range(STEPS)) for row in range(8)]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[], save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, data_collator=together, train_dataset=data, callbacks=[Pruning(pruner)]).train()
    small = pruner.finish().cpu()
    small.save_pretrained(folder)
    before, after = (efficientvlm.count_parameters(network)["total"] for network in (model, small))
    print(f"{before:,} parameters became {after:,}; written to {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
