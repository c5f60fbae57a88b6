"""Synchronized batch norm: statistics over the batches of all ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as Kernels
from torch.nn.modules.batchnorm import _BatchNorm

from util import distributed


class _Sum(torch.autograd.Function):
    """all_reduce (sum) whose backward is an all_reduce too; supports double backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Sum.apply(grad)


class _Kernels(Kernels):
    """torch's kernels, with an autograd graph that does not keep the process group alive."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        y = Kernels.forward(ctx, *args)
        ctx.process_group = None  # which in the backward pass means that of all ranks
        return y


class SyncBatchNorm2d(nn.SyncBatchNorm):
    """Synchronized batch norm (N, C, H, W) on every device; plain until `synchronize_norms`.

    In place of a `BatchNorm1d` or `BatchNorm3d` it takes (N, C) and (N, C, ...).

    torch's own runs on GPUs only, lacks double backward, and would wait forever if one process
    computes something by itself. Its kernels are used where none of this matters. Weights have the
    names of `nn.BatchNorm2d`.
    """

    synchronized = False
    double_backward = False  # whether it is needed

    def __init__(self, num_features: int, **options: Any):
        """Takes the arguments of `nn.BatchNorm2d`."""
        super().__init__(num_features, **options)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.synchronized or distributed.norms_are_local():
            return _BatchNorm.forward(self, input)
        self._check_input_dim(input)
        return self._synchronized(input)

    def _count(self) -> float:
        """Count this batch; returns its weight in the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return self.momentum or 0.0

    def _synchronized(self, x: torch.Tensor) -> torch.Tensor:
        momentum = self._count()
        if x.device.type == "cuda" and not self.double_backward:
            statistics = (self.running_mean, self.running_var, self.eps, momentum)
            ranks = (torch.distributed.group.WORLD, distributed.world_size())
            return _Kernels.apply(x, self.weight, self.bias, *statistics, *ranks)
        return self._composed(x, momentum)

    def _composed(self, x: torch.Tensor, momentum: float) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = (0, *range(2, x.dim()))
        shape = (-1, *[1] * (x.dim() - 2))
        here = wide.new_full((1,), x.numel() / x.shape[1])
        sums = _Sum.apply(torch.cat([wide.sum(dims), here]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # from centred values: E[x^2] - E[x]^2 cancels where the mean is large
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


@functools.cache
def exclude_from_compiling() -> None:
    """Exclude the collectives from compilation. Imports the compiler."""
    disabled = torch.compiler.disable(SyncBatchNorm2d._synchronized)
    SyncBatchNorm2d._synchronized = disabled  # type: ignore[method-assign]


def _is_torchs(kind: type) -> bool:
    """Whether a class is torch's batch norm, or a subclass that only initializes differently."""
    torchs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if kind in torchs or not issubclass(kind, torchs):
        return kind in torchs
    own = {name for name, value in vars(kind).items() if callable(value)}
    return own <= {"__init__", "reset_parameters"} and all(map(_is_torchs, kind.__bases__))


def synchronize_norms(net: nn.Module, double_backward: bool = False) -> int:
    """Synchronize the batch norms of a network in place; returns how many have been converted.

    Weights, running statistics and their names stay. `double_backward` makes gradients of gradients
    possible.
    """
    converted = 0
    for module in net.modules():
        if _is_torchs(type(module)):
            # in place: an optimizer may hold its parameters, and lists or attributes the module
            module.__class__ = SyncBatchNorm2d
            module.process_group = None  # type: ignore[assignment]
            converted += 1
        if isinstance(module, SyncBatchNorm2d):
            module.synchronized, module.double_backward = True, double_backward
    return converted
