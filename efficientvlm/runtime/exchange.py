"""Rows of a batch that is spread over processes: all of them gathered, or just those fetched that a process needs; with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from efficientvlm.runtime import ranks


class Rows:
    """`count` rows of each process; row i of process r is row `counts[0] + ... + counts[r - 1] + i` of the whole batch.

    All processes call the methods together and in the same order. Gradients follow the convention of `ranks.share_of`: what a process gets
    back is the sum over the processes of the gradients of their losses, of which DDP takes the mean.
    """

    def __init__(self, count: int) -> None:
        self.counts = [count]
        if ranks.world() > 1:
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world())]
            dist.all_gather(counts, torch.tensor([count]))
            self.counts = [int(number) for number in counts]
        me = ranks.rank() if len(self.counts) > 1 else 0
        self.me, self.total, self.start = me, sum(self.counts), sum(self.counts[:me])

    @classmethod
    def of_one(cls, count: int) -> Rows:
        """The rows of this process, as if there were no other."""
        with ranks.alone():
            return cls(count)

    def gather(self, rows: Tensor) -> Tensor:
        """[total, ...] the rows [count, ...] of all processes."""
        if len(self.counts) == 1:
            return rows
        gathered: Tensor = _Gather.apply(rows, self)
        return gathered

    def reach(self, rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """`rows` [>= count, ...] extended by those of other processes that this one wants, and where they are.

        Args:
            wanted: int64 [total], for every row of the whole batch the row that belongs with it; the same on all processes.

        Returns:
            rows [more, ...] and positions [count] in them.
        """
        if len(self.counts) == 1:
            return rows, wanted
        fetched: Tensor = _Fetch.apply(rows, self._routes(wanted.cpu()))
        return torch.cat([rows, fetched]), torch.arange(len(rows), len(rows) + len(fetched), device=rows.device)

    def _routes(self, wanted: Tensor) -> Routes:
        owner = torch.repeat_interleave(torch.tensor(self.counts))[wanted].split(self.counts)
        local = [part - self.start for part in wanted.split(self.counts)]
        send = [part[of == self.me] for part, of in zip(local, owner, strict=True)]
        return Routes(
            torch.cat(send), list(map(len, send)), torch.bincount(owner[self.me], minlength=len(self.counts)).tolist(), owner[self.me]
        )


class Routes:
    """Which rows go to whom: `send` [n] local rows in order of receiver, and how the `received` ones are put back in order."""

    def __init__(self, send: Tensor, sent: list[int], received: list[int], owner: Tensor) -> None:
        self.send, self.sent, self.received = send, sent, received
        self.arrival = owner.argsort(stable=True)  # arrival order → position
        self.place = self.arrival.argsort()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Rows) -> Tensor:
        ctx.place = place
        most = max(place.counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in place.counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, place.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        place, total = ctx.place, grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[place.start : place.start + place.counts[place.me]], None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routes: Routes) -> Tensor:
        ctx.routes, ctx.shape = routes, rows.shape
        sent = rows.index_select(0, routes.send.to(rows.device)).contiguous()
        arrived = rows.new_empty(sum(routes.received), *rows.shape[1:])
        dist.all_to_all_single(arrived, sent, routes.received, routes.sent)
        return arrived.index_select(0, routes.place.to(rows.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        routes, (grad,) = ctx.routes, grads
        back = grad.index_select(0, routes.arrival.to(grad.device)).contiguous()
        arrived = grad.new_empty(len(routes.send), *ctx.shape[1:])
        dist.all_to_all_single(arrived, back, routes.sent, routes.received)
        return grad.new_zeros(ctx.shape).index_add(0, routes.send.to(grad.device), arrived), None
