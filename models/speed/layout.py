"""A way around a fault of PyTorch: wrong gradients of instance norm on the CPU.

For a batch of one picture its backward pass takes a gradient in channels-last memory for one in the
usual order, and nothing says so (PyTorch 2.14; batch norm and larger batches are right). Such
gradients come from `--channels_last`, and where features are compared as rows of channels (CUT,
DCLGAN).
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
    """Give the instance norms of these networks gradients in the memory order that is right.

    On devices other than the CPU nothing changes.
    """
    for net in nets:
        for module in net.modules():
            usual = isinstance(module, nn.InstanceNorm2d) and contiguous_gradient not in (
                module._forward_hooks.values()
            )
            if usual and next(net.parameters()).device.type == "cpu":
                module.register_forward_hook(contiguous_gradient)
