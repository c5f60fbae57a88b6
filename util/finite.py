"""Watching for losses and gradients that are not finite, without waiting for the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .checkpoint import warn
from .image_pool import ImagePool
from .util import UserError

MOST_IN_A_ROW = 10
CHECK_EVERY = 100  # iterations, where nothing else makes the loop wait for the GPU


class Iteration(NamedTuple):
    """One iteration whose flag has not been looked at yet."""

    where: str
    paths: Sequence[str]
    losses: torch.Tensor  # (number of losses,)
    finite: torch.Tensor  # (), bool


class FiniteGuard:
    """Notices an iteration in which a loss or a gradient is NaN or infinite.

    With `stop` each iteration leaves a flag on the device; `check`, called when losses are shown
    and before anything is saved, looks at the flags and raises UserError. With `skip` each step is
    looked at before it is taken (this waits for the GPU) and dropped; ten in a row raise.
    """

    def __init__(self, model: Any, mode: str = "stop"):
        self.model, self.mode = model, mode
        self.pending: list[Iteration] = []
        self.gradients: list[torch.Tensor] = []
        self.skipped: list[str] = []
        self.in_a_row = 0
        self.undo: list[tuple[Any, Any]] = []
        self.hooks = [o.register_step_pre_hook(self._before_step) for o in model.optimizers]

    def close(self) -> None:
        """Let go of the optimizers."""
        for hook in self.hooks:
            hook.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        # the largest magnitude is finite only if every number in every gradient is
        finite = torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()
        self.gradients.append(finite)
        if self.mode == "skip" and not finite:
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over these

    def start(self) -> None:
        """Before an iteration: with `skip`, remember what a forward pass changes by itself."""
        if self.mode == "skip":
            nets = self.model.networks().values()
            self.undo = [(b, b.clone()) for net in nets for b in net.buffers()]
            pools = [v for v in vars(self.model).values() if isinstance(v, ImagePool)]
            self.undo += [(pool, list(pool.images)) for pool in pools]

    def finish(self, where: str, paths: Sequence[str]) -> None:
        """After an iteration of this description, on these files."""
        model = self.model
        losses = model.loss_values(model.loss_names)
        finite = torch.stack([losses.isfinite().all(), *self.gradients]).all()
        self.gradients.clear()
        self.pending.append(Iteration(where, paths, losses, finite))
        if self.mode == "skip" or model.device.type == "cpu" or len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Look at the iterations since the last time. Raises UserError, see the class."""
        pending, self.pending = self.pending, []
        if not pending or bool(torch.stack([i.finite for i in pending]).all()):
            self.in_a_row = 0
            return
        bad = next(i for i in pending if not i.finite)
        names = [
            name
            for name, value in zip(self.model.loss_names, bad.losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        what = f"the loss {' and '.join(names)} is" if names else "a gradient is"
        files = ", ".join([bad.paths] if isinstance(bad.paths, str) else list(bad.paths)[:4])
        message = f"{what} not finite at {bad.where}, on {files}"
        if self.mode == "stop":
            raise UserError(
                f"{message}; nothing was saved since: go on from the last save with "
                "--continue_train, at a lower --lr, or with --on_nan skip"
            )
        for target, value in self.undo:
            if isinstance(target, ImagePool):
                target.images = value
            else:
                target.copy_(value)
        self.in_a_row += 1
        self.skipped.append(bad.where)
        warn(f"{message}; this step is skipped")
        if self.in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{message}; {MOST_IN_A_ROW} steps in a row were skipped: go on from the last save "
                "with --continue_train at a lower --lr"
            )
