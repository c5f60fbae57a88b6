"""Loss scaling for fp16, inside the networks: losses and optimizers see no scaled gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from util.errors import UserError

GROW_AFTER = 2000  # steps in a row with finite gradients
SMALLEST = 2.0**-16


class GradientScale:
    """Dynamic loss scaling: the factor by which gradients are scaled inside fp16 networks.

    Many gradients underflow in fp16 (Micikevicius et al. 2018, section 3.2). So the gradient at the
    output of a network is multiplied by the factor, and the gradients at its inputs and weights are
    divided by it. The factor is a power of two, so this is exact.

    This is for networks of known layers (`has_known_layers`): others may keep tensors from one call
    to the next, or use weights that are not their parameters, and such tensors would not be scaled.
    """

    def __init__(self, factor: float = 2.0**16):
        self.factor = factor
        self.growth_tracker = 0
        self.inside = False  # whether a scaled network is running

    def call(
        self, net: nn.Module, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """`function(*args, **kwargs)`, which runs the network, with scaled gradients inside."""
        if self.inside:  # the network is part of another one
            return function(*args, **kwargs)
        factor = self.factor

        def enter(x: Any) -> Any:
            wanted = torch.is_tensor(x) and x.requires_grad
            return _ScaleGradient.apply(x, 1 / factor) if wanted else x

        def leave(x: Any) -> Any:
            if not torch.is_tensor(x) or x.grad_fn is None:
                return x
            # a copy, since the output of a custom function can't be changed in place
            return _ScaleGradient.apply(x, factor).clone()

        owners = [(m, name, p) for m in net.modules() for name, p in m._parameters.items()]
        entered = {p: enter(p) for _, _, p in owners if p is not None}
        args, kwargs = tree_map(enter, (args, kwargs))
        self.inside = True
        try:
            for module, name, p in owners:
                if p is not None:
                    module._parameters[name] = entered[p]
            result = function(*args, **kwargs)
        finally:
            self.inside = False
            for module, name, p in owners:
                module._parameters[name] = p
        return tree_map(leave, result)

    def update(self, finite: bool) -> None:
        """Halve the factor if gradients were not finite; double it after 2000 finite steps.

        Raises UserError if the factor becomes too small.
        """
        self.growth_tracker = self.growth_tracker + 1 if finite else 0
        if not finite:
            self.factor /= 2
        elif self.growth_tracker == GROW_AFTER:
            self.factor, self.growth_tracker = self.factor * 2, 0
        if self.factor < SMALLEST:
            raise UserError(
                "--precision fp16: gradients are not finite at any scale; numbers in the networks "
                "are too large for fp16: go on from the last save with --precision bf16 or fp32"
            )

    def state_dict(self) -> dict[str, Any]:
        """Factor and counter, under the names that `torch.amp.GradScaler` gives them."""
        return {"scale": self.factor, "_growth_tracker": self.growth_tracker}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.factor, self.growth_tracker = state["scale"], state["_growth_tracker"]

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientScale:
        return self  # copies of a network share the factor


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return _Scale.apply(grad, ctx.factor), None


class _Scale(torch.autograd.Function):
    """Multiplies by a factor, but does not scale its own gradient.

    So the gradients of a double backward have the same factor inside the network as others.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, None
