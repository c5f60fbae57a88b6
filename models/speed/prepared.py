"""Networks that compute in other ways than they say, and are the same in all else."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map

from .gradient_scale import GradientScale
from .layout import contiguous_gradient

_full_precision = False


class Prepared(nn.Module):
    """What is put in front of the class of a network: see `prepared`."""

    autocast_to: tuple[str, torch.dtype] | None = None  # kind of device, type of numbers
    gradient_scale: GradientScale | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outside of what is compiled: scales gradients, and hands out what was computed before."""
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        if not kwargs and len(args) == 1:
            result = _take(self, args[0])
            if result is not None:
                return result
        # Where an input asks for its gradient this is most likely a gradient penalty. Gradients of
        # gradients need all the digits, and compiled networks do not have them. And a hook may
        # carry tensors out of a network past its outputs, where gradients are not scaled.
        scaled = self.gradient_scale is not None
        if _wants_input_gradients((args, kwargs)) or (scaled and has_hooks(self)):
            with full_precision():
                return self._call_impl(*args, **kwargs)
        if self.gradient_scale is None:
            return super().__call__(*args, **kwargs)
        return self.gradient_scale.call(self, super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In autocast, and with float32 results."""
        scale = self.gradient_scale
        # `net.forward(x)` does not go through `__call__`, where gradients are scaled
        unscaled = scale is not None and not scale.inside and torch.is_grad_enabled()
        if self.autocast_to is None or _full_precision or unscaled:
            return super().forward(*args, **kwargs)
        kind, dtype = self.autocast_to
        with torch.autocast(kind, dtype):
            return tree_map(_in_float32, super().forward(*args, **kwargs))


class _InProcesses(Prepared):
    """With several processes: answers to `.module` as a `DataParallel` around it would."""

    @property
    def module(self) -> nn.Module:
        return self


def prepared(net: nn.Module, with_module: bool = False) -> nn.Module:
    """Give a network, in place, a subclass of its class that goes by the same name.

    A copy of it keeps the subclass, and computes with its own weights. Scripted networks stay as
    they are. `with_module` makes `net.module` the network itself.
    """
    parent = type(net)
    if not isinstance(net, (Prepared, torch.jit.ScriptModule)):
        mixin = _InProcesses if with_module and not hasattr(net, "module") else Prepared
        net.__class__ = _subclass(mixin, parent)
    return net


@functools.cache
def _subclass(mixin: type[Prepared], parent: type[nn.Module]) -> type[nn.Module]:
    names = {n: getattr(parent, n) for n in ("__module__", "__qualname__", "__doc__")}
    return type(parent.__name__, (mixin, parent), names)


def has_hooks(net: nn.Module) -> bool:
    """Whether a network has hooks of a model's own, which see what goes on inside."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    hooks = (h for m in net.modules() for kind in kinds for h in getattr(m, kind).values())
    # those of torch make weights: spectral norm and the like
    return any(h is not contiguous_gradient and not _is_of_torch(h) for h in hooks)


def _is_of_torch(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, prepared networks compute in float32."""
    global _full_precision
    before, _full_precision = _full_precision, True
    try:
        yield
    finally:
        _full_precision = before


def _wants_input_gradients(inputs: Any) -> bool:
    """Whether an input is a leaf of the graph that asks for its own gradient."""
    return any(torch.is_tensor(x) and x.requires_grad and x.is_leaf for x in tree_leaves(inputs))


def _in_float32(x: Any) -> Any:
    half = torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half else x


# --------------------------------------------------------------------------------- shared passes
class _Part(NamedTuple):
    """What a pass over several inputs gave for one of them."""

    input: torch.Tensor
    versions: tuple[int, int]  # of the input and of the weights
    result: torch.Tensor


_parts: weakref.WeakKeyDictionary[nn.Module, list[_Part]] = weakref.WeakKeyDictionary()


def share_pass(net: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Run a network over inputs (N, C, H, W) as one larger batch.

    `net(x)` then gives x its part, once, as long as neither x nor the weights have changed.
    """
    _forget_at_steps()
    _parts.pop(prepared(net), None)
    results, weights = net(torch.cat(list(inputs))), _version(net)
    starts = itertools.accumulate((len(x) for x in inputs), initial=0)
    # not `split`: what that gives can't be changed in place
    _parts[net] = [
        _Part(x, (x._version, weights), results.narrow(0, start, len(x)))
        for x, start in zip(inputs, starts, strict=False)
    ]


def forget_passes() -> None:
    """Drop what was computed and not asked for."""
    _parts.clear()


@functools.cache
def _forget_at_steps() -> None:
    # fused optimizers change weights without a new version
    register_optimizer_step_post_hook(lambda *_: forget_passes())


def _take(net: nn.Module, x: Any) -> torch.Tensor | None:
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
