"""Workaround for a bug in PyTorch: wrong gradients of instance norm on the CPU.

For a batch of one picture, the backward pass reads a gradient in channels-last layout as if it were
contiguous, without an error (PyTorch 2.14; batch norm and larger batches are right). Such gradients
come from `--channels_last`, and from losses on features as rows of channels (CUT, DCLGAN).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def contiguous_gradient(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    # of the tensor, not a function around it: what follows may change the output in place. A
    # compiled norm is right by itself, and a hook would break its graph.
    if output.requires_grad and not torch.compiler.is_compiling():
        output.register_hook(torch.Tensor.contiguous)


def contiguous_gradients(nets: Iterable[nn.Module]) -> None:
    """Make gradients of the instance norms of these networks contiguous; on the CPU only."""
    for net in nets:
        for module in net.modules():
            needed = isinstance(module, nn.InstanceNorm2d) and contiguous_gradient not in (
                module._forward_hooks.values()
            )
            if needed and next(net.parameters()).device.type == "cpu":
                module.register_forward_hook(contiguous_gradient)
