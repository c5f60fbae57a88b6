"""Collectives, named as in torch, for objects, numbers, tensors and gradients.

All ranks have to call them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from .ranks import is_main, rank, world_size

_source = 0


# ---------------------------------------------------------------------------- objects and numbers
def broadcast_object(value: Any, src: int = 0) -> Any:
    """The value of rank `src`, on all ranks."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src)
    return box[0]


def scatter_object(values: Sequence[Any], src: int = 0) -> Any:
    """The value for this rank, from a list on rank `src` with one value for each rank."""
    if world_size() == 1:
        return values[0]
    box = [None]
    dist.scatter_object_list(box, list(values) if rank() == src else None, src)
    return box[0]


def gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in order, on rank 0; an empty list on other ranks.

    Tensors arrive on the CPU.
    """
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), value), values)
    return values or []


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in order, on all ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(*numbers: float) -> list[float]:
    """The sums of these numbers over all ranks."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def max_over_ranks(number: float) -> float:
    """The largest of the numbers of all ranks."""
    return _reduced([number], dist.ReduceOp.MAX)[0]


def any_rank(flag: bool) -> bool:
    """Whether this holds on any rank."""
    return max_over_ranks(flag) > 0


def _reduced(numbers: Sequence[float], op: Any) -> list[float]:
    if world_size() == 1:
        return list(numbers)
    result = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(result, op)
    return result.tolist()


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        dist.barrier()


# --------------------------------------------------------------------------- the newest checkpoint
def source_rank() -> int:
    """The rank that reads the checkpoint for all ranks: see `choose_source`."""
    return _source


def is_source() -> bool:
    """Whether this is the rank that reads the checkpoint."""
    return rank() == _source


def choose_source(newest: Any) -> None:
    """Let the rank with the largest value (None: no checkpoint) read the checkpoint.

    That is rank 0, unless another machine, with a folder of its own, has a newer one.
    """
    global _source
    values = all_gather_object(newest)
    found = [(value, -rank) for rank, value in enumerate(values) if value is not None]
    _source = -max(found)[1] if found else 0


# ---------------------------------------------------------------------------------------- tensors
@dataclass
class Traffic:
    """How often gradients were reduced, and how many bytes that was on each rank."""

    reductions: int = 0
    bytes: int = 0


traffic = Traffic()


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place and without autograd."""
    dist.all_reduce(x)
    return x


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Overwrite tensors with those of rank `src`."""
    for x in tensors if world_size() > 1 else ():
        value = x.contiguous()  # which they are not with --channels_last
        dist.broadcast(value, src)
        x.copy_(value)


@torch.no_grad()
def same_on_all_ranks(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are the same on all ranks, up to rounding."""
    if world_size() == 1:
        return True
    first = [x.detach().clone() for x in tensors]
    broadcast_tensors(first)
    pairs = [(x, y) for x, y in zip(tensors, first, strict=True) if x.numel()]
    return not any_rank(any((x - y).abs().max() > 1e-3 * y.abs().max() for x, y in pairs))


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over all ranks: one all_reduce for each device and dtype.

    A gradient that is None on all ranks stays None; one that is None on some ranks counts as zero.
    """
    if world_size() == 1:
        return
    kinds: dict[Any, list[torch.nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    for same in kinds.values():
        # zeros in place of missing gradients, and at the end a flag for each one that is present:
        # so the layout is the same on all ranks
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in same]
        present = parts[0].new_ones(len(same))
        missing = [i for i, p in enumerate(same) if p.grad is None]
        for i in missing:
            present[i] = 0
        flat = torch.cat([*(part.reshape(-1) for part in parts), present])
        traffic.reductions += 1
        traffic.bytes += flat.nbytes
        dist.all_reduce(flat)
        flat /= world_size()
        *means, present = flat.split([*(p.numel() for p in same), len(same)])
        for i in missing:
            if present[i] > 0:
                same[i].grad = torch.zeros_like(same[i])
        pairs = [(p.grad, m.view_as(p)) for p, m in zip(same, means, strict=True)]
        kept = [(grad, mean) for grad, mean in pairs if grad is not None]
        if kept:
            torch._foreach_copy_([grad for grad, _ in kept], [mean for _, mean in kept])
