"""Learning rate schedules. Each is stepped once, at the end of an epoch."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from util import distributed
from util.errors import UserError

LR_POLICIES = ("linear", "step", "plateau", "cosine")

# made by `get_scheduler`; `rebase` leaves others alone
_from_options: weakref.WeakSet = weakref.WeakSet()


def factor(opt, epoch: int) -> float:
    """The learning rate in an epoch, counted from 1, over the initial one; not for `plateau`.

    - `linear`: the full rate for `opt.n_epochs` epochs, then linear decay over the next
      `opt.n_epochs_decay`, which would reach 0 one epoch after the last
    - `step`: times 0.1 every `opt.lr_decay_iters` epochs, counted from `opt.epoch_count`
    - `cosine`: half a cosine from the full rate to 0 over all the epochs (Loshchilov and Hutter,
      SGDR, 2017, eq. 5, without restarts)
    """
    if opt.lr_policy == "linear":
        return 1.0 - max(0, epoch - opt.n_epochs) / float(opt.n_epochs_decay + 1)
    if opt.lr_policy == "step":
        return 0.1 ** ((epoch - opt.epoch_count) // opt.lr_decay_iters)
    total = max(1, opt.n_epochs + opt.n_epochs_decay)
    return (1 + math.cos(math.pi * (epoch - 1) / total)) / 2


def get_scheduler(optimizer: Optimizer, opt):
    """The scheduler of `opt.lr_policy` for one optimizer, from epoch `opt.epoch_count` on.

    `plateau` multiplies the rate by 0.2 when the metric has not improved by 1% for 5 epochs; for
    the others see `factor`. Raises UserError for an unknown policy.
    """
    if opt.lr_policy not in LR_POLICIES:
        known = ", ".join(LR_POLICIES)
        raise UserError(f"unknown lr_policy '{opt.lr_policy}': choose from {known}")
    if opt.lr_policy == "plateau":
        scheduler = lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="min", factor=0.2, threshold=0.01, patience=5
        )
    else:
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda n: factor(opt, opt.epoch_count + n))
    _from_options.add(scheduler)
    return scheduler


def resume(scheduler, state: dict[str, Any], opt, policy: str) -> None:
    """Load the state of a schedule that was saved with `--lr_policy policy`.

    The state of another policy does not fit: only its epoch is kept, and `rebase` sets the rates.
    """
    if scheduler not in _from_options or policy == opt.lr_policy:
        scheduler.load_state_dict(state)
    else:
        scheduler.last_epoch = state["last_epoch"]


def sets_rates(scheduler: dict[str, Any], optimizer: dict[str, Any]) -> bool:
    """Whether the rates in the state of an optimizer are those of its schedule.

    A model may set them by itself, such as in an `update_learning_rate` of its own.
    """
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return bool(scheduler.get("_last_lr", rates) == rates)


def rebase(
    schedulers: list,
    opt,
    rates: list[list[float]],
    policy: str,
    lr: float,
    followed: list[bool],
) -> None:
    """Recompute the learning rates of resumed schedules from changed options.

    `rates` are the initial rates of the parameter groups of each optimizer, with the new options;
    `policy` and `lr` are the options of the saved schedules. `plateau`, whose rate depends on the
    metrics of all epochs, continues with its rate times `opt.lr / lr`. Schedules that a model has
    made itself are left alone, and so are rates that it sets itself, those for which `followed` is
    False, until the schedule steps. (Under `plateau` the two can't be told apart.)
    """
    for scheduler, initial, follows in zip(schedulers, rates, followed, strict=False):
        if scheduler not in _from_options:
            continue
        groups, plateau = scheduler.optimizer.param_groups, opt.lr_policy == "plateau"
        if plateau and policy == "plateau":
            for group in groups:
                group["lr"] *= opt.lr / lr if lr else 1.0
            continue
        for group, rate in zip(groups, initial, strict=True):
            group["initial_lr"] = rate
        if not plateau:
            scheduler.base_lrs = list(initial)
        if not follows and policy != "plateau":
            continue  # until the schedule steps, if it does
        now = 1.0 if plateau else factor(opt, opt.epoch_count + scheduler.last_epoch)
        for group, rate in zip(groups, initial, strict=True):
            group["lr"] = rate * now
        scheduler._last_lr = [group["lr"] for group in groups]


class MeanLoss:
    """The mean over an epoch of the summed losses of each iteration.

    Kept on the device, so that adding does not wait for the GPU. Sums that are not finite are left
    out, since `--on_nan skip` trains on.
    """

    def __init__(self, total: torch.Tensor | float = 0.0, count: torch.Tensor | int = 0):
        self.total, self.count = total, count

    def add(self, losses: torch.Tensor) -> None:
        """Add the losses (number of losses,) of an iteration."""
        summed = losses.sum()
        finite = summed.isfinite()
        self.total = self.total + torch.where(finite, summed, 0.0)
        self.count = self.count + finite

    def values(self) -> tuple[float, int]:
        """The sum and the number of iterations, as arguments to construct a copy."""
        return float(self.total), int(self.count)

    def mean(self) -> float:
        """The mean over all ranks, so that all have the same learning rate."""
        total, count = distributed.sum_over_ranks(*self.values())
        return total / max(1, count)
