"""Gradient checkpointing: less memory, more time (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, whose activations are not kept but computed again in the backward pass.

    Norms with running statistics count a batch once.
    """

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _WithoutCounting(block)

    # what the compiler computes again has no such effects
    more = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    return checkpoint(block, x, use_reentrant=False, **more)


class _WithoutCounting:
    """Keeps the running statistics of norms as they are; entered in each backward pass."""

    def __init__(self, block: nn.Module):
        kind = nn.modules.batchnorm._NormBase
        self.norms = [m for m in block.modules() if isinstance(m, kind)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
