"""Collectives by their names in torch, for values, tensors and gradients.

All ranks have to call them, in the same order. Each raises PeerLost where another process has
ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .ranks import PeerLost, is_main, rank, world_size

NCCL_TIMEOUT = timedelta(minutes=30)  # compiling takes some ranks longer than others

_device_groups: dict[torch.device, dist.ProcessGroup] = {}
_source = 0


# AcceleratorError came with PyTorch 2.8
_DEVICE_ERRORS: tuple[type[Exception], ...] = (
    torch.cuda.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError),
)


@contextlib.contextmanager
def _peer_lost() -> Iterator[None]:
    """Turn the error of a collective whose peer has ended into PeerLost."""
    try:
        yield
    except _DEVICE_ERRORS:
        raise  # an error of this GPU
    except RuntimeError as e:
        text = str(e).strip().splitlines()
        raise PeerLost(text[0][:200] if text else type(e).__name__) from e


# ---------------------------------------------------------------------------------------- objects
def broadcast_object(value: Any, src: int = 0) -> Any:
    """The value of rank `src`, on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    with _peer_lost():
        dist.broadcast_object_list(box, src=src)
    return box[0]


def scatter_object(values: Sequence[Any], src: int = 0) -> Any:
    """The value for this rank from a list, one for each rank, on rank `src`."""
    if world_size() == 1:
        return values[0]
    box = [None]
    with _peer_lost():
        dist.scatter_object_list(box, list(values) if rank() == src else None, src=src)
    return box[0]


def gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in order, on rank 0; an empty list on other ranks.

    Tensors arrive on the CPU.
    """
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    with _peer_lost():
        dist.gather_object(_on_cpu(value), values)
    return values or []


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on all ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _peer_lost():
        dist.all_gather_object(values, value)
    return values


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(v) for v in value)
    return value


def any_rank(flag: bool) -> bool:
    """Whether this holds on any rank."""
    return sum_over_ranks(flag)[0] > 0


def sum_over_ranks(*numbers: float) -> list[float]:
    """The sums of these numbers over all ranks."""
    if world_size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    with _peer_lost():
        dist.all_reduce(sums)
    return sums.tolist()


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        with _peer_lost():
            dist.barrier()


class AsyncMax:
    """An asynchronous all_reduce (max) of one number per iteration, one iteration late.

    No rank waits for another rank or a GPU, and all ranks see a result in the same iteration.
    """

    def __init__(self) -> None:
        self.work: Any = None
        self.number = torch.zeros(1, dtype=torch.int64)

    def __call__(self, number: int) -> int:
        """Reduce a number (0: nothing); returns the maximum of the previous call, or 0."""
        if world_size() == 1:
            return number
        largest = self.wait()
        self.number = torch.tensor([number])
        with _peer_lost():
            self.work = dist.all_reduce(self.number, dist.ReduceOp.MAX, async_op=True)
        return largest

    def wait(self) -> int:
        """Wait for a pending reduction; returns its result, or 0 if there is none."""
        work, self.work = self.work, None
        if work is None:
            return 0
        with _peer_lost():
            work.wait()
        return int(self.number.item())


async_max = AsyncMax()


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
    """The number of reductions, and their bytes on each rank: of gradients, and of norms.

    Objects and flags are small and not counted.
    """

    reductions: int = 0
    bytes: int = 0
    norm_reductions: int = 0
    norm_bytes: int = 0

    def reset(self) -> None:
        """Start again from zero."""
        for field in fields(self):
            setattr(self, field.name, 0)


traffic = Traffic()


def device_group(device: torch.device) -> dist.ProcessGroup | None:
    """The process group for tensors of a device: NCCL for a GPU, else gloo (None).

    A collective itself on its first call for a GPU: the connections are made then.
    """
    if device.type != "cuda":
        return None
    if device not in _device_groups:
        with _peer_lost():
            _device_groups[device] = dist.new_group(
                backend="nccl", timeout=NCCL_TIMEOUT, device_id=device
            )
    return _device_groups[device]


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place and without autograd; for norms."""
    traffic.norm_reductions += 1
    traffic.norm_bytes += x.numel() * x.element_size()
    with _peer_lost():
        dist.all_reduce(x, group=device_group(x.device))
    return x


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Overwrite tensors by those of rank `src`: one broadcast for each device and dtype."""
    if world_size() == 1:
        return
    for (device, _), same in _by_kind(tensors).items():
        flat = torch.cat([x.reshape(-1) for x in same])
        with _peer_lost():
            dist.broadcast(flat, src, group=device_group(device))
        for x, value in zip(same, flat.split([x.numel() for x in same]), strict=True):
            x.copy_(value.view(x.shape))


@torch.no_grad()
def same_on_all_ranks(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors are those of rank 0 on all ranks, but for differences of rounding."""
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
    for (device, dtype), same in _by_kind(parameters).items():
        absent = [i for i, p in enumerate(same) if p.grad is None]
        there = torch.ones(len(same), device=device, dtype=dtype)
        if absent:
            there[absent] = 0
        # the layout is the same on all ranks, whichever gradients they have
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in same]
        flat = torch.cat([*parts, there])
        del parts
        traffic.reductions += 1
        traffic.bytes += flat.numel() * flat.element_size()
        with _peer_lost():
            dist.all_reduce(flat, group=device_group(device))
        flat /= world_size()
        *means, there = flat.split([p.numel() for p in same] + [len(same)])
        for i in absent:
            if there[i] > 0:
                same[i].grad = torch.zeros_like(same[i])
        pairs = [(p.grad, m.view(p.shape)) for p, m in zip(same, means, strict=True)]
        kept = [(grad, mean) for grad, mean in pairs if grad is not None]
        if kept:
            torch._foreach_copy_([grad for grad, _ in kept], [mean for _, mean in kept])


def _by_kind(tensors: Iterable[Any]) -> dict[tuple[torch.device, torch.dtype], list[Any]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
    for x in tensors:
        kinds.setdefault((x.device, x.dtype), []).append(x)
    return kinds
