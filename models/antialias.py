"""Anti-aliased downsampling and upsampling (Zhang, ICML 2019).

A stride of 2 alone aliases: fine detail turns into coarse patterns such as checkerboards. A blur
before it removes that detail (section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def binomial_filter(size: int) -> torch.Tensor:
    """A blur kernel (size, size) with a sum of 1: the outer product of binomial coefficients."""
    row = torch.ones(1)
    for _ in range(size - 1):
        row = F.pad(row, (1, 0)) + F.pad(row, (0, 1))
    return torch.outer(row, row) / row.sum() ** 2


def replicate(x: torch.Tensor) -> torch.Tensor:
    """Pad by repeating the border pixels: (N, C, H, W) -> (N, C, H+2, W+2)."""
    # F.pad(mode="replicate") does the same, but its compiled backward pass fails on a CPU if
    # gradients are channels-last (PyTorch 2.14)
    rows = torch.cat((x[..., :1, :], x, x[..., -1:, :]), 2)
    return torch.cat((rows[..., :1], rows, rows[..., -1:]), 3)


class Downsample(nn.Module):
    """Blur by a 3x3 kernel with reflection padding, and keep every second pixel.

    (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2)).
    """

    filt: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        # a buffer, as in released weights
        self.register_buffer("filt", binomial_filter(3).repeat(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filt, stride=2, groups=self.filt.shape[0])


class Upsample(nn.Module):
    """Insert zeros between the pixels, and blur by a 4x4 kernel with replication padding.

    (N, C, H, W) -> (N, C, 2H, 2W).
    """

    filt: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        # times 4, since three of four pixels are zeros: keeps the mean
        self.register_buffer("filt", 4 * binomial_filter(4).repeat(channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.filt.shape[0]
        return F.conv_transpose2d(replicate(x), self.filt, stride=2, padding=3, groups=groups)


class BlurredConv2d(nn.Conv2d):
    """A strided convolution whose input is blurred by a 3x3 kernel with replication padding.

    Shapes and weights are those of `nn.Conv2d`.
    """

    filt: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any):
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.register_buffer("filt", binomial_filter(3).repeat(in_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.conv2d(replicate(x), self.filt, groups=self.in_channels))


class BlurredConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose output is blurred by a 3x3 kernel with replication padding.

    The kernel's frequency response is zero at a period of 2 pixels, so no checkerboard of that
    period passes. Shapes and weights are those of `nn.ConvTranspose2d`.
    """

    filt: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any):
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.register_buffer("filt", binomial_filter(3).repeat(out_channels, 1, 1, 1))

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return F.conv2d(
            replicate(super().forward(x, output_size)), self.filt, groups=self.out_channels
        )
