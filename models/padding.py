"""Images of any size for networks that need a multiple of some size: pad, run, crop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def pad_to_fit(x: torch.Tensor, multiple: int, minimum: int) -> torch.Tensor:
    """Pad height and width to multiples of `multiple`, and to at least `minimum`.

    x: (N, C, H, W) -> (N, C, H', W'). Pads at the right and at the bottom, by reflection if the
    image is large enough for it, else by repeating the border. A size that fits is not changed.
    """
    height, width = x.shape[-2:]
    pad_h = max(minimum, -(-height // multiple) * multiple) - height
    pad_w = max(minimum, -(-width // multiple) * multiple) - width
    if pad_h == 0 and pad_w == 0:
        return x
    mode = "reflect" if pad_h < height and pad_w < width else "replicate"
    return F.pad(x, (0, pad_w, 0, pad_h), mode=mode)


def apply_padded(
    net: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, multiple: int, minimum: int
) -> torch.Tensor:
    """Pad the input by `pad_to_fit`, run `net`, and crop the padding from the output.

    x: (N, C, H, W) -> (N, C', H, W), or (N, C', kH, kW) if `net` enlarges k times.
    """
    padded = pad_to_fit(x, multiple, minimum)
    y = net(padded)
    if padded is x:
        return y
    height = x.shape[-2] * y.shape[-2] // padded.shape[-2]
    width = x.shape[-1] * y.shape[-1] // padded.shape[-1]
    return y[..., :height, :width]
