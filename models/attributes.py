"""Finds the modules, optimizers and tensors that the attributes of a model hold."""

from __future__ import annotations

import argparse
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import nn

from .schedulers import MeanLoss
from .speed.gradient_scale import GradientScale
from .speed.steps import Steps

T = TypeVar("T")

# classes whose instances are not searched: their attributes are not the model's
_OPAQUE = (
    argparse.Namespace,
    nn.Module,
    torch.Tensor,
    torch.optim.Optimizer,
    Steps,
    GradientScale,
    MeanLoss,
    dict,
    list,
    tuple,
    type,
    ModuleType,
    FunctionType,
)


_SIMPLE = (bool, int, float, str, type(None))
_OF_BATCH = "image_paths"  # which `set_input` sets


def find_all(values: Any, kind: type[T], name: str = "", depth: int = 3) -> Iterator[tuple[str, T]]:
    """Yield the objects of a class in nested dictionaries, lists and plain objects.

    Their names are like `nets.0`.
    """
    if isinstance(values, kind):
        yield name, values
        return
    for key, value in _parts(values, name) if depth else ():
        yield from find_all(value, kind, key, depth - 1)


def _parts(values: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a dictionary, a list or a plain object holds, by name, but for numbers and text."""
    if hasattr(values, "__dict__") and not isinstance(values, _OPAQUE):
        values = dict(vars(values))
    if isinstance(values, (dict, list, tuple, deque)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            if type(value) not in _SIMPLE:  # a history may have a million
                yield f"{name}.{key}" if name else str(key), value


def tensors(net: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module."""
    return [*net.parameters(), *net.buffers()]


def unlisted_modules(model: Any) -> dict[str, nn.Module]:
    """Modules with state that belongs to no network in `model_names`."""

    def state(net: nn.Module) -> dict[int, Any]:
        return {id(value): value for value in net.state_dict(keep_vars=True).values()}

    named: dict[int, Any] = {}
    for net in model.networks().values():
        named |= state(net)
    modules = model.all_modules()
    return {name: net for name, net in modules.items() if state(net).keys() - named.keys()}


def orphan_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Tensors that an optimizer trains but no module holds, by their index among all trained."""
    of_modules = {t for net in model.all_modules().values() for t in tensors(net)}
    stepped = enumerate(model.stepped_tensors())
    return {str(i): p.detach() for i, p in stepped if p not in of_modules}


def plain_places(model: Any) -> dict[str, tuple[Any, str]]:
    """Where a model holds plain values: (object, attribute) by name.

    These are numbers, text, None, NumPy's numbers and arrays, and lists, tuples and dictionaries of
    these and of tensors in attributes of the model, of its options, of its layers and of its plain
    objects, such as an iteration counter, `training` or the images of a replay buffer, and
    `requires_grad` of each weight.
    """
    # not objects of other libraries: they would not survive numbers of another process
    packages = type(model).__module__.partition(".")[0], "util"
    owners, found = [("", model), ("opt", model.opt), *_plain_objects(vars(model), packages)], {}
    for name, net in model.all_modules().items():
        owners += net.named_modules(prefix=name)
        for key, p in net.named_parameters(prefix=name):
            found[f"{key}.requires_grad"] = p, "requires_grad"
    for name, owner in owners:
        own = vars(owner).items()
        if isinstance(owner, nn.Module):  # which has buffers and weights in dictionaries
            own = [(key, x) for key, x in own if not isinstance(x, dict)]
        plain = [key for key, x in own if key != _OF_BATCH and _is_plain(x)]
        found |= {f"{name}.{key}".removeprefix("."): (owner, key) for key in plain}
    return found


def _plain_objects(
    values: Any, packages: tuple[str, ...], name: str = "", depth: int = 3
) -> Iterator[tuple[str, Any]]:
    """Yield objects whose classes are from these packages and have no `state_dict`."""
    for key, value in _parts(values, name) if depth else ():
        if not isinstance(value, Stateful):
            own = type(value).__module__.partition(".")[0] in packages
            if own and hasattr(value, "__dict__") and not isinstance(value, _OPAQUE):
                yield key, value
            yield from _plain_objects(value, packages, key, depth - 1)


def _is_plain(x: Any, depth: int = 0) -> bool:
    """Whether a value is one that `plain_places` lists; containers may be nested.

    The depth is bounded, since a list may hold itself, and suffices for a list of optimizers' state
    dictionaries. A tensor that requires gradients is the result of an iteration, so it does not
    count. A checkpoint with other classes, such as the keys of an Enum, could not be read; nor
    could one with empty arrays.
    """
    if type(x) in _SIMPLE:
        return True
    if type(x) is torch.Tensor:
        return depth > 0 and not x.requires_grad
    if isinstance(x, np.generic) or type(x) is np.ndarray:
        return x.dtype.kind in "biuf" and x.size > 0
    filled_again = isinstance(x, (dict, list, deque)) and not depth  # a Counter, for example
    if depth > 8 or not (filled_again or type(x) in (dict, OrderedDict, list, tuple)):
        return False
    keys, items = (x.keys(), x.values()) if isinstance(x, dict) else ((), x)
    return all(map(_is_plain, keys)) and all(_is_plain(item, depth + 1) for item in items)


def plain_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Tensors that only plain attributes hold, such as a queue.

    Leaves out those of modules, optimizers and `stateful_parts`, which are saved separately.
    """
    parts = (getattr(part, "__dict__", {}) for part in stateful_parts(model).values())
    of_parts = (x for own in parts for _, x in find_all(own, torch.Tensor))
    others = {*model.trained_tensors(), *of_parts}
    held = find_all(vars(model), torch.Tensor)
    held = ((name, x) for name, x in held if type(x) in (torch.Tensor, nn.Parameter))
    dense = {name: x.detach() for name, x in held if x.layout is torch.strided and x not in others}
    # not those of `expand`, whose elements share memory
    return {name: x for name, x in dense.items() if 0 not in x.stride()}


@runtime_checkable
class Stateful(Protocol):
    """Anything with state to save."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def stateful_parts(model: Any) -> dict[str, Stateful]:
    """Other attributes with a `state_dict`: image pools, schedules not in `schedulers`, ..."""
    saved_apart = (nn.Module, torch.optim.Optimizer)
    return {
        name: part
        for name, part in find_all(vars(model), Stateful)
        if not isinstance(part, saved_apart)
        and not any(part is s for s in model.schedulers)
        and hasattr(type(part), "state_dict")  # not if the attribute is a class itself
    }


def unwrap(net: nn.Module) -> nn.Module:
    """The network inside a wrapper for several GPUs."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return net.module if isinstance(net, wrappers) else net
