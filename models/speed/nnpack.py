"""Faster convolutions without gradients on CPUs, by Winograd's method and Fourier transforms.

PyTorch's usual convolution (oneDNN) computes each product. NNPACK, which is a part of PyTorch too,
transforms tiles of the image: for kernels of 3x3 it needs a fifth of the multiplications (Lavin &
Gray 2016, Fast Algorithms for Convolutional Neural Networks, F(6x6, 3x3)); for the first and the
last layer of a ResNet, whose three channels leave most of a vector register empty, it uses Fourier
transforms. Relative to float64, the root mean square error of 3x3 is 5e-6, where oneDNN has 2e-7;
that of 7x7 is no larger than oneDNN's.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from .inspection import is_dense, is_traced
from .row_convolution import RowConv2d

LEAST = 32  # channels; with fewer, transforms for 3x3 take longer than they save


class NnpackConv2d(nn.Conv2d):
    """A convolution of one image that NNPACK computes where PyTorch has a single thread.

    With several, NNPACK's threads and PyTorch's would spin on the same cores.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(1, C, H, W) to (1, C', H', W'), as `nn.Conv2d`; so are all other inputs."""
        if is_traced() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        contiguous = input.is_contiguous() and self.weight.is_contiguous()
        one = input.dim() == 4 and len(input) == 1 and torch.get_num_threads() == 1
        fits = input.device.type == "cpu" and input.dtype == torch.float32
        if not (contiguous and one and fits):
            return super().forward(input)
        return torch._nnpack_spatial_convolution(input, self.weight, self.bias, self.padding)


class NnpackRowConv2d(NnpackConv2d, RowConv2d):
    """The same with `RowConv2d` in place of PyTorch's usual convolution."""


KINDS = {nn.Conv2d: NnpackConv2d, RowConv2d: NnpackRowConv2d}


def convolve_with_nnpack(net: nn.Module) -> None:
    """Make the convolutions of a network that gain from it `NnpackConv2d`, in place."""
    if _starts():
        for module in net.modules():
            if type(module) in KINDS and _gains(module):
                module.__class__ = KINDS[type(module)]


def _gains(layer: nn.Conv2d) -> bool:
    padded = layer.padding_mode == "zeros" and layer.padding in ((0, 0), (1, 1))
    if not (padded and is_dense(layer)):
        return False
    if layer.kernel_size == (3, 3):
        return min(layer.in_channels, layer.out_channels) >= LEAST
    return layer.kernel_size == (7, 7)


@functools.cache
def _starts() -> bool:
    """Initialize NNPACK; False if this PyTorch or this CPU does not have it."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT" or not torch._nnpack_available():
        return False
    # in its first call it starts as many threads as PyTorch has now: none
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._nnpack_spatial_convolution(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3), None, 0)
    torch.set_num_threads(threads)
    return True
