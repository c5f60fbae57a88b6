"""Feature maps whose rows are computed lazily, and the operations that make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F


class RowSource(Protocol):
    """An image that is read in bands of rows."""

    channels: int
    height: int
    width: int

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (C, h, W) in [-1, 1], on the CPU."""
        ...


class Rows:
    """A feature map (1, channels, height, width) whose rows are computed lazily.

    `rows(top, bottom)` computes rows [top, bottom) as (1, C, h, W) from rows of the `inputs`.
    A `costly` map is stored before it is read twice.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        rows: Callable[[int, int], torch.Tensor],
        *inputs: Rows,
        costly: bool = False,
    ):
        self.channels, self.height, self.width = self.shape = shape
        self.rows, self.inputs, self.costly = rows, inputs, costly


def pointwise(function: Callable[[torch.Tensor], torch.Tensor], x: Rows) -> Rows:
    """`function` applied to each value; it must not work in place."""
    return Rows(x.shape, lambda top, bottom: function(x.rows(top, bottom)), x)


def padded(x: Rows, sides: Sequence[int], mode: str) -> Rows:
    """Rows with a border: `sides` are left, right, top and bottom, as for `F.pad`."""
    left, right, above, below = sides
    last = x.height - 1

    def rows(top: int, bottom: int) -> torch.Tensor:
        top, bottom = top - above, bottom - above
        wanted = torch.arange(top, bottom)
        inside = wanted.clamp(0, last)
        if mode == "reflect":
            inside = last - (last - wanted.abs()).abs()
        low, high = int(inside.min()), int(inside.max()) + 1
        y = x.rows(low, high)
        if mode == "constant":
            return F.pad(y, (left, right, low - top, bottom - high))
        if (low, high) != (top, bottom):
            y = y[:, :, (inside - low).to(y.device)]
        return F.pad(y, (left, right, 0, 0), mode) if left + right else y

    return Rows((x.channels, x.height + above + below, x.width + left + right), rows, x)


def convolved(
    x: Rows, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, groups: int
) -> Rows:
    """A convolution with `weight` (out, in / groups, kh, kw), without padding."""
    kernel, across = weight.shape[2:]

    def rows(top: int, bottom: int) -> torch.Tensor:
        y = x.rows(top * stride, (bottom - 1) * stride + kernel)
        return F.conv2d(y, weight, bias, stride, groups=groups)

    height, width = (x.height - kernel) // stride + 1, (x.width - across) // stride + 1
    return Rows((len(weight), height, width), rows, x, costly=True)


def conv_transposed(
    x: Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    groups: int,
    crop: int,
    more: int = 0,
) -> Rows:
    """A transposed convolution with `weight` (in, out / groups, kh, kw).

    `crop` rows and columns are cut off on each side, then `more` added at the bottom and right:
    PyTorch's `padding` and `output_padding`.
    """
    _, out, kernel, across = weight.shape

    def rows(top: int, bottom: int) -> torch.Tensor:
        top, bottom = top + crop, bottom + crop
        low = max(0, -((kernel - 1 - top) // stride))
        y = x.rows(low, min(x.height, (bottom - 1) // stride + 1))
        pads = (0, crop), (more, more)
        y = F.conv_transpose2d(y, weight, bias, stride, *pads, groups)
        return y[:, :, top - low * stride : bottom - low * stride]

    sizes = (x.height, kernel), (x.width, across)
    height, width = ((n - 1) * stride + k - 2 * crop + more for n, k in sizes)
    return Rows((out * groups, height, width), rows, x, costly=True)


def extended(source: RowSource, multiple: int, least: int, device: torch.device) -> Rows:
    """An image padded at the right and at the bottom, as by `apply_padded`."""
    c, h, w = source.channels, source.height, source.width
    height, width = (max(least, -(-n // multiple) * multiple) for n in (h, w))
    mode = "reflect" if height < 2 * h and width < 2 * w else "replicate"

    def rows(top: int, bottom: int) -> torch.Tensor:
        if device.type == "meta":
            return torch.empty(1, c, bottom - top, w, dtype=torch.float32, device=device)
        return source.rows(top, bottom)[None].to(device)

    return padded(Rows((c, h, w), rows), (0, width - w, 0, height - h), mode)
