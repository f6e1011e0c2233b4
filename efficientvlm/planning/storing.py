"""What a store of embeddings would take, from the number of samples (formulas ours)."""

from __future__ import annotations

import torch

from efficientvlm.checkpoints.store import SENTENCES
from efficientvlm.families.footprint import Footprint, room
from efficientvlm.loaded import Loaded, texts_of
from efficientvlm.settings.stages import Embed

HALF, KEY = 2, 8
ID = 40  # bytes of an id, about
SORTED = 4  # numbers of eight bytes a sample, while the index is made


def memory(teacher: Loaded | None, config: Embed, count: int, width: int) -> dict[str, int]:
    """Bytes by purpose, those of the model aside: a batch, a shard and its copy, and the keys of all samples while they are sorted."""
    batch = 0
    if teacher:
        sizes, shape = teacher.sizes, Footprint.of(teacher.config)
        tokens = texts_of(teacher, config.max_tokens).max_tokens
        most = tokens * shape.question_token if config.side == SENTENCES else shape.encoding + 8 * 3 * sizes.image_size**2
        batch = min(room(torch.device("cpu")), config.batch_size * most)
    shard = 2 * min(config.shard_size, count) * (HALF * width + ID)
    return {"batch": batch, "shard": shard, "index": SORTED * KEY * count}


def disk(count: int, width: int) -> dict[str, int]:
    """Bytes of the folder in the end, of what a run that is stopped goes on from, and at the fullest: files are linked, not copied."""
    shards = count * (HALF * width + ID + KEY)
    return {"output": shards + 2 * KEY * count, "state": shards, "peak": shards + 2 * KEY * count}
