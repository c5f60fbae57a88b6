"""Learning rate schedules. Each is stepped once, at the end of an epoch."""

from __future__ import annotations

import warnings
import weakref

from torch.optim import Optimizer, lr_scheduler

LR_POLICIES = ("linear", "step", "plateau", "cosine")


_of_options: weakref.WeakSet = weakref.WeakSet()  # not a model's own


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
    if opt.lr_policy not in ("step", "cosine"):
        return
    with warnings.catch_warnings():
        # PyTorch warns, since these epochs have no optimizer steps
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(opt.epoch_count - 1):
            scheduler.step()


def rebase(schedulers: list, opt, rates: list[list[float]]) -> None:
    """Recompute the learning rates of resumed schedules from changed options.

    `rates` are the initial rates of the parameter groups of each optimizer, with the new options.
    `plateau` keeps its rate, which depends on the metrics of all epochs, and so do schedules that a
    model has made by itself.
    """
    for scheduler, initial in zip(schedulers, rates, strict=False):
        if opt.lr_policy == "plateau" or scheduler not in _of_options:
            continue
        optimizer, epochs = scheduler.optimizer, scheduler.last_epoch
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = group["initial_lr"] = rate
        fresh = get_scheduler(optimizer, opt)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            for _ in range(epochs):
                fresh.step()
        scheduler.load_state_dict(fresh.state_dict())
