"""FSDP2: parameters between steps, gradients and optimizer state are spread over the processes, instead of a copy with each.

The objective is one unit: during a step every process holds all parameters. Towers share tensors (a decoder the embeddings, fusion the
image states' keys), so that their layers cannot be gathered one by one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from efficientvlm.runtime import ranks


def shard(objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
    """Spread `objective` and the state of its `optimizers`, in place; scalars stay whole (see :func:`average_scalars`)."""
    for parameter in objective.parameters():
        parameter.data.copy_(ranks.agreed(parameter.data))
    names = {parameter: name for name, parameter in objective.named_parameters()}
    mesh = init_device_mesh(device.type, (ranks.world(),))
    fully_shard(objective, mesh=mesh, ignored_params={parameter for parameter in names if not parameter.ndim})
    now = dict(objective.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [now[names[parameter]] for parameter in group["params"]]
        state = {now[names[parameter]]: entries for parameter, entries in optimizer.state.items() if isinstance(parameter, nn.Parameter)}
        optimizer.state = defaultdict(
            dict, {parameter: {name: _like(value, parameter) for name, value in entries.items()} for parameter, entries in state.items()}
        )


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def gather(objective: nn.Module) -> None:
    """Give every process the whole parameters again, in place."""
    whole: dict[Tensor, nn.Parameter] = {}
    for module in objective.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if parameter not in whole:
                    whole[parameter] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
                module.register_parameter(name, whole[parameter])


def average_scalars(objective: nn.Module) -> None:
    """Average the gradients of what is not spread."""
    ranks.average_gradients(parameter for parameter in objective.parameters() if not isinstance(parameter, DTensor))


def clip_gradients(parameters: Sequence[Tensor], limit: float) -> float:
    """Scale gradients down to a global norm of `limit`, spread ones or not; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    parts = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    mine = [p for p, g in zip(parts, gradients, strict=True) if isinstance(g, DTensor) or ranks.is_main()]
    squares = sum((part.float().square().sum() for part in mine), torch.zeros((), device=parts[0].device))
    norm = math.sqrt(float(ranks.averaged(squares)) * ranks.world())
    if norm > limit:
        for part in parts:
            part.mul_(limit / (norm + 1e-6))
    return norm
