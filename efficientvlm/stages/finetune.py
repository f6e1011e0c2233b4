"""finetune: train a model of any stage on its task, with or without a teacher."""

from __future__ import annotations

import torch

from efficientvlm.checkpoint import require_complete
from efficientvlm.config import Finetune
from efficientvlm.control import Control
from efficientvlm.data.collate import Texts
from efficientvlm.data.plan import IndexPlan
from efficientvlm.manifest import Manifest
from efficientvlm.objectives.task import VQA
from efficientvlm.stages.answering import Answerer, answer_list, evaluate_on, load_for_task, open_task, task_feed
from efficientvlm.stages.common import making, open_output, settings_of, write
from efficientvlm.training import accelerator, adamw, train


def run(config: Finetune, control: Control) -> Manifest:
    """Train on the task and write the tuned checkpoint, with its validation accuracy in the manifest."""
    student, teacher, new = load_for_task(config)
    size = student.model.config.image_size
    sources = {split: open_task(config, split, size) for split in ("train", "val")}
    inputs = {"model": config.model, "teacher": config.teacher, "data": f"sha256:{sources['train'].fingerprint}"}
    output = open_output(config, "finetune", control, inputs)
    if output.up_to_date:
        return require_complete(output.path)
    with making(output):
        hardware = accelerator(config.device)
        torch.manual_seed(config.seed)
        texts = Texts(student.tokenizer, config.max_tokens)
        student.model.config.answers, student.model.config.rank_top = answer_list(config, sources["train"]), config.rank_top
        tutor = teacher.model.to(hardware.device) if teacher else None
        kd = settings_of(config, "kd", "weights", "quirks", "temperature")
        objective = VQA(student.family, student.model, tutor, **kd, scale=config.scale_by_temperature)
        plan = IndexPlan(len(sources["train"]), config.batch_size, config.seed, hardware.num_processes, hardware.process_index)
        spent = train(
            objective,
            task_feed(config, sources["train"], texts, plan),
            [adamw(objective, config, new=new)],
            steps=config.max_steps or max(1, round(config.epochs * plan.batches_per_epoch)),
            options=config,
            output=output,
            hardware=hardware,
            title="finetune",
            quiet=control.quiet,
        )
        answer = Answerer(student, twice=config.quirks.first_token_twice)
        val = evaluate_on(answer, sources["val"], limit=config.eval_limit, title="validate", quiet=control.quiet)
        metrics = {"train": spent.last, "val": val}
        return write(
            output, student.family, student.model, student.tokenizer, control=control, spent=spent, sources=sources, metrics=metrics
        )
