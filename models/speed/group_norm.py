"""Faster instance norms without gradients on CPUs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .inspection import is_traced


class GroupedInstanceNorm2d(nn.InstanceNorm2d):
    """An instance norm that is computed as a group norm of as many groups as channels.

    Both are the same. But PyTorch computes instance norm as batch norm, whose sums in float32 use
    no vector instructions on a CPU: on one thread it takes five to eight times as long.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        fits = input.device.type == "cpu" and input.dtype == torch.float32 and input.dim() == 4
        if is_traced() or torch.is_grad_enabled() or not fits or input[:1, :1].numel() < 2:
            return super().forward(input)
        return F.group_norm(input, input.shape[1], self.weight, self.bias, self.eps)


def normalize_by_groups(net: nn.Module) -> None:
    """Make the instance norms of a network `GroupedInstanceNorm2d`, in place."""
    for module in net.modules():
        if type(module) is nn.InstanceNorm2d and not module.track_running_stats:
            module.__class__ = GroupedInstanceNorm2d
