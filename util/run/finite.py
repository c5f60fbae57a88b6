"""Watching for losses and gradients that are not finite, without waiting for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from util import distributed
from util.errors import UserError, warn
from util.image_pool import ImagePool

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
    looked at before it is taken (this waits for the GPU), and an iteration with a bad one leaves
    the model as it was; ten in a row raise. For this the weights and the optimizers are kept twice.

    Of several processes all do the same: gradients are looked at when they are everybody's mean,
    and `check` asks the others.
    """

    def __init__(self, model: Any, mode: str = "stop"):
        self.model, self.mode = model, mode
        self.pending: list[Iteration] = []
        self.gradients: list[torch.Tensor] = []
        self.skipped: list[str] = []
        self.in_a_row = 0
        self.undo: list[Callable[[], None]] = []
        self.hooks = [o.register_step_pre_hook(self._before_step) for o in model.optimizers]

    def close(self) -> None:
        """Let go of the optimizers."""
        for hook in self.hooks:
            hook.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # a gradient scaler, which sets this, passes over steps by itself: they are a part of fp16
        if not gradients or hasattr(optimizer, "found_inf"):
            return
        # the largest magnitude is finite only if every number in every gradient is
        self.gradients.append(torch.nn.utils.get_total_norm(gradients, math.inf).isfinite())
        if self.mode == "stop":
            return
        if all(self.gradients):
            # a later step of this iteration may still turn out bad
            self.undo.append(_undo_of(optimizer))
        else:
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over these

    def start(self) -> None:
        """Before an iteration: with `skip`, remember what a forward pass changes by itself."""
        if self.mode == "stop":
            return
        nets = self.model.networks().values()
        buffers = [(b, b.clone()) for net in nets for b in net.buffers()]
        pools = [v for v in vars(self.model).values() if isinstance(v, ImagePool)]
        contents = [(pool, list(pool.images)) for pool in pools]

        def undo() -> None:
            for buffer, value in buffers:
                buffer.copy_(value)
            for pool, images in contents:
                pool.images = images

        self.undo = [undo]

    def finish(self, where: str, data: Mapping[str, Any] | Sequence[str]) -> None:
        """After an iteration of this description, on this batch (or the files it came from)."""
        model = self.model
        losses = model.loss_values(model.loss_names)
        finite = torch.stack([losses.isfinite().all(), *self.gradients]).all()
        self.gradients.clear()
        self.pending.append(Iteration(where, _files(data), losses, finite))
        # others would have to be waited for, as would a GPU
        for_nothing = model.device.type == "cpu" and distributed.world_size() == 1
        if self.mode == "skip" or for_nothing or len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Look at the iterations since the last time. Raises UserError, see the class."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        fine = bool(torch.stack([i.finite for i in pending]).all())
        if not distributed.any_rank(not fine):
            self.in_a_row = 0
            return
        # the losses of one process can be finite, and those of another not
        found = distributed.all_gather_object(None if fine else self._what_is_bad(pending))
        message = next(text for text in found if text is not None)
        if self.mode == "stop":
            raise UserError(
                f"{message}; nothing was saved since: go on from the last save with "
                "--continue_train, at a lower --lr, or with --on_nan skip"
            )
        with torch.no_grad():
            for undo in reversed(self.undo):
                undo()
        self.in_a_row += 1
        self.skipped.append(pending[-1].where)
        warn(f"{message}; this step is skipped")
        if self.in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{message}; {MOST_IN_A_ROW} steps in a row were skipped: go on from the last save "
                "with --continue_train at a lower --lr"
            )

    def _what_is_bad(self, pending: list[Iteration]) -> str:
        bad = next(i for i in pending if not i.finite)
        names = [
            name
            for name, value in zip(self.model.loss_names, bad.losses.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        what = "a gradient is"
        if names:
            what = (
                f"the loss {names[0]} is" if len(names) == 1 else f"losses ({', '.join(names)}) are"
            )
        return f"{what} not finite at {bad.where}, on {', '.join(bad.paths[:4])}"


def _undo_of(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that puts the weights and the state of an optimizer back to what they are now."""
    weights = [(p, p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]
    state = {
        p: {k: v.clone() if torch.is_tensor(v) else v for k, v in slots.items()}
        for p, slots in optimizer.state.items()
    }

    def undo() -> None:
        for parameter, value in weights:
            parameter.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)

    return undo


def _files(data: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The files that a batch came from: all its entries whose names end in `paths`."""
    if isinstance(data, Mapping):
        groups = [v for k, v in data.items() if str(k).endswith("paths")]
    else:
        groups = [data]
    files = [str(f) for g in groups for f in ([g] if isinstance(g, str) else g)]
    return list(dict.fromkeys(files)) or ["unknown files"]
