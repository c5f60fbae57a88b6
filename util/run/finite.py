"""Detecting NaN and infinite numbers in training, without waiting for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from util import distributed
from util.errors import UserError, warn

MAX_CONSECUTIVE_SKIPS = 10
CHECK_EVERY = 100  # iterations; sooner if losses are printed or a checkpoint is saved


def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all numbers in all tensors are finite: a bool tensor () on the first one's device."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return torch.tensor(True)
    # the largest magnitude is finite only if every number is
    # (`torch.nn.utils.get_total_norm` does this, but only since PyTorch 2.6)
    largest = torch._foreach_norm(tensors, math.inf)
    return torch.stack([x.to(largest[0].device) for x in largest]).isfinite().all()


class Iteration(NamedTuple):
    """An iteration that has not been checked yet."""

    where: str
    paths: Sequence[str]
    names: Sequence[str]  # of the losses
    losses: torch.Tensor  # (number of losses,)


class FiniteGuard:
    """Stops training, or skips a step, when a number is NaN or infinite.

    Only numbers that were backpropagated count: a loss that is only shown may be infinite.

    `stop`: `check` raises UserError if a weight is not finite. It is called when losses are
    printed and before each save. The losses since the last check tell in which iteration it began.

    `skip`: gradients are checked before each step, which waits for the GPU. An iteration with bad
    gradients leaves the model unchanged; ten in a row raise UserError. This needs a second copy of
    the weights and optimizer states.

    All ranks decide alike: their weights are equal, gradients are checked after averaging, and
    `check` asks all ranks.
    """

    def __init__(self, model: Any, mode: str = "stop"):
        self.model, self.mode = model, mode
        self.pending: list[Iteration] = []
        self.gradients: list[torch.Tensor] = []
        self.skipped: list[str] = []
        self.consecutive_skips = 0
        self.undo: list[Callable[[], None]] = []
        if mode == "skip":
            model.inspect_steps(self._before_step)

    def close(self) -> None:
        """Stop checking the optimizers."""
        if self.mode == "skip":
            self.model.inspect_steps(None)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        # set by a gradient scaler of the model's own, which skips such steps by itself
        if not gradients or hasattr(optimizer, "found_inf"):
            return
        self.gradients.append(all_finite(gradients))
        if all(self.gradients):
            # a later step of this iteration may still turn out bad
            self.undo.append(_undo_of(optimizer))
        else:
            for parameter in parameters:
                parameter.grad = None  # the optimizer skips these

    def start(self) -> None:
        """Before an iteration: with `skip`, snapshot what the optimizers do not change."""
        if self.mode == "stop":
            return
        stepped = set(self.model.stepped_tensors())
        others = [(t, t.detach().clone()) for t in self.model.trained_tensors() if t not in stepped]
        modules = (m for net in self.model.all_modules().values() for m in net.modules())
        # a model may replace its tensors
        slots = [(d, dict(d)) for m in modules for d in (m._buffers, m._parameters)]
        undo_model = self.model.snapshot()

        def undo() -> None:
            undo_model()
            for tensors, before in slots:
                tensors.update(before)
            for tensor, value in others:
                tensor.copy_(value)

        self.undo = [undo]

    def finish(self, where: str, data: Mapping[str, Any] | Sequence[str]) -> None:
        """After an iteration: `where` names it in messages, `data` is its batch or its files."""
        names = self.model.present_losses()
        losses = self.model.loss_values(names)
        self.pending.append(Iteration(where, _files(data), names, losses))
        # a single process on the CPU can look at once: there is no GPU or other rank to wait for
        at_once = self.model.device.type == "cpu" and distributed.world_size() == 1
        suspicious = at_once and bool(self._bad_losses(self.pending[-1]))
        if at_once and not suspicious:
            del self.pending[:-1]
        if self.mode == "skip" or suspicious or len(self.pending) >= CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Check the iterations since the last call; raises UserError as the class says."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        bad = next((i for i in pending if self._bad_losses(i)), None)
        if self.mode == "skip":
            harmed = bool(self.gradients) and not bool(torch.stack(self.gradients).all())
        else:
            harmed = not all_finite([p.detach() for p in self.model.stepped_tensors()])
        self.gradients.clear()
        if not distributed.any_rank(harmed):
            self.consecutive_skips = 0
            return
        # losses can be finite on one rank and not on another
        bad_here = self._what_is_bad(bad or pending[-1])
        found = distributed.all_gather_object((bad is None, bad_here))
        message = min(found, key=lambda one: one[0])[1]
        if self.mode == "stop":
            raise UserError(
                f"{message}; nothing was saved since: resume from the last save, if there is one, "
                "with --continue_train, at a lower --lr or with --on_nan skip"
            )
        with torch.no_grad():
            for undo in reversed(self.undo):
                undo()
        self.consecutive_skips += 1
        self.skipped.append(pending[-1].where)
        warn(f"{message}; this step is skipped")
        if self.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            raise UserError(
                f"{message}; {MAX_CONSECUTIVE_SKIPS} steps in a row were skipped: resume from the "
                "last checkpoint with --continue_train at a lower --lr"
            )

    def _bad_losses(self, iteration: Iteration) -> list[str]:
        pairs = zip(iteration.names, iteration.losses.tolist(), strict=True)
        return [name for name, value in pairs if not math.isfinite(value)]

    def _what_is_bad(self, iteration: Iteration) -> str:
        names = self._bad_losses(iteration)
        what = "a gradient is" if self.mode == "skip" else "a weight is"
        if names:
            what = (
                f"the loss {names[0]} is" if len(names) == 1 else f"losses ({', '.join(names)}) are"
            )
        return f"{what} not finite at {iteration.where}, on {', '.join(iteration.paths[:4])}"


def _undo_of(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that restores the weights and the state of an optimizer as they are now."""
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
    """The files of a batch: its entries whose names end in `paths`."""
    if isinstance(data, Mapping):
        groups = [v for k, v in data.items() if str(k).endswith("paths")]
    else:
        groups = [data]
    files = [str(f) for g in groups for f in ([g] if isinstance(g, str) else g)]
    return list(dict.fromkeys(files)) or ["unknown files"]
