"""Layers that keep images in channels-last layout, (N, H, W, C) in memory.

GPUs convolve in this layout, and cuDNN copies images in (N, C, H, W) to it and back. PyTorch's
instance norms and reflection paddings do the opposite; these do neither.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .inspection import has_hooks, is_traced
from .instance_norm import INSTANCE_NORMS, InstanceNorm2d
from .layout import contiguous_gradient


class LayoutKeepingInstanceNorm(InstanceNorm2d):
    """An instance norm in channels-last layout, for compiled networks and for `kernels`.

    PyTorch's own is a batch norm over a view (1, N*C, H, W): it copies its input to NCHW, and its
    gradients are contiguous, so each convolution that receives them makes a copy.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> the same shape and type, computed in float32."""
        if torch.compiler.is_compiling():
            x = input.float()
            variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
            return ((x - mean) * torch.rsqrt(variance + self.eps)).to(input.dtype)
        if kernels := _kernels_for(input):
            return kernels.normalize(input, 1.0, self.eps)
        output = super().forward(input)
        if not input.is_cuda:  # the network has moved, and its weights have kept their layout
            contiguous_gradient(self, (input,), output)
        return output


class LayoutKeepingReflectionPad2d(nn.ReflectionPad2d):
    """A reflection padding in channels-last layout, by the same size on all sides."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, C, H + 2 size, W + 2 size)."""
        size = self.padding[0]
        # for images that are too small, PyTorch raises its error
        if size < min(input.shape[2:]) and (kernels := _kernels_for(input)):
            return kernels.reflect(input, size)
        return super().forward(input)


class FusingSequential(nn.Sequential):
    """Layers of which a bias, the instance norm after it and its ReLU are computed as one.

    Not with hooks, which see the outputs of single layers, nor where the layers are called one by
    one.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Call all layers in order."""
        kernels = _kernels_for(input)
        # others may have given a layer a `forward` of its own, as tiles do for norms
        if not kernels or has_hooks(self) or any("forward" in vars(layer) for layer in self):
            return super().forward(input)
        x, bias, layers = input, None, [*self, None, None]
        while (layer := layers.pop(0)) is not None:
            if type(layer) is LayoutKeepingInstanceNorm:
                slope = _slope(layers[0])
                x, bias = kernels.normalize(x, slope, layer.eps, bias), None
                if slope != 1:
                    layers.pop(0)
            elif type(layers[0]) is LayoutKeepingInstanceNorm and _is_plain(layer):
                x, bias = _convolve(layer, x), layer.bias
            else:
                x = layer(x)
        return x


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution whose weights no hook computes, as for spectral norm."""
    return type(layer) in (nn.Conv2d, nn.ConvTranspose2d) and not layer._forward_pre_hooks


def _convolve(layer: nn.Conv2d | nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """A convolution without its bias."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, layer.weight, None)
    sizes = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    return F.conv_transpose2d(x, layer.weight, None, *sizes)


def _slope(layer: nn.Module | None) -> float:
    """The slope of a ReLU or leaky ReLU for negative values; 1 for anything else."""
    if type(layer) is nn.LeakyReLU:
        return layer.negative_slope  # type: ignore[union-attr]
    return 0.0 if type(layer) is nn.ReLU else 1.0


def _kernels_for(x: Any) -> ModuleType | None:
    """The module `kernels`, if it can compute this: eagerly, on a GPU."""
    if not torch.is_tensor(x):  # layers of others may pass on several
        return None
    # torch.func needs more of a function than they have
    if is_traced() or not x.is_cuda or torch._C._are_functorch_transforms_active():
        return None
    fits = x.dim() == 4 and x.numel() > 0 and x.dtype != torch.float64
    return working_kernels(x.device) if fits else None


@functools.cache
def working_kernels(device: torch.device) -> ModuleType | None:
    """The module `kernels`, if it works on a device, for which Triton needs a C compiler."""
    if device.type != "cuda":
        return None
    try:
        from . import kernels

        return kernels if _are_right(kernels, device) else None
    except Exception:  # the compiler, and the tools that it calls, may raise anything
        return None


@torch.inference_mode(False)
@torch.enable_grad()
def _are_right(kernels: ModuleType, device: torch.device) -> bool:
    """Whether the kernels give values and gradients of PyTorch's layers, for one small image."""
    # no random numbers, which training would then draw differently
    exact = torch.arange(4 * 40 * 40, dtype=torch.float64).sin().view(1, 4, 40, 40).requires_grad_()
    x = exact.detach().to(device, torch.float32).requires_grad_()
    known = F.relu(F.instance_norm(F.pad(exact, (1, 1, 1, 1), "reflect")))
    found = kernels.normalize(kernels.reflect(x, 1), 0.0, 1e-5)
    known.pow(3).sum().backward()
    found.pow(3).sum().backward()
    pairs = (found, known), (x.grad, exact.grad)
    return all(torch.allclose(a.cpu().double(), b, 1e-3, 1e-3) for a, b in pairs)


def keep_layout(net: nn.Module, compiled: bool) -> None:
    """Make the instance norms of a network keep its memory layout, in place.

    Only those without weights and running statistics, which are all that `networks.py` makes. Where
    no compiler does it, also paddings, and norms with their ReLUs.
    """
    for module in net.modules():
        kind = type(module)
        if kind in INSTANCE_NORMS and not (module.affine or module.track_running_stats):
            module.__class__ = LayoutKeepingInstanceNorm
        elif not compiled and kind is nn.ReflectionPad2d and len(set(module.padding)) == 1:
            module.__class__ = LayoutKeepingReflectionPad2d
        elif not compiled and kind is nn.Sequential:
            module.__class__ = FusingSequential
