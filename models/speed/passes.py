"""One pass of a network over several inputs: whether results are the same, and whether it pays."""

from __future__ import annotations

import argparse
import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map

from .inspection import has_hooks, has_known_layers, independent_of_batch

SHARING_PAYS_ON_CPU = 96 * 96  # pixels per image; with fewer, shared passes save no time


def should_batch(opt: argparse.Namespace, pictures: torch.Tensor) -> bool:
    """Whether `--batch_passes` shares passes over images (N, C, H, W).

    `auto` shares them on a GPU, which one image does not keep busy, and on a CPU for ResNets if
    images are not small. It does not for U-Nets on a CPU: instance norm over the few pixels of
    the innermost maps amplifies rounding errors, so that results differ after a few steps.
    """
    if opt.batch_passes != "auto":
        return opt.batch_passes == "on"
    pays = "resnet" in opt.netG and pictures.shape[-2:].numel() >= SHARING_PAYS_ON_CPU
    return pays or pictures.device.type == "cuda"


def can_batch(net: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether one pass over all the inputs (N, C, H, W) gives the same as one pass for each.

    A layer written elsewhere may mix the images of a batch. And with hooks, or weights computed
    in each pass (spectral norm), it matters how often a network is called.
    """
    own_weights = any(m._forward_pre_hooks or hasattr(m, "parametrizations") for m in net.modules())
    alike = all(x.shape[1:] == inputs[0].shape[1:] for x in inputs)
    if not (has_known_layers(net) and alike and independent_of_batch(net)):
        return False
    return not (own_weights or has_hooks(net))


class _Part(NamedTuple):
    """The result of a shared pass for one of its inputs."""

    input: torch.Tensor
    versions: tuple[int, int]  # of the input and of the weights
    result: Any


_parts: weakref.WeakKeyDictionary[nn.Module, list[_Part]] = weakref.WeakKeyDictionary()


def share_pass(net: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Run a prepared network on inputs (N, C, H, W) as one larger batch.

    `net(x)` then returns the result for x, once, unless x or the weights have changed in between.
    """
    _forget_at_steps()
    _parts.pop(net, None)
    results, weights = net(torch.cat(list(inputs))), _version(net)
    starts = itertools.accumulate((len(x) for x in inputs), initial=0)
    # not `split`, whose views can't be changed in place
    _parts[net] = [
        _Part(x, (x._version, weights), _rows(results, start, len(x)))
        for x, start in zip(inputs, starts, strict=False)
    ]


def _rows(results: Any, start: int, length: int) -> Any:
    return tree_map(lambda result: result.narrow(0, start, length), results)


def forget_passes() -> None:
    """Drop results that were not used."""
    _parts.clear()


@functools.cache
def _forget_at_steps() -> None:
    # fused optimizers change weights without increasing their version
    register_optimizer_step_post_hook(lambda *_: forget_passes())


def pop_result(net: nn.Module, x: Any) -> Any:
    """The result for x of a shared pass, which is then dropped; None if there is none."""
    parts = _parts.get(net)
    if not parts:
        return None
    found = next((part for part in parts if part.input is x), None)
    if found is None:
        return None
    parts.remove(found)
    return found.result if found.versions == (x._version, _version(net)) else None


def _version(net: nn.Module) -> int:
    return sum(p._version for p in net.parameters())
