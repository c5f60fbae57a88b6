"""Learning rate schedules. Each is stepped once, at the end of an epoch."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch.optim import Optimizer, lr_scheduler

LR_POLICIES = ("linear", "step", "plateau", "cosine")
FROM_THE_FIRST = ("step", "cosine")  # epochs count from 1, and from `epoch_count` with the others

# made by `get_scheduler`; `rebase` leaves others alone
_of_options: weakref.WeakSet = weakref.WeakSet()


def get_scheduler(optimizer: Optimizer, opt):
    """The scheduler of `opt.lr_policy` for one optimizer.

    - `linear`: the full rate for `opt.n_epochs` epochs, then linear decay over the next
      `opt.n_epochs_decay`, which would reach 0 one epoch after the last; counts from
      `opt.epoch_count`
    - `step`: times 0.1 every `opt.lr_decay_iters` epochs
    - `plateau`: times 0.2 when the metric has not improved by 1% for 5 epochs
    - `cosine`: half a cosine from the full rate to 0 over all the epochs

    Raises ValueError for an unknown policy.
    """
    scheduler = _new_scheduler(optimizer, opt)
    _of_options.add(scheduler)
    return scheduler


def _new_scheduler(optimizer: Optimizer, opt):
    if opt.lr_policy == "linear":

        def factor(epoch: int) -> float:
            decayed = max(0, epoch + opt.epoch_count - opt.n_epochs)
            return 1.0 - decayed / float(opt.n_epochs_decay + 1)

        return lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
    if opt.lr_policy == "step":
        return lr_scheduler.StepLR(optimizer, step_size=opt.lr_decay_iters, gamma=0.1)
    if opt.lr_policy == "plateau":
        return lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="min", factor=0.2, threshold=0.01, patience=5
        )
    if opt.lr_policy == "cosine":
        total = max(1, opt.n_epochs + opt.n_epochs_decay)
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=0)
    raise ValueError(f"unknown lr_policy '{opt.lr_policy}': choose from {', '.join(LR_POLICIES)}")


def fast_forward(scheduler, opt) -> None:
    """Advance a new scheduler to the start of epoch `opt.epoch_count` (from 1).

    Does nothing for `linear`, which starts at that epoch, and for `plateau`, whose earlier metrics
    are not known.
    """
    if opt.lr_policy in FROM_THE_FIRST:
        _advance(scheduler, opt.epoch_count - 1)


def _advance(scheduler, epochs: int) -> None:
    with warnings.catch_warnings():
        # PyTorch warns, since these epochs have no optimizer steps
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(epochs):
            scheduler.step()


def resume(scheduler, state: dict[str, Any], opt, policy: str) -> None:
    """Load the state of a schedule that was saved with `--lr_policy policy`.

    That of another policy does not fit; `rebase` computes the rates.
    """
    if policy == opt.lr_policy or scheduler not in _of_options:
        scheduler.load_state_dict(state)
    else:
        scheduler.last_epoch = state["last_epoch"]


def rebase(schedulers: list, opt, rates: list[list[float]], policy: str, lr: float) -> None:
    """Recompute the learning rates of resumed schedules from changed options.

    `rates` are the initial rates of the parameter groups of each optimizer, with the new options;
    `policy` and `lr` are the options of the saved schedules. `plateau`, whose rate depends on the
    metrics of all epochs, goes on with that rate times `opt.lr / lr`. Schedules that a model has
    made by itself stay as they are.
    """
    for scheduler, initial in zip(schedulers, rates, strict=False):
        if scheduler not in _of_options:
            continue
        optimizer = scheduler.optimizer
        if policy == opt.lr_policy == "plateau":
            for group in optimizer.param_groups:
                group["lr"] *= opt.lr / lr if lr else 1.0
            continue
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = group["initial_lr"] = rate
        if opt.lr_policy == "plateau":
            continue
        fresh = get_scheduler(optimizer, opt)
        counted_then, counted_now = (p in FROM_THE_FIRST for p in (policy, opt.lr_policy))
        skipped = (opt.epoch_count - 1) * (counted_now - counted_then)
        _advance(fresh, scheduler.last_epoch + skipped)
        scheduler.load_state_dict(fresh.state_dict())
