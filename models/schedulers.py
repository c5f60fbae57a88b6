"""Learning rate policies. All of them are stepped once, at the end of each epoch."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer, lr_scheduler

LR_POLICIES = ("linear", "step", "plateau", "cosine")


def get_scheduler(optimizer: Optimizer, opt):
    """The scheduler of `opt.lr_policy` for one optimizer.

    - `linear`: the full rate for `opt.n_epochs` epochs, then a straight line towards 0, which would
      be reached one epoch after the `opt.n_epochs_decay` that follow; counts from `opt.epoch_count`
    - `step`: times 0.1 every `opt.lr_decay_iters` epochs
    - `plateau`: times 0.2 where the metric has not improved by 1% for 5 epochs
    - `cosine`: half a cosine from the full rate to 0 over all the epochs

    Raises ValueError for an unknown policy.
    """
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
    """Bring a new scheduler to the start of epoch `opt.epoch_count` (from 1).

    The linear policy counts from there by itself. Plateau can't: the metrics are gone.
    """
    if opt.lr_policy not in ("step", "cosine"):
        return
    with warnings.catch_warnings():
        # no optimizer step comes before these: nothing is trained, the epochs lie in the past
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(opt.epoch_count - 1):
            scheduler.step()


def rebase(schedulers: list, opt, rates: list[list[float]]) -> None:
    """Put the rates of resumed schedules where the options of now would have them.

    `rates` are those that the groups of each optimizer have at first, with these options.

    Only for changed options: an unchanged schedule goes on from its own state, bit for bit.
    Plateau keeps the rate it has come to, since that depends on the metrics of all epochs.
    """
    for scheduler, initial in zip(schedulers, rates, strict=True):
        if opt.lr_policy == "plateau":
            continue
        optimizer, gone = scheduler.optimizer, scheduler.last_epoch
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = group["initial_lr"] = rate
        fresh = get_scheduler(optimizer, opt)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            for _ in range(gone):
                fresh.step()
        scheduler.load_state_dict(fresh.state_dict())
