"""Averaged weights (`--ema`): a running average of each generator over the steps of its optimizer.

Images of averaged generators are better than those of the last weights, and change less from one
save to the next: Yazici et al., The Unusual Effectiveness of Averaging in GAN Training, ICLR 2019,
https://arxiv.org/abs/1806.04498.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from util import randomness
from util.errors import UserError, first_line
from util.run.saved_options import read_saved_options
from util.run.weight_files import weights_path

from .attributes import unwrap
from .speed.capture import in_each_iteration
from .speed.steps import is_inside_step, parameters_of

if TYPE_CHECKING:
    from .base_model import BaseModel

WEIGHTS = ("auto", "ema", "raw")  # the choices of --weights


class WeightAverage(nn.Module):
    """The running average of a network's state dictionary.

    Step t sets it to d * average + (1 - d) * weights, where d = min(decay, (1 + t) / (10 + t)) soon
    forgets the initial weights. Buffers are copied, as in StyleGAN and by default in torch: running
    statistics of batch norms, vectors of spectral norms, counters.
    """

    # Not torch.optim.swa_utils.AveragedModel: it copies the network, which old-style weight norm
    # does not allow, and its counter would make each step wait for the GPU.

    steps: torch.Tensor  # (), stays on the CPU

    def __init__(self, net: nn.Module, decay: float):
        super().__init__()
        state = net.state_dict()
        trained = dict(net.named_parameters(remove_duplicate=False))
        self.decay, self.keys = decay, list(state)
        self.is_averaged = [
            k in trained and (v.is_floating_point() or v.is_complex()) for k, v in state.items()
        ]
        copies = (value.detach().clone() for value in state.values())
        self.means = nn.ParameterList(nn.Parameter(c, requires_grad=False) for c in copies)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def restart(self, net: nn.Module) -> None:
        """Restart from the current weights of the network."""
        self.steps.zero_()
        for mean, value in zip(self.means, net.state_dict().values(), strict=True):
            mean.copy_(value)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Update with the weights after a step. Raises UserError if their names have changed."""
        state = net.state_dict()
        if list(state) != self.keys:
            raise UserError(
                "--ema averages a network whose layers have changed since the start of training: "
                "leave --ema out"
            )
        self.steps += 1
        t = int(self.steps)
        means, values = [], []
        for mean, value, averaged in zip(self.means, state.values(), self.is_averaged, strict=True):
            if averaged:
                means.append(mean)
                values.append(value)
            else:
                mean.copy_(value)
        torch._foreach_lerp_(means, values, 1 - min(self.decay, (1 + t) / (10 + t)))

    def weights(self) -> dict[str, torch.Tensor]:
        """The average as a state dictionary of the network."""
        pairs = zip(self.keys, self.means, strict=True)
        # contiguous, so that files do not depend on --channels_last
        return {key: mean.detach().contiguous() for key, mean in pairs}

    @contextlib.contextmanager
    def applied_to(self, net: nn.Module) -> Iterator[None]:
        """Context manager: the network has the averaged weights."""
        tensors = [value.detach() for value in net.state_dict().values()]
        own = [value.clone() for value in tensors]
        _copy(self.means, tensors)
        try:
            yield
        finally:
            _copy(own, tensors)


@torch.no_grad()
def _copy(values: Any, to: list[torch.Tensor]) -> None:
    for value, tensor in zip(values, to, strict=True):
        tensor.copy_(value)


def start_averages(model: BaseModel, decay: float) -> dict[str, WeightAverage]:
    """Start averages of the networks that a model uses in testing, updated after each step.

    Raises UserError if there are none, or if their files would overwrite those of other networks.
    """
    networks = model.networks()
    names = [name for name in _networks_in_testing(model) if name in networks]
    lower = {name.lower() for name in networks}  # some disks ignore case
    taken = [f"{name}_ema" for name in names if f"{name}_ema".lower() in lower]
    if taken or not names:
        what = f"has a network {taken[0]} of its own" if taken else "has no network in testing"
        raise UserError(f"--ema {decay:g}: --model {model.opt.model} {what}: leave --ema out")
    averages = {name: WeightAverage(unwrap(networks[name]), decay) for name in names}
    # A hook on all optimizers, since a model may replace some, or its networks. It is not removed
    # when the model is gone: garbage is also collected while torch goes through its hooks.
    register_optimizer_step_post_hook(functools.partial(_after_any_step, weakref.ref(model)))
    print(f"averaged weights (--ema {decay:g}) of {', '.join(names)}")
    return averages


def _after_any_step(alive: weakref.ref[BaseModel], optimizer: Optimizer, *_: Any) -> None:
    model = alive()
    if model is None or is_inside_step(optimizer) or model._steps.was_skipped(optimizer):
        return
    stepped = set(parameters_of(optimizer))
    for name, average in model._averages.items():
        net = unwrap(model.networks()[name])
        # --on_nan skip and fp16 skip steps by setting gradients to None
        if any(p in stepped and p.grad is not None for p in net.parameters()):
            in_each_iteration(average.update, net)


def _networks_in_testing(model: BaseModel) -> list[str]:
    """The `model_names` of a model in testing; creates it once for testing to find out.

    Raises UserError if that fails.
    """
    opt = copy.copy(model.opt)
    opt.isTrain, opt.gpu_ids, opt.device = False, [], torch.device("cpu")
    try:
        with randomness.preserved(), contextlib.redirect_stdout(io.StringIO()):
            return list(type(model)(opt).networks())
    except Exception as e:  # whatever the code of a user's model raises
        raise UserError(
            f"--ema needs to know the networks that --model {opt.model} uses in testing, and with "
            f"isTrain = False it can't be made ({type(e).__name__}: {first_line(e)}): make its "
            "__init__ work for both, or leave --ema out"
        ) from e


def average_path(folder: Path, suffix: str, name: str) -> Path:
    """The file with the averaged weights of a network."""
    return weights_path(folder, suffix, f"{name}_ema")


def choose_weights(folder: Path, suffix: str, name: str, weights: str = "auto") -> Path:
    """The file to read a network's weights from, according to `--weights`.

    `auto` takes the averaged weights if there are any. Raises UserError for `ema` if there are
    only raw ones.
    """
    raw, averaged = weights_path(folder, suffix, name), average_path(folder, suffix, name)
    if weights == "ema" and raw.exists() and not averaged.exists():
        raise UserError(
            f"--weights ema: {folder} has no {averaged.name}, only {raw.name}, so --ema was off in "
            "this training: choose --weights raw"
        )
    # if --ema was off, a file of that name is a model's own, or older than the raw weights
    saved = read_saved_options(folder)
    on = not saved or saved.get("ema", "0.0") != "0.0"
    return averaged if weights == "ema" or (weights == "auto" and on and averaged.exists()) else raw
