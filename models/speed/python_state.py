"""What Python may read in an iteration, in a form to compare, and what it does read.

For recordings (`iterations.py`): if anything here has changed, Python might act differently than it
did. Objects in attributes are kept and compared by identity, since a new object may get the id of
one that is gone. Layers, which the recorder keeps, are compared by id; weights and moments by their
address, from which a replay reads.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from models.losses import GradientPenalty
from util.image_pool import ImagePool
from util.temporarily import temporarily

from .inspection import has_hooks
from .steps import Steps, parameters_of

PLAIN = (bool, int, float, str, type(None))
DEPTH = 3  # of nested objects
MAX_ITEMS, MAX_BYTES = 1000, 2**20  # the largest object and array to compare by content
# their contents are compared elsewhere, or change by design
OPAQUE = (nn.Module, torch.optim.Optimizer, Steps, type, FunctionType, MethodType, ModuleType)
_ADVANCING = (ImagePool, GradientPenalty)
_GENERATORS: dict[type, Any] = {
    random.Random: random.Random.getstate,
    np.random.RandomState: lambda x: repr(x.get_state()),
    np.random.Generator: lambda x: repr(x.bit_generator.state),
    torch.Generator: lambda x: x.get_state().numpy().tobytes(),
}
# attributes of layers that are compared separately, or that `Prepared` changes with what learns
_ELSEWHERE = {"_parameters", "_buffers", "_modules", "prepared_augment", "prepared_trained"}
_ELSEWHERE |= {"prepared_layers", "module"}


class ByIdentity:
    """A reference to an object, equal only to references to the same one."""

    __slots__ = ("object",)

    def __init__(self, object: Any):
        self.object = object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.object is self.object

    __hash__ = None  # type: ignore[assignment]


class State(NamedTuple):
    """What an iteration may depend on besides its batch."""

    attributes: dict[str, Any]
    layers: list[tuple]
    optimizers: list[tuple]

    def difference(self, other: State) -> str:
        """What differs, in words; empty if nothing does."""
        names = sorted(self.attributes.keys() | other.attributes.keys())
        for name in names:
            if self.attributes.get(name, self) != other.attributes.get(name, other):
                return f"the attribute {name}"
        if self.layers != other.layers:
            return "a layer or weight"
        return "an optimizer" if self.optimizers != other.optimizers else ""


def values_of(x: Any, device: torch.device, depth: int = DEPTH) -> Any:
    """A plain value as it is; for other objects, their identity and content.

    For tensors on another device than the model's, also the version: a captured kernel keeps the
    value that a number on the CPU had at its launch.
    """
    if isinstance(x, PLAIN):
        return x
    if isinstance(x, torch.Tensor):
        elsewhere = x.device.type != device.type
        return ByIdentity(x), x.data_ptr(), x.requires_grad, x._version if elsewhere else 0
    if type(x) in _GENERATORS:
        return _GENERATORS[type(x)](x)
    if hasattr(type(x), "__next__") or isinstance(x, random.SystemRandom):
        return object()  # equal to nothing: its state is unknown, and advances
    if not depth or isinstance(x, OPAQUE):
        return ByIdentity(x)
    if isinstance(x, _ADVANCING):
        return ByIdentity(x), [v for v in vars(x).values() if isinstance(v, PLAIN)]
    inside = x if isinstance(x, (dict, list, tuple, set, deque)) else getattr(x, "__dict__", {})
    if getattr(x, "nbytes", 0) > MAX_BYTES or len(inside) > MAX_ITEMS:
        return object()  # equal to nothing: to compare it would take as long as an iteration
    if isinstance(x, np.ndarray):
        return ByIdentity(x), x.tobytes()
    if isinstance(inside, dict):
        values = [(key, values_of(v, device, depth - 1)) for key, v in inside.items()]
    else:
        values = [values_of(v, device, depth - 1) for v in inside]
    return values if isinstance(x, tuple) else (ByIdentity(x), values)


def state_of_layer(layer: nn.Module, device: torch.device) -> tuple:
    """A layer's attributes, its own layers, and the addresses of its tensors."""
    weights = [(p.data_ptr(), p.requires_grad) for p in layer._parameters.values() if p is not None]
    buffers = [
        (b.data_ptr(), b._version if b.device.type != device.type else 0)
        for b in layer._buffers.values()
        if b is not None
    ]
    if type(layer).__module__.startswith("torch."):
        own: list[Any] = [x for x in vars(layer).values() if isinstance(x, PLAIN)]
    else:
        named = vars(layer).items()
        own = [
            values_of(x, device, 2) for n, x in named if n not in _ELSEWHERE and not _is_empty(x)
        ]
    return own, [*map(id, layer._modules.values())], weights, buffers


def _is_empty(x: Any) -> bool:
    return isinstance(x, dict) and not x


def state_of_optimizer(optimizer: torch.optim.Optimizer) -> tuple:
    """An optimizer's settings, weights, missing gradients, addresses of moments, and hooks."""
    groups = [{**group, "params": [*map(id, group["params"])]} for group in optimizer.param_groups]
    missing = [p.grad is None for p in parameters_of(optimizer)]
    moments = (x for of_weight in optimizer.state.values() for x in of_weight.values())
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    places = [x.data_ptr() for x in moments if torch.is_tensor(x)]
    return groups, missing, places, hooks, ByIdentity(vars(optimizer).get("step"))


def hooked(nets: Iterable[nn.Module], tensors: Iterable[torch.Tensor]) -> str:
    """Which of these have hooks, in words; empty if none has."""
    if any(has_hooks(net) for net in nets):
        return "a network has hooks"
    kinds = "_backward_hooks", "_post_accumulate_grad_hooks"
    found = any(getattr(t, kind, None) for t in tensors for kind in kinds)
    return "weights have hooks" if found else ""


class Watch:
    """Notes which attributes a model sets, and which of `passing` it reads.

    Those may differ in each iteration, so it may read them only after it has set them.
    """

    def __init__(self, passing: set[str]):
        self.passing, self.read, self.set = set(passing), set(), set()

    @contextlib.contextmanager
    def over(self, model: Any) -> Iterator[None]:
        """Context manager: the model's class is a subclass that notes this."""
        kind, watch = type(model), self

        class Watched(kind):
            def __getattribute__(self, name: str) -> Any:
                if name in watch.passing:
                    watch.read.add(name)
                return super().__getattribute__(name)

            def __setattr__(self, name: str, value: Any) -> None:
                watch.passing.discard(name)
                watch.set.add(name)
                super().__setattr__(name, value)

        with temporarily(model, __class__=Watched):
            yield

    def reason(self, known: set[str]) -> str:
        """Why an iteration that sets `known` can't be recorded; empty if it can."""
        if self.read:
            return f"it reads {min(self.read)}, which may differ in each iteration"
        missing = known - self.set
        return f"not every iteration sets {min(missing)}" if missing else ""
