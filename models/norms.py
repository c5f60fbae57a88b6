"""Normalization layers by name, and what the convolutions around them need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from util.errors import UserError

from .speed.sync_norm import SyncBatchNorm2d

NormLayer = Callable[[int], nn.Module]


# batch norm has an affine map and running statistics, instance norm has neither
NORMS: dict[str, NormLayer] = {
    "instance": functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False),
    "batch": functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True),
    "syncbatch": functools.partial(SyncBatchNorm2d, affine=True, track_running_stats=True),
    "none": nn.Identity,
}


def get_norm_layer(norm_type: str = "instance") -> NormLayer:
    """The function in `NORMS` that makes a normalization layer for a number of channels.

    Raises UserError for an unknown name.
    """
    if norm_type not in NORMS:
        raise UserError(f"unknown norm '{norm_type}': choose from {', '.join(NORMS)}")
    return NORMS[norm_type]


def add_spectral_norm(net: nn.Module, done: Container[nn.Module] = ()) -> None:
    """Divide the weights of all convolutions by their largest singular value, in place.

    The value is estimated by one power iteration in each pass in training mode (Miyato et al. 2018,
    algorithm 1). The parameters stay the same objects, so an optimizer may hold them already.
    Layers in `done`, which another network shares, are left as they are.

    Raises UserError for a network without convolutions, and for a convolution with a hook-based
    weight or spectral norm.
    """
    convolutions = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    if not convolutions:
        raise UserError(
            f"--spectral_norm is for nn.Conv2d and nn.ConvTranspose2d, and a {type(net).__name__} "
            "has none: leave it out"
        )
    for module in convolutions:
        if "weight" not in module._parameters and not is_parametrized(module, "weight"):
            raise UserError(
                f"--spectral_norm does not work with the {module} of a {type(net).__name__}, "
                "which has a norm of its weights already: leave --spectral_norm out, or take "
                "that norm from torch.nn.utils.parametrizations"
            )
        if module not in done:
            spectral_norm(module)


def needs_bias(norm_layer: NormLayer) -> bool:
    """Whether convolutions before this norm have a bias: only before instance norm.

    Batch norm has its own shift. `none` has no bias either, to match released weights.
    """
    layer = norm_layer.func if isinstance(norm_layer, functools.partial) else norm_layer
    return layer is nn.InstanceNorm2d
