"""Gradient checkpointing: less memory, more time (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, whose activations are not kept but recomputed in the backward pass.

    Side effects of a pass, such as updates of running statistics, happen once.
    """

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _BuffersOf(block)

    # where the compiler recomputes, there are no such effects
    more = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    return checkpoint(block, x, use_reentrant=False, **more)


class _BuffersOf:
    """Context manager: the buffers of a block have the values from when this object was made.

    It is entered in each backward pass. Copies replace the buffers, so recomputing changes none.
    """

    def __init__(self, block: nn.Module):
        self.slots: list[tuple[dict[str, Any], str, Any]] = [
            (m._buffers, name, _copy(value))
            for m in block.modules()
            for name, value in m._buffers.items()
        ]

    def __enter__(self) -> None:
        self.after = [buffers[name] for buffers, name, _ in self.slots]
        for buffers, name, before in self.slots:
            buffers[name] = _copy(before)

    def __exit__(self, *_: object) -> None:
        for (buffers, name, _), value in zip(self.slots, self.after, strict=True):
            buffers[name] = value


def _copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return None if buffer is None else buffer.detach().clone()
