"""What happens to gradients before an optimizer steps, without changes to the code of models.

A model calls `optimizer.zero_grad()`, `loss.backward()` and `optimizer.step()`. With several
processes, `--accumulate`, `--precision fp16` or `--on_nan skip`, gradients have to be reduced,
accumulated or checked between the last two. A global step pre-hook of torch does that; it runs
before the hooks that a model registers itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from util import distributed
from util.errors import UserError
from util.run.finite import all_finite

from .gradient_scale import GradientScale

_active: WeakSet[Steps] = WeakSet()
_registered: Any = None

Sums = dict[torch.Tensor, torch.Tensor]  # of gradients, by parameter


class Steps:
    """The steps of all optimizers of a model.

    `parameters` returns all tensors that the model may train. `inspect`, if set, is called with an
    optimizer that is about to step, and may set gradients to None.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[torch.Tensor]],
        accumulate: int = 1,
        scale: GradientScale | None = None,
    ):
        self.parameters, self.accumulate, self.scale = parameters, accumulate, scale
        self.inspect: Callable[[Optimizer], None] | None = None
        # batches since the last step, and the sums of their gradients, for each optimizer, since
        # two may take turns at a weight
        self.counts: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self.sums: WeakKeyDictionary[Optimizer, Sums] = WeakKeyDictionary()
        self.stepped: set[Optimizer] | None = None  # in this iteration; None if that is unknown
        self._batch_gradients: WeakKeyDictionary[Optimizer, list] = WeakKeyDictionary()
        self._skipped: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._owned: WeakKeyDictionary[Optimizer, bool] = WeakKeyDictionary()
        self._initial: set[torch.Tensor] = set()
        self._used_by: dict[torch.Tensor, Optimizer] = {}  # since the last backward()
        self._watching = False
        self._watched: set[torch.Tensor] = set()
        self._checked: set[torch.Tensor] = set()
        # gradients at the last step
        self._seen: dict[torch.Tensor, ref[torch.Tensor]] = {}
        self._backpropagated: dict[torch.Tensor, tuple[torch.Tensor, int, torch.Tensor | None]] = {}

    def activate(self) -> None:
        """Start to handle optimizer steps, if a mode needs it."""
        several = distributed.world_size() > 1
        if several or self.accumulate > 1 or self.scale is not None or self.inspect is not None:
            global _registered
            if _registered is None:
                _registered = register_optimizer_step_pre_hook(_before_any_step)
                register_optimizer_step_post_hook(_after_any_step)
            _active.add(self)
            self._watching = several or self.accumulate > 1
        if self._watching:
            self._initial = set(self.parameters())
            self._watch(self._initial)

    # ------------------------------------------------------------------------------------ the step
    def owns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer trains parameters of this model."""
        if optimizer not in self._owned:
            known = set(self.parameters())
            self._owned[optimizer] = any(p in known for p in parameters_of(optimizer))
        return self._owned[optimizer]

    def pre_step(self, optimizer: Optimizer, closure: Any) -> None:
        """Accumulate, average over ranks and check the gradients of an optimizer."""
        parameters = parameters_of(optimizer)
        own = [(p, p.grad) for p in parameters if p.grad is not None]
        self._process(optimizer, closure, parameters)
        if self._watching:
            self._seen.update({p: ref(p.grad) for p in parameters if p.grad is not None})
        self._skipped[optimizer] = all(p.grad is None for p in parameters)
        if self.accumulate > 1:
            self._batch_gradients[optimizer] = own

    def post_step(self, optimizer: Optimizer) -> None:
        """Restore the gradients of this batch, which a model may use until it sets them to zero.

        After a step that was not skipped, restore only those shared with another optimizer.
        """
        if optimizer not in self._batch_gradients:
            return
        others = (parameters_of(o) for o in self._skipped if o is not optimizer)
        shared = {p for parameters in others for p in parameters}
        for p, grad in self._batch_gradients.pop(optimizer):
            if self.was_skipped(optimizer) or p in shared:
                p.grad, self._seen[p] = grad, ref(grad)

    def was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the latest step of an optimizer changes no weights, for lack of gradients."""
        return self._skipped.get(optimizer, False)

    def _process(self, optimizer: Optimizer, closure: Any, parameters: list[nn.Parameter]) -> None:
        if closure is not None:
            raise UserError(
                f"{type(optimizer).__name__} is called with a closure, which does not work with "
                f"{self._modes()}: leave that out"
            )
        if self._watching:
            self._check_supported(optimizer, parameters)
            self._check_unchanged(parameters)
        self.counts[optimizer] = count = (self.counts.get(optimizer, 0) + 1) % self.accumulate
        if count:  # more batches are to come before it steps
            # in fp16, gradients that overflow have to stay until the scale is updated
            if self.inspect is not None and self.scale is None:
                self.inspect(optimizer)
            self._accumulate(optimizer, parameters)
            return
        self._take_sums(optimizer, parameters)
        distributed.average_gradients(parameters)
        if self.scale is not None:
            finite = bool(all_finite([p.grad for p in parameters if p.grad is not None]))
            self.scale.update(finite)
            if not finite:
                drop_gradients(parameters)
                return
        if self.inspect is not None:
            self.inspect(optimizer)

    def refuse_scaler(self) -> None:
        """Raise UserError in modes that change what a `torch.amp.GradScaler` has scaled."""
        if modes := self._modes():
            raise UserError(
                f"a torch.amp.GradScaler of the model's own does not go together with {modes}: "
                "make it with enabled=False; --precision fp16 scales losses by itself"
            )

    def _modes(self) -> str:
        modes = {
            "several processes": distributed.world_size() > 1,
            f"--accumulate {self.accumulate}": self.accumulate > 1,
            "--precision fp16": self.scale is not None,
            "--on_nan skip": self.inspect is not None,
        }
        return " or ".join(mode for mode, used in modes.items() if used)

    # -------------------------------------------------------------------------------- accumulation
    def gradients(self, optimizer: Optimizer) -> list[torch.Tensor | None]:
        """The accumulated gradients since the last step, one for each parameter."""
        return [self.sums.get(optimizer, {}).get(p) for p in parameters_of(optimizer)]

    def resume(self, optimizer: Optimizer, count: int, sums: Sequence[torch.Tensor | None]) -> None:
        """Restore the number of accumulated batches and their gradients."""
        self.counts[optimizer] = count
        pairs = zip(parameters_of(optimizer), sums, strict=True)
        self.sums[optimizer] = {p: copy_like(s, p) for p, s in pairs if s is not None}

    def snapshot(self) -> Callable[[], None]:
        """Snapshot counts and sums; returns a function that restores them."""
        sums = WeakKeyDictionary({o: dict(own) for o, own in self.sums.items()})
        return functools.partial(vars(self).update, counts=self.counts.copy(), sums=sums)

    def _accumulate(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        """Move gradients to the sums; an optimizer skips parameters whose gradient is None."""
        sums = self.sums.setdefault(optimizer, {})
        for p in parameters:
            if p.grad is not None:
                # new tensors: `snapshot` keeps the old ones, and the model goes on with its own
                sums[p] = sums[p] + p.grad if p in sums else p.grad.clone()
        drop_gradients(parameters)

    def _take_sums(self, optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
        if self.accumulate == 1:
            return
        self._accumulate(optimizer, parameters)
        for p, total in self.sums.pop(optimizer).items():
            p.grad = total / self.accumulate

    # ---------------------------------------------------- changes of gradients by the model itself
    def _check_supported(self, optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> None:
        """Raise UserError if a step would silently differ from one in a plain loop."""
        if hasattr(optimizer, "found_inf"):
            self.refuse_scaler()
        if any(p._backward_hooks or self._has_foreign_hooks(p) for p in parameters):
            self._refuse("the model has hooks (register_hook) on weights, which change gradients")
        if self.accumulate > 1:
            used = (p for p in parameters if p.grad is not None)
            if any(self._used_by.get(p, optimizer) is not optimizer for p in used):
                raise UserError(
                    "two optimizers step the same weights after one backward(), which does not go "
                    f"together with {self._modes()}: give each weight to one optimizer"
                )
            left = (p.grad for p in parameters if p in self._used_by and self._was_seen(p))
            if any(bool(grad.any()) for grad in left if grad is not None):
                raise UserError(
                    f"{type(optimizer).__name__} steps twice after one backward(), which does not "
                    f"go together with {self._modes()}: let it step once"
                )
            self._used_by.update({p: optimizer for p in parameters if p.grad is not None})
            if optimizer in (self.stepped or ()):
                raise UserError(
                    f"{type(optimizer).__name__} steps twice in an iteration, and --accumulate "
                    f"{self.accumulate} would average the gradients of both: leave it out"
                )
            if self.stepped is not None:
                self.stepped.add(optimizer)
        if distributed.world_size() > 1 and any(p not in self._initial for p in parameters):
            raise UserError(
                "an optimizer steps weights that were made after the start of training, which "
                "differ between processes: make them in __init__"
            )

    def _was_seen(self, p: torch.Tensor) -> bool:
        """Whether the gradient of `p` is one that a step has seen already."""
        return p in self._seen and self._seen[p]() is p.grad

    def _has_foreign_hooks(self, p: torch.Tensor) -> bool:
        hooks = getattr(p, "_post_accumulate_grad_hooks", None) or ()
        return len(hooks) > (p in self._watched)

    def _refuse(self, what: str) -> None:
        raise UserError(
            f"{what}, and with {self._modes()} these are of only a part of the batch: do it in a "
            "function given to optimizer.register_step_pre_hook, which sees the gradients of the "
            "whole batch"
        )

    def _watch(self, parameters: Iterable[torch.Tensor]) -> None:
        """Record each gradient when the backward pass has accumulated it."""

        def record(p: torch.Tensor) -> None:
            self._used_by.pop(p, None)
            if p.grad is not None:
                # changes to `p.grad.data` do not increase the version: compare values once
                copy = None if p in self._checked else p.grad.clone()
                self._backpropagated[p] = p.grad, p.grad._version, copy

        for p in parameters:
            if p.requires_grad and p not in self._watched:  # a frozen one can have no hook
                p.register_post_accumulate_grad_hook(record)
                self._watched.add(p)

    def _check_unchanged(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise UserError if a model has clipped or set gradients of only a part of the batch."""
        watched = {p for p in parameters if p in self._watched}
        self._watch(parameters)
        for p in parameters:
            grad, version, copy = self._backpropagated.pop(p, (None, 0, None))
            if p.grad is None:
                continue
            if grad is None:
                if p in watched and not self._was_seen(p) and p.grad.any():
                    self._refuse("the model sets gradients without backward()")
                continue
            self._checked.add(p)
            changed = p.grad is not grad or p.grad._version != version
            if copy is not None:
                changed |= not torch.allclose(copy, p.grad, rtol=0, atol=0, equal_nan=True)
            if changed and p.grad.any():  # zeroing is allowed
                self._refuse("the model changes gradients between backward() and step()")


def _before_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_inside_step(optimizer):
        return
    for steps in list(_active):
        if steps.owns(optimizer):
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            steps.pre_step(optimizer, closure)


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    if not is_inside_step(optimizer):
        for steps in list(_active):
            steps.post_step(optimizer)


def is_inside_step(optimizer: Optimizer) -> bool:
    """Whether torch has called a hook for `super().step()`, inside a step of the same optimizer.

    torch calls global hooks for both.
    """
    frame: FrameType | None = sys._getframe(2)  # torch's wrapper around `step`
    while frame is not None and frame.f_code.co_name != "wrapper":  # it may be called through C
        frame = frame.f_back
    if frame is None:
        return False
    wrapper, outer = frame.f_code, frame.f_back
    while outer is not None:
        if outer.f_code is wrapper and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer in its order, each once: networks may share a layer."""
    return list(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]))


def copy_like(value: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Copy a value that has the shape of `p` to its device, in its memory layout."""
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def drop_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Set gradients to None, so that an optimizer skips these parameters."""
    for p in parameters:
        p.grad = None
