"""Run any generator on pictures of any size: pad them to a size it takes, and crop the result."""

from __future__ import annotations

import torch
from torch import nn

from models.base_model import BaseModel
from models.networks import ResnetGenerator, UnetGenerator
from models.padding import apply_padded
from util.errors import UserError

SELF_PADDING = (ResnetGenerator, UnetGenerator)  # to what it `fits`


def size_rule(net: nn.Module, input_nc: int, device: torch.device) -> tuple[int, int] | None:
    """The number of which height and width must be multiples, and the least size.

    Networks that pad by themselves know it. For others it is found by trying: the smallest power of
    two, up to 256, for which pictures keep their size. None if there is none, for example where a
    network enlarges pictures. The network runs in evaluation mode, which uses no random numbers.
    """
    if isinstance(net, SELF_PADDING):
        return net.fits

    def keeps(height: int, width: int) -> bool:
        x = torch.zeros(1, input_nc, height, width, device=device)
        try:
            return net(x).shape[-2:] == x.shape[-2:]
        except Exception:  # layers raise anything for sizes that they can't take
            return False

    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            for multiple in (2**n for n in range(9)):
                odd = -(-64 // multiple) | 1  # so that sizes are no multiples of twice as much
                if keeps(odd * multiple, (odd + 2) * multiple):
                    sizes = range(multiple, odd * multiple, multiple)
                    return multiple, next((n for n in sizes if keeps(n, n)), odd * multiple)
    finally:
        for module, mode in modes:
            module.training = mode
    return None


class KeepsSize(nn.Module):
    """A generator for pictures of any size: (N, C, H, W) to (N, C', H, W).

    Of one that gives other sizes the results are whole.
    """

    def __init__(self, net: nn.Module, rule: tuple[int, int] | None = None):
        """`rule` is what `size_rule` found; None looks for it in the first call."""
        super().__init__()
        self.net, self.rule = net, rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rule is None:
            self.rule = size_rule(self.net, x.shape[1], x.device) or (1, 1)
        return apply_padded(self._picture, x, *self.rule)

    def _picture(self, x: torch.Tensor) -> torch.Tensor:
        result = self.net(x)
        if not isinstance(result, torch.Tensor):
            raise UserError(
                f"a {type(self.net).__name__} returns a {type(result).__name__}, and pictures of "
                "any size are translated by networks that return one tensor (N, C, H, W)"
            )
        return result


def keep_sizes(model: BaseModel) -> None:
    """Make the generators of a model take pictures of any size and give it back."""
    generators = [net for name, net in model.networks().items() if name.startswith("G")]
    wrapped = {net: KeepsSize(net) for net in generators if not isinstance(net, SELF_PADDING)}
    for name, value in list(vars(model).items()):
        if isinstance(value, nn.Module) and value in wrapped:
            setattr(model, name, wrapped[value])
