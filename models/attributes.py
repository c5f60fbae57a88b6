"""Finds the modules, optimizers and tensors that the attributes of a model hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def held(values: Any, kind: type[T], name: str = "", depth: int = 3) -> Iterator[tuple[str, T]]:
    """Objects of a class in nested dictionaries, lists and tuples, with names such as `nets.0`."""
    if isinstance(values, kind):
        yield name, values
    elif isinstance(values, (dict, list, tuple)) and depth:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from held(value, kind, f"{name}.{key}" if name else str(key), depth - 1)


def tensors(net: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module."""
    return [*net.parameters(), *net.buffers()]


def unnamed_modules(model: Any) -> dict[str, nn.Module]:
    """Modules with parameters that no network of `model_names` has."""
    named = {p for net in model.networks().values() for p in net.parameters()}
    modules = model.all_modules().items()
    return {n: net for n, net in modules if any(p not in named for p in net.parameters())}


def loose_tensors(model: Any) -> list[torch.Tensor]:
    """Tensors that an optimizer trains and no module holds."""
    of_modules = {t for net in model.all_modules().values() for t in tensors(net)}
    optimizers = model.all_optimizers()
    trained = (p for o in optimizers for group in o.param_groups for p in group["params"])
    return list(dict.fromkeys(p for p in trained if p not in of_modules))


def stateful_parts(model: Any) -> dict[str, Any]:
    """Attributes with a `state_dict` that are neither modules nor optimizers: image pools, ..."""
    others = (nn.Module, torch.optim.Optimizer)
    return {
        name: part
        for name, part in vars(model).items()
        if hasattr(part, "load_state_dict") and not isinstance(part, others)
    }
