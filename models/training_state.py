"""What a checkpoint holds of a model besides its weights: collect, restore, reshard."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from util.errors import warn

from .attributes import (
    orphan_tensors,
    plain_places,
    plain_tensors,
    stateful_parts,
    unlisted_modules,
)
from .schedulers import resume
from .speed.steps import Steps, copy_like

if TYPE_CHECKING:
    from .model_files import ModelFiles


def collect(model: ModelFiles, steps: Steps) -> dict[str, Any]:
    """The training state of a model: plain values and tensors."""
    optimizers = model.all_optimizers()
    return {
        "optimizers": [o.state_dict() for o in optimizers],
        "schedulers": [s.state_dict() for s in model.schedulers],
        "parts": {name: part.state_dict() for name, part in stateful_parts(model).items()},
        "modules": {name: net.state_dict() for name, net in unlisted_modules(model).items()},
        "tensors": orphan_tensors(model),
        # gradient accumulation since the last step
        "accumulated": [steps.counts.get(o, 0) for o in optimizers],
        "gradients": [steps.gradients(o) for o in optimizers],
    }


def restore(
    model: ModelFiles, state: dict[str, Any], steps: Steps, options: dict[str, Any]
) -> None:
    """Load what `collect` returned in a run with these options."""
    optimizers, other_betas = model.all_optimizers(), options["beta1"] != model.opt.beta1
    if len(optimizers) != len(state["optimizers"]):
        raise ValueError(
            f"it has {len(state['optimizers'])} optimizers, the model now {len(optimizers)}: a "
            "model has to make all of them in __init__, not during training"
        )
    wrapped = [(a, b) for a in optimizers for b in optimizers if a.param_groups is b.param_groups]
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        load_optimizer(optimizer, saved, other_betas)
    for outer, inner in wrapped:  # such as SAM: both see one learning rate
        inner.param_groups = outer.param_groups
    for scheduler, saved in zip(model.schedulers, state["schedulers"], strict=True):
        resume(scheduler, saved, model.opt, options["lr_policy"])
    parts, modules = stateful_parts(model), unlisted_modules(model)
    for name, part in parts.items():
        if name in state["parts"]:
            part.load_state_dict(state["parts"][name])
    for name, net in modules.items():
        if name in state["modules"]:
            net.load_state_dict(state["modules"][name])
    surplus = (state["parts"].keys() - parts) | (state["modules"].keys() - modules)
    lost = sorted(n for n in surplus if not n.startswith("_"))
    if lost:
        warn(
            f"the checkpoint has state for {', '.join(lost)}, which this model lacks, so it is "
            "lost: create what has a state in __init__, not during training"
        )
    with torch.no_grad():
        for name, tensor in orphan_tensors(model).items():
            if name in state["tensors"]:
                tensor.copy_(state["tensors"][name])
    if steps.accumulate == options["accumulate"]:
        saved_sums = zip(optimizers, state["accumulated"], state["gradients"], strict=True)
        for optimizer, count, sums in saved_sums:
            steps.resume(optimizer, count, sums)


def plain_values(model: ModelFiles) -> dict[str, Any]:
    """Copies of tensors and of what `plain_places` lists, by name."""
    values = {name: getattr(*place) for name, place in plain_places(model).items()}
    values |= plain_tensors(model)
    return {name: _copied(value) for name, value in values.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, (float, int, str)):  # most of a long history
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        kind = OrderedDict if type(value) is OrderedDict else dict  # a Counter becomes a dict
        return kind((key, _copied(x)) for key, x in value.items())
    if isinstance(value, (list, deque, tuple)):
        copied = [_copied(x) for x in value]
        return tuple(copied) if isinstance(value, tuple) else copied
    return value


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The values in `now` that differ from those in `before`.

    The others are not saved: they follow the options, which may have changed when a run resumes.
    """

    def is_same(x: Any, y: Any, name: str, *path: Any) -> bool:
        if type(x) is not type(y):
            return False
        if isinstance(x, (float, int, str)):
            return x == y
        if torch.is_tensor(x):
            # saved under a name of its own if it has changed
            if path and ".".join([name, *map(str, path)]) in now:
                return True
            return (x.dtype, x.device) == (y.dtype, y.device) and torch.equal(x, y)
        if isinstance(x, np.ndarray):
            return x.dtype == y.dtype and np.array_equal(x, y)
        if isinstance(x, dict):
            keys = list(x)
            return keys == list(y) and all(is_same(x[k], y[k], name, *path, k) for k in keys)
        if isinstance(x, (list, tuple)):
            pairs = enumerate(zip(x, y, strict=False))
            return len(x) == len(y) and all(is_same(*p, name, *path, i) for i, p in pairs)
        return bool(x == y)

    pairs = {k: (v, before[k]) for k, v in now.items() if k in before}
    return {k: x for k, (x, y) in pairs.items() if not is_same(x, y, k)}


