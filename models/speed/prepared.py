"""Adds autocast, loss scaling, shared passes and augmentation to a network, in place.

The network's class is replaced by a subclass that has them.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from util.temporarily import temporarily

from .gradient_scale import GradientScale
from .inspection import has_hooks
from .passes import pop_result

_full_precision = False
_uncompiled = False


class Prepared(nn.Module):
    """The mixin that `prepared` puts in front of the class of a network."""

    # long names, which will not clash with a network's own attributes
    prepared_autocast: tuple[str, torch.dtype] | None = None  # device type, dtype
    prepared_scale: GradientScale | None = None
    prepared_augment: Callable[..., torch.Tensor] | None = None  # of the input, in float32
    prepared_layers: list[nn.Module] | None = None  # all modules of a compiled network
    prepared_trained: str = ""  # one digit per parameter of these: 1 if it learns, else 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a shared pass, or call the network with loss scaling."""
        learns = torch.is_grad_enabled()
        if learns and not kwargs and len(args) == 1:
            result = pop_result(self, args[0])
            if result is not None:
                return result
        penalized = learns and _wants_input_gradients((args, kwargs))
        if self.prepared_augment is not None:
            args, kwargs = (self.prepared_augment(*args, *kwargs.values()),), {}
        scale = self.prepared_scale if learns else None
        # Hooks may take tensors out of a network where their gradients are not scaled. And a
        # compiled network looks for hooks only once, or never if another one has the same code.
        hooked = (scale is not None or self._compiled_call_impl is not None) and has_hooks(self)
        eager = penalized or hooked or (_uncompiled and not learns)
        call = self._call_impl if eager else super().__call__
        if self._compiled_call_impl is not None and not eager:
            self._tell_compiler_what_learns()
        # An input that requires a gradient most likely means a gradient penalty. Gradients of
        # gradients need full precision, and compiled networks can't compute them.
        if penalized or (hooked and scale is not None):
            with full_precision():
                return call(*args, **kwargs)
        if scale is None:
            return call(*args, **kwargs)
        return scale.call(self, call, args, kwargs)

    def _tell_compiler_what_learns(self) -> None:
        # PyTorch (at least up to 2.11) uses the code compiled for a frozen network for one that
        # learns, whose weights then get no gradients. So `forward` reads `prepared_trained`, of
        # which each value gets code of its own.
        if self.prepared_layers is None:  # to list them in each call would take long
            self.prepared_layers = list(self.modules())
        parameters = (p for m in self.prepared_layers for p in m._parameters.values())
        trained = "".join("1" if p.requires_grad else "0" for p in parameters if p is not None)
        if trained != self.prepared_trained:
            self.prepared_trained = trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute in autocast, and return float32."""
        assert self.prepared_trained != "?"  # so that compiled code depends on it
        scale = self.prepared_scale
        # `net.forward(x)` does not go through `__call__`, where gradients are scaled
        unscaled = scale is not None and not scale.inside and torch.is_grad_enabled()
        if self.prepared_autocast is None or _full_precision or unscaled:
            return super().forward(*args, **kwargs)
        kind, dtype = self.prepared_autocast
        with torch.autocast(kind, dtype):
            return tree_map(_in_float32, super().forward(*args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        ours = Prepared.__annotations__
        return {name: x for name, x in state.items() if name not in ours and x is not self}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle with the original class, for `torch.save(net)`: this class is in no module."""
        ours, (_, parent) = type(self), type(self).__bases__
        make, args, *state = super().__reduce_ex__(1)  # from 2 on, pickle refuses another class
        make, *args = (parent if x is ours else x for x in (make, *args))
        return make, tuple(args), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies are prepared as well."""
        _, parent = type(self).__bases__
        with temporarily(self, __class__=parent):
            copied = copy.deepcopy(self, memo)
        copied.__class__ = _subclass(type(copied))  # type: ignore[arg-type]
        return copied


def prepared(net: nn.Module, with_module: bool = False) -> nn.Module:
    """Change the class of a network in place to a subclass of the same name with `Prepared`.

    Does nothing for scripted networks. `with_module` makes `net.module` the network itself, for
    code that expects a `DataParallel`.
    """
    if not isinstance(net, (Prepared, torch.jit.ScriptModule)):
        net.__class__ = _subclass(type(net))
        if with_module and not hasattr(net, "module"):
            net.__dict__["module"] = net  # not as a submodule
    return net


@functools.cache
def _subclass(parent: type[nn.Module]) -> type[nn.Module]:
    names = {n: getattr(parent, n) for n in ("__module__", "__qualname__", "__doc__")}
    return type(parent.__name__, (Prepared, parent), names)


def full_precision() -> AbstractContextManager[None]:
    """Context manager: prepared networks compute in float32."""
    return temporarily(sys.modules[__name__], _full_precision=True)


def uncompiled() -> AbstractContextManager[None]:
    """Context manager: networks that do not learn run eagerly.

    Compiling once more for a few images takes a minute or two, more than it saves.
    """
    return temporarily(sys.modules[__name__], _uncompiled=True)


def _wants_input_gradients(inputs: Any) -> bool:
    """Whether an input is a leaf that requires a gradient."""
    return any(torch.is_tensor(x) and x.requires_grad and x.is_leaf for x in tree_leaves(inputs))


def _in_float32(x: Any) -> Any:
    half = torch.is_tensor(x) and x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half else x
