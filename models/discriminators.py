"""What training does with a model's discriminators, which it recognizes by their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from util.errors import UserError

from .diffaug import DiffAugment
from .norms import add_spectral_norm
from .speed.prepared import prepared

if TYPE_CHECKING:
    from .base_model import BaseModel


def _is_name(name: str) -> bool:
    """True for D, D_A and D2, but not for Depth."""
    return re.fullmatch(r"D([A-Z0-9_].*)?", name) is not None


def find(model: BaseModel) -> dict[str, nn.Module]:
    """The discriminators of a model: the networks that have such a name."""
    return {name: net for name, net in model.networks().items() if _is_name(name)}


def owns_loss(model: BaseModel, loss: str) -> bool:
    """Whether a loss belongs to a discriminator: D, D_real, gp_A, but not Dice or Depth."""
    nets = [name for name in model.model_names if _is_name(name)]
    return any(loss == n or loss.startswith(n + "_") for n in (*nets, "D", "gp"))


def apply_options(model: BaseModel) -> None:
    """Apply --diffaug and --spectral_norm; raises UserError if there is no discriminator."""
    opt, found = model.opt, find(model)
    wanted = [name for name in ("diffaug", "spectral_norm") if getattr(opt, name)]
    if wanted and not found:
        flag = f"--{wanted[0]}"
        raise UserError(f"{flag}: --model {opt.model} has no discriminator: leave it out")
    done: set[nn.Module] = set()
    for net in dict.fromkeys(found.values()):  # one may have two names
        if opt.diffaug:
            augment = DiffAugment(opt.diffaug, opt.input_nc, opt.output_nc)
            prepared(net).prepared_augment = augment  # type: ignore[assignment]
        if opt.spectral_norm:
            add_spectral_norm(net, done)  # two may share layers
            done |= {*net.modules()}


def warn_of_unused_augmentation(model: BaseModel) -> None:
    """Warn once about each discriminator that --diffaug has not reached."""
    for name, net in find(model).items():
        augment = getattr(net, "prepared_augment", None)
        if augment is not None and not augment.calls:
            model._warn_once(
                name,
                f"--diffaug: net{name} was never called as a function of a batch so far, so "
                f"nothing is augmented: call net{name}(x), not its parts or net{name}.forward",
            )
