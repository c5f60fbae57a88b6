"""Convolutions with large kernels and few output channels, such as the last one of a ResNet.

cuDNN and oneDNN compute them slowly, above all their gradients, since they pad 3 channels to 16 or
more.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import nn
from torch.nn import functional as F

from .inspection import is_dense, is_traced

FEW = 4  # output channels
LARGE = 5  # rows of a kernel
# input values, by kind of device; up to this, more operators take longer than they save
SMALL = {"cuda": 2**24, "cpu": 2**18}


class RowConv2d(nn.Conv2d):
    """A convolution computed as one with a kernel of one row and more output channels.

    Each row of the kernel gives output channels of its own, and the result is their sum, shifted by
    rows: equal to `nn.Conv2d` up to the rounding of sums. Has no padding, stride, dilation or
    groups. Small inputs are left to PyTorch.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C', H - k + 1, W - k + 1)."""
        device = input.device.type
        # an exported network takes any size
        if (device == "cpu" and is_traced()) or input.dim() != 4:
            return super().forward(input)
        if input.numel() <= SMALL.get(device, sys.maxsize):
            return super().forward(input)
        rows = self.kernel_size[0]
        height = input.shape[2] - rows + 1
        weight = self.weight.permute(2, 0, 1, 3).flatten(0, 1)[:, :, None]  # (k C', C, 1, k)
        parts = F.conv2d(input, weight).chunk(rows, 1)
        # in 16 bits, sums would be rounded again and again
        dtype = torch.promote_types(parts[0].dtype, torch.float32)
        shifted = [p[:, :, row : row + height].to(dtype) for row, p in enumerate(parts)]
        total = functools.reduce(torch.add, shifted)
        if self.bias is not None:
            total = total + self.bias[:, None, None]
        return total.to(parts[0].dtype)


def convolve_by_rows(net: nn.Module) -> None:
    """Make the convolutions of a network that gain from it `RowConv2d`, in place."""
    for module in net.modules():
        if type(module) is nn.Conv2d and _gains(module):
            module.__class__ = RowConv2d


def _gains(layer: nn.Conv2d) -> bool:
    few = layer.out_channels <= FEW and layer.kernel_size[0] >= LARGE
    return few and layer.padding == (0, 0) and is_dense(layer)
