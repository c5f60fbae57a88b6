"""Run any generator on images of any size: pad them to a size it takes, and crop the result."""

from __future__ import annotations

import functools

import torch
from torch import nn

from models.base_model import BaseModel
from models.networks import ResnetGenerator, UnetGenerator
from models.padding import apply_padded
from util.errors import UserError, first_line, is_out_of_memory

SELF_PADDING = (ResnetGenerator, UnetGenerator)  # as their `fits` says


def size_rule(net: nn.Module, input_nc: int, device: torch.device) -> tuple[int, int] | str:
    """The number that height and width must be multiples of, and their minimum; or why none fits.

    Networks that pad by themselves declare both. For others they are found by trial: the smallest
    power of two, up to 256, for which images keep their size. Where there is none, for example
    because a network enlarges images, the reason is returned. The network runs in evaluation
    mode, which uses no random numbers.
    """
    if isinstance(net, SELF_PADDING):
        return net.fits

    name = type(net).__name__
    other_sizes = f"{name} gives images of other sizes than it takes"
    reason = ""

    def keeps(height: int, width: int) -> bool:
        nonlocal reason
        x = torch.zeros(1, input_nc, height, width, dtype=torch.float32, device=device)
        try:
            if one_tensor(net, x).shape[-2:] == x.shape[-2:]:
                return True
            reason = other_sizes
        except Exception as e:  # layers raise anything for sizes that they can't take
            if reason != other_sizes:
                reason = f"{name} takes no size that was tried, {height}x{width}: {first_line(e)}"
        return False

    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            for multiple in (2**n for n in range(9)):
                odd = -(-64 // multiple) | 1  # so that sizes are not multiples of twice as much
                if keeps(odd * multiple, (odd + 2) * multiple):
                    sizes = range(multiple, odd * multiple, multiple)
                    return multiple, next((n for n in sizes if keeps(n, n)), odd * multiple)
    finally:
        for module, mode in modes:
            module.training = mode
    return reason


def one_tensor(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The result of a network; raises UserError if it is not a tensor."""
    result = net(x)
    if not isinstance(result, torch.Tensor):
        raise UserError(
            f"a {type(net).__name__} returns a {type(result).__name__}: to translate "
            "images of any size, a network must return one tensor (N, C, H, W)"
        )
    return result


class KeepsSize(nn.Module):
    """A generator for images of any size: (N, C, H, W) to (N, C', H, W).

    Results of a network that changes sizes are not cropped.
    """

    def __init__(self, net: nn.Module, rule: tuple[int, int] | str | None = None):
        """`rule` is what `size_rule` found; None: find it in the first call."""
        super().__init__()
        self.net, self.rule = net, rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rule is None:
            self.rule = size_rule(self.net, x.shape[1], x.device)
        rule = (1, 1) if isinstance(self.rule, str) else self.rule
        try:
            return apply_padded(functools.partial(one_tensor, self.net), x, *rule)
        except (TypeError, RuntimeError) as e:
            # with a size rule the size is right: the error is the network's own, and must show
            if not isinstance(self.rule, str) or is_out_of_memory(e):
                raise
            name, size = type(self.net).__name__, "x".join(map(str, x.shape))
            raise UserError(f"{name} fails on images of {size}: {first_line(e)}") from e


def keep_sizes(model: BaseModel) -> None:
    """Make the generators of a model take images of any size, and return that size."""
    generators = [net for name, net in model.networks().items() if name.startswith("G")]
    wrapped = {net: KeepsSize(net) for net in generators if not isinstance(net, SELF_PADDING)}
    for name, value in list(vars(model).items()):
        if isinstance(value, nn.Module) and value in wrapped:
            setattr(model, name, wrapped[value])
