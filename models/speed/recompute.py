"""Gradient checkpointing: less memory, more time (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, whose activations are not kept but computed again in the backward pass.

    Batch norms count a batch once.
    """

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _without_counting(block)

    # what the compiler computes again has no such effects
    more = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    return checkpoint(block, x, use_reentrant=False, **more)


@contextlib.contextmanager
def _without_counting(block: nn.Module) -> Iterator[None]:
    """Within, batch norms leave their running statistics as they are."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