def _holds_images(value: Any) -> bool:
    tensors = (x for x in tree_leaves(value) if torch.is_tensor(x))
    return any(x.dim() > 2 and x.shape[-1] > 1 for x in tensors)


def restore_plain(model: ModelFiles, values: dict[str, Any], options: dict[str, Any]) -> None:
    """Set plain attributes to the values that `changes` returned in a run with these options."""
    places, tensors = plain_places(model), plain_tensors(model)
    sizes = ("crop_size", "load_size", "preprocess", "batch_size")
    # a model may have changed its options
    now = {k: values.get(f"opt.{k}", getattr(model.opt, k)) for k in sizes}
    changed = {k for k in sizes if options[k] != now[k]}
    lost: list[str] = []
    for name, saved in values.items():
        # images that do not fit those to come; a tensor is a whole batch, a list holds images
        outdated = changed if torch.is_tensor(saved) else changed - {"batch_size"}
        if outdated and name not in tensors and _holds_images(saved):
            continue
        value = tree_map_only(torch.Tensor, lambda x: x.to(model.device), saved)
        own = getattr(*places[name]) if name in places else None
        # in place, since others may refer to it, and a deque may have a maxlen
        if isinstance(value, list) and isinstance(own, (list, deque)):
            own.clear()
            own.extend(value)
        elif isinstance(value, dict) and isinstance(own, dict):
            own.clear()
            own.update(value)
        elif isinstance(own, np.ndarray) and _fits(value, own):
            own[...] = value
        elif isinstance(value, (list, dict)):  # perhaps it was a deque or a Counter
            lost.append(name)
        elif name in places:
            owner, key = places[name]
            if isinstance(owner, torch.Tensor):
                owner.requires_grad = value
            else:  # also if it is frozen
                vars(owner)[key] = value
        elif not torch.is_tensor(value) and name in vars(model):  # a tensor has become a number
            setattr(model, name, value)
        elif name in tensors and tensors[name].shape == getattr(value, "shape", None):
            tensors[name].copy_(value)
    if lost:
        warn(
            f"{', '.join(lost)}: a list or a dictionary in the checkpoint that this model does not "
            "have after setup, so it is not restored; if a later iteration needs it, create it, "
            "empty, in __init__"
        )


def _fits(value: Any, own: np.ndarray) -> bool:
    """Whether a value can be put into an array as it is."""
    same = isinstance(value, np.ndarray) and (value.shape, value.dtype) == (own.shape, own.dtype)
    return same and own.flags.writeable


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], other_betas: bool = False
) -> None:
    """Load a state whose run may have had another `--channels_last`, `--fast`, `--beta1` or device.

    This run decides whether kernels are fused. Fused ones assume, without checking, that weights
    and moments share a memory layout. With `other_betas` the betas of this run are kept.
    """
    own_settings = ("fused", "foreach", *(["betas"] if other_betas else []))
    for theirs, own in zip(saved.get("param_groups", ()), optimizer.param_groups, strict=False):
        theirs.update({k: own[k] for k in own_settings if k in own})
    optimizer.load_state_dict(saved)
    for p, moments in getattr(optimizer, "state", {}).items():
        for name, value in moments.items() if isinstance(moments, dict) else ():
            if torch.is_tensor(value) and value.dim() > 1 and value.shape == p.shape:
                moments[name] = copy_like(value, p)


def reshard(states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Reshard per-rank state, one entry for each saved rank, for a new world size.

    Images of image pools are distributed round-robin; a pool takes as many as it can hold.
    Accumulated gradients and the metric keep their means. Plain values become those of rank 0.
    """
    gradients = [
        [_mean_gradient(own) for own in zip(*of_optimizer, strict=True)]
        for of_optimizer in zip(*(s["gradients"] for s in states), strict=True)
    ]
    metric = [sum(s["metric"][i] for s in states) for i in (0, 1)]
    resharded = []
    for rank in range(world_size):
        parts = {}
        for name, part in states[0]["parts"].items():
            parts[name] = part
            if set(part) == {"images"}:
                images = [x for s in states for x in s["parts"][name]["images"]]
                parts[name] = {"images": images[rank::world_size]}
        own_metric = [0.0, 0] if rank else metric
        resharded.append({"parts": parts, "gradients": gradients, "metric": own_metric})
    return resharded


def _mean_gradient(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The mean over ranks; as in `average_gradients`, a missing gradient counts as zero."""
    present = [gradient.cpu() for gradient in gradients if gradient is not None]
    return torch.stack(present).sum(0) / len(gradients) if present else None
